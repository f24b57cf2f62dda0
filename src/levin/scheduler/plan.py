"""The plan of a sweep: a file that says which runs belong to it, so that the same command continues it.

The plan of the sweep in a folder is `sweep.json` there. The seeds of one config have no folder of their own by default:
their plan is `runs/<name>/sweep_<time>.json`, beside their run folders. A plan never changes; how far each run is, its
run folder says.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pydantic
from omegaconf import DictConfig, OmegaConf

from levin.core import files
from levin.core.errors import ConfigError, LockedError
from levin.core.process import print_line
from levin.core.validate import read_json
from levin.runs import code, slurm, trust
from levin.runs import folder as run_folder
from levin.runs.provenance import command_line, run_git

PLAN = "sweep.json"


class Plan(pydantic.BaseModel):
    """Contents of the file."""

    command: str
    git_sha: str
    runs: dict[str, str]  # run folder, relative to that of the plan -> checksum of its config
    code: str  # checksum of the code that trains them


def checksum(config: DictConfig) -> str:
    """Return a checksum of all values of a config but `run`."""
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    config.run = None
    return hashlib.sha256(OmegaConf.to_yaml(config, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def open_sweep(
    configs: Mapping[str, DictConfig], folder: Path | None, *, beside_others: bool = False
) -> Iterator[list[Path]]:
    """Create the run folders of a sweep, or find those that the same command has created; lock the sweep.

    Without a folder, the newest sweep in `runs/` that has the same configs and commit, is not complete, and is not
    being trained, is continued; if there is none, a new one begins.

    Args:
        configs: Config of each run by its name, `s<seed>` or `<values>/s<seed>`.
        folder: Folder of the sweep; None: a new one, `runs/sweep_<time>`.
        beside_others: Without a folder, put the runs into `runs/<name>/`, where single runs are.

    Yields:
        The run folders, each with its config.yaml, in the order of the configs.

    Raises:
        ConfigError: The folder holds something else, or another process trains the sweep.
    """
    sums = [checksum(config) for config in configs.values()]
    with ExitStack() as locked:
        if folder is not None:
            path = folder / PLAN
            locked.enter_context(_lock(path))
            plan = _read_or_refuse(path, configs, sums)
        else:
            path, plan = _find(configs, sums, beside_others, locked)
        if plan is None:
            if folder is None:
                path, names = _new_place(configs, beside_others)
                locked.enter_context(_lock(path))
            else:
                names = list(configs)
            named_sums = dict(zip(names, sums, strict=True))
            plan = Plan(command=command_line(), git_sha=_commit(), runs=named_sums, code=_code(configs))
            files.save_json(plan.model_dump(), path.parent, path.name)
        # Those of a plan without a folder have other names than the configs, but the same order.
        named = dict(zip(plan.runs, configs.values(), strict=True)) if folder is None else dict(configs)
        runs = [path.parent / name for name in named]
        for run, config in zip(runs, named.values(), strict=True):
            if not run_folder.has_begun(run):  # new, or the command that created the plan was killed
                run_folder.begin(run, config)
            else:
                trust.record(config)  # this command names its code, too, and the record of its beginning may be gone
        yield runs


def planned_runs(path: Path) -> list[Path]:
    """Return the run folders of a plan.

    Raises:
        ConfigError: The file is damaged.
    """
    return [path.parent / name for name in _read(path).runs]


def _read(path: Path) -> Plan:
    try:
        plan = Plan(**read_json(path, Plan))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    for name in plan.runs:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{path} is damaged: {name} is not below its folder")
    return plan


def _read_or_refuse(path: Path, configs: Mapping[str, DictConfig], sums: list[str]) -> Plan | None:
    """Return the plan in a folder that the user has named; None if the folder is empty.

    Raises:
        ConfigError: The folder holds another sweep, or something else.
    """
    folder = path.parent
    if not path.exists():
        if not run_folder.is_empty(folder):
            raise ConfigError(f"run={folder} exists already, and is not a sweep: name another folder")
        return None
    plan = _read(path)
    how = f"name another folder, or continue it with make resume RUNS={folder}"
    if plan.runs == dict(zip(configs, sums, strict=True)):
        if plan.code == _code(configs) or slurm.was_requeued():
            return plan
        raise ConfigError(f"run={folder} holds a sweep with other code: the algorithm has changed since: {how}")
    if set(plan.runs) == set(configs):
        raise ConfigError(
            f"run={folder} holds a sweep with other values; it was started by: {plan.command}; the files in configs/ "
            f"or the defaults may have changed since: {how}"
        )
    raise ConfigError(f"run={folder} holds the sweep of another command: {plan.command}; {how}")


def _find(
    configs: Mapping[str, DictConfig], sums: list[str], beside_others: bool, locked: ExitStack
) -> tuple[Path, Plan | None]:
    """Return the newest sweep in `runs/` that is to be continued, and lock it; None if there is none."""
    commit = _commit()
    totals = [config.total_env_steps for config in configs.values()]
    pattern = f"{next(iter(configs.values())).name}/sweep_*.json" if beside_others else f"sweep_*/{PLAN}"
    for path in sorted(Path("runs").glob(pattern), reverse=True):
        try:
            plan = _read(path)
        except ConfigError:
            continue
        runs = [path.parent / name for name in plan.runs]
        same_code = (plan.git_sha == commit and plan.code == _code(configs)) or slurm.was_requeued()
        if list(plan.runs.values()) != sums or not same_code:
            continue
        complete = [run_folder.has_ended(run, total) for run, total in zip(runs, totals, strict=True)]
        if all(complete):
            continue
        try:
            locked.enter_context(_lock(path))
        except LockedError:
            continue  # another process trains it
        print_line(f"{path}: continuing; {sum(complete)} of {len(runs)} runs are complete")
        return path, plan
    return Path(), None


def _new_place(configs: Mapping[str, DictConfig], beside_others: bool) -> tuple[Path, list[str]]:
    """Return the path of a new plan, and the names of its runs."""
    now = run_folder.time_stamp()
    if not beside_others:
        return Path("runs", f"sweep_{now}", PLAN), list(configs)
    name = next(iter(configs.values())).name
    return Path("runs", name, f"sweep_{now}.json"), [f"{seed}_{now}" for seed in configs]


def _lock(path: Path) -> AbstractContextManager[None]:
    """Lock a sweep against other processes."""
    return run_folder.lock_file(path.with_name(f".{path.stem}.lock"), f"the sweep {path} is being trained")


def _code(configs: Mapping[str, DictConfig]) -> str:
    """Return a checksum of the code that trains these configs: of Levin's, and of their forks."""
    return code.checksum_of({str(config.algo._target_) for config in configs.values()})


def _commit() -> str:
    return run_git("rev-parse", "HEAD")
