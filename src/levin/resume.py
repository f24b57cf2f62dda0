"""Continue a run from its newest checkpoint: `python -m levin.resume run=... [total_env_steps=...]`.

`runs="..." jobs=2` continues many runs: run folders, folders of runs, and sweeps.
"""

import inspect
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from levin.config import cli, schema
from levin.core.errors import ConfigError, exit_on_user_error, valid_names
from levin.core.omega import flat_keys, to_plain
from levin.core.process import print_line, share_cores
from levin.results.result import REFERENCE
from levin.runs import checkpoint, provenance, slurm
from levin.runs import folder as run_folder
from levin.runs.load import algorithm_class, load_config
from levin.runs.trust import SECTIONS, trusted
from levin.scheduler.plan import PLAN, planned_runs
from levin.scheduler.resources import Resources, prepare_cores
from levin.scheduler.scheduler import train_all

# Config keys that may change on resume. They change none of the numbers computed so far; a new total_env_steps also
# stretches or shortens annealed schedules, which `resume` prints.
MAY_CHANGE = (
    *("total_env_steps", "logger", "wandb_project", "upload", "checkpoint.every", "checkpoint.keep"),
    *("trainer.accelerator", "trainer.max_time"),
)
STOPPED = "stopped; the runs are saved, and the same command continues them"
# Facts of provenance.json that must be equal for the run to give the numbers of an uninterrupted one. Files that differ
# from the commit are compared by `levin.runs.code`.
COMPARED_FACTS = ("git_sha", "lock_sha256", "python", "processor", "cpu_capability", "gpus")


def resume(*, run: str, trust: bool = False, **changes: Any) -> float | None:
    """Continue a run with its saved config, and return the mean return of the last evaluation.

    A run without a checkpoint starts from the beginning. Returns None if the run is complete already.

    Args:
        run: Run folder.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).
        changes: New values of config keys in `MAY_CHANGE`; `total_env_steps` is the new total.

    Raises:
        ConfigError: A change is not allowed, every checkpoint is damaged, or the run is at or past the new total.
    """
    if type(trust) is not bool:
        raise ConfigError(f"trust={trust} must be true or false")
    with trusted(trust):
        return _resume(Path(run), changes)


def _resume(folder: Path, changes: dict[str, Any]) -> float | None:
    _refuse_result(folder)
    cfg = load_config(folder)
    total = cfg.total_env_steps
    lines = apply_changes(cfg, changes)
    if cfg.total_env_steps != total and cfg.algo.get("schedule_env_steps") == total:
        cfg.algo.schedule_env_steps = cfg.total_env_steps
        lines.append(
            f"algo.schedule_env_steps: {total} -> {cfg.total_env_steps}; annealed schedules change from here on"
        )
    schema.check(cfg)
    OmegaConf.set_readonly(cfg, True)
    from levin.training.distributed import sharding  # late, because Lightning takes seconds to import
    from levin.training.session import train_rank

    name = algorithm_class(cfg).__name__
    if sharding.process_rank(cfg):  # started by torchrun or srun; rank 0 takes care of the run folder
        if (run_folder.read_provenance(folder).get("env_steps") or 0) < cfg.total_env_steps:
            saved = checkpoint.list_checkpoints(folder / "checkpoints")
            train_rank(
                cfg, folder, checkpoint.newest_checkpoint(folder, buffer=True, algorithm=name) if saved else None
            )
        return None
    print(*lines, sep="\n", end="\n" if lines else "")
    with run_folder.lock(folder):  # until the end: no other process may train this run or move its checkpoints
        return _continue(folder, cfg, total, name)


