"""The index in service, on a database that is a dictionary: nothing lost, nothing that comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from llama_embeddings.errors import StoreBusy
from llama_embeddings.services import indexing
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.vectors.index import Key, VectorIndexes
from tests.serving import wait_until

KEY = ("model", "family")
N_DIMS = 16
FLAT_LIMIT, MERGE_AT = 300, 100


class Rows:
    """A database: row ids to unit vectors, all of one index."""

    def __init__(self, prefix: str = "", key: Key = KEY) -> None:
        self.prefix = prefix
        self.key = key
        self.vectors: dict[int, np.ndarray] = {}
        self.last_id = 0
        self.numbers: dict[Key, str] = {}
        self.takes_no_numbers = False
        self.failures_to_come: list[Exception] = []
        self.n_reads = 0

    def insert(self, row_ids: range, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.random.default_rng((seed, row_ids.start)).standard_normal((len(row_ids), N_DIMS))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.vectors.update(zip(row_ids, vectors, strict=True))
        self.last_id = max(self.last_id, row_ids[-1])
        return np.array(row_ids, np.int64), vectors

    def delete(self, *row_ids: int) -> list[tuple[str, str, int]]:
        for row_id in row_ids:
            del self.vectors[row_id]
        return [(*self.key, row_id) for row_id in row_ids]

    async def keys(self) -> list[Key]:
        return [self.key] if self.vectors else []

    async def read_row_ids(self, model_name: str, family: str) -> np.ndarray:
        assert (model_name, family) == self.key
        return np.array(sorted(self.vectors), np.int64)

    async def read_vectors(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.n_reads += 1
        await asyncio.sleep(0)
        if self.failures_to_come:
            raise self.failures_to_come.pop()
        there = [row_id for row_id in row_ids.tolist() if row_id in self.vectors]
        found = np.stack([self.vectors[row_id] for row_id in there]) if there else np.empty((0, 0), np.float32)
        return np.array(there, np.int64), found

    async def read_last_id(self) -> int:
        return self.last_id

    async def find_snapshot_number(self, model_name: str, family: str) -> str | None:
        return self.numbers.get((model_name, family))

    async def put_snapshot_number(self, model_name: str, family: str, number: str) -> None:
        if self.takes_no_numbers:
            raise StoreBusy("Locked.")
        self.numbers[model_name, family] = number


@asynccontextmanager
async def serve(
    *sources: Rows, directory: Path | None = None, is_computing: Callable[[], bool] = lambda: False
) -> AsyncIterator[tuple[IndexService, VectorIndexes]]:
    """A service from its start to its end."""
    indexes = VectorIndexes(flat_limit=FLAT_LIMIT, merge_at=MERGE_AT)
    service = IndexService(indexes, sources, directory, is_computing=is_computing)
    await service.load()
    service.start()
    try:
        yield service, indexes
    finally:
        await asyncio.wait_for(service.close(), 20)


def is_settled(indexes: VectorIndexes, key: Key = KEY) -> bool:
    index = indexes.get(*key)
    return index is not None and index.is_compressed and index.next_step() is None


async def check_all_are_found(service: IndexService, rows: Rows) -> None:
    """Each row is the nearest to its own vector; and an exact search of everything finds everything."""
    for row_id in list(rows.vectors)[:: max(1, len(rows.vectors) // 60)]:
        row_ids, scores = await service.search(*rows.key, rows.vectors[row_id], 1)
        assert row_ids.tolist() == [row_id]
        assert scores[0] == pytest.approx(1, abs=1e-5)
    found, _ = await service.search(*rows.key, np.ones(N_DIMS, np.float32), 10**6, exact=True)
    assert sorted(found.tolist()) == sorted(rows.vectors)


async def test_small_index_is_searched_without_the_database() -> None:
    """It has the vectors."""
    rows = Rows()
    async with serve(rows) as (service, _):
        service.add(*KEY, *rows.insert(range(1, 50)))
        await check_all_are_found(service, rows)
        assert rows.n_reads == 0


async def test_grown_index_is_compressed_in_the_background_and_loses_nothing() -> None:
    """Rows come, go and are searched for all the while."""
    rows = Rows()
    async with serve(rows) as (service, indexes):
        for start in range(1, 1000, 50):
            service.add(*KEY, *rows.insert(range(start, start + 50)))
            await service.remove(rows.delete(start, start + 7))
            row_ids, _ = await service.search(*KEY, rows.vectors[start + 1], 1)
            assert row_ids.tolist() == [start + 1]
            await asyncio.sleep(0.01)
        await wait_until(lambda: is_settled(indexes), timeout_seconds=20)
        assert indexes.sizes() == {KEY: len(rows.vectors)}
        await check_all_are_found(service, rows)


async def test_upkeep_waits_for_the_engine_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on where there is a moment without a pass, and where there is none."""
    monkeypatch.setattr(indexing, "MAX_WAIT_SECONDS", 0.02)
    looks: list[float] = []

    def note_look() -> bool:
        looks.append(time.monotonic())
        return True

    rows = Rows()
    async with serve(rows, is_computing=note_look) as (service, indexes):
        service.add(*KEY, *rows.insert(range(1, 600)))
        await wait_until(lambda: is_settled(indexes), timeout_seconds=20)
        assert looks[-1] - looks[0] > 10 * 0.02
        await check_all_are_found(service, rows)


