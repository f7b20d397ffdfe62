"""Rows that are deleted while somebody is still at work with them.

Between reading or committing a row and putting it into memory and index, the row may be deleted, and would then stay
behind there without a row. Whoever does such work watches, and clears up what was deleted meanwhile. Used on the event
loop only, so it needs no lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ForgottenRows:
    """Tells those who watch of the row ids that are announced."""

    def __init__(self) -> None:
        self._watches: dict[int, set[int]] = {}

    @contextmanager
    def watch(self) -> Iterator[set[int]]:
        """A set that holds the ids announced since; it grows until the end of the block."""
        forgotten: set[int] = set()
        self._watches[id(forgotten)] = forgotten
        try:
            yield forgotten
        finally:
            del self._watches[id(forgotten)]

    def announce(self, row_ids: Iterable[int]) -> None:
        """Rows are deleted, and their deletion is committed."""
        ids = list(row_ids)
        for forgotten in self._watches.values():
            forgotten.update(ids)
