"""The place of an open database: whether the file and its log are still where the next start will look for them.

A process goes on writing to a file that was moved away or deleted, and every write succeeds. So the writer asks here
before it says that something is committed; it costs two looks at names, some microseconds. Knows no SQL.
"""

from __future__ import annotations

import os
from pathlib import Path

from llama_embeddings.errors import StoreUnusable

# Device and inode: what a name stands for, whatever the file holds.
_Identity = tuple[int, int]


class DatabaseFile:
    """A database that was just opened. `check_before_commit` and `check_after_commit` are for the writer's thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identify(path)
        # SQLite follows links first, then puts the log beside the file itself.
        self._log_path = Path(f"{os.path.realpath(path)}-wal")
        self._log_identity: _Identity | None = None

    def check(self) -> None:
        """Raise StoreUnusable if the name stands for another file than the one opened, or for none."""
        if self._identity is None or _identify(self.path) != self._identity:
            raise StoreUnusable("The database file was deleted or replaced. Stop the server and restore the file.")

    def note_connection(self) -> None:
        """The writer has a new connection, whose log may be a new one."""
        self._log_identity = None

    def check_before_commit(self) -> None:
        """Raise StoreUnusable where a commit would go nowhere; nothing has been written then."""
        self.check()

    def check_after_commit(self) -> None:
        """Raise StoreUnusable if file or log left their places while the commit was under way.

        The log holds what was committed last: without it the next start does not find that.
        """
        self.check()
        log_identity = _identify(self._log_path)
        if self._log_identity is None:
            self._log_identity = log_identity
        if log_identity is None or log_identity != self._log_identity:
            raise StoreUnusable(
                f"The database's log, {self._log_path.name}, was deleted or replaced. "
                "Stop the server, which saves what it can, and start it again."
            )


def _identify(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
