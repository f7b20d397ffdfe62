"""How far something is, how fast it goes, and how long it will take. Knows nothing of what it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# The rate is that of the last half minute: what was found in the store at the beginning must not count for long.
WINDOW_SECONDS = 30.0


class Progress:
    """Steps done and in all, fed by `report`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])
        self.n_done = 0
        self.n_total: int | None = None

    def report(self, n_done: int, n_total: int | None) -> None:
        """Note where it stands now; `n_total` is None as long as it is not known."""
        now = self._clock()
        if n_done == 0:
            # The time before the first step does not count: nothing could be done yet.
            self._samples.clear()
        self.n_done, self.n_total = n_done, n_total
        self._samples.append((now, n_done))
        while len(self._samples) > 2 and self._samples[0][0] < now - WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def steps_per_second(self) -> float | None:
        """None before there is anything to go by."""
        (first_time, first_done), (last_time, last_done) = self._samples[0], self._samples[-1]
        if last_done == first_done or last_time <= first_time:
            return None
        return (last_done - first_done) / (last_time - first_time)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None where that or the number of steps is not known."""
        rate = self.steps_per_second
        return None if rate is None or self.n_total is None else (self.n_total - self.n_done) / rate
