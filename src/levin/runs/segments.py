"""Save and load a replay buffer as a series of files that are each written once.

Entries are numbered in the order in which they were stored since the run began; `<start>_<end>.pt` holds the entries
from number `start` up to, but not including, `end`. A checkpoint writes only the entries that are new since the one
before it, and hard-links the older files. So every checkpoint folder is complete, and deleting one frees the files that
no other links to. The drawback: a file that is damaged on disk is damaged in every checkpoint that shares it.

An algorithm may also change entries that it stored before, such as their priorities. `save` finds this by a checksum
per file and key, and returns the keys; the caller saves their tensors in full each time, beside these files.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from levin.core import files
from levin.core.errors import CheckpointError

PIECE_BYTES = 32 << 20  # per file, at most: entries are copied before they are written, and this bounds the copy


def save(
    data: TensorDictBase, written: int, folder: Path, before: Path, previous: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Write a buffer into `folder`.

    Args:
        data: `[L, ...]`, the contents of the buffer; the entry with number k lies at index k modulo the buffer's size.
        written: Number of entries stored since the run began.
        folder: Folder for the files, which exists already.
        before: Buffer folder of the previous checkpoint; it is not read if `previous` is empty.
        previous: What this function returned for `before`, by file name.

    Returns:
        Size and checksum of each file in `folder`, and the checksum `contents` of each tensor in it, by file name; and
        the keys (nested ones joined by dots) of which older files no longer hold the values in `data`.
    """
    checksums: dict[str, dict[str, Any]] = {}
    changed: set[str] = set()
    oldest = end = written - len(data)
    size = len(data) if oldest else written  # only a full buffer wraps, and L is its size then
    for name in sorted(previous, key=_entry_range):
        start, stop = _entry_range(name)
        if start <= end < stop:
            _link(before / name, folder / name)
            # The oldest entries of a file may have been overwritten since: then those that are left are compared.
            saved = (
                previous[name].get("contents")
                if start == end
                else _checksums(_load_piece(before / name)[end - start :])
            )
            if saved is not None:
                now = _checksums(_flatten(data, end % size, stop - end))
                changed |= {key for key in now if now[key] != saved.get(key)}
            checksums[name], end = previous[name], stop
    per_piece = max(1, PIECE_BYTES // max(1, data.bytes() // max(1, len(data))))
    while end < written:
        at = end % size
        stop = min(end + per_piece, written, end + size - at)
        name = f"{end}_{stop}.pt"
        piece = _flatten(data, at, stop - end)
        checksums[name] = files.save({key: value.cpu().clone() for key, value in piece.items()}, folder / name)
        checksums[name]["contents"] = _checksums(piece)
        end = stop
    files.sync(folder)
    return checksums, changed


def _flatten(data: TensorDictBase, at: int, length: int) -> TensorDict:
    """Return the entries from the index `at` on, with nested keys joined by dots. They do not wrap within a file."""
    return cast(TensorDict, data[at : at + length]).flatten_keys(".")


def _checksums(piece: TensorDict) -> dict[str, int]:
    """Return the CRC-32 of each tensor."""
    return {key: zlib.crc32(value.cpu().reshape(-1).view(torch.uint8).numpy().data) for key, value in piece.items()}


def _load_piece(path: Path) -> TensorDict:
    """Return the contents of a file `[n, ...]`, with nested keys joined by dots.

    Raises:
        CheckpointError: It holds other values than tensors.
    """
    tensors = files.load(path)
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise CheckpointError(f"{path} holds values that are not tensors")
    start, stop = _entry_range(path.name)
    return TensorDict(tensors, batch_size=(stop - start,))


def load(
    folder: Path, names: Iterable[str], written: int, length: int, changed: Iterable[str] = ()
) -> Iterator[TensorDict]:
    """Yield the newest `length` of the `written` entries ever stored, file by file, oldest first: `[n, ...]` each.

    `names` are the files in `folder`, and `changed` the keys to leave out, which `save` has returned.

    Raises:
        CheckpointError: Files are missing, or hold other values than tensors.
    """
    end = written - length
    for name in sorted(names, key=_entry_range):
        start, stop = _entry_range(name)
        if start <= end < stop:
            yield _load_piece(folder / name).exclude(*changed).unflatten_keys(".")[end - start :]
            end = stop
    if end != written:
        raise CheckpointError(f"{folder} is incomplete: its files end at entry {end} of {written}")


def _entry_range(name: str) -> tuple[int, int]:
    """Return start and end of the entries in the file `<start>_<end>.pt`."""
    start, _, stop = name.removesuffix(".pt").partition("_")
    return int(start), int(stop)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (*files.NO_LINKS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)
        files.sync(target)
