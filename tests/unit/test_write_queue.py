"""The write queue: one answer for each write, in groups, and nothing that happens to a group ends the loop."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError

from llama_embeddings.errors import ShuttingDown, StoreBusy, StoreFull
from llama_embeddings.storage import full_text_follower
from llama_embeddings.storage.backoff import Backoff, retry_while_locked
from llama_embeddings.storage.engine import create_writer_engine, parse_database_url
from llama_embeddings.storage.write_queue import WriteQueue

QUICK_BACKOFF = Backoff(max_retries=4, base_seconds=0.02, jitter_factor=0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE numbers (number INTEGER UNIQUE NOT NULL)")
    return path


@pytest.fixture
async def engine(path: Path) -> AsyncIterator[Engine]:
    engine = create_writer_engine(parse_database_url(f"sqlite+aiosqlite:///{path}"))
    yield engine
    engine.dispose()


@pytest.fixture
async def queue(engine: Engine) -> AsyncIterator[WriteQueue]:
    queue = WriteQueue(engine, batch_size=5, backoff=QUICK_BACKOFF)
    queue.start()
    yield queue
    await queue.stop()


def insert_numbers(connection: Connection, numbers: Sequence[int | None]) -> list[int | None]:
    for number in numbers:
        connection.exec_driver_sql("INSERT INTO numbers VALUES (?)", (number,))
    return list(numbers)


def count_group(connection: Connection, payloads: Sequence[None]) -> list[int]:
    return [len(payloads)] * len(payloads)


def forget_an_answer(connection: Connection, payloads: Sequence[None]) -> list[None]:
    return [None] * (len(payloads) - 1)


def read_numbers(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM numbers ORDER BY rowid")]


async def test_answer_comes_after_the_commit(queue: WriteQueue, path: Path) -> None:
    """Another connection sees the row as soon as the writer's caller has its answer."""
    assert await queue.submit(insert_numbers, 7) == 7
    assert read_numbers(path) == [7]


async def test_waiting_writes_share_transactions_of_at_most_the_batch_size(queue: WriteQueue) -> None:
    """Twelve waiting writes make three groups of five, five and two."""
    sizes = await asyncio.gather(*(queue.submit(count_group, None) for _ in range(12)))
    assert sizes == [5] * 10 + [2] * 2
    assert (queue.counters.n_transactions, queue.counters.n_committed) == (3, 12)


async def test_results_return_in_order_to_those_who_asked(queue: WriteQueue, path: Path) -> None:
    """Writes are made in the order in which they were handed in, and each gets its own result."""
    numbers = list(range(100, 0, -1))
    assert await asyncio.gather(*(queue.submit(insert_numbers, number) for number in numbers)) == numbers
    assert read_numbers(path) == numbers


async def test_bad_write_fails_alone(queue: WriteQueue, path: Path) -> None:
    """Its neighbours in the group are committed, and the loop goes on."""
    answers = await asyncio.gather(
        *(queue.submit(insert_numbers, number) for number in (1, 2, None, 3)), return_exceptions=True
    )
    assert isinstance(answers[2], IntegrityError)
    assert [answers[0], answers[1], answers[3]] == [1, 2, 3]
    assert await queue.submit(insert_numbers, 4) == 4
    assert read_numbers(path) == [1, 2, 3, 4]


async def test_group_is_rolled_back_before_its_writes_are_repeated(queue: WriteQueue, path: Path) -> None:
    """A number written before the bad one is not there twice, though it was written twice."""
    await asyncio.gather(*(queue.submit(insert_numbers, number) for number in (1, None)), return_exceptions=True)
    assert read_numbers(path) == [1]


async def test_function_that_loses_an_answer_fails_and_commits_nothing(queue: WriteQueue) -> None:
    """Nobody is given another write's result."""
    with pytest.raises(RuntimeError, match="1 writes got 0 results"):
        await queue.submit(forget_an_answer, None)
    assert await queue.submit(count_group, None) == 1


async def test_write_of_a_cancelled_caller_happens(queue: WriteQueue, path: Path) -> None:
    """Others may rely on a write that they were told is under way."""
    caller = asyncio.create_task(queue.submit(insert_numbers, 1))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await queue.submit(insert_numbers, 2)
    assert read_numbers(path) == [1, 2]


async def test_short_lock_is_waited_out(queue: WriteQueue, path: Path) -> None:
    """A lock that is released within the retries costs time and nothing else."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        write = asyncio.create_task(queue.submit(insert_numbers, 1))
        await asyncio.sleep(0.15)
        assert not write.done()
        other.execute("ROLLBACK")
    assert await write == 1
    assert queue.counters.n_lock_retries > 0


async def test_lock_beyond_the_retries_answers_busy_and_the_loop_recovers(queue: WriteQueue, path: Path) -> None:
    """The writes of that time get StoreBusy with a time to come back; the next one succeeds by itself."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answers = await asyncio.gather(
            *(queue.submit(insert_numbers, number) for number in range(12)), return_exceptions=True
        )
        other.execute("ROLLBACK")
    assert all(isinstance(answer, StoreBusy) and answer.retry_after_seconds >= 1 for answer in answers)
    assert read_numbers(path) == []
    assert await queue.submit(insert_numbers, 1) == 1


