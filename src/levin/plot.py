"""Plot the learning curves of runs in one figure: `python -m levin.plot runs="runs/sac_* runs/my_idea_*"`."""

import glob
import sys
from pathlib import Path

from omegaconf import OmegaConf

from levin.config import cli
from levin.core.errors import ConfigError, exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.results.curves import CURVES, METRICS, Curve, read_curves, read_run
from levin.runs.load import load_config


def plot(*, runs: str, out: str = "plot.png") -> Path:
    """Plot the interquartile mean over seeds of `eval/return_mean`, with its 95% bootstrap interval.

    Args:
        runs: Run folders, folders of runs, or results in experiments/, separated by spaces; `*` is a wildcard. Runs in
            the same folder are the seeds of one learning curve.
        out: Path of the image to write; returned.

    Raises:
        ConfigError: There is no run, or no run of a curve has an evaluation yet.
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
    """Return the learning curves of all seeds: folder that the seeds share -> their curves.

    Raises:
        ConfigError: A folder is not a run, a folder of runs or a result, or no run of a curve has an evaluation yet.
    """
    patterns = [runs] if Path(runs).exists() else runs.split()  # a folder may have a space or a bracket in its name
    matches = {Path(match) for each in patterns for match in ([each] if Path(each).exists() else glob.glob(each))}
    folders = sorted(match for match in matches if match.is_dir())
    if not folders:
        raise ConfigError(f"runs={runs} matches no folder")
    curves: dict[str, list[Curve]] = {}
    unused = [f"{each} matches nothing" for each in patterns if not Path(each).exists() and not glob.glob(each)]
    for folder in folders:
        if (folder / CURVES).is_file():
            curves.setdefault(str(folder), []).extend(read_curves(folder).values())
        elif (folder / METRICS).is_file():
            curves.setdefault(str(folder.parent), []).append(read_run(folder))
        elif seed_folders := sorted(file.parent for file in folder.glob(f"*/{METRICS}")):
            curves.setdefault(str(folder), []).extend(map(read_run, seed_folders))
            unused += [
                f"{each} has no {METRICS}" for each in sorted(folder.glob("*/")) if not (each / METRICS).is_file()
            ]
        else:
            raise ConfigError(f"{folder} is neither a run nor a result: it has no {METRICS} and no {CURVES}")
    for label in curves:
        check_one_config(Path(label), [folder for folder in folders if folder.parent == Path(label)])
    for label, seeds in curves.items():
        curves[label] = [seed for seed in seeds if len(seed.env_steps)]
        if not curves[label]:
            raise ConfigError(f"{label} has no evaluation yet")
        if missing := len(seeds) - len(curves[label]):
            unused.append(f"{missing} of the {len(seeds)} runs in {label} have no evaluation yet")
        ends = sorted({int(seed.env_steps[-1]) for seed in curves[label]})
        if len(ends) > 1:
            unused.append(f"what the runs in {label} have after {ends[0]:,} env steps, where the shortest ends")
    for line in unused:
        print(f"levin: not drawn: {line}", file=sys.stderr)
    return curves


def check_one_config(folder: Path, runs: list[Path]) -> None:
    """Check that the runs of one curve differ in their seeds only, as far as algorithm and env go.

    Args:
        folder: Folder that the runs share.
        runs: Run folders; if empty, all in `folder`.

    Raises:
        ConfigError: They differ in a value of `algo` or `env`.
    """
    values: dict[str, dict[str, Path]] = {}  # key -> value -> a run that has it
    for run in runs or sorted(folder.glob("*/")):
        if (run / "config.yaml").is_file():
            config = load_config(run, runs=())
            for key in flat_keys({name: to_plain(config[name]) for name in ("algo", "env")}):
                values.setdefault(key, {}).setdefault(str(OmegaConf.select(config, key)), run)
    for key, seen in values.items():
        if len(seen) > 1:
            listed = " and ".join(f"{value} ({run.name})" for value, run in list(seen.items())[:2])
            raise ConfigError(
                f"the runs in {folder} are not seeds of one curve: {key} is {listed}; "
                "move those with other values into a folder of their own"
            )


def main() -> None:
    """Plot the curves and print the path of the image."""
    with exit_on_user_error():
        print(plot(**cli.command_arguments(plot)))


if __name__ == "__main__":
    main()
