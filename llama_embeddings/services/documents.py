"""Documents in, the embedding of every sentence out; the same document again comes from the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha3_256

import numpy as np

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    InputType,
    NewDocument,
    RequestStamp,
    Sentence,
    StoredDocument,
    utc_now,
)
from llama_embeddings.documents.reader import DocumentReader
from llama_embeddings.errors import UnreadableDocument
from llama_embeddings.inference.engine import EmbeddingEngine
from llama_embeddings.services.embeddings import EmbeddingAnswer, EmbeddingService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.single_flight import Flight, SingleFlight
from llama_embeddings.storage.store import EmbeddingStore

logger = logging.getLogger(__name__)

SENTENCES_PER_CHUNK = 256
# Two chunks under way keep the engine busy while one is being written down.
CHUNKS_IN_FLIGHT = 2

_Key = tuple[str, str, str, str, str]


class DocumentService:
    """The one way from a file to its sentences' embeddings."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        embeddings: EmbeddingService,
        reader: DocumentReader,
        *,
        keeps_files: bool,
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._reader = reader
        self._keeps_files = keeps_files
        self._flights: SingleFlight[_Key, StoredDocument] = SingleFlight()

    async def get_or_compute(
        self,
        data: bytes,
        *,
        filename: str,
        model_name: str | None = None,
        collection: str = DEFAULT_COLLECTION,
        stamp: RequestStamp | None = None,
    ) -> StoredDocument:
        """Sentences and vectors of a file. Raises UnsupportedDocumentType, UnreadableDocument, RequestTooLarge."""
        file_hash = await asyncio.to_thread(lambda: sha3_256(data).hexdigest())
        name = self._models.resolve(model_name)
        recipe = (await self._models.recipe(model_name, InputType.DOCUMENT)).family
        key = (file_hash, filename, name, recipe, self._reader.segmentation)

        async def fly(flight: Flight[_Key, StoredDocument]) -> dict[_Key, StoredDocument]:
            found = await self._store.find_document(*key)
            return {key: found or await self._take_in(data, key, collection, stamp or RequestStamp(), flight)}

        document = (await self._flights.run([key], fly))[key]
        if collection not in document.collections:
            await self._store.place_document(document.row_id, collection)
        return document

    async def _take_in(
        self, data: bytes, key: _Key, collection: str, stamp: RequestStamp, flight: Flight[_Key, StoredDocument]
    ) -> StoredDocument:
        file_hash, filename, name, recipe, segmentation = key
        document = await self._reader.read(data)
        async with self._models.lease(name) as engine:
            prompt = (await self._models.recipe(name, InputType.DOCUMENT)).prompt
            sentences = await asyncio.to_thread(fit_sentences, engine, document.sentences, prompt)
        if not sentences:
            raise UnreadableDocument("The document has no sentence that the model can read.", field="file")
        answers = await self._embed(sentences, name, stamp)
        flight.make_final()
        new = NewDocument(
            filename=filename,
            mimetype=document.mimetype,
            file_hash=file_hash,
            file_data=data if self._keeps_files else None,
            model_name=name,
            recipe=recipe,
            segmentation=segmentation,
            sentences=tuple(sentences),
            embedding_row_ids=tuple(answer.embedding.row_id for answer in answers),
            stamp=stamp,
            response_time=utc_now(),
            collection=collection,
        )
        row_id = await self._store.add_document(new)
        logger.info("Took in a document of %d bytes: %d sentences", len(data), len(sentences))
        vectors = np.stack([answer.vector for answer in answers])
        return StoredDocument(row_id, filename, new.sentences, vectors, frozenset([collection]))

    async def _embed(self, sentences: Sequence[Sentence], name: str, stamp: RequestStamp) -> list[EmbeddingAnswer]:
        gate = asyncio.Semaphore(CHUNKS_IN_FLIGHT)

        async def embed_chunk(chunk: Sequence[Sentence]) -> list[EmbeddingAnswer]:
            async with gate:
                return await self._embeddings.get_or_compute_sentences(
                    [sentence.text for sentence in chunk], model_name=name, stamp=stamp
                )

        starts = range(0, len(sentences), SENTENCES_PER_CHUNK)
        async with asyncio.TaskGroup() as group:
            chunks = [
                group.create_task(embed_chunk(sentences[start : start + SENTENCES_PER_CHUNK])) for start in starts
            ]
        return [answer for chunk in chunks for answer in chunk.result()]

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait until everything under way is committed; what takes longer is given up, unless it is being committed."""
        await self._flights.drain(timeout_seconds=timeout_seconds)


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
