"""The store: what was kept is found as it was, what was forgotten is gone, and ids are never used twice."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import Session

from embeddings_data_models import (
    BulkEmbeddings,
    Document,
    DocumentJob,
    EmbeddingGroup,
    JobState,
    NewDocument,
    NewEmbedding,
    NewTokenLevelBundle,
    RequestStamp,
    Sentence,
    SentencePlaces,
    StoredDocument,
    TextEmbedding,
    TokenLevelEmbeddingBundle,
    compute_combined_feature_vector,
    compute_text_hash,
    compute_token_hash,
)
from llama_embeddings.errors import InvalidInput, ShuttingDown, Unavailable
from llama_embeddings.storage.engine import MAX_LIST_LENGTH
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.storage.writes import Removal

MODEL, RECIPE, SEGMENTATION = "all-MiniLM-L6-v2", "0123456789abcdef", "sentences-1"
STAMP = RequestStamp("203.0.113.7", datetime(2024, 5, 17, 12, 0, 0, 250_000, tzinfo=UTC))
RESPONSE_TIME = datetime(2024, 5, 17, 14, 0, 1, tzinfo=timezone(timedelta(hours=2)))
N_DIMS = 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[EmbeddingStore]:
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")
    yield store
    await store.close()


def make_vector(text: str) -> np.ndarray:
    seed = int(compute_text_hash(text)[:8], 16)
    return np.random.default_rng(seed).standard_normal(N_DIMS).astype(np.float32)


def make_embedding(text: str, model_name: str = MODEL, recipe: str = RECIPE) -> NewEmbedding:
    vector = make_vector(text)
    return NewEmbedding(text, compute_text_hash(text), model_name, recipe, vector, 5, 1, STAMP, RESPONSE_TIME)


def make_sentence(text: str) -> NewEmbedding:
    return replace(make_embedding(text), collection=None)


def make_query(text: str) -> NewEmbedding:
    return replace(make_embedding(text), collection=None, is_searchable=False)


def make_bundle(text: str, tokens: Sequence[str]) -> NewTokenLevelBundle:
    matrix = np.arange(len(tokens) * N_DIMS, dtype=np.float32).reshape(len(tokens), N_DIMS) / 7
    return NewTokenLevelBundle(
        text,
        compute_text_hash(text),
        MODEL,
        RECIPE,
        tuple(tokens),
        matrix,
        compute_combined_feature_vector(matrix),
        2,
        STAMP,
        RESPONSE_TIME,
    )


def make_sentences(texts: Sequence[str]) -> list[Sentence]:
    return [Sentence(text, 1 + i // 2, 10 * i, 10 * i + 9) for i, text in enumerate(texts)]


async def add_document(store: EmbeddingStore, filename: str, texts: Sequence[str]) -> NewDocument:
    row_ids = await store.add_embeddings([make_sentence(text) for text in texts])
    positions = np.arange(len(texts))
    places = SentencePlaces(np.array(row_ids, np.int64), 1 + positions // 2, 10 * positions, 10 * positions + 9)
    document = NewDocument(
        filename,
        "text/plain",
        compute_text_hash("\n".join(texts)),
        b"\x00the file\xff",
        MODEL,
        RECIPE,
        SEGMENTATION,
        places,
        STAMP,
        RESPONSE_TIME,
    )
    await store.add_document(document)
    return document


async def find(store: EmbeddingStore, document: NewDocument) -> Any:
    return await store.find_document(document.file_hash, document.filename, MODEL, RECIPE, SEGMENTATION)


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


@contextmanager
def recorded_reads(store: EmbeddingStore) -> Iterator[list[tuple[str, Any]]]:
    """The statements that the readers run meanwhile, with their parameters."""
    seen: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if not statement.startswith("PRAGMA"):
            seen.append((statement, parameters))

    engines = (store._readers.sync_engine, store._lookups, store._searches)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", record)
    yield seen
    for engine in engines:
        event.remove(engine, "before_cursor_execute", record)


# --- embeddings ---


@pytest.mark.parametrize("text", ["I am so cold", "", " \n", "naïve 東京 🥶", "nul \x00 inside", "x" * 100_000, "';--"])
async def test_embedding_is_found_bit_by_bit(store: EmbeddingStore, text: str) -> None:
    """The vector, its counts and the text come back exactly as they went in."""
    new = make_embedding(text)
    [row_id] = await store.add_embeddings([new])
    [found] = (await store.find_embeddings([new.text_hash], MODEL, RECIPE)).values()
    assert (found.row_id, found.text_hash, found.n_tokens, found.n_tokens_dropped) == (row_id, new.text_hash, 5, 1)
    assert found.vector.dtype == np.float32
    assert found.vector.tobytes() == new.vector.tobytes()
    assert await store.texts_of_rows([row_id]) == {row_id: text}


async def test_found_arrays_are_read_only(store: EmbeddingStore) -> None:
    """Nobody can change what others were given."""
    new = make_embedding("a")
    await store.add_embeddings([new])
    found = (await store.find_embeddings([new.text_hash], MODEL, RECIPE))[new.text_hash]
    with pytest.raises(ValueError, match="read-only"):
        found.vector[0] = 1


async def test_unknown_texts_are_absent(store: EmbeddingStore) -> None:
    """Neither another model's nor another recipe's vector is passed off as this one's."""
    await store.add_embeddings([make_embedding("a", model_name="other"), make_embedding("a", recipe="other")])
    assert await store.find_embeddings([compute_text_hash("a")], MODEL, RECIPE) == {}
    assert await store.find_embeddings([], MODEL, RECIPE) == {}


