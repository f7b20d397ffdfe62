"""A document's bytes, read when they are needed instead of being held all the time.

Small files are bytes; large ones stay where they were received, on the disk, and are read through a descriptor of
their own, so that they outlive the request that brought them. All methods that read block: call them on a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha3_256
from pathlib import Path
from typing import BinaryIO, Self

BYTES_PER_READ = 1024 * 1024


class DocumentFile:
    """Bytes that can be read more than once. To be closed, or used as a context."""

    def __init__(self, data: bytes | None, descriptor: int | None, size: int) -> None:
        self._data = data
        self._descriptor = descriptor
        self.size_in_bytes = size

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return cls(data, None, len(data))

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """Raises OSError if it cannot be opened."""
        return cls._own(os.open(path, os.O_RDONLY))

    @classmethod
    def from_open_file(cls, file: BinaryIO) -> Self:
        """A file of somebody else's, who may close it afterwards."""
        return cls._own(os.dup(file.fileno()))

    @classmethod
    def _own(cls, descriptor: int) -> Self:
        return cls(None, descriptor, os.fstat(descriptor).st_size)

    def duplicate(self) -> Self:
        """The same bytes, to be closed separately."""
        return type(self)(
            self._data, None if self._descriptor is None else os.dup(self._descriptor), self.size_in_bytes
        )

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(self) -> Iterator[bytes]:
        """All bytes in pieces."""
        if self._data is not None:
            yield self._data
            return
        assert self._descriptor is not None, "the file is closed"
        offset = 0
        # At a position of its own: several may read at the same time.
        while piece := os.pread(self._descriptor, BYTES_PER_READ, offset):
            yield piece
            offset += len(piece)

    def read(self) -> bytes:
        """All bytes at once."""
        if self._data is not None:
            return self._data
        assert self._descriptor is not None, "the file is closed"
        # In one piece, which is what it gives for files below 2 GB: pieces put together would be held twice.
        data = os.pread(self._descriptor, self.size_in_bytes, 0)
        return data if len(data) == self.size_in_bytes else b"".join(self.iterate())

    def compute_hash(self) -> str:
        """SHA3-256 of the bytes, in hexadecimal."""
        digest = sha3_256()
        for piece in self.iterate():
            digest.update(piece)
        return digest.hexdigest()

    def copy_to(self, path: Path) -> None:
        """Write the bytes to a file that is complete once it has its name, and survives a power loss from then on."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as target:
                for piece in self.iterate():
                    target.write(piece)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
            _synchronise(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _synchronise(directory: Path) -> None:
    """Let the names in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
