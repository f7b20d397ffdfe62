"""Which texts go together so that attention's tiles are whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_embeddings.inference.tiles import TILE, arrange, find_filling


def count_tiles(lengths: Sequence[int]) -> int:
    """Tiles in which some token may see another: what attention computes of the square of a pass."""
    seen: set[tuple[int, int]] = set()
    start = 0
    for length in lengths:
        tiles = range(start // TILE, (start + length - 1) // TILE + 1)
        seen.update((row, column) for row in tiles for column in tiles)
        start += length
    return len(seen)


def find_by_trying_all(first: int, candidates: Sequence[int], room: int, offset: int) -> int | None:
    """The fewest tokens, the first text's included, that end at a border."""
    subsets = chain.from_iterable(combinations(candidates, count) for count in range(len(candidates) + 1))
    totals = (first + sum(subset) for subset in subsets)
    return min((total for total in totals if total <= room and (offset + total) % TILE == 0), default=None)


@given(
    first=st.integers(1, 150),
    candidates=st.lists(st.integers(1, 100), max_size=9),
    spare=st.integers(0, 300),
    offset=st.integers(0, TILE - 1),
)
def test_filling_ends_at_the_nearest_border_that_any_choice_meets(
    first: int, candidates: list[int], spare: int, offset: int
) -> None:
    """Compared with trying all choices."""
    filling = find_filling(first, candidates, room=first + spare, offset=offset)
    expected = find_by_trying_all(first, candidates, first + spare, offset)
    if filling is None:
        assert expected is None
    else:
        assert len(set(filling)) == len(filling)
        assert first + sum(candidates[number] for number in filling) == expected


@pytest.mark.parametrize(
    ("first", "candidates", "filling"),
    [
        (64, [8], []),
        (40, [30, 24, 20], [1]),
        # The longer ones first, as they fit least elsewhere.
        (32, [32, 16, 16], [0]),
        # The next border, where the nearest cannot be met.
        (44, [42, 42], [1, 0]),
        (44, [42, 41], None),
    ],
)
def test_filling_of_some_texts(first: int, candidates: list[int], filling: list[int] | None) -> None:
    """Examples that can be checked in the head."""
    assert find_filling(first, candidates, room=500) == filling


@given(st.lists(st.integers(1, 200), max_size=64))
def test_arrangement_has_every_text_once(lengths: list[int]) -> None:
    """Whatever the lengths are."""
    assert sorted(arrange(lengths)) == list(range(len(lengths)))


@pytest.mark.parametrize("seed", range(20))
def test_arranged_texts_take_fewer_tiles(seed: int) -> None:
    """Texts of 6 to 10 tokens, as they come, lie across nearly every border; arranged, across the last at most."""
    lengths = np.random.default_rng(seed).integers(6, 11, 24).tolist()
    n_tiles = -(-sum(lengths) // TILE)
    arranged = count_tiles([lengths[position] for position in arrange(lengths)])
    assert arranged <= n_tiles + 2
    assert arranged <= count_tiles(sorted(lengths, reverse=True))


def test_texts_that_fill_no_tile_come_last() -> None:
    """In front, they would move all others across the borders."""
    lengths = [50, 32, 32]
    assert [lengths[position] for position in arrange(lengths)] == [32, 32, 50]
