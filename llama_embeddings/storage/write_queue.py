"""The one writer: takes writes from any number of tasks and commits them in groups.

    submit(function, payload) -> queue -> group of up to `batch_size` -> BEGIN IMMEDIATE        (on one thread)
                                                                            function(connection, [payload, ...])
    result or error of this write  <-------------------------------------- COMMIT

Every write gets exactly one answer, and gets it after its commit and a look whether the file is still in its place. A
group that fails is repeated write by write, so a bad write fails alone. A lock is waited out; nothing that happens to a
group ends the loop.

Knows no tables and no SQL: what is written is the functions' affair.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine

from llama_embeddings.errors import ServiceError, ShuttingDown, StoreBusy, StoreUnusable
from llama_embeddings.storage.backoff import Backoff, retry_while_locked
from llama_embeddings.storage.engine import Fault, classify_fault, describe_fault

logger = logging.getLogger(__name__)

Payload = TypeVar("Payload")
Result = TypeVar("Result")

# Runs inside the writer's transaction; answers as many results as it was given payloads, in their order.
WriteFunction = Callable[[Connection, Sequence[Payload]], Sequence[Result]]


class Place(Protocol):
    """Where commits go. Both are asked on the writer's thread, for every group, and raise StoreUnusable."""

    def check_before_commit(self) -> None:
        """The last chance to commit nothing."""

    def check_after_commit(self) -> None:
        """The last chance not to say that it is committed."""


