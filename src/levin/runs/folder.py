"""The run folder: config.yaml, provenance.json, metrics.csv, checkpoints/, videos/."""

import fcntl
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from levin.core import files
from levin.core.errors import ConfigError, RunError
from levin.runs import checkpoint, slurm
from levin.runs.provenance import command_line

CONFIG, PROVENANCE = "config.yaml", "provenance.json"


def new_run_path(config: DictConfig) -> Path:
    """Where a new run will live: `run`, or `runs/<algo>_<env>/s<seed>_<time>`.

    Raises:
        ConfigError: It exists already.
    """
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    run = Path(config.run or f"runs/{config.name}/s{config.seed}_{now}")
    if run.exists() and (not run.is_dir() or any(not each.name.startswith(".") for each in run.iterdir())):
        raise ConfigError(f"run={run} exists; name another folder, or continue that run with make resume RUN={run}")
    return run


def find_requeued_run(config: DictConfig) -> Path | None:
    """Where the run lives that this command began in this SLURM job, before that was requeued."""
    if not slurm.was_requeued():
        return None
    folders = [Path(config.run)] if config.run else Path("runs", config.name).glob(f"s{config.seed}_*")
    for each in sorted(folders, reverse=True):
        facts = read_provenance(each)
        if (facts.get("slurm_job"), facts.get("command")) == (slurm.job_id(), command_line()):
            return each
    return None


def has_begun(run: Path) -> bool:
    """Whether a run lives in the folder already."""
    return (run / CONFIG).exists()


def create(run: Path, config: DictConfig, provenance: dict[str, Any], *, resumed: bool) -> None:
    """Make the folder with its config and provenance. A resumed run adds to the list of its sessions.

    Raises:
        ConfigError: It can't be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        config = config.copy()
        OmegaConf.set_readonly(config, False)
        config.trainer.threads = torch.get_num_threads()  # results depend on it: a resumed run takes as many
        facts = read_provenance(run)
        if resumed and facts:
            facts["resumed"].append(provenance)
        else:
            facts = {**provenance, "env_steps": None, "wall_seconds": 0.0, "resumed": []}
        # In this order: a run can be continued without provenance, and not without its config.
        _write(run / CONFIG, OmegaConf.to_yaml(config))
        _write(run / PROVENANCE, json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"run={run} can't be written: {error.strerror}") from error


def record_end(run: Path, seconds: float, env_steps: int | None) -> None:
    """Add the wall time of this session, and the env steps of a run that is complete."""
    facts = read_provenance(run)
    facts |= {"env_steps": env_steps, "wall_seconds": round(facts["wall_seconds"] + seconds, 1)}
    _write(run / PROVENANCE, json.dumps(facts, indent=2) + "\n")


def read_provenance(run: Path) -> dict[str, Any]:
    """What provenance.json says: of the first session, and under `resumed` of each later one; empty without a file.

    Raises:
        ConfigError: It is damaged.
    """
    file = run / PROVENANCE
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged; the run can be continued without it") from error


def _write(file: Path, text: str) -> None:
    """Replace a file at once: a kill or a power cut leaves the old one or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    files.sync(partial)
    partial.replace(file)
    files.sync(file.parent)


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Let no second process train in the folder. The lock goes with the process, however that ends.

    Raises:
        ConfigError: Another process does, or the folder can't be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"run={run} can't be written: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, which env workers would inherit
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"run={run} is being trained by another process") from error
        yield


@contextmanager
def report_failure(run: Path) -> Iterator[None]:
    """Say in one sentence what ended a run and where it can be taken up again.

    Raises:
        RunError: An env failed, a number was not finite, or the run folder can't be written any more.
    """
    try:
        yield
    except (RunError, OSError) as error:
        said = str(error) if isinstance(error, RunError) else f"run={run} can't be written: {error.strerror or error}"
        if error.__cause__ is not None:  # an env's own error: whoever wrote the env wants to see where
            (run / "traceback.txt").write_text(traceback.format_exc())
            said += f" (see {run}/traceback.txt)"
        whole = checkpoint.list_checkpoints(run / "checkpoints")
        left = f"checkpoint {whole[-1].name} is whole: make resume RUN={run}" if whole else "it has no checkpoint yet"
        raise RunError(f"{said}; {left}") from error
