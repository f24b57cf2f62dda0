"""Evaluation curves of runs on one axis. `python -m levin.plot runs="runs/sac_* runs/my_idea_*"`."""

import glob
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from levin import cells, config
from levin.errors import ConfigError, one_sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.csv"


def plot(*, runs: str, out: str = "plot.png") -> Path:
    """Draw the interquartile mean over seeds of `eval/return_mean`, and its 95% bootstrap interval.

    Args:
        runs: Run folders, folders of runs, or results in experiments/, separated by spaces; `*` matches. Runs with
            the same parent are seeds of one curve.
        out: The picture to write.

    Raises:
        ConfigError: No run is there, or it has no evaluation yet.
    """
    figure, axes = new_figure()
    curves = collect(runs)
    names = {label: Path(label).name for label in curves}
    for label, seeds in curves.items():
        name = names[label] if list(names.values()).count(names[label]) == 1 else label
        draw(axes, f"{name} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})", seeds)
    axes.legend(frameon=False)
    save(figure, Path(out))
    return Path(out)


def collect(runs: str) -> dict[str, list[cells.Curve]]:
    """The curves of the seeds, by the folder that they share.

    Raises:
        ConfigError: A folder is no run, no folder of runs and no result, or there is nothing in it to draw yet.
    """
    matches = {Path(match) for pattern in runs.split() for match in glob.glob(pattern)}
    folders = sorted(each for each in matches if each.is_dir())
    if not folders:
        raise ConfigError(f"runs={runs} matches no folder")
    curves: dict[str, list[cells.Curve]] = {}
    for folder in folders:
        if (folder / cells.CURVES).is_file():
            curves.setdefault(str(folder), []).extend(cells.read_curves(folder).values())
        elif (folder / METRICS).is_file():
            curves.setdefault(str(folder.parent), []).append(cells.read_run(folder))
        elif found := sorted(each.parent for each in folder.glob(f"*/{METRICS}")):
            curves.setdefault(str(folder), []).extend(map(cells.read_run, found))
        else:
            raise ConfigError(f"{folder} is no run and no result: it has no {METRICS} and no {cells.CURVES}")
    for label, seeds in curves.items():
        curves[label] = [seed for seed in seeds if len(seed.env_steps)]
        if not curves[label]:
            raise ConfigError(f"{label} has no evaluation yet")
    return curves


def on_one_grid(seeds: list[cells.Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Env steps `[evaluations]` that every seed has come to, and the returns there `[seeds, evaluations]`."""
    grid = seeds[0].env_steps
    if all(np.array_equal(curve.env_steps, grid) for curve in seeds):  # which may stand still
        return grid, np.stack([curve.return_mean for curve in seeds])
    grid = grid[grid <= min(curve.env_steps[-1] for curve in seeds)]
    return grid, np.stack([np.interp(grid, curve.env_steps, curve.return_mean) for curve in seeds])


def draw(axes: "Axes", label: str, seeds: list[cells.Curve]) -> None:
    """One line, and around it the interval when there are seeds enough for one."""
    from levin import aggregates  # rliable takes seconds to import

    grid, returns = on_one_grid(seeds)
    iqm, interval = aggregates.iqm_with_interval(returns[:, None])  # one task: [seeds, 1, evaluations]
    (line,) = axes.plot(grid, iqm, label=label, linewidth=2)
    axes.fill_between(grid, *interval, color=line.get_color(), alpha=0.2, linewidth=0)


def new_figure(columns: int = 1) -> "tuple[Figure, Axes]":
    """A picture that needs no display; with more than one column, the axes are an array."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(ncols=columns, figsize=(7 if columns == 1 else 5 * columns, 4), layout="constrained")
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    if columns == 1:
        axes.set(xlabel="env steps", ylabel="evaluation return")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def save(figure: "Figure", out: Path, source: str = "") -> None:
    """Write the picture; `source` goes into the file as its description.

    Raises:
        ConfigError: It can't be written.
    """
    from matplotlib import pyplot as plt

    try:
        figure.savefig(out, dpi=150, metadata={"Description": source} if source else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"out={out} can't be written: {error}") from error
    finally:
        plt.close(figure)


def main() -> None:
    """Print where the picture is."""
    with one_sentence():
        print(plot(**config.arguments(plot)))


if __name__ == "__main__":
    main()
