"""Statistics over few seeds, by rliable (Agarwal et al. 2021, arXiv:2108.13264)."""

from collections.abc import Callable

import numpy as np
from rliable import library
from rliable.metrics import probability_of_improvement as probability
from scipy import stats

REPETITIONS = 2000  # of the bootstrap: the interval's ends move by about a percent of its width


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over seeds and tasks, of each frame: `[seeds, tasks, frames] -> [frames]`."""
    return stats.trim_mean(scores.reshape(-1, scores.shape[-1]), proportiontocut=0.25, axis=0)


def iqm_with_interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interquartile mean `[frames]` and its 95% stratified-bootstrap interval `[2, frames]`.

    Of scores `[seeds, tasks, frames]`. One seed has no interval: its ends are then the value itself.
    """
    return _bootstrap(scores, iqm)


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, np.ndarray]:
    """P(a run of ours is better than one of theirs on the same task), and its interval `[2]`.

    Args:
        ours: `[seeds, tasks]`.
        theirs: `[other seeds, tasks]`, the same tasks.
    """
    estimate, interval = _bootstrap([ours, theirs], lambda x, y: np.array([probability(x, y)]))
    return float(estimate[0]), interval[:, 0]


def _bootstrap(
    scores: np.ndarray | list[np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    before = np.random.get_state()
    np.random.seed(0)  # rliable draws from the global generator, whatever `random_state` it is given
    try:
        points, intervals = library.get_interval_estimates({"": scores}, statistic, reps=REPETITIONS)  # type: ignore[dict-item]
    finally:
        np.random.set_state(before)
    return points[""], intervals[""]


def prediction_interval(scores: np.ndarray, others: int) -> tuple[float, float]:
    """Where the mean of `others` further seeds lies, 19 times in 20, when they come from where these `[seeds]` do.

    Student's t with the spread of these seeds. Two seeds or more.
    """
    n = len(scores)
    half = stats.t.ppf(0.975, n - 1) * scores.std(ddof=1) * np.sqrt(1 / n + 1 / others)
    return float(scores.mean() - half), float(scores.mean() + half)
