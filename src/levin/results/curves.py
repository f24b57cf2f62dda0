"""Learning curves: read them from a run's metrics or a result's stored files, and write them."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from levin.core import files
from levin.core.errors import ConfigError

METRICS = "metrics.csv"  # of a run
CURVES, TRAINING = "curves.csv.gz", "training.csv.gz"
SOURCE_CURVES, SOURCE_TRAINING = "source_curves.csv.gz", "source_training.csv.gz"  # of the source's own code, run here
COLUMNS = {
    **dict.fromkeys((CURVES, SOURCE_CURVES), ("return_mean", "return_std")),
    **dict.fromkeys((TRAINING, SOURCE_TRAINING), ("return_mean", "episodes")),
}


@dataclass(frozen=True, eq=False)
class Curve:
    """Learning curve of one seed; all arrays are `[rows]`.

    `second` is the standard deviation of the returns in evaluation curves, the number of episodes in training curves.
    """

    env_steps: np.ndarray
    return_mean: np.ndarray
    second: np.ndarray

    def equals(self, other: "Curve") -> bool:
        """Return whether all numbers are identical, to the last bit."""
        return all(
            np.array_equal(getattr(self, key), getattr(other, key)) for key in ("env_steps", "return_mean", "second")
        )

    def first_rows(self, number: int) -> "Curve":
        """Return the curve of the first rows."""
        return Curve(self.env_steps[:number], self.return_mean[:number], self.second[:number])

    def until(self, env_steps: int) -> "Curve":
        """Return the curve up to the first row at or past `env_steps`: an iteration may end past that number.

        Further rows with the same env steps are included: training in a world model's dreams takes no env steps.
        """
        last = self.env_steps[self.env_steps >= env_steps][:1]
        rows = slice(0, int(np.searchsorted(self.env_steps, last[0], "right")) if len(last) else None)
        return Curve(self.env_steps[rows], self.return_mean[rows], self.second[rows])


Curves = dict[int, Curve]


def read_curves(folder: Path, kind: str = CURVES) -> Curves:
    """Return the stored curves of a result by seed; empty before its first run.

    Raises:
        ConfigError: The file is damaged.
    """
    if not (folder / kind).is_file():
        return {}
    with _explain_damage(folder / kind), gzip.open(folder / kind, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        return {
            seed: _curve_from_rows([row for row in rows if int(row["seed"]) == seed], "env_steps", *COLUMNS[kind])
            for seed in sorted({int(row["seed"]) for row in rows})
        }


def read_run(run: Path, kind: str = CURVES) -> Curve:
    """Return the curve of a run, read from the metrics in its folder.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    columns = {CURVES: ("eval/return_mean", "eval/return_std"), TRAINING: ("episode/return", "episode/count")}[kind]
    with _explain_damage(run / METRICS), (run / METRICS).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(columns[0])]
        return _curve_from_rows(rows, "env_steps", *columns)


def read_metric(run: Path, metric: str) -> Curve:
    """Return the values of any column of a run's metrics; `second` is 0. The curve is empty if there are none.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    with _explain_damage(run / METRICS), (run / METRICS).open(encoding="utf-8") as file:
        rows = [{**row, "": "0"} for row in csv.DictReader(file) if row.get(metric)]
        return _curve_from_rows(rows, "env_steps", metric, "")


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Turn an error in reading a CSV file into a ConfigError that names the file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _curve_from_rows(rows: Iterable[dict[str, str]], *columns: str) -> Curve:
    curve = Curve(*(np.array([float(row[column]) for row in rows]) for column in columns))
    steps = curve.env_steps
    if not ((steps >= 0) & (steps <= 2**53)).all() or (np.diff(steps) < 0).any():
        raise ValueError("env_steps must be increasing whole numbers")
    return curve


def write_curves(folder: Path, curves: Curves, kind: str = CURVES) -> None:
    """Write the curves of a result in full precision; equal curves give identical files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "env_steps", *COLUMNS[kind]])
    for seed, curve in sorted(curves.items()):
        for env_steps, *values in zip(curve.env_steps, curve.return_mean, curve.second, strict=True):
            writer.writerow([seed, int(env_steps), *map(float, values)])
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:
        file.write(text.getvalue().encode())
    with files.replace(folder, kind) as path:
        path.write_bytes(packed.getvalue())


def align_curves(seeds: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Return the env steps `[evaluations]` that all seeds have reached, and their returns `[seeds, evaluations]`.

    If the seeds were evaluated at different env steps, these are the env steps of all seeds from the last beginning to
    the first end, and the returns are interpolated.

    Raises:
        ConfigError: A seed ends before another begins.
    """
    grid = seeds[0].env_steps
    if all(np.array_equal(curve.env_steps, grid) for curve in seeds):  # not interpolated: steps may repeat
        return grid, np.stack([curve.return_mean for curve in seeds])
    start, end = max(curve.env_steps[0] for curve in seeds), min(curve.env_steps[-1] for curve in seeds)
    if start > end:
        raise ConfigError(f"a seed ends after {end:,.0f} env steps, before another begins, after {start:,.0f}")
    steps = np.unique(np.concatenate([curve.env_steps for curve in seeds]))
    grid = steps[(steps >= start) & (steps <= end)]
    return grid, np.stack([np.interp(grid, curve.env_steps, curve.return_mean) for curve in seeds])
