"""Documents through the server: share of the engine's time, the same again, and memory.

`python -m benchmarks.documents [--pages 300] [--megabytes 50] [--rounds 3]` starts a server of its own for each round
and prints the figures as JSON:

- a text PDF, fresh: seconds in all, the share of them in which the engine's workers computed (counted by the engine,
  the services running in this process), and the seconds that the engine alone needs for the same sentences;
- the same PDF again, with how long the reply took to come;
- a text file of repeated sentences: the peak of the resident memory of the server and its reader, above that before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.texts import make_texts
from embeddings_data_models import Truncation
from llama_embeddings.inference.engine import PreparedText
from llama_embeddings.services.container import Services
from llama_embeddings.services.document_files import DocumentFile
from llama_embeddings.settings import Settings, load_settings
from llama_embeddings_server import start_services
from tests.pdf_writing import write_text_pdf
from tests.serving import RunningServer, get_models_directory, start_server

DOCUMENT = "/get_all_embedding_vectors_for_document/"
LINES_PER_PAGE = 50
CHARACTERS_PER_LINE = 60
MEGABYTE = 1024 * 1024
TIMEOUT_SECONDS = 3600.0
N_DISTINCT_SENTENCES = 2_000


def make_pages(n_pages: int, seed: int) -> list[list[str]]:
    """Pages full of sentences of 35 tokens on average, wrapped into lines."""
    texts = make_texts(35, seed=seed)
    return [make_page(texts) for _ in range(n_pages)]


def make_page(texts: Any) -> list[str]:
    lines: list[str] = [""]
    while len(lines) <= LINES_PER_PAGE:
        for word in make_sentence(next(texts)).split():
            if len(lines[-1]) + len(word) > CHARACTERS_PER_LINE:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def make_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def send(server: RunningServer, name: str, data: bytes, kind: str) -> tuple[float, int, str]:
    """Seconds until the whole reply was there, its length, and whether it was computed."""
    with server.client() as client:
        started = time.perf_counter()
        query = {"send_back_json_or_zip_file": kind}
        response = client.post(DOCUMENT, files={"file": (name, data)}, params=query, timeout=TIMEOUT_SECONDS)
        response.raise_for_status()
        return time.perf_counter() - started, len(response.content), response.headers["x-embedding-source"]


def list_sentences(server: RunningServer, name: str, data: bytes) -> tuple[float, list[str]]:
    with server.client() as client:
        started = time.perf_counter()
        response = client.post("/convert_document_to_sentences/", files={"file": (name, data)}, timeout=TIMEOUT_SECONDS)
        sentences = response.raise_for_status().json()["sentences"]
        return time.perf_counter() - started, [sentence["text"] for sentence in sentences]


async def measure_in_process(data: bytes, sentences: list[str], directory: Path) -> dict[str, float]:
    """A document through the services, fresh, and its sentences through the engine alone, one after the other."""
    async with AsyncExitStack() as stack:
        services = await start_services(make_settings(directory), None, stack)
        await embed_document(services, b"The first document starts the reading process.", "warm.txt")
        async with services.models.lease(None) as engine:
            counters = engine.batcher.counters
            computed_before = counters.compute_seconds
            started = time.perf_counter()
            await embed_document(services, data, "book.pdf")
            seconds = time.perf_counter() - started
            busy_seconds = (counters.compute_seconds - computed_before) / len(engine.batcher._threads)
            started = time.perf_counter()
            prepared = await engine.prepare(sentences, Truncation.RIGHT)
            await engine.embed([text for text in prepared if isinstance(text, PreparedText)])
            engine_seconds = time.perf_counter() - started
    return {
        "fresh_seconds": seconds,
        "engine_busy_share": busy_seconds / seconds,
        "engine_alone_seconds": engine_seconds,
        "engine_alone_share": engine_seconds / seconds,
    }


async def embed_document(services: Services, data: bytes, name: str) -> None:
    with DocumentFile.from_bytes(data) as file:
        await services.documents.get_or_compute(file, filename=name)


def make_settings(directory: Path) -> Settings:
    (directory / ".env").touch()
    return load_settings(
        directory / ".env",
        models_directory=get_models_directory(),
        database_url=f"sqlite+aiosqlite:///{directory / 'embeddings.sqlite'}",
        max_queued_tokens=10**9,
    )


class PeakMemory:
    """Watches the resident memory of a process and its children, pages that they share counted once where known."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._is_over = threading.Event()
        self.idle_bytes = self.peak_bytes = self._measure()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _measure(self) -> int:
        processes = [self._process, *self._process.children(recursive=True)]
        total = 0
        for process in processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self._measure())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def measure_pdf(n_pages: int, seed: int) -> dict[str, float]:
    """A PDF fresh and again, and the engine's own time for it."""
    data = write_text_pdf(make_pages(n_pages, seed))
    with tempfile.TemporaryDirectory() as directory, start_server(Path(directory)) as server:
        send(server, "warm.txt", b"The first document starts the reading process.", "json")
        reading_seconds, sentences = list_sentences(server, "book.pdf", data)
        fresh_seconds, _, source = send(server, "book.pdf", data, "json")
        assert source == "computed"
        again = {kind: send(server, "book.pdf", data, kind) for kind in ("json", "zip", "npz", "parquet")}
    with tempfile.TemporaryDirectory() as directory:
        in_process = asyncio.run(measure_in_process(data, sentences, Path(directory)))
    return {
        "sentences": len(sentences),
        "reading_seconds": reading_seconds,
        "fresh_through_http_seconds": fresh_seconds,
        **in_process,
        **{f"again_{kind}_seconds": seconds for kind, (seconds, _, _) in again.items()},
        **{f"again_{kind}_bytes": n_bytes for kind, (_, n_bytes, _) in again.items()},
    }


