"""The vector index against brute force in NumPy: exact, compressed, and on the way from one to the other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_embeddings.vectors.compressed import Cancelled, choose_n_lists
from llama_embeddings.vectors.index import Step, VectorIndex, VectorIndexes
from llama_embeddings.vectors.rebuilding import Rebuild
from llama_embeddings.vectors.searching import MIN_FIRST_ROWS, Search

N_DIMS = 8
# Ids as a database gives them out: beyond 32 bits as well. No more of them than an index always ranks exactly.
IDS = st.one_of(st.integers(1, MIN_FIRST_ROWS - 6), st.integers(2**33, 2**33 + 5))

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


def finish_search(search: Search, held: Held) -> tuple[np.ndarray, np.ndarray]:
    """What a caller makes of a search: it brings the vectors that are asked for."""
    while len(search.wanted_ids):
        search.take(*read(held, search.wanted_ids))
    return search.best()


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
        row_ids, scores = finish_search(self.index.search(query, count, allowed=wanted), self.held)
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
        row_ids, scores = index.search(query, 10).best()
        cosines = held @ query
        np.testing.assert_allclose(scores, np.sort(cosines)[::-1][:10], atol=1e-6)
        np.testing.assert_allclose(cosines[row_ids - 7], scores, atol=1e-6)


def test_vector_added_twice_is_found_once_as_it_was_first() -> None:
    """A row never changes; what comes again under its id is left alone."""
    index = VectorIndex(2)
    index.add(np.array([5, 5]), np.array([[1, 0], [0, 1]], np.float32))
    index.add(np.array([5]), np.array([[0, 1]], np.float32))
    row_ids, scores = index.search(np.array([1, 0], np.float32), 10).best()
    assert (row_ids.tolist(), scores.tolist()) == ([5], [1.0])


def test_removing_says_how_many_were_there() -> None:
    """Unknown ids are no error, and an id can come again after it was removed."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1, 2, 3]), make_vectors([1, 2, 3]))
    assert index.remove(np.array([2, 3, 99])) == 2
    assert index.remove(np.array([2])) == 0
    assert index.remove(np.array([], np.int64)) == 0
    index.add(np.array([2]), make_vectors([2]))
    assert sorted(index.search(make_vectors([1])[0], 10).best()[0].tolist()) == [1, 2]


@pytest.mark.parametrize("count", [-1, 0])
def test_nothing_wanted_is_nothing_found(count: int) -> None:
    """Empty arrays of the right types, in an empty index, too."""
    index = VectorIndex(N_DIMS)
    index.add(np.array([1]), make_vectors([1]))
    nothing_allowed = index.search(make_vectors([1])[0], 5, allowed=np.empty(0, np.int64))
    empty = VectorIndex(N_DIMS).search(np.ones(N_DIMS), 5)
    for found in (index.search(make_vectors([1])[0], count), empty, nothing_allowed):
        row_ids, scores = found.best()
        assert (row_ids.dtype, scores.dtype) == (np.int64, np.float32)
        assert len(row_ids) == len(scores) == len(found.wanted_ids) == 0


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
            row_ids, scores = finish_search(index.search(query, 15), everything)
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


def make_compressed(vectors: np.ndarray, *, flat_limit: int = 16_384) -> tuple[VectorIndex, Held]:
    """An index of rows with ids from 0, compressed as they are now."""
    held = hold(np.arange(len(vectors)), vectors)
    index = VectorIndex(vectors.shape[1], flat_limit=flat_limit)
    index.add(*read(held, np.arange(len(vectors))))
    compress(index, held)
    return index, held


