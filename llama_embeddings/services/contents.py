"""What the store holds: texts, documents and collections, listed and forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from embeddings_data_models import Page, StoredCollection
from llama_embeddings.errors import NotFound
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.removals import DocumentRemovals
from llama_embeddings.services.token_index import TokenIndex
from llama_embeddings.storage.store import EmbeddingStore


@dataclass(frozen=True, slots=True)
class Deletion:
    """How many embeddings were forgotten, and whether their bytes are overwritten: False if they are yet to be."""

    n_embeddings: int
    is_erased: bool


class ContentsService:
    """Lists what was ever embedded, and forgets what is named."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        embeddings: EmbeddingService,
        token_index: TokenIndex,
        removals: DocumentRemovals,
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._token_index = token_index
        self._removals = removals

    async def list_texts(
        self,
        model_name: str | None,
        limit: int | None,
        offset: int,
        *,
        collection: str | None = None,
        after: int = 0,
    ) -> Page[str]:
        """Each distinct text once, oldest first; of one model and collection, or of all where none is named.

        Raises ModelNotFound.
        """
        await self._embeddings.settle()
        name = self._resolve(model_name)
        texts = await self._store.list_texts_by_page(name, limit, offset, collection, after)
        self._check_model(model_name, is_empty=not texts.entries)
        return texts

    async def list_document_filenames(
        self,
        model_name: str | None,
        limit: int | None,
        offset: int,
        *,
        collection: str | None = None,
        after: int = 0,
    ) -> Page[str]:
        """Each distinct file name once, oldest first; of one model and collection, or of all where none is named.

        Raises ModelNotFound.
        """
        name = self._resolve(model_name)
        filenames = await self._store.list_filenames_by_page(name, limit, offset, collection, after)
        self._check_model(model_name, is_empty=not filenames.entries)
        return filenames

    async def list_collections(self, limit: int, after: int = 0) -> Page[StoredCollection]:
        """Every collection that was ever named, and not deleted since, oldest first."""
        return await self._store.list_collections_by_page(limit, after)

    async def delete_collection(self, name: str) -> None:
        """Forget the name of a collection. Raises NotFound, and InvalidInput for one that is not empty."""
        await self._store.delete_collection(name)

    async def delete_text(self, text: str) -> Deletion:
        """Forget a text under every model, in every collection.

        Raises NotFound if neither its embedding nor those of its tokens are stored.
        """
        await self._embeddings.settle()
        removal = await self._store.delete_text(text)
        await self._embeddings.forget(removal.rows)
        await self._token_index.remove(removal.bundles)
        if not removal.rows and not removal.bundles:
            raise NotFound("This text is not stored. Texts are told apart by their exact characters.", field="text")
        return Deletion(len(removal.rows), await self._store.erase(removal))

    async def delete_document(self, filename: str, *, model_name: str | None, collection: str | None) -> Deletion:
        """Forget the documents of a name with the sentences that nobody else holds.

        Of one model and collection, or of all where none is named. Raises NotFound if there is no such document.
        """
        name = self._resolve(model_name)
        removal = await self._removals.delete(filename, model_name=name, collection=collection)
        if not removal.n_documents:
            raise NotFound(f"No document {filename!r} is stored there.", field="filename")
        return Deletion(len(removal.rows), await self._store.erase(removal))

    def _check_model(self, model_name: str | None, *, is_empty: bool) -> None:
        """Tell a model without anything stored from a name that is no model's; a model that is gone may have texts."""
        if model_name is not None and is_empty:
            self._models.check_listed(model_name)

    def _resolve(self, model_name: str | None) -> str | None:
        return None if model_name is None else self._models.resolve(model_name)
