"""Save, load and verify checkpoints, one folder each.

A folder holds Lightning's checkpoint as `state.ckpt`, the replay buffer in `buffer/`, and `manifest.json` with the size
and checksum of each file. Rank 0 owns the folder; every other rank has a folder of the same layout inside it, `rank1`
and so on.

A folder is written under a temporary name and renamed last, so a checkpoint is either complete or absent. Its files
hold tensors and plain values only: they load with `weights_only=True`, after a comparison with the manifest.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import pydantic
from lightning.pytorch.plugins.io import TorchCheckpointIO

from levin.core import distributed, files
from levin.core.errors import CheckpointError, ConfigError, RunError
from levin.core.validate import as_count, read_json
from levin.runs import segments

STATE, BUFFER, MANIFEST, LAST, BEST = "state.ckpt", "buffer", "manifest.json", "last", "best"
REWRITTEN = "rewritten.ckpt"  # in BUFFER: the tensors that change after they were stored, saved in full each time
FILES = r"^(state\.ckpt|buffer/(rewritten\.ckpt|\d+_\d+\.pt))$"  # names in a manifest
FORMAT = 1  # version of the folder layout; any other is refused


class FileCheck(pydantic.BaseModel):
    """Expected size and checksum of a file, and the checksum of each tensor in a file of the replay buffer."""

    bytes: int
    crc32: int
    contents: dict[str, int] | None = None  # older checkpoints have none


class Manifest(pydantic.BaseModel):
    """Contents of `manifest.json`. The names are checked, because they become paths."""

    algorithm: str
    ranks: pydantic.PositiveInt = 1
    files: dict[Annotated[str, pydantic.Field(pattern=FILES)], FileCheck]


class FolderCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that saves and loads checkpoint folders `checkpoints/<clock>/`; `last` links to the newest.

    A path elsewhere, to which a user's callback saves with `trainer.save_checkpoint`, becomes a single file without the
    replay buffer. Lightning's `load_from_checkpoint` reads it.

    Args:
        folder: The folder `checkpoints/` of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.before: Path | None = None  # the previous checkpoint: the next one hard-links its buffer files

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        folder = Path(path).parent
        if not self._is_own(Path(path)):
            if not distributed.rank():
                _save_file({**checkpoint, "buffer": None}, Path(path))
            return
        partial = _partial_path(folder, distributed.rank())
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        checksums = {}
        if checkpoint.get("buffer") is not None:
            (partial / BUFFER).mkdir()
            saved = _read_manifest(self.before)["files"] if self.before and self.before.exists() else {}
            previous = {name.removeprefix(f"{BUFFER}/"): of for name, of in saved.items() if name.startswith(BUFFER)}
            previous.pop(REWRITTEN, None)
            data, written = checkpoint["buffer"].pop("data"), checkpoint["buffer"]["written"]
            before = (self.before or partial) / BUFFER
            new, changed = segments.save(data, written, partial / BUFFER, before, previous)
            rewritten = checkpoint["buffer"].pop("rewritten", {})
            rewritten |= {key: data[tuple(key.split("."))].cpu().clone() for key in sorted(changed)}
            if rewritten:
                new[REWRITTEN] = files.save(rewritten, partial / BUFFER / REWRITTEN)
            checksums = {f"{BUFFER}/{name}": of for name, of in new.items()}
        checksums[STATE] = files.save(checkpoint, partial / STATE)
        contents = {
            "algorithm": checkpoint["algorithm"],
            "env_steps": checkpoint["levin"]["env_steps"],
            "files": checksums,
        }
        files.save_json({"format": FORMAT, "ranks": distributed.world_size(), **contents}, partial, MANIFEST)
        if distributed.rank():
            files.sync(partial)
            self.before = folder / f"rank{distributed.rank()}"
            distributed.barrier()
            distributed.barrier()  # rank 0 has moved this folder into its own
            return
        distributed.barrier()
        for rank in range(1, distributed.world_size()):
            _partial_path(folder, rank).rename(partial / f"rank{rank}")
        files.sync(partial)
        if folder.exists():  # a leftover of the same clock, never `self.before`: each clock value is saved once
            discard(folder)
        partial.rename(folder)
        relink(folder.with_name(LAST), folder.name)
        files.sync(folder.parent)
        self.before = folder
        distributed.barrier()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        folder = Path(path).parent
        if distributed.rank():
            folder = folder / f"rank{distributed.rank()}"
        checkpoint = files.load(folder / STATE)
        buffer = checkpoint.get("buffer")
        if buffer is not None:
            names = [name.removeprefix(f"{BUFFER}/") for name in _read_manifest(folder)["files"] if name != STATE]
            pieces = [name for name in names if name != REWRITTEN]
            if REWRITTEN in names:
                buffer["rewritten"] = files.load(folder / BUFFER / REWRITTEN)
            changed = buffer.get("rewritten", {})
            buffer["data"] = segments.load(folder / BUFFER, pieces, buffer["written"], buffer["length"], changed)
        self.before = folder
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        if self._is_own(Path(path)):
            discard(Path(path).parent)
        else:
            super().remove_checkpoint(path)

    def _is_own(self, path: Path) -> bool:
        """Return whether a path is that of a checkpoint folder of this run, not a file that a user has named."""
        return path.name == STATE and path.parent.parent == self.folder


def _save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint without its buffer to a file that the user named."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replace(path.parent, path.name) as partial:
            files.save(checkpoint, partial)
    except OSError as error:
        raise RunError(f"the checkpoint {path} can't be written: {error.strerror}") from error


def _partial_path(folder: Path, rank: int) -> Path:
    """Return the temporary folder that a rank writes before it becomes part of the checkpoint `folder`."""
    return folder.with_name(f".{folder.name}.{rank}.partial" if rank else f".{folder.name}.partial")


def discard(folder: Path) -> None:
    """Delete a checkpoint folder. It is renamed first, so a half-deleted folder is never mistaken for a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def relink(link: Path, target: str) -> None:
    """Point a symbolic link at another target, in one atomic step."""
    if link.is_dir() and not link.is_symlink():  # the run was copied by a tool that follows links
        shutil.rmtree(link)
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def remove_partial(folder: Path) -> None:
    """Delete the half-written and half-deleted folders that a killed run left in `checkpoints/`."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def _read_manifest(folder: Path) -> dict[str, Any]:
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
    manifest = _read_manifest(folder)
    if algorithm not in (None, manifest["algorithm"]):
        raise ConfigError(f"{folder} was written by {manifest['algorithm']}, but this run trains {algorithm}")
    for name, expected in manifest["files"].items():
        if buffer or name == STATE:
            files.verify(folder / name, expected)
    if folder.name.isdecimal():
        for rank in range(1, manifest.get("ranks", 1)):
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
    path = run / STATE if (run / MANIFEST).exists() or run.parent.name == "checkpoints" else run
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
    """Return the run folder of a path: the folder itself, or that of a checkpoint or its `state.ckpt`."""
    folder = path.parent if path.name == STATE else path
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


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
    """Return the number of env steps of a checkpoint, and the id of its Weights & Biases run (None: it has none)."""
    state = files.load(path, mmap=True)
    try:
        wandb_id = state.get("wandb_id")
        if wandb_id is not None and not re.fullmatch(r"[\w-]+", wandb_id):
            raise ValueError(f"wandb_id={wandb_id!r}")
        return as_count("env_steps", state["levin"]["env_steps"]), wandb_id
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of Levin: {type(error).__name__}: {error}") from error