async def test_many_texts_are_one_statement(store: EmbeddingStore) -> None:
    """A request of 256 texts makes one lookup, not 256."""
    rows = [make_embedding(str(i)) for i in range(256)]
    await store.add_embeddings(rows)
    with recorded_reads(store) as seen:
        found = await store.find_embeddings([row.text_hash for row in rows], MODEL, RECIPE)
    assert len(found) == 256
    assert len(seen) == 1


async def test_more_texts_than_a_statement_can_take_are_found(store: EmbeddingStore) -> None:
    """Beyond SQLite's limit of variables the lookup is split, and nothing gets lost."""
    hashes = [f"{i:064x}" for i in range(MAX_LIST_LENGTH + 10)]
    rows = [make_embedding("first"), make_embedding("last")]
    await store.add_embeddings(rows)
    found = await store.find_embeddings([rows[0].text_hash, *hashes, rows[1].text_hash], MODEL, RECIPE)
    assert set(found) == {row.text_hash for row in rows}


async def test_ids_come_in_order_and_known_texts_keep_theirs(store: EmbeddingStore) -> None:
    """Duplicates, inside one call and across calls, are not an error and make no second row."""
    first = await store.add_embeddings([make_embedding("a"), make_embedding("b")])
    again = await store.add_embeddings([make_embedding(text) for text in ("c", "b", "a", "c")])
    assert again[1:3] == first[::-1]
    assert again[0] == again[3] > max(first)
    assert (await store.statistics()).n_embeddings == 3


async def test_concurrent_adds_of_one_text_share_a_row(store: EmbeddingStore) -> None:
    """A hundred tasks that store the same text get the same id."""
    ids = await asyncio.gather(*(store.add_embeddings([make_embedding("a")]) for _ in range(100)))
    assert len({row_id for [row_id] in ids}) == 1
    assert (await store.statistics()).n_embeddings == 1


async def test_ids_of_one_call_follow_model_and_recipe(store: EmbeddingStore) -> None:
    """One call may bring several groups; each row gets the id of its own group."""
    rows = [make_embedding(text, model) for text in ("a", "b") for model in ("m1", "m2")]
    ids = await store.add_embeddings(rows)
    for row, row_id in zip(rows, ids, strict=True):
        assert (await store.find_embeddings([row.text_hash], row.model_name, RECIPE))[row.text_hash].row_id == row_id


async def test_id_of_a_deleted_row_is_never_given_out_again(store: EmbeddingStore) -> None:
    """An index that still knows the old id cannot take another text for it."""
    [old] = await store.add_embeddings([make_embedding("a")])
    assert (await store.delete_text("a")).rows == [(MODEL, RECIPE, old)]
    [new] = await store.add_embeddings([make_embedding("b")])
    assert new > old


async def test_times_are_stored_in_utc_without_zone(store: EmbeddingStore, path: Path) -> None:
    """Whatever zone a time comes in, the column holds UTC; the total is in seconds."""
    await store.add_embeddings([make_embedding("a")])
    [row] = query(path, "SELECT ip_address, request_time, response_time, total_time FROM embeddings")
    assert row == ("203.0.113.7", "2024-05-17 12:00:00.250000", "2024-05-17 12:00:01.000000", 0.75)


