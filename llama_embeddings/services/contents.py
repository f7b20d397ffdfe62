"""What the store holds: texts, documents and collections, listed and forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from embeddings_data_models import StoredCollection
from llama_embeddings.errors import NotFound
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.models import ModelService
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
        self, store: EmbeddingStore, models: ModelService, embeddings: EmbeddingService, token_index: TokenIndex
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._token_index = token_index

    async def list_texts(
        self, model_name: str | None, limit: int | None, offset: int, *, collection: str | None = None
    ) -> list[str]:
        """Each distinct text once, oldest first; of one model and collection, or of all where none is named.

        Raises ModelNotFound.
        """
        texts = await self._store.list_texts(self._resolve(model_name), limit, offset, collection)
        self._check_model(model_name, is_empty=not texts)
        return texts

    async def list_document_filenames(
        self, model_name: str | None, limit: int | None, offset: int, *, collection: str | None = None
    ) -> list[str]:
        """Each distinct file name once, oldest first; of one model and collection, or of all where none is named.

        Raises ModelNotFound.
        """
        filenames = await self._store.list_document_filenames(self._resolve(model_name), limit, offset, collection)
        self._check_model(model_name, is_empty=not filenames)
        return filenames

    async def list_collections(self) -> list[StoredCollection]:
        """Every collection that was ever named, oldest first."""
        return await self._store.list_collections()

    async def delete_text(self, text: str) -> Deletion:
        """Forget a text under every model, in every collection.

        Raises NotFound if neither its embedding nor those of its tokens are stored.
        """
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
        removal = await self._store.delete_document(filename, model_name=name, collection=collection)
        await self._embeddings.forget(removal.rows)
        await self._token_index.remove(removal.bundles)
        if not removal.n_documents:
            raise NotFound(f"No document {filename!r} is stored there.", field="filename")
        return Deletion(len(removal.rows), await self._store.erase(removal))

    def _check_model(self, model_name: str | None, *, is_empty: bool) -> None:
        """Tell a model without anything stored from a name that is no model's; a model that is gone may have texts."""
        if model_name is not None and is_empty:
            self._models.check_listed(model_name)

    def _resolve(self, model_name: str | None) -> str | None:
        return None if model_name is None else self._models.resolve(model_name)
