"""The batcher: what goes into a pass, whose turn it is, and one answer for every text whatever happens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_embeddings.errors import InferenceFailed, ModelUnusable, Overloaded, ServiceError, ShuttingDown
from llama_embeddings.inference.backend import Context, Pooling
from llama_embeddings.inference.batcher import Batcher, BatcherLimits, Job, JobResult
from llama_embeddings.inference.fake_backend import FakeBackend, FakeModel
from llama_embeddings.inference.tiles import TILE

N_THREADS_FOR_LONE_TEXT = 4
# A text that keeps a worker busy at the closed gate; no other text in these tests has its length.
BLOCKER_LENGTH = 3


def load_model(backend: FakeBackend) -> FakeModel:
    return backend.load(Path("none.gguf"), name="fake", digest="0", max_window=512, pooling=None)


def make_batcher(
    open_context: Callable[[], Context],
    *,
    pooling: Pooling = Pooling.MEAN,
    n_workers: int = 1,
    token_budget: int = 64,
    max_texts_in_flight: int = 256,
    max_queued_tokens: int = 1_000_000,
) -> Batcher:
    limits = BatcherLimits(
        n_workers=n_workers,
        n_threads_per_worker=1,
        token_budget=token_budget,
        n_threads_for_lone_text=N_THREADS_FOR_LONE_TEXT,
        max_texts_in_flight=max_texts_in_flight,
        max_queued_tokens=max_queued_tokens,
    )
    return Batcher(open_context, pooling=pooling, limits=limits)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(n_dims=8)


@pytest.fixture
def open_batcher(backend: FakeBackend) -> Iterator[Callable[..., Batcher]]:
    """Makes batchers over the fake backend, or over contexts given, and stops them afterwards."""
    opened: list[Batcher] = []

    def open_one(open_context: Callable[[], Context] | None = None, **limits: object) -> Batcher:
        opened.append(make_batcher(open_context or load_model(backend).open_context, **limits))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    backend.gate.set()
    for batcher in opened:
        batcher.stop(timeout_seconds=5.0)


def make_jobs(lengths: Sequence[int], *, seed: int = 0, wants_rows: bool = False) -> list[Job]:
    random = np.random.default_rng(seed)
    return [Job(random.integers(0, 256, length, dtype=np.int32), wants_rows) for length in lengths]


def compute_alone(job: Job) -> np.ndarray:
    """The rows of one text from a context that never sees another: float32 (n_tokens, n_dims)."""
    return load_model(FakeBackend(n_dims=8)).open_context().compute([job.tokens], n_threads=1)


def assert_same_as_alone(jobs: Sequence[Job], outcomes: Sequence[JobResult | ServiceError]) -> None:
    assert len(outcomes) == len(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, JobResult), outcome
        np.testing.assert_allclose(outcome.vector, compute_alone(job).mean(axis=0), atol=1e-5)


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def closed_gate(backend: FakeBackend, batcher: Batcher, n_workers: int = 1) -> AsyncIterator[None]:
    """Every worker holds a pass of one text and waits; what is handed in meanwhile queues up."""
    backend.gate.clear()
    blockers = []
    for _ in range(n_workers):
        blockers.append(asyncio.create_task(batcher.compute(make_jobs([BLOCKER_LENGTH]))))
        await asyncio.sleep(0)
        await wait_until(lambda: batcher.n_queued_texts == 0)
    try:
        yield
    finally:
        backend.gate.set()
        await asyncio.gather(*blockers)


async def hand_in(batcher: Batcher, *groups: Sequence[Job]) -> list[asyncio.Task[list[JobResult | ServiceError]]]:
    """Queue groups one behind the other."""
    tasks = []
    for group in groups:
        tasks.append(asyncio.create_task(batcher.compute(group)))
        await asyncio.sleep(0)  # the task runs up to its first wait, which is behind the queue
    return tasks


def passes_after_blockers(backend: FakeBackend) -> list[list[int]]:
    return [lengths for lengths in backend.passes if lengths != [BLOCKER_LENGTH]]


# What a pass gives


@pytest.mark.parametrize("n_workers", [1, 2, 3])
async def test_text_gets_the_same_vector_alone_and_in_company_and_order_is_kept(
    open_batcher: Callable[..., Batcher], n_workers: int
) -> None:
    """Twenty callers with mixed lengths each get what their texts give alone, in their own order."""
    batcher = open_batcher(n_workers=n_workers, token_budget=96)
    lengths = np.random.default_rng(1).integers(1, 200, (20, 9))
    groups = [make_jobs(row.tolist(), seed=number) for number, row in enumerate(lengths)]
    answers = await asyncio.gather(*(batcher.compute(group) for group in groups))
    for group, outcomes in zip(groups, answers, strict=True):
        assert_same_as_alone(group, outcomes)


async def test_rows_are_given_to_those_who_asked_and_outlive_the_next_pass(
    open_batcher: Callable[..., Batcher],
) -> None:
    """Rows are a copy of what a context may overwrite; who did not ask gets none."""
    shared = np.empty((512, 2), dtype=np.float32)

    def compute(sequences: Sequence[np.ndarray]) -> np.ndarray:
        tokens = np.concatenate(sequences)
        shared[: len(tokens)] = tokens[:, None]
        return shared[: len(tokens)]

    batcher = open_batcher(lambda: FunctionContext(compute))
    asking, other = Job(np.array([5, 6], np.int32), wants_rows=True), Job(np.array([7], np.int32))
    first, second = await batcher.compute([asking, other])
    await batcher.compute([Job(np.array([99] * 8, np.int32))])
    assert isinstance(first, JobResult)
    assert isinstance(second, JobResult)
    assert first.rows is not None
    np.testing.assert_array_equal(first.rows, [[5, 5], [6, 6]])
    assert second.rows is None
    np.testing.assert_array_equal(second.vector, [7, 7])


async def test_reranker_gives_one_score_per_text(open_batcher: Callable[..., Batcher]) -> None:
    """With pooling RANK a context gives one row per text, and a score of 0 is a score."""
    context = FunctionContext(lambda sequences: np.array([[len(tokens) - 1.0] for tokens in sequences], np.float32))
    batcher = open_batcher(lambda: context, pooling=Pooling.RANK)
    outcomes = await batcher.compute(make_jobs([1, 5, 3]))
    assert [outcome.vector.tolist() for outcome in outcomes if isinstance(outcome, JobResult)] == [[0], [4], [2]]


async def test_nothing_asked_is_nothing_answered(open_batcher: Callable[..., Batcher]) -> None:
    """No jobs need no pass."""
    batcher = open_batcher()
    assert await batcher.compute([]) == []
    assert batcher.counters.n_passes == 0


# What goes into a pass


async def test_pass_closes_at_the_token_budget(backend: FakeBackend, open_batcher: Callable[..., Batcher]) -> None:
    """Of texts of 10 tokens six go into a budget of 64."""
    batcher = open_batcher(token_budget=64)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10] * 30))
    await task
    assert passes_after_blockers(backend) == [[10] * 6] * 5


async def test_pass_is_made_of_texts_that_fill_whole_tiles(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Of 64 texts of 6 to 10 tokens in one group all passes but the last are three whole tiles."""
    batcher = open_batcher(token_budget=3 * TILE)
    lengths = np.random.default_rng(3).integers(6, 11, 64).tolist()
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs(lengths))
    await task
    *passes, last = passes_after_blockers(backend)
    assert sorted(chain(last, *passes)) == sorted(lengths)
    assert passes
    for lengths_of_pass in passes:
        borders = [end for end in np.cumsum(lengths_of_pass) if end % TILE == 0]
        assert borders == [TILE, 2 * TILE, 3 * TILE]


