"""A bounded memory of what was read or computed lately, in front of the database.

Bounded by bytes, not entries: a wide model's vectors count for more. Least recently used leaves first. Used on the
event loop only, so it needs no lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from embeddings_data_models import StoredEmbedding

# Python objects around one vector: record, array header, key, dictionary entry. Measured with tracemalloc.
OVERHEAD_IN_BYTES = 700

Key = tuple[str, str, str]


class EmbeddingMemoryCache:
    """(text hash, model name, recipe) to embedding."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Key, StoredEmbedding] = OrderedDict()
        self._n_bytes = 0
        self.n_hits = 0
        self.n_misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def get(self, key: Key) -> StoredEmbedding | None:
        found = self._entries.get(key)
        if found is None:
            self.n_misses += 1
            return None
        self._entries.move_to_end(key)
        self.n_hits += 1
        return found

    def put(self, key: Key, embedding: StoredEmbedding) -> None:
        size = _size(embedding)
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = embedding
        self._n_bytes += size
        while self._n_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._n_bytes -= _size(oldest)

    def replace(self, key: Key, embedding: StoredEmbedding) -> None:
        """Put a newer description of the same row in its place; nothing is done where there is none."""
        known = self._entries.get(key)
        if known is not None and known.row_id == embedding.row_id:
            self._n_bytes += _size(embedding) - _size(known)
            self._entries[key] = embedding

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._n_bytes = 0

    def discard_rows(self, row_ids: Collection[int]) -> None:
        """Forget rows of the database."""
        for key in [key for key, embedding in self._entries.items() if embedding.row_id in row_ids]:
            self._n_bytes -= _size(self._entries.pop(key))


def _size(embedding: StoredEmbedding) -> int:
    return embedding.vector.nbytes + OVERHEAD_IN_BYTES