def _continue(folder: Path, cfg: DictConfig, total: int, name: str) -> float | None:
    """Continue a run that this process has locked.

    Args:
        folder: Run folder.
        cfg: Config with all changes.
        total: `total_env_steps` before the changes.
        name: Name of the algorithm class.
    """
    path, env_steps = None, 0
    if checkpoint.list_checkpoints(folder / "checkpoints"):
        path = checkpoint.newest_checkpoint(folder, buffer=True, algorithm=name)
        env_steps, _ = checkpoint.env_steps_and_wandb_id(path)
    else:
        print(f"run={folder} has no checkpoint yet: starting from the beginning")
    if cfg.total_env_steps != total and env_steps >= cfg.total_env_steps:
        raise ConfigError(f"run={folder} has {env_steps} env steps already; to continue, set a larger total_env_steps")
    if (run_folder.read_provenance(folder).get("env_steps") or 0) >= cfg.total_env_steps:
        # Not an error: a job may call resume again and again until its run is complete.
        print(f"run={folder} is complete with {env_steps} env steps; to continue, set a larger total_env_steps")
        return None
    for line in environment_changes(folder):
        print(f"levin: {line}", file=sys.stderr)
    if path is not None:
        checkpoint.set_aside_newer(path.parent)
    from levin.training.session import train

    return train(cfg, folder, ckpt_path=path)


def apply_changes(cfg: DictConfig, changes: dict[str, Any]) -> list[str]:
    """Apply changes to the saved config in place, and return a message for each value that has changed.

    Raises:
        ConfigError: A key is unknown, or its value may not change within a run.
    """
    lines = []
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        valid = [*flat_keys(to_plain(cfg)), *MAY_CHANGE]
        if key not in valid:
            raise ConfigError(f"{key} is unknown; {valid_names(key, MAY_CHANGE)}")
        old = OmegaConf.select(cfg, key)
        if value == old:
            continue
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"{key}={value} would change a run that was started with {key}={old}; "
                f"keys that may change: {', '.join(MAY_CHANGE)}; docs/callbacks.md shows how to begin a new run from "
                "the networks of this one"
            )
        OmegaConf.update(cfg, key, value)
        lines.append(f"{key}: {old} -> {value}")
    return lines


def environment_changes(run: Path) -> list[str]:
    """Return a warning for each fact, such as the commit, that has changed since the run's last session."""
    facts = run_folder.read_provenance(run)
    if not facts:
        return []
    before, now = (
        {**session, **session["versions"]}
        for session in ([facts, *facts["resumed"]][-1], provenance.collect_provenance())
    )
    changed = [key for key in COMPARED_FACTS if before.get(key) != now.get(key)]
    return [
        f"{key} was {before.get(key)} and is {now.get(key)} now: numbers may differ from those of an uninterrupted run"
        for key in (*changed, *provenance.changed_packages(before["versions"], now["versions"]))
    ]


def resume_all(*, runs: str, jobs: int | None = None, trust: bool = False, **changes: Any) -> None:
    """Continue all runs that have not come to their end, some at the same time.

    Args:
        runs: Run folders, folders of runs, and folders or plans of sweeps, separated by spaces; `*` is a wildcard.
        jobs: Number of runs at the same time; None: as many as the cores or GPUs can run.
        trust: As for `resume`.
        changes: As for `resume`.

    Raises:
        ConfigError: There is no such run, or a change is not allowed.
        RunError: A run has failed.
    """
    with trusted(trust):
        sections = SECTIONS if changes else ()  # without changes, each run checks itself the code that it names
        configs = {run: load_config(run, code_sections=sections) for run in find_runs(runs)}
        for config in configs.values():
            apply_changes(config, changes)
        prepare_cores(max(config.trainer.threads or 1 for config in configs.values()), jobs)
        for config in configs.values() if changes else ():  # last, because it imports torch and the code
            schema.check(config)
        print_end(configs, ended=resume_side_by_side(configs, jobs, **changes))