async def test_texts_of_many_callers_are_ordered_by_tiles(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Two of 40 and two of 24 tokens lie side by side, in whatever order they came; each gets its own vector."""
    batcher = open_batcher(token_budget=192)
    jobs = make_jobs([24, 24, 40, 40])
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, *([job] for job in jobs))
    for job, outcomes in zip(jobs, await asyncio.gather(*tasks), strict=True):
        assert_same_as_alone([job], outcomes)
    assert passes_after_blockers(backend) == [[40, 24, 40, 24]]


async def test_pass_closes_at_the_sequence_limit_of_the_context(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """The fake context takes 64 texts a pass, however much of the budget is left."""
    batcher = open_batcher(token_budget=512)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([1] * 200))
    await task
    assert [len(lengths) for lengths in passes_after_blockers(backend)] == [64, 64, 64, 8]


async def test_pass_closes_when_nothing_more_waits(backend: FakeBackend, open_batcher: Callable[..., Batcher]) -> None:
    """Three short texts of three callers make one pass, far below the budget."""
    batcher = open_batcher(token_budget=512)
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, *([job] for job in make_jobs([5, 6, 7])))
    await asyncio.gather(*tasks)
    assert [sorted(lengths) for lengths in passes_after_blockers(backend)] == [[5, 6, 7]]


async def test_text_longer_than_the_budget_is_computed_alone(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """The budget is for company: a text up to the context's size is computed, and nothing is put beside it."""
    batcher = open_batcher(token_budget=64)
    jobs = make_jobs([10, 500, 512, 20])
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, jobs)
    assert_same_as_alone(jobs, await task)
    assert passes_after_blockers(backend) == [[512], [500], [20, 10]]


