"""The store against a machine that misbehaves: other processes' locks, full disks, read-only files, kill -9."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import closing
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from embeddings_data_models import NewEmbedding, RequestStamp, compute_text_hash, utc_now
from llama_embeddings.errors import StoreBusy, StoreFull, StoreUnusable
from llama_embeddings.storage.store import EmbeddingStore

MODEL, RECIPE = "all-MiniLM-L6-v2", "0123456789abcdef"
ROOT = Path(__file__).parents[2]

# Half a second of patience where the defaults have eight.
QUICK_RETRIES: dict[str, Any] = {"max_retries": 8, "retry_delay_base_seconds": 0.1, "jitter_factor": 0.1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[EmbeddingStore]:
    store = await open_store(path)
    yield store
    await store.close()


async def open_store(path: Path) -> EmbeddingStore:
    return await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}", **QUICK_RETRIES)


def make_embedding(text: str, n_dims: int = 384) -> NewEmbedding:
    vector = np.full(n_dims, len(text), dtype=np.float32)
    return NewEmbedding(text, compute_text_hash(text), MODEL, RECIPE, vector, 5, 0, RequestStamp(), utc_now())


async def add(store: EmbeddingStore, text: str) -> int:
    [row_id] = await store.add_embeddings([make_embedding(text)])
    return row_id


async def is_known(store: EmbeddingStore, text: str) -> bool:
    return bool(await store.find_embeddings([compute_text_hash(text)], MODEL, RECIPE))


def hold_lock(path: str, is_held: Event, may_end: Event, seconds: float) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        is_held.set()
        may_end.wait(seconds)
        connection.execute("ROLLBACK")


class OtherProcess:
    """A second process that keeps the database locked until `release`, or for so many seconds."""

    def __init__(self, path: Path, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
        is_held, self._may_end = context.Event(), context.Event()
        self._process = context.Process(target=hold_lock, args=(str(path), is_held, self._may_end, seconds))
        self._process.start()
        assert is_held.wait(30)

    def release(self) -> None:
        self._may_end.set()
        self._process.join(30)


# --- locks ---


async def test_no_write_fails_while_another_process_locks_for_a_while(store: EmbeddingStore, path: Path) -> None:
    """Writes wait, reads do not, and everything is there afterwards."""
    await add(store, "before")
    other = OtherProcess(path, seconds=60)
    writes = [asyncio.create_task(add(store, f"text {i}")) for i in range(60)]
    await asyncio.sleep(0.3)
    assert await is_known(store, "before")
    assert not any(write.done() for write in writes)
    other.release()
    row_ids = await asyncio.gather(*writes)
    assert len(set(row_ids)) == 60
    assert (await store.statistics()).n_lock_retries > 0


async def test_lock_for_good_answers_busy_and_ends_by_itself(store: EmbeddingStore, path: Path) -> None:
    """Reads go on, writes and the readiness check say when to come back, and all is well after the release."""
    await add(store, "before")
    other = OtherProcess(path, seconds=60)
    with pytest.raises(StoreBusy) as caught:
        await add(store, "refused")
    assert caught.value.retry_after_seconds >= 1
    with pytest.raises(StoreBusy):
        await store.check_writable()
    assert await is_known(store, "before")
    other.release()
    await add(store, "after")
    await store.check_writable()
    assert await store.list_texts(None, None, 0) == ["before", "after"]


async def test_locked_database_can_be_opened_after_the_lock(path: Path) -> None:
    """A start waits for a short lock of another process, and says StoreBusy after a long one."""
    path.touch()
    other = OtherProcess(path, seconds=60)
    with pytest.raises(StoreBusy):
        await open_store(path)
    opening = asyncio.create_task(open_store(path))
    await asyncio.sleep(0.1)
    other.release()
    await (await opening).close()


async def test_two_processes_may_make_the_same_database(path: Path) -> None:
    """Both migrate at the same time; one does it, the other sees that it is done."""
    stores = await asyncio.gather(*(open_store(path) for _ in range(4)))
    await asyncio.gather(*(add(store, f"text {i}") for i, store in enumerate(stores)))
    assert len(await stores[0].list_texts(None, None, 0)) == 4
    for store in stores:
        await store.close()


# --- no room, not writable, damaged ---


async def limit_pages(store: EmbeddingStore, n_pages: int) -> None:
    """SQLite's own limit gives the same error as a full disk, at the same place, on every machine."""
    with store._writer.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {n_pages}")


