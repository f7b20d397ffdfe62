"""Names of collections by their ids, as lookups need them. Collections are never deleted, so a name never changes."""

from __future__ import annotations

from sqlalchemy import Connection

from embeddings_data_models import DEFAULT_COLLECTION, DEFAULT_COLLECTION_ID, HELD_BY_DOCUMENTS
from llama_embeddings.storage.statements import READ_COLLECTIONS


class CollectionNames:
    """Used on one thread. Rows in the same collections share one set of names."""

    def __init__(self) -> None:
        self._names = {DEFAULT_COLLECTION_ID: DEFAULT_COLLECTION}
        self._sets: dict[tuple[int | None, str | None], frozenset[str]] = {}

    def find(self, connection: Connection, first: int | None, further: str | None) -> frozenset[str]:
        """The names for a row's collection and its further ones, ids with commas between them."""
        found = self._sets.get((first, further))
        if found is None:
            found = self._sets[first, further] = self._make_set(connection, first, further)
        return found

    def _make_set(self, connection: Connection, first: int | None, further: str | None) -> frozenset[str]:
        ids = {int(digits) for digits in further.split(",")} if further else set()
        if first is not None and first != HELD_BY_DOCUMENTS:
            ids.add(first)
        if not ids <= self._names.keys():
            self._names = dict(connection.execute(READ_COLLECTIONS).all())
        return frozenset(self._names[collection_id] for collection_id in ids)