def resume_side_by_side(
    configs: Mapping[Path, DictConfig], jobs: int | None, *, tolerated: tuple[int, ...] = (), **changes: Any
) -> bool:
    """Train or continue runs whose folders hold their config.yaml; return whether all have come to their end.

    Args:
        configs: Config of each run by its folder, with the changes.
        jobs: As for `resume_all`.
        tolerated: Exit codes of failed runs that are printed, but raise no RunError.
        changes: As for `resume`.

    Raises:
        RunError: A run has failed.
    """
    totals = {run: config.total_env_steps for run, config in configs.items()}
    resources = Resources.of(list(configs.values()), jobs)
    return train_all(totals, lambda run: resume(run=str(run), **changes), resources, tolerated=tolerated)


def print_end(runs: Collection[Path], *, ended: bool) -> None:
    """Print how the training of many runs has come to its end."""
    if ended:
        print_line(f"{len(runs)} runs have ended; see them with make compare RUNS=... or make plot RUNS=...")
    else:
        print_line(STOPPED)


def find_runs(runs: str) -> list[Path]:
    """Return the run folders that `runs=` names; these runs are trained.

    Raises:
        ConfigError: A path names no run, or a stored result.
    """
    words = [runs] if os.path.isfile(runs) else runs.split()  # a plan may have a space in its name
    plans = [Path(path) for path in words if path.endswith(".json") and Path(path).is_file()]
    folders = runs if not plans else " ".join(path for path in words if Path(path) not in plans)
    found = [run for plan in plans for run in planned_runs(plan)]
    matches, _, missing = run_folder.find_folders(folders) if folders or not plans else ([], set(), [])
    if missing:
        raise ConfigError(f"runs={runs}: {'; '.join(missing)}")
    searches = [folder for folder in matches if _is_in_search(folder)]
    for folder in matches:
        if folder in searches:
            continue
        if (folder / PLAN).is_file():
            found += planned_runs(folder / PLAN)
        elif run_folder.has_begun(folder):
            found.append(folder)
        else:
            found += sorted(config.parent for config in folder.glob(f"*/{run_folder.CONFIG}"))
    if searches and not found:
        raise ConfigError(f"runs={runs} holds no run but those of a search: continue it with make tune")
    if not found:
        raise ConfigError(f"runs={runs} holds no run: no folder has a {run_folder.CONFIG}")
    for run in found:
        _refuse_result(run)
    for folder in searches:
        print_line(f"{folder} is left alone: it belongs to a search, which make tune continues")
    return list(dict.fromkeys(found))


def _refuse_result(folder: Path) -> None:
    """Raise a ConfigError if a folder is that of a stored result, in which nothing is trained."""
    if (folder / REFERENCE).is_file():
        raise ConfigError(f"{folder} is a result: make reproduce EXP={folder.resolve().name} trains it")


def _is_in_search(folder: Path) -> bool:
    """Return whether a folder is that of a search or below it: other env steps would change the search."""
    return any((each / run_folder.SEARCH_PLAN).is_file() for each in (folder, *folder.parents))


def main() -> None:
    """Continue the run, or the runs, that the command line names."""
    with exit_on_user_error():
        arguments, given = cli.pop_flag(sys.argv[1:], "trust")
        arguments, jobs = cli.pop_count(arguments, "jobs")
        values = cli.parse_overrides(arguments, as_typed=["run", "runs"])
        own = ("run", "runs", *inspect.signature(schema.top_level).parameters)
        for key in values:  # keys that no saved config has are refused before the run folder is read
            if "." not in key and key not in own:
                raise ConfigError(f"{key} is unknown; {valid_names(key, ('run', 'runs', *MAY_CHANGE))}")
        slurm.requeue_on_signal()
        if "runs" in values and "run" not in values:
            resume_all(**values, jobs=jobs, trust=given)
        elif "run" in values and "runs" not in values and jobs is None:
            share_cores()
            resume(**values, trust=given)
        elif "run" in values:
            raise ConfigError("run= is one run; runs= and jobs= are for many: leave out one of them")
        else:
            raise ConfigError("run is missing: set run=<run folder>, or runs=<run folders> and jobs=<runs at once>")


if __name__ == "__main__":
    main()
