"""Reads documents in a process of its own, so that parsing never holds up the server's event loop.

Text extraction and sentence splitting are pure Python and hold the interpreter's lock for long stretches. Knows no
store and no engine.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from embeddings_data_models import Sentence
from llama_embeddings.documents.extraction import DEFAULT_LIMITS, ExtractionLimits, extract_text
from llama_embeddings.documents.sentences import segmentation_key, split_into_sentences
from llama_embeddings.errors import UnreadableDocument

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadDocument:
    """What came out of a file."""

    mimetype: str
    sentences: tuple[Sentence, ...]


def read_document(data: bytes, minimum_length: int, limits: ExtractionLimits = DEFAULT_LIMITS) -> ReadDocument:
    """Bytes to sentences. Raises what extract_text raises, and UnreadableDocument if no sentence is long enough."""
    document = extract_text(data, limits=limits)
    sentences = split_into_sentences(document, minimum_length=minimum_length)
    if not sentences:
        raise UnreadableDocument(
            f"The document has no sentence of at least {minimum_length} characters "
            "(MINIMUM_STRING_LENGTH_FOR_DOCUMENT_EMBEDDING).",
            field="file",
        )
    return ReadDocument(document.mimetype, tuple(sentences))


class DocumentReader:
    """Hands files to the reading process, which is started for the first one."""

    def __init__(self, *, minimum_length: int) -> None:
        self._minimum_length = minimum_length
        self._pool: ProcessPoolExecutor | None = None

    @property
    def segmentation(self) -> str:
        """Part of a document's cache key: another minimum or another splitter gives other sentences."""
        return segmentation_key(self._minimum_length)

    async def read(self, data: bytes) -> ReadDocument:
        """See read_document."""
        if self._pool is None:
            # A forked child would inherit the engine's locks in whatever state they are.
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        try:
            # On a thread: the first submission starts the process, which takes its time.
            future = await asyncio.to_thread(self._pool.submit, read_document, data, self._minimum_length)
            return await asyncio.wrap_future(future)
        except BrokenProcessPool:
            self._pool = None
            logger.exception("The process that reads documents died; the next document gets a new one")
            raise UnreadableDocument(
                "The document could not be read: it made the reading process fail.", field="file"
            ) from None

    def close(self) -> None:
        """End the reading process; a document that is being read is given up."""
        if self._pool is not None:
            # The pool has no public way to stop a task that is running.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
