"""Whether the server can do its work: compute an embedding, keep it, find its files.

Asks each part for the real thing, past all caches. A full queue is no fault: the check goes in front of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_embeddings.errors import NotReady, ServiceError
from llama_embeddings.services.models import ModelService
from llama_embeddings.storage.store import EmbeddingStore

RETRY_AFTER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """What the check found: the default model's name, and the seconds that its embedding took."""

    model_name: str
    embedding_seconds: float


class ReadinessService:
    """Asked by those who decide whether requests are sent here."""

    def __init__(self, store: EmbeddingStore, models: ModelService, *, timeout_seconds: float) -> None:
        self._store = store
        self._models = models
        self._timeout_seconds = timeout_seconds
        self._is_stopping = False

    def stop(self) -> None:
        """From now on the server is not ready, whatever its parts say: it has been asked to end."""
        self._is_stopping = True

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    async def check(self) -> Readiness:
        """Raises NotReady with the reason; its `code` is that of the part's own error."""
        if self._is_stopping:
            raise self._describe("shutting_down", "The server is shutting down.")
        try:
            await self._store.check_file()
            await self._store.check_writable()
            seconds = await self._models.compute_probe(timeout_seconds=self._timeout_seconds)
        except ServiceError as error:
            raise self._describe(error.code, error.message) from error
        return Readiness(self._models.resolve(None), seconds)

    def _describe(self, code: str, reason: str) -> NotReady:
        described = NotReady(f"Not ready: {reason}", retry_after_seconds=RETRY_AFTER_SECONDS)
        described.code = code
        return described
