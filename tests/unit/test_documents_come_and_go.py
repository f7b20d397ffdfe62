"""Documents in the store are there as a whole or not at all: written, replaced, removed, and interrupted in between."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from embeddings_data_models import (
    DocumentJob,
    JobState,
    NewDocument,
    NewEmbedding,
    RequestStamp,
    SentencePlaces,
    StoredCollection,
    compute_text_hash,
    utc_now,
)
from llama_embeddings.errors import InvalidInput, NotFound, Unavailable
from llama_embeddings.storage.store import EmbeddingStore

MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"
NOON = datetime(2024, 5, 17, 12, tzinfo=UTC)
TEXTS = [f"Sentence number {number}." for number in range(30)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite"


async def open_store(path: Path) -> EmbeddingStore:
    return await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")


@pytest.fixture
async def store(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddingStore]:
    """With parts of ten rows."""
    monkeypatch.setattr("llama_embeddings.storage.document_writes.SECONDS_PER_PART", 0.0)
    monkeypatch.setattr("llama_embeddings.storage.document_writes.ROWS_PER_STEP", 10)
    store = await open_store(path)
    yield store
    await store.close()


def make_row(text: str, collection: str | None = None, document_row_id: int | None = None) -> NewEmbedding:
    row = NewEmbedding(
        text, compute_text_hash(text), MODEL, FAMILY, np.ones(4, np.float32), 5, 0, RequestStamp("ip", NOON), NOON
    )
    return replace(row, collection=collection, document_row_id=document_row_id)


def make_document(filename: str, row_ids: Sequence[int] = (), collection: str = "default") -> NewDocument:
    positions = np.arange(len(row_ids))
    places = SentencePlaces(np.array(row_ids, np.int64), np.zeros_like(positions), positions, positions + 1)
    key = (filename, "text/plain", compute_text_hash(filename), None, MODEL, FAMILY, "s")
    return NewDocument(*key, places, RequestStamp("ip", NOON), utc_now(), collection)


async def begin(
    store: EmbeddingStore, filename: str, texts: Sequence[str], collection: str = "default"
) -> tuple[int, NewDocument]:
    """A document with all that belongs to it written, that is not published."""
    row_id = await store.begin_document(make_document(filename, collection=collection))
    row_ids = await store.add_embeddings([make_row(text, document_row_id=row_id) for text in texts])
    document = make_document(filename, row_ids, collection)
    await store.write_sentences(row_id, document.places, NOON)
    return row_id, document


async def add(store: EmbeddingStore, filename: str, texts: Sequence[str], collection: str = "default") -> int:
    row_id, document = await begin(store, filename, texts, collection)
    await store.publish_document(row_id, document)
    return row_id


async def list_what_shows(store: EmbeddingStore) -> list[set[str]]:
    """The same set of texts, as every way to find texts has it."""
    found = [
        await store.find_row_ids(MODEL, [FAMILY]),
        await store.find_row_ids(MODEL, [FAMILY], since=NOON - timedelta(days=1)),
        await store.find_row_ids(MODEL, [FAMILY], collection="default"),
        await store.read_row_ids(MODEL, FAMILY),
        np.array([row_id for row_id, _ in await search_words(store)], np.int64),
    ]
    everything = np.arange(1, 1_000)
    texts = await store.texts_of_rows(everything.tolist())
    return [
        set(texts.values()),
        *({texts[row_id] for row_id in row_ids.tolist()} for row_ids in found),
        set(await store.list_texts(None, None, 0)),
        set(await store.list_texts(None, None, 0, "default")),
    ]


async def search_words(store: EmbeddingStore) -> list[tuple[int, float]]:
    return await store.search_text("sentence", model_name=MODEL, families=[FAMILY], limit=1_000)


async def assert_shows(store: EmbeddingStore, *texts: str) -> None:
    for found in await list_what_shows(store):
        assert found == set(texts)


def count_rows(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        [count] = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)


async def test_document_shows_once_it_is_published(store: EmbeddingStore) -> None:
    """With everything written, nothing of it is listed, counted or found; then all of it is, in one moment."""
    row_id, document = await begin(store, "a.txt", TEXTS)
    await assert_shows(store)
    assert await store.list_document_filenames(None, None, 0) == []
    assert await store.list_collections() == [StoredCollection("default", 0, 0)]
    assert await store.holds_everything(MODEL, [FAMILY], "default")
    assert await store.describe_document(row_id) is None
    assert (await store.statistics()).n_documents == 0
    to_show = [row_ids async for row_ids in store.read_rows_to_show(row_id, sentences_per_read=7)]
    assert np.concatenate(to_show).tolist() == document.places.row_ids.tolist()
    await store.publish_document(row_id, document)
    await assert_shows(store, *TEXTS)
    assert await store.list_document_filenames(None, None, 0) == ["a.txt"]
    assert await store.list_collections() == [StoredCollection("default", len(TEXTS), 1)]
    assert [row_ids async for row_ids in store.read_rows_to_show(row_id)] == []


async def test_documents_are_written_and_removed_by_parts(store: EmbeddingStore) -> None:
    """Other writes have their turn between any two of them."""
    before = (await store.statistics()).n_write_transactions
    await add(store, "a.txt", TEXTS)
    assert (await store.statistics()).n_write_transactions - before >= len(TEXTS) / 10
    hidden = await store.hide_documents("a.txt")
    await assert_shows(store)
    sizes = [len(part.rows) for row_id in hidden.row_ids async for part in store.remove_document(row_id)]
    assert (max(sizes), sum(sizes)) == (10, len(TEXTS))


async def test_document_takes_the_place_of_another_in_one_moment(store: EmbeddingStore, path: Path) -> None:
    """Sentences of both stay, with their rows; those of the replaced one alone are gone, and nothing of it is left."""
    old = await add(store, "version 1.txt", ["Only sentence old.", "Shared sentence."])
    new, document = await begin(store, "version 2.txt", ["Shared sentence.", "Only sentence new."])
    await assert_shows(store, "Only sentence old.", "Shared sentence.")
    await store.publish_document(new, document, replaced_row_ids=[old])
    await assert_shows(store, "Shared sentence.", "Only sentence new.")
    assert await store.find_documents_being_removed() == [old]
    removed = [row async for part in store.remove_document(old) for row in part.rows]
    assert [row_id for *_, row_id in removed] == [1]
    await assert_shows(store, "Shared sentence.", "Only sentence new.")
    assert await store.list_document_filenames(None, None, 0) == ["version 2.txt"]
    assert [count_rows(path, table) for table in ("documents", "document_embeddings", "document_sentences")] == [
        1,
        1,
        2,
    ]


async def test_sentence_of_several_documents_goes_with_the_last_that_shows(store: EmbeddingStore) -> None:
    """One that is being written keeps the row, but does not show it."""
    await add(store, "a.txt", ["Shared sentence."])
    row_id, document = await begin(store, "b.txt", ["Shared sentence."])
    assert (await store.delete_document("a.txt")).rows == []
    await assert_shows(store)
    assert [ids.tolist() async for ids in store.read_rows_to_show(row_id)] == [[1]]
    await store.publish_document(row_id, document)
    await assert_shows(store, "Shared sentence.")
    assert len((await store.delete_document("b.txt")).rows) == 1


async def test_text_asked_for_by_itself_shows_and_stays(store: EmbeddingStore) -> None:
    """Though it stands in a document that is being written, and then is deleted."""
    await begin(store, "a.txt", ["Asked sentence.", "Other sentence."])
    await store.add_embeddings([make_row("Asked sentence.", "default")])
    await assert_shows(store, "Asked sentence.")
    assert len((await store.delete_document("a.txt")).rows) == 1
    await assert_shows(store, "Asked sentence.")


async def test_document_that_was_not_finished_is_gone_on_with(store: EmbeddingStore, path: Path) -> None:
    """Over a restart, with the same rows; what an earlier attempt wrote beyond its end goes."""
    row_id, earlier = await begin(store, "a.txt", TEXTS)
    other = await open_store(path)
    await assert_shows(other)
    assert await other.begin_document(make_document("a.txt")) == row_id
    document = make_document("a.txt", earlier.places.row_ids[:3].tolist())
    assert await other.add_document(document) == row_id
    await assert_shows(other, *TEXTS[:3])
    await other.close()


async def test_interrupted_removal_is_found_and_finished(store: EmbeddingStore, path: Path) -> None:
    """After a restart; until then nothing of the document shows, and it cannot be submitted."""
    row_id = await add(store, "a.txt", TEXTS)
    await store.hide_documents("a.txt")
    async for _ in store.remove_document(row_id):
        break
    other = await open_store(path)
    await assert_shows(other)
    with pytest.raises(Unavailable, match="just being deleted"):
        await other.begin_document(make_document("a.txt"))
    assert await other.find_documents_being_removed() == [row_id]
    assert sum([len(part.rows) async for part in other.remove_document(row_id)]) == len(TEXTS) - 10
    assert [count_rows(path, table) for table in ("embeddings", "documents", "document_sentences")] == [0, 0, 0]
    await other.close()


async def test_nothing_is_stored_for_a_document_that_was_deleted(store: EmbeddingStore, path: Path) -> None:
    """Neither sentences that were computed meanwhile, nor the document."""
    row_id, document = await begin(store, "a.txt", TEXTS[:2])
    assert (await store.delete_document("a.txt")).n_documents == 1
    assert not await store.is_being_written(row_id)
    with pytest.raises(Unavailable, match="deleted while"):
        await store.add_embeddings([make_row("Late sentence.", document_row_id=row_id)])
    with pytest.raises(NotFound, match="deleted while"):
        await store.publish_document(row_id, document)
    assert count_rows(path, "embeddings") == 0


async def test_sentence_deleted_meanwhile_keeps_the_document_from_showing(store: EmbeddingStore) -> None:
    """Before or after its place was written down."""
    row_id, document = await begin(store, "a.txt", TEXTS[:3])
    await store.delete_text(TEXTS[1])
    with pytest.raises(Unavailable, match="sentence of the document was deleted"):
        await store.publish_document(row_id, document)
    with pytest.raises(Unavailable, match="sentence of the document was deleted"):
        await store.write_sentences(row_id, document.places, NOON)
    await assert_shows(store)


async def test_leftovers_are_those_that_nobody_comes_back_to(store: EmbeddingStore) -> None:
    """Not what is being written, was touched lately, is complete, or has a job that waits."""
    await add(store, "complete.txt", ["Complete sentence."])
    old, _ = await begin(store, "old.txt", TEXTS[:3])
    mine, _ = await begin(store, "mine.txt", TEXTS[3:6])
    waiting, _ = await begin(store, "waiting.txt", TEXTS[6:9])
    job = DocumentJob("a", JobState.WAITING, "waiting.txt", MODEL, "default", 1, RequestStamp("ip", NOON))
    await store.put_job(job)
    assert await store.hide_leftovers(NOON) == []
    assert await store.hide_leftovers(utc_now(), excepted=[mine]) == [old]
    assert await store.find_documents_being_removed() == [old]
    assert len([row async for part in store.remove_document(old) for row in part.rows]) == 3
    await store.put_job(replace(job, state=JobState.CANCELLED, response_time=utc_now()))
    assert await store.hide_leftovers(utc_now()) == sorted([mine, waiting])


async def test_sentences_without_a_document_in_an_earlier_database_show_no_more(
    path: Path, tmp_path: Path, store: EmbeddingStore
) -> None:
    """They are those of jobs that were cancelled or still run: removed as leftovers are, found by the next attempt."""
    earlier = tmp_path / "earlier.sqlite"
    await add(store, "a.txt", TEXTS[:2])
    await begin(store, "b.txt", TEXTS[2:5])
    await store.index_full_text()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            DELETE FROM document_embeddings WHERE filename = 'b.txt';
            DELETE FROM documents WHERE filename = 'b.txt';
            DELETE FROM document_sentences WHERE document_embedding_id = 2;
            UPDATE embeddings SET document_id = NULL WHERE document_id = 2;
            DROP INDEX ix_document_embeddings_state;
            ALTER TABLE document_embeddings DROP COLUMN state;
            DROP INDEX ix_embeddings_collection_id;
            DROP TABLE collection_numbers;
            PRAGMA user_version = 7;
            """
        )
        connection.execute("VACUUM INTO ?", (str(earlier),))
    upgraded = await open_store(earlier)
    await assert_shows(upgraded, *TEXTS[:2])
    [leftover] = await upgraded.hide_leftovers(utc_now() + timedelta(seconds=1))
    assert len([row async for part in upgraded.remove_document(leftover) for row in part.rows]) == 3
    assert [count_rows(earlier, table) for table in ("embeddings", "documents")] == [2, 1]
    await upgraded.close()


