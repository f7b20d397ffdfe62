"""What many ask for at the same time is worked out once.

The first caller's work runs in a task of its own: the others wait for the same task, and it goes on as long as
anybody waits. Work that nobody waits for any more is cancelled, unless it has said that it is past that point.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Flight(Generic[K, V]):
    """Work under way for some keys."""

    def __init__(self, keys: Sequence[K]) -> None:
        self.keys = list(keys)
        self.n_waiters = 0
        self.is_final = False
        self.task: asyncio.Task[dict[K, V]]

    def make_final(self) -> None:
        """From here on the work is finished even if nobody waits: it is being written down."""
        self.is_final = True


class SingleFlight(Generic[K, V]):
    """Flights by key. Used on one event loop."""

    def __init__(self) -> None:
        # Work that may be joined, and all work, that which may not be joined any more included.
        self._flights: dict[K, Flight[K, V]] = {}
        self._under_way: set[Flight[K, V]] = set()

    async def run(self, keys: Sequence[K], work: Callable[[Flight[K, V]], Awaitable[dict[K, V]]]) -> dict[K, V]:
        """Results for all keys: joins what is under way, starts `work` for the rest. Raises what the work raises."""
        joined = {flight for key in keys if (flight := self._flights.get(key)) is not None}
        own = [key for key in keys if key not in self._flights]
        if own:
            joined.add(self._start(own, work))
        for flight in joined:
            flight.n_waiters += 1
        results: dict[K, V] = {}
        try:
            for flight in joined:
                results.update(await asyncio.shield(flight.task))
        finally:
            for flight in joined:
                self._leave(flight)
        return {key: results[key] for key in keys}

    def _start(self, keys: list[K], work: Callable[[Flight[K, V]], Awaitable[dict[K, V]]]) -> Flight[K, V]:
        flight: Flight[K, V] = Flight(keys)
        self._flights.update(dict.fromkeys(keys, flight))
        self._under_way.add(flight)

        async def fly() -> dict[K, V]:
            try:
                return await work(flight)
            finally:
                self._forget(flight)
                self._under_way.discard(flight)

        flight.task = asyncio.create_task(fly())
        # Waiters that left do not collect the exception; it is theirs to see, not the loop's to complain of.
        flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return flight

    def _forget(self, flight: Flight[K, V]) -> None:
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def detach(self) -> None:
        """Let all work under way go on for those who wait for it; whoever comes from now on starts anew."""
        self._flights.clear()

    def _leave(self, flight: Flight[K, V]) -> None:
        flight.n_waiters -= 1
        if flight.n_waiters == 0 and not flight.is_final and not flight.task.done():
            self._forget(flight)
            self._under_way.discard(flight)
            flight.task.cancel()

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait for all work under way; after the time limit, cancel what is not being written down already.

        Called when no caller is left: what is cancelled has nobody waiting for it.
        """
        flights = set(self._under_way)
        if not flights:
            return
        await asyncio.wait([flight.task for flight in flights], timeout=timeout_seconds)
        for flight in flights:
            if not flight.is_final:
                flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)
