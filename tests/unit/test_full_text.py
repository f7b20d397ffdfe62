"""Full text: every string is a safe query, every script is found, and the index is never behind an answer.

And whatever is removed or damaged, the index stays sound or becomes so again.
"""

from __future__ import annotations

import asyncio
import sqlite3
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection

from embeddings_data_models import (
    NewDocument,
    NewEmbedding,
    RequestStamp,
    SentencePlaces,
    compute_text_hash,
)
from llama_embeddings.errors import FullTextUnavailable
from llama_embeddings.storage import full_text, full_text_follower
from llama_embeddings.storage import store as store_module
from llama_embeddings.storage.migrations import COLLECTIONS_AND_FULL_TEXT
from llama_embeddings.storage.store import EmbeddingStore

MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"
NOON = datetime(2024, 5, 17, 12, tzinfo=UTC)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddingStore]:
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite")
    yield store
    await store.close()


def make(text: str, recipe: str = FAMILY, model: str = MODEL) -> NewEmbedding:
    vector = np.ones(4, np.float32)
    return NewEmbedding(text, compute_text_hash(text), model, recipe, vector, 5, 0, RequestStamp("ip", NOON), NOON)


def make_query(text: str) -> NewEmbedding:
    return replace(make(text), collection=None, is_searchable=False)


async def search(
    store: EmbeddingStore, query: str, *, limit: int = 10, row_ids: list[int] | None = None, model: str = MODEL
) -> list[str]:
    """Texts found, best first."""
    allowed = None if row_ids is None else np.array(row_ids, np.int64)
    found = await store.search_text(query, model_name=model, families=[FAMILY], limit=limit, row_ids=allowed)
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    texts = await store.texts_of_rows([row_id for row_id, _ in found])
    return [texts[row_id] for row_id, _ in found]


async def test_any_word_matches_and_rare_words_weigh_more(store: EmbeddingStore) -> None:
    """So that a question works: its small words are in every text, the one that matters decides."""
    texts = ["the wing of a bird", "the drag of the wing", "the bird and the bee", "the sea"]
    await store.add_embeddings([make(text) for text in texts])
    assert (await search(store, "What is the drag?"))[0] == "the drag of the wing"
    assert set(await search(store, "birds flying over wings")) == set(texts[:3])
    assert await search(store, "helicopter") == []
    assert len(await search(store, "the", limit=2)) == 2


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("RUNNING", "She runs."),
        ("cafe", unicodedata.normalize("NFD", "Le café est fermé")),
        ("CAFÉ", "cafe culture"),
        ("don't", "I don’t know"),
        ("state-of-the-art", "the art of the state"),
        ("ωμέγα", "ΩΜΈΓΑ και άλφα"),
        ("хитрый", "Хитрый лис"),
        ("हिन्दी", "मुझे हिन्दी आती है"),
        ("東京", "私は東京都に住んでいます"),
        ("住", "私は東京都に住んでいます"),
        ("都", "東京都"),
        ("北京大学在哪里", "我在北京大学学习"),
        ("서울", "서울에서 만나요"),
        ("ภาษา", "ฉันพูดภาษาไทยได้"),
        ("ラーメン食べたい", "昨日ラーメンを食べました"),
        ("3.14", "pi is 3.14159 or 3.14"),
    ],
)
async def test_texts_of_every_script_are_found_by_their_words(store: EmbeddingStore, query: str, text: str) -> None:
    """Case, accents and English endings aside; scripts without spaces by any run of characters."""
    await store.add_embeddings([make("unrelated 別の話"), make(text)])
    assert await search(store, query) == [text]


@pytest.mark.parametrize(
    "query",
    [
        "",
        " \n\t",
        '"',
        '"unclosed',
        "a AND",
        "NOT a",
        "NEAR(a b, 3)",
        "text : a",
        "-a",
        "a*",
        "^a",
        "(((",
        "{a}",
        "'; DROP TABLE embeddings; --",
        "🥶",
        "\x00nul\x00",
        "\ud800",
        "ab " * 4_000,
        "x" * 10_000,
        "寒" * 10_000,
        " ".join(str(number) for number in range(3_000)),
        "\u0301\u0302",
    ],
)
async def test_any_string_is_a_safe_query(store: EmbeddingStore, query: str) -> None:
    """Operators, quotes, broken Unicode and ten thousand characters: words or nothing, never an error."""
    await store.add_embeddings([make("a text to be found")])
    assert await search(store, query) in ([], ["a text to be found"])


