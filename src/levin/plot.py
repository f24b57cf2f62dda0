"""Plot the learning curves of runs in one figure: `python -m levin.plot runs="runs/sac_* runs/my_idea_*"`."""

import csv
import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from levin.config import cli
from levin.core import paths
from levin.core.errors import ConfigError, exit_on_user_error, valid_names
from levin.core.omega import flat_keys, to_plain
from levin.results.curves import CURVES, METRICS, Curve, read_curves, read_metric
from levin.runs.folder import find_folders, read_provenance
from levin.runs.load import load_config

RETURN = "eval/return_mean"
# Config keys and sections that the seeds of one curve need not have in common.
MAX_VALUES = 4  # in a label
NOT_COMPARED = (
    *("seed", "run", "name", "note", "logger", "log_every", "wandb_project", "upload", "checkpoint", "total_env_steps"),
    *("eval.every", "eval.at_start", "trainer.accelerator", "trainer.threads", "trainer.max_time", "collector_workers"),
)


@dataclass
class Runs:
    """Runs of one config, which are the seeds of one learning curve.

    Args:
        folder: Folder that they share; or a result in experiments/.
        config: Values that may change the curve by dotted key; empty without a config.yaml.
        seeds: Curve of each seed.
        sources: Run folder of each seed.
    """

    folder: Path
    config: dict[str, str]
    seeds: dict[str, Curve] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)


def plot(*, runs: str, metric: str = RETURN, out: str | None = None) -> Path:
    """Plot the interquartile mean over seeds of a metric, with its 95% bootstrap interval and the single seeds.

    Args:
        runs: Run folders, folders of runs, or results in experiments/, separated by spaces; `*` is a wildcard. Runs in
            the same folder with the same values and the same code are the seeds of one learning curve.
        metric: Column of metrics.csv.
        out: Path of the image to write; returned. None: `plot.png` in the folder that the runs share.

    Raises:
        ConfigError: There is no run, or no run has a value of the metric yet.
    """
    groups = collect_runs(runs, metric)
    from levin.results.figures import draw_line, new_figure, plain, save_figure  # rliable takes seconds to import

    figure, axes = new_figure()
    for label, group in groups.items():
        curves = list(group.seeds.values())
        draw_line(axes, f"{label} ({len(curves)} seed{'s' if len(curves) > 1 else ''})", curves, single=True)
    axes.set_title(plain(", ".join(sorted({group.config["env.id"] for group in groups.values() if group.config}))))
    axes.set_ylabel("evaluation return" if metric == RETURN else metric)
    axes.legend(frameon=False, title="interquartile mean, 95% interval; thin: seeds", title_fontsize="small")
    path = _default_path([group.folder for group in groups.values()]) if out is None else Path(out)
    save_figure(figure, path)
    return path


def _default_path(folders: list[Path]) -> Path:
    """Return `plot.png` in the folder that the runs share, or in `runs/` if that is experiments/, which has results."""
    shared = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    if shared.is_relative_to(paths.EXPERIMENTS) or paths.EXPERIMENTS.is_relative_to(shared):
        shared = Path("runs")
        shared.mkdir(exist_ok=True)
    return Path(os.path.relpath(shared / "plot.png"))