async def test_text_that_cannot_be_stored_fails_alone(store: EmbeddingStore) -> None:
    """A lone surrogate has no UTF-8 form; its neighbours in the group are kept."""
    bad = NewEmbedding("\ud800", "0" * 64, MODEL, RECIPE, make_vector("a"), 1, 0, STAMP, RESPONSE_TIME)
    answers = await asyncio.gather(
        *(store.add_embeddings([row]) for row in (make_embedding("a"), bad, make_embedding("b"))),
        return_exceptions=True,
    )
    assert isinstance(answers[1], UnicodeEncodeError)
    assert await store.list_texts(None, None, 0) == ["a", "b"]


async def test_texts_are_listed_once_oldest_first(store: EmbeddingStore) -> None:
    """A text that several models embedded is one text; limit and offset cut the same order."""
    for text, model in (("b", "m1"), ("a", "m2"), ("b", "m2"), ("c", "m1")):
        await store.add_embeddings([make_embedding(text, model)])
    assert await store.list_texts(None, None, 0) == ["b", "a", "c"]
    assert await store.list_texts("m2", None, 0) == ["a", "b"]
    assert await store.list_texts(None, 1, 1) == ["a"]
    assert await store.list_texts(None, None, 2) == ["c"]
    assert await store.list_texts("unknown", 10, 0) == []