@pytest.mark.parametrize("n_rows", [200, 800])
async def test_exact_search_and_filters_agree_with_brute_force(n_rows: int) -> None:
    """Small and compressed; scores are those of the vectors themselves."""
    rows = Rows()
    row_ids, vectors = rows.insert(range(1, n_rows + 1))
    query = vectors[5]
    allowed = np.arange(2, n_rows, 3)
    async with serve(rows) as (service, _):
        for ids in (row_ids, allowed):
            scores = vectors[ids - 1] @ query
            best = ids[np.argsort(-scores)[:20]]
            found, cosines = await service.search(
                *KEY, query, 20, allowed=None if ids is row_ids else allowed, exact=True
            )
            assert found.tolist() == best.tolist()
            np.testing.assert_allclose(cosines, np.sort(scores)[::-1][:20], atol=1e-6)
        few = np.array([3, 7, n_rows])
        found, _ = await service.search(*KEY, query, 20, allowed=few)
        assert sorted(found.tolist()) == few.tolist()
        assert (await service.search(*KEY, query, 20, allowed=few[:0]))[0].tolist() == []


async def test_rows_that_are_gone_from_the_database_are_not_found() -> None:
    """Though the index was not told of it yet, as many as are wanted come back."""
    rows = Rows()
    _, vectors = rows.insert(range(1, 801))
    async with serve(rows) as (service, _):
        nearest = np.argsort(-(vectors @ vectors[0]))[:400] + 1
        rows.delete(*nearest.tolist())
        found, _ = await service.search(*KEY, vectors[0], 100)
        assert len(found) == 100
        assert set(found.tolist()) <= set(rows.vectors)


async def test_snapshot_is_used_and_brought_up_to_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was deleted since is gone, what came since is there: rows with new ids, and older ones as well."""
    caplog.set_level(logging.INFO)
    rows = Rows()
    rows.insert(range(101, 901))
    async with serve(rows, directory=tmp_path):
        pass
    assert "from the database" in caplog.text
    caplog.clear()
    rows.delete(150, 151, 900)
    rows.insert(range(50, 60))
    rows.insert(range(901, 1200))
    async with serve(rows, directory=tmp_path) as (service, indexes):
        assert "from its snapshot" in caplog.text
        assert indexes.sizes() == {KEY: len(rows.vectors)}
        await check_all_are_found(service, rows)


async def test_what_was_merged_is_in_the_snapshot_of_the_end(tmp_path: Path) -> None:
    """The next start has little to read."""
    rows = Rows()
    rows.insert(range(1, 401))
    async with serve(rows, directory=tmp_path) as (service, indexes):
        service.add(*KEY, *rows.insert(range(401, 801)))
        await wait_until(lambda: is_settled(indexes))
    rows.n_reads = 0
    async with serve(rows, directory=tmp_path) as (service, _):
        assert rows.n_reads <= 2, "the witnesses, and at most some new rows"
        await check_all_are_found(service, rows)


async def test_damaged_snapshot_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a line in the log that says so."""
    rows = Rows()
    rows.insert(range(1, 501))
    async with serve(rows, directory=tmp_path):
        pass
    [path] = tmp_path.glob("*.index")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    async with serve(rows, directory=tmp_path) as (service, _):
        assert "damaged or cut short" in caplog.text
        await check_all_are_found(service, rows)
    assert len(path.read_bytes()) == len(content)


