"""Documents in, the embedding of every sentence out; the same document again comes from the store.

A document is taken in by parts: a part's sentences are fitted into the model's window, embedded and stored, and what is
kept of them is where they stand. So a book takes no more memory than a page, and is read back from the store by parts
as well. No search finds any of its sentences before it is complete; then all are found at once. What is given up stays
for the next attempt, until it is deleted by its name or nobody has come back for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    InputType,
    NewDocument,
    RequestStamp,
    Sentence,
    SentencePlaces,
    StoredDocument,
    utc_now,
)
from llama_embeddings.documents.reader import DocumentReader, ReadDocument
from llama_embeddings.errors import NotFound, Unavailable, UnreadableDocument
from llama_embeddings.inference.engine import EmbeddingEngine
from llama_embeddings.services.document_files import DocumentFile
from llama_embeddings.services.embeddings import EmbeddingAnswer, EmbeddingService, Source
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.single_flight import Flight, SingleFlight
from llama_embeddings.storage.document_writes import DELETED_MEANWHILE
from llama_embeddings.storage.store import EmbeddingStore

logger = logging.getLogger(__name__)

SENTENCES_PER_CHUNK = 256
# While one chunk is written down and the next one is prepared, the engine has another to compute.
CHUNKS_IN_FLIGHT = 3

NO_PLACES = SentencePlaces(*(np.empty(0, np.int64) for _ in range(4)))

# Called with the sentences that are stored and, once it is known, with how many there are in all.
Report = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class _Key:
    """What tells documents apart."""

    file_hash: str
    filename: str
    model_name: str
    recipe: str
    segmentation: str


@dataclass(frozen=True, slots=True)
class DocumentAnswer:
    """A document and how it came about: from the store, or computed now."""

    document: StoredDocument
    source: Source


@dataclass(slots=True)
class _Intake:
    """A document while it is taken in: what is known of it so far, and where the sentences stand that are stored."""

    key: _Key
    stamp: RequestStamp
    collection: str
    # In the store; None until the file was read.
    row_id: int | None = None
    mimetype: str = ""
    # None until the file was read to its end.
    n_sentences: int | None = None
    n_done: int = 0
    row_ids: array[int] = field(default_factory=lambda: array("q"))
    pages: array[int] = field(default_factory=lambda: array("q"))
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, sentences: Sequence[Sentence], answers: Sequence[EmbeddingAnswer]) -> None:
        """Note where the next sentences stand, and which rows hold them."""
        self.row_ids.extend(answer.embedding.row_id for answer in answers)
        self.pages.extend(sentence.page or 0 for sentence in sentences)
        self.starts.extend(sentence.start for sentence in sentences)
        self.ends.extend(sentence.end for sentence in sentences)

    def places(self) -> SentencePlaces:
        columns = (self.row_ids, self.pages, self.starts, self.ends)
        return SentencePlaces(*(np.frombuffer(column, np.int64) for column in columns))


class DocumentService:
    """The one way from a file to its sentences' embeddings."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        embeddings: EmbeddingService,
        indexing: IndexService,
        reader: DocumentReader,
        *,
        keeps_files: bool,
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._indexing = indexing
        self._reader = reader
        self._keeps_files = keeps_files
        self._flights: SingleFlight[_Key, DocumentAnswer] = SingleFlight()
        self._intakes: list[_Intake] = []
        self._reports: defaultdict[_Key, list[Report]] = defaultdict(list)

    async def get_or_compute(
        self,
        file: DocumentFile,
        *,
        filename: str,
        model_name: str | None = None,
        collection: str = DEFAULT_COLLECTION,
        stamp: RequestStamp | None = None,
        report: Report | None = None,
    ) -> DocumentAnswer:
        """A file's sentences and vectors, all of them in the store when this returns.

        `report` is told of the progress, also where another caller's work on the same document is joined. Raises
        UnsupportedDocumentType, UnreadableDocument, RequestTooLarge, and what computing embeddings raises.
        """
        key = await self._identify(file, filename, model_name)

        async def fly(flight: Flight[_Key, DocumentAnswer]) -> dict[_Key, DocumentAnswer]:
            # A file of its own: who started the work may leave while others wait for it.
            with file.duplicate() as own_file:
                return {key: await self._find_or_take_in(own_file, key, collection, stamp or RequestStamp(), flight)}

        with self._reporting(key, report):
            answer = (await self._flights.run([key], fly))[key]
        # Whoever shared another's work, or finds it done, may want the document elsewhere.
        if collection not in answer.document.collections:
            await self._store.place_document(answer.document.row_id, collection)
        return answer

    async def _identify(self, file: DocumentFile, filename: str, model_name: str | None) -> _Key:
        file_hash = await asyncio.to_thread(file.compute_hash)
        recipe = (await self._models.recipe(model_name, InputType.DOCUMENT)).family
        name = self._models.resolve(model_name)
        return _Key(file_hash, filename, name, recipe, self._reader.segmentation)

    @contextlib.contextmanager
    def _reporting(self, key: _Key, report: Report | None) -> Iterator[None]:
        if report is None:
            yield
            return
        self._reports[key].append(report)
        try:
            yield
        finally:
            self._reports[key].remove(report)
            if not self._reports[key]:
                del self._reports[key]

    async def _find_or_take_in(
        self,
        file: DocumentFile,
        key: _Key,
        collection: str,
        stamp: RequestStamp,
        flight: Flight[_Key, DocumentAnswer],
    ) -> DocumentAnswer:
        found = await self._find(key)
        if found is not None:
            return DocumentAnswer(found, Source.STORE)
        return DocumentAnswer(await self._take_in(file, key, collection, stamp, flight), Source.COMPUTED)

    async def _find(self, key: _Key) -> StoredDocument | None:
        return await self._store.find_document(
            key.file_hash, key.filename, key.model_name, key.recipe, key.segmentation
        )

    async def _take_in(
        self,
        file: DocumentFile,
        key: _Key,
        collection: str,
        stamp: RequestStamp,
        flight: Flight[_Key, DocumentAnswer],
    ) -> StoredDocument:
        intake = _Intake(key, stamp, collection)
        self._intakes.append(intake)
        try:
            await self._embed(file, intake)
            if not intake.row_ids:
                raise UnreadableDocument("The document has no sentence that the model can read.", field="file")
            # Or some of its sentences could have been embedded by another model than the others.
            await self._models.check_current(key.model_name, key.recipe, InputType.DOCUMENT)
            flight.make_final()
            file_data = await asyncio.to_thread(file.read) if self._keeps_files else None
            await self._finish(intake, self._describe(intake, intake.places(), file_data))
            return await self._describe_stored(intake)
        except Unavailable:
            if intake.row_id is not None and not await self._store.is_being_written(intake.row_id):
                raise NotFound(DELETED_MEANWHILE) from None
            raise
        finally:
            self._intakes.remove(intake)

    async def _describe_stored(self, intake: _Intake) -> StoredDocument:
        assert intake.row_id is not None
        document = await self._store.describe_document(intake.row_id)
        if document is None:
            raise Unavailable("The document was deleted while it was being stored. Submit it again.")
        logger.info("Took in a document of %d sentences", document.n_sentences)
        return document

    def _describe(self, intake: _Intake, places: SentencePlaces, file_data: bytes | None) -> NewDocument:
        key = intake.key
        return NewDocument(
            filename=key.filename,
            mimetype=intake.mimetype,
            file_hash=key.file_hash,
            file_data=file_data,
            model_name=key.model_name,
            recipe=key.recipe,
            segmentation=key.segmentation,
            places=places,
            stamp=intake.stamp,
            response_time=utc_now(),
            collection=intake.collection,
        )

    async def _finish(self, intake: _Intake, new: NewDocument) -> None:
        """Write down where the sentences stand, put them into the index, and let all of them show in one moment."""
        assert intake.row_id is not None
        strays = await self._store.write_sentences(intake.row_id, new.places, intake.stamp.request_time)
        if strays.rows:
            await self._embeddings.forget(strays.rows)
        with self._embeddings.watch_deletions() as forgotten:
            try:
                async for row_ids in self._store.read_rows_to_show(intake.row_id):
                    found_ids, vectors = await self._store.read_vectors_of_rows(row_ids)
                    self._indexing.add(new.model_name, new.recipe, found_ids, vectors)
                await self._store.publish_document(intake.row_id, new)
            finally:
                await self._indexing.remove([(new.model_name, new.recipe, row_id) for row_id in sorted(forgotten)])

    @property
    def row_ids_being_written(self) -> list[int]:
        """The documents in the store that are being taken in now."""
        return [intake.row_id for intake in self._intakes if intake.row_id is not None]

    async def _embed(self, file: DocumentFile, intake: _Intake) -> None:
        """Every sentence computed and stored, some chunks at a time; what was stored stays if this ends early."""
        under_way: set[asyncio.Task[None]] = set()
        last: asyncio.Task[None] | None = None
        try:
            async for chunk in self._read_in_chunks(file, intake):
                last = asyncio.create_task(self._embed_chunk(chunk, intake, after=last))
                under_way.add(last)
                if len(under_way) >= CHUNKS_IN_FLIGHT:
                    under_way = await _wait_for_one(under_way)
            while under_way:
                under_way = await _wait_for_one(under_way)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _read_in_chunks(self, file: DocumentFile, intake: _Intake) -> AsyncIterator[Sequence[Sentence]]:
        """The file's sentences by chunks. The file's bytes are let go before the first."""
        document = await self.read(file, filename=intake.key.filename)
        intake.mimetype, intake.n_sentences = document.mimetype, len(document.sentences)
        if document.sentences:
            intake.row_id = await self._store.begin_document(self._describe(intake, NO_PLACES, None))
        self._tell(intake)
        for start in range(0, len(document.sentences), SENTENCES_PER_CHUNK):
            yield document.sentences[start : start + SENTENCES_PER_CHUNK]

    async def _embed_chunk(
        self, sentences: Sequence[Sentence], intake: _Intake, *, after: asyncio.Task[None] | None
    ) -> None:
        """Embed a chunk beside the one before it, and note its places after that one's."""
        assert intake.row_id is not None
        fitting = await self._fit(sentences, intake.key.model_name)
        answers = await self._embeddings.get_or_compute_sentences(
            [sentence.text for sentence in fitting],
            model_name=intake.key.model_name,
            document_row_id=intake.row_id,
            stamp=intake.stamp,
        )
        if after is not None:
            await asyncio.shield(after)
        intake.add(fitting, answers)
        intake.n_done += len(sentences)
        self._tell(intake)

    async def _fit(self, sentences: Sequence[Sentence], model_name: str) -> list[Sentence]:
        # Before the lease: a recipe may have to load the model, and a load waits until nobody uses what it replaces.
        prompt = (await self._models.recipe(model_name, InputType.DOCUMENT)).prompt
        async with self._models.lease(model_name) as engine:
            return await asyncio.to_thread(fit_sentences, engine, sentences, prompt)

    def _tell(self, intake: _Intake) -> None:
        for report in self._reports.get(intake.key, ()):
            report(intake.n_done, intake.n_sentences)

    async def read(self, file: DocumentFile, *, filename: str | None = None) -> ReadDocument:
        """A file's sentences, without embedding them. Raises UnsupportedDocumentType, UnreadableDocument."""
        return await self._reader.read(await asyncio.to_thread(file.read), filename=filename)

    async def find_by_row_id(self, row_id: int) -> StoredDocument | None:
        """A document that was taken in before, or None if it was deleted since."""
        return await self._store.describe_document(row_id)

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait until everything under way is committed; what takes longer is given up, unless it is being committed."""
        await self._flights.drain(timeout_seconds=timeout_seconds)


async def _wait_for_one(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Those that are left when the first ones are done. Raises what they raise."""
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