@pytest.mark.parametrize(("n_rows", "count", "expected"), [(0, 5, 0), (3, 5, 3), (5, 5, 5), (6, 5, 3), (23, 5, 4)])
async def test_sample_is_spread_evenly_over_a_groups_rows(
    n_rows: int, count: int, expected: int, store: EmbeddingStore
) -> None:
    """At most as many as asked for, the same every time, and of no other model or recipe."""
    for number in range(n_rows):
        await store.add_embeddings([make_embedding(f"text {number}"), make_embedding(f"text {number}", "other")])
    n_found, vectors = await store.sample_vectors(MODEL, RECIPE, count=count)
    assert (n_found, len(vectors)) == (n_rows, expected)
    every = max(1, -(-n_rows // count))
    wanted = [make_vector(f"text {number}") for number in range(every - 1, n_rows, every)]
    np.testing.assert_array_equal(vectors, np.array(wanted).reshape(expected, -1) if wanted else vectors)
    again = await store.sample_vectors(MODEL, RECIPE, count=count)
    np.testing.assert_array_equal(again[1], vectors)


async def test_last_row_of_a_group_is_found(store: EmbeddingStore) -> None:
    """0 where there is none; rows of other models do not count."""
    assert await store.find_last_row_id(MODEL, RECIPE) == 0
    row_ids = await store.add_embeddings([make_embedding("one"), make_embedding("two")])
    await store.add_embeddings([make_embedding("three", "other")])
    assert await store.find_last_row_id(MODEL, RECIPE) == max(row_ids)


async def test_vectors_are_read_in_pages_of_ascending_ids(store: EmbeddingStore) -> None:
    """Pages put together are the whole group and nothing else, row for row."""
    rows = [make_embedding(str(i)) for i in range(10)]
    ids = await store.add_embeddings(rows)
    await store.add_embeddings([make_embedding(str(i), recipe="other") for i in range(10)])
    pages = []
    last = 0
    while len((page := await store.read_vectors(MODEL, RECIPE, after_row_id=last, limit=4))[0]):
        pages.append(page)
        last = int(page[0][-1])
    assert [len(page[0]) for page in pages] == [4, 4, 2]
    row_ids, vectors = (np.concatenate(parts) for parts in zip(*pages, strict=True))
    assert row_ids.dtype == np.int64
    assert row_ids.tolist() == ids
    np.testing.assert_array_equal(vectors, np.stack([row.vector for row in rows]))


async def test_groups_are_counted(store: EmbeddingStore) -> None:
    """Each pair of model and recipe with its number of rows."""
    await store.add_embeddings([make_embedding("a"), make_embedding("b"), make_embedding("a", recipe="other")])
    assert await store.embedding_groups() == [EmbeddingGroup(MODEL, RECIPE, 2), EmbeddingGroup(MODEL, "other", 1)]


# --- token-level bundles ---


async def test_bundle_is_found_as_it_was(store: EmbeddingStore) -> None:
    """Tokens in their order (also repeated ones), matrix and feature vector, bit by bit."""
    new = make_bundle("so so cold", ["[CLS]", "so", "so", "cold", "[SEP]"])
    row_id = await store.add_token_level_bundle(new)
    found = await store.find_token_level_bundle(new.text_hash, MODEL, RECIPE)
    assert found is not None
    assert (found.row_id, found.tokens, found.n_tokens_dropped) == (row_id, new.tokens, 2)
    np.testing.assert_array_equal(found.matrix, new.matrix)
    np.testing.assert_array_equal(found.feature_vector, new.feature_vector)
    assert await store.find_token_level_bundle(new.text_hash, MODEL, "other") is None


async def test_known_bundle_keeps_its_row(store: EmbeddingStore, path: Path) -> None:
    """Storing it again adds neither a bundle nor tokens."""
    new = make_bundle("so cold", ["so", "cold"])
    ids = await asyncio.gather(*(store.add_token_level_bundle(new) for _ in range(3)))
    assert len(set(ids)) == 1
    assert query(path, "SELECT token_hash, position FROM token_level_embeddings ORDER BY position") == [
        (compute_token_hash(new.text_hash, position, token), position) for position, token in enumerate(new.tokens)
    ]


async def test_texts_with_equal_vectors_are_both_kept(store: EmbeddingStore) -> None:
    """An uncased model gives "Cold" and "cold" the same feature vector."""
    for text in ("Cold", "cold"):
        await store.add_token_level_bundle(make_bundle(text, ["cold"]))
    for text in ("Cold", "cold"):
        assert await store.find_token_level_bundle(compute_text_hash(text), MODEL, RECIPE) is not None


async def test_bundle_of_unequal_lengths_is_refused(store: EmbeddingStore) -> None:
    """A matrix must have a row for each token."""
    bundle = make_bundle("a b", ["a", "b"])
    broken = NewTokenLevelBundle(
        "a b", bundle.text_hash, MODEL, RECIPE, ("a",), bundle.matrix, bundle.feature_vector, 0, STAMP, RESPONSE_TIME
    )
    with pytest.raises(ValueError, match="1 tokens, but 2"):
        await store.add_token_level_bundle(broken)


# --- documents ---


async def test_document_is_found_as_it_was(store: EmbeddingStore, path: Path) -> None:
    """Sentences in order with their provenance and vectors; a sentence may stand in it twice."""
    texts = ["It snows.", "It is cold.", "It snows."]
    document = await add_document(store, "winter.txt", texts)
    found = await find(store, document)
    assert found == StoredDocument(found.row_id, "winter.txt", "text/plain", 3, N_DIMS, True, frozenset(["default"]))
    assert await store.describe_document(found.row_id) == found
    assert await store.read_sentences(found, 0, 3) == make_sentences(texts)
    vectors = await store.read_sentence_vectors(found, 0, 3)
    np.testing.assert_array_equal(vectors, np.stack([make_vector(text) for text in texts]))
    assert query(path, "SELECT file_data FROM document_embeddings") == [(document.file_data,)]
    assert query(path, "SELECT DISTINCT document_id FROM embeddings") == [(found.row_id,)]


async def test_document_is_told_apart_by_each_part_of_its_key(store: EmbeddingStore) -> None:
    """Other bytes, another name, model, recipe or segmentation are another document."""
    document = await add_document(store, "a.txt", ["One."])
    key = [document.file_hash, "a.txt", MODEL, RECIPE, SEGMENTATION]
    assert await store.find_document(*key) is not None
    for position in range(len(key)):
        other = [*key]
        other[position] = "other"
        assert await store.find_document(*other) is None


async def test_document_without_sentences_is_found(store: EmbeddingStore) -> None:
    """An empty document is a result too, and is not computed again."""
    document = await add_document(store, "empty.txt", [])
    found = await find(store, document)
    assert (found.n_sentences, found.n_dims) == (0, 0)
    assert await store.read_sentences(found, 0, 10) == []
    assert (await store.read_sentence_vectors(found, 0, 10)).shape == (0, 0)
    assert await store.measure_longest_sentence(found) == 0


async def test_document_is_read_in_parts_of_any_length(store: EmbeddingStore) -> None:
    """The last part may be shorter; the longest sentence counts characters, not bytes."""
    texts = [f"Sentence {number}." for number in range(7)] + ["Größe, die zählt."]
    found = await find(store, await add_document(store, "parts.txt", texts))
    parts = [await store.read_sentences(found, first, 3) for first in range(0, 8, 3)]
    assert [sentence for part in parts for sentence in part] == make_sentences(texts)
    vectors = [await store.read_sentence_vectors(found, first, 3) for first in range(0, 8, 3)]
    np.testing.assert_array_equal(np.concatenate(vectors), np.stack([make_vector(text) for text in texts]))
    assert await store.measure_longest_sentence(found) == len("Größe, die zählt.")


async def test_document_that_is_forgotten_while_it_is_read_is_an_error(store: EmbeddingStore) -> None:
    """What was read so far must not be taken for the whole."""
    found = await find(store, await add_document(store, "a.txt", ["One.", "Two.", "Three."]))
    assert len(await store.read_sentences(found, 0, 2)) == 2
    await store.delete_text("Three.")
    for read in (store.read_sentences, store.read_sentence_vectors):
        with pytest.raises(Unavailable, match="Submit it again"):
            await read(found, 2, 2)
    assert await store.describe_document(found.row_id) is None


async def test_job_is_kept_as_it_is_overwritten_and_forgotten(store: EmbeddingStore) -> None:
    """Every field comes back, times with their zone; jobs are listed in the order of their submission."""
    new = DocumentJob("b", JobState.WAITING, "größe.txt", MODEL, "default", 12, STAMP)
    later = DocumentJob("a", JobState.WAITING, "later.txt", MODEL, "default", 12, RequestStamp(None))
    await store.put_job(later)
    await store.put_job(new)
    assert await store.list_jobs() == [new, later]
    done = replace(new, state=JobState.DONE, response_time=RESPONSE_TIME, n_sentences=3, source="computed")
    done = replace(done, document_row_id=7, error_code="some_code", error_message="Some words.")
    await store.put_job(done)
    assert await store.list_jobs() == [done, later]
    await store.delete_jobs(["b"])
    assert await store.list_jobs() == [later]


async def test_known_document_keeps_its_row(store: EmbeddingStore) -> None:
    """Storing it again changes nothing."""
    document = await add_document(store, "a.txt", ["One.", "Two."])
    before = await find(store, document)
    assert await store.add_document(document) == before.row_id
    assert await find(store, document) == before
    assert await store.read_sentences(before, 0, 2) == make_sentences(["One.", "Two."])
    assert (await store.statistics()).n_documents == 1


async def test_document_that_lost_a_sentence_is_computed_again(store: EmbeddingStore) -> None:
    """Forgetting a text makes documents with it unknown, rather than shorter; submitting one again restores it."""
    document = await add_document(store, "a.txt", ["One.", "Two."])
    await store.delete_text("Two.")
    assert await find(store, document) is None
    await add_document(store, "a.txt", ["One.", "Two."])
    assert await find(store, document) is not None


async def test_document_whose_sentence_was_just_deleted_is_to_be_retried(store: EmbeddingStore) -> None:
    """Between storing the sentences and their document somebody may forget one; that is nobody's mistake."""
    document = await add_document(store, "a.txt", ["One."])
    await store.delete_text("One.")
    with pytest.raises(Unavailable, match="Submit it again"):
        await store.add_document(document)


async def test_filenames_are_listed_once_oldest_first(store: EmbeddingStore) -> None:
    """Two contents under one name are one name."""
    for filename, text in (("b.txt", "One."), ("a.txt", "Two."), ("b.txt", "Three.")):
        await add_document(store, filename, [text])
    assert await store.list_document_filenames(None, None, 0) == ["b.txt", "a.txt"]
    assert await store.list_document_filenames(MODEL, 1, 1) == ["a.txt"]
    assert await store.list_document_filenames("other", None, 0) == []


# --- forgetting ---


async def test_forgotten_text_is_gone_under_every_model(store: EmbeddingStore, path: Path) -> None:
    """Rows, bundles and tokens; the caller learns what an index has to remove."""
    ids = await store.add_embeddings([make_embedding("a", model) for model in ("m1", "m2")])
    [kept] = await store.add_embeddings([make_embedding("b")])
    await store.add_token_level_bundle(make_bundle("a", ["a"]))
    removal = await store.delete_text("a")
    assert sorted(removal.rows) == [("m1", RECIPE, ids[0]), ("m2", RECIPE, ids[1])]
    assert len(removal.bundles) == 1
    assert await store.texts_of_rows([*ids, kept]) == {kept: "b"}
    for table in ("token_level_embedding_bundles", "token_level_embeddings"):
        assert query(path, f"SELECT * FROM {table}") == []
    assert await store.delete_text("a") == Removal([])


async def test_forgotten_text_is_overwritten_in_the_file(store: EmbeddingStore, path: Path) -> None:
    """Its bytes are not left behind in free pages."""
    await store.add_embeddings([make_embedding("remember me " * 1_000), make_embedding("forget me " * 1_000)])
    await store.delete_text("forget me " * 1_000)
    await store.close()
    assert b"remember me" in path.read_bytes()
    assert b"forget me" not in path.read_bytes()


async def test_forgotten_document_takes_only_its_own_sentences(store: EmbeddingStore) -> None:
    """What another document holds stays until that one goes too; what no document brought stays for good."""
    await store.add_embeddings([make_embedding("Nobody's.")])
    first = await add_document(store, "first.txt", ["Only first.", "Shared."])
    second = await add_document(store, "second.txt", ["Shared.", "Only second."])
    assert (await store.delete_document("first.txt")).rows == [(MODEL, RECIPE, first.places.row_ids[0])]
    assert await find(store, first) is None
    assert await find(store, second) is not None
    removed = {row_id for _, _, row_id in (await store.delete_document("second.txt")).rows}
    assert removed == set(second.places.row_ids)
    assert await store.list_texts(None, None, 0) == ["Nobody's."]
    assert await store.list_document_filenames(None, None, 0) == []
    assert await store.delete_document("second.txt") == Removal([])


async def test_same_sentences_under_two_names_survive_the_first_deletion(store: EmbeddingStore) -> None:
    """The same file, submitted under two names, is two documents."""
    await add_document(store, "a.txt", ["One.", "Two."])
    copy = await add_document(store, "b.txt", ["One.", "Two."])
    assert await store.delete_document("a.txt") == Removal([], n_documents=1)
    assert await find(store, copy) is not None
    assert len((await store.delete_document("b.txt")).rows) == 2


async def test_foreign_keys_hold_after_every_kind_of_delete(store: EmbeddingStore, path: Path) -> None:
    """No row refers to one that is gone."""
    await add_document(store, "a.txt", ["One.", "Two."])
    await add_document(store, "b.txt", ["Two.", "Three."])
    await store.delete_text("Three.")
    await store.delete_document("a.txt")
    assert query(path, "PRAGMA foreign_key_check") == []
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


# --- upkeep ---


async def test_backup_taken_while_writing_is_complete_and_usable(store: EmbeddingStore, tmp_path: Path) -> None:
    """Everything answered before the backup is in it, writes go on meanwhile, and the copy can be opened."""
    rows = [make_embedding(str(i)) for i in range(500)]
    await store.add_embeddings(rows)
    target = tmp_path / "backup.sqlite"
    backup = asyncio.create_task(store.back_up(target))
    for i in range(20):
        await store.add_embeddings([make_embedding(f"meanwhile {i}")])
    await backup
    assert query(target, "PRAGMA integrity_check") == [("ok",)]
    copy = await EmbeddingStore.open(f"sqlite+aiosqlite:///{target}")
    assert len(await copy.find_embeddings([row.text_hash for row in rows], MODEL, RECIPE)) == 500
    await copy.close()
    assert [path.name for path in tmp_path.glob("*.partial")] == []


async def test_backup_never_overwrites(store: EmbeddingStore, tmp_path: Path) -> None:
    """An existing target is refused and stays as it was."""
    target = tmp_path / "precious.txt"
    target.write_text("precious")
    with pytest.raises(InvalidInput, match="exists already"):
        await store.back_up(target)
    assert target.read_text() == "precious"
    with pytest.raises(InvalidInput, match="does not exist"):
        await store.back_up(tmp_path / "nowhere" / "backup.sqlite")


async def test_everything_is_there_after_a_restart(store: EmbeddingStore, path: Path) -> None:
    """Closing leaves one file with all rows; writes after it are refused, not lost silently."""
    await store.add_embeddings([make_embedding("a")])
    await store.close()
    with pytest.raises(ShuttingDown):
        await store.add_embeddings([make_embedding("b")])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again = await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")
    assert await again.list_texts(None, None, 0) == ["a"]
    await again.close()


@pytest.mark.parametrize(("survives_power_cuts", "synchronous"), [(False, 1), (True, 2)])
async def test_writer_waits_for_the_disk_where_answers_survive_power_cuts(
    tmp_path: Path, survives_power_cuts: bool, synchronous: int
) -> None:
    """FULL, an fsync of the log for every commit, instead of NORMAL; also on a connection that is made anew."""
    store = await EmbeddingStore.open(
        f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite", survives_power_cuts=survives_power_cuts
    )
    assert store._writer is not None
    for _ in range(2):
        connection = store._writer.raw_connection()
        assert connection.cursor().execute("PRAGMA synchronous").fetchone() == (synchronous,)
        connection.close()
        store._writer.dispose()
    await store.add_embeddings([make_embedding("a")])
    await store.close()


async def test_statistics_count_rows_and_writes(store: EmbeddingStore) -> None:
    """Rows by table and the queue's figures."""
    await add_document(store, "a.txt", ["One.", "Two."])
    await store.add_token_level_bundle(make_bundle("a", ["a"]))
    await store.check_writable()
    statistics = await store.statistics()
    assert (statistics.n_embeddings, statistics.n_documents, statistics.n_token_level_bundles) == (2, 1, 1)
    assert (statistics.n_writes_committed, statistics.n_writes_failed, statistics.n_lock_retries) == (7, 0, 0)
    assert store.write_queue_depth == statistics.write_queue_depth == 0


async def test_cancelled_reads_leave_the_readers_usable(store: EmbeddingStore) -> None:
    """Clients that hang up in the middle of a read do not use up the pool."""
    await store.add_embeddings([make_embedding(str(i)) for i in range(300)])
    for pause in (0, 0.0005, 0.001, 0.002) * 5:
        read = asyncio.create_task(store.list_texts(None, None, 0))
        await asyncio.sleep(pause)
        read.cancel()
        await asyncio.gather(read, return_exceptions=True)
    assert len(await asyncio.wait_for(store.list_texts(None, None, 0), 5)) == 300


@pytest.mark.parametrize("n_wanted", [0, 3, 700])
@pytest.mark.parametrize("stride", [1, 9])
async def test_vectors_are_read_by_row_id(store: EmbeddingStore, n_wanted: int, stride: int) -> None:
    """A few or many, close together or far apart; rows that are gone are absent."""
    texts = (
        [str(number) for number in range(700 * 9)] if stride == 9 and n_wanted == 700 else [str(i) for i in range(710)]
    )
    row_ids = await store.add_embeddings([make_embedding(text) for text in texts])
    by_id = dict(zip(row_ids, texts, strict=True))
    wanted = np.array(row_ids[:: min(stride, len(row_ids) // max(n_wanted, 1))][:n_wanted], np.int64)
    assert len(wanted) == n_wanted
    [(_, _, gone)] = (await store.delete_text(texts[0])).rows
    found, vectors = await store.read_vectors_of_rows(wanted[::-1])
    assert sorted(found.tolist()) == sorted(set(wanted.tolist()) - {gone})
    for row_id, vector in zip(found.tolist(), vectors, strict=True):
        np.testing.assert_array_equal(vector, make_vector(by_id[row_id]))


@pytest.mark.parametrize("rows_per_read", [1, 2, 4, 100])
async def test_row_ids_of_a_group_are_read_in_order(store: EmbeddingStore, rows_per_read: int) -> None:
    """Whatever the parts, without those of other models and recipes and those that were only asked with."""
    wanted = await store.add_embeddings([make_embedding(str(i)) for i in range(5)])
    queries = [replace(make_embedding(f"query {i}"), collection=None, is_searchable=False) for i in range(3)]
    await store.add_embeddings(queries)
    await store.add_embeddings([make_embedding("0", model_name="other"), make_embedding("0", recipe="other")])
    wanted += await store.add_embeddings([make_embedding("last")])
    assert (await store.read_row_ids(MODEL, RECIPE, rows_per_read=rows_per_read)).tolist() == wanted
    assert len(await store.read_row_ids(MODEL, "none", rows_per_read=rows_per_read)) == 0


@pytest.mark.parametrize("rows_per_read", [1, 2, 7, 100])
async def test_every_text_hash_is_read_whatever_the_parts(store: EmbeddingStore, rows_per_read: int) -> None:
    """Also that of a text with rows on both sides of the border between two parts."""
    texts = [str(number) for number in range(20)]
    for model_name in ("a", "b", "c"):
        await store.add_embeddings([make_embedding(text, model_name=model_name) for text in texts])
    seen: set[str] = set()
    async for part in store.read_digits_of_text_hashes(5, 10, rows_per_read=rows_per_read):
        seen.update(part[start : start + 10] for start in range(0, len(part), 10))
    assert seen == {compute_text_hash(text)[5:15] for text in texts}


async def test_hashes_of_texts_with_token_embeddings_are_read(store: EmbeddingStore) -> None:
    """Theirs alone."""
    bundles = [make_bundle(text, [text]) for text in "abc"]
    for bundle in bundles:
        await store.add_token_level_bundle(bundle)
    await store.add_embeddings([make_embedding("d")])
    read = "".join([part async for part in store.read_digits_of_bundle_hashes(25, 25, rows_per_read=2)])
    assert read == "".join(text_hash[25:50] for text_hash in sorted(bundle.text_hash for bundle in bundles))


@pytest.mark.parametrize("count", [1, 49, 50, 51, 137])
async def test_imports_of_any_length_count_and_keep_what_is_new(store: EmbeddingStore, count: int) -> None:
    """Some rows are there before, and one comes twice."""
    texts = [str(number) for number in range(count)]
    known = await store.add_embeddings([make_embedding(text) for text in texts[::7]])
    vectors = np.stack([make_vector(text) for text in [*texts, texts[-1]]])
    rows = BulkEmbeddings([*texts, texts[-1]], vectors, MODEL, RECIPE, stamp=STAMP)
    assert await store.import_embeddings(rows) == count - len(known)
    found = await store.find_embeddings([compute_text_hash(text) for text in texts], MODEL, RECIPE)
    assert len(found) == count
    for text in texts:
        np.testing.assert_array_equal(found[compute_text_hash(text)].vector, make_vector(text))


@pytest.mark.parametrize("n_tokens", [1, 50, 120])
async def test_bundles_of_any_length_keep_their_tokens(store: EmbeddingStore, n_tokens: int) -> None:
    """In their order."""
    bundle = make_bundle("so cold", [f"token {number}" for number in range(n_tokens)])
    await store.add_token_level_bundle(bundle)
    found = await store.find_token_level_bundle(bundle.text_hash, MODEL, RECIPE)
    assert found is not None
    assert found.tokens == bundle.tokens


async def test_readers_cannot_write(store: EmbeddingStore) -> None:
    """The pool for reading refuses what would change the database."""
    async with store._readers.connect() as connection:
        with pytest.raises(Exception, match="readonly database"):
            await connection.exec_driver_sql("DELETE FROM embeddings")


async def test_reads_go_through_indexes(store: EmbeddingStore, path: Path) -> None:
    """No read walks through a table: each searches by key, or walks through an index that has all it needs."""
    document = await add_document(store, "a.txt", ["One."])
    bundle = make_bundle("so cold", ["so", "cold"])
    await store.add_token_level_bundle(bundle)
    with recorded_reads(store) as seen:
        await store.find_embeddings(["a", "b"], MODEL, RECIPE)
        await store.read_vectors(MODEL, RECIPE, after_row_id=0, limit=10)
        await store.texts_of_rows([1, 2])
        assert len(await store.read_row_ids(MODEL, RECIPE)) == 1
        await store.read_vectors_of_rows(np.array([1, 2]))
        await store.read_vectors_of_rows(np.arange(1, 1000))
        assert [len(digits) async for digits in store.read_digits_of_text_hashes(0, 10)] == [10]
        assert [len(digits) async for digits in store.read_digits_of_bundle_hashes(10, 10)] == [10]
        await store.embedding_groups()
        await store.find_token_level_bundle(bundle.text_hash, MODEL, RECIPE)
        await find(store, document)
        await store.list_texts(None, 10, 0)
        await store.list_texts(MODEL, 10, 0)
    assert len(seen) == 24
    with closing(sqlite3.connect(path)) as connection:
        for statement, parameters in seen:
            details = [row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            scans = [detail for detail in details if detail.startswith("SCAN ") and "COVERING INDEX" not in detail]
            # The part of a listing that was asked for is a table of its own, made on the way.
            assert scans in ([], ["SCAN anon_1"], ["SCAN page"]), statement


async def test_orm_classes_read_what_the_store_wrote(store: EmbeddingStore, path: Path) -> None:
    """The classes of the data models, with their JSON properties, see the same rows."""
    await add_document(store, "a.txt", ["One."])
    bundle = make_bundle("so cold", ["so", "cold"])
    await store.add_token_level_bundle(bundle)
    engine = create_engine(f"sqlite:///{path}")
    with Session(engine) as session:
        embedding = session.scalars(select(TextEmbedding)).one()
        np.testing.assert_array_equal(embedding.embedding, make_vector("One."))
        document = session.scalars(select(Document)).one()
        assert document.document_embeddings[0].sentences[0].embedding is embedding
        stored = session.scalars(select(TokenLevelEmbeddingBundle)).one()
        np.testing.assert_array_equal(stored.matrix, bundle.matrix)
        assert [row.token for row in stored.token_level_embeddings] == ["so", "cold"]
        assert stored.combined_feature_vector is not None
    engine.dispose()
