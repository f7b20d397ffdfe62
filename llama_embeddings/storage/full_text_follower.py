"""Keeps the full-text index behind the rows by a moment, and brings it up to date before it is asked.

New rows cost it 7 µs each when taken in by the thousand, 90 µs one by one. So nobody's write waits for it: it follows
in groups, in transactions of its own, through the same queue as every write. Rows that are deleted or become
searchable later are the writes' own affair, in their own transactions.

Where any of these finds the index damaged, it is emptied and filled anew in the background.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llama_embeddings.errors import FullTextUnavailable, ServiceError
from llama_embeddings.storage import full_text
from llama_embeddings.storage.write_queue import WriteFunction, WriteQueue

logger = logging.getLogger(__name__)

Payload = TypeVar("Payload")
Result = TypeVar("Result")

ROWS_PER_STEP = 1_000
PAUSE_SECONDS = 2.0
# A search waits while so many rows are taken in, which takes some two seconds; for more it is told to come back.
MAX_ROWS_TO_WAIT_FOR = 100_000
SECONDS_PER_ROW = 20e-6


class FullTextFollower:
    """One task that takes in new rows a while after `notice`."""

    def __init__(self, write_queue: WriteQueue, read_newest_row_id: Callable[[], Awaitable[tuple[int, int]]]) -> None:
        """`read_newest_row_id` gives the id of the newest row and the id up to which the index has come."""
        self._write_queue = write_queue
        self._read_newest_row_id = read_newest_row_id
        self._has_news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start following; what an earlier process left is taken in first."""
        self._has_news.set()
        self._task = asyncio.create_task(self._run(), name="full-text-follower")

    async def stop(self) -> None:
        """Stop following; what is left is taken in by the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def notice(self) -> None:
        """There are new rows."""
        self._has_news.set()

    async def catch_up(self, *, max_rows: int | None = None) -> None:
        """Take in every row that is committed now. Raises StoreBusy, StoreFull and their like.

        More than `max_rows` are left to the background. Raises FullTextUnavailable then, and if the index cannot be
        made anew.
        """
        newest, position = await self._read_newest_row_id()
        if max_rows is not None and newest - position > max_rows:
            self.notice()
            raise _describe_progress(position, newest)
        while position < newest:
            previous, position = position, await self.submit(full_text.index_next, ROWS_PER_STEP)
            if position == full_text.UNKNOWN_POSITION:
                raise FullTextUnavailable("The full-text index is damaged and cannot be made anew; all else goes on.")
            if position == previous:
                return  # the newest row was deleted meanwhile

    async def submit(self, function: WriteFunction[Payload, Result], payload: Payload) -> Result:
        """Queue a write that touches the index. If it finds damage, the index starts anew and the write is repeated."""
        try:
            return await self._write_queue.submit(function, payload)
        except FullTextUnavailable as error:
            await self.start_anew(error)
            return await self._write_queue.submit(function, payload)

    async def start_anew(self, reason: Exception | None = None) -> None:
        """Empty the index, and fill it in the background."""
        logger.warning("The full-text index is damaged and is made anew from the texts", exc_info=reason)
        await self._write_queue.submit(full_text.start_anew, None)
        self.notice()

    async def _run(self) -> None:
        while True:
            await self._has_news.wait()
            await asyncio.sleep(PAUSE_SECONDS)
            self._has_news.clear()
            try:
                await self.catch_up()
            except Exception as error:
                # Whatever it was: a follower that has ended would let searches miss new words, and nobody would know.
                trace = None if isinstance(error, ServiceError) else error
                logger.warning("The full-text index could not follow, and will try again: %s", error, exc_info=trace)
                self._has_news.set()


def _describe_progress(position: int, newest: int) -> FullTextUnavailable:
    return FullTextUnavailable(
        f"The full-text index is being filled: it has come to row {max(position, 0)} of {newest}. "
        "Try again later, or search by meaning alone.",
        retry_after_seconds=max(1.0, (newest - position) * SECONDS_PER_ROW),
    )
