"""Write files safely: force them onto the disk, record their size and checksum, and verify both before reading."""

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from levin.core.errors import CheckpointError


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
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} can't be read as tensors and plain values: {reason[0]}") from error


def save_json(value: Any, path: Path) -> None:
    """Write plain values as JSON and force them onto the disk."""
    with path.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


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
    os.fsync(descriptor)
    os.close(descriptor)
