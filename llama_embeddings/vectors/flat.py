"""Vectors as they are, in chunks: what an index is made of while it is small, and where new rows go later.

A view taken from it stays true while rows are added, so that searching needs no lock. Not thread-safe otherwise: its
owner has one change at a time. Searches nothing itself.
"""

from __future__ import annotations

import numpy as np

from llama_embeddings.vectors.id_arrays import NO_IDS, contains

CHUNK_BYTES = 4 * 2**20
MIN_ROWS_PER_CHUNK = 256

# Ids int64 (n,) and vectors float32 (n, n_dims).
Rows = tuple[np.ndarray, np.ndarray]


class _Chunk:
    """Room for rows; those from `start` to `end` are held. Memory is only taken as it fills."""

    def __init__(self, n_rows: int, n_dims: int) -> None:
        self.row_ids = np.empty(n_rows, np.int64)
        self.vectors = np.empty((n_rows, n_dims), np.float32)
        self.start = 0
        self.end = 0

    @property
    def room(self) -> int:
        return len(self.row_ids) - self.end

    def append(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        end = self.end + len(row_ids)
        self.row_ids[self.end : end] = row_ids
        self.vectors[self.end : end] = vectors
        self.end = end

    def view(self) -> Rows:
        return self.row_ids[self.start : self.end], self.vectors[self.start : self.end]


class FlatRows:
    """Rows in the order in which they came."""

    def __init__(self, n_dims: int) -> None:
        self._n_dims = n_dims
        self._rows_per_chunk = max(MIN_ROWS_PER_CHUNK, CHUNK_BYTES // (4 * n_dims))
        self._chunks: list[_Chunk] = []
        self._n_rows = 0

    def __len__(self) -> int:
        return self._n_rows

    def views(self) -> list[Rows]:
        """All rows, chunk by chunk. What is added or removed later does not show in them."""
        return [chunk.view() for chunk in self._chunks]

    def row_ids(self) -> np.ndarray:
        """int64 (n,), in the order in which they came."""
        return np.concatenate([row_ids for row_ids, _ in self.views()]) if self._chunks else NO_IDS

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Put int64 (n,) ids with float32 (n, n_dims) vectors behind the others."""
        start = 0
        while start < len(row_ids):
            if not self._chunks or not self._chunks[-1].room:
                self._chunks.append(_Chunk(self._rows_per_chunk, self._n_dims))
            end = start + self._chunks[-1].room
            self._chunks[-1].append(row_ids[start:end], vectors[start:end])
            start = end
        self._n_rows += len(row_ids)

    def remove(self, sorted_ids: np.ndarray) -> int:
        """Remove ids; returns how many were there. Chunks that hold one are copied: their views stay as they are."""
        n_before = self._n_rows
        for place, chunk in enumerate(self._chunks):
            row_ids, vectors = chunk.view()
            stays = ~contains(sorted_ids, row_ids)
            if not stays.all():
                self._chunks[place] = copy = _Chunk(self._rows_per_chunk, self._n_dims)
                copy.append(row_ids[stays], vectors[stays])
                self._n_rows -= len(row_ids) - copy.end
        self._drop_empty_chunks()
        return n_before - self._n_rows

    def first(self, n_rows: int) -> Rows:
        """The oldest rows, at most `n_rows` and no more than one chunk holds."""
        row_ids, vectors = self._chunks[0].view() if self._chunks else (NO_IDS, np.empty((0, self._n_dims), np.float32))
        return row_ids[:n_rows], vectors[:n_rows]

    def drop_first(self, n_rows: int) -> None:
        """Forget what `first` of the same number gave."""
        self._chunks[0].start += n_rows
        self._n_rows -= n_rows
        self._drop_empty_chunks()

    def _drop_empty_chunks(self) -> None:
        # The last one goes, too: that frees its memory, and the next row makes another.
        self._chunks = [chunk for chunk in self._chunks if chunk.start < chunk.end]
