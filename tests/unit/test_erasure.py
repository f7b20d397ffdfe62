"""Deleted is gone: no byte of a whole text stays in the database, its log or the files beside it."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_data_models import (
    NewDocument,
    NewEmbedding,
    NewTokenLevelBundle,
    RequestStamp,
    SentencePlaces,
    compute_text_hash,
)
from llama_embeddings.storage import erasure
from llama_embeddings.storage.store import EmbeddingStore

MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"
NOON = datetime(2024, 5, 17, 12, tzinfo=UTC)
STAMP = RequestStamp("ip", NOON)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddingStore]:
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite")
    yield store
    await store.close()


def make(text: str, **fields: Any) -> NewEmbedding:
    vector = np.ones(8, np.float32)
    return NewEmbedding(text, compute_text_hash(text), MODEL, FAMILY, vector, 5, 0, STAMP, NOON, **fields)


def make_query(text: str) -> NewEmbedding:
    return make(text, collection=None, is_searchable=False)


def make_bundle(text: str) -> NewTokenLevelBundle:
    tokens = tuple(text.split())
    matrix, summary = np.ones((len(tokens), 2), np.float32), np.ones(8, np.float32)
    return NewTokenLevelBundle(text, compute_text_hash(text), MODEL, FAMILY, tokens, matrix, summary, 0, STAMP, NOON)


async def add_document(store: EmbeddingStore, name: str, texts: list[str]) -> None:
    row_ids = await store.add_embeddings([make(text, collection=None) for text in texts])
    zeros = np.zeros(len(row_ids), np.int64)
    document = NewDocument(
        filename=name,
        mimetype="text/plain",
        file_hash=compute_text_hash(name),
        file_data="\n".join(texts).encode(),
        model_name=MODEL,
        recipe=FAMILY,
        segmentation="sentences-1",
        places=SentencePlaces(np.array(row_ids), zeros, zeros, zeros),
        stamp=STAMP,
        response_time=NOON,
    )
    await store.add_document(document)


def find_left(tmp_path: Path, texts: list[str]) -> list[str]:
    """Those texts that stand in any file, the database's and all beside it."""
    data = b"\0".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    return [text for text in texts if text.encode() in data]


@pytest.mark.parametrize("length", [5, 300, 3_000, 50_000])
async def test_deleted_text_leaves_no_byte_while_the_server_runs(
    store: EmbeddingStore, tmp_path: Path, length: int
) -> None:
    """As a text, a query that became one, in several collections, and with the embeddings of its tokens."""
    text, query, other = (f"{word} one of {'many ' * (length // 5)}words" for word in ("needle", "query", "other"))
    await store.add_embeddings([make(text), make_query(query), make(other)])
    await store.add_embeddings([make(text, collection="cats"), make(query, collection="cats")])
    for each in (text, query, other):
        await store.add_token_level_bundle(make_bundle(each))
    await store.search_text("needle", model_name=MODEL, families=[FAMILY], limit=5)
    assert len(find_left(tmp_path, [text[:50], query[:50], other[:50]])) == 3
    for each in (text, query):
        assert await store.erase(await store.delete_text(each))
    assert find_left(tmp_path, [text[:50], query[:50], other[:50]]) == [other[:50]]


async def test_deleted_document_leaves_no_byte_of_itself(store: EmbeddingStore, tmp_path: Path) -> None:
    """Its sentences, their tokens, its file and its name; what stands elsewhere, too, stays with its tokens."""
    texts = [f"needle number {i} of some words" for i in range(400)]
    shared = "a sentence of both documents"
    await add_document(store, "first name of a file.txt", [*texts, shared, "asked for by itself"])
    await add_document(store, "second name of a file.txt", [shared])
    await store.add_embeddings([make("asked for by itself")])
    for text in (*texts[:5], shared, "asked for by itself"):
        await store.add_token_level_bundle(make_bundle(text))
    removal = await store.delete_document("first name of a file.txt")
    assert (len(removal.rows), len(removal.bundles)) == (400, 5)
    assert await store.erase(removal)
    assert find_left(tmp_path, [*texts, "first name of a file.txt"]) == []
    for text in (shared, "asked for by itself"):
        assert await store.find_token_level_bundle(compute_text_hash(text), MODEL, FAMILY) is not None