async def test_number_of_a_deleted_collection_is_not_given_out_again(store: EmbeddingStore, path: Path) -> None:
    """Its name would be shown for the new one's texts."""
    await store.add_embeddings([make_row("a", "first")])
    assert (await find_collections(store, "a")) == {"first"}
    with pytest.raises(InvalidInput, match="not empty"):
        await store.delete_collection("first")
    await store.delete_text("a")
    await store.delete_collection("first")
    await store.add_embeddings([make_row("b", "second")])
    assert (await find_collections(store, "b")) == {"second"}
    assert [collection.name for collection in await store.list_collections()] == ["default", "second"]


async def find_collections(store: EmbeddingStore, text: str) -> frozenset[str]:
    text_hash = compute_text_hash(text)
    return (await store.find_embeddings([text_hash], MODEL, FAMILY))[text_hash].collections


async def test_collection_of_a_document_alone_is_not_empty(store: EmbeddingStore) -> None:
    """Also while it is being written."""
    await begin(store, "a.txt", TEXTS[:2], "cats")
    with pytest.raises(InvalidInput, match="not empty"):
        await store.delete_collection("cats")
    await store.delete_document("a.txt")
    await store.delete_collection("cats")
    with pytest.raises(NotFound):
        await store.delete_collection("cats")


