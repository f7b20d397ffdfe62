"""One server a database: a lock of the operating system, which ends with its process however that ends.

The lock is on a file beside the database, found through links and other spellings of its path. The file says who holds
it, and stays; it means nothing while nobody does. Commands do not take the lock: they work beside a server.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

from llama_embeddings.errors import ConfigurationError

logger = logging.getLogger(__name__)

SUFFIX = ".lock"
FILE_MODE = 0o600
MAX_DESCRIPTION_BYTES = 1_000


class ServerLock:
    """A lock that is held. Made by `take`, to be given up by `release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, database: Path, holder: str) -> ServerLock:
        """Hold a database, which need not be there yet; `holder` is what others are told.

        Raises ConfigurationError, which names the holder, if it is held already.
        """
        path = Path(f"{os.path.realpath(database)}{SUFFIX}")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be opened ({error.strerror}), by which a server keeps others off its database.",
                setting="DATABASE_URL",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = os.pread(descriptor, MAX_DESCRIPTION_BYTES, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigurationError(
                f"Another server uses the database {database}: {found or 'one that is just starting'}. Stop it, name "
                "another file in DATABASE_URL, or set READ_ONLY_REPLICA=True to serve what it writes.",
                setting="DATABASE_URL",
            ) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); start no second server on it", path, error.strerror)
        with contextlib.suppress(OSError):  # without room on the disk there is a lock all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode()[:MAX_DESCRIPTION_BYTES], 0)
        return cls(descriptor)

    def release(self) -> None:
        """Let others have it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
