"""Full text: every string is a safe query, every script is found, and the index is never behind an answer."""

from __future__ import annotations

import asyncio
import sqlite3
import unicodedata
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_data_models import NewEmbedding, RequestStamp, compute_text_hash
from llama_embeddings.storage import full_text, full_text_follower
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


async def test_queries_are_found_once_they_are_texts(store: EmbeddingStore) -> None:
    """Both when the index had passed their row already and when it had not."""
    [early] = await store.add_embeddings([make_query("early query")])
    assert await search(store, "query") == []
    [late] = await store.add_embeddings([make_query("late query")])
    await store.place_embeddings([late], None)
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
    await store.add_embeddings([make(f"common number {i}") for i in range(300)])
    assert await search(store, "common number 7") == ["common number 7"]
    assert len(await search(store, "common", limit=400)) == 200


async def test_full_text_is_rebuilt_from_rows_of_a_bulk(store: EmbeddingStore) -> None:
    """More rows than one step takes in are all there at the first search."""
    await store.add_embeddings([make(f"row {i}") for i in range(3_000)])
    assert len(await search(store, "row", limit=5_000)) == 3_000
