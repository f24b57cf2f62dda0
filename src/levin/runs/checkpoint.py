"""Checkpoints are Lightning's, one folder each: `state.ckpt`, the replay buffer as files, and a manifest of them. What
other ranks have is in folders of the same kind inside, `rank1` and so on.

A folder is written under a temporary name and renamed last, so a checkpoint is whole or absent. Nothing in it is
pickled: everything loads with `weights_only=True`, after its size and checksum have been compared with the manifest's.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from levin.core import distributed, files
from levin.core.errors import CheckpointError, ConfigError
from levin.runs import segments

STATE, BUFFER, MANIFEST, LAST = "state.ckpt", "buffer", "manifest.json", "last"
REWRITTEN = "rewritten.ckpt"  # in BUFFER: what changes in rows that are stored already, whole each time
FORMAT = 1  # of the folder; another is refused


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes `checkpoints/<clock>/` for the path `checkpoints/<clock>/state.ckpt`, and points `last` at it."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Path | None = None  # the checkpoint whose buffer files the next one takes over

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        folder = Path(path).parent
        partial = _partial_path(folder, distributed.rank())
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        sums = {}
        if checkpoint.get("buffer") is not None:
            (partial / BUFFER).mkdir()
            saved = _read_manifest(self.before)["files"] if self.before and self.before.exists() else {}
            known = {name.removeprefix(f"{BUFFER}/"): of for name, of in saved.items() if name.startswith(BUFFER)}
            known.pop(REWRITTEN, None)
            rows, written = checkpoint["buffer"].pop("data"), checkpoint["buffer"]["written"]
            before = (self.before or partial) / BUFFER
            new = segments.save(rows, written, partial / BUFFER, before, known)
            if "rewritten" in checkpoint["buffer"]:
                new[REWRITTEN] = files.save(checkpoint["buffer"].pop("rewritten"), partial / BUFFER / REWRITTEN)
            sums = {f"{BUFFER}/{name}": of for name, of in new.items()}
        sums[STATE] = files.save(checkpoint, partial / STATE)
        facts = {"algorithm": checkpoint["algorithm"], "env_steps": checkpoint["levin"]["env_steps"], "files": sums}
        files.save_json({"format": FORMAT, "ranks": distributed.world_size(), **facts}, partial / MANIFEST)
        if distributed.rank():
            files.sync(partial)
            self.before = folder / f"rank{distributed.rank()}"
            distributed.barrier()
            distributed.barrier()  # the first rank has taken it over
            return
        distributed.barrier()
        for rank in range(1, distributed.world_size()):
            _partial_path(folder, rank).rename(partial / f"rank{rank}")
        files.sync(partial)
        if folder.exists():  # not the one before: nothing is saved twice at the same moment of the clock
            discard(folder)
        partial.rename(folder)
        _relink(folder.with_name(LAST), folder.name)
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
            buffer["data"] = segments.load(folder / BUFFER, buffer["written"], buffer["length"])
            if (folder / BUFFER / REWRITTEN).exists():
                buffer["rewritten"] = files.load(folder / BUFFER / REWRITTEN)
        self.before = folder
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        discard(Path(path).parent)


def _partial_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what becomes its part of a checkpoint."""
    return folder.with_name(f".{folder.name}.{rank}.partial" if rank else f".{folder.name}.partial")


def discard(folder: Path) -> None:
    """Delete a folder. Its name goes first, so that no half of it is ever taken for a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def _relink(link: Path, target: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted in its `checkpoints/`."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: There is none.
        ConfigError: It is of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or not readable") from error
    if found != FORMAT:
        raise ConfigError(f"{folder} has format {found}, and this version reads format {FORMAT}")
    return manifest


def verify(folder: Path, *, buffer: bool, algorithm: str | None = None) -> None:
    """Hold a checkpoint against its manifest.

    Args:
        folder: The checkpoint.
        buffer: Whether the files of the replay buffer too.
        algorithm: The class that it must be of.

    Raises:
        CheckpointError: It is not whole.
        ConfigError: It is of another format or algorithm.
    """
    manifest = _read_manifest(folder)
    if algorithm not in (None, manifest["algorithm"]):
        raise ConfigError(f"{folder} is of {manifest['algorithm']}, and the run is of {algorithm}")
    for name, expected in manifest["files"].items():
        if buffer or name == STATE:
            files.verify(folder / name, expected)
    if folder.name.isdigit():
        for rank in range(1, manifest.get("ranks", 1)):
            verify(folder / f"rank{rank}", buffer=buffer)


def newest_checkpoint(run: Path, *, buffer: bool = False, algorithm: str | None = None) -> Path:
    """The `state.ckpt` of a run's newest whole checkpoint; the folder or file of a checkpoint is taken as it is.

    Whatever is damaged is named on stderr.

    Args:
        run: A run folder.
        buffer: Whether its replay buffer must be whole too.
        algorithm: The class that it must be of.

    Raises:
        CheckpointError: A checkpoint that was named is damaged, or every one of the run is.
        ConfigError: There is none, or it is of another format or algorithm.
    """
    path = run / STATE if (run / MANIFEST).exists() or run.parent.name == "checkpoints" else run
    if path.name == STATE:
        verify(path.parent, buffer=buffer, algorithm=algorithm)
        return path
    folders = list_checkpoints(run / "checkpoints")
    for folder in reversed(folders):
        try:
            verify(folder, buffer=buffer, algorithm=algorithm)
        except CheckpointError as error:
            print(f"levin: {error}; the checkpoint before it is tried", file=sys.stderr)
            continue
        return folder / STATE
    if folders:
        raise CheckpointError(f"run={run} holds no checkpoint that is whole")
    raise ConfigError(f"run={run} holds no checkpoint; a run folder has checkpoints/{LAST}/{STATE}")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints/`, oldest first."""
    return sorted((each for each in folder.glob("*") if each.name.isdigit()), key=lambda each: int(each.name))


def set_aside_newer(folder: Path) -> None:
    """Rename the checkpoints after this one, which are damaged: those that follow take their names."""
    for newer in list_checkpoints(folder.parent):
        if int(newer.name) > int(folder.name):
            aside = newer.with_name(f"{newer.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)


def env_steps_and_wandb_id(path: Path) -> tuple[int, str | None]:
    """How many env steps a checkpoint is at, and the Weights & Biases run that it belongs to."""
    state = files.load(path, mmap=True)
    return state["levin"]["env_steps"], state.get("wandb_id")
