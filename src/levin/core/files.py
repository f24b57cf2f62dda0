"""Write files safely: atomically, never through a link, forced onto the disk, with a checksum that readers verify."""

import errno
import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from levin.core.errors import CheckpointError, ConfigError

# Errors of file systems without links, such as those of USB sticks and of network drives.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def replace(folder: Path, name: str) -> Iterator[Path]:
    """Replace the file `name` in `folder` by the one that the caller writes to the yielded path.

    The path has the same suffix. The file is moved into place when the context ends without an error, so a kill or a
    power cut leaves either the old file or the new one. A link at its place is replaced, not followed.

    Args:
        folder: Existing folder, such as a run folder; it may be reached through links.
        name: Name of the file, or its path below `folder`. Missing subfolders are created.

    Raises:
        ConfigError: A subfolder is a link.
        OSError: The disk is full, or the folder is gone or read-only.
    """
    path = subfolder(folder, str(Path(name).parent)) / Path(name).name
    # Not named by the process: two containers may have the same process id and share a disk.
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(folder: Path, name: str, text: str) -> None:
    """Replace the file `name` in `folder` by a text file, as described at `replace`."""
    with replace(folder, name) as path:
        path.write_text(text, encoding="utf-8")


def subfolder(folder: Path, name: str) -> Path:
    """Return the path of a folder below `folder`, and create it if it is missing.

    Raises:
        ConfigError: A part of the path below `folder` is a link, which could point anywhere.
    """
    path = folder
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink():
            raise ConfigError(f"{path} is a link, and Levin writes only into {folder} itself: remove the link")
        path.mkdir(exist_ok=True)
    return path


def no_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=no_link)`, which then raises OSError for a link, and never waits for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


class ChecksummedFile:
    """Binary file for `torch.save` that counts the bytes written to it and computes their CRC-32."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.crc32 = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        """Append data. Remember an OSError, because `torch.save` replaces it by a RuntimeError."""
        self.bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the underlying file."""
        self.file.flush()


def save(value: Any, path: Path) -> dict[str, int]:
    """Write tensors and plain values, force them onto the disk, and return the size and CRC-32 of the file.

    Raises:
        OSError: The disk is full, or the folder is gone or read-only.
    """
    import torch  # late, because commands that only read texts need not wait for it

    with path.open("wb") as file:
        checksummed = ChecksummedFile(file)
        try:
            torch.save(value, checksummed)  # type: ignore[arg-type]
        except RuntimeError:
            if checksummed.error is None:
                raise
            raise checksummed.error from None
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": checksummed.bytes, "crc32": checksummed.crc32}


def load(path: Path, *, mmap: bool = False) -> Any:
    """Load tensors and plain values onto the CPU. No code in the file is executed.

    Raises:
        CheckpointError: The file can't be read, or holds other objects.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes raise errors of many types
        # Not torch's own message, which advises to load the file with `weights_only=False`.
        raise CheckpointError(f"{path} can't be read as tensors and plain values ({type(error).__name__})") from error


def check_loadable(value: Any) -> None:
    """Check that `load` would return a value after `save`.

    Raises:
        ValueError: It holds other objects than tensors and plain values.
    """
    import torch

    file = io.BytesIO()
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:  # pickle and torch raise errors of many types
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"it holds a {found[1]}" if found else f"{type(error).__name__}: {error}") from error


def save_json(value: Any, folder: Path, name: str) -> None:
    """Replace the file `name` in `folder` by plain values as JSON, as described at `replace`."""
    write_text(folder, name, json.dumps(value, indent=2) + "\n")


def verify(path: Path, expected: dict[str, int]) -> None:
    """Check a file against its expected size and CRC-32, as returned by `save`.

    Raises:
        CheckpointError: The file is missing, or differs from what was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
    crc32 = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            crc32 = zlib.crc32(data, crc32)
    if crc32 != expected["crc32"]:
        raise CheckpointError(f"{path} is damaged: its checksum differs from the one recorded when it was written")


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # folders of VirtualBox can't be forced
            raise
    finally:
        os.close(descriptor)
