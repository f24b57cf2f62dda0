"""Save and load a replay buffer as a series of files that are each written once.

Entries are numbered in the order in which they were stored since the run began; `<start>_<end>.pt` holds the entries
from number `start` up to, but not including, `end`. A checkpoint writes only the entries that are new since the one
before it, and hard-links the older files. So every checkpoint folder is complete, and deleting one frees the files that
no other links to. The drawback: a file that is damaged on disk is damaged in every checkpoint that shares it.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from levin.core import files
from levin.core.errors import CheckpointError

PIECE_BYTES = 32 << 20  # per file, at most: entries are copied before they are written, and this bounds the copy


def save(
    data: TensorDictBase, written: int, folder: Path, before: Path, previous: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Write a buffer into `folder`.

    Args:
        data: `[L, ...]`, the contents of the buffer; the entry with number k lies at index k modulo the buffer's size.
        written: Number of entries stored since the run began.
        folder: Folder for the files, which exists already.
        before: Buffer folder of the previous checkpoint; it is not read if `previous` is empty.
        previous: Size and checksum of each file in `before`, by file name.

    Returns:
        Size and checksum of each file in `folder`, by file name.
    """
    checksums = {}
    oldest = end = written - len(data)
    for name in sorted(previous, key=_entry_range):
        start, stop = _entry_range(name)
        if start <= end < stop:
            _link(before / name, folder / name)
            checksums[name], end = previous[name], stop
    per_piece = max(1, PIECE_BYTES // max(1, data.bytes() // max(1, len(data))))
    while end < written:
        at = end % len(data) if oldest else end  # only a full buffer wraps, and L is its size then
        stop = min(end + per_piece, written, end + len(data) - at)
        name = f"{end}_{stop}.pt"
        piece = cast(TensorDict, data[at : at + stop - end]).flatten_keys(".")
        checksums[name] = files.save({key: value.cpu().clone() for key, value in piece.items()}, folder / name)
        end = stop
    files.sync(folder)
    return checksums


def load(folder: Path, names: Iterable[str], written: int, length: int) -> Iterator[TensorDict]:
    """Yield the newest `length` of the `written` entries ever stored, file by file, oldest first: `[n, ...]` each.

    `names` are the files in `folder`, which `save` has returned.

    Raises:
        CheckpointError: Files are missing, or hold other values than tensors.
    """
    end = written - length
    for name in sorted(names, key=_entry_range):
        start, stop = _entry_range(name)
        if start <= end < stop:
            tensors = files.load(folder / name)
            if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
                raise CheckpointError(f"{folder / name} holds values that are not tensors")
            data = TensorDict(tensors, batch_size=(stop - start,)).unflatten_keys(".")
            yield data[end - start :]
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
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)
        files.sync(target)
