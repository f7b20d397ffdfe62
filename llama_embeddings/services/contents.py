"""What the store holds: texts and documents, listed."""

from __future__ import annotations

from llama_embeddings.services.models import ModelService
from llama_embeddings.storage.store import EmbeddingStore


class ContentsService:
    """Lists what was ever embedded."""

    def __init__(self, store: EmbeddingStore, models: ModelService) -> None:
        self._store = store
        self._models = models

    async def list_texts(self, model_name: str | None, limit: int | None, offset: int) -> list[str]:
        """Each distinct text once, oldest first; of one model, or of all if none is named. Raises ModelNotFound."""
        texts = await self._store.list_texts(self._resolve(model_name), limit, offset)
        self._check_model(model_name, is_empty=not texts)
        return texts

    async def list_document_filenames(self, model_name: str | None, limit: int | None, offset: int) -> list[str]:
        """Each distinct file name once, oldest first; of one model, or of all if none. Raises ModelNotFound."""
        filenames = await self._store.list_document_filenames(self._resolve(model_name), limit, offset)
        self._check_model(model_name, is_empty=not filenames)
        return filenames

    def _check_model(self, model_name: str | None, *, is_empty: bool) -> None:
        """Tell a model without anything stored from a name that is no model's; a model that is gone may have texts."""
        if model_name is not None and is_empty:
            self._models.check_listed(model_name)

    def _resolve(self, model_name: str | None) -> str | None:
        return None if model_name is None else self._models.resolve(model_name)