async def test_idle_engine_does_not_wait_for_company(open_batcher: Callable[..., Batcher]) -> None:
    """A lone text is taken at once; the best of 20 tries shows that there is no fixed delay."""
    batcher = open_batcher()
    outcomes = [(await batcher.compute(make_jobs([10])))[0] for _ in range(20)]
    assert min(outcome.queue_seconds for outcome in outcomes if isinstance(outcome, JobResult)) < 0.004


@given(
    groups=st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=25), min_size=1, max_size=12),
    budget=st.integers(1, 200),
)
@settings(max_examples=40, deadline=None)
def test_every_text_is_computed_once_and_no_pass_is_over_its_bounds(groups: list[list[int]], budget: int) -> None:
    """Whatever is handed in: passes of several texts keep to the budget, and lengths in equal lengths out."""
    backend = FakeBackend(n_dims=2)
    batcher = make_batcher(load_model(backend).open_context, token_budget=budget)

    async def run() -> None:
        async with closed_gate(backend, batcher):
            tasks = await hand_in(batcher, *(make_jobs(lengths) for lengths in groups))
        await asyncio.gather(*tasks)

    asyncio.run(run())
    batcher.stop(timeout_seconds=5.0)
    passes = backend.passes[1:]
    assert all(sum(lengths) <= budget or len(lengths) == 1 for lengths in passes)
    assert sorted(chain.from_iterable(passes)) == sorted(chain.from_iterable(groups))


# Whose turn it is


