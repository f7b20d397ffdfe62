"""A database of every earlier version of the schema opens in the present one, with everything found."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from embeddings_data_models import StoredCollection, compute_text_hash
from llama_embeddings.storage.migrations import find_newest_version
from llama_embeddings.storage.store import EmbeddingStore

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"
TEXTS = ["I feel extremely chilly", "今日はとても寒い", "a cut text"]
SENTENCES = ["Snow fell on the hills all night.", "By noon the road was clear again."]


def make_vector(text: str) -> np.ndarray:
    seed = int(compute_text_hash(text)[:8], 16)
    return np.random.default_rng(seed).standard_normal(8).astype(np.float32)


@pytest.mark.parametrize("fixture", sorted(FIXTURES.glob("version-*.sql")), ids=lambda path: path.stem)
async def test_database_of_an_earlier_version_opens_with_everything_found(fixture: Path, tmp_path: Path) -> None:
    """Texts, a document and token embeddings by their keys, by filters and by words, and they can be forgotten."""
    path = tmp_path / "embeddings.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(fixture.read_text())
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")
    for text in (*TEXTS[:2], *SENTENCES):
        [found] = (await store.find_embeddings([compute_text_hash(text)], MODEL, FAMILY)).values()
        np.testing.assert_array_equal(found.vector, make_vector(text))
        assert found.is_searchable
        assert found.collections == (frozenset() if text in SENTENCES else {"default"})
    assert await store.list_texts(None, None, 0, "default") == [*TEXTS, *SENTENCES]
    assert await store.list_collections() == [StoredCollection("default", 5, 1)]
    assert (await store.find_row_ids(MODEL, [FAMILY], collection="default")).tolist() == [1, 2, 3, 4, 5]
    assert (await store.find_row_ids(MODEL, [FAMILY], filename="weather.txt")).tolist() == [4, 5]
    [(row_id, _)] = await store.search_text("snow", model_name=MODEL, families=[FAMILY], limit=5)
    assert row_id == 4
    key = (compute_text_hash(" ".join(SENTENCES)), "weather.txt", MODEL, FAMILY, "sentences-1")
    document = await store.find_document(*key)
    assert document is not None
    assert [sentence.text for sentence in await store.read_sentences(document, 0, 9)] == SENTENCES
    assert document.collections == {"default"}
    bundle = await store.find_token_level_bundle(compute_text_hash("so cold"), MODEL, FAMILY)
    assert bundle is not None
    assert bundle.tokens == ("[CLS]", "so", "cold")
    assert len((await store.delete_document("weather.txt")).rows) == 2
    assert await store.list_texts(None, None, 0) == TEXTS
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (find_newest_version(),)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
