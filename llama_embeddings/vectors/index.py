"""Nearest neighbours by inner product over unit vectors; the only importer of `faiss`.

One index per family of comparable vectors, each vector under the id of its row in the database. Exact search. Knows no
texts and no SQL; what it returns are row ids.
"""

from __future__ import annotations

import threading

import faiss
import numpy as np

# FAISS brings a pool of OpenMP threads that would fight the engine's workers over the cores.
faiss.omp_set_num_threads(1)

SMALL_INDEX = 5_000


class VectorIndex:
    """Vectors of one family. All methods are thread-safe."""

    def __init__(self, n_dims: int) -> None:
        self.n_dims = n_dims
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(n_dims))
        self._ids: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add int64 (n,) ids with float32 (n, n_dims) unit vectors; ids that are in already are left alone."""
        with self._lock:
            places: dict[int, int] = {}
            for place, row_id in enumerate(row_ids.tolist()):
                if row_id not in self._ids:
                    places.setdefault(row_id, place)
            if places:
                chosen = np.ascontiguousarray(vectors[list(places.values())], dtype=np.float32)
                self._index.add_with_ids(chosen, np.fromiter(places, np.int64, len(places)))
                self._ids.update(places)

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove ids; returns how many were there."""
        with self._lock:
            present = np.array([row_id for row_id in row_ids.tolist() if row_id in self._ids], dtype=np.int64)
            if len(present):
                self._index.remove_ids(faiss.IDSelectorBatch(present))
                self._ids.difference_update(present.tolist())
            return len(present)

    def search(self, vector: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` nearest to float32 (n_dims,), or all there are: int64 ids and float32 cosines, best first."""
        with self._lock:
            count = min(count, len(self._ids))
            if count <= 0:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            scores, row_ids = self._index.search(np.ascontiguousarray(vector[None], dtype=np.float32), count)
        return row_ids[0], scores[0]


class VectorIndexes:
    """One index per (model name, recipe family), made when its first vector comes."""

    def __init__(self) -> None:
        self._indexes: dict[tuple[str, str], VectorIndex] = {}

    def add(self, model_name: str, family: str, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """See VectorIndex.add."""
        if len(row_ids) == 0:
            return
        key = (model_name, family)
        if key not in self._indexes:
            self._indexes.setdefault(key, VectorIndex(vectors.shape[1]))
        self._indexes[key].add(row_ids, vectors)

    def is_small(self, model_name: str, family: str) -> bool:
        """Whether a search of this index takes less than a millisecond or so."""
        index = self._indexes.get((model_name, family))
        return index is None or len(index) < SMALL_INDEX

    def remove(self, model_name: str, family: str, row_ids: np.ndarray) -> int:
        """See VectorIndex.remove."""
        index = self._indexes.get((model_name, family))
        return index.remove(row_ids) if index is not None else 0

    def search(self, model_name: str, family: str, vector: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See VectorIndex.search; nothing is found where nothing was added."""
        index = self._indexes.get((model_name, family))
        return index.search(vector, count) if index is not None else (np.empty(0, np.int64), np.empty(0, np.float32))

    def sizes(self) -> dict[tuple[str, str], int]:
        """Vectors held, by model name and recipe family."""
        return {key: len(index) for key, index in self._indexes.items()}