async def test_single_text_behind_a_long_document_is_in_the_next_pass(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Twenty callers of one text each, behind 2,000 texts of another, are all served in the pass that comes next."""
    batcher = open_batcher(token_budget=256)
    async with closed_gate(backend, batcher):
        document, *singles = await hand_in(batcher, make_jobs([10] * 2000), *[make_jobs([7])] * 20)
    await asyncio.gather(document, *singles)
    assert passes_after_blockers(backend)[0].count(7) == 20


async def test_single_text_is_answered_while_the_document_still_waits(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """The answer goes out after its own pass, not after its neighbours' last."""
    batcher = open_batcher(token_budget=256)
    backend.seconds_per_pass = 0.002
    async with closed_gate(backend, batcher):
        document, single = await hand_in(batcher, make_jobs([10] * 2000), make_jobs([7]))
    await single
    assert not document.done()
    assert batcher.n_queued_texts > 1000
    await document


async def test_large_groups_are_served_in_turn_a_pass_each(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Two long groups alternate, so neither waits for the other's end; what is left of one joins a pass at once."""
    batcher = open_batcher(token_budget=60)
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, make_jobs([10] * 13), make_jobs([9] * 13))
    await asyncio.gather(*tasks)
    passes = passes_after_blockers(backend)
    assert passes[:4] == [[10] * 6, [9] * 6, [10] * 6, [10, 9, 9, 9, 9, 9]]


async def test_large_group_is_not_starved_by_ever_new_small_ones(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """A text for which small ones leave no room begins the next pass."""
    batcher = open_batcher(token_budget=64)
    small = [make_jobs([12])] * 100
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, *small, make_jobs([50]))
    await asyncio.gather(*tasks)
    assert passes_after_blockers(backend)[:2] == [[12] * 4, [50, 12]]


async def test_group_passed_over_comes_first_in_the_next_pass(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """A text of 50 tokens does not fit behind one of 30 in a budget of 64; it opens the next pass."""
    batcher = open_batcher(token_budget=64)
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, make_jobs([30] * 40), make_jobs([50]))
    await asyncio.gather(*tasks)
    assert passes_after_blockers(backend)[:2] == [[30, 30], [50]]


async def test_long_text_is_not_starved_by_ever_new_short_ones(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Among 300 callers whose short texts fill every pass, the long one has its pass after those before it."""
    batcher = open_batcher(token_budget=64)
    short = [make_jobs([20])] * 150
    async with closed_gate(backend, batcher):
        tasks = await hand_in(batcher, *short[:6], make_jobs([60]), *short)
    await asyncio.gather(*tasks)
    # Three short ones fill a pass: two passes for the six in front, then the long one.
    assert passes_after_blockers(backend)[2] == [60]


async def test_lone_text_gets_all_threads_and_loaded_workers_one_each(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """The first text finds the engine idle; those that queue behind it are computed on one thread a pass."""
    batcher = open_batcher(token_budget=64)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10] * 30))
    await task
    assert backend.threads_of_passes == [N_THREADS_FOR_LONE_TEXT, 1, 1, 1, 1, 1]


async def test_lone_text_beside_a_busy_worker_gets_one_thread(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """All cores are for a text that has the engine to itself."""
    batcher = open_batcher(n_workers=2)
    async with closed_gate(backend, batcher, n_workers=2):
        pass
    assert sorted(backend.threads_of_passes) == [1, N_THREADS_FOR_LONE_TEXT]


async def test_texts_on_an_idle_engine_are_shared_among_the_workers(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Eight texts that one pass could hold are computed as two of four, side by side."""
    batcher = open_batcher(n_workers=2, token_budget=512)
    backend.gate.clear()
    [task] = await hand_in(batcher, make_jobs([10] * 8))
    await wait_until(lambda: batcher.n_queued_texts == 0)
    backend.gate.set()
    await task
    assert backend.passes == [[10] * 4] * 2


@pytest.mark.parametrize(("n_large", "n_taken"), [(0, 4), (1, 10)])
async def test_worker_leaves_others_callers_to_the_next_pass(
    open_batcher: Callable[..., Batcher], n_large: int, n_taken: int
) -> None:
    """Of twelve callers, four in each worker's pass, and four that the first to end finds waiting.

    Not where a large group is there for it anyway: then all of them go first.
    """
    gates: list[threading.Event] = []
    passes: list[int] = []

    def open_gated() -> Context:
        gates.append(gate := threading.Event())

        def compute(sequences: Sequence[np.ndarray]) -> np.ndarray:
            passes.append(len(sequences))
            gate.wait()
            return np.ones((sum(map(len, sequences)), 8), np.float32)

        return FunctionContext(compute)

    batcher = open_batcher(open_gated, n_workers=2, token_budget=512)
    blockers = await hand_in(batcher, *([job] for job in make_jobs([BLOCKER_LENGTH] * 2)))
    await wait_until(lambda: len(passes) == 2)
    tasks = await hand_in(batcher, *([job] for job in make_jobs([10] * 10)), *[make_jobs([300, 300])] * n_large)
    gates[0].set()
    await wait_until(lambda: sum(passes) == 12 + 2 * n_large)
    assert passes[2] in (n_taken, n_taken + n_large)
    gates[1].set()
    await asyncio.gather(*blockers, *tasks)


@pytest.mark.parametrize(("n_workers", "limit"), [(1, 1), (2, 1), (2, 3), (3, 5)])
async def test_no_more_texts_are_in_flight_than_allowed(
    open_batcher: Callable[..., Batcher], n_workers: int, limit: int
) -> None:
    """Counted over all workers, while 60 texts are computed."""
    meter = FlightMeter()
    batcher = open_batcher(
        lambda: FunctionContext(meter.compute), n_workers=n_workers, token_budget=512, max_texts_in_flight=limit
    )
    async with asyncio.timeout(10):
        outcomes = await batcher.compute(make_jobs([4] * 60))
    assert all(isinstance(outcome, JobResult) for outcome in outcomes)
    assert meter.most == limit


# When something fails


async def test_failed_pass_answers_every_item_and_the_loop_goes_on(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """A pass of several fails; each text alone succeeds, and so does the next call."""
    batcher = open_batcher()
    backend.fail_when_more_than = 1
    jobs = make_jobs([10] * 12)
    assert_same_as_alone(jobs, await batcher.compute(jobs))
    backend.fail_when_more_than = None
    assert_same_as_alone(jobs, await batcher.compute(jobs))
    assert batcher.counters.n_failed_texts == 0


async def test_text_that_fails_does_not_fail_its_neighbours(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """One bad text in a pass of six gets its own error, the other five their vectors."""
    batcher = open_batcher()
    backend.failing_token = 257
    jobs = make_jobs([10] * 6)
    jobs[2] = Job(np.full(10, 257, np.int32))
    outcomes = await batcher.compute(jobs)
    assert isinstance(outcomes.pop(2), InferenceFailed)
    assert_same_as_alone(jobs[:2] + jobs[3:], outcomes)
    assert batcher.counters.n_failed_texts == 1


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 0.0])
async def test_vector_that_is_not_usable_is_an_error_of_its_text_alone(
    open_batcher: Callable[..., Batcher], spoiled: float
) -> None:
    """Not finite or all zeros: refused before anybody keeps it."""

    def compute(sequences: Sequence[np.ndarray]) -> np.ndarray:
        rows = np.ones((sum(map(len, sequences)), 3), np.float32)
        rows[np.concatenate(sequences) == 9] = spoiled
        return rows

    batcher = open_batcher(lambda: FunctionContext(compute))
    outcomes = await batcher.compute([Job(np.full(4, token, np.int32)) for token in (1, 9, 2)])
    assert [type(outcome) for outcome in outcomes] == [JobResult, InferenceFailed, JobResult]


async def test_wrong_number_of_rows_is_an_error_not_a_mix_up(open_batcher: Callable[..., Batcher]) -> None:
    """Rows that cannot be told apart are given to nobody."""
    batcher = open_batcher(lambda: FunctionContext(lambda sequences: np.ones((1, 3), np.float32)))
    assert [type(outcome) for outcome in await batcher.compute(make_jobs([4, 4]))] == [InferenceFailed] * 2


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_worker_that_dies_leaves_nobody_waiting(n_workers: int) -> None:
    """Those in its pass, those behind it and those who come later all get an error."""
    gate = threading.Event()

    def compute(sequences: Sequence[np.ndarray]) -> np.ndarray:
        gate.wait(5)
        raise MemoryError

    batcher = make_batcher(lambda: FunctionContext(compute), n_workers=n_workers, token_budget=30)
    tasks = await hand_in(batcher, make_jobs([10] * 20), make_jobs([10]))
    gate.set()
    async with asyncio.timeout(2):
        answers = await asyncio.gather(*tasks)
    assert [type(outcome) for answer in answers for outcome in answer] == [InferenceFailed] * 21
    assert batcher.failure is not None
    with pytest.raises(InferenceFailed, match="has stopped"):
        await batcher.compute(make_jobs([10]))
    with in_time():
        await asyncio.to_thread(batcher.stop, timeout_seconds=1.0)


def test_context_that_cannot_be_opened_gives_the_others_back(backend: FakeBackend) -> None:
    """The model is freed next, and no context may outlive it."""
    model = load_model(backend)

    def open_context() -> Context:
        if backend.n_open_contexts == 2:
            raise ModelUnusable("no memory for a third")
        return model.open_context()

    with pytest.raises(ModelUnusable):
        make_batcher(open_context, n_workers=3)
    assert backend.n_open_contexts == 0


# Those who leave, those who come too late


async def test_texts_of_callers_who_left_are_not_computed(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """A cancelled caller's waiting texts are skipped, counted, and hold up nobody."""
    batcher = open_batcher()
    staying = make_jobs([12] * 3)
    async with closed_gate(backend, batcher):
        leaver, stayer = await hand_in(batcher, make_jobs([10] * 50), staying)
        leaver.cancel()
        await wait_until(leaver.done)
        assert (batcher.n_queued_texts, batcher.n_queued_tokens) == (3, 36)
    assert_same_as_alone(staying, await stayer)
    assert passes_after_blockers(backend) == [[12] * 3]
    assert batcher.counters.n_skipped_texts == 50


async def test_caller_who_leaves_during_a_pass_harms_nobody(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """Its pass is finished, its result dropped, and the worker goes on."""
    batcher = open_batcher()
    backend.gate.clear()
    [leaver] = await hand_in(batcher, make_jobs([10]))
    await wait_until(lambda: batcher.n_queued_texts == 0)
    leaver.cancel()
    await wait_until(leaver.done)
    backend.gate.set()
    jobs = make_jobs([11])
    assert_same_as_alone(jobs, await batcher.compute(jobs))


async def test_full_queue_refuses_at_once_with_the_measured_time_to_wait(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """The time is what waits over the rate of the passes before: at most 100 tokens in 20 ms here."""
    backend.seconds_per_pass = 0.02
    batcher = open_batcher(token_budget=100, max_queued_tokens=20_000)
    await batcher.compute(make_jobs([10] * 40))
    assert 0 < batcher.tokens_per_second <= 5000
    backend.seconds_per_pass = 0.0
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10] * 2000))
        expected = batcher.n_queued_tokens / batcher.tokens_per_second
        with pytest.raises(Overloaded, match="2000 texts") as refusal:
            await batcher.compute(make_jobs([10]))
    assert expected >= 4
    assert refusal.value.retry_after_seconds == pytest.approx(expected)
    assert len(await task) == 2000


async def test_time_to_wait_is_bounded(backend: FakeBackend, open_batcher: Callable[..., Batcher]) -> None:
    """Before anything was measured, the least is said: one second."""
    batcher = open_batcher(max_queued_tokens=10)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10]))
        with pytest.raises(Overloaded) as refusal:
            await batcher.compute(make_jobs([10]))
    await task
    assert refusal.value.retry_after_seconds == 1.0


