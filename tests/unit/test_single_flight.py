"""Work shared by those who ask for it at the same time: once, for all, and no longer than somebody waits."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llama_embeddings.services.single_flight import Flight, SingleFlight

StringFlight = Flight[str, str]
Work = Callable[[StringFlight], Awaitable[dict[str, str]]]


class Kitchen:
    """Work that waits for a gate and remembers what it was asked for."""

    def __init__(self) -> None:
        self.orders: list[list[str]] = []
        self.n_cancelled = 0
        self.n_served = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.is_final = False

    async def cook(self, flight: StringFlight) -> dict[str, str]:
        self.orders.append(flight.keys)
        if self.is_final:
            flight.make_final()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        self.n_served += 1
        return {key: key.upper() for key in flight.keys}


@pytest.fixture
def flights() -> SingleFlight[str, str]:
    return SingleFlight()


@pytest.fixture
def kitchen() -> Kitchen:
    return Kitchen()


async def start(flights: SingleFlight[str, str], work: Work, *keys: str) -> asyncio.Task[dict[str, str]]:
    task = asyncio.create_task(flights.run(keys, work))
    await let_others_run()
    return task


async def let_others_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# Once for all


async def test_same_key_asked_for_by_many_is_worked_out_once(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """A hundred callers, one piece of work, one answer each."""
    tasks = [await start(flights, kitchen.cook, "a") for _ in range(100)]
    kitchen.gate.set()
    assert await asyncio.gather(*tasks) == [{"a": "A"}] * 100
    assert kitchen.orders == [["a"]]


async def test_only_keys_that_nobody_works_on_are_started(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """Overlapping requests share what overlaps and get all they asked for, in their own order."""
    first = await start(flights, kitchen.cook, "a", "b")
    second = await start(flights, kitchen.cook, "c", "b", "d")
    third = await start(flights, kitchen.cook, "d", "a")
    kitchen.gate.set()
    assert await first == {"a": "A", "b": "B"}
    assert list((await second).items()) == [("c", "C"), ("b", "B"), ("d", "D")]
    assert list((await third).items()) == [("d", "D"), ("a", "A")]
    assert kitchen.orders == [["a", "b"], ["c", "d"]]


async def test_finished_work_is_forgotten(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """Remembering is for others: the next request works anew."""
    kitchen.gate.set()
    await flights.run(["a"], kitchen.cook)
    await flights.run(["a"], kitchen.cook)
    assert kitchen.orders == [["a"], ["a"]]


async def test_different_keys_are_worked_out_side_by_side(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """The one that has to wait holds up nobody else."""
    slow = await start(flights, kitchen.cook, "a")
    other = Kitchen()
    other.gate.set()
    assert await flights.run(["b"], other.cook) == {"b": "B"}
    assert not slow.done()
    kitchen.gate.set()
    await slow


# Failures


async def test_failure_reaches_all_who_wait_and_is_not_remembered(
    flights: SingleFlight[str, str], kitchen: Kitchen
) -> None:
    """Each waiter sees it; the next request tries again."""
    tasks = [await start(flights, kitchen.cook, "a") for _ in range(5)]
    kitchen.error = ValueError("burnt")
    kitchen.gate.set()
    assert [str(outcome) for outcome in await asyncio.gather(*tasks, return_exceptions=True)] == ["burnt"] * 5
    kitchen.error = None
    assert await flights.run(["a"], kitchen.cook) == {"a": "A"}


async def test_failure_of_one_key_does_not_stop_the_work_for_others(
    flights: SingleFlight[str, str], kitchen: Kitchen
) -> None:
    """Who asked for both gets the error; who asked for the other alone gets it."""
    failing = Kitchen()
    failing.error = ValueError("burnt")
    bad = await start(flights, failing.cook, "a")
    good = await start(flights, kitchen.cook, "b")
    both = await start(flights, kitchen.cook, "a", "b")
    failing.gate.set()
    await let_others_run()
    kitchen.gate.set()
    assert await good == {"b": "B"}
    for task in (bad, both):
        with pytest.raises(ValueError, match="burnt"):
            await task


async def test_failure_that_nobody_waits_for_is_no_complaint_of_the_loop(
    flights: SingleFlight[str, str], kitchen: Kitchen
) -> None:
    """The error of final work whose caller left is not reported as never retrieved."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    kitchen.is_final = True
    kitchen.error = ValueError("burnt")
    task = await start(flights, kitchen.cook, "a")
    task.cancel()
    await let_others_run()
    kitchen.gate.set()
    await let_others_run()
    del task
    gc.collect()
    await let_others_run()
    assert complaints == []


# Those who leave


async def test_caller_who_leaves_does_not_stop_the_work_for_the_others(
    flights: SingleFlight[str, str], kitchen: Kitchen
) -> None:
    """Also when it is the one that started it."""
    first = await start(flights, kitchen.cook, "a")
    second = await start(flights, kitchen.cook, "a")
    first.cancel()
    await let_others_run()
    kitchen.gate.set()
    assert await second == {"a": "A"}
    assert first.cancelled()
    assert (kitchen.n_cancelled, kitchen.n_served) == (0, 1)


async def test_work_is_cancelled_when_the_last_caller_leaves(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """Nobody computes for nobody."""
    tasks = [await start(flights, kitchen.cook, "a", "b") for _ in range(3)]
    for task in tasks[:2]:
        task.cancel()
    await let_others_run()
    assert kitchen.n_cancelled == 0
    tasks[2].cancel()
    await let_others_run()
    assert kitchen.n_cancelled == 1


async def test_request_after_a_cancelled_one_starts_anew(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """It does not join work that is being cancelled."""
    first = await start(flights, kitchen.cook, "a")
    first.cancel()
    await asyncio.sleep(0)
    second = await start(flights, kitchen.cook, "a")
    kitchen.gate.set()
    assert await second == {"a": "A"}


async def test_final_work_is_finished_even_if_nobody_waits(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """What is being written down is not torn in two."""
    kitchen.is_final = True
    task = await start(flights, kitchen.cook, "a")
    task.cancel()
    await let_others_run()
    kitchen.gate.set()
    await let_others_run()
    assert (kitchen.n_cancelled, kitchen.n_served) == (0, 1)


# The end


async def test_drain_waits_for_work_under_way(flights: SingleFlight[str, str], kitchen: Kitchen) -> None:
    """Within the time limit everything is finished."""
    task = await start(flights, kitchen.cook, "a")
    asyncio.get_running_loop().call_later(0.02, kitchen.gate.set)
    await flights.drain(timeout_seconds=5.0)
    assert kitchen.n_served == 1
    assert await task == {"a": "A"}


async def test_drain_gives_up_what_takes_too_long_unless_it_is_final(
    flights: SingleFlight[str, str], kitchen: Kitchen
) -> None:
    """After the time limit the one is cancelled, the other still waited for."""
    final = Kitchen()
    final.is_final = True
    await start(flights, kitchen.cook, "a")
    await start(flights, final.cook, "b")
    asyncio.get_running_loop().call_later(0.06, final.gate.set)
    await flights.drain(timeout_seconds=0.02)
    assert (kitchen.n_cancelled, kitchen.n_served) == (1, 0)
    assert (final.n_cancelled, final.n_served) == (0, 1)


async def test_drain_of_nothing_is_done_at_once(flights: SingleFlight[str, str]) -> None:
    """And again after work has ended."""
    await flights.drain(timeout_seconds=5.0)
