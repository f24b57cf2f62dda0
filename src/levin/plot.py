"""Evaluation curves of runs on one axis. `python -m levin.plot runs="runs/sac_pendulum/* runs/my_idea_pendulum/*"`."""

import csv
import glob
import gzip
from pathlib import Path

import numpy as np

from levin import config
from levin.errors import ConfigError, one_sentence


def plot(*, runs: str, out: str = "plot.png") -> Path:
    """Draw the mean over seeds of `eval/return_mean`, and the range of the seeds around it.

    Args:
        runs: Run folders or results in experiments/, separated by spaces; `*` matches. Runs with the same parent are
            seeds of one curve.
        out: The picture to write.

    Raises:
        ConfigError: No run is there, or it has no evaluation yet.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folders = sorted({Path(match) for pattern in runs.split() for match in glob.glob(pattern)})
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for folder in folders:
        is_result = (folder / "curves.csv.gz").is_file()
        curves.setdefault(str(folder if is_result else folder.parent), []).extend(read(folder))
    if not curves:
        raise ConfigError(f"runs={runs} matches no folder")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, seeds in curves.items():
        until = min(steps[-1] for steps, _ in seeds)
        grid = seeds[0][0][seeds[0][0] <= until]
        values = np.stack([np.interp(grid, steps, returns) for steps, returns in seeds])  # [seeds, evaluations]
        name = f"{Path(label).name or label} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
        (line,) = axes.plot(grid, values.mean(0), label=name, linewidth=2)
        axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="env steps", ylabel="evaluation return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return Path(out)


def read(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Env steps and mean returns of the evaluations, both `[evaluations]`: of one run, or of each seed of a result.

    Raises:
        ConfigError: The folder is neither, or holds no evaluation.
    """
    result, run = folder / "curves.csv.gz", folder / "metrics.csv"
    if result.is_file():
        with gzip.open(result, "rt") as file:
            rows = [(row["seed"], int(row["env_steps"]), row["return_mean"]) for row in csv.DictReader(file)]
    elif run.is_file():
        with run.open() as file:
            rows = [("", int(row["env_steps"]), row.get("eval/return_mean")) for row in csv.DictReader(file)]
    else:
        raise ConfigError(f"{folder} is no run and no result: it has no metrics.csv and no curves.csv.gz")
    seeds: dict[str, list[tuple[int, float]]] = {}
    for seed, env_steps, value in rows:
        if value:
            seeds.setdefault(seed, []).append((env_steps, float(value)))
    if not seeds:
        raise ConfigError(f"{folder} has no evaluation yet")
    return [
        (np.array(steps), np.array(returns)) for steps, returns in (zip(*each, strict=True) for each in seeds.values())
    ]


def main() -> None:
    """Print where the picture is."""
    with one_sentence():
        print(plot(**config.arguments(plot)))


if __name__ == "__main__":
    main()