def measure_memory(megabytes: int, seed: int) -> dict[str, float]:
    """Peak above idle for a file whose sentences repeat, so that the file is measured and not the index."""
    texts = make_texts(35, seed=seed)
    block = " ".join(make_sentence(next(texts)) for _ in range(N_DISTINCT_SENTENCES)) + "\n\n"
    data = (block * (megabytes * MEGABYTE // len(block))).encode()
    with tempfile.TemporaryDirectory() as directory, start_server(Path(directory)) as server:
        send(server, "warm.txt", b"The first document starts the reading process.", "json")
        with server.client() as client, PeakMemory(psutil.Process(server.process.pid)) as memory:
            location = submit(client, data)
            state: dict[str, Any] = {"state": "waiting"}
            while state["state"] in ("waiting", "running"):
                time.sleep(0.5)
                state = client.get(location).json()
            assert state["state"] == "done", state["error"]
            computing_peak = memory.peak_bytes
            query = {"send_back_json_or_zip_file": "json"}
            with client.stream("GET", f"{location}/result", params=query, timeout=TIMEOUT_SECONDS) as response:
                n_bytes = sum(map(len, response.iter_raw()))
    return {
        "file_mb": len(data) / MEGABYTE,
        "sentences": state["n_sentences_done"],
        "idle_mb": memory.idle_bytes / MEGABYTE,
        "computing_above_idle_mb": (computing_peak - memory.idle_bytes) / MEGABYTE,
        "peak_above_idle_mb": (memory.peak_bytes - memory.idle_bytes) / MEGABYTE,
        "reply_mb": n_bytes / MEGABYTE,
    }


def submit(client: httpx.Client, data: bytes) -> str:
    response = client.post(
        DOCUMENT, files={"file": ("large.txt", data)}, params={"background": True}, timeout=TIMEOUT_SECONDS
    )
    return str(response.raise_for_status().headers["location"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.pages:
        rounds = [measure_pdf(arguments.pages, seed) for seed in range(arguments.rounds)]
        print(json.dumps({name: statistics.median(one[name] for one in rounds) for name in rounds[0]}, indent=1))
    if arguments.megabytes:
        print(json.dumps(measure_memory(arguments.megabytes, seed=1), indent=1))


if __name__ == "__main__":
    main()
