"""Embeddings of texts: found in memory or in the store, or computed now and kept.

A text is looked for under the recipe of whole texts. Only what is in nobody's hands yet is tokenised, computed,
committed and indexed, in this order, before anybody gets the answer. A text longer than the window follows the
truncation rule and is kept under a recipe of its own, so that a cut text's vector is never taken for the whole one's.

A text is kept in the collection that it is asked for in; one that is known from elsewhere is put there as well, before
anybody gets the answer. What is asked for as a query is in no collection, whichever is named, and no search finds it
until it is asked for as a text, from which moment on it counts as one. A search does not wait until its query is kept.
A sentence is kept for a document, and found with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    InputType,
    NewEmbedding,
    Recipe,
    RequestStamp,
    StoredEmbedding,
    Truncation,
    compute_text_hash,
    recipe_family,
    utc_now,
)
from llama_embeddings.errors import ServiceError, StoreUnusable, Unavailable
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.observability import TimedStore, note_engine
from llama_embeddings.services.forgotten_rows import ForgottenRows
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.services.known_texts import KnownTexts
from llama_embeddings.services.memory_cache import EmbeddingMemoryCache
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.single_flight import Flight, SingleFlight
from llama_embeddings.services.texts import TextLimits, check_texts, place_of
from llama_embeddings.storage.changes import CommittedRow
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.storage.writes import RemovedRow

# In place of the id of a row that is not written yet.
_NO_ROW = 0
# Those who list wait for queries that are being kept, but not until a locked database is given up.
MAX_WAIT_FOR_QUERIES_SECONDS = 1.0


class Source(StrEnum):
    """Where an answer came from."""

    MEMORY = "memory"
    STORE = "store"
    COMPUTED = "computed"


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """One text's embedding and how it came about. `vector`: float32 (n_dims,) of unit length."""

    embedding: StoredEmbedding
    source: Source
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def vector(self) -> np.ndarray:
        return self.embedding.vector

    @property
    def n_tokens(self) -> int:
        return self.embedding.n_tokens

    @property
    def n_tokens_dropped(self) -> int:
        return self.embedding.n_tokens_dropped


@dataclass(frozen=True, slots=True)
class _Task:
    """What is the same for all texts of a request."""

    model_name: str
    recipe: Recipe
    truncation: Truncation
    stamp: RequestStamp
    # None for a query, and for a sentence of a document, which is the other.
    collection: str | None = None
    document_row_id: int | None = None
    # Whether the answer says that the text is kept.
    is_promised: bool = True

    @property
    def is_searchable(self) -> bool:
        return self.collection is not None or self.document_row_id is not None

    def is_placed(self, embedding: StoredEmbedding) -> bool:
        """Whether a known text is where this request wants it. Sentences are put there with their document."""
        return self.collection is None or self.collection in embedding.collections


# Text hash, model name, recipe family, truncation: the outcome of a long text depends on the last.
_FlightKey = tuple[str, str, str, Truncation]
_Outcome = EmbeddingAnswer | ServiceError


