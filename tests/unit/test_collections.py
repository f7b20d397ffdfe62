"""Collections, filters and forgetting in the store: who is where, and what goes with whom."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from embeddings_data_models import (
    NewDocument,
    NewEmbedding,
    RequestStamp,
    SentencePlaces,
    StoredCollection,
    StoredEmbedding,
    compute_text_hash,
)
from llama_embeddings.storage.store import EmbeddingStore

MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"
CUT = f"{FAMILY}:right512"
NOON = datetime(2024, 5, 17, 12, tzinfo=UTC)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddingStore]:
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite")
    yield store
    await store.close()


def make(
    text: str, collection: str | None = "default", *, recipe: str = FAMILY, model: str = MODEL, hour: float = 0
) -> NewEmbedding:
    moment = NOON + timedelta(hours=hour)
    vector = np.ones(4, np.float32)
    row = NewEmbedding(text, compute_text_hash(text), model, recipe, vector, 5, 0, RequestStamp("ip", moment), moment)
    return replace(row, collection=collection)


def make_query(text: str) -> NewEmbedding:
    return replace(make(text, None), is_searchable=False)


async def add(store: EmbeddingStore, *rows: NewEmbedding) -> list[int]:
    return await store.add_embeddings(rows)


async def add_document(
    store: EmbeddingStore, filename: str, texts: Sequence[str], collection: str = "default", model: str = MODEL
) -> list[int]:
    row_ids = await store.add_embeddings([make(text, None, model=model) for text in texts])
    positions = np.arange(len(texts))
    places = SentencePlaces(np.array(row_ids, np.int64), np.zeros_like(positions), positions, positions + 1)
    file_hash = compute_text_hash("\n".join(texts))
    document = NewDocument(
        filename,
        "text/plain",
        file_hash,
        b"",
        model,
        FAMILY,
        "s",
        places,
        RequestStamp("ip", NOON),
        NOON,
        collection,
    )
    await store.add_document(document)
    return row_ids


async def find(store: EmbeddingStore, text: str) -> StoredEmbedding:
    return (await store.find_embeddings([compute_text_hash(text)], MODEL, FAMILY))[compute_text_hash(text)]


async def find_ids(store: EmbeddingStore, **conditions: object) -> list[int]:
    row_ids = await store.find_row_ids(MODEL, [FAMILY], **conditions)  # type: ignore[arg-type]
    assert row_ids.dtype == np.int64
    return row_ids.tolist()


# --- who is where ---


async def test_text_is_in_every_collection_that_it_was_asked_for_in(store: EmbeddingStore) -> None:
    """One row, however many collections; a new name makes a collection."""
    first = await add(store, make("a"))
    again = await add(store, make("a", "cats"), make("b", "cats"))
    assert again[0] == first[0]
    assert await add(store, make("a", "dogs")) == first
    assert (await find(store, "a")).collections == {"default", "cats", "dogs"}
    assert await find_ids(store, collection="cats") == again
    assert await find_ids(store, collection="dogs") == await find_ids(store, collection="default") == first
    assert await find_ids(store, collection="never named") == []
    assert await find_ids(store) == again


async def test_same_new_text_twice_in_one_call_is_in_both_collections(store: EmbeddingStore) -> None:
    """Also if the first of them was a query, which is in none."""
    row_ids = await add(store, make_query("a"), make("a", "cats"), make("a", "dogs"), make("a", None))
    assert len(set(row_ids)) == 1
    found = await find(store, "a")
    assert (found.collections, found.is_searchable) == ({"cats", "dogs"}, True)


async def test_query_is_in_no_collection_until_it_is_asked_for_as_a_text(store: EmbeddingStore) -> None:
    """It is found by its hash, listed among all strings, and by no search."""
    [query, text] = await add(store, make_query("a"), make("b"))
    found = await find(store, "a")
    assert (found.row_id, found.collections, found.is_searchable) == (query, frozenset(), False)
    assert await find_ids(store) == (await store.read_vectors(MODEL, FAMILY, after_row_id=0, limit=9))[0].tolist()
    assert await find_ids(store) == [text]
    assert await store.list_texts(None, None, 0) == ["a", "b"]
    assert await store.list_texts(None, None, 0, "default") == ["b"]
    assert await add(store, make_query("a")) == [query]
    assert await find_ids(store) == [text]
    assert await store.place_embeddings([query, 77], "cats") == {query}
    assert await find_ids(store, collection="cats") == [query]
    assert (await find(store, "a")).is_searchable


async def test_document_is_in_every_collection_that_it_was_submitted_to(store: EmbeddingStore) -> None:
    """With all its sentences, which are in none by themselves."""
    row_ids = await add_document(store, "a.txt", ["One.", "Two."], "cats")
    assert await add_document(store, "a.txt", ["One.", "Two."], "dogs") == row_ids
    found = await store.find_document(compute_text_hash("One.\nTwo."), "a.txt", MODEL, FAMILY, "s")
    assert found is not None
    assert found.collections == {"cats", "dogs"}
    await store.place_document(found.row_id, "birds")
    for collection in ("cats", "dogs", "birds"):
        assert await find_ids(store, collection=collection) == row_ids
        assert await store.list_texts(None, None, 0, collection) == ["One.", "Two."]
        assert await store.list_document_filenames(None, None, 0, collection) == ["a.txt"]
    assert await find_ids(store, collection="default") == []
    assert await store.list_document_filenames(None, None, 0, "default") == []
    sentence = await find(store, "One.")
    assert (sentence.collections, sentence.is_searchable) == (frozenset(), True)


async def test_collections_are_listed_with_what_is_in_them(store: EmbeddingStore) -> None:
    """A text counts once, though it was asked for and stands in two documents."""
    assert await store.list_collections() == [StoredCollection("default", 0, 0)]
    await add(store, make("One.", "cats"), make_query("not counted"))
    await add_document(store, "a.txt", ["One.", "Two."], "cats")
    await add_document(store, "b.txt", ["One.", "Three."], "cats")
    await add(store, make("One."))
    assert await store.list_collections() == [StoredCollection("default", 1, 0), StoredCollection("cats", 3, 2)]


async def test_lookup_shows_the_collections_of_rows_from_another_process(store: EmbeddingStore, tmp_path: Path) -> None:
    """A name that this process has not seen yet is read when it is needed."""
    other = await EmbeddingStore.open(f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite")
    await find_ids(store)
    await add(other, make("a", "new name"))
    assert (await find(store, "a")).collections == {"new name"}
    await other.close()


# --- filters ---


async def test_filters_take_whole_and_cut_texts_of_the_family_and_nothing_else(store: EmbeddingStore) -> None:
    """Other models, other families, and recipes that only look alike are left out."""
    rows = [make("a"), make("b", recipe=CUT), make("c", recipe=f"{FAMILY}:split512")]
    others = [make("a", model="other"), make("a", recipe="fedcba9876543210"), make("a", recipe=f"{FAMILY}x:right512")]
    row_ids = await add(store, *rows, *others)
    assert await find_ids(store) == row_ids[:3]
    both = await store.find_row_ids(MODEL, [FAMILY, "fedcba9876543210"])
    assert both.tolist() == [*row_ids[:3], row_ids[4]]
    assert (await store.find_row_ids(MODEL, [])).tolist() == []
    assert (await store.find_row_ids("unknown", [FAMILY])).tolist() == []


async def test_dates_are_those_of_the_first_request_with_any_zone(store: EmbeddingStore) -> None:
    """`since` is inside, `until` is not; one without a zone is UTC."""
    row_ids = await add(store, *(make(f"text {hour}", hour=hour) for hour in range(6)))
    await add(store, make("text 1", "cats", hour=5))
    assert await find_ids(store, since=NOON + timedelta(hours=2)) == row_ids[2:]
    assert await find_ids(store, until=NOON + timedelta(hours=2)) == row_ids[:2]
    assert await find_ids(store, since=datetime(2024, 5, 17, 13), until=datetime(2024, 5, 17, 14)) == row_ids[1:2]
    assert await find_ids(store, collection="cats", until=NOON + timedelta(hours=2)) == row_ids[1:2]
    assert await find_ids(store, collection="cats", since=NOON + timedelta(hours=2)) == []


async def test_documents_are_filtered_by_name_and_collection(store: EmbeddingStore) -> None:
    """The same name in two collections is told apart; conditions are met together."""
    cats = await add_document(store, "a.txt", ["One.", "Shared."], "cats")
    dogs = await add_document(store, "a.txt", ["Two.", "Shared."], "dogs")
    await add_document(store, "a.txt", ["One."], "cats", model="other")
    assert await find_ids(store, filename="a.txt") == sorted({*cats, *dogs})
    assert await find_ids(store, filename="a.txt", collection="dogs") == sorted(dogs)
    assert await find_ids(store, filename="b.txt") == []
    assert await find_ids(store, filename="a.txt", since=NOON + timedelta(hours=1)) == []
    assert await find_ids(store, filename="a.txt", until=NOON + timedelta(hours=1)) == sorted({*cats, *dogs})


async def test_collection_that_holds_everything_is_known_without_reading_it(store: EmbeddingStore) -> None:
    """Texts, documents and queries; then something elsewhere."""

    async def holds(collection: str) -> bool:
        return await store.holds_everything(MODEL, [FAMILY], collection)

    assert not await holds("default")
    await add(store, make("a"), make_query("q"), make("other model's", "cats", model="other"))
    await add_document(store, "a.txt", ["One."])
    assert await holds("default")
    assert not await holds("cats")
    await add_document(store, "b.txt", ["Two."], "cats")
    assert not await holds("default")
    await store.delete_document("b.txt")
    assert await holds("default")
    await add(store, make("c", "cats"))
    assert not await holds("default")


async def test_filters_read_indexes_and_not_the_table(store: EmbeddingStore, tmp_path: Path) -> None:
    """A million rows' vectors would be read otherwise; only the few rows of a document are looked up by their id."""
    await add(store, make("a", "cats"), make("b", "dogs"))
    await add_document(store, "a.txt", ["One."], "cats")
    seen: list[tuple[str, tuple[object, ...]]] = []

    def record(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if "group_concat" in statement:
            seen.append((statement, parameters))  # type: ignore[arg-type]

    event.listen(store._searches, "before_cursor_execute", record)
    await find_ids(store)
    await find_ids(store, collection="cats", since=NOON)
    await find_ids(store, filename="a.txt")
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite")) as connection:
        for statement, parameters in seen:
            details = [row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            assert not [detail for detail in details if detail.startswith("SCAN ") and "embeddings" in detail], details
            if "JOIN" not in statement:
                assert any("COVERING INDEX ix_embeddings_filters" in detail for detail in details), details


# --- forgetting ---


async def test_text_that_was_asked_for_survives_the_deletion_of_its_document(store: EmbeddingStore) -> None:
    """Whether it was asked for before or after the document came; sentences of the document alone go."""
    await add(store, make("Before."))
    row_ids = await add_document(store, "a.txt", ["Before.", "After.", "Sentence."])
    await add(store, make("After.", "cats"))
    removal = await store.delete_document("a.txt")
    assert [row_id for _, _, row_id in removal.rows] == row_ids[2:]
    assert await store.list_texts(None, None, 0) == ["Before.", "After."]
    assert await find_ids(store, collection="default") == row_ids[:1]
    assert await find_ids(store, collection="cats") == row_ids[1:2]


async def test_query_that_stands_in_a_document_goes_with_it(store: EmbeddingStore) -> None:
    """It became searchable through the document alone."""
    [row_id] = await add(store, make_query("Sentence."))
    assert await add_document(store, "a.txt", ["Sentence."], "cats") == [row_id]
    assert await find_ids(store, collection="cats") == [row_id]
    assert len((await store.delete_document("a.txt")).rows) == 1


async def test_document_deleted_from_one_collection_stays_in_the_other(store: EmbeddingStore) -> None:
    """It goes for good with the last one."""
    row_ids = await add_document(store, "a.txt", ["One."], "cats")
    await add_document(store, "a.txt", ["One."], "dogs")
    removal = await store.delete_document("a.txt", collection="cats")
    assert (removal.rows, removal.n_documents) == ([], 1)
    assert await find_ids(store, collection="cats") == []
    assert await find_ids(store, collection="dogs") == row_ids
    assert (await store.delete_document("a.txt", collection="cats")).n_documents == 0
    assert len((await store.delete_document("a.txt", collection="dogs")).rows) == 1
    assert await store.list_document_filenames(None, None, 0) == []


async def test_document_is_deleted_for_the_model_that_is_named(store: EmbeddingStore) -> None:
    """The other model's stays."""
    await add_document(store, "a.txt", ["One."])
    await add_document(store, "a.txt", ["One."], model="other")
    removal = await store.delete_document("a.txt", model_name="other")
    assert [model for model, _, _ in removal.rows] == ["other"]
    assert await store.list_document_filenames(None, None, 0) == ["a.txt"]
