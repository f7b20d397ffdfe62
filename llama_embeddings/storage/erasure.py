"""Erases deleted texts where they stand after their deletion: in the write-ahead log, and in gaps between rows.

SQLite overwrites what is deleted in the database's own pages (`secure_delete`); the log still has the pages as they
were before, until it is copied into the database and cut. It can be cut only while nobody reads an earlier state, so a
long read holds this up: callers wait for a bounded time, and the rest is done in the background. What moved rows left
behind is then overwritten, see `page_gaps.py`.

Nothing here deletes anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from sqlalchemy.exc import DBAPIError

from llama_embeddings.errors import ServiceError
from llama_embeddings.storage.page_gaps import Place

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 1.0


class Erasure:
    """Erases what was deleted, once for all requests that came before it began."""

    def __init__(
        self, empty_log: Callable[[], bool], overwrite_remains: Callable[[Sequence[Place]], Awaitable[int]]
    ) -> None:
        """`empty_log` blocks for some milliseconds, and answers whether the log is empty now.

        `overwrite_remains` is a write; it answers how many pages had something to be overwritten.
        """
        self._empty_log = empty_log
        self._overwrite_remains = overwrite_remains
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-erasure")
        self._waiting: list[tuple[asyncio.Future[None], Sequence[Place]]] = []
        self._task: asyncio.Task[None] | None = None
        self._last_reason = ""

    def begin(self, places: Sequence[Place] = ()) -> asyncio.Future[None]:
        """Have what was deleted until now, from these places, erased in the background; the future tells when it is."""
        erased = asyncio.get_running_loop().create_future()
        self._waiting.append((erased, places))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="erasure")
        return erased

    async def erase(self, places: Sequence[Place]) -> bool:
        """The same, and wait for it. False: it takes longer, and goes on in the background."""
        done, _ = await asyncio.wait([self.begin(places)], timeout=WAIT_SECONDS)
        return bool(done)

    async def stop(self) -> None:
        """End the background; the database's last connection empties the log when it is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for erased, _ in self._waiting:
            erased.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while self._waiting:
            # What is asked for meanwhile has its turn: it may be deleted after the log was copied.
            n_asked = len(self._waiting)
            if await self._try(list(chain.from_iterable(places for _, places in self._waiting))):
                answered, self._waiting = self._waiting[:n_asked], self._waiting[n_asked:]
                for erased, _ in answered:
                    if not erased.done():
                        erased.set_result(None)
                pause, self._last_reason = FIRST_PAUSE_SECONDS, ""
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _try(self, places: Sequence[Place]) -> bool:
        run = asyncio.get_running_loop().run_in_executor
        try:
            if not await run(self._thread, self._empty_log):
                return False
            if not places or not await self._overwrite_remains(places):
                return True
            return await run(self._thread, self._empty_log)
        except Exception as error:  # noqa: BLE001 - without this task, deletions would be pending for ever
            # The deletion itself is committed.
            self._log(error)
            return False

    def _log(self, error: Exception) -> None:
        """Once for as long as the reason is the same: a full disk may stay full for hours."""
        is_known = isinstance(error, DBAPIError | ServiceError | OSError)
        reason = repr(error.orig if isinstance(error, DBAPIError) else error)
        if reason != self._last_reason:
            logger.warning("Could not erase what was deleted: %s", reason, exc_info=None if is_known else error)
        self._last_reason = reason
