"""The vector index against brute force in NumPy: exact, compressed, and on the way from one to the other."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_embeddings.vectors.calibration import MIN_CANDIDATES
from llama_embeddings.vectors.compressed import Cancelled, choose_n_lists
from llama_embeddings.vectors.index import Candidates, Step, VectorIndex, VectorIndexes, rank
from llama_embeddings.vectors.rebuilding import Rebuild

N_DIMS = 8
# Ids as a database gives them out: beyond 32 bits as well. No more of them than an index always ranks exactly.
IDS = st.one_of(st.integers(1, MIN_CANDIDATES - 6), st.integers(2**33, 2**33 + 5))

Held = dict[int, np.ndarray]


def make_vectors(row_ids: list[int], *, salt: int = 0) -> np.ndarray:
    """A unit vector for each id, always the same one: float32 (n, N_DIMS)."""
    rows = [np.random.default_rng((salt, row_id)).standard_normal(N_DIMS) for row_id in row_ids]
    vectors = np.array(rows, dtype=np.float32).reshape(len(rows), N_DIMS)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_clusters(n_rows: int, n_dims: int = 32, *, seed: int = 0) -> np.ndarray:
    """Unit vectors around some hundred centres, as those of texts: float32 (n_rows, n_dims)."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((100, n_dims))
    vectors = centres[generator.integers(0, 100, n_rows)] + 0.7 * generator.standard_normal((n_rows, n_dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def search_by_brute_force(
    held: Held, query: np.ndarray, count: int, allowed: np.ndarray | None = None
) -> list[tuple[int, float]]:
    cosines = {
        row_id: float(vector.astype(np.float64) @ query)
        for row_id, vector in held.items()
        if allowed is None or row_id in allowed
    }
    return sorted(cosines.items(), key=lambda item: -item[1])[: max(count, 0)]


def read(held: Held, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a database gives them: those that are gone are left out."""
    there = [row_id for row_id in row_ids.tolist() if row_id in held]
    vectors = np.stack([held[row_id] for row_id in there]) if there else np.empty((0, 0), np.float32)
    return np.array(there, np.int64), vectors


def rank_candidates(found: Candidates, held: Held, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What a caller makes of candidates: they are ranked by the vectors themselves."""
    if found.is_exact:
        return found.row_ids, found.scores
    return rank(query, *read(held, found.row_ids), count)


def train(rebuild: Rebuild, held: Held) -> None:
    rebuild.train(*read(held, rebuild.sample_ids))


def finish(index: VectorIndex, rebuild: Rebuild, held: Held, left: np.ndarray) -> None:
    """Add the rows that are left, calibrate, and put it in place."""
    rebuild.add(*read(held, left))
    rebuild.calibrate()
    while len(missing := index.adopt(rebuild)):
        rebuild.add(*read(held, missing))


def compress(index: VectorIndex, held: Held) -> None:
    rebuild = index.begin_rebuild()
    train(rebuild, held)
    finish(index, rebuild, held, rebuild.row_ids)


def hold(row_ids: np.ndarray, vectors: np.ndarray) -> Held:
    return dict(zip(row_ids.tolist(), vectors, strict=True))


class IndexMachine(RuleBasedStateMachine):
    """Any sequence of changes and upkeep; at each step the index finds what NumPy finds."""

    def __init__(self) -> None:
        super().__init__()
        self.index = VectorIndex(N_DIMS, flat_limit=4, merge_at=4)
        self.held: Held = {}
        self.rebuild: Rebuild | None = None
        self.n_added = 0

    @rule(row_ids=st.lists(IDS, max_size=12), salt=st.integers(0, 3))
    def add(self, row_ids: list[int], salt: int) -> None:
        """Ids may repeat, among themselves and with what is there: the first vector counts."""
        vectors = make_vectors(row_ids, salt=salt)
        self.index.add(np.array(row_ids, np.int64), vectors)
        for row_id, vector in zip(row_ids, vectors, strict=True):
            self.held.setdefault(row_id, vector)

    @rule(row_ids=st.lists(IDS, max_size=12))
    def remove(self, row_ids: list[int]) -> None:
        """As the service does: from the database first, then from the index."""
        present = set(row_ids) & set(self.held)
        for row_id in present:
            del self.held[row_id]
        assert self.index.remove(np.array(row_ids, np.int64)) == len(present)

    @rule(seed=st.integers(0, 1000), count=st.integers(0, 60), allowed=st.none() | st.sets(IDS))
    def search(self, seed: int, count: int, allowed: set[int] | None) -> None:
        [query] = make_vectors([seed], salt=99)
        wanted = None if allowed is None else np.array(sorted(allowed), np.int64)
        found = self.index.search(query, count, allowed=wanted)
        row_ids, scores = rank_candidates(found, self.held, query, count)
        expected = search_by_brute_force(self.held, query, count, wanted)
        assert (row_ids.dtype, scores.dtype) == (np.int64, np.float32)
        assert row_ids.tolist() == [row_id for row_id, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-5)

    @precondition(lambda self: self.rebuild is None and self.held)
    @rule(share=st.floats(0, 1))
    def begin_rebuild(self, share: float) -> None:
        """Other rules go on while it is under way."""
        self.rebuild = self.index.begin_rebuild()
        train(self.rebuild, self.held)
        self.n_added = int(share * len(self.rebuild.row_ids))
        self.rebuild.add(*read(self.held, self.rebuild.row_ids[: self.n_added]))

    @precondition(lambda self: self.rebuild is not None)
    @rule()
    def finish_rebuild(self) -> None:
        assert self.rebuild is not None
        finish(self.index, self.rebuild, self.held, self.rebuild.row_ids[self.n_added :])
        self.rebuild = None

    @precondition(lambda self: self.rebuild is not None)
    @rule()
    def abandon_rebuild(self) -> None:
        assert self.rebuild is not None
        self.index.abandon(self.rebuild)
        self.rebuild = None

    @rule(n_rows=st.integers(1, 10))
    def merge(self, n_rows: int) -> None:
        self.index.merge_some(n_rows)

    @precondition(lambda self: self.rebuild is None)
    @rule()
    def restart(self) -> None:
        """From what was frozen, and the rows that it lacks."""
        frozen = self.index.freeze()
        if frozen is not None:
            self.index = VectorIndex.thaw(frozen, flat_limit=4, merge_at=4)
        lacking = np.setdiff1d(np.array(list(self.held), np.int64), self.index.row_ids())
        self.index.add(*read(self.held, lacking))

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.index) == len(self.held)
        assert self.index.row_ids().tolist() == sorted(self.held)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_nearest_of_many_are_those_of_brute_force() -> None:
    """2,000 vectors, the ten nearest of 50 queries."""
    held = make_vectors(list(range(2000)))
    index = VectorIndex(N_DIMS)
    index.add(np.arange(2000, dtype=np.int64) + 7, held)
    for query in make_vectors(list(range(50)), salt=1):
        found = index.search(query, 10)
        row_ids, scores = found.row_ids, found.scores
        cosines = held @ query
        np.testing.assert_allclose(scores, np.sort(cosines)[::-1][:10], atol=1e-6)
        np.testing.assert_allclose(cosines[row_ids - 7], scores, atol=1e-6)


def test_vector_added_twice_is_found_once_as_it_was_first() -> None:
    """A row never changes; what comes again under its id is left alone."""
    index = VectorIndex(2)
    index.add(np.array([5, 5]), np.array([[1, 0], [0, 1]], np.float32))
    index.add(np.array([5]), np.array([[0, 1]], np.float32))
    found = index.search(np.array([1, 0], np.float32), 10)
    assert (found.row_ids.tolist(), found.scores.tolist()) == ([5], [1.0])


def test_removing_says_how_many_were_there() -> None:
    """Unknown ids are no error, and an id can come again after it was removed."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1, 2, 3]), make_vectors([1, 2, 3]))
    assert index.remove(np.array([2, 3, 99])) == 2
    assert index.remove(np.array([2])) == 0
    assert index.remove(np.array([], np.int64)) == 0
    index.add(np.array([2]), make_vectors([2]))
    assert sorted(index.search(make_vectors([1])[0], 10).row_ids.tolist()) == [1, 2]


@pytest.mark.parametrize("count", [-1, 0])
def test_nothing_wanted_is_nothing_found(count: int) -> None:
    """Empty arrays of the right types, in an empty index, too."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1]), make_vectors([1]))
    nothing_allowed = index.search(make_vectors([1])[0], 5, allowed=np.empty(0, np.int64))
    empty = VectorIndex(N_DIMS).search(np.ones(N_DIMS), 5)
    for found in (index.search(make_vectors([1])[0], count), empty, nothing_allowed):
        assert (found.row_ids.dtype, found.scores.dtype) == (np.int64, np.float32)
        assert len(found.row_ids) == len(found.scores) == 0
        assert found.is_exact
        assert found.is_everything


def test_changes_and_searches_from_threads_lose_nothing() -> None:
    """Threads add, remove and search while the index is compressed twice and new rows are merged."""
    index = VectorIndex(N_DIMS, flat_limit=200, merge_at=50)
    everything = hold(np.arange(1600), make_vectors(list(range(1600))))
    done = threading.Event()

    def add(start: int) -> None:
        for first in range(start, start + 400, 20):
            row_ids = np.arange(first, first + 20)
            index.add(row_ids, read(everything, row_ids)[1])

    def remove() -> None:
        left = set(range(0, 1600, 8))
        while left:
            left -= {row_id for row_id in left if index.remove(np.array([row_id]))}

    def search() -> None:
        while not done.is_set():
            query = make_vectors([0], salt=5)[0]
            row_ids, scores = rank_candidates(index.search(query, 15), everything, query, 15)
            assert len(set(row_ids.tolist())) == len(row_ids)
            assert (np.diff(scores) <= 0).all()

    def keep_up() -> None:
        for _ in range(2):
            compress(index, everything)
            while index.merge_some(30):
                pass

    index.add(np.arange(1), everything[0][None])
    with ThreadPoolExecutor(8) as threads:
        searches = [threads.submit(search) for _ in range(2)]
        writes = [threads.submit(add, start) for start in range(0, 1600, 400)]
        writes += [threads.submit(remove), threads.submit(keep_up)]
        wait(writes, timeout=60)
        done.set()
        for write in writes:
            write.result(0)
        for found in searches:
            found.result(20)
    assert index.row_ids().tolist() == [row_id for row_id in range(1600) if row_id % 8]


def test_compressed_index_finds_the_nearest_and_says_what_it_expects_to() -> None:
    """6,000 clustered vectors: the calibrated recall is reached on queries that it has not seen."""
    held = hold(np.arange(6000) + 5, make_clusters(6000))
    index = VectorIndex(32)
    index.add(*read(held, np.arange(6000) + 5))
    compress(index, held)
    assert index.is_compressed
    assert index.tuning is not None
    assert index.tuning.recall >= 0.98
    assert index.tuning.n_candidates < 1000
    n_found = 0
    for query in make_clusters(100, seed=9):
        row_ids, _ = rank_candidates(index.search(query, 10), held, query, 10)
        n_found += len({row_id for row_id, _ in search_by_brute_force(held, query, 10)} & set(row_ids.tolist()))
    assert n_found / 1000 >= 0.96


@pytest.mark.parametrize("share", [0.5, 0.05, 0.002])
def test_filter_comes_before_the_best_are_chosen(share: float) -> None:
    """However few rows are allowed, and though none of them is among the nearest of all, they are found."""
    held = hold(np.arange(6000), make_clusters(6000))
    index = VectorIndex(32)
    index.add(*read(held, np.arange(6000)))
    compress(index, held)
    allowed = np.flatnonzero(np.random.default_rng(3).random(6000) < share)
    n_found = n_expected = 0
    for query in make_clusters(30, seed=9):
        found = index.search(query, 10, allowed=np.append(allowed, 10**6))
        row_ids, _ = rank_candidates(found, held, query, 10)
        expected = {row_id for row_id, _ in search_by_brute_force(held, query, 10, allowed)}
        assert set(found.row_ids.tolist()) <= set(allowed.tolist())
        n_found, n_expected = n_found + len(expected & set(row_ids.tolist())), n_expected + len(expected)
    assert n_found / n_expected >= 0.96


def test_random_directions_are_searched_further_than_clusters() -> None:
    """Where lists say little about who is near, more of them and more candidates are looked at."""
    random = np.random.default_rng(0).standard_normal((6000, 32)).astype(np.float32)
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    costs = []
    for vectors in (make_clusters(6000), random):
        index = VectorIndex(32)
        index.add(np.arange(6000), vectors)
        compress(index, hold(np.arange(6000), vectors))
        assert index.tuning is not None
        assert index.tuning.recall >= 0.98
        costs.append((index.tuning.n_probes, index.tuning.n_candidates))
    assert costs[1][0] > costs[0][0]
    assert costs[1][1] > costs[0][1]


def test_upkeep_is_due_when_an_index_has_grown() -> None:
    """Compress at the limit, merge what came since, save what was merged, and begin anew at four times the size."""
    held = hold(np.arange(4000), make_vectors(list(range(4000))))
    index = VectorIndex(N_DIMS, flat_limit=100, merge_at=50)
    index.add(*read(held, np.arange(99)))
    assert index.next_step() is None
    index.add(*read(held, np.arange(99, 100)))
    assert index.next_step() is Step.REBUILD
    compress(index, held)
    assert index.next_step() is None
    index.add(*read(held, np.arange(100, 150)))
    assert index.next_step() is Step.MERGE
    assert index.has_many_new
    while index.merge_some():
        pass
    assert (index.next_step(), index.n_unsaved) == (None, 150)
    index.add(*read(held, np.arange(150, 400)))
    assert index.next_step() is Step.REBUILD


def test_cancelled_rebuild_stops_and_leaves_the_index_as_it_was() -> None:
    """Also where every row that was to be learned from is gone."""
    held = hold(np.arange(50), make_vectors(list(range(50))))
    index = VectorIndex(N_DIMS)
    index.add(*read(held, np.arange(50)))
    rebuild = index.begin_rebuild()
    rebuild.cancel()
    with pytest.raises(Cancelled):
        train(rebuild, held)
    with pytest.raises(Cancelled):
        train(index.begin_rebuild(), {})
    assert (len(index), index.is_compressed, index.freeze()) == (50, False, None)


def test_rows_merged_between_calibration_and_adoption_are_caught_up_with() -> None:
    """Under load rows are merged into the old codes all the while; the new ones get them before they take over."""
    held = hold(np.arange(60), make_vectors(list(range(60))))
    index = VectorIndex(N_DIMS, flat_limit=4, merge_at=4)
    index.add(*read(held, np.arange(40)))
    compress(index, held)
    rebuild = index.begin_rebuild()
    train(rebuild, held)
    rebuild.add(*read(held, rebuild.row_ids))
    rebuild.calibrate()
    index.add(*read(held, np.arange(40, 60)))
    index.merge_some(15)
    missing = index.adopt(rebuild)
    assert missing.tolist() == list(range(40, 55))
    rebuild.add(*read(held, missing))
    assert len(index.adopt(rebuild)) == 0
    assert index.row_ids().tolist() == list(range(60))


def test_truth_holds_its_own_rows_only() -> None:
    """The sample that it is taken from is by far the largest block of a rebuild."""
    held = hold(np.arange(2000), make_vectors(list(range(2000))))
    rebuild = Rebuild(np.arange(2000))
    sample = read(held, rebuild.sample_ids)
    freed = weakref.finalize(sample[1], lambda: None)
    rebuild.train(*sample)
    del sample
    assert not freed.alive


def test_rows_of_another_width_are_refused() -> None:
    """Before anything is changed."""
    index = VectorIndex(N_DIMS)
    with pytest.raises(ValueError, match="8 dimensions"):
        index.add(np.array([1]), np.ones((1, 9), np.float32))
    assert len(index) == 0


@pytest.mark.parametrize(("n_rows", "n_lists"), [(0, 2), (1, 2), (10_000, 256), (60_000, 512), (10**6, 1024)])
def test_number_of_lists_grows_with_the_root_of_the_rows(n_rows: int, n_lists: int) -> None:
    """Up to a thousand."""
    assert choose_n_lists(n_rows) == n_lists


def test_vectors_of_different_models_and_recipes_never_meet() -> None:
    """One index each; the widths may differ."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([1]), np.array([[1, 0]], np.float32))
    indexes.add("m", "s", np.array([2]), np.array([[1, 0]], np.float32))
    indexes.add("n", "r", np.array([3]), np.array([[1, 0, 0]], np.float32))
    assert indexes.search("m", "r", np.array([1, 0], np.float32), 10).row_ids.tolist() == [1]
    assert indexes.search("n", "r", np.array([1, 0, 0], np.float32), 10).row_ids.tolist() == [3]
    assert indexes.remove("m", "r", np.array([1, 2, 3])) == 1
    assert indexes.sizes() == {("m", "r"): 0, ("m", "s"): 1, ("n", "r"): 1}


def test_unknown_family_holds_nothing() -> None:
    """Searching and removing before anything was added is not an error, and adding nothing makes no index."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([], np.int64), np.empty((0, 0), np.float32))
    found = indexes.search("m", "r", np.ones(3, np.float32), 4)
    assert (len(found.row_ids), len(found.scores), indexes.remove("m", "r", np.array([1])), indexes.sizes()) == (
        0,
        0,
        0,
        {},
    )
