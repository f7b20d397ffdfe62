"""One bit a dimension: inverted lists of RaBitQ codes, and the exact scan over plain vectors; only importer of `faiss`.

RaBitQ (Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound", 2024) keeps the sign
of each dimension of a randomly rotated vector, and two numbers. Its scores are estimates: callers rank the best of
them again by the vectors themselves, which are not held here. Adding and removing want the caller's lock.

How far the rows of a list lie from its centre is kept beside the codes: it tells which lists may hold a row that is
near a query. One row in sixteen is measured for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from llama_embeddings.vectors.id_arrays import NO_IDS, contains
from llama_embeddings.vectors.scatter import Scatter

ROTATION_SEED = 20_240_521
N_TRAINING_ROUNDS = 10
# Twice as many gave the same recall from as many lists and candidates, for twice the time and memory.
TRAINING_ROWS_PER_LIST = 16
MAX_LISTS = 1024
ROWS_PER_ROTATION = 1024
# Measuring a row takes as long as adding it.
MEASURE_EVERY = 16
# The lists' sizes are counted anew when this share of all rows has come or gone.
UNCOUNTED_SHARE = 0.01
# A bit for each id up to the highest is quick to make and to ask; beyond this many, a hash set of the allowed ids.
MAX_BITMAP_IDS = 2**28


class Cancelled(Exception):
    """Nobody waits for the result any more."""


def use_threads(n_threads: int) -> None:
    """Set how many OpenMP threads FAISS uses when called from this thread; one, unless nothing else is going on.

    OpenMP keeps the number for each thread that calls it, and starts with all cores: they would fight the
    engine's workers over them.
    """
    faiss.omp_set_num_threads(n_threads)


def scan(queries: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best of float32 (n, n_dims) for each of (q, n_dims): places int64 and inner products, (q, count)."""
    use_threads(1)
    scores, places = faiss.knn(queries, vectors, min(count, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return places, scores


def choose_n_lists(n_rows: int) -> int:
    """Twice the root of the rows, as a power of two: lists of some hundred rows, a thousand lists at most."""
    return min(MAX_LISTS, 2 ** max(0, round(np.log2(2 * np.sqrt(max(n_rows, 1))))))


@dataclass(frozen=True, slots=True)
class ListScores:
    """What a query, float32 (1, n_dims) as it came, can know of each list before it looks into it.

    `query` is rotated as the codes are. `centres` are the inner products with the lists' centres, `sizes` how many rows
    each list holds, `deviations` the standard deviations of their inner products around the centre's if rows scatter
    alike in all directions: float32 and int64 (n_lists,).
    """

    query: np.ndarray
    centres: np.ndarray
    sizes: np.ndarray
    deviations: np.ndarray


class CompressedRows:
    """Codes of vectors under their row ids. Made by `train` or `from_bytes`."""

    def __init__(self, index: faiss.Index, scatter: Scatter) -> None:
        self._index = index
        self._lists = faiss.downcast_index(index.index)
        self._rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        self._quantizer = faiss.downcast_index(self._lists.quantizer)
        rotated = faiss.rev_swig_ptr(self._quantizer.get_xb(), self.n_lists * self.n_dims)
        # As the vectors come: not rotated.
        self._centres = self._rotation.reverse_transform(rotated.reshape(self.n_lists, self.n_dims))
        self._squares = np.einsum("ij,ij->i", self._centres, self._centres)
        self._scatter = scatter
        self._sizes = self._count()

    @property
    def n_dims(self) -> int:
        return int(self._index.d)

    @property
    def n_lists(self) -> int:
        return int(self._lists.nlist)

    @property
    def scatter(self) -> Scatter:
        """How far the rows lie from the centres of their lists."""
        return self._scatter

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def train(cls, sample: np.ndarray, n_lists: int, check: Callable[[], None]) -> CompressedRows:
        """Empty lists around the centres of float32 (n, n_dims), which is rotated in place: a copy would be large.

        `check` is called now and then, and may raise.
        """
        n_dims = sample.shape[1]
        rotation = faiss.RandomRotationMatrix(n_dims, n_dims)
        rotation.init(ROTATION_SEED)
        for start in range(0, len(sample), ROWS_PER_ROTATION):
            part = sample[start : start + ROWS_PER_ROTATION]
            part[:] = rotation.apply_py(part)
        centres = _find_centres(sample, n_lists, check)
        quantizer = faiss.IndexFlatIP(n_dims)
        quantizer.add(centres)
        lists = faiss.IndexIVFRaBitQFastScan(quantizer, n_dims, n_lists, faiss.METRIC_INNER_PRODUCT)
        lists.train(centres)
        index = faiss.IndexPreTransform(rotation, lists)
        # Each part is now ended by the one that holds it, and no longer by its object in Python.
        for part in (rotation, quantizer, lists):
            part.this.disown()
        lists.own_fields = index.own_fields = True
        return cls(index, Scatter.of_nothing(n_lists))

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add int64 (n,) ids with float32 (n, n_dims) vectors."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        self._index.add_with_ids(vectors, np.ascontiguousarray(row_ids, np.int64))
        self._measure(vectors[::MEASURE_EVERY])

    def _measure(self, vectors: np.ndarray) -> None:
        """Note how far rows lie from the centres of their lists, which a rotation does not change."""
        scores = vectors @ self._centres.T
        places = scores.argmax(axis=1)
        norms = np.einsum("ij,ij->i", vectors, vectors)
        distances = norms - 2.0 * scores[np.arange(len(places)), places] + self._squares[places]
        self._scatter.measure(places, distances)

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove ids; returns how many were there. Goes through all ids: 10 ms for a million."""
        if len(row_ids) == 0:
            return 0
        return int(self._lists.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(row_ids, np.int64))))

    def score_lists(self, query: np.ndarray) -> ListScores:
        """What is known of each list before it is looked into; the query is float32 (1, n_dims)."""
        use_threads(1)
        if abs(len(self) - self._sizes.sum()) > UNCOUNTED_SHARE * len(self):
            self._sizes = self._count()
        rotated = self._rotation.apply_py(np.ascontiguousarray(query, np.float32))
        scores, places = self._quantizer.search(rotated, self.n_lists)
        centres = np.empty(self.n_lists, np.float32)
        centres[places[0]] = scores[0]
        return ListScores(rotated, centres, self._sizes, self._scatter.deviations(self.n_dims))

    def search(
        self, scores: ListScores, lists: np.ndarray, count: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best rows of some lists, int64 (n,): ids int64 (m,) and estimates float32 (m,), best first.

        m is below `count` only if no more are there. `allowed`: sorted ids that alone may be found.
        """
        if len(lists) == 0 or count <= 0:
            return NO_IDS, np.empty(0, np.float32)
        use_threads(1)
        parameters = faiss.SearchParametersIVF(nprobe=len(lists))
        if allowed is not None:
            selector = _make_selector(allowed)
            parameters.sel = selector
        places = np.ascontiguousarray(lists, np.int64)
        centres = np.ascontiguousarray(scores.centres[lists], np.float32)
        row_ids, estimates = np.empty(count, np.int64), np.empty(count, np.float32)
        pointers = [faiss.swig_ptr(array) for array in (places, centres, estimates, row_ids)]
        # The Python layer's own `search_preassigned` takes no parameters.
        self._lists.search_preassigned_c(1, faiss.swig_ptr(scores.query), count, *pointers, False, parameters)
        found = row_ids >= 0
        return row_ids[found], estimates[found]

    def find_lists(self, sorted_ids: np.ndarray) -> np.ndarray:
        """Which list each of some sorted ids is in: int64 (n,), -1 where it is in none. Goes through all ids."""
        places = np.full(len(sorted_ids), -1, np.int64)
        for number in range(self.n_lists):
            row_ids = self._read_ids(number)
            held = row_ids[contains(sorted_ids, row_ids)]
            places[np.searchsorted(sorted_ids, held)] = number
        return places

    def _read_ids(self, number: int) -> np.ndarray:
        n_rows = self._lists.invlists.list_size(number)
        if n_rows == 0:
            return NO_IDS
        row_ids: np.ndarray = faiss.rev_swig_ptr(self._lists.invlists.get_ids(number), n_rows)
        return row_ids

    def _count(self) -> np.ndarray:
        return np.array([self._lists.invlists.list_size(number) for number in range(self.n_lists)], np.int64)

    def to_bytes(self) -> np.ndarray:
        """All of it as uint8 (n,)."""
        data: np.ndarray = faiss.serialize_index(self._index)
        return np.concatenate((self._scatter.to_bytes(), data))

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> CompressedRows:
        """What `to_bytes` gave. Damaged bytes may end the process: callers check them first."""
        scatter, rest = Scatter.from_bytes(data)
        return cls(faiss.deserialize_index(rest), scatter)


def _find_centres(sample: np.ndarray, n_lists: int, check: Callable[[], None]) -> np.ndarray:
    """k-means, round by round, so that it can be stopped in between."""
    chosen = np.random.default_rng(ROTATION_SEED).permutation(len(sample))[:n_lists]
    centres = np.ascontiguousarray(sample[chosen])
    for _ in range(N_TRAINING_ROUNDS):
        check()
        clustering = faiss.Kmeans(sample.shape[1], n_lists, niter=1, min_points_per_centroid=1, seed=ROTATION_SEED)
        clustering.train(sample, init_centroids=centres)
        centres = clustering.centroids
    return centres


def _make_selector(allowed: np.ndarray) -> faiss.IDSelector:
    if allowed[-1] >= MAX_BITMAP_IDS or allowed[0] < 0:
        return faiss.IDSelectorBatch(allowed)
    is_allowed = np.zeros(int(allowed[-1]) // 8 * 8 + 8, np.uint8)
    is_allowed[allowed] = 1
    return faiss.IDSelectorBitmap(np.packbits(is_allowed, bitorder="little"))


def keep_allowed(row_ids: np.ndarray, vectors: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are among the sorted `allowed`; all of them, uncopied, if it is None."""
    if allowed is None:
        return row_ids, vectors
    places = np.flatnonzero(contains(allowed, row_ids))
    return row_ids[places], vectors[places]
