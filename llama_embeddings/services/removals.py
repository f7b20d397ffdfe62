"""Removal of documents, by parts, once they show no more: now, or after an interruption.

A document that is deleted is gone for everybody in one moment; what it consists of is removed after that. What an
interrupted removal left is removed in the background, and after a while what was begun and never finished.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

from embeddings_data_models import utc_now
from llama_embeddings.errors import ServiceError
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.token_index import TokenIndex
from llama_embeddings.storage.statements import DocumentSelection
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.storage.writes import Removal

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_ROUNDS = 60.0
MIN_KEEP_UNFINISHED = timedelta(hours=1)


class DocumentRemovals:
    """Used on the event loop; idle until `start`."""

    def __init__(
        self,
        store: EmbeddingStore,
        embeddings: EmbeddingService,
        token_index: TokenIndex,
        *,
        keep_unfinished: timedelta,
        find_row_ids_being_written: Callable[[], Sequence[int]],
    ) -> None:
        self._store = store
        self._embeddings = embeddings
        self._token_index = token_index
        # Another process may be at work with one, of which this one knows nothing.
        self._keep_unfinished = max(keep_unfinished, MIN_KEEP_UNFINISHED)
        self._find_row_ids_being_written = find_row_ids_being_written
        self._under_way: set[asyncio.Task[Removal]] = set()
        self._rounds: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with what an earlier process left, and look again from time to time."""
        self._rounds = asyncio.create_task(self._go_round(), name="document-removals")

    async def stop(self) -> None:
        """Stop; what is left is removed after the next start."""
        tasks = [*self._under_way, *([self._rounds] if self._rounds is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def delete(self, filename: str, *, model_name: str | None, collection: str | None) -> Removal:
        """Delete documents, see EmbeddingStore.hide_documents; what went, which is yet to be erased."""
        hidden = await self._store.hide_documents(filename, model_name=model_name, collection=collection)
        # Goes on if the caller leaves: nobody else would come back to it soon.
        return replace(await self._see_through(hidden.row_ids), n_documents=hidden.n_documents)

    async def delete_unfinished(self, filename: str, *, model_name: str, collection: str) -> None:
        """Remove what is left of a document that was given up, unless somebody is at work with it."""
        row_ids = await self._store.hide_leftovers(
            utc_now(),
            excepted=self._find_row_ids_being_written(),
            documents=DocumentSelection(filename, model_name, collection),
        )
        await self._store.erase(await self._see_through(row_ids))

    async def _see_through(self, row_ids: Sequence[int]) -> Removal:
        removal = asyncio.create_task(self._remove_all(row_ids))
        self._under_way.add(removal)
        removal.add_done_callback(self._under_way.discard)
        # The caller may be gone when it fails; it is tried again in the next round.
        removal.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(removal)

    async def _remove_all(self, row_ids: Sequence[int]) -> Removal:
        removed = Removal()
        for row_id in row_ids:
            await self._remove(row_id, removed)
        return removed

    async def _remove(self, row_id: int, removed: Removal) -> None:
        removed_here = Removal()
        try:
            async for part in self._store.remove_document(row_id):
                removed_here.extend(part)
                self._embeddings.discard({row_id for *_, row_id in part.rows})
        finally:
            # At the end, as an index reads all that it holds for each removal; a search finds none of them before.
            await self._embeddings.forget(removed_here.rows)
            await self._token_index.remove(removed_here.bundles)
        removed.extend(removed_here)

    async def _go_round(self) -> None:
        while True:
            try:
                excepted = self._find_row_ids_being_written()
                await self._store.hide_leftovers(utc_now() - self._keep_unfinished, excepted=excepted)
                removed = await self._remove_all(await self._store.find_documents_being_removed())
                if removed.document_embedding_ids:
                    await self._store.erase(removed)
                    logger.info(
                        "Removed %d sentences of documents that are gone or were never finished", len(removed.rows)
                    )
            except ServiceError as error:
                logger.warning("Documents that are gone cannot be removed, tried again later: %s", error.message)
            await asyncio.sleep(SECONDS_BETWEEN_ROUNDS)
