"""Create, lock and update the run folder: config.yaml, provenance.json, code/, metrics.csv, checkpoints/, videos/."""

import errno
import fcntl
import functools
import glob
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pydantic
from omegaconf import DictConfig, OmegaConf

from levin.core import files, paths
from levin.core.errors import CheckpointError, ConfigError, FolderError, LockedError, NotFiniteError, RunError
from levin.core.validate import read_json
from levin.runs import checkpoint, code, slurm, trust
from levin.runs.provenance import command_line

CONFIG, PROVENANCE, LOCK = "config.yaml", "provenance.json", ".lock"
SEARCH_PLAN = "study.json"  # in the folder of a search, whose runs `levin.tune` trains
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENOTCONN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # the last two differ on macOS


class Session(pydantic.BaseModel):
    """Facts of one training process in provenance.json, as far as Levin reads them."""

    git_sha: str
    git_dirty: bool
    versions: dict[str, str | None]
    code: dict[str, str] | None = None  # checksums of `levin.runs.code`


class Provenance(Session):
    """Contents of provenance.json, as far as Levin reads them: the first training process, and the later ones."""

    env_steps: pydantic.NonNegativeInt | None
    wall_seconds: pydantic.NonNegativeFloat
    ended_at: pydantic.NonNegativeInt | None = None  # None: the run has not ended
    resumed: list[Session]


def new_run_path(config: DictConfig) -> Path:
    """Return the folder for a new run: `config.run`, or by default `runs/<name>/s<seed>_<time>`.

    Raises:
        ConfigError: The folder exists and is not empty.
    """
    run = Path(config.run or f"runs/{config.name}/s{config.seed}_{time_stamp()}")
    if run.exists() and (not run.is_dir() or not is_empty(run)):
        raise exists_error(run)
    return run


def exists_error(run: Path) -> ConfigError:
    """Return the error of a new run whose folder holds something."""
    return ConfigError(
        f"run={run} exists already; name another folder, or continue that run with make resume RUN={run}"
    )