@dataclass(slots=True)
class _Write:
    function: WriteFunction[Any, Any]
    payload: Any
    answer: asyncio.Future[Any]
    submitted_at: float = field(default_factory=monotonic)

    def succeed(self, result: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(slots=True)
class WriteCounters:
    """What the queue has done since it was made."""

    n_committed: int = 0
    n_transactions: int = 0
    n_failed: int = 0
    n_lock_retries: int = 0


class WriteQueue:
    """A bounded queue in front of an engine of one connection; the loop runs from `start` to `stop`."""

    def __init__(
        self,
        engine: Engine,
        *,
        place: Place | None = None,
        batch_size: int = 25,
        backoff: Backoff | None = None,
        max_waiting: int = 1_000,
    ) -> None:
        self._engine = engine
        self._place = place
        self._batch_size = batch_size
        self._backoff = backoff or Backoff()
        self._max_waiting = max_waiting
        self._waiting: deque[_Write] = deque()
        self._arrival = asyncio.Event()
        # One thread: a whole transaction is one visit to it, however many statements it has.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self.counters = WriteCounters()

    @property
    def depth(self) -> int:
        """How many writes wait for their turn, without the group in work."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the writer."""
        self._task = asyncio.create_task(self._run(), name="store-writer")

    async def stop(self) -> None:
        """Commit what waits, end the writer and refuse what comes later. May be called more than once."""
        self._is_stopping = True
        self._arrival.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._thread.shutdown()

    async def submit(
        self, function: WriteFunction[Payload, Result], payload: Payload, *, is_probe: bool = False
    ) -> Result:
        """Queue a write and wait for its commit. If the caller is cancelled, the write happens all the same.

        Neighbouring writes with the same function are handed to it together. A probe asks whether the database
        takes writes, and is queued however many wait.

        Raises:
            StoreBusy: the queue is full, or the database stayed locked beyond the retries.
            StoreFull: no room on the disk, or the database is read-only.
            StoreUnusable: the database was moved away, deleted or replaced.
            ShuttingDown: `stop` was called before.
        """
        if self._is_stopping or self._task is None or self._task.done():
            raise ShuttingDown("The store is shutting down and takes no more writes.")
        if len(self._waiting) >= self._max_waiting and not is_probe:
            raise StoreBusy(f"{self._max_waiting} writes are waiting for the database already. Try again later.")
        write = _Write(function, payload, asyncio.get_running_loop().create_future())
        write.answer.add_done_callback(_mark_retrieved)
        self._waiting.append(write)
        self._arrival.set()
        return await asyncio.shield(write.answer)

    async def read(self, function: Callable[[Engine], Result]) -> Result:
        """Run `function` on the writer's thread, between two transactions; it must not write."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._engine)

    async def _run(self) -> None:
        group: list[_Write] = []
        try:
            while group := await self._take_group():
                try:
                    await self._process(group)
                except Exception as error:
                    # The writer outlives its mistakes: those who wait get an answer, and the next group its turn.
                    logger.exception("A group of %d writes failed unexpectedly", len(group))
                    self._fail(group, error)
        finally:
            # Empty after an orderly stop. If the loop was torn down instead, nobody may be left waiting.
            for write in (*group, *self._waiting):
                write.fail(ShuttingDown("The store was closed before this was written."))
            self._waiting.clear()

    async def _take_group(self) -> list[_Write]:
        """What waits, at most `batch_size`; waits while nothing does. Empty: stop."""
        while not self._waiting:
            if self._is_stopping:
                return []
            self._arrival.clear()
            await self._arrival.wait()
        return [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]

    async def _process(self, group: Sequence[_Write]) -> None:
        """Commit a group and answer each of its writes."""
        try:
            results = await retry_while_locked(
                lambda: asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group),
                _is_lock,
                self._backoff,
                self._count_retry,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to these writes
            await self._process_failure(group, error)
        else:
            self.counters.n_transactions += 1
            self.counters.n_committed += len(group)
            for write, result in zip(group, results, strict=True):
                write.succeed(result)

    def _commit(self, group: Sequence[_Write]) -> list[Any]:
        """One transaction; on the writer's thread."""
        results: list[Any] = []
        with self._engine.begin() as connection:
            for function, writes in itertools.groupby(group, key=lambda write: write.function):
                payloads = [write.payload for write in writes]
                answers = function(connection, payloads)
                if len(answers) != len(payloads):
                    raise RuntimeError(f"{len(payloads)} writes got {len(answers)} results")
                results.extend(answers)
            if self._place is not None:
                self._place.check_before_commit()
        if self._place is not None:
            self._place.check_after_commit()
        return results

    async def _process_failure(self, group: Sequence[_Write], error: Exception) -> None:
        fault = classify_fault(error)
        if fault is Fault.READ_ONLY:
            # A connection that was opened while the file could not be written stays read-only for its lifetime.
            await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        if fault is Fault.LOCKED:
            self._fail([*group, *self._take_impatient()], error)
        elif len(group) == 1 or isinstance(error, StoreUnusable):
            # Of a database that is not there, the writes have no share: one by one they would fare no better.
            self._fail(group, error)
        else:
            for write in group:
                await self._process([write])

    def _take_impatient(self) -> list[_Write]:
        """Those that have waited behind a locked group for as long as it did: the next one would fare no better."""
        deadline = monotonic() - self._backoff.patience_seconds
        # The queue is in the order of arrival.
        n_impatient = sum(1 for _ in itertools.takewhile(lambda write: write.submitted_at <= deadline, self._waiting))
        return [self._waiting.popleft() for _ in range(n_impatient)]

    def _fail(self, writes: Sequence[_Write], error: Exception) -> None:
        fault = classify_fault(error)
        logger.warning("%d writes failed: %s", len(writes), fault.value if fault else type(error).__name__)
        self.counters.n_failed += len(writes)
        for write in writes:
            # One exception object for each: those who catch it add their own traceback.
            write.fail(self._describe(error, fault))

    def _describe(self, error: Exception, fault: Fault | None) -> Exception:
        if fault is None:
            return error.located(field=None, index=None) if isinstance(error, ServiceError) else error
        described = describe_fault(fault, retry_after_seconds=self._backoff.retry_after_seconds)
        described.__cause__ = error
        return described

    def _count_retry(self) -> None:
        self.counters.n_lock_retries += 1


def _is_lock(error: Exception) -> bool:
    return classify_fault(error) is Fault.LOCKED


def _mark_retrieved(answer: asyncio.Future[Any]) -> None:
    # The caller may be gone; asyncio would then complain that nobody looked at the error.
    if not answer.cancelled():
        answer.exception()
