"""Reads documents in processes of their own, so that no file can hold up the server or take it down.

A process is started for the first document, bounded in memory, ended when a document takes too long, and given up
after a while without work. It has none of the server's environment. Knows no store and no engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from embeddings_data_models import Sentence
from llama_embeddings.documents.extracted import DEFAULT_LIMITS, ExtractionLimits, OcrOptions
from llama_embeddings.documents.segmentation import segmentation_key
from llama_embeddings.errors import ServiceError, UnreadableDocument

logger = logging.getLogger(__name__)

MEGABYTE = 1024 * 1024
# Two, so that a document which takes its whole time does not keep the next one waiting.
N_PROCESSES = 2
IDLE_SECONDS = 60.0

_PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from llama_embeddings.documents.reading_process import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True, slots=True)
class ReadDocument:
    """What came out of a file."""

    mimetype: str
    sentences: tuple[Sentence, ...]


class DocumentReader:
    """Hands files to reading processes and their sentences to the caller."""

    def __init__(
        self,
        *,
        minimum_length: int,
        limits: ExtractionLimits = DEFAULT_LIMITS,
        time_limit_seconds: float = 300.0,
        memory_limit_bytes: int = 1024 * MEGABYTE,
        idle_seconds: float = IDLE_SECONDS,
        ocr: OcrOptions | None = None,
    ) -> None:
        self._minimum_length = minimum_length
        self._limits = limits
        self._time_limit_seconds = time_limit_seconds
        self._memory_limit_bytes = memory_limit_bytes
        self._idle_seconds = idle_seconds
        self._ocr = ocr
        self._places = asyncio.Semaphore(N_PROCESSES)
        self._idle: list[_ReadingProcess] = []
        self._busy: set[_ReadingProcess] = set()
        self._goodbye: asyncio.TimerHandle | None = None

    @property
    def segmentation(self) -> str:
        """Part of a document's cache key: other rules, or OCR, give other sentences."""
        return segmentation_key(self._minimum_length, self._ocr)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that run now, busy or waiting."""
        return [process.pid for process in (*self._busy, *self._idle)]

    async def read(self, data: bytes, *, filename: str | None = None) -> ReadDocument:
        """All sentences of a file. The name decides between kinds of text only.

        Raises UnsupportedDocumentType, RequestTooLarge, and UnreadableDocument: damaged, encrypted, without text,
        without a sentence that is long enough, or beyond the limits of time and memory.
        """
        sentences: list[Sentence] = []
        mimetype = ""
        async for answer in self._converse(data, filename):
            if isinstance(answer, str):
                mimetype = answer
            else:
                sentences.extend(answer)
        return ReadDocument(mimetype, tuple(sentences))

    async def stream(self, data: bytes, *, filename: str | None = None) -> AsyncIterator[list[Sentence]]:
        """The same in chunks while the rest is being split; an error may come after the first chunks."""
        async for answer in self._converse(data, filename):
            if not isinstance(answer, str):
                yield answer

    async def _converse(self, data: bytes, filename: str | None) -> AsyncIterator[list[Sentence] | str]:
        async with self._places:
            process = await self._find_process()
            self._busy.add(process)
            is_reusable = False
            try:
                question = (filename, self._minimum_length, self._limits, self._ocr)
                seconds_left = self._time_limit_seconds
                began = time.monotonic()
                await asyncio.to_thread(process.ask, question, data)
                while True:
                    seconds_left -= time.monotonic() - began
                    began = time.monotonic()
                    answer = await asyncio.to_thread(process.receive, seconds_left)
                    if isinstance(answer, ServiceError | str):
                        is_reusable = True
                    if isinstance(answer, ServiceError):
                        raise answer
                    seconds_left -= time.monotonic() - began
                    yield answer
                    began = time.monotonic()  # what the caller does meanwhile is not the document's time
                    if is_reusable:
                        return
            except TimeoutError:
                raise UnreadableDocument(
                    f"Reading the document took longer than {self._time_limit_seconds:g} seconds "
                    "(DOCUMENT_TIME_LIMIT_IN_SECONDS).",
                    field="file",
                ) from None
            except (EOFError, OSError):
                logger.warning("A process that reads documents died; the next document gets a new one")
                raise UnreadableDocument(
                    "The document could not be read: it made the reading process fail, or needed more memory than it "
                    "may take (DOCUMENT_MEMORY_LIMIT_IN_MB).",
                    field="file",
                ) from None
            finally:
                self._busy.discard(process)
                self._put_back(process) if is_reusable else process.end()

    async def _find_process(self) -> _ReadingProcess:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.end()
        return await asyncio.to_thread(_ReadingProcess, self._memory_limit_bytes)

    def _put_back(self, process: _ReadingProcess) -> None:
        self._idle.append(process)
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._goodbye = asyncio.get_running_loop().call_later(self._idle_seconds, self._end_idle)

    def _end_idle(self) -> None:
        while self._idle:
            self._idle.pop().end()

    def close(self) -> None:
        """End the reading processes; a document that is being read is given up."""
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._end_idle()
        for process in list(self._busy):
            process.end()


class _ReadingProcess:
    """One process and the connection to it. Methods block; they are called on threads, one at a time."""

    def __init__(self, memory_limit_bytes: int) -> None:
        connection, far_end = Pipe()
        # A small program and not a fork, which would inherit the engine's locks in whatever state they are; nor
        # multiprocessing's own start, which imports the whole server. The environment holds secrets: it stays here.
        self._process = subprocess.Popen(  # noqa: S603 our own program, no word of the caller's
            [sys.executable, "-c", _PROGRAM, str(_PROJECT_DIRECTORY), str(far_end.fileno()), str(memory_limit_bytes)],
            pass_fds=[far_end.fileno()],
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        far_end.close()
        self._connection: Connection[Any, Any] = connection

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: object, data: bytes) -> None:
        """Hand a document over. The child takes all of it before it does anything else."""
        self._connection.send(question)
        self._connection.send_bytes(data)

    def receive(self, timeout_seconds: float) -> Any:
        """The next answer. Raises TimeoutError if none comes in time, EOFError or OSError if the process died."""
        if not self._connection.poll(max(0.0, timeout_seconds)):
            raise TimeoutError
        return self._connection.recv()

    def end(self) -> None:
        """Kill it at once, with the tesseract that it may wait for: they hold nothing that could be lost."""
        # It leads a group of its own. Once its end was noticed, its number may be somebody else's.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The connection is closed when the last thread that waits on it lets go of it.