async def test_those_behind_a_locked_group_do_not_wait_a_round_each(queue: WriteQueue, path: Path) -> None:
    """A hundred writes in groups of five are answered in the time of one group, not of twenty."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        await asyncio.gather(*(queue.submit(insert_numbers, n) for n in range(100)), return_exceptions=True)
        other.execute("ROLLBACK")
    assert queue.counters.n_lock_retries == QUICK_BACKOFF.max_retries


async def test_full_disk_answers_full_and_recovers_by_itself(queue: WriteQueue, engine: Engine) -> None:
    """When there is room again, the next write succeeds without a restart."""
    with engine.connect() as connection:
        [n_pages] = (connection.exec_driver_sql("PRAGMA page_count")).one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {n_pages}")
    numbers = range(100_000, 101_000)
    answers = await asyncio.gather(*(queue.submit(insert_numbers, n) for n in numbers), return_exceptions=True)
    assert any(isinstance(answer, StoreFull) for answer in answers)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert await queue.submit(insert_numbers, 1) == 1


async def test_full_queue_refuses_at_once(engine: Engine) -> None:
    """The bound holds even while nothing is taken out."""
    queue = WriteQueue(engine, max_waiting=3)
    queue.start()
    waiting = [asyncio.create_task(queue.submit(count_group, None)) for _ in range(3)]
    refused = asyncio.create_task(queue.submit(count_group, None))
    with pytest.raises(StoreBusy, match="3 writes are waiting"):
        await refused
    await asyncio.gather(*waiting)
    await queue.stop()


async def test_stop_commits_what_waits_and_refuses_what_comes(queue: WriteQueue, path: Path) -> None:
    """Shutdown loses nothing that was accepted."""
    accepted = [asyncio.create_task(queue.submit(insert_numbers, number)) for number in range(17)]
    await asyncio.sleep(0)
    await queue.stop()
    assert await asyncio.gather(*accepted) == list(range(17))
    assert read_numbers(path) == list(range(17))
    with pytest.raises(ShuttingDown):
        await queue.submit(insert_numbers, 99)


async def test_nobody_is_left_waiting_when_the_loop_is_torn_down(engine: Engine, path: Path) -> None:
    """Even if the writer's task is cancelled from outside, every write gets an answer."""
    queue = WriteQueue(engine, batch_size=2, backoff=Backoff(base_seconds=10))
    queue.start()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        writes = [asyncio.create_task(queue.submit(insert_numbers, number)) for number in range(5)]
        await asyncio.sleep(0.3)
        [writer] = [task for task in asyncio.all_tasks() if task.get_name() == "store-writer"]
        writer.cancel()
        answers = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(answer, ShuttingDown) for answer in answers)


async def test_log_of_a_failed_write_has_none_of_its_values(
    queue: WriteQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the log nor the error's message repeats what was to be stored."""
    await queue.submit(insert_numbers, 424_242)
    with caplog.at_level(logging.DEBUG, logger="llama_embeddings"), pytest.raises(IntegrityError) as caught:
        await queue.submit(insert_numbers, 424_242)
    assert "IntegrityError" in caplog.text
    assert "424242" not in caplog.text + str(caught.value)


def test_delays_double_up_to_twice_the_base() -> None:
    """16 ms first, at most 2 s, and more than 5 s of patience with the settings' defaults."""
    backoff = Backoff()
    delays = backoff.list_nominal_delays()
    assert delays == [2**n / 64 for n in range(8)] + [2.0, 2.0]
    assert 5 < backoff.patience_seconds < 10


def test_jitter_stays_within_its_factor() -> None:
    """Delays are spread, by at most the factor."""
    backoff = Backoff(max_retries=500, base_seconds=1, jitter_factor=0.1)
    pairs = zip(backoff.draw_delays(), backoff.list_nominal_delays(), strict=True)
    spread = [drawn / nominal for drawn, nominal in pairs]
    assert 0.9 <= min(spread) < 0.95
    assert 1.05 < max(spread) <= 1.1


async def test_other_errors_are_not_retried() -> None:
    """Only a lock goes away by waiting."""
    calls = []

    async def fail() -> None:
        calls.append(1)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        await retry_while_locked(fail, lambda error: False, QUICK_BACKOFF)
    assert len(calls) == 1


async def test_writer_outlives_a_mistake_of_its_own(
    queue: WriteQueue, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what fails outside of any write is answered and logged, and the next write has its turn."""

    async def fail(*_: object) -> None:
        raise ValueError("A mistake.")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "_process", fail)
        with pytest.raises(ValueError, match=r"A mistake\."):
            await queue.submit(insert_numbers, 1)
    assert await queue.submit(insert_numbers, 2) == 2
    assert (read_numbers(path), "Traceback" in caplog.text) == ([2], True)


@pytest.mark.parametrize("failure", [StoreBusy("Locked.", retry_after_seconds=1.0), KeyError("a mistake")])
async def test_follower_outlives_what_goes_wrong(
    failure: Exception, queue: WriteQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It tries again, and says of a mistake where it was made."""
    monkeypatch.setattr(full_text_follower, "PAUSE_SECONDS", 0.01)
    failures, is_up_to_date = [failure] * 2, asyncio.Event()

    async def read_newest_row_id() -> tuple[int, int]:
        if failures:
            raise failures.pop()
        is_up_to_date.set()
        return 0, 0

    follower = full_text_follower.FullTextFollower(queue, read_newest_row_id)
    follower.start()
    await asyncio.wait_for(is_up_to_date.wait(), 10)
    await follower.stop()
    assert caplog.text.count("could not follow") == 2
    assert ("Traceback" in caplog.text) == isinstance(failure, KeyError)
