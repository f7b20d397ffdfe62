"""What the load generator counts."""

from __future__ import annotations

import pytest

from benchmarks.load import count_inside


def test_requests_count_by_their_share_of_the_measured_time() -> None:
    """Whole inside, half before, a quarter after, and not at all."""
    exchanges = [(10.0, 12.0), (8.0, 12.0), (19.0, 23.0), (1.0, 9.0), (21.0, 22.0)]
    assert count_inside(exchanges, 10.0, 20.0) == pytest.approx(1 + 0.5 + 0.25)


def test_count_does_not_depend_on_where_the_time_begins() -> None:
    """One client with requests of 4 s: 2.5 of them in 10 s, whichever 10 s."""
    exchanges = [(4.0 * number, 4.0 * number + 4.0) for number in range(20)]
    assert all(count_inside(exchanges, begin, begin + 10) == pytest.approx(2.5) for begin in (8.0, 9.3, 11.9))
