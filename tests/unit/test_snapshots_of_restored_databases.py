"""Snapshots of indexes beside a database that went back in its history: ids come again, and stand for other rows."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from embeddings_data_models import BulkEmbeddings
from llama_embeddings.services.indexing import IndexService, TextVectors
from llama_embeddings.services.token_index import TokenVectors
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.vectors.index import VectorIndexes

KEY = ("model", "family")
N_DIMS = 16
# So many rows that the digests of single ones in a snapshot miss the rows that are imported after a restore.
N_ROWS, N_LATER, N_AFTERWARDS = 8_000, 4_000, 60


def make_rows(first: int, count: int, *, kind: str = "row") -> BulkEmbeddings:
    vectors = np.random.default_rng((first, len(kind))).standard_normal((count, N_DIMS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return BulkEmbeddings([f"{kind} {first + place}" for place in range(count)], vectors, *KEY, "default")


@asynccontextmanager
async def serve(path: Path) -> AsyncIterator[tuple[EmbeddingStore, IndexService]]:
    """Store and index from their start to their end, with snapshots beside the database."""
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}", follows_full_text=False)
    indexes = VectorIndexes(flat_limit=300, merge_at=100)
    sources = [TextVectors(store), TokenVectors(store)]
    service = IndexService(indexes, sources, path.with_name(f"{path.name}.indexes"))
    await service.load()
    try:
        yield store, service
    finally:
        await service.close()
        await store.close()


async def import_rows(path: Path, rows: BulkEmbeddings) -> None:
    """By a process of its own, which keeps no index."""
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}", follows_full_text=False)
    await store.import_embeddings(rows)
    await store.close()


async def count_found(path: Path, rows: BulkEmbeddings) -> int:
    """How many of the rows are the nearest to their own vectors after a start."""
    async with serve(path) as (store, service):
        n_found = 0
        for text, vector in zip(rows.texts, rows.vectors, strict=True):
            row_ids, _ = await service.search(*KEY, vector, 1)
            n_found += list((await store.texts_of_rows(row_ids.tolist())).values()) == [text]
        return n_found


def restore(copy: Path, path: Path) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    shutil.copy(copy, path)


async def back_up(path: Path, copy: Path) -> None:
    async with serve(path) as (store, _):
        await store.back_up(copy)


async def copy_by_hand(path: Path, copy: Path) -> None:
    shutil.copy(path, copy)


@pytest.mark.parametrize("make_copy", [back_up, copy_by_hand])
@pytest.mark.parametrize("is_snapshot_made_before", [True, False])
async def test_rows_that_came_after_a_restore_are_found(
    tmp_path: Path, make_copy: Callable[[Path, Path], AsyncIterator[None]], is_snapshot_made_before: bool
) -> None:
    """Whether the copy was made before the first snapshot or between two, by the command or by hand."""
    path, copy = tmp_path / "embeddings.sqlite", tmp_path / "copy.sqlite"
    await import_rows(path, make_rows(0, N_ROWS))
    if is_snapshot_made_before:
        async with serve(path):
            pass
    await make_copy(path, copy)
    await import_rows(path, make_rows(N_ROWS, N_LATER))
    async with serve(path):
        pass
    restore(copy, path)
    afterwards = make_rows(N_ROWS, N_AFTERWARDS, kind="imported after the restore")
    await import_rows(path, afterwards)
    assert await count_found(path, afterwards) == N_AFTERWARDS


async def test_copy_that_knows_the_snapshot_may_use_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Made after it, the copy has used all of its ids: a copy that goes its own way loses nothing by it."""
    path, copy = tmp_path / "embeddings.sqlite", tmp_path / "copy.sqlite"
    await import_rows(path, make_rows(0, N_ROWS))
    async with serve(path):
        pass
    await copy_by_hand(path, copy)
    later = make_rows(N_ROWS, N_AFTERWARDS)
    await import_rows(path, later)
    restore(copy, path)
    afterwards = make_rows(N_ROWS, N_AFTERWARDS, kind="imported after the restore")
    await import_rows(path, afterwards)
    assert await count_found(path, afterwards) == N_AFTERWARDS
    assert "not used" not in caplog.text


async def test_another_database_under_the_same_name_does_not_get_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a backup, even if nothing was changed since: a number goes on with the original alone."""
    path, copy = tmp_path / "embeddings.sqlite", tmp_path / "copy.sqlite"
    await import_rows(path, make_rows(0, N_ROWS))
    await back_up(path, copy)
    restore(copy, path)
    async with serve(path):
        assert "another database, or of another state of this one; made anew" in caplog.text
    path.unlink()
    caplog.clear()
    await import_rows(path, make_rows(0, N_ROWS, kind="another"))
    async with serve(path):
        assert "made anew" in caplog.text
