"""Find and verify checkpoints, one folder each; `levin.runs.checkpoint_io` writes and reads them.

A folder holds Lightning's checkpoint as `state.ckpt`, the replay buffer in `buffer/`, and `manifest.json` with the size
and checksum of each file. Rank 0 owns the folder; every other rank has a folder of the same layout inside it, `rank1`
and so on.

A folder is written under a temporary name and renamed last, so a checkpoint is either complete or absent. Its files
hold tensors and plain values only: they load with `weights_only=True`, after a comparison with the manifest.
"""

import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import pydantic

from levin.core import files
from levin.core.errors import CheckpointError, ConfigError
from levin.core.validate import as_count, read_json

STATE, BUFFER, MANIFEST, LAST, BEST = "state.ckpt", "buffer", "manifest.json", "last", "best"
REWRITTEN = "rewritten.ckpt"  # in BUFFER: the tensors that change after they were stored, saved in full each time
FILES = r"^(state\.ckpt|buffer/(rewritten\.ckpt|\d+_\d+\.pt))$"  # names in a manifest
FORMAT = 1  # version of the folder layout; any other is refused


class FileCheck(pydantic.BaseModel):
    """Expected size and checksum of a file, and the checksum of each tensor in a file of the replay buffer."""

    bytes: int
    crc32: int
    contents: dict[str, int] | None = None  # None: not a file of the replay buffer


class Manifest(pydantic.BaseModel):
    """Contents of `manifest.json`. The names are checked, because they become paths."""

    algorithm: str
    ranks: pydantic.PositiveInt
    files: dict[Annotated[str, pydantic.Field(pattern=FILES)], FileCheck]


def discard(folder: Path) -> None:
    """Delete a checkpoint folder. It is renamed first, so a half-deleted folder is never mistaken for a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def relink(link: Path, target: str | None) -> None:
    """Point a symbolic link at another target, in one atomic step; warn where the file system has no links.

    None removes the link.
    """
    if link.is_dir() and not link.is_symlink():  # the run was copied by a tool that follows links
        shutil.rmtree(link)
    if target is None:
        link.unlink(missing_ok=True)
        return
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(target)
    except OSError as error:
        if error.errno not in files.NO_LINKS:
            raise
        warnings.warn(f"{link.parent} can't hold links, so there is no {LAST} and no {BEST} in it", stacklevel=1)
    else:
        partial.replace(link)


def remove_partial(folder: Path) -> None:
    """Delete the half-written and half-deleted folders and files that a killed run left in `checkpoints/`."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        CheckpointError: The manifest is missing or unreadable.
        ConfigError: The checkpoint has another format.
    """
    path = folder / MANIFEST
    try:
        saved_format = read_json(path, dict[str, Any]).get("format")
        if saved_format == FORMAT:
            return read_json(path, Manifest)
    except ValueError as error:
        raise CheckpointError(f"{path} is missing or unreadable: {error}") from error
    raise ConfigError(f"{folder} has format {saved_format}, but this version of Levin reads format {FORMAT}")


def verify(folder: Path, *, buffer: bool, algorithm: str | None = None) -> None:
    """Check the files of a checkpoint against its manifest.

    Args:
        folder: Checkpoint folder.
        buffer: Whether to check the files of the replay buffer too.
        algorithm: Name of the algorithm class that must have written it; None: any.

    Raises:
        CheckpointError: A file is missing or damaged.
        ConfigError: The checkpoint has another format, or another algorithm wrote it.
    """
    manifest = read_manifest(folder)
    if algorithm not in (None, manifest["algorithm"]):
        raise ConfigError(f"{folder} was written by {manifest['algorithm']}, but this run trains {algorithm}")
    for name, expected in manifest["files"].items():
        if buffer or name == STATE:
            files.verify(folder / name, expected)
    if folder.name.isdecimal():
        for rank in range(1, manifest["ranks"]):
            verify(folder / f"rank{rank}", buffer=buffer)


def newest_checkpoint(run: Path, *, buffer: bool = False, algorithm: str | None = None) -> Path:
    """Return the path of `state.ckpt` in the newest undamaged checkpoint of a run.

    Damaged checkpoints are reported on stderr and skipped.

    Args:
        run: Run folder; or one checkpoint, as its folder or its `state.ckpt`, which then must be undamaged.
        buffer: Whether the replay buffer must be undamaged too.
        algorithm: Name of the algorithm class that must have written it; None: any.

    Raises:
        CheckpointError: The given checkpoint is damaged, or all checkpoints of the run are.
        ConfigError: There is no checkpoint, it has another format, or another algorithm wrote it.
    """
    path = run / STATE if (run / MANIFEST).exists() or _is_checkpoint(run) else run
    if path.name == STATE:
        if not path.parent.exists():
            names = [each.name for each in list_checkpoints(path.parents[1])]
            raise ConfigError(f"run={run} does not exist; checkpoints there: {', '.join(names) or 'none'}")
        verify(path.parent, buffer=buffer, algorithm=algorithm)
        return path
    folders = list_checkpoints(run / "checkpoints")
    for folder in reversed(folders):
        try:
            verify(folder, buffer=buffer, algorithm=algorithm)
        except CheckpointError as error:
            print(f"levin: {error}; trying the checkpoint before it", file=sys.stderr)
            continue
        return folder / STATE
    if folders:
        raise CheckpointError(f"run={run} has no undamaged checkpoint")
    raise ConfigError(f"run={run} holds no checkpoint; set run= to a folder that has checkpoints/{LAST}/{STATE}")


def run_of(path: Path) -> Path:
    """Return the run folder of a path: the folder itself, or that of a checkpoint or its `state.ckpt`.

    A part of the path may be a link, such as one to a checkpoint.
    """
    found = [_run_of(each) for each in (path, path.absolute(), path.resolve())]
    return next((run for run in found if (run / "config.yaml").is_file()), found[0])


def _run_of(path: Path) -> Path:
    folder = path.parent if path.name == STATE else path
    return folder.parents[1] if _is_checkpoint(folder) else folder


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint by its place; a run may be in a folder named `checkpoints`, too."""
    return folder.parent.name == "checkpoints" and not (folder / "config.yaml").exists()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in a run's `checkpoints/`, oldest first."""
    return sorted((each for each in folder.glob("*") if each.name.isdecimal()), key=lambda each: int(each.name))


def set_aside_newer(folder: Path) -> None:
    """Rename the checkpoints newer than `folder` to `<clock>.damaged`, which frees their names for new checkpoints."""
    for newer in list_checkpoints(folder.parent):
        if int(newer.name) > int(folder.name):
            aside = newer.with_name(f"{newer.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)


def env_steps_and_wandb_id(path: Path) -> tuple[int, str | None]:
    """Return the number of env steps of a checkpoint, and the id of its Weights & Biases run (None: it has none).

    Raises:
        CheckpointError: It is not a checkpoint of Levin.
    """
    state = files.load(path, mmap=True)
    try:
        wandb_id = state.get("wandb_id")
        if wandb_id is not None and not re.fullmatch(r"[\w-]+", wandb_id):
            raise ValueError(f"wandb_id={wandb_id!r}")
        return as_count("env_steps", state["levin"]["env_steps"]), wandb_id
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of Levin: {type(error).__name__}: {error}") from error