async def test_full_disk_refuses_writes_serves_reads_and_recovers(store: EmbeddingStore) -> None:
    """A clear error while there is no room; when there is room again, the same write succeeds."""
    await add(store, "before")
    await limit_pages(store, 1)
    with pytest.raises(StoreFull, match="Make room"):
        await store.add_embeddings([make_embedding(f"text {i}") for i in range(200)])
    assert await is_known(store, "before")
    assert not await is_known(store, "text 0")
    await limit_pages(store, 1_000_000)
    assert len(await store.add_embeddings([make_embedding(f"text {i}") for i in range(200)])) == 200
    await store.check_writable()


async def test_large_write_without_room_does_not_fail_small_ones(store: EmbeddingStore) -> None:
    """What still fits is kept, though it shared a group with what did not."""
    await store.add_embeddings([make_embedding(str(i)) for i in range(50)])
    for i in range(40):
        await store.delete_text(str(i))
    await limit_pages(store, 1)
    large = store.add_embeddings([make_embedding(f"large {i}", 4096) for i in range(200)])
    answers = await asyncio.gather(add(store, "small 1"), large, add(store, "small 2"), return_exceptions=True)
    assert isinstance(answers[1], StoreFull)
    assert await is_known(store, "small 1")
    assert await is_known(store, "small 2")


async def test_read_only_database_refuses_writes_serves_reads_and_recovers(store: EmbeddingStore) -> None:
    """The writer opens a new connection after such a failure, since the old one stays read-only."""
    await add(store, "before")
    is_read_only = True

    def refuse_writes(connection: Any, _record: Any) -> None:
        if is_read_only:
            connection.cursor().execute("PRAGMA query_only = ON")

    event.listen(store._writer, "connect", refuse_writes)
    store._writer.dispose()
    for _ in range(3):
        with pytest.raises(StoreFull, match="read-only"):
            await add(store, "refused")
    with pytest.raises(StoreFull):
        await store.check_writable()
    assert await is_known(store, "before")
    is_read_only = False
    await add(store, "after")
    await store.check_writable()


async def test_lock_and_full_disk_at_the_same_time_both_pass(store: EmbeddingStore, path: Path) -> None:
    """One fault does not hide the other, and the queue outlives both."""
    await limit_pages(store, 1)
    other = OtherProcess(path, seconds=60)
    with pytest.raises(StoreBusy):
        await store.add_embeddings([make_embedding(f"text {i}") for i in range(200)])
    other.release()
    with pytest.raises(StoreFull):
        await store.add_embeddings([make_embedding(f"text {i}") for i in range(200)])
    await limit_pages(store, 1_000_000)
    assert len(await store.add_embeddings([make_embedding(f"text {i}") for i in range(200)])) == 200


OPEN_AS_NOBODY = """
import asyncio, os, sys
from llama_embeddings.storage.store import EmbeddingStore

async def open_and_close(path):
    await (await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")).close()

# Everything is imported by now, and the files are made, before permissions are given up. Root may write everywhere.
asyncio.run(open_and_close(sys.argv[1]))
os.chmod(sys.argv[1], 0o444)
os.chmod(os.path.dirname(sys.argv[1]), 0o555)
if os.geteuid() == 0:
    os.setuid(65534)
for path in (sys.argv[1], sys.argv[1] + ".new"):
    try:
        asyncio.run(open_and_close(path))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_start_in_a_read_only_directory_says_so() -> None:
    """A real directory without permission to write, with a database and without one: the same clear message."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = [sys.executable, "-c", OPEN_AS_NOBODY, str(directory / "embeddings.sqlite")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        output = subprocess.run(program, capture_output=True, text=True, env=environment).stdout.splitlines()
        directory.chmod(0o755)
    message = "StoreFull The database cannot be written: its file, directory or disk is read-only or failing."
    assert output == [message, message]


