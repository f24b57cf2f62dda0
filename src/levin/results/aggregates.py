"""Statistics over few seeds, computed with rliable (Agarwal et al. 2021, arXiv:2108.13264)."""

from collections.abc import Callable, Sequence

import numpy as np

REPETITIONS = 2000  # bootstrap resamples; with this many, the ends of an interval vary by about 1% of its width


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean (IQM) over seeds and tasks: `[seeds, tasks, frames] -> [frames]`.

    It leaves out a quarter of the scores at each end, rounded down, and is NaN if a score is. Without NaN, equal to
    `scipy.stats.trim_mean`, whose checks of its arguments take most of the time of a bootstrap.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    cut = len(flat) // 4
    middle = np.partition(flat, (cut, len(flat) - cut - 1), axis=0)[cut : len(flat) - cut].mean(0)
    return np.where(np.isnan(flat).any(0), np.nan, middle)  # a partition puts NaN last, as if it were the best score


def iqm_with_interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the interquartile mean `[frames]` of scores `[seeds, tasks, frames]` and its 95% interval `[2, frames]`.

    The interval is a stratified bootstrap. With one seed there is no interval: both ends are the mean.
    """
    if len(scores) == 1:
        mean = iqm(scores)
        return mean, np.stack([mean, mean])
    return _bootstrap(scores, iqm)


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """Return P(a run of the first algorithm beats one of the second on the same task), and its 95% interval `[2]`.

    Args:
        first: Scores `[seeds, tasks]` of the first algorithm.
        second: Scores `[other seeds, tasks]` of the second algorithm, on the same tasks.
    """
    estimate, interval = _bootstrap([first, second], _share_of_wins)
    return float(estimate[0]), interval[:, 0]


def _share_of_wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share `[1]` of pairs of runs that the first wins; a draw is half a win. It is NaN if a score is.

    Equal to rliable's, which makes a statistical test of scipy for each task.
    """
    margin = first[:, None] - second[None]  # [seeds, other seeds, tasks]
    return np.array([((np.sign(margin) + 1) / 2).mean()])


def _bootstrap(
    scores: np.ndarray | list[np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    from rliable import library  # late, as scipy below: both take a second to import

    state = np.random.get_state()
    np.random.seed(0)  # rliable samples from the global generator, even if it is given a `random_state`
    try:
        points, intervals = library.get_interval_estimates({"": scores}, statistic, reps=REPETITIONS)  # type: ignore[dict-item]
    finally:
        np.random.set_state(state)
    return points[""], intervals[""]


def prediction_interval(
    scores: np.ndarray, others: int, alike: Sequence[np.ndarray] | None = None
) -> tuple[float, float]:
    """Return the 95% prediction interval for the mean of `others` new seeds of the same algorithm and task.

    Args:
        scores: Scores `[seeds]` of two seeds or more.
        others: Number of new seeds.
        alike: Scores of groups of seeds whose standard deviation is taken to be the same; None: `scores` alone. The
            interval is Student's t with their pooled standard deviation.
    """
    from scipy import stats

    groups = [scores] if alike is None else alike
    freedom = sum(len(group) - 1 for group in groups)
    deviation = np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom)
    half = stats.t.ppf(0.975, freedom) * deviation * np.sqrt(1 / len(scores) + 1 / others)
    return float(scores.mean() - half), float(scores.mean() + half)
