"""Several processes on one database: one server, its replicas, and commands beside it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from embeddings_data_models import BulkEmbeddings, compute_text_hash
from llama_embeddings.errors import ConfigurationError
from llama_embeddings.storage.store import EmbeddingStore
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application

EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
# Within a second on an idle machine.
PATIENCE_SECONDS = 20.0


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    (tmp_path / "server").mkdir()
    async with run_application(tmp_path / "server") as running:
        yield running


@asynccontextmanager
async def run_replica(server: RunningApplication) -> AsyncIterator[RunningApplication]:
    directory = server.directory.parent / "replica"
    directory.mkdir(exist_ok=True)
    url = f"sqlite+aiosqlite:///{server.database}"
    async with run_application(directory, database_url=url, read_only_replica=True) as running:
        yield running


@asynccontextmanager
async def open_beside(server: RunningApplication) -> AsyncIterator[EmbeddingStore]:
    """The database as a command has it."""
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{server.database}", follows_full_text=False)
    try:
        yield store
    finally:
        await store.close()


async def embed(running: RunningApplication, text: str) -> httpx.Response:
    return await running.client.post(EMBED, json={"text": text})


async def search(running: RunningApplication, query: str, **options: Any) -> set[str]:
    body = {"query_text": query, "number_of_most_similar_strings_to_return": 100} | options
    reply = await running.client.post(SEARCH, json=body)
    assert reply.status_code == 200, reply.text
    return {result["search_result_text"] for result in reply.json()["results"]}


async def wait_for(condition: Any) -> None:
    """Until the awaitable that `condition` makes is true."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.02)


async def wait_until_found(running: RunningApplication, *texts: str) -> None:
    async def are_found() -> bool:
        return await search(running, "a query") == set(texts)

    await wait_for(are_found)


async def wait_until_forgotten(running: RunningApplication, text: str) -> None:
    """A text that was in memory is not taken from there any more."""

    def is_in_memory() -> bool:
        memory = running.app.state.services.embeddings._memory
        return any(key[0] == compute_text_hash(text) for key in memory._entries)

    async def is_forgotten() -> bool:
        return not is_in_memory()

    await wait_for(is_forgotten)
    assert (await embed(running, text)).headers["x-cache-hits"] == "0"