@given(st.text(st.characters(exclude_categories=())))
def test_terms_are_always_quoted_words(query: str) -> None:
    """No character of a query is ever outside quotes, but for the star of a single ideograph."""
    terms = full_text.list_query_terms(query)
    assert len(terms) <= full_text.MAX_QUERY_TERMS
    for term in terms:
        assert term.removesuffix("*")[0] == term.removesuffix("*")[-1] == '"'
        assert '"' not in term.removesuffix("*")[1:-1]


@given(st.text())
def test_segmenting_keeps_every_character(text: str) -> None:
    """Pairs repeat characters, but lose none and change none outside unspaced scripts."""
    segmented = full_text.segment(text)
    assert set(text) <= set(segmented)
    if text.isascii():
        assert segmented == text


async def test_results_are_of_the_model_and_families_asked_for(store: EmbeddingStore) -> None:
    """The better hits of others do not use up the limit."""
    await store.add_embeddings([make(f"wing {i}", model="other") for i in range(1_500)])
    await store.add_embeddings([make("wing", "fedcba9876543210"), make("a longer text about a wing")])
    assert await search(store, "wing", limit=1) == ["a longer text about a wing"]
    assert len(await search(store, "wing", limit=2_000, model="other")) == 1_500


async def test_filter_comes_before_the_limit(store: EmbeddingStore) -> None:
    """Ids that may be returned are returned though a thousand others rank above them."""
    rows = await store.add_embeddings([make(f"wing {i}") for i in range(1_200)])
    [last] = await store.add_embeddings([make("only at the end of this long text is there a wing")])
    assert await search(store, "wing", limit=1, row_ids=[last]) == ["only at the end of this long text is there a wing"]
    assert len(await search(store, "wing", limit=5, row_ids=rows[10:12])) == 2
    assert await search(store, "wing", row_ids=[]) == []


@pytest.mark.parametrize("n_others_wanted", [0, 80], ids=["few wanted", "many wanted"])
async def test_filter_comes_before_what_is_left_out(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch, n_others_wanted: int
) -> None:
    """A word that is too common everywhere, but not among what is wanted, finds all that it is in there."""
    monkeypatch.setattr(full_text, "MAX_SCORED_ROWS", 50)
    monkeypatch.setattr(full_text, "_MAX_HITS", 200)
    await store.add_embeddings([make(f"a wing on page {i}") for i in range(600)])
    others = await store.add_embeddings([make(f"nothing of it {i}") for i in range(n_others_wanted)])
    await store.add_embeddings([make("the rare thing"), make("a wing in another model", model="other")])
    texts = [f"wing {i} of many words in a row" for i in range(9)] + ["wing"]
    rows = await store.add_embeddings([make(text) for text in texts])
    await store.add_embeddings([make(f"a wing on page {i}") for i in range(600, 1_200)])
    for query in ("rare wing", "wing", "a wing in the rare"):
        found = await search(store, query, limit=10, row_ids=[*others, *rows])
        assert set(found[:10]) == set(texts)
    assert (await search(store, "wing", limit=1, row_ids=[*others, *rows])) == ["wing"]
    assert await search(store, "rare wing", model="other") == ["a wing in another model"]


