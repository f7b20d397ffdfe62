"""What runs in the process that reads documents: bounded in memory, without the server's secrets, replaceable.

Takes a file's name and bytes from a connection and answers with sentences in chunks, then with the type, or with an
error. Time is bounded by the parent, which ends the process.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection

from embeddings_data_models import Sentence
from llama_embeddings.documents.extracted import ExtractionLimits, OcrOptions
from llama_embeddings.documents.extraction import extract_text
from llama_embeddings.documents.sentences import find_sentences
from llama_embeddings.errors import ServiceError, UnreadableDocument

SENTENCES_PER_CHUNK = 1_000


def main(descriptor: int, memory_limit_bytes: int) -> None:
    """Read documents until the parent closes its end. Started by reader.py."""
    # Of the data, not of addresses: libraries reserve far more of those than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(10_000)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    with Connection(descriptor) as connection:
        while True:
            try:
                filename, minimum_length, limits, ocr = connection.recv()
                _answer(connection, connection.recv_bytes(), filename, minimum_length, limits, ocr)
            except (EOFError, OSError):
                return


def _end_with_parent(descriptor: int) -> None:
    """End at once, with whatever was started, when the other end is closed: a killed server cannot ask for it."""
    hanging_up = select.poll()
    hanging_up.register(descriptor, 0)
    hanging_up.poll()
    # The group is of this process alone: it was started in a session of its own.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(
    connection: Connection,
    data: bytes,
    filename: str | None,
    minimum_length: int,
    limits: ExtractionLimits,
    ocr: OcrOptions | None,
) -> None:
    try:
        document = extract_text(data, limits=limits, filename=filename, ocr=ocr)
        del data
        n_sentences = 0
        for chunk in _gather(find_sentences(document, minimum_length=minimum_length)):
            n_sentences += len(chunk)
            connection.send(chunk)
        if not n_sentences:
            raise UnreadableDocument(
                f"The document has no sentence of at least {minimum_length} characters "
                "(MINIMUM_STRING_LENGTH_FOR_DOCUMENT_EMBEDDING).",
                field="file",
            )
        connection.send(document.mimetype)
    except ServiceError as error:
        connection.send(error)
    except (MemoryError, RecursionError):
        connection.send(
            UnreadableDocument(
                "The document needs more memory to read than it may take (DOCUMENT_MEMORY_LIMIT_IN_MB).", field="file"
            )
        )


def _gather(sentences: Iterator[Sentence]) -> Iterator[list[Sentence]]:
    while chunk := list(islice(sentences, SENTENCES_PER_CHUNK)):
        yield chunk
