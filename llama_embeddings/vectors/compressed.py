"""One bit a dimension: inverted lists of RaBitQ codes, and the exact scan over plain vectors; only importer of `faiss`.

RaBitQ (Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound", 2024) keeps the sign
of each dimension of a randomly rotated vector, and two numbers. Its scores are estimates: callers rank the best of
them again by the vectors themselves, which are not held here. Adding and removing want the caller's lock.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from llama_embeddings.vectors.id_arrays import contains

ROTATION_SEED = 20_240_521
N_TRAINING_ROUNDS = 10
# Twice as many gave the same recall from as many lists and candidates, for twice the time and memory.
TRAINING_ROWS_PER_LIST = 16
MAX_LISTS = 1024
ROWS_PER_ROTATION = 1024
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


class CompressedRows:
    """Codes of vectors under their row ids. Made by `train` or `from_bytes`."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index
        self._lists = faiss.extract_index_ivf(index)

    @property
    def n_dims(self) -> int:
        return int(self._index.d)

    @property
    def n_lists(self) -> int:
        return int(self._lists.nlist)

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
        return cls(index)

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add int64 (n,) ids with float32 (n, n_dims) vectors."""
        self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(row_ids, np.int64))

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove ids; returns how many were there. Goes through all ids: 10 ms for a million."""
        if len(row_ids) == 0:
            return 0
        return int(self._lists.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(row_ids, np.int64))))

    def search(
        self, queries: np.ndarray, count: int, n_probes: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best for each of float32 (q, n_dims), in `n_probes` lists: ids int64 and estimates, (q, count).

        Where there are fewer, -1 takes the places at the end. `allowed`: sorted ids that alone may be found.
        """
        use_threads(1)
        parameters = faiss.SearchParametersIVF(nprobe=min(n_probes, self.n_lists))
        if allowed is not None:
            selector = _make_selector(allowed)
            parameters.sel = selector
        estimates, row_ids = self._index.search(queries, count, params=parameters)
        return row_ids, estimates

    def to_bytes(self) -> np.ndarray:
        """All of it as uint8 (n,)."""
        data: np.ndarray = faiss.serialize_index(self._index)
        return data

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> CompressedRows:
        """What `to_bytes` gave. Damaged bytes may end the process: callers check them first."""
        return cls(faiss.deserialize_index(data))


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