def collect_runs(runs: str, metric: str = RETURN) -> dict[str, Runs]:
    """Return the runs of each learning curve by its label, and print on stderr what is not drawn.

    The label is the name of the folder that the runs share; if that is not enough, with the values that differ.

    Raises:
        ConfigError: A folder is not a run, a folder of runs or a result, or no run has a value of the metric yet.
    """
    folders, named, unused = find_folders(runs)
    groups: list[Runs] = []
    for folder in folders:
        if (folder / CURVES).is_file():
            if metric != RETURN:
                raise ConfigError(f"{folder} is a result, which has the metric {RETURN} only")
            seeds = {str(seed): curve for seed, curve in read_curves(folder).items()}
            groups.append(Runs(folder, _config(folder)[0], seeds))
        elif (folder / METRICS).is_file():
            _add_run(groups, folder, metric, unused)
        elif own := sorted(file.parent for file in folder.glob(f"*/{METRICS}")):
            for run in own:
                _add_run(groups, run, metric, unused)
            unused += [
                f"{each} has no {METRICS}" for each in sorted(folder.glob("*/")) if not (each / METRICS).is_file()
            ]
        elif folder not in named:
            unused.append(f"{folder} is neither a run nor a result")
        else:
            raise ConfigError(
                f"{folder} is neither a run nor a result: it has no {METRICS} and no {CURVES}; the runs of a sweep are "
                f"in {folder}/*"
            )
    if not groups:
        raise ConfigError(f"runs={runs}: no run has a value of {metric} yet; {_columns(folders)}")
    for group in groups:
        ends = sorted({int(curve.env_steps[-1]) for curve in group.seeds.values()})
        if len(ends) > 1:
            unused.append(f"what the runs in {group.folder} have after {ends[0]:,} env steps, where the shortest ends")
    for line in unused:
        print(f"levin: not drawn: {line}", file=sys.stderr)
    return _labelled(groups)


def _add_run(groups: list[Runs], run: Path, metric: str, unused: list[str]) -> None:
    """Add a run to the group with its folder and config. Of two runs of one seed the longer one is kept."""
    curve, (config, seed) = read_metric(run, metric), _config(run)
    if not len(curve.env_steps):
        unused.append(f"{run} has no value of {metric} yet")
        return
    group = next((each for each in groups if (each.folder, each.config) == (run.parent, config)), None)
    if group is None:
        group = Runs(run.parent, config)
        groups.append(group)
    if seed in group.seeds:
        longer = curve.env_steps[-1] >= group.seeds[seed].env_steps[-1]
        unused.append(f"{group.sources[seed] if longer else run}, another run of seed {seed} that is not longer")
        if not longer:
            return
    group.seeds[seed], group.sources[seed] = curve, run


def _config(run: Path) -> tuple[dict[str, str], str]:
    """Return the values of a run that may change its curve by dotted key, and its seed.

    `code` is a checksum of the code that is not committed, if the run has any.
    """
    if not (run / "config.yaml").is_file():
        return {}, run.name
    config = load_config(run, runs=())
    keys = [
        key for key in flat_keys(to_plain(config)) if not f"{key}.".startswith(tuple(f"{x}." for x in NOT_COMPARED))
    ]
    values = {key: str(OmegaConf.select(config, key)) for key in keys}
    if (run / METRICS).is_file() and (code := read_provenance(run).get("code")):  # a result is of committed code
        values["code"] = hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:6]
    return values, str(config.seed)


def _labelled(groups: list[Runs]) -> dict[str, Runs]:
    """Return the groups by label: the name of their folder, and the values or runs by which those of it differ."""
    labels: dict[str, Runs] = {}
    for group in groups:
        label = group.folder.name
        same_name = [each for each in groups if each.folder.name == label]
        if len({each.folder for each in same_name}) > 1:
            label = str(group.folder)
        siblings = [each for each in groups if each.folder == group.folder]
        keys = sorted({key for each in siblings for key in each.config})
        differing = [key for key in keys if len({each.config.get(key) for each in siblings}) > 1]
        if len(differing) > MAX_VALUES:  # runs that have little in common but their folder
            label = f"{label}/{', '.join(sorted(run.name for run in group.sources.values()))}"
        else:
            values = (f"{key.rpartition('.')[2]}={group.config.get(key, 'unset')}" for key in differing)
            label = ", ".join([label, *values])
        labels[label] = group
    return labels


def _columns(folders: list[Path]) -> str:
    """Return a list of the metrics that the runs have, for a message."""
    names: dict[str, Any] = {}
    for folder in folders:
        for file in [folder / METRICS, *sorted(folder.glob(f"*/{METRICS}"))]:
            if file.is_file():
                with file.open(encoding="utf-8", errors="replace") as text:
                    names |= dict.fromkeys(next(csv.reader(text), []))
    return valid_names("", names)


def main() -> None:
    """Plot the curves and print the path of the image."""
    with exit_on_user_error():
        print(plot(**cli.command_arguments(plot)))


if __name__ == "__main__":
    main()