def make_rows(server: RunningApplication, *texts: str) -> BulkEmbeddings:
    """For the index that the server's first text is in."""
    with closing(sqlite3.connect(server.database)) as connection:
        recipe, n_bytes = connection.execute("SELECT recipe, length(embedding) FROM embeddings LIMIT 1").fetchone()
    vectors = np.random.default_rng(0).standard_normal((len(texts), n_bytes // 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return BulkEmbeddings(list(texts), vectors, FAKE_MODEL_NAME, recipe, "default")


# --- one server a database ---


async def test_second_server_refuses_to_start_and_names_the_first(server: RunningApplication, tmp_path: Path) -> None:
    """Also where the path is another spelling of the same, or a link to it."""
    link = tmp_path / "link.sqlite"
    link.symlink_to(server.database)
    (tmp_path / "second").mkdir()
    for path in (server.database, server.directory / ".." / "server" / "embeddings.sqlite", link):
        with pytest.raises(ConfigurationError, match=r"Another server uses .*: process \d+ on .*READ_ONLY_REPLICA"):
            async with run_application(tmp_path / "second", database_url=f"sqlite+aiosqlite:///{path}"):
                raise AssertionError("it started")
    assert (await embed(server, "the first goes on")).status_code == 200


async def test_next_server_starts_when_the_first_has_ended(tmp_path: Path) -> None:
    """The file that was locked stays, and means nothing by itself."""
    for text in ("first", "second"):
        async with run_application(tmp_path) as running:
            assert (await embed(running, text)).status_code == 200
    assert (tmp_path / "embeddings.sqlite.lock").read_text() == ""


# --- a command beside the server ---


async def test_server_finds_what_a_command_adds_and_forgets_what_it_removes(server: RunningApplication) -> None:
    """By search, by its own memory and by its filter of known texts."""
    await embed(server, "of the server")
    async with open_beside(server) as store:
        texts = [f"imported {number}" for number in range(20)]
        await store.import_embeddings(make_rows(server, *texts))
        await wait_until_found(server, "of the server", *texts)
        assert (await embed(server, texts[0])).headers["x-cache-hits"] == "1"
        await store.delete_text("of the server")
        await store.delete_text(texts[0])
        await wait_until_found(server, *texts[1:])
        await wait_until_forgotten(server, texts[0])
    await wait_until_found(server, *texts)


async def test_query_that_a_command_makes_a_text_is_found(server: RunningApplication) -> None:
    """The row is the same; only what searches may find is another."""
    await embed(server, "a text")
    await search(server, "first a query, then a text")
    async with open_beside(server) as store:
        await store.import_embeddings(make_rows(server, "first a query, then a text"))
        await wait_until_found(server, "a text", "first a query, then a text")


async def test_server_that_missed_changes_looks_at_everything(server: RunningApplication) -> None:
    """Only so many are noted."""
    for number in range(5):
        await embed(server, f"text {number}")
    async with open_beside(server) as store:
        await store.import_embeddings(make_rows(server, "imported"))
        with closing(sqlite3.connect(server.database, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN")
            connection.execute("DELETE FROM embeddings WHERE text IN ('text 1', 'text 3')")
            connection.execute("DELETE FROM row_changes WHERE id < (SELECT max(id) FROM row_changes)")
            connection.execute("COMMIT")
        await wait_until_found(server, "text 0", "text 2", "text 4", "imported")
        await wait_until_forgotten(server, "text 1")


async def test_own_commits_are_not_taken_for_others(server: RunningApplication) -> None:
    """Or every row would be read again. After a deletion one look is due, as the log is cut by another connection."""
    store = server.app.state.services.contents._store
    await embed(server, "before")
    mark = await store.read_commit_mark()
    await embed(server, "another")
    assert await store.read_commit_mark() == mark
    async with open_beside(server) as other:
        await other.delete_text("before")
    assert await store.read_commit_mark() != mark


# --- replicas ---


async def test_replica_sees_what_the_server_commits_and_deletes(server: RunningApplication) -> None:
    """New texts, deleted ones, queries that became texts, documents, matrices; in a search and from its memory."""
    await embed(server, "from before")
    async with run_replica(server) as replica:
        assert await search(replica, "a query") == {"from before"}
        await embed(server, "from now")
        await search(server, "asked first")
        await embed(server, "asked first")
        files = {"file": ("notes.txt", b"A sentence of a document is found as well.")}
        assert (await server.client.post(DOCUMENT, files=files)).status_code == 200
        texts = {"from before", "from now", "asked first", "A sentence of a document is found as well."}
        await wait_until_found(replica, *texts)
        for _ in range(2):  # the second from its memory
            assert (await embed(replica, "from now")).json() | VARIABLE == (
                (await embed(server, "from now")).json() | VARIABLE
            )
        await server.client.request("DELETE", "/stored_strings/", json={"text": "from now"})
        await wait_until_found(replica, *texts - {"from now"})

        async def has_forgotten() -> bool:
            return (await embed(replica, "from now")).json().get("code") == "read_only_replica"

        await wait_for(has_forgotten)
        await server.client.post(TOKENS, json={"text": "tokens of the server"})

        async def has_tokens() -> bool:
            return (await replica.client.post(TOKENS, json={"text": "tokens of the server"})).status_code == 200

        await wait_for(has_tokens)


VARIABLE: dict[str, Any] = {"source": None, "queue_seconds": None, "compute_seconds": None, "total_seconds": None}


async def test_replica_refuses_writes_by_name_and_writes_nothing(server: RunningApplication) -> None:
    """Neither what it is asked to, nor queries, nor a job, nor a file beside the database."""
    await embed(server, "stored")
    await server.app.state.services.contents._store.index_full_text()  # or the server would write a moment later
    files = {"file": ("notes.txt", b"A sentence that is not stored anywhere.")}
    async with run_replica(server) as replica:
        with closing(sqlite3.connect(server.database)) as watcher:
            [before] = watcher.execute("PRAGMA data_version").fetchone()
            names = sorted(path.name for path in server.directory.iterdir())
            client = replica.client
            refused = [
                await embed(replica, "not stored"),
                await client.post(EMBED, json={"text": "stored", "corpus_identifier_string": "another"}),
                await client.post(TOKENS, json={"text": "not stored"}),
                await client.post(DOCUMENT, files=files),
                await client.post(DOCUMENT, files=files, params={"background": "true"}),
                await client.get("/jobs"),
                await client.get("/jobs/0123"),
                await client.delete("/jobs/0123"),
                await client.request("DELETE", "/stored_strings/", json={"text": "stored"}),
                await client.delete("/stored_documents/", params={"filename": "notes.txt"}),
            ]
            for reply in refused:
                assert (reply.status_code, reply.json().get("code")) == (503, "read_only_replica"), reply.url
                assert "retry-after" in reply.headers
            assert await search(replica, "a query") == {"stored"}
            assert await search(replica, "stored texts", full_text_weight=0.5) == {"stored"}
            assert await search(replica, "late", late_interaction=True) == {"stored"}
            rerank = {"query": "which", "texts": ["one", "another"]}
            assert (await client.post("/rerank", json=rerank)).status_code == 200
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/collections/")).status_code in (200, 404)
            assert watcher.execute("PRAGMA data_version").fetchone() == (before,)
            assert sorted(path.name for path in server.directory.iterdir()) == names
    assert list((server.directory.parent / "replica").glob("*.sqlite*")) == []


async def test_replica_starts_only_on_a_database_that_it_can_read(tmp_path: Path) -> None:
    """It makes none, and brings none to a newer schema."""
    with pytest.raises(ConfigurationError, match=r"not there.*Start the server that writes"):
        async with run_application(tmp_path, read_only_replica=True):
            raise AssertionError("it started")
    assert not (tmp_path / "embeddings.sqlite").exists()
    async with run_application(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 4")
    with pytest.raises(ConfigurationError, match="earlier version"):
        async with run_application(tmp_path, read_only_replica=True):
            raise AssertionError("it started")