async def test_queue_that_was_full_takes_texts_again(
    backend: FakeBackend, open_batcher: Callable[..., Batcher]
) -> None:
    """A refusal leaves nothing behind."""
    batcher = open_batcher(max_queued_tokens=10)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10]))
        with pytest.raises(Overloaded):
            await batcher.compute(make_jobs([10]))
    await task
    assert (batcher.n_queued_texts, batcher.n_queued_tokens) == (0, 0)
    assert_same_as_alone(make_jobs([10]), await batcher.compute(make_jobs([10])))


async def test_counters_say_what_was_done(backend: FakeBackend, open_batcher: Callable[..., Batcher]) -> None:
    """Passes, texts and tokens are those of the backend; times are not negative."""
    batcher = open_batcher()
    lengths = [10, 20, 30, 40, 50]
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs(lengths))
    await task
    counters = batcher.counters
    assert counters.n_passes == len(backend.passes)
    assert (counters.n_texts, counters.n_tokens) == (6, sum(lengths) + BLOCKER_LENGTH)
    assert (counters.n_failed_texts, counters.n_skipped_texts) == (0, 0)
    assert counters.queue_seconds > 0
    assert counters.compute_seconds > 0
    assert batcher.tokens_per_second > 0


# The end


async def test_stop_finishes_what_waits_and_refuses_what_comes(backend: FakeBackend) -> None:
    """Texts queued before the stop get their vectors, later ones ShuttingDown; contexts are given back."""
    batcher = make_batcher(load_model(backend).open_context, n_workers=2)
    jobs = make_jobs([10] * 40)
    async with closed_gate(backend, batcher, n_workers=2):
        [task] = await hand_in(batcher, jobs)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop, timeout_seconds=5.0))
        await asyncio.sleep(0.05)  # the stop has begun before the workers may go on
    await stopping
    assert_same_as_alone(jobs, await task)
    with pytest.raises(ShuttingDown):
        await batcher.compute(jobs)
    assert backend.n_open_contexts == 0


