"""Packs texts of many callers into passes over the model and hands each its result.

The unit is one tokenised text (`Job`); a caller hands in a group of them and awaits all results. Workers, each
a thread with a context of its own, take from one queue:

- a pass closes at the token budget, at the context's sequence limit or when the queue is empty; an idle
  engine never waits for company;
- large groups are served in turn, a pass each, so that they end one after the other and the engine has work while
  their callers prepare the next; small ones, and what is left of large ones, go into the next pass, so that one text
  never waits behind the whole of a long document;
- of a few callers with small groups each pass takes a share, so that every worker has one and one more is there when
  the first of them ends: callers who wait for their answer come back together, some milliseconds later;
- a lone text on an idle engine gets all cores on one context, which halves its latency; under load each context
  computes on one thread, which is faster than threads that wait for each other at every step.

A pass that fails is retried text by text once; each text gets its own result or its own error, and the worker goes
on. Knows neither tokenising nor pooling rules beyond calling them, nor models, caches or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llama_embeddings.errors import InferenceFailed, Overloaded, ServiceError, ShuttingDown
from llama_embeddings.inference.backend import Context, Pooling
from llama_embeddings.inference.pooling import normalise, pool_rows
from llama_embeddings.inference.tiles import MAX_CANDIDATES, TILE, arrange, find_filling

logger = logging.getLogger(__name__)

# How fast a measured rate forgets: each pass counts for this share of the estimate.
RATE_SMOOTHING = 0.1
# Retry-After stays between these, whatever the estimate says.
MIN_RETRY_AFTER_SECONDS = 1.0
MAX_RETRY_AFTER_SECONDS = 120.0
# So many groups are asked in vain for a text that fits the rest of a pass, before it is closed.
MAX_PASSED_OVER = 16
# A group that waits for no more than this share of a pass goes into the next one.
SMALL_SHARE = 0.25
# Of a pass, what small groups leave to large ones while both wait.
LARGE_SHARE = 0.25
STOPPED_MESSAGE = "The engine of this model has stopped; the log has the reason."


@dataclass(frozen=True, slots=True)
class Job:
    """One tokenised text, special tokens included: int32 (n,). `wants_rows` asks for its token embeddings too."""

    tokens: np.ndarray
    wants_rows: bool = False


@dataclass(frozen=True, slots=True)
class JobResult:
    """`vector`: float32 (n_dims,), pooled; `unit_vector`: the same of unit length; `rows`: float32 (n_tokens, n_dims).

    Rows are there if they were asked for. A reranker's `vector` holds its score, and so does `unit_vector`.
    """

    vector: np.ndarray
    unit_vector: np.ndarray
    rows: np.ndarray | None
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class BatcherLimits:
    """How much goes into a pass, and how much may wait."""

    n_workers: int
    n_threads_per_worker: int
    token_budget: int
    n_threads_for_lone_text: int
    max_texts_in_flight: int
    max_queued_tokens: int


@dataclass(slots=True)
class BatcherCounters:
    """What `/metrics` and tests read; written under the queue's lock."""

    n_passes: int = 0
    n_texts: int = 0
    n_tokens: int = 0
    n_failed_texts: int = 0
    n_skipped_texts: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Group:
    """The jobs of one caller. `waiting` holds the positions not yet taken, shortest first."""

    jobs: Sequence[Job]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[JobResult | ServiceError]]
    arrived: float
    waiting: list[int]
    n_waiting_tokens: int
    results: list[JobResult | ServiceError | None]
    n_open: int
    cancelled: bool = False

    def take_fitting(self, room: int, *, offset: int, max_count: int) -> list[int]:
        """Take out the longest job of at most `room` tokens, and those that fill attention's tiles with it.

        `offset`: how many tokens are before it in the pass.
        """
        n_fitting = bisect_right(self.waiting, room, key=self._length)
        if not n_fitting:
            return []
        places = [n_fitting - 1]
        # Some of every length: of those that are as long as the first, few would add up to anything.
        candidates = range(n_fitting - 2, -1, -max(1, math.ceil((n_fitting - 1) / MAX_CANDIDATES)))
        filling = find_filling(
            self._length(self.waiting[n_fitting - 1]),
            [self._length(self.waiting[place]) for place in candidates],
            room=room,
            offset=offset % TILE,
        )
        places += (candidates[number] for number in filling or ())
        positions = [self.waiting[place] for place in places[:max_count]]
        for place in sorted(places[:max_count], reverse=True):
            del self.waiting[place]
        self.n_waiting_tokens -= sum(map(self._length, positions))
        return positions

    @property
    def longest(self) -> int:
        """Tokens of the longest job that waits."""
        return self._length(self.waiting[-1])

    def _length(self, position: int) -> int:
        return len(self.jobs[position].tokens)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One job inside a pass."""

    group: _Group
    position: int

    @property
    def job(self) -> Job:
        return self.group.jobs[self.position]


@dataclass(slots=True)
class _Pass:
    """A pass that is being filled."""

    room: int
    n_places: int
    # A text may be longer than the budget if it is alone: the budget is for company.
    room_for_lone: int
    entries: list[_Entry] = field(default_factory=list)
    n_tokens: int = 0

    def take_all(self, group: _Group, reserved: int = 0) -> bool:
        """Take what fits of a group, leaving so many tokens free; whether anything did."""
        n_before = len(self.entries)
        while group.waiting and self._take_some(group, reserved):
            pass
        return len(self.entries) > n_before

    def _take_some(self, group: _Group, reserved: int) -> bool:
        n_places = self.n_places - len(self.entries)
        if n_places <= 0:
            return False
        room = self.room - reserved - self.n_tokens
        if not self.entries and group.longest > room:
            room, n_places = self.room_for_lone, 1
        positions = group.take_fitting(room, offset=self.n_tokens, max_count=n_places)
        self.entries += (_Entry(group, position) for position in positions)
        self.n_tokens += sum(len(group.jobs[position].tokens) for position in positions)
        return bool(positions)


@dataclass(slots=True)
class _Queue:
    """What waits and what is being computed; every field is read and written under `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    # Workers with nothing to do, by number. The first is woken first: a lone text finds its caches warm, and
    # the helper threads of no other worker are still spinning on a core from the text before.
    idle: dict[int, threading.Condition] = field(default_factory=dict)
    small: deque[_Group] = field(default_factory=deque)
    large: deque[_Group] = field(default_factory=deque)
    # The last pass had no room for any of the large: the next one begins with them.
    is_large_due: bool = False
    n_texts: int = 0
    n_tokens: int = 0
    n_texts_in_flight: int = 0
    n_busy_workers: int = 0
    stopping: bool = False
    tokens_per_second: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not self.small and not self.large

    def add(self, group: _Group, small_tokens: int) -> None:
        """Put a group at the end of its line."""
        (self.small if group.n_waiting_tokens <= small_tokens else self.large).append(group)

    def discard(self, group: _Group) -> bool:
        """Take a group out of its line; whether it was in one."""
        for line in (self.small, self.large):
            if group in line:
                line.remove(group)
                return True
        return False

    def clear(self) -> list[_Group]:
        """Take out all groups."""
        groups = [*self.small, *self.large]
        self.small.clear()
        self.large.clear()
        self.n_texts = self.n_tokens = 0
        return groups

    def wake(self, count: int) -> None:
        """Wake so many idle workers, or all there are."""
        for number in sorted(self.idle)[:count]:
            self.idle.pop(number).notify()

    def wait(self, number: int) -> None:
        """Let worker `number` sleep until it is woken; the lock is released meanwhile."""
        woken = self.idle[number] = threading.Condition(self.lock)
        woken.wait()


class Batcher:
    """The queue in front of one model and the threads that work it off."""

    def __init__(self, open_context: Callable[[], Context], *, pooling: Pooling, limits: BatcherLimits) -> None:
        self._pooling = pooling
        self._limits = limits
        self._queue = _Queue()
        self._contexts: list[Context] = []
        try:
            for _ in range(limits.n_workers):
                self._contexts.append(open_context())
        except BaseException:  # no thread will close them
            for context in self._contexts:
                context.close()
            raise
        # How many small groups there were in each worker's last pass.
        self._n_callers = [0] * limits.n_workers
        self._max_tokens = min(context.max_tokens for context in self._contexts)
        self.counters = BatcherCounters()
        self.failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(number, context), name=f"embedding-worker-{number}", daemon=True)
            for number, context in enumerate(self._contexts)
        ]
        for thread in self._threads:
            thread.start()

    # -- the callers' side, on the event loop --------------------------------------------------------------------

    async def compute(self, jobs: Sequence[Job], *, is_probe: bool = False) -> list[JobResult | ServiceError]:
        """Compute all jobs; the answer has one result or one error per job, in order.

        Raises Overloaded if too much is waiting already and ShuttingDown after `stop`. A probe is never too much, and
        its jobs come next.
        """
        if not jobs:
            return []
        group = self._make_group(jobs)
        self._enqueue(group, is_probe=is_probe)
        try:
            return await group.future
        except asyncio.CancelledError:
            self._withdraw(group)
            raise

    def _make_group(self, jobs: Sequence[Job]) -> _Group:
        longest = max(len(job.tokens) for job in jobs)
        if longest > self._max_tokens or any(len(job.tokens) == 0 for job in jobs):
            raise InferenceFailed(f"A text of {longest} tokens, or of none, cannot be computed in one pass.")
        loop = asyncio.get_running_loop()
        shortest_first = sorted(range(len(jobs)), key=lambda position: len(jobs[position].tokens))
        return _Group(
            jobs=jobs,
            loop=loop,
            future=loop.create_future(),
            arrived=time.monotonic(),
            waiting=shortest_first,
            n_waiting_tokens=sum(len(job.tokens) for job in jobs),
            results=[None] * len(jobs),
            n_open=len(jobs),
        )

    def _enqueue(self, group: _Group, *, is_probe: bool) -> None:
        queue = self._queue
        with queue.lock:
            self._check_admission(is_probe=is_probe)
            if is_probe:
                queue.small.appendleft(group)
            else:
                queue.add(group, self._small_tokens)
            queue.n_texts += len(group.jobs)
            queue.n_tokens += group.n_waiting_tokens
            queue.wake(len(group.jobs))

    def _check_admission(self, *, is_probe: bool) -> None:
        if self.failure is not None:
            raise InferenceFailed(STOPPED_MESSAGE)
        if self._queue.stopping:
            raise ShuttingDown("The server is shutting down.", retry_after_seconds=5.0)
        if self._queue.n_tokens >= self._limits.max_queued_tokens and not is_probe:
            raise Overloaded(
                f"{self._queue.n_texts} texts ({self._queue.n_tokens} tokens) are waiting already; try again later.",
                retry_after_seconds=self._estimate_wait(),
            )

    def _estimate_wait(self) -> float:
        rate = self._queue.tokens_per_second
        seconds = self._queue.n_tokens / rate if rate else MIN_RETRY_AFTER_SECONDS
        return min(max(seconds, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)

    def _withdraw(self, group: _Group) -> None:
        with self._queue.lock:
            group.cancelled = True
            if self._queue.discard(group):
                self._forget_waiting(group)

    def _forget_waiting(self, group: _Group) -> None:
        self._queue.n_texts -= len(group.waiting)
        self._queue.n_tokens -= group.n_waiting_tokens
        self.counters.n_skipped_texts += len(group.waiting)
        group.waiting.clear()

    @property
    def n_queued_texts(self) -> int:
        return self._queue.n_texts

    @property
    def n_queued_tokens(self) -> int:
        return self._queue.n_tokens

    @property
    def is_computing(self) -> bool:
        """Whether a pass is under way."""
        return self._queue.n_busy_workers > 0

    @property
    def tokens_per_second(self) -> float:
        """Measured over the last passes; 0 before the first."""
        return self._queue.tokens_per_second

    def stop(self, *, timeout_seconds: float) -> bool:
        """Finish what waits, answer what is left with ShuttingDown, end the threads; each closes its context.

        False if a pass did not end within another time limit: its context stays as long as the pass takes.
        Blocks; call it from a thread other than the event loop's.
        """
        with self._queue.lock:
            self._queue.stopping = True
            self._queue.wake(len(self._threads))
        self._join_threads(timeout_seconds)
        self._answer_waiting(ShuttingDown("The server is shutting down.", retry_after_seconds=5.0))
        if not self._join_threads(timeout_seconds):
            logger.error("A pass does not end; its model's memory is freed when it does, or with the process")
            return False
        return True

    def _join_threads(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _answer_waiting(self, error: ServiceError) -> None:
        with self._queue.lock:
            groups = self._queue.clear()
            self._queue.wake(len(self._threads))
        for group in groups:
            for position in group.waiting:
                group.results[position] = error
        self._settle({group: len(group.waiting) for group in groups})
        for group in groups:
            group.waiting.clear()

    # -- the workers' side ---------------------------------------------------------------------------------------

    def _work(self, number: int, context: Context) -> None:
        try:
            while (taken := self._wait_for_pass(number, context)) is not None:
                entries, n_threads = taken
                try:
                    self._run_pass(context, _in_tiles(entries), n_threads)
                except BaseException as error:  # whatever it was: nobody may go on waiting for this pass
                    self.failure = error
                    self._hand_over(entries, [InferenceFailed(STOPPED_MESSAGE)] * len(entries))
                    raise
                finally:
                    self._finish_pass(entries)
        except BaseException as error:  # the last resort of a thread: nobody above would see it
            logger.exception("An embedding worker ended; its model answers with errors from now on")
            self.failure = error
            self._answer_waiting(InferenceFailed(STOPPED_MESSAGE))
        finally:
            # By the thread that computes in it, after its last look at the numbers: nobody else knows when that is.
            context.close()

    def _wait_for_pass(self, number: int, context: Context) -> tuple[list[_Entry], int] | None:
        queue = self._queue
        with queue.lock:
            while True:
                entries = self._take(number, context)
                if entries:
                    break
                if queue.stopping and queue.is_empty:
                    return None
                self._n_callers[number] = 0
                queue.wait(number)
            is_lone = len(entries) == 1 and queue.n_busy_workers == 0 and queue.is_empty
            queue.n_busy_workers += 1
            queue.n_texts_in_flight += len(entries)
        return entries, self._limits.n_threads_for_lone_text if is_lone else self._limits.n_threads_per_worker

    def _take(self, number: int, context: Context) -> list[_Entry]:
        """Fill a pass: from small groups first, but for a share that large ones get while they wait."""
        queue = self._queue
        room = self._room_for_pass(context)
        n_places = min(context.max_sequences, self._limits.max_texts_in_flight - queue.n_texts_in_flight)
        taken = _Pass(room, n_places, context.max_tokens)
        if n_places <= 0:
            return []
        has_large = queue.is_large_due and self._fill_from_large(taken)
        self._n_callers[number] = _fill_from_small(
            taken,
            queue.small,
            reserved=int(LARGE_SHARE * room) if queue.large else 0,
            n_groups=self._choose_share_of_callers(),
        )
        has_large |= self._fill_from_large(taken)
        queue.is_large_due = bool(queue.large) and not has_large
        queue.n_texts -= len(taken.entries)
        queue.n_tokens -= taken.n_tokens
        return taken.entries

    def _fill_from_large(self, taken: _Pass) -> bool:
        """Take what fits of each, in turn; who got a turn goes to the end of the line. Whether anybody did."""
        line = self._queue.large
        served: list[_Group] = []
        passed_over: list[_Group] = []
        while line and len(taken.entries) < taken.n_places and len(passed_over) < MAX_PASSED_OVER:
            group = line.popleft()
            (served if taken.take_all(group) else passed_over).append(group)
        line.extendleft(reversed(passed_over))
        for group in served:
            if group.waiting:
                self._queue.add(group, self._small_tokens)
        return bool(served)

    def _choose_share_of_callers(self) -> int:
        """How many small groups may go into the next pass: all, or a share if the one after it were empty else."""
        n_workers = len(self._contexts)
        n_waiting = len(self._queue.small)
        if n_workers == 1 or self._queue.large or self._queue.n_busy_workers < n_workers - 1:
            return n_waiting
        return math.ceil((n_waiting + sum(self._n_callers)) / (n_workers + 1))

    @property
    def _small_tokens(self) -> int:
        return int(SMALL_SHARE * self._limits.token_budget)

    def _room_for_pass(self, context: Context) -> int:
        """The token budget, or a fair share of what waits if that is less and other workers have nothing to do."""
        n_idle = max(1, len(self._threads) - self._queue.n_busy_workers)
        share = math.ceil(self._queue.n_tokens / n_idle)
        if share > TILE:
            share += -share % TILE
        return min(self._limits.token_budget, context.max_tokens, share)

    def _finish_pass(self, entries: Sequence[_Entry]) -> None:
        with self._queue.lock:
            self._queue.n_busy_workers -= 1
            self._queue.n_texts_in_flight -= len(entries)
            if self._queue.stopping:
                self._queue.wake(len(self._threads))  # those that wait for their turn must see the end, too
            elif not self._queue.is_empty:
                self._queue.wake(1)

    def _run_pass(self, context: Context, entries: Sequence[_Entry], n_threads: int) -> None:
        started = time.monotonic()
        try:
            outcomes = self._compute_results(context, entries, n_threads, started)
        except InferenceFailed as error:
            logger.warning("A pass of %d texts failed (%s); retrying them one by one", len(entries), error)
            outcomes = [self._retry_alone(context, entry, started) for entry in entries]
        self._count_pass(entries, outcomes, time.monotonic() - started, started)
        self._hand_over(entries, outcomes)

    def _compute_results(
        self, context: Context, entries: Sequence[_Entry], n_threads: int, started: float
    ) -> list[JobResult | ServiceError]:
        sequences = [entry.job.tokens for entry in entries]
        computed = context.compute(sequences, n_threads=n_threads)
        lengths = [len(sequence) for sequence in sequences]
        is_ranked = self._pooling is Pooling.RANK
        n_expected = len(sequences) if is_ranked else sum(lengths)
        if len(computed) != n_expected:
            raise InferenceFailed(f"The engine gave {len(computed)} rows where {n_expected} were expected.")
        vectors = computed if is_ranked else pool_rows(computed, lengths, self._pooling)
        # For all texts of the pass at once: one by one, on the event loop, it would cost more than the rest there.
        unit_vectors = vectors if is_ranked else normalise(vectors)
        usable = np.isfinite(unit_vectors).all(axis=1)
        compute_seconds = time.monotonic() - started
        ends = np.cumsum(lengths)
        return [
            JobResult(
                vector=vectors[i],
                unit_vector=unit_vectors[i],
                rows=computed[ends[i] - lengths[i] : ends[i]].copy() if entry.job.wants_rows else None,
                queue_seconds=started - entry.group.arrived,
                compute_seconds=compute_seconds,
            )
            if usable[i]
            else InferenceFailed("The model gave a vector that is not finite or is all zeros for this text.")
            for i, entry in enumerate(entries)
        ]

    def _retry_alone(self, context: Context, entry: _Entry, started: float) -> JobResult | ServiceError:
        try:
            return self._compute_results(context, [entry], self._limits.n_threads_per_worker, started)[0]
        except InferenceFailed as error:
            return error

    def _count_pass(
        self, entries: Sequence[_Entry], outcomes: Sequence[JobResult | ServiceError], seconds: float, started: float
    ) -> None:
        n_tokens = sum(len(entry.job.tokens) for entry in entries)
        with self._queue.lock:
            counters = self.counters
            counters.n_passes += 1
            counters.n_texts += len(entries)
            counters.n_tokens += n_tokens
            counters.n_failed_texts += sum(isinstance(outcome, ServiceError) for outcome in outcomes)
            counters.queue_seconds += sum(started - entry.group.arrived for entry in entries)
            counters.compute_seconds += seconds
            rate = n_tokens / max(seconds, 1e-6) * self._queue.n_busy_workers
            known = self._queue.tokens_per_second
            self._queue.tokens_per_second = known + RATE_SMOOTHING * (rate - known) if known else rate

    def _hand_over(self, entries: Sequence[_Entry], outcomes: Sequence[JobResult | ServiceError]) -> None:
        settled: dict[_Group, int] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            entry.group.results[entry.position] = outcome
            settled[entry.group] = settled.get(entry.group, 0) + 1
        self._settle(settled)

    def _settle(self, counts: Mapping[_Group, int]) -> None:
        """So many jobs of each group have their results; the groups that are complete are answered together."""
        complete: dict[asyncio.AbstractEventLoop, list[_Group]] = {}
        with self._queue.lock:
            for group, count in counts.items():
                group.n_open -= count
                if group.n_open == 0 and not group.cancelled:
                    complete.setdefault(group.loop, []).append(group)
        # Once for each loop: its thread wakes up at the first call, and would only get in the way of the others.
        for loop, groups in complete.items():
            loop.call_soon_threadsafe(_answer, groups)


def _in_tiles(entries: Sequence[_Entry]) -> list[_Entry]:
    return [entries[position] for position in arrange([len(entry.job.tokens) for entry in entries])]


def _fill_from_small(taken: _Pass, line: deque[_Group], *, reserved: int, n_groups: int) -> int:
    """Take what fits of each; those with nothing that does come first in the next pass. Of how many anything did."""
    passed_over: list[_Group] = []
    n_served = 0
    while line and n_served < n_groups and len(taken.entries) < taken.n_places and len(passed_over) < MAX_PASSED_OVER:
        group = line.popleft()
        n_served += taken.take_all(group, reserved)
        if group.waiting:
            passed_over.append(group)
    line.extendleft(reversed(passed_over))
    return n_served


def _answer(groups: Sequence[_Group]) -> None:
    for group in groups:
        if not group.future.done():
            group.future.set_result([result for result in group.results if result is not None])
