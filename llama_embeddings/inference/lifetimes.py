"""Frees memory outside of Python once nobody uses it any more, whoever asked for it to be freed and when.

A call into the engine that runs on a thread outlives the caller that was cancelled, and the lease that the caller held.
So memory is not freed by the one who decides that it should go, but by the last one who uses it. A call that never
returns keeps its memory until the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Lifetime:
    """Counts the users of something; as a context manager, it counts one. Thread-safe, and cheap beside any call.

    `free` is called once: when the lifetime has been ended and the last user has left. `make_refusal` makes what is
    raised for users that come after the end.
    """

    def __init__(self, free: Callable[[], None], make_refusal: Callable[[], Exception]) -> None:
        self._free = free
        self._make_refusal = make_refusal
        self._lock = threading.Lock()
        self._n_users = 0
        self._has_ended = False

    def __enter__(self) -> None:
        with self._lock:
            if self._has_ended:
                raise self._make_refusal()
            self._n_users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._n_users -= 1
            is_last = self._has_ended and self._n_users == 0
        if is_last:
            self._free()

    def end(self) -> None:
        """Let no more users in, and free at once if there are none. A second call does nothing."""
        with self._lock:
            is_last = not self._has_ended and self._n_users == 0
            self._has_ended = True
        if is_last:
            self._free()
