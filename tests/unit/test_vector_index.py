"""The vector index against brute force in NumPy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llama_embeddings.vectors.index import VectorIndex, VectorIndexes

N_DIMS = 8
# Ids as a database gives them out: beyond 32 bits as well.
IDS = st.one_of(st.integers(1, 40), st.integers(2**33, 2**33 + 5))


def make_vectors(row_ids: list[int], *, salt: int = 0) -> np.ndarray:
    """A unit vector for each id, always the same one: float32 (n, N_DIMS)."""
    rows = [np.random.default_rng((salt, row_id)).standard_normal(N_DIMS) for row_id in row_ids]
    vectors = np.array(rows, dtype=np.float32).reshape(len(rows), N_DIMS)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search_by_brute_force(held: dict[int, np.ndarray], query: np.ndarray, count: int) -> list[tuple[int, float]]:
    cosines = {row_id: float(vector.astype(np.float64) @ query) for row_id, vector in held.items()}
    return sorted(cosines.items(), key=lambda item: -item[1])[:count]


class IndexMachine(RuleBasedStateMachine):
    """Any sequence of adding and removing; after each step the index finds what NumPy finds."""

    def __init__(self) -> None:
        super().__init__()
        self.index = VectorIndex(N_DIMS)
        self.held: dict[int, np.ndarray] = {}

    @rule(row_ids=st.lists(IDS, max_size=12), salt=st.integers(0, 3))
    def add(self, row_ids: list[int], salt: int) -> None:
        """Ids may repeat, among themselves and with what is there: the first vector counts."""
        vectors = make_vectors(row_ids, salt=salt)
        self.index.add(np.array(row_ids, np.int64), vectors)
        for row_id, vector in zip(row_ids, vectors, strict=True):
            self.held.setdefault(row_id, vector)

    @rule(row_ids=st.lists(IDS, max_size=12))
    def remove(self, row_ids: list[int]) -> None:
        present = set(row_ids) & set(self.held)
        self.index.remove(np.array(row_ids, np.int64))
        for row_id in present:
            del self.held[row_id]

    @rule(seed=st.integers(0, 1000), count=st.integers(0, 60))
    def search(self, seed: int, count: int) -> None:
        [query] = make_vectors([seed], salt=99)
        row_ids, scores = self.index.search(query, count)
        expected = search_by_brute_force(self.held, query, count)
        assert (row_ids.dtype, scores.dtype) == (np.int64, np.float32)
        assert row_ids.tolist() == [row_id for row_id, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-5)

    @invariant()
    def holds_as_many_as_the_model(self) -> None:
        assert len(self.index) == len(self.held)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_nearest_of_many_are_those_of_brute_force() -> None:
    """2,000 vectors, the ten nearest of 50 queries."""
    held = make_vectors(list(range(2000)))
    index = VectorIndex(N_DIMS)
    index.add(np.arange(2000, dtype=np.int64) + 7, held)
    for query in make_vectors(list(range(50)), salt=1):
        row_ids, scores = index.search(query, 10)
        cosines = held @ query
        np.testing.assert_allclose(scores, np.sort(cosines)[::-1][:10], atol=1e-6)
        np.testing.assert_allclose(cosines[row_ids - 7], scores, atol=1e-6)


def test_vector_added_twice_is_found_once_as_it_was_first() -> None:
    """A row never changes; what comes again under its id is left alone."""
    index = VectorIndex(2)
    index.add(np.array([5, 5]), np.array([[1, 0], [0, 1]], np.float32))
    index.add(np.array([5]), np.array([[0, 1]], np.float32))
    row_ids, scores = index.search(np.array([1, 0], np.float32), 10)
    assert (row_ids.tolist(), scores.tolist()) == ([5], [1.0])


def test_removing_says_how_many_were_there() -> None:
    """Unknown ids are no error, and an id can come again after it was removed."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1, 2, 3]), make_vectors([1, 2, 3]))
    assert index.remove(np.array([2, 3, 99])) == 2
    assert index.remove(np.array([2])) == 0
    assert index.remove(np.array([], np.int64)) == 0
    index.add(np.array([2]), make_vectors([2]))
    assert sorted(index.search(make_vectors([1])[0], 10)[0].tolist()) == [1, 2]


@pytest.mark.parametrize("count", [-1, 0])
def test_nothing_wanted_is_nothing_found(count: int) -> None:
    """Empty arrays of the right types, in an empty index, too."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1]), make_vectors([1]))
    for row_ids, scores in (index.search(make_vectors([1])[0], count), VectorIndex(N_DIMS).search(np.ones(N_DIMS), 5)):
        assert (row_ids.dtype, scores.dtype, len(row_ids), len(scores)) == (np.int64, np.float32, 0, 0)


def test_adding_removing_and_searching_from_threads_lose_nothing() -> None:
    """Four threads add, one removes, two search all the while; what remains is what was meant to."""
    index = VectorIndex(N_DIMS)
    done = threading.Event()

    def add(start: int) -> None:
        for first in range(start, start + 400, 20):
            row_ids = list(range(first, first + 20))
            index.add(np.array(row_ids, np.int64), make_vectors(row_ids))

    def remove() -> None:
        left = set(range(0, 1600, 8))
        while left:
            left -= {row_id for row_id in left if index.remove(np.array([row_id]))}

    def search() -> None:
        while not done.is_set():
            row_ids, scores = index.search(make_vectors([0], salt=5)[0], 15)
            assert len(set(row_ids.tolist())) == len(row_ids)
            assert (np.diff(scores) <= 0).all()

    with ThreadPoolExecutor(7) as threads:
        searches = [threads.submit(search) for _ in range(2)]
        writes = [threads.submit(add, start) for start in range(0, 1600, 400)] + [threads.submit(remove)]
        wait(writes, timeout=20)
        done.set()
        for write in writes:
            write.result(0)
        for found in searches:
            found.result(20)
    row_ids, _ = index.search(make_vectors([0], salt=5)[0], 5000)
    assert sorted(row_ids.tolist()) == [row_id for row_id in range(1600) if row_id % 8]


def test_vectors_of_different_models_and_recipes_never_meet() -> None:
    """One index each; the widths may differ."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([1]), np.array([[1, 0]], np.float32))
    indexes.add("m", "s", np.array([2]), np.array([[1, 0]], np.float32))
    indexes.add("n", "r", np.array([3]), np.array([[1, 0, 0]], np.float32))
    assert indexes.search("m", "r", np.array([1, 0], np.float32), 10)[0].tolist() == [1]
    assert indexes.search("n", "r", np.array([1, 0, 0], np.float32), 10)[0].tolist() == [3]
    assert indexes.remove("m", "r", np.array([1, 2, 3])) == 1
    assert indexes.sizes() == {("m", "r"): 0, ("m", "s"): 1, ("n", "r"): 1}


def test_unknown_family_holds_nothing() -> None:
    """Searching and removing before anything was added is not an error, and adding nothing makes no index."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([], np.int64), np.empty((0, 0), np.float32))
    row_ids, scores = indexes.search("m", "r", np.ones(3, np.float32), 4)
    assert (len(row_ids), len(scores), indexes.remove("m", "r", np.array([1])), indexes.sizes()) == (0, 0, 0, {})