def time_stamp() -> str:
    """Return the time for the name of a folder, with microseconds: several runs may begin in one second."""
    return f"{datetime.now():%Y%m%d-%H%M%S-%f}"


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds no files but hidden ones, such as those of locks."""
    return all(each.name.startswith(".") for each in folder.iterdir())


def find_requeued_run(config: DictConfig) -> Path | None:
    """Return the folder of the run that this command began before its SLURM job was requeued; None: there is none."""
    if not slurm.was_requeued():
        return None
    folders = [Path(config.run)] if config.run else Path("runs", config.name).glob(f"s{config.seed}_*")
    for folder in sorted(folders, reverse=True):
        provenance = read_provenance(folder)
        if (provenance.get("slurm_job"), provenance.get("command")) == (slurm.job_id(), command_line()):
            return folder
        if config.run and not provenance and has_begun(folder):  # killed before it could write its provenance
            return folder
    return None


def has_begun(run: Path) -> bool:
    """Return whether the folder already holds a run."""
    return (run / CONFIG).exists()


def create(run: Path, config: DictConfig, provenance: dict[str, Any], *, resumed: bool) -> None:
    """Create the run folder and write its config and provenance.

    Args:
        run: Run folder.
        config: Config of the run.
        provenance: Provenance of this process, from `collect_provenance`.
        resumed: Whether the run is continued: its `provenance` is then appended to the list `resumed` of the file.

    Raises:
        ConfigError: The folder can't be written.
    """
    import torch

    try:
        run.mkdir(parents=True, exist_ok=True)
        config = config.copy()
        OmegaConf.set_readonly(config, False)
        config.trainer.threads = torch.get_num_threads()  # a resumed run must use as many: results depend on it
        if not resumed:
            trust.record(config)
        # The config comes first: a run can be continued without its provenance, but not without its config.
        files.write_text(run, CONFIG, OmegaConf.to_yaml(config))
        contents = read_provenance(run)
        local = code.collect_code()
        # Modules that a forked process has imported itself may have changed since the first process read the commit.
        late = bool(provenance["git_sha"]) and code.is_of_checkout(local)
        provenance = {**provenance, "git_dirty": provenance["git_dirty"] or late, "code": code.checksums(local)}
        if resumed and contents:
            if _report_changed_code(contents, local, "of an uninterrupted run"):
                code.copy_code(local, run, f"{code.FOLDER}_resumed_{len(contents['resumed']) + 1}")
            contents |= {"env_steps": None, "ended_at": None}  # until it ends again
            contents["resumed"].append(provenance)
        else:
            code.copy_code(local, run, code.FOLDER)
            contents = {**provenance, "env_steps": None, "wall_seconds": 0.0, "resumed": []}
        files.save_json(contents, run, PROVENANCE)
    except OSError as error:
        raise FolderError(f"run={run} can't be written: {error.strerror}") from error


def report_changed_code(run: Path) -> None:
    """Print a line for each file of the code that has changed since a run was trained; a stored result has none.

    Call this when everything that the run imports has been imported.
    """
    if not run.resolve().is_relative_to(paths.EXPERIMENTS):
        _report_changed_code(read_provenance(run), code.collect_code(), "of the run")


def _report_changed_code(provenance: dict[str, Any], local: dict[str, bytes], what: str) -> bool:
    """Print a line for each file of the code that has changed since the last session; return whether any has."""
    before = [provenance, *provenance.get("resumed", [])][-1]
    if before.get("code") is None:
        return False
    lines = code.describe_changes(before["code"], local, before["git_sha"])
    for line in lines:
        print(f"levin: {line}: numbers may differ from those {what}", file=sys.stderr)
    return bool(lines)


def record_end(run: Path, seconds: float, env_steps: int | None, ended_at: int | None) -> None:
    """Write the end of a training process to provenance.json: its wall time, and the env steps of a completed run.

    Args:
        run: Run folder.
        seconds: Wall time of this process, which is added to that of earlier ones.
        env_steps: Env steps of the run; None: the run is not complete.
        ended_at: `total_env_steps` of a run that has come to its end, whether it is complete or a callback, such as
            EarlyStopping, has ended it; None: the run is to be continued.
    """
    provenance = read_provenance(run)
    provenance |= {"env_steps": env_steps, "wall_seconds": round(provenance["wall_seconds"] + seconds, 1)}
    files.save_json({**provenance, "ended_at": ended_at}, run, PROVENANCE)


def read_provenance(run: Path) -> dict[str, Any]:
    """Read provenance.json; return an empty dict if there is no such file.

    The top level describes the first training process, and the list `resumed` each later one.

    Raises:
        ConfigError: The file is damaged.
    """
    file = run / PROVENANCE
    try:
        return read_json(file, Provenance) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged; delete it to continue the run without it: {error}") from error


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Lock the run folder against other training processes. The lock ends with this process, however that ends.

    Raises:
        ConfigError: Another process holds the lock, the folder can't be written, or a link in it leads out of it.
    """
    _check_contents(run)  # first, since the file of the lock could be a link, too
    with lock_file(run / LOCK, f"run={run} is being trained"):
        yield


