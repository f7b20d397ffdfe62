"""A lock that many may share or one may have alone. Knows nothing of what it guards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Readers hold it together, a writer alone; a waiting writer goes before readers that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_readers = 0
        self._n_writers_waiting = 0
        self._is_writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it with others. Not to be taken twice by one thread: a writer may have come in between."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_writing or self._n_writers_waiting))
            self._n_readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_readers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it with nobody else."""
        with self._changed:
            self._n_writers_waiting += 1
            self._changed.wait_for(lambda: not (self._is_writing or self._n_readers))
            self._n_writers_waiting -= 1
            self._is_writing = True
        try:
            yield
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
