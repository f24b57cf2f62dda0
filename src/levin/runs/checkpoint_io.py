"""Lightning plugin that writes and reads the checkpoint folders of `levin.runs.checkpoint`."""

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensordict import TensorDictBase

from levin.core import distributed, files
from levin.core.errors import RunError
from levin.runs import segments
from levin.runs.checkpoint import BEST, BUFFER, FORMAT, LAST, MANIFEST, REWRITTEN, STATE, discard, read_manifest, relink


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
        _check_loadable(checkpoint)
        try:
            self._write(checkpoint, folder)
        except OSError:  # give the space back: the disk may be full
            shutil.rmtree(_partial_path(folder, distributed.rank()), ignore_errors=True)
            raise

    def _write(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write a checkpoint into a temporary folder, and rename that."""
        partial = _partial_path(folder, distributed.rank())
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        checksums = {}
        if checkpoint.get("buffer") is not None:
            (partial / BUFFER).mkdir()
            saved = read_manifest(self.before)["files"] if self.before and self.before.exists() else {}
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
        manifest = {"format": FORMAT, "ranks": distributed.world_size(), "algorithm": checkpoint["algorithm"]}
        files.save_json({**manifest, "files": checksums}, partial, MANIFEST)
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
            names = [name.removeprefix(f"{BUFFER}/") for name in read_manifest(folder)["files"] if name != STATE]
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
        """Return whether a path is that of a checkpoint folder of this run, not a file that a user has named.

        Raises:
            RunError: A user has named a file in a checkpoint folder.
        """
        own = path.name == STATE and path.parent.parent == self.folder and path.parent.name.isdecimal()
        inside = path.absolute().parent.parts[len(self.folder.absolute().parts) :]
        in_run = path.absolute().is_relative_to(self.folder.absolute())
        if not own and in_run and inside and (inside[0].isdecimal() or inside[0] in (LAST, BEST)):
            raise RunError(f"{path} is in a folder of Levin's checkpoints, which may be removed: choose another path")
        return own


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


def _check_loadable(checkpoint: dict[str, Any]) -> None:
    """Raise a RunError if a part of a checkpoint could not be loaded again. Tensors can always be."""
    for name, part in checkpoint.items():
        try:
            files.check_loadable(_without_tensors(part))
        except ValueError as error:
            raise RunError(
                f"{name} of this run's checkpoints could not be loaded again: {error}; use tensors, numbers, texts, "
                "lists and dicts, such as float(...) for a learning rate"
            ) from error


def _without_tensors(value: Any) -> Any:
    """Return a part of a checkpoint with None in place of tensors, which would take time to save twice."""
    if isinstance(value, torch.Tensor | TensorDictBase):
        return None
    if type(value) in (dict, OrderedDict):
        return {key: _without_tensors(each) for key, each in value.items()}
    return [_without_tensors(each) for each in value] if type(value) in (list, tuple) else value