async def test_stop_answers_what_it_cannot_finish_in_time(backend: FakeBackend) -> None:
    """After the time limit the waiting get ShuttingDown; the pass under way is finished all the same."""
    batcher = make_batcher(load_model(backend).open_context)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10] * 40))
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop, timeout_seconds=0.05))
        outcomes = await task
        assert [type(outcome) for outcome in outcomes] == [ShuttingDown] * 40
    await stopping
    assert backend.passes == [[BLOCKER_LENGTH]]
    assert backend.n_open_contexts == 0


@pytest.mark.parametrize("timeout_seconds", [0.05, 2.0])
async def test_stop_ends_workers_that_wait_for_their_turn(backend: FakeBackend, timeout_seconds: float) -> None:
    """With one text in flight at most, the second worker waits beside a queue that is not empty, and still ends."""
    batcher = make_batcher(load_model(backend).open_context, n_workers=2, max_texts_in_flight=1)
    async with closed_gate(backend, batcher):
        [task] = await hand_in(batcher, make_jobs([10] * 4))
        stopping = threading.Thread(target=batcher.stop, kwargs={"timeout_seconds": timeout_seconds}, daemon=True)
        stopping.start()
        await asyncio.sleep(0.15)
    await task
    await asyncio.to_thread(stopping.join, timeout_seconds + 1.5)
    assert not stopping.is_alive()


@contextmanager
def in_time(seconds: float = 5.0) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


class FunctionContext:
    """A context that computes by a function of the sequences."""

    max_tokens = 512
    max_sequences = 64

    def __init__(self, function: Callable[[Sequence[np.ndarray]], np.ndarray]) -> None:
        self._function = function

    def compute(self, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
        return self._function(sequences)

    def close(self) -> None:
        """Nothing is held."""


class FlightMeter:
    """Counts the texts being computed at the same time."""

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def compute(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        with self._lock:
            self._now += len(sequences)
            self.most = max(self.most, self._now)
        time.sleep(0.001)
        with self._lock:
            self._now -= len(sequences)
        return np.ones((sum(map(len, sequences)), 2), np.float32)