async def test_too_common_words_are_left_out_among_what_is_wanted(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows that may be found, those with the rare words are; a common word alone still finds something."""
    monkeypatch.setattr(full_text, "MAX_SCORED_ROWS", 50)
    monkeypatch.setattr(full_text, "_MAX_HITS", 200)
    rows = await store.add_embeddings([make(f"common number {i}") for i in range(600)])
    wanted = rows[::2]
    assert await search(store, "common number 8", row_ids=wanted) == ["common number 8"]
    assert await search(store, "common number 7", limit=400, row_ids=wanted) != []
    assert len(await search(store, "common", limit=400, row_ids=wanted)) == 200
    assert await search(store, "common", row_ids=[]) == []


async def test_queries_are_found_once_they_are_texts(store: EmbeddingStore) -> None:
    """Both when the index had passed their row already and when it had not."""
    [early] = await store.add_embeddings([make_query("early query")])
    assert await search(store, "query") == []
    [late] = await store.add_embeddings([make_query("late query")])
    await store.place_embeddings([late], "dogs")
    await store.place_embeddings([early], "cats")
    assert set(await search(store, "query")) == {"early query", "late query"}
    await store.add_embeddings([make("late query")])
    assert len(await search(store, "query")) == 2


async def test_forgotten_texts_leave_no_word_behind(store: EmbeddingStore, tmp_path: Path) -> None:
    """Whether the index had come to them or not; the others are found as before."""
    await store.add_embeddings([make("an old secret 秘密"), make("something else")])
    assert len(await search(store, "secret")) == 1
    await store.add_embeddings([make("a new secret")])
    for text in ("an old secret 秘密", "a new secret"):
        await store.delete_text(text)
    assert await search(store, "secret 秘密") == []
    assert await search(store, "something") == ["something else"]
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite")) as connection:
        connection.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, full_text, row)")
        assert connection.execute("SELECT term FROM words").fetchall() == [("els",), ("someth",)]
        connection.execute("INSERT INTO full_text (full_text) VALUES ('integrity-check')")


async def test_index_follows_by_itself(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A moment after rows were added, without anybody searching; also what an earlier process left."""
    monkeypatch.setattr(full_text_follower, "PAUSE_SECONDS", 0.01)
    await store.add_embeddings([make(f"text {i}") for i in range(2_500)])
    other = await EmbeddingStore.open(f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite")
    async with asyncio.timeout(10):
        while (await other._read_full_text_position())[1] < 2_500:
            await asyncio.sleep(0.01)
    await other.close()


async def test_common_words_are_left_out_where_they_are_too_many(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rare ones are always looked for; a common one alone still finds something."""
    monkeypatch.setattr(full_text, "MAX_SCORED_ROWS", 50)
    monkeypatch.setattr(full_text, "_MAX_HITS", 200)
    await store.add_embeddings([make(f"common number {i}") for i in range(300)])
    assert await search(store, "common number 7") == ["common number 7"]
    assert len(await search(store, "common", limit=400)) == 200


async def test_full_text_is_rebuilt_from_rows_of_a_bulk(store: EmbeddingStore) -> None:
    """More rows than one step takes in are all there at the first search."""
    await store.add_embeddings([make(f"row {i}") for i in range(3_000)])
    assert len(await search(store, "row", limit=5_000)) == 3_000


# --- what is removed ---


def check_index(tmp_path: Path, texts: list[str]) -> None:
    """The index holds the words of these texts and nothing else, and its totals are theirs."""
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite")) as connection:
        connection.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, full_text, row)")
        found = connection.execute("SELECT term, doc FROM words").fetchall()
        [totals] = connection.execute("SELECT block FROM full_text_data WHERE id = 1").fetchone()
        connection.execute("INSERT INTO full_text (full_text) VALUES ('integrity-check')")
        connection.execute(f"CREATE VIRTUAL TABLE temp.fresh USING fts5{find_arguments(connection)}")
        connection.executemany("INSERT INTO fresh (text) VALUES (?)", [(full_text.segment(text),) for text in texts])
        connection.execute("CREATE VIRTUAL TABLE temp.fresh_words USING fts5vocab(temp, fresh, row)")
        assert found == connection.execute("SELECT term, doc FROM fresh_words").fetchall()
        [expected] = connection.execute("SELECT block FROM fresh_data WHERE id = 1").fetchone()
        assert totals == expected or not any(totals + expected)  # of nothing, they are empty or zeros


def find_arguments(connection: sqlite3.Connection) -> str:
    [sql] = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'full_text'").fetchone()
    return str(sql[sql.index("(") :])


@pytest.mark.parametrize("times", [1, 12])
async def test_deleted_query_leaves_the_index_sound(store: EmbeddingStore, tmp_path: Path, times: int) -> None:
    """The index never held it: neither its words nor its totals change, however often that happens."""
    texts = [f"a text about wing {i}" for i in range(5)]
    await store.add_embeddings([make(text) for text in texts])
    for i in range(times):
        await store.add_embeddings([make_query(f"a query about wing {i}")])
        await search(store, "wing")
        await store.delete_text(f"a query about wing {i}")
    assert len(await search(store, "wing")) == 5
    check_index(tmp_path, texts)
    await store.delete_text(texts.pop())
    assert set(await search(store, "wing")) == set(texts)
    check_index(tmp_path, texts)


def make_document(row_ids: list[int], name: str) -> NewDocument:
    columns = (np.array(row_ids), *(np.zeros(len(row_ids), np.int64) for _ in range(3)))
    return NewDocument(
        filename=name,
        mimetype="text/plain",
        file_hash=compute_text_hash(name),
        file_data=None,
        model_name=MODEL,
        recipe=FAMILY,
        segmentation="sentences-1",
        places=SentencePlaces(*columns),
        stamp=RequestStamp("ip", NOON),
        response_time=NOON,
    )


async def test_every_way_of_removing_leaves_the_index_sound(store: EmbeddingStore, tmp_path: Path) -> None:
    """Queries, texts, sentences, and what was one before it was the other; before and after the index came to them."""
    sentences = [replace(make(f"sentence {i}"), collection=None) for i in range(4)]
    row_ids = await store.add_embeddings(sentences)
    await store.index_full_text()
    await store.add_document(make_document(row_ids, "first"))
    [query] = await store.add_embeddings([make_query("sentence that was a query")])
    await search(store, "sentence")
    await store.place_embeddings([query], "cats")
    await store.add_embeddings([make_query("sentence 1"), make("sentence that was a query")])
    late = await store.add_embeddings([replace(make("a late sentence"), collection=None)])
    await store.add_document(make_document([query, *late], "second"))
    assert len((await store.delete_document("first")).rows) == 4
    assert await search(store, "late") == ["a late sentence"]
    assert len((await store.delete_document("second")).rows) == 1
    assert await search(store, "sentence") == ["sentence that was a query"]
    check_index(tmp_path, ["sentence that was a query"])
    await store.delete_text("sentence that was a query")
    check_index(tmp_path, [])


def apply_each(change: Any, connection: Connection, payloads: Sequence[Any]) -> list[None]:
    return [change(connection, rows) for rows in payloads]


async def test_what_the_index_does_not_hold_cannot_be_removed(store: EmbeddingStore, tmp_path: Path) -> None:
    """Nor can a row be put in twice, whoever asks for it."""
    [first, second] = await store.add_embeddings([make("a wing"), make("a bird")])
    assert await search(store, "wing") == ["a wing"]
    for change in (full_text.add_rows, full_text.remove_rows, full_text.add_rows):
        for rows in ([(first, "a wing"), (99, "never there")], [(second, "a bird")], [(second, "a bird")]):
            await store._write_queue.submit(
                lambda connection, _, change=change, rows=rows: [change(connection, rows)], None
            )
    check_index(tmp_path, ["a wing", "a bird"])


# --- damage ---

NONSENSE = np.random.default_rng(0).bytes(50).hex()
DAMAGES = {
    "no data": ["DELETE FROM full_text_data"],
    "nonsense": [f"UPDATE full_text_data SET block = x'{NONSENSE}'"],
    "no structure": [f"UPDATE full_text_data SET block = x'{NONSENSE}' WHERE id = 10"],
    "no totals": ["UPDATE full_text_data SET block = x'' WHERE id = 1"],
    "no sizes": ["DELETE FROM full_text_docsize"],
    "a table less": ["DROP TABLE full_text_docsize"],
    "another table less": ["DROP TABLE full_text_data"],
    "no version": ["DELETE FROM full_text_config"],
    "another version": ["UPDATE full_text_config SET v = 99"],
    "only a name": [f"DROP TABLE {table}" for table in full_text.SHADOW_TABLES],
    "nothing": ["DROP TABLE full_text"],
}
TEXTS = [f"number {i} of many wings" for i in range(300)]


def damage(tmp_path: Path, statements: list[str]) -> None:
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


async def search_many(store: EmbeddingStore) -> None:
    assert set(await search(store, "wings", limit=400)) >= set(TEXTS[1:])


async def delete_one(store: EmbeddingStore) -> None:
    assert len((await store.delete_text(TEXTS[0])).rows) == 1


async def add_query_as_text(store: EmbeddingStore) -> None:
    await store.add_embeddings([make("a query of wings")])


async def add_new(store: EmbeddingStore) -> None:
    await store.add_embeddings([make("something new")])


@pytest.mark.parametrize("noticed_by", [search_many, delete_one, add_query_as_text, add_new])
@pytest.mark.parametrize("is_restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("statements", DAMAGES.values(), ids=list(DAMAGES))
async def test_damaged_index_is_made_anew_and_fails_nothing(
    tmp_path: Path, statements: list[str], is_restarted: bool, noticed_by: Callable[[EmbeddingStore], Awaitable[None]]
) -> None:
    """Whatever is wrong with it and whoever finds out: that call has its answer, and then every word is found."""
    if statements is DAMAGES["no totals"] and noticed_by in (add_query_as_text, add_new):
        pytest.skip("The totals of nothing and a text are those of the text: nothing is to be noticed.")
    url = f"sqlite+aiosqlite:///{tmp_path}/embeddings.sqlite"
    store = await EmbeddingStore.open(url)
    await store.add_embeddings([*map(make, TEXTS), make_query("a query of wings")])
    await search_many(store)
    if is_restarted:
        await store.close()
        damage(tmp_path, statements)
        store = await EmbeddingStore.open(url)
    else:
        damage(tmp_path, statements)
    await noticed_by(store)
    await search_many(store)
    await store.add_embeddings([make("one more"), make_query("no wings")])
    await store.delete_text("no wings")
    assert await search(store, "more") == ["one more"]
    texts = await store.list_texts(None, None, 0)
    await store.close()
    # Some damage shows only to a connection that is opened later.
    store = await EmbeddingStore.open(url)
    await search_many(store)
    await store.close()
    check_index(tmp_path, [text for text in texts if text != "a query of wings" or noticed_by is add_query_as_text])


async def test_damage_is_logged_once_and_without_texts(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that it is known; nothing of the texts stands in the log."""
    await store.add_embeddings([make(text) for text in TEXTS])
    await search_many(store)
    damage(tmp_path, DAMAGES["no sizes"])
    await search_many(store)
    await search_many(store)
    assert caplog.text.count("full-text index is damaged") == 1
    assert "wings" not in caplog.text


async def test_index_that_cannot_be_made_anew_holds_up_nothing_else(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts come and go; a search by words says why it finds nothing, until the index can be made."""
    await store.add_embeddings([make(text) for text in TEXTS])
    await search_many(store)
    with monkeypatch.context() as patch:
        patch.setattr(full_text, "_is_done", lambda connection, replace: False)
        damage(tmp_path, DAMAGES["no data"])
        for text in TEXTS[:3]:
            assert len((await store.delete_text(text)).rows) == 1
        await store.add_embeddings([make("a new text")])
        with pytest.raises(FullTextUnavailable, match="cannot be made anew; all else goes on"):
            await search(store, "wings")
    assert len(await search(store, "wings", limit=400)) == 297
    check_index(tmp_path, [*TEXTS[3:], "a new text"])


async def test_search_does_not_wait_for_very_many_rows(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how far the index has come and that meaning can be searched; it finds everything a while later."""
    monkeypatch.setattr(store_module, "MAX_ROWS_TO_WAIT_FOR", 1_000)
    monkeypatch.setattr(full_text_follower, "PAUSE_SECONDS", 0.01)
    await store.add_embeddings([make(f"row {i}") for i in range(1_200)])
    with pytest.raises(FullTextUnavailable, match=r"row \d+ of 1200.*by meaning alone"):
        await search(store, "row")
    async with asyncio.timeout(10):
        while (await store._read_full_text_position())[1] < 1_200:
            await asyncio.sleep(0.01)
    assert len(await search(store, "row", limit=2_000)) == 1_200


def test_index_is_made_as_the_migration_made_it() -> None:
    """The same arguments, so that an index made anew finds what the first one found."""
    [made] = [statement for statement in COLLECTIONS_AND_FULL_TEXT.statements if "VIRTUAL TABLE" in statement]
    assert made.split() == full_text.CREATE_INDEX.split()
