"""Compare the best trials of a search after they were retrained with fresh seeds, and write the winner's values."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from levin.config.compose import ANY_ENV
from levin.core import files, paths
from levin.results.aggregates import iqm_with_interval, prediction_interval
from levin.results.tables import plain_table, short_number
from levin.runs.provenance import run_git

WINNER, RETRAINED = "winner.yaml", "retrained"
OLD = "# Other values are those of the earlier file, whose comment was:"
HEADER = "# @package _global_\n"
SECTIONS = ("algo", "env", "total_env_steps")  # what a file in configs/tuned/ may set


@dataclass(frozen=True)
class Candidate:
    """Values that were retrained with fresh seeds.

    Args:
        name: Name of the trial, or of the values that the search started from.
        value: IQM in the search; None: it was not in the search.
        scores: Last evaluation of each seed in the search.
        fresh: Last evaluation of each fresh seed.
        alike: Last evaluations of the seeds of all complete trials, which show how much seeds differ.
    """

    name: str
    value: float | None
    scores: list[float]
    fresh: list[float]
    alike: list[list[float]]

    @property
    def result(self) -> float:
        """IQM over the fresh seeds."""
        return self.interval[0]

    @property
    def interval(self) -> tuple[float, float, float]:
        """IQM over the fresh seeds, and its 95% interval."""
        mean, ends = iqm_with_interval(np.array(self.fresh)[:, None, None])
        return float(mean[0]), float(ends[0, 0]), float(ends[1, 0])

    @property
    def predicted(self) -> tuple[float, float] | None:
        """95% prediction interval for the mean over the fresh seeds: around the trial's mean, with the spread of all.

        The spread of its own few seeds says little: those of the best trial may all have the largest return. The best
        of many trials was also lucky, so its fresh mean tends to the lower end.
        """
        if len(self.scores) < 2:
            return None
        alike = [np.array(scores) for scores in self.alike]
        return prediction_interval(np.array(self.scores), len(self.fresh), alike)


def describe_candidates(candidates: list[Candidate]) -> str:
    """Return a table of the candidates: value in the search, predicted interval, fresh seeds."""
    rows = []
    for each in candidates:
        mean, predicted = float(np.mean(each.fresh)), each.predicted
        inside = "" if predicted is None else "yes" if predicted[0] <= mean <= predicted[1] else "no"
        rows.append(
            (
                each.name,
                "" if each.value is None else short_number(each.value),
                "" if predicted is None else " to ".join(map(short_number, predicted)),
                short_number(mean),
                inside,
                short_number(each.result),
                " to ".join(map(short_number, each.interval[1:])) if len(each.fresh) > 1 else "",
            )
        )
    columns = ("", "IQM in search", "predicted mean", "fresh mean", "inside", "fresh IQM", "95% interval")
    return plain_table(columns, rows)


def tuned_path(algo: str, env: str) -> Path | None:
    """Return the path of the tuned config of an algorithm in an env; None for envs of any id, which have none."""
    if env in ANY_ENV:
        return None
    fork = next((file for file in paths.fork_files() if file.stem == algo), None)
    folder = paths.CONFIGS if fork is None or (paths.CONFIGS / "algo" / f"{algo}.yaml").exists() else fork.parents[1]
    return folder / "tuned" / f"{algo}_{env}.yaml"


def winner_text(config: DictConfig, keys: Iterable[str], before: Path | None, comments: list[str]) -> str:
    """Return the text of the winner's tuned config: the earlier tuned config, with the winner's values.

    Args:
        config: Config of the winner.
        keys: Keys that the search or the command line has set.
        before: Tuned config that the search started from, if there was one.
        comments: Lines that say how the values were found.
    """
    content, lines = OmegaConf.create(), [HEADER, *(f"# {line}\n" for line in comments)]
    if before is not None and before.is_file():
        text = before.read_text(encoding="utf-8")
        content = OmegaConf.create(text)
        old = [line for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
        if OLD in old:  # comments of an earlier search
            old = old[old.index(OLD) + 1 :]
        lines += [f"{line}\n" for line in [OLD, *old]]
    for key in keys:
        if key.partition(".")[0] in SECTIONS and key not in SECTIONS[:2]:
            OmegaConf.update(content, key, OmegaConf.select(config, key), force_add=True)
    return "".join(lines) + OmegaConf.to_yaml(content)


def write_winner(text: str, folder: Path, path: Path | None) -> str:
    """Write winner.yaml, and the tuned config if there is one; return a sentence about it.

    A tuned config that git could not give back is left alone, unless this search has written it.
    """
    previous = (folder / WINNER).read_text(encoding="utf-8") if (folder / WINNER).is_file() else None
    files.write_text(folder, WINNER, text)
    if path is None:
        return f"the values are in {folder / WINNER}"
    shown = path.relative_to(paths.ROOT)
    known = path.exists() and _is_committed(path)
    if path.exists() and not known and path.read_text(encoding="utf-8") != previous:
        return f"{shown} has changes that git does not have, and is left alone; the values are in {folder / WINNER}"
    path.parent.mkdir(exist_ok=True)
    files.write_text(path.parent, path.name, text)
    return f"the values are in {shown}" + (f": git diff {shown} shows what has changed" if known else "")


def _is_committed(path: Path) -> bool:
    """Return whether git has this version of a file."""
    tracked = run_git("ls-files", "--", str(path))
    return bool(tracked) and not run_git("status", "--porcelain", "--", str(path))
