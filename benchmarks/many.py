"""Many collections, many jobs, and a long document: `python -m benchmarks.many [--number 100000] [--sentences 200000]`.

How long each listing takes, how long it holds the event loop, and what a search with a filter waits meanwhile; then how
long another write waits at most while a document is added and deleted. With an engine that computes nothing: what is
measured is the store. Texts and jobs are put into the database before the server is started.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import numpy as np

from embeddings_data_models import (
    NewDocument,
    NewEmbedding,
    RequestStamp,
    SentencePlaces,
    compute_text_hash,
    utc_now,
)
from llama_embeddings.storage.store import EmbeddingStore
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application

SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
EMBED = "/get_embedding_vector_for_string/"
N_DIMS = 384
FAMILY = "0123456789abcdef"
ROWS_PER_WRITE = 10_000


async def measure_listings(directory: Path, number: int) -> None:
    """Of `number` collections with a text each, and `number` finished jobs."""
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{directory}/embeddings.sqlite")
    for start in range(0, number, 1_000):
        await store.add_embeddings([make_row(n, f"collection {n}", n_dims=16) for n in range(start, start + 1_000)])
    await store.close()
    with closing(sqlite3.connect(directory / "embeddings.sqlite")) as connection:
        insert_jobs(connection, number)
    async with run_application(directory) as running:
        body = {"text": "somewhere", "corpus_identifier_string": "a collection"}
        await time_of("first text of a collection", running.client.post(EMBED, json=body))
        for path in ("/get_list_of_collections/", "/jobs"):
            await measure_listing(running, path)
        body = {"query_text": "a query", "since": "2020-01-01T00:00:00Z"}
        await time_of("search of all collections since a date", running.client.post(SEARCH, json=body))
        document = {"file": ("a.txt", b"A document of a single sentence.")}
        submission = running.client.post(
            "/get_all_embedding_vectors_for_document/", files=document, params={"background": True}
        )
        await time_of("submission of a job", submission)


def insert_jobs(connection: sqlite3.Connection, number: int) -> None:
    """Jobs that were done just now."""
    moment = utc_now().replace(tzinfo=None).isoformat(" ", "microseconds")
    columns = "id, state, filename, model_name, collection, size_in_bytes, request_time, response_time"
    rows = ((f"{n:032x}", f"document {n}.txt", FAKE_MODEL_NAME, moment, moment) for n in range(number))
    statement = f"INSERT INTO document_jobs ({columns}) VALUES (?, 'cancelled', ?, ?, 'default', 1000, ?, ?)"
    connection.executemany(statement, rows)
    connection.commit()


async def measure_listing(running: RunningApplication, path: str) -> None:
    """Its first reply, beside searches of a collection."""
    waits: list[float] = []

    async def search() -> None:
        while True:
            started = time.perf_counter()
            body = {"query_text": "a query", "corpus_identifier_string": "collection 7"}
            await running.client.post(SEARCH, json=body)
            waits.append(time.perf_counter() - started)

    async with beside(search()), hold_of_loop() as holds:
        response = await time_of(f"GET {path}", running.client.get(path))
    size = len(response.content) / 1e6
    print(
        f"    {size:.1f} MB; the loop held {max(holds):.2f} s, a filtered search {max(waits, default=0):.2f} s at most"
    )


async def measure_document(directory: Path, n_sentences: int) -> None:
    """Added and deleted, beside writes of single texts."""
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{directory}/document.sqlite")
    row_ids: list[int] = []
    for start in range(0, n_sentences, ROWS_PER_WRITE):
        rows = [make_row(n, None) for n in range(start, min(n_sentences, start + ROWS_PER_WRITE))]
        row_ids += await store.add_embeddings(rows)
    await store.index_full_text()
    document = make_document(np.array(row_ids, np.int64))
    for what, work in (("adding", store.add_document(document)), ("deleting", store.delete_document("book.txt"))):
        waits: list[float] = []
        async with beside(write_texts(store, waits)):
            await time_of(f"{what} a document of {n_sentences:,} sentences", work)
        print(f"    another write {max(waits):.3f} s at most, of {len(waits)}")
    await store.close()


async def write_texts(store: EmbeddingStore, waits: list[float]) -> None:
    number = -1
    while True:
        number -= 1
        started = time.perf_counter()
        try:
            await store.add_embeddings([make_row(number, "default")])
        finally:
            # Also of one that still waits at the end.
            waits.append(time.perf_counter() - started)
        await asyncio.sleep(0.01)


def make_row(number: int, collection: str | None, *, n_dims: int = N_DIMS) -> NewEmbedding:
    text = f"This is sentence number {number} of a long book about many things."
    vector = np.random.default_rng(abs(number)).standard_normal(n_dims).astype(np.float32)
    now = utc_now()
    return NewEmbedding(
        text, compute_text_hash(text), FAKE_MODEL_NAME, FAMILY, vector, 12, 0, RequestStamp(), now, collection
    )


def make_document(row_ids: np.ndarray) -> NewDocument:
    positions = np.arange(len(row_ids))
    places = SentencePlaces(row_ids, np.zeros_like(positions), positions, positions + 1)
    key = ("book.txt", "text/plain", compute_text_hash("book"), None, FAKE_MODEL_NAME, FAMILY, "s")
    return NewDocument(*key, places, RequestStamp(), utc_now())


async def time_of(what: str, work: Awaitable[Any]) -> Any:
    """The result of the work, whose time is printed."""
    started = time.perf_counter()
    result = await work
    print(f"{what}: {time.perf_counter() - started:.3f} s", flush=True)
    return result


@asynccontextmanager
async def beside(work: Any) -> AsyncIterator[None]:
    """Other work until the block ends."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def hold_of_loop() -> AsyncIterator[list[float]]:
    """Seconds for which the event loop did not turn."""
    holds = [0.0]

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            holds.append(time.perf_counter() - started)

    async with beside(tick()):
        yield holds


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=100_000, help="collections and jobs (%(default)s)")
    parser.add_argument("--sentences", type=int, default=200_000, help="of the document (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(measure_listings(Path(name), arguments.number))
        asyncio.run(measure_document(Path(name), arguments.sentences))


if __name__ == "__main__":
    main()
