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
        """Each distinct text once, oldest first; of one model, or of all if none is named."""
        return await self._store.list_texts(self._resolve(model_name), limit, offset)

    async def list_document_filenames(self, model_name: str | None, limit: int | None, offset: int) -> list[str]:
        """Each distinct file name once, oldest first; of one model, or of all if none is named."""
        return await self._store.list_document_filenames(self._resolve(model_name), limit, offset)

    def _resolve(self, model_name: str | None) -> str | None:
        return None if model_name is None else self._models.resolve(model_name)
