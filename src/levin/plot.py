"""Plot the learning curves of runs in one figure: `python -m levin.plot runs="runs/sac_* runs/my_idea_*"`."""

import csv
import functools
import hashlib
import os
import re
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
from levin.runs.code import SCRIPT
from levin.runs.folder import find_folders, read_provenance
from levin.runs.load import load_config
from levin.runs.provenance import run_git

RETURN = "eval/return_mean"
MAX_VALUES = 4  # in a label
DISTINCT = 10  # number of curves with a color of their own among matplotlib's
# Config keys and sections that the seeds of one curve need not have in common.
NOT_COMPARED = (
    *("seed", "run", "name", "note", "logger", "log_every", "wandb_project", "upload", "checkpoint", "total_env_steps"),
    *("eval.every", "eval.at_start", "trainer.accelerator", "trainer.threads", "trainer.max_time", "collector_workers"),
)
CODE_KEYS = ("commit", "code")  # in `Runs.config`: the code that trained, committed and not


@dataclass
class Runs:
    """Runs of one config and the same code, which are the seeds of one learning curve.

    Args:
        folder: Folder that they share; or a result in experiments/.
        config: Values that may change the curve by dotted key, and those of `CODE_KEYS`; empty without a config.yaml.
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
    # Late, because rliable takes seconds to import.
    from levin.results.figures import draw_line, escape_dollars, many_styles, new_figure, save_figure

    figure, axes = new_figure()
    if len(groups) > DISTINCT:
        axes.set_prop_cycle(many_styles())
        figure.set_size_inches(10, max(4, 0.25 * len(groups) + 1))  # with room for the legend
    for label, group in groups.items():
        curves = list(group.seeds.values())
        draw_line(axes, f"{label} ({len(curves)} seed{'s' if len(curves) > 1 else ''})", curves)
    envs = sorted({group.config["env.id"] for group in groups.values() if group.config})
    axes.set_title(escape_dollars(", ".join(envs)))
    axes.set_ylabel("evaluation return" if metric == RETURN else metric)
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(groups) > DISTINCT else {}
    title = "interquartile mean, 95% interval; thin: seeds"
    axes.legend(frameon=False, title=title, title_fontsize="small", **beside)
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
    """Return the runs of each curve by label; print on stderr which are not drawn, and which are apart by their code.

    The label is the name of the folder that the runs share; if that is not enough, with the values that differ. Runs of
    different code are different curves, and so is a run that was continued with other code.

    Raises:
        ConfigError: A folder is not a run, a folder of runs or a result, or no run has a value of the metric yet.
    """
    folders, named, unused = find_folders(runs)
    groups: list[Runs] = []
    commits: list[str] = []
    for folder in folders:
        if (folder / CURVES).is_file():
            if metric != RETURN:
                raise ConfigError(f"{folder} is a result, which has the metric {RETURN} only")
            seeds = {str(seed): curve for seed, curve in read_curves(folder).items()}
            groups.append(Runs(folder, _compared_values_and_seed(folder, commits)[0], seeds))
        elif (folder / METRICS).is_file():
            _add_run(groups, folder, metric, unused, commits)
        elif own := sorted(file.parent for file in folder.glob(f"*/{METRICS}")):
            for run in own:
                _add_run(groups, run, metric, unused, commits)
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
        raise ConfigError(f"runs={runs}: no run has a value of {metric} yet; {_list_metrics(folders)}")
    for group in groups:
        unused += _keep_common_steps(group)
    for line in unused:
        print(f"levin: not drawn: {line}", file=sys.stderr)
    if apart := _folders_of_several_codes(groups):
        print(f"levin: runs of different code were kept apart: {', '.join(apart)}", file=sys.stderr)
    return _labelled(groups)


def _add_run(groups: list[Runs], run: Path, metric: str, unused: list[str], commits: list[str]) -> None:
    """Add a run to the group with its folder, config and code. Of two runs of one seed the longer one is kept."""
    curve, (config, seed) = read_metric(run, metric), _compared_values_and_seed(run, commits)
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


def _keep_common_steps(group: Runs) -> list[str]:
    """Remove the shortest runs until all have env steps in common; return a message for each part that is not drawn."""
    lines = []
    while True:
        start = max(int(curve.env_steps[0]) for curve in group.seeds.values())
        ends = sorted({int(curve.env_steps[-1]) for curve in group.seeds.values()})
        if start <= ends[0]:
            break
        seed = min(group.seeds, key=lambda each: group.seeds[each].env_steps[-1])
        del group.seeds[seed]
        run = group.sources.pop(seed, f"seed {seed} of {group.folder}")
        lines.append(f"{run}, which ends after {ends[0]:,} env steps, before another has its first value at {start:,}")
    if len(ends) > 1:
        lines.append(
            f"the part of the curves in {group.folder} after {ends[0]:,} env steps, where the shortest run ends"
        )
    return lines


def _compared_values_and_seed(run: Path, commits: list[str]) -> tuple[dict[str, str], str]:
    """Return the values of a run that may change its curve by dotted key, and its seed."""
    if not (run / "config.yaml").is_file():
        return {}, run.name
    config = load_config(run, code_sections=())
    keys = [
        key for key in flat_keys(to_plain(config)) if not f"{key}.".startswith(tuple(f"{x}." for x in NOT_COMPARED))
    ]
    values = {key: str(OmegaConf.select(config, key)) for key in keys}
    schedules = [value for key, value in values.items() if key.startswith("algo.") and key.endswith("_schedule")]
    if set(schedules) == {"constant"}:  # then no schedule reads their length
        values.pop("algo.schedule_env_steps", None)
    if (run / METRICS).is_file():  # a result is of committed code
        forks = sorted(set(re.findall(r"\bexperiments\.(\w+)", " ".join(values.values()))))
        values |= _trained_code(read_provenance(run), forks, commits)
    return values, str(config.seed)


def _trained_code(provenance: dict[str, Any], forks: list[str], commits: list[str]) -> dict[str, str]:
    """Return the code that trained a run, by the keys of `CODE_KEYS`; that of several sessions is joined by `+`.

    Args:
        provenance: Contents of provenance.json.
        forks: Modules in experiments/ that the config names.
        commits: Commits of the runs before this one; its own are added. Commits of the same code count as the first.

    Returns:
        `commit`: its first 7 digits. `code`: a checksum of the code that is not committed; `unset` if there is none.
    """
    if not provenance:
        return {}
    first = provenance.get("code") or {}
    # A resumed run may be started by another script.
    scripts = {name: first[name] for name in first if name.startswith(SCRIPT)}
    names: list[str] = []
    checksums: list[str] = []
    for session in [provenance, *provenance["resumed"]]:
        commit, later = session["git_sha"], session.get("code") or {}
        committed = _committed_code(commit, forks)
        same = [each for each in commits if _committed_code(each, forks) == committed]
        if not same:
            commits.append(commit)
        names.append([*same, commit][0][:7] or "unknown")
        code = {name: later[name] for name in later if not name.startswith(SCRIPT)} | scripts
        checksums.append(hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:6] if code else "unset")
    return {"commit": "+".join(dict.fromkeys(names)), "code": "+".join(dict.fromkeys(checksums))}


def _committed_code(commit: str, forks: list[str]) -> list[str]:
    """Return git's lines about the files of Levin, its configs and these forks; the commit itself if it is unknown."""
    places = ("src/levin/", "configs/", *(f"experiments/{fork}{end}" for fork in forks for end in ("/", ".py")))
    return [line for line in _list_commit(commit) if line.partition("\t")[2].startswith(places)] or [commit]


@functools.cache
def _list_commit(commit: str) -> list[str]:
    """Return git's lines about the files of a commit, without documentation: the path and checksum of each."""
    lines = run_git("ls-tree", "-r", commit, "--", "src/levin", "configs", "experiments").splitlines()
    return [line for line in lines if not line.endswith(".md")]


def _folders_of_several_codes(groups: list[Runs]) -> list[str]:
    """Return the folders of groups that would be one if their code were the same."""
    configs = [
        (str(group.folder), sorted((key, value) for key, value in group.config.items() if key not in CODE_KEYS))
        for group in groups
    ]
    return sorted({folder for folder, config in configs if configs.count((folder, config)) > 1})


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


def _list_metrics(folders: list[Path]) -> str:
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