async def test_more_collections_than_a_statement_takes_parameters(store: EmbeddingStore, path: Path) -> None:
    """Filters by date go through all of them; the listing reads them in pages."""
    with closing(sqlite3.connect(path)) as connection:
        names = ((number, f"collection {number}", "2024-01-01") for number in range(2, 40_002))
        connection.executemany("INSERT INTO collections VALUES (?, ?, ?)", names)
        connection.commit()
    await store.add_embeddings([make_row("a", "collection 39999"), make_row("b")])
    found = await store.find_row_ids(MODEL, [FAMILY], since=NOON - timedelta(days=1))
    assert found.tolist() == [1, 2]
    page = await store.list_collections_by_page(2, after=39_998)
    assert page.entries[0] == StoredCollection("collection 39999", 1, 0)
    assert (len(page.entries), page.next_after) == (2, 40_000)


async def test_writes_have_their_turn_while_a_document_is_removed(store: EmbeddingStore) -> None:
    """A text that comes later is stored before the document is gone."""
    await add(store, "a.txt", TEXTS)
    removing = asyncio.create_task(store.delete_document("a.txt"))
    await store.add_embeddings([make_row("A sentence in between.", "default")])
    assert not removing.done()
    await removing
    await assert_shows(store, "A sentence in between.")