@contextmanager
def lock_file(path: Path, taken: str) -> Iterator[None]:
    """Lock a file, which is created with its folder, until the context or this process ends.

    Args:
        path: The file, which holds nothing.
        taken: Beginning of the message if another process holds the lock.

    Raises:
        LockedError: Another process holds the lock.
        FolderError: The folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", opener=files.no_link)  # noqa: SIM115
    except OSError as error:
        raise FolderError(f"run={path.parent} can't be written: {error.strerror}") from error
    with file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:
            raise LockedError(f"{taken} by another process") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _warn_of_no_locks(path.parent, str(error.strerror))
        yield


@functools.cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    """Warn once that a file system has no locks."""
    print(
        f"levin: the file system of run={folder} has no locks ({reason}): do not train this run in two processes at "
        "once",
        file=sys.stderr,
    )


def _lock(file: TextIO) -> None:
    """Lock a file. Another process that looks with `is_locked` holds the lock for a moment, and is waited for."""
    for attempt in range(10):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, whose lock env processes would inherit
            return
        except (BlockingIOError, PermissionError):
            if attempt == 9:
                raise
            time.sleep(0.03)


def is_locked(run: Path) -> bool:
    """Return whether another process trains a run. This process must not hold the lock: it would lose it."""
    # Other errors: the run has not begun; or no permission or no locks, which the run itself will report.
    with suppress(OSError), open(run / LOCK, encoding="utf-8", opener=files.no_link) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # another user may only read the file
        except (BlockingIOError, PermissionError):
            return True
    return False


def has_ended(run: Path, total_env_steps: int) -> bool:
    """Return whether a run of this length is complete, or was ended by a callback such as EarlyStopping."""
    provenance = read_provenance(run)
    return provenance.get("ended_at") == total_env_steps or (provenance.get("env_steps") or 0) >= total_env_steps


def begin(run: Path, config: DictConfig) -> None:
    """Write the config of a run that another process will train, and record that the code it names may run."""
    run.mkdir(parents=True, exist_ok=True)
    trust.record(config)
    files.write_text(run, CONFIG, OmegaConf.to_yaml(config))


def _check_contents(run: Path) -> None:
    """Raise a ConfigError if loggers would write through a link that leads out of the run folder, or obey a file in it.

    Links of Weights & Biases in the folders of its own sessions are left alone: each session has a new folder.
    """
    inside = os.path.realpath(run)
    if os.path.lexists(settings := run / "wandb" / "settings"):
        raise ConfigError(f"{settings} could send the run's data elsewhere, and Levin never writes it: remove it")
    for folder, folders, others in os.walk(run):
        if Path(folder).parent == run / "wandb":
            folders.clear()
            continue
        for name in (*folders, *others):
            path = Path(folder, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ConfigError(f"{path} is a link to {os.readlink(path)}, outside the run folder: remove the link")


def find_folders(runs: str) -> tuple[list[Path], set[Path], list[str]]:
    """Return the folders that `runs=` matches, the paths in it without a wildcard, and messages on what is missing.

    Raises:
        ConfigError: Nothing is named, or nothing matches.
    """
    if not runs:
        raise ConfigError("runs is missing: set runs=<run folders> (with make: RUNS=<run folders>)")
    whole = os.path.exists(runs) or _glob(runs)  # a folder may have a space or a bracket in its name
    patterns = [runs] if whole else runs.split()
    named = {Path(each) for each in patterns if os.path.exists(each)}
    found = {each: [each] if Path(each) in named else _glob(each) for each in patterns}
    folders = sorted({Path(match) for matches in found.values() for match in matches if Path(match).is_dir()})
    if not folders:
        raise ConfigError(f"runs={runs} matches no folder")
    return folders, named, [f"{each} matches nothing" for each, matches in found.items() if not matches]


def _glob(pattern: str) -> list[str]:
    """Return the paths that match, with brackets as a choice of characters or, if nothing matches, as themselves."""
    return glob.glob(pattern) or glob.glob(pattern.replace("[", "[[]"))


@contextmanager
def report_failure(run: Path) -> Iterator[None]:
    """Turn an error that ends a run into one sentence that also says how to continue the run.

    Raises:
        RunError: An env failed, a number was not finite, the run folder can't be written any more, or other code
            raised an OSError.
        CheckpointError: The checkpoint can't be restored.
    """
    try:
        yield
    except CheckpointError as error:
        if error.__cause__ is None:
            raise
        raise CheckpointError(f"{error}{_write_traceback(run)}") from error
    except (RunError, OSError) as error:
        elsewhere = isinstance(error, OSError) and not _is_about(run, error)
        message = str(error)
        if elsewhere:
            message = f"a callback, an env or the algorithm raised {type(error).__name__}: {error}"
        elif isinstance(error, OSError):
            message = f"run={run} can't be written: {error.strerror or error}"
        if elsewhere or error.__cause__ is not None:  # inside code of the user or another rank: its traceback is needed
            message += _write_traceback(run)
        checkpoints = checkpoint.list_checkpoints(run / "checkpoints")
        advice = (
            f"continue from checkpoint {checkpoints[-1].name} with make resume RUN={run}"
            if checkpoints
            else "the run has no checkpoint yet"
        )
        kind = NotFiniteError if isinstance(error, NotFiniteError) else RunError
        raise kind(f"{message}; {advice}") from error
    except ConfigError:
        raise
    except Exception:  # of the user's code: Python prints the traceback, and the folder keeps it
        _write_traceback(run)
        raise


def _is_about(run: Path, error: OSError) -> bool:
    """Return whether an error is that of a file in the run folder, or of a disk, which names no file."""
    if isinstance(error.filename, str | os.PathLike):
        return Path(os.path.realpath(error.filename)).is_relative_to(os.path.realpath(run))
    return error.errno in DISK_ERRORS


def _write_traceback(run: Path) -> str:
    """Write the traceback of the current error into the run folder, and return where it is, for the message."""
    try:
        files.write_text(run, "traceback.txt", traceback.format_exc())
    except OSError:  # a full disk must not hide the error
        return ""
    return f" (see {run}/traceback.txt)"
