"""Which files a list of paths means. Reads no file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to take in, or one to pass over with the reason. `name` is what it is stored under."""

    path: Path
    name: str
    size_in_bytes: int = 0
    reason: str | None = None


def find_files(paths: Sequence[Path], *, max_bytes: int) -> Iterator[FoundFile]:
    """Every file that is named or lies in a directory that is named, in the order of their names, each once.

    A file of a directory is stored under its path from that directory on, so that files of one name in several
    directories are told apart. Hidden files and directories are passed over, unless they are named themselves, and so
    are what links inside a directory point to.
    """
    seen: set[tuple[int, int]] = set()
    for path in paths:
        is_directory = path.is_dir()
        for file, name in _walk(path) if is_directory else [(path, path.name)]:
            found = _examine(file, name, max_bytes, is_named_itself=not is_directory)
            if found.reason is not None:
                yield found
            elif (identity := _identify(file)) not in seen:
                seen.add(identity)
                yield found


def _walk(path: Path) -> Iterator[tuple[Path, str]]:
    for directory, names, files in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            file = Path(directory, name)
            yield file, file.relative_to(path).as_posix()


def _identify(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _examine(path: Path, name: str, max_bytes: int, *, is_named_itself: bool) -> FoundFile:
    """The file with what speaks against it."""
    try:
        status = path.stat()
    except OSError as error:
        return FoundFile(path, name, 0, (error.strerror or "cannot be examined").lower())
    reason = _find_reason(status, max_bytes)
    if reason is None and not is_named_itself:
        reason = "hidden" if path.name.startswith(".") else "a link" if path.is_symlink() else None
    return FoundFile(path, name, status.st_size, reason)


def _find_reason(status: os.stat_result, max_bytes: int) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size == 0:
        return "empty"
    if status.st_size > max_bytes:
        return f"larger than {max_bytes} bytes (MAX_REQUEST_SIZE_IN_MB)"
    return None