def measure_recall(
    index: VectorIndex, held: Held, queries: np.ndarray, count: int, allowed: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """Of each query the share of its true nearest that is found; `allowed` chooses among all scores."""
    held_ids = np.array(sorted(held), np.int64)
    vectors = np.stack([held[row_id] for row_id in held_ids.tolist()])
    recalls = []
    for query in queries:
        chosen = allowed(vectors @ query)
        row_ids, _ = finish_search(index.search(query, count, allowed=held_ids[chosen]), held)
        least = np.sort(vectors[chosen] @ query)[-count] - 1e-6
        recalls.append(sum(float(held[row_id] @ query) >= least for row_id in row_ids.tolist()) / count)
    return recalls


def take_all(scores: np.ndarray) -> np.ndarray:
    return np.arange(len(scores))


def take_farthest_half(scores: np.ndarray) -> np.ndarray:
    return np.flatnonzero(scores <= np.median(scores))


def test_compressed_index_finds_the_nearest_and_says_what_it_expects_to() -> None:
    """6,000 clustered vectors: the calibrated recall is reached on queries that it has not seen."""
    index, held = make_compressed(make_clusters(6000))
    assert index.is_compressed
    assert index.tuning is not None
    assert index.tuning.recall >= 0.98
    for count in (10, 100):
        recalls = measure_recall(index, held, make_clusters(60, seed=9), count, take_all)
        assert np.mean(recalls) >= 0.97
        assert min(recalls) >= 0.8


@pytest.mark.parametrize("count", [10, 100])
def test_queries_near_to_nothing_find_their_nearest(count: int) -> None:
    """Directions at random among clusters: their nearest lie in many lists, and hardly nearer than the others."""
    index, held = make_compressed(make_clusters(6000))
    random = np.random.default_rng(2).standard_normal((30, 32)).astype(np.float32)
    queries = random / np.linalg.norm(random, axis=1, keepdims=True)
    recalls = measure_recall(index, held, queries, count, take_all)
    assert np.mean(recalls) >= 0.97
    assert min(recalls) >= 0.8


@pytest.mark.parametrize("count", [10, 100])
def test_filter_that_leaves_the_farthest_half_leaves_the_best_of_it(count: int) -> None:
    """The lists nearest to the query hold none of the rows that may be found."""
    index, held = make_compressed(make_clusters(6000))
    recalls = measure_recall(index, held, make_clusters(30, seed=9), count, take_farthest_half)
    assert np.mean(recalls) >= 0.97
    assert min(recalls) >= 0.8


def test_one_topic_left_of_many_is_searched_as_well() -> None:
    """All rows lie in a few lists, much alike, and the queries are of another topic or of this one."""
    vectors = make_clusters(8000)
    index, held = make_compressed(vectors)
    left = np.argsort(-(vectors @ vectors[0]))[:600]
    gone = np.setdiff1d(np.arange(8000), left)
    for row_id in gone.tolist():
        del held[row_id]
    index.remove(gone)
    for queries in (vectors[left[:30]], make_clusters(30, seed=9)):
        recalls = measure_recall(index, held, queries, 10, take_all)
        assert np.mean(recalls) >= 0.97


def test_lists_are_made_anew_when_rows_of_another_kind_came() -> None:
    """They lie farther from the centres than those that the centres were learned from; more of the same kind do not."""
    vectors = make_clusters(6000)
    random = np.random.default_rng(2).standard_normal((3000, 32)).astype(np.float32)
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    for later, step in ((make_clusters(3000, seed=8), None), (random, Step.REBUILD)):
        index, held = make_compressed(vectors, flat_limit=4000)
        held |= hold(np.arange(6000, 9000), later)
        index.add(np.arange(6000, 9000), later)
        while index.merge_some():
            pass
        assert index.next_step() is step
        if step is Step.REBUILD:
            compress(index, held)
            assert index.next_step() is None


def test_lists_are_made_anew_when_few_rows_are_left() -> None:
    """A quarter; what is left need not fill the lists of what was there."""
    index, held = make_compressed(make_clusters(6000), flat_limit=4000)
    index.remove(np.arange(4400))
    assert index.next_step() is not Step.REBUILD
    index.remove(np.arange(4400, 4600))
    assert index.next_step() is Step.REBUILD
    for row_id in range(4600):
        del held[row_id]
    compress(index, held)
    assert index.next_step() is None


@pytest.mark.parametrize("share", [0.5, 0.05, 0.002])
def test_filter_comes_before_the_best_are_chosen(share: float) -> None:
    """However few rows are allowed, and though none of them is among the nearest of all, they are found."""
    index, held = make_compressed(make_clusters(6000))
    allowed = np.flatnonzero(np.random.default_rng(3).random(6000) < share)
    n_found = n_expected = 0
    for query in make_clusters(30, seed=9):
        row_ids, _ = finish_search(index.search(query, 10, allowed=np.append(allowed, 10**6)), held)
        expected = {row_id for row_id, _ in search_by_brute_force(held, query, 10, allowed)}
        assert set(row_ids.tolist()) <= set(allowed.tolist())
        n_found, n_expected = n_found + len(expected & set(row_ids.tolist())), n_expected + len(expected)
    assert n_found / n_expected >= 0.97


def test_random_directions_are_searched_further_than_clusters() -> None:
    """Where lists say little about who is near, more rows are compared."""
    random = np.random.default_rng(0).standard_normal((6000, 32)).astype(np.float32)
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    costs = []
    for vectors in (make_clusters(6000), random):
        index, held = make_compressed(vectors)
        n_compared = 0
        for query in vectors[:20]:
            search = index.search(query, 10)
            while len(search.wanted_ids):
                n_compared += len(search.wanted_ids)
                search.take(*read(held, search.wanted_ids))
        costs.append(n_compared)
    assert costs[1] > 2 * costs[0]


def test_rows_deleted_while_a_search_goes_on_are_made_up_for() -> None:
    """The database no longer has what the index names: others take the places."""
    index, held = make_compressed(make_clusters(6000))
    [query] = make_clusters(1, seed=9)
    for row_id, _ in search_by_brute_force(held, query, 40):
        del held[row_id]
    row_ids, _ = finish_search(index.search(query, 10), held)
    assert row_ids.tolist() == [row_id for row_id, _ in search_by_brute_force(held, query, 10)]


def test_estimates_of_a_compressed_index_are_near_the_truth() -> None:
    """For callers that go on to something exact of their own: most of the nearest, and about as near as they are."""
    index, held = make_compressed(make_clusters(6000))
    for query, (row_ids, scores) in zip(
        make_clusters(20, seed=9), index.estimate(make_clusters(20, seed=9), 30), strict=True
    ):
        nearest = {row_id for row_id, _ in search_by_brute_force(held, query, 10)}
        assert len(nearest & set(row_ids.tolist())) >= 7
        errors = scores - np.array([held[row_id] @ query for row_id in row_ids.tolist()])
        assert np.abs(errors).mean() < 0.15


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


def index_of(indexes: VectorIndexes, model_name: str, family: str) -> VectorIndex:
    index = indexes.get(model_name, family)
    assert index is not None
    return index


def test_vectors_of_different_models_and_recipes_never_meet() -> None:
    """One index each; the widths may differ."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([1]), np.array([[1, 0]], np.float32))
    indexes.add("m", "s", np.array([2]), np.array([[1, 0]], np.float32))
    indexes.add("n", "r", np.array([3]), np.array([[1, 0, 0]], np.float32))
    assert index_of(indexes, "m", "r").search(np.array([1, 0], np.float32), 10).best()[0].tolist() == [1]
    assert index_of(indexes, "n", "r").search(np.array([1, 0, 0], np.float32), 10).best()[0].tolist() == [3]
    assert indexes.remove("m", "r", np.array([1, 2, 3])) == 1
    assert indexes.sizes() == {("m", "r"): 0, ("m", "s"): 1, ("n", "r"): 1}


def test_unknown_family_holds_nothing() -> None:
    """Removing before anything was added is not an error, and adding nothing makes no index."""
    indexes = VectorIndexes()
    indexes.add("m", "r", np.array([], np.int64), np.empty((0, 0), np.float32))
    assert indexes.get("m", "r") is None
    assert (indexes.remove("m", "r", np.array([1])), indexes.sizes()) == (0, {})
