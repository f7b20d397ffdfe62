"""Names of collections by their ids, as lookups need them. No id is given out twice, so its name never changes."""

from __future__ import annotations

from sqlalchemy import Connection

from embeddings_data_models import DEFAULT_COLLECTION, DEFAULT_COLLECTION_ID, HELD_BY_DOCUMENTS
from llama_embeddings.storage.statements import READ_COLLECTION_NAMES

# Sets of names that are kept, each some hundred bytes.
MAX_SETS = 10_000


class CollectionNames:
    """Used on one thread. Rows in the same collections share one set of names."""

    def __init__(self) -> None:
        self._names = {DEFAULT_COLLECTION_ID: DEFAULT_COLLECTION}
        self._sets: dict[tuple[int | None, str | None], frozenset[str]] = {}

    def find(self, connection: Connection, first: int | None, further: str | None) -> frozenset[str]:
        """The names for a row's collection and its further ones, ids with commas between them."""
        found = self._sets.get((first, further))
        if found is None:
            if len(self._sets) >= MAX_SETS:
                self._sets.clear()
            found = self._sets[first, further] = self._make_set(connection, first, further)
        return found

    def _make_set(self, connection: Connection, first: int | None, further: str | None) -> frozenset[str]:
        ids = {int(digits) for digits in further.split(",")} if further else set()
        if first is not None and first != HELD_BY_DOCUMENTS:
            ids.add(first)
        unknown = ids - self._names.keys()
        if unknown:
            self._names.update(connection.execute(READ_COLLECTION_NAMES, {"collection_ids": list(unknown)}).all())
        # One that is missing was deleted, with all that was in it, since the row was read.
        return frozenset(self._names[collection_id] for collection_id in ids if collection_id in self._names)