class EmbeddingService:
    """The one way to an embedding, for every endpoint and dialect."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        indexing: IndexService,
        memory: EmbeddingMemoryCache,
        known: KnownTexts,
        *,
        limits: TextLimits,
        default_truncation: Truncation,
    ) -> None:
        self._store = store
        self._models = models
        self._indexing = indexing
        self._memory = memory
        self._known = known
        self._limits = limits
        self._default_truncation = default_truncation
        self._flights: SingleFlight[_FlightKey, _Outcome] = SingleFlight()
        self._forgotten = ForgottenRows()
        # Queries that are just being kept; nobody waits for them but those who list or delete.
        self._keeping: set[asyncio.Task[object]] = set()
        self.n_answers = dict.fromkeys(Source, 0)

    async def get_or_compute(
        self,
        texts: Sequence[str],
        *,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        input_type: InputType | None = None,
        collection: str | None = DEFAULT_COLLECTION,
        stamp: RequestStamp | None = None,
        field: str | Sequence[str] = "text",
    ) -> list[EmbeddingAnswer]:
        """Embeddings of all texts, in order. Equal texts are looked up and computed once.

        The texts are put into `collection`, unless they are queries, which are in none. With None the vectors are
        wanted for the moment: they are kept as queries are, if that can be done, and nobody waits for it.
        `field` is what errors call the texts' place: one name for a list, or one for each text.

        Raises the first text's error with its index, after the others have been computed and kept: InvalidInput,
        ContextLengthExceeded, RequestTooLarge, ModelNotFound, Overloaded, StoreBusy and their like.
        """
        hashes = check_texts(texts, self._limits, field=field)
        task = await self._make_task(
            model_name,
            truncation or self._default_truncation,
            input_type,
            stamp,
            collection=None if input_type is InputType.QUERY else collection,
            is_promised=collection is not None,
        )
        return await self._answer(texts, hashes, task, field)

    async def get_or_compute_sentences(
        self, texts: Sequence[str], *, model_name: str, document_row_id: int, stamp: RequestStamp
    ) -> list[EmbeddingAnswer]:
        """The same for parts of a document, which are bounded by the limits of documents, not of requests.

        They are in the collections of the documents that hold them, and in none by themselves. No search finds them
        before the document is there. Raises Unavailable if the document was deleted meanwhile, too.
        """
        hashes = [compute_text_hash(text) for text in texts]
        task = await self._make_task(
            model_name, Truncation.REFUSE, InputType.DOCUMENT, stamp, document_row_id=document_row_id
        )
        return await self._answer(texts, hashes, task, "file")

    async def _make_task(
        self,
        model_name: str | None,
        truncation: Truncation,
        input_type: InputType | None,
        stamp: RequestStamp | None,
        *,
        collection: str | None = None,
        document_row_id: int | None = None,
        is_promised: bool = True,
    ) -> _Task:
        recipe = await self._models.recipe(model_name, input_type)
        name = self._models.resolve(model_name)
        return _Task(name, recipe, truncation, stamp or RequestStamp(), collection, document_row_id, is_promised)

    async def _answer(
        self, texts: Sequence[str], hashes: Sequence[str], task: _Task, field: str | Sequence[str]
    ) -> list[EmbeddingAnswer]:
        outcomes = await self._get_all(dict(zip(hashes, texts, strict=True)), task)
        answers = []
        for index, text_hash in enumerate(hashes):
            outcome = outcomes[text_hash]
            if isinstance(outcome, ServiceError):
                name, place = place_of(field, index, len(texts))
                raise outcome.located(field=name, index=place)
            answers.append(outcome)
            self.n_answers[outcome.source] += 1
        return answers

    async def _get_all(self, texts: dict[str, str], task: _Task) -> dict[str, _Outcome]:
        outcomes: dict[str, _Outcome] = {}
        missing: list[_FlightKey] = []
        for text_hash in texts:
            remembered = self._memory.get((text_hash, task.model_name, task.recipe.family))
            if remembered is not None:
                outcomes[text_hash] = EmbeddingAnswer(remembered, Source.MEMORY)
            else:
                missing.append((text_hash, task.model_name, task.recipe.family, task.truncation))
        if missing:
            found = await self._flights.run(missing, lambda flight: self._fly(flight, texts, task))
            outcomes.update({key[0]: outcome for key, outcome in found.items()})
        # Only now: whoever shared another's work may want its text elsewhere, or want it kept.
        found_embeddings = [outcome.embedding for outcome in outcomes.values() if isinstance(outcome, EmbeddingAnswer)]
        strangers = [embedding for embedding in found_embeddings if not task.is_placed(embedding)]
        if strangers and task.collection is not None:
            gone = await self._place(strangers, task, task.collection)
            if gone:
                # Deleted meanwhile, or a query that could not be kept: looked for and kept like a new text.
                outcomes |= await self._get_all({text_hash: texts[text_hash] for text_hash in gone}, task)
        elif task.is_promised:
            unkept = [embedding.text_hash for embedding in found_embeddings if embedding.row_id == _NO_ROW]
            if unkept:
                outcomes |= await self._get_all({text_hash: texts[text_hash] for text_hash in unkept}, task)
        return outcomes

    async def _place(self, embeddings: Sequence[StoredEmbedding], task: _Task, collection: str) -> list[str]:
        """Put known texts into the collection that they are asked for in; what was a query only can be found now.

        Returns the hashes of those whose rows are gone.
        """
        with self._forgotten.watch() as forgotten:
            wanted = [embedding.row_id for embedding in embeddings]
            row_ids_there = await self._store.place_embeddings(wanted, collection, task.stamp.request_time)
            gone = [embedding for embedding in embeddings if embedding.row_id not in row_ids_there]
            self._memory.discard_rows({embedding.row_id for embedding in gone})
            embeddings = [embedding for embedding in embeddings if embedding.row_id in row_ids_there]
            # Queries are in no index, nor are sentences of documents that are not there; others are left as they are.
            found_now = [embedding for embedding in embeddings if not embedding.collections]
            if found_now:
                row_ids = np.array([embedding.row_id for embedding in found_now], np.int64)
                vectors = np.stack([embedding.vector for embedding in found_now])
                self._indexing.add(task.model_name, task.recipe.family, row_ids, vectors)
            for embedding in embeddings:
                placed = replace(embedding, collections=embedding.collections | {collection}, is_searchable=True)
                self._memory.replace((embedding.text_hash, task.model_name, task.recipe.family), placed)
            await self._clear_up(forgotten, task)
        return [embedding.text_hash for embedding in gone]

    async def _fly(self, flight: Flight[_FlightKey, _Outcome], texts: dict[str, str], task: _Task) -> dict:
        """Find or compute what this flight was started for; the answers are committed and indexed."""
        with self._forgotten.watch() as forgotten:
            try:
                return await self._find_or_compute(flight, texts, task)
            finally:
                await self._clear_up(forgotten, task)

    async def _clear_up(self, forgotten: set[int], task: _Task) -> None:
        """Take out again what was deleted while it was put into memory and index."""
        if forgotten:
            self._memory.discard_rows(forgotten)
            await self._indexing.remove([(task.model_name, task.recipe.family, row_id) for row_id in sorted(forgotten)])

    async def _find_or_compute(self, flight: Flight[_FlightKey, _Outcome], texts: dict[str, str], task: _Task) -> dict:
        wanted = {key[0]: texts[key[0]] for key in flight.keys}
        maybe_stored = [text_hash for text_hash in wanted if self._known.may_hold(text_hash)]
        outcomes: dict[str, _Outcome] = dict(await self._find_stored(maybe_stored, task, task.recipe.family))
        unknown = {text_hash: text for text_hash, text in wanted.items() if text_hash not in outcomes}
        if unknown:
            if task.is_searchable:
                self._store.require_writer()
            async with self._models.lease(task.model_name, task.recipe) as engine:
                outcomes |= await self._compute(engine, unknown, task, flight)
        return {key: outcomes[key[0]] for key in flight.keys}

    async def _find_stored(self, hashes: list[str], task: _Task, recipe: str) -> dict[str, EmbeddingAnswer]:
        if not hashes:
            return {}
        with TimedStore():
            found = await self._store.find_embeddings(hashes, task.model_name, recipe)
        for text_hash, embedding in found.items():
            self._memory.put((text_hash, task.model_name, recipe), embedding)
        return {text_hash: EmbeddingAnswer(embedding, Source.STORE) for text_hash, embedding in found.items()}

    async def _compute(
        self, engine: EmbeddingEngine, texts: dict[str, str], task: _Task, flight: Flight[_FlightKey, _Outcome]
    ) -> dict[str, _Outcome]:
        prompted = [task.recipe.prompt + text for text in texts.values()]
        prepared = dict(zip(texts, await engine.prepare(prompted, task.truncation), strict=True))
        outcomes: dict[str, _Outcome] = {
            text_hash: outcome for text_hash, outcome in prepared.items() if isinstance(outcome, ServiceError)
        }
        ready = {text_hash: text for text_hash, text in prepared.items() if isinstance(text, PreparedText)}
        cut_recipe = task.recipe.for_cut_text(task.truncation, engine.info.window)
        cut = [text_hash for text_hash, text in ready.items() if not text.is_whole]
        maybe_stored = [text_hash for text_hash in cut if self._known.may_hold(text_hash)]
        outcomes |= await self._find_stored(maybe_stored, task, cut_recipe)
        ready = {text_hash: text for text_hash, text in ready.items() if text_hash not in outcomes}
        results = dict(zip(ready, await engine.embed(list(ready.values())), strict=True))
        outcomes |= {text_hash: result for text_hash, result in results.items() if isinstance(result, ServiceError)}
        rows = [
            self._make_row(texts[text_hash], text_hash, ready[text_hash], result, task, cut_recipe)
            for text_hash, result in results.items()
            if isinstance(result, EngineResult)
        ]
        flight.make_final()
        kept = await self._keep(rows) if task.is_promised else self._keep_later(rows, task)
        for text_hash, embedding in kept.items():
            result = results[text_hash]
            assert isinstance(result, EngineResult)
            note_engine(queue_seconds=result.queue_seconds, compute_seconds=result.compute_seconds)
            outcomes[text_hash] = EmbeddingAnswer(
                embedding, Source.COMPUTED, result.queue_seconds, result.compute_seconds
            )
        return outcomes

    def _make_row(
        self, text: str, text_hash: str, prepared: PreparedText, result: EngineResult, task: _Task, cut_recipe: str
    ) -> NewEmbedding:
        return NewEmbedding(
            text=text,
            text_hash=text_hash,
            model_name=task.model_name,
            recipe=task.recipe.family if prepared.is_whole else cut_recipe,
            vector=result.vector,
            n_tokens=result.n_tokens,
            n_tokens_dropped=result.n_tokens_dropped,
            stamp=task.stamp,
            response_time=utc_now(),
            collection=task.collection,
            is_searchable=task.is_searchable,
            document_row_id=task.document_row_id,
        )

    def _keep_later(self, rows: Sequence[NewEmbedding], task: _Task) -> dict[str, StoredEmbedding]:
        """Let queries be kept for the next one to ask the same; a search goes on without waiting for that."""
        if rows:
            keeping = asyncio.create_task(self._keep_if_possible(rows, task))
            self._keeping.add(keeping)
            keeping.add_done_callback(self._keeping.discard)
        return {row.text_hash: _describe_unkept(row) for row in rows}

    async def _keep_if_possible(self, rows: Sequence[NewEmbedding], task: _Task) -> None:
        with self._forgotten.watch() as forgotten, contextlib.suppress(Unavailable, StoreUnusable):
            await self._keep(rows)
            await self._clear_up(forgotten, task)

    async def settle(self) -> None:
        """Wait for the queries that are being kept now: who lists or deletes what is stored counts them in."""
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=MAX_WAIT_FOR_QUERIES_SECONDS)

    async def _keep(self, rows: Sequence[NewEmbedding]) -> dict[str, StoredEmbedding]:
        """Commit, index, remember."""
        if not rows:
            return {}
        with TimedStore():
            row_ids = await self._store.add_embeddings(rows)
        self._known.add(row.text_hash for row in rows)
        # Those of a collection; sentences are found with their document.
        if rows[0].collection is not None:
            vectors = np.stack([row.vector for row in rows])
            self._indexing.add(rows[0].model_name, recipe_family(rows[0].recipe), np.array(row_ids, np.int64), vectors)
        collections = frozenset() if rows[0].collection is None else frozenset([rows[0].collection])
        kept = {}
        for row_id, row in zip(row_ids, rows, strict=True):
            embedding = StoredEmbedding(
                row_id,
                row.text_hash,
                row.vector,
                row.n_tokens,
                row.n_tokens_dropped,
                collections,
                row.is_searchable,
            )
            self._memory.put((row.text_hash, row.model_name, row.recipe), embedding)
            kept[row.text_hash] = embedding
        return kept

    def watch_deletions(self) -> contextlib.AbstractContextManager[set[int]]:
        """A set of the row ids that are deleted while the context lasts, for those who put rows into the index."""
        return self._forgotten.watch()

    async def forget(self, removed: Iterable[RemovedRow]) -> None:
        """Take deleted rows out of memory and index, also where they are just being put there."""
        rows = list(removed)
        self.discard({row_id for *_, row_id in rows})
        await self._indexing.remove(rows)

    def discard(self, row_ids: set[int]) -> None:
        """Take deleted rows out of memory alone, where an index is told of many together."""
        self._forgotten.announce(row_ids)
        self._memory.discard_rows(row_ids)
        # Who asks from now on must not share work whose row may be among the deleted.
        self._flights.detach()

    async def take_over(self, read: Callable[[], Awaitable[Sequence[CommittedRow]]]) -> Sequence[CommittedRow]:
        """Let rows that another process committed be known and found; `read` brings them. Returns them.

        What is deleted here while they are on their way is taken out again.
        """
        with self._forgotten.watch() as forgotten:
            rows = await read()
            self._known.add(row.text_hash for row in rows)
            self._memory.discard_rows({row.row_id for row in rows})
            searchable: defaultdict[tuple[str, str], list[CommittedRow]] = defaultdict(list)
            for row in rows:
                if row.is_searchable:
                    searchable[row.model_name, recipe_family(row.recipe)].append(row)
            for (model_name, family), group in searchable.items():
                row_ids = np.array([row.row_id for row in group], np.int64)
                self._indexing.add(model_name, family, row_ids, np.stack([row.vector for row in group]))
            gone = [(row.model_name, row.recipe, row.row_id) for row in rows if row.row_id in forgotten]
            await self._indexing.remove(gone)
        return rows

    async def doubt_everything(self) -> None:
        """Compare the indexes with the database, and forget what is in memory: too much changed to be told of it."""
        await self.forget(await self._indexing.reconcile())
        self._memory.clear()

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait until everything under way is committed; what takes longer is given up, unless it is being committed."""
        await self._flights.drain(timeout_seconds=timeout_seconds)
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=timeout_seconds)


def _describe_unkept(row: NewEmbedding) -> StoredEmbedding:
    return StoredEmbedding(
        _NO_ROW, row.text_hash, row.vector, row.n_tokens, row.n_tokens_dropped, frozenset(), is_searchable=False
    )
