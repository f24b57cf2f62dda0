"""The rows of a ring buffer as files that are written once.

`<start>_<end>.pt` holds the rows that were stored start-th to end-th since the run began. A checkpoint writes what is
new since the one before it and takes over the older files by hard links: a checkpoint is a whole folder, and deleting
one frees what no other needs. The price: a disk that spoils an old file spoils it for every checkpoint that shares it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from tensordict import TensorDict, TensorDictBase

from levin.core import files
from levin.core.errors import CheckpointError

PIECE_BYTES = 32 << 20  # copied out of the buffer before they are written: all that a checkpoint adds to the memory


def save(
    rows: TensorDictBase, written: int, folder: Path, before: Path, known: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Write a buffer into `folder`.

    Args:
        rows: `[L, ...]`, what the buffer holds; the k-th row ever stored lies at k modulo the buffer's size.
        written: How many rows have ever been stored.
        folder: Where the files go; it exists.
        before: The same folder of the checkpoint before, or of none.
        known: Size and checksum of the files there.

    Returns:
        Size and checksum of every file of `folder`, by its name.
    """
    sums = {}
    oldest = end = written - len(rows)
    for name in sorted(known, key=_range):
        start, stop = _range(name)
        if start <= end < stop:
            _link(before / name, folder / name)
            sums[name], end = known[name], stop
    per_piece = max(1, PIECE_BYTES // max(1, rows.bytes() // max(1, len(rows))))
    while end < written:
        at = end % len(rows) if oldest else end  # a ring that has not wrapped may be longer than what it holds
        stop = min(end + per_piece, written, end + len(rows) - at)
        name = f"{end}_{stop}.pt"
        piece = cast(TensorDict, rows[at : at + stop - end]).flatten_keys(".")
        sums[name] = files.save({key: value.cpu().clone() for key, value in piece.items()}, folder / name)
        end = stop
    files.sync(folder)
    return sums


def load(folder: Path, written: int, length: int) -> Iterator[TensorDict]:
    """The last `length` of the `written` rows that were ever stored, oldest first, piece by piece."""
    end = written - length
    for path in sorted(folder.glob("*.pt"), key=lambda path: _range(path.name)):
        start, stop = _range(path.name)
        if start <= end < stop:
            rows = TensorDict(files.load(path), batch_size=(stop - start,)).unflatten_keys(".")
            yield rows[end - start :]
            end = stop
    if end != written:
        raise CheckpointError(f"{folder} ends at row {end} of {written}")


def _range(name: str) -> tuple[int, int]:
    start, _, stop = name.removesuffix(".pt").partition("_")
    return int(start), int(stop)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)  # a file system without hard links
        files.sync(target)
