"""Evaluation curves of runs on one axis. `python -m levin.plot runs="runs/sac_* runs/my_idea_*"`."""

import glob
from pathlib import Path

from levin.config import cli
from levin.core.errors import ConfigError, exit_on_user_error
from levin.results.curves import CURVES, Curve, read_curves, read_run

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
    from levin.results.figures import draw_line, new_figure, save_figure  # rliable takes seconds to import

    figure, axes = new_figure()
    curves = collect_curves(runs)
    names = {label: Path(label).name for label in curves}
    for label, seeds in curves.items():
        name = names[label] if list(names.values()).count(names[label]) == 1 else label
        draw_line(axes, f"{name} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})", seeds)
    axes.legend(frameon=False)
    save_figure(figure, Path(out))
    return Path(out)


def collect_curves(runs: str) -> dict[str, list[Curve]]:
    """The curves of the seeds, by the folder that they share.

    Raises:
        ConfigError: A folder is no run, no folder of runs and no result, or there is nothing in it to draw yet.
    """
    matches = {Path(match) for pattern in runs.split() for match in glob.glob(pattern)}
    folders = sorted(each for each in matches if each.is_dir())
    if not folders:
        raise ConfigError(f"runs={runs} matches no folder")
    curves: dict[str, list[Curve]] = {}
    for folder in folders:
        if (folder / CURVES).is_file():
            curves.setdefault(str(folder), []).extend(read_curves(folder).values())
        elif (folder / METRICS).is_file():
            curves.setdefault(str(folder.parent), []).append(read_run(folder))
        elif found := sorted(each.parent for each in folder.glob(f"*/{METRICS}")):
            curves.setdefault(str(folder), []).extend(map(read_run, found))
        else:
            raise ConfigError(f"{folder} is no run and no result: it has no {METRICS} and no {CURVES}")
    for label, seeds in curves.items():
        curves[label] = [seed for seed in seeds if len(seed.env_steps)]
        if not curves[label]:
            raise ConfigError(f"{label} has no evaluation yet")
    return curves


def main() -> None:
    """Print where the picture is."""
    with exit_on_user_error():
        print(plot(**cli.command_arguments(plot)))


if __name__ == "__main__":
    main()
