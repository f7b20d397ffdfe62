"""Keeps what this process believes of the database true when other processes commit to it.

A command may take in documents beside a server, and a replica reads what a server writes. What is believed: the
indexes, the embeddings in memory, the filter of known texts, the names of collections. New rows are found by their ids;
rows that were deleted, or that searches find or do not find any more, by the changes that the database notes.

Its own commits do not wake a process: it acts on them itself, when it makes them.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from embeddings_data_models import recipe_family
from llama_embeddings.errors import ServiceError
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.known_texts import OF_TOKENS, KnownTexts
from llama_embeddings.services.token_index import TokenIndex
from llama_embeddings.storage.changes import BUNDLES, EMBEDDINGS, CommittedRow, Positions, RowChange
from llama_embeddings.storage.store import EmbeddingStore

logger = logging.getLogger(__name__)

# Others' commits are seen after this long: a look costs some microseconds of the writer's thread.
INTERVAL_SECONDS = 0.25
PAUSE_AFTER_FAILURE_SECONDS = 2.0
ROWS_PER_READ = 512
BUNDLES_PER_READ = 32
CHANGES_PER_READ = 5_000


class StoreFollower:
    """A task that looks for others' commits from `start` to `stop`."""

    def __init__(
        self,
        store: EmbeddingStore,
        positions: Positions,
        embeddings: EmbeddingService,
        token_index: TokenIndex,
        known: KnownTexts,
    ) -> None:
        """`positions` were read before indexes and filter were filled: what came later is taken note of here."""
        self._store = store
        self._positions = positions
        self._embeddings = embeddings
        self._token_index = token_index
        self._known = known
        self._mark: object = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look at once, then again and again."""
        self._task = asyncio.create_task(self._run(), name="store-follower")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            pause = INTERVAL_SECONDS
            try:
                await self.look()
            except Exception as error:
                # Whatever it was: a process that stops looking would answer for ever with what others deleted.
                trace = None if isinstance(error, ServiceError) else error
                logger.warning("Others' commits cannot be seen, and will be looked for: %s", error, exc_info=trace)
                pause = PAUSE_AFTER_FAILURE_SECONDS
            await asyncio.sleep(pause)

    async def look(self) -> None:
        """Take note of what others committed since the last look."""
        # In this order: what is committed after the mark was read shows in the next one.
        newest = await self._store.read_positions()
        mark = await self._store.read_commit_mark()
        if mark != self._mark:
            self._store.note_foreign_commits()
            await self._take_over_rows()
            await self._take_over_bundles()
            await self._take_note_of_changes()
            self._mark = mark
        else:
            # All of it is this process's own.
            self._positions = newest

    async def _take_over_rows(self) -> None:
        while rows := await self._embeddings.take_over(self._read_next_rows):
            self._positions = replace(self._positions, row_id=rows[-1].row_id)

    async def _read_next_rows(self) -> list[CommittedRow]:
        return await self._store.read_rows_after(self._positions.row_id, limit=ROWS_PER_READ)

    async def _take_over_bundles(self) -> None:
        while bundles := await self._store.read_bundles_after(self._positions.bundle_id, limit=BUNDLES_PER_READ):
            self._known.add((bundle.text_hash for bundle in bundles), OF_TOKENS)
            for bundle in bundles:
                if len(bundle.matrix):
                    self._token_index.add(bundle.model_name, bundle.recipe, bundle)
            self._positions = replace(self._positions, bundle_id=bundles[-1].row_id)

    async def _take_note_of_changes(self) -> None:
        """After the rows, so that one that came and went since the last look is gone in the end."""
        while changes := await self._store.read_changes_after(self._positions.change_id, limit=CHANGES_PER_READ):
            if changes[0].id != self._positions.change_id + 1:
                logger.info("More changed than is noted: the indexes are held against the database")
                await self._embeddings.doubt_everything()
                newest = await self._store.read_positions()
                self._positions = replace(self._positions, change_id=max(changes[-1].id, newest.change_id))
                continue
            await self._follow_embeddings([change for change in changes if change.kind == EMBEDDINGS])
            await self._token_index.remove(
                [
                    (change.model_name, recipe_family(change.recipe), change.row_id, change.n_tokens)
                    for change in changes
                    if change.kind == BUNDLES
                ]
            )
            self._positions = replace(self._positions, change_id=changes[-1].id)

    async def _follow_embeddings(self, changes: list[RowChange]) -> None:
        row_ids = list({change.row_id for change in changes})
        rows = await self._embeddings.take_over(lambda: self._store.read_rows(row_ids))
        there = {row.row_id for row in rows if row.is_searchable}
        gone = {(change.model_name, change.recipe, change.row_id) for change in changes if change.row_id not in there}
        if gone:
            await self._embeddings.forget(sorted(gone))
