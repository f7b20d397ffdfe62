"""Progress: rates and times left from a clock that the test turns."""

from __future__ import annotations

import pytest

from llama_embeddings.services.progress import WINDOW_SECONDS, Progress


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_claimed_before_the_first_step() -> None:
    """No rate, no time left."""
    progress = Progress(Clock())
    assert (progress.n_done, progress.n_total) == (0, None)
    assert (progress.steps_per_second, progress.seconds_left) == (None, None)


def test_time_before_the_first_step_does_not_count() -> None:
    """Reading the file takes a minute, a hundred steps take ten seconds: ten steps a second."""
    clock = Clock()
    progress = Progress(clock)
    clock.now += 60
    progress.report(0, 400)
    clock.now += 10
    progress.report(100, 400)
    assert progress.steps_per_second == pytest.approx(10)
    assert progress.seconds_left == pytest.approx(30)


def test_time_left_is_unknown_without_a_total() -> None:
    """The rate is known all the same."""
    clock = Clock()
    progress = Progress(clock)
    clock.now += 2
    progress.report(10, None)
    assert progress.steps_per_second == pytest.approx(5)
    assert progress.seconds_left is None


def test_rate_is_that_of_the_last_half_minute() -> None:
    """A thousand steps found in the store at the beginning are no measure for those that are computed."""
    clock = Clock()
    progress = Progress(clock)
    progress.report(0, 2000)
    clock.now += 1
    progress.report(1000, 2000)
    for number in range(1, 101):
        clock.now += 1
        progress.report(1000 + 2 * number, 2000)
    assert WINDOW_SECONDS < 100
    assert progress.steps_per_second == pytest.approx(2)
    assert progress.seconds_left == pytest.approx(400)