@pytest.mark.parametrize("seed", range(3))
async def test_moved_rows_leave_no_copies_behind(store: EmbeddingStore, tmp_path: Path, seed: int) -> None:
    """Rows that grow, and pages that are put together, in any order: pages are shared out anew all the time."""
    choose = random.Random(seed)
    living: list[str] = []
    deleted: list[str] = []
    for step in range(120):
        texts = [f"needle {step}-{i} {'w' * choose.choice([0, 20, 200, 2_000, 6_000])} end" for i in range(8)]
        await store.add_embeddings([choose.choice([make, make_query])(text) for text in texts])
        await add_document(store, f"document {step} of many.txt", [f"sentence {step} {'s' * 100} of a document"])
        await store.add_token_level_bundle(make_bundle(texts[0]))
        living += texts
        await store.add_embeddings([make(text, collection=f"c{step}") for text in choose.sample(living, 3)])
        for _ in range(7):
            text = living.pop(choose.randrange(len(living)))
            assert await store.erase(await store.delete_text(text))
            deleted.append(text[:400])
        if step > 5 and choose.random() < 0.7:
            assert await store.erase(await store.delete_document(f"document {step - 3} of many.txt"))
            deleted.append(f"sentence {step - 3} {'s' * 100} of a document")
    assert find_left(tmp_path, deleted) == []
    await store.close()
    with sqlite3.connect(tmp_path / "embeddings.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        stored = {text for (text,) in connection.execute("SELECT text FROM embeddings")}
    assert stored >= set(living)


@contextmanager
def reading(tmp_path: Path) -> Iterator[None]:
    """A read of another process that goes on, such as a backup."""
    connection = sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM embeddings").fetchone()
    yield
    connection.close()


async def test_erasure_that_a_read_holds_up_is_finished_after_it(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said after a bounded time; nobody's writes wait meanwhile."""
    monkeypatch.setattr(erasure, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(erasure, "LONGEST_PAUSE_SECONDS", 0.05)
    await store.add_embeddings([make("needle number one"), make("needle number two")])
    with reading(tmp_path):
        assert not await store.erase(await store.delete_text("needle number one"))
        await store.add_embeddings([make("something else")])
        assert not await store.erase(await store.delete_text("needle number two"))
        assert find_left(tmp_path, ["needle number one"]) != []
    await store._erasure.begin()
    assert find_left(tmp_path, ["needle number one", "needle number two"]) == []


async def test_erasure_is_finished_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server that was killed had deleted stands in its log; the next one cuts it without being asked."""
    monkeypatch.setattr(erasure, "WAIT_SECONDS", 0.1)
    url = f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite"
    store = await EmbeddingStore.open(url)
    await store.add_embeddings([make("needle number one")])
    with reading(tmp_path):
        assert not await store.erase(await store.delete_text("needle number one"))
        await store.close()
        assert find_left(tmp_path, ["needle number one"]) != []
        store = await EmbeddingStore.open(url)
    await store._erasure.begin()
    assert find_left(tmp_path, ["needle number one"]) == []
    await store.close()


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 42), reason="Older ones keep words until they are merged.")
async def test_single_words_go_at_once_where_sqlite_can(store: EmbeddingStore, tmp_path: Path) -> None:
    """Also in an index that an older SQLite made, and out of pages that many words share."""
    await store.add_embeddings([make(f"qq{i}zz common words") for i in range(2_000)])
    await store.search_text("common", model_name=MODEL, families=[FAMILY], limit=5)
    await store.add_embeddings([make("xylophonically")])
    await store.search_text("common", model_name=MODEL, families=[FAMILY], limit=5)
    assert await store.erase(await store.delete_text("xylophonically"))
    assert find_left(tmp_path, ["xylophon"]) == []
    for i in range(0, 2_000, 100):
        assert await store.erase(await store.delete_text(f"qq{i}zz common words"))
    found = await store.search_text("common", model_name=MODEL, families=[FAMILY], limit=3_000)
    assert len(found) == 1_980


async def test_erasing_that_fails_is_tried_again(store: EmbeddingStore, caplog: pytest.LogCaptureFixture) -> None:
    """A mistake or a fault of the disk neither ends it nor fails the deletion."""
    failures: list[Exception] = [OSError("No space left"), KeyError("a mistake")]

    def empty_log() -> bool:
        if failures:
            raise failures.pop()
        return True

    async def overwrite(_: object) -> int:
        return 0

    eraser = erasure.Erasure(empty_log, overwrite)
    assert await eraser.erase([])
    assert caplog.text.count("Could not erase") == 2
    await eraser.stop()