async def test_damage_found_while_serving_is_named(path: Path) -> None:
    """Pages overwritten by something else: the read says that the file is damaged, and does not answer nonsense."""
    store = await open_store(path)
    await store.add_embeddings([make_embedding(f"text {i}") for i in range(500)])
    await store.close()
    store = await open_store(path)
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xff" * (path.stat().st_size - 4096 * 2))
    with pytest.raises(StoreUnusable, match="damaged"):
        await store.find_embeddings([compute_text_hash("text 1")], MODEL, RECIPE)
    await store.close()


# --- kill -9 ---

WRITE_AND_PRINT = """
import asyncio, itertools, sys
import numpy as np
from embeddings_data_models import NewEmbedding, RequestStamp, compute_text_hash, utc_now
from llama_embeddings.storage.store import EmbeddingStore

async def write(store, counter):
    for i in counter:
        text = f"{sys.argv[2]} {i}"
        vector = np.full(384, i, dtype=np.float32)
        row = NewEmbedding(text, compute_text_hash(text), "m", "r", vector, 1, 0, RequestStamp(), utc_now())
        [row_id] = await store.add_embeddings([row])
        print(row_id, text, sep="|", flush=True)

async def main():
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{sys.argv[1]}")
    counter = itertools.count()
    await asyncio.gather(*(write(store, counter) for _ in range(8)))

asyncio.run(main())
"""


def kill_while_writing(path: Path, name: str, seconds: float) -> dict[int, str]:
    """What a process had answered when it was killed in the middle of its writes: texts by row id."""
    program = [sys.executable, "-c", WRITE_AND_PRINT, str(path), name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    lines = [first, *child.stdout]
    child.wait()
    child.stdout.close()
    # The last line may be cut off by the kill.
    answered = (line.rstrip("\n").split("|") for line in lines if line.endswith("\n"))
    return {int(row_id): text for row_id, text in answered}


async def test_every_answered_row_survives_kill_9(path: Path) -> None:
    """Killed at random moments under load: each printed row is there, none twice, and the file is sound."""
    answered: dict[int, str] = {}
    moments = random.Random(4)
    for round_number in range(4):
        new = kill_while_writing(path, f"round {round_number}", moments.uniform(0.02, 0.3))
        assert new
        assert not new.keys() & answered.keys()
        answered |= new
    with closing(sqlite3.connect(path)) as connection:
        stored = dict(connection.execute("SELECT id, text FROM embeddings"))
        assert {row_id: stored.get(row_id) for row_id in answered} == answered
        assert len(set(stored.values())) == len(stored)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    store = await open_store(path)
    found = await store.find_embeddings([compute_text_hash(text) for text in answered.values()], "m", "r")
    assert {embedding.row_id for embedding in found.values()} == set(answered)
    await store.close()


DIE_IN_THE_FIRST_TRANSACTION = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA user_version")
connection.execute("PRAGMA cache_size = 1")
connection.execute("PRAGMA cache_spill = 1")
connection.execute("BEGIN EXCLUSIVE")
connection.execute("CREATE TABLE rows (data BLOB)")
connection.executemany("INSERT INTO rows VALUES (?)", [(bytes(4000),)] * 100)
os.kill(os.getpid(), 9)
"""


async def test_database_of_a_start_that_was_killed_at_once_can_be_opened(path: Path) -> None:
    """Its first transaction left a rollback journal, which a look without permission to write cannot roll back."""
    subprocess.run([sys.executable, "-c", DIE_IN_THE_FIRST_TRANSACTION, str(path)], check=False)
    assert path.stat().st_size > 0
    assert path.with_name(path.name + "-journal").stat().st_size > 0
    store = await open_store(path)
    await add(store, "after all")
    assert await is_known(store, "after all")
    await store.close()