async def test_snapshot_of_another_database_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ids are there, but they are other rows': a backup was restored and went its own way."""
    rows = Rows()
    rows.insert(range(1, 501))
    async with serve(rows, directory=tmp_path):
        pass
    rows.insert(range(490, 501), seed=5)
    async with serve(rows, directory=tmp_path) as (service, _):
        assert "another database" in caplog.text
        await check_all_are_found(service, rows)


async def test_snapshot_ahead_of_its_database_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its number says: the rows that come next will have ids that it gives to others."""
    rows = Rows()
    rows.insert(range(1, 501))
    async with serve(rows, directory=tmp_path):
        pass
    rows.delete(*range(400, 501))
    rows.last_id = 399
    async with serve(rows, directory=tmp_path) as (service, _):
        assert "never had" in caplog.text
        await check_all_are_found(service, rows)


async def test_snapshot_whose_number_is_not_committed_leaves_the_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file gets its name after the commit; the older one and its number stay together."""
    rows = Rows()
    rows.insert(range(1, 401))
    async with serve(rows, directory=tmp_path):
        pass
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    async with serve(rows, directory=tmp_path) as (service, indexes):
        service.add(*KEY, *rows.insert(range(401, 601)))
        await wait_until(lambda: is_settled(indexes))
        rows.takes_no_numbers = True
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [content]
    rows.takes_no_numbers = False
    async with serve(rows, directory=tmp_path) as (service, _):
        assert "not used" not in caplog.text
        await check_all_are_found(service, rows)


async def test_end_with_a_database_that_cannot_be_read_is_an_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other parts have to be ended as well."""
    rows = Rows()
    async with serve(rows, directory=tmp_path) as (service, indexes):
        service.add(*KEY, *rows.insert(range(1, 401)))
        await wait_until(lambda: is_settled(indexes))
        rows.failures_to_come = [StoreBusy("Locked.")]
    assert "made anew at the next start" in caplog.text


async def test_snapshots_that_cannot_be_written_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their directory cannot be made; the log says so."""
    (tmp_path / "file").touch()
    rows = Rows()
    rows.insert(range(1, 501))
    async with serve(rows, directory=tmp_path / "file" / "indexes") as (service, _):
        await check_all_are_found(service, rows)
    assert "cannot be kept up to date" in caplog.text


@pytest.mark.parametrize("failure", [StoreBusy("Locked."), AssertionError("A mistake of ours.")])
async def test_upkeep_that_fails_is_tried_again(
    failure: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a locked database nor a mistake is a reason to give up; of the latter the log says where it was."""
    monkeypatch.setattr(indexing, "RETRY_SECONDS", 0.01)
    rows = Rows()
    async with serve(rows) as (service, indexes):
        rows.failures_to_come = [failure] * 2
        service.add(*KEY, *rows.insert(range(1, 401)))
        await wait_until(lambda: is_settled(indexes))
        assert caplog.text.count("tried again later") == 2
        assert ("Traceback" in caplog.text) == isinstance(failure, AssertionError)
        await check_all_are_found(service, rows)


async def test_end_does_not_wait_for_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled; the database has everything."""
    rows = Rows()
    reading = asyncio.Event()

    async def read_forever(_row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reading.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(rows, "read_vectors", read_forever)
    async with serve(rows) as (service, _):
        service.add(*KEY, *rows.insert(range(1, 401)))
        await asyncio.wait_for(reading.wait(), 5)


async def test_each_family_is_read_from_its_own_source() -> None:
    """Texts and tokens have ids of their own, and may share numbers."""
    texts, tokens = Rows(), Rows("tokens-", ("model", "tokens-family"))
    texts.insert(range(1, 400))
    tokens.insert(range(1, 400), seed=3)
    async with serve(texts, tokens) as (service, indexes):
        assert set(indexes.sizes()) == {KEY, ("model", "tokens-family")}
        await check_all_are_found(service, texts)
        await check_all_are_found(service, tokens)


async def test_rows_of_a_cut_text_are_removed_from_their_family() -> None:
    """Their recipe is the family with the rule of truncation behind it."""
    rows = Rows()
    async with serve(rows) as (service, indexes):
        service.add(*KEY, *rows.insert(range(1, 4)))
        assert await service.remove([("model", "family:right512", 2), ("other", "family", 3)]) == 1
        assert indexes.sizes() == {KEY: 2}


async def test_searching_what_was_never_added_finds_nothing() -> None:
    """No error: nothing was embedded with this model yet."""
    async with serve(Rows()) as (service, _):
        row_ids, scores = await service.search("none", "none", np.ones(3, np.float32), 5)
        assert (len(row_ids), len(scores)) == (0, 0)