def fit_sentences(engine: EmbeddingEngine, sentences: Sequence[Sentence], prompt: str = "") -> list[Sentence]:
    """Sentences as the model can take them after its prompt: those too long for its window halved, none cut.

    Sentences without a single token are left out. Blocks for a while; call it on a thread.
    """
    n_special = engine.info.window - engine.info.room_for_text
    n_prompt_tokens = engine.count_tokens(prompt) - n_special
    fitting: list[Sentence] = []
    waiting = list(reversed(sentences))
    while waiting:
        sentence = waiting.pop()
        n_tokens = engine.count_tokens(sentence.text)
        if n_tokens + n_prompt_tokens > engine.info.window and len(sentence.text) > 1:
            waiting.extend(reversed(_halve(sentence)))
        elif n_tokens > n_special:
            fitting.append(sentence)
    return fitting


def _halve(sentence: Sentence) -> list[Sentence]:
    """Two halves, parted at the space nearest to the middle; offsets are shared out in proportion."""
    middle = len(sentence.text) // 2
    spaces = (sentence.text.rfind(" ", 1, middle), sentence.text.find(" ", middle, len(sentence.text) - 1))
    cut = min((place for place in spaces if place > 0), key=lambda place: abs(place - middle), default=middle)
    texts = (sentence.text[:cut].strip(), sentence.text[cut:].strip())
    offset = sentence.start + (sentence.end - sentence.start) * cut // len(sentence.text)
    return [
        replace(sentence, text=text, start=start, end=end)
        for text, start, end in zip(texts, (sentence.start, offset), (offset, sentence.end), strict=True)
        if text
    ]
