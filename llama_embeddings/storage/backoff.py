"""How long to wait between attempts on a locked database. Knows no database: the caller says what is locked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

# Most locks are another process's commit, over in milliseconds: the first delay is this part of the base.
_FIRST_DELAY_DIVISOR = 64
# And no delay is longer than so many bases, so that a freed database is noticed soon.
_LONGEST_DELAY_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that double from base/64 up to 2 bases, each spread by ± jitter_factor.

    With the defaults: 16 ms, 31 ms, ... 1 s, 2 s, 2 s, 2 s, which is 8 s of patience.
    """

    max_retries: int = 10
    base_seconds: float = 1.0
    jitter_factor: float = 0.1

    def list_nominal_delays(self) -> list[float]:
        """The delays in seconds, without jitter."""
        first, longest = self.base_seconds / _FIRST_DELAY_DIVISOR, self.base_seconds * _LONGEST_DELAY_FACTOR
        # Past 2**7 the longest delay holds; the exponent is bounded so that no number of retries overflows.
        return [min(first * 2 ** min(attempt, 7), longest) for attempt in range(self.max_retries)]

    @property
    def patience_seconds(self) -> float:
        """For how long attempts go on."""
        return sum(self.list_nominal_delays())

    @property
    def retry_after_seconds(self) -> float:
        """What to tell a caller whose attempts are used up."""
        return max(1.0, self.base_seconds * _LONGEST_DELAY_FACTOR)

    def draw_delays(self) -> Iterator[float]:
        """The delays in seconds, with jitter, so that processes that met once do not meet again and again."""
        for delay in self.list_nominal_delays():
            yield delay * (1 + random.uniform(-self.jitter_factor, self.jitter_factor))  # noqa: S311 - not a secret


async def retry_while_locked(
    action: Callable[[], Awaitable[Result]],
    is_lock: Callable[[Exception], bool],
    backoff: Backoff,
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """Repeat `action` while it fails with a lock; its last error passes through, and so does every other at once."""
    for delay in backoff.draw_delays():
        try:
            return await action()
        except Exception as error:
            if not is_lock(error):
                raise
        on_retry()
        await asyncio.sleep(delay)
    return await action()
