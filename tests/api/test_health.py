"""Alive and ready are two questions."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from llama_embeddings.storage import writes
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application, wait_until


async def test_health_answers_while_the_engine_is_held_up(running: RunningApplication) -> None:
    """It asks nothing of the engine."""
    running.backend.gate.clear()
    waiting = asyncio.create_task(
        running.client.post("/get_embedding_vector_for_string/", json={"text": "held up in the engine"})
    )
    await asyncio.sleep(0.05)
    response = await asyncio.wait_for(running.client.get("/health"), timeout=2.0)
    assert (response.status_code, response.json()) == (200, {"status": "alive"})
    assert not waiting.done()
    running.backend.gate.set()
    assert (await waiting).status_code == 200


async def test_readiness_is_a_real_embedding_each_time(running: RunningApplication) -> None:
    """Past memory and store: every answer costs one pass of the engine, and nothing is stored."""
    n_passes = len(running.backend.passes)
    for number in range(1, 3):
        response = await running.client.get("/ready")
        assert response.status_code == 200
        assert list(response.json()) == ["status", "model_name", "embedding_seconds"]
        assert (response.json()["status"], response.json()["model_name"]) == ("ready", FAKE_MODEL_NAME)
        assert response.json()["embedding_seconds"] > 0
        assert len(running.backend.passes) == n_passes + number
    assert (await running.client.get("/get_all_stored_strings/")).json() == {"strings": []}


async def test_failing_engine_is_alive_but_not_ready(running: RunningApplication) -> None:
    """A server that could only answer from its store is taken out of service by /ready alone."""
    running.backend.fail_when_more_than = 0
    ready = await running.client.get("/ready")
    assert ready.status_code >= 500
    assert ready.json()["code"] == "inference_failed"
    assert (await running.client.get("/health")).status_code == 200
    running.backend.fail_when_more_than = None
    assert (await running.client.get("/ready")).status_code == 200


# Ready under faults: 503 with the reason, and 200 again when it is over


async def check_not_ready(running: RunningApplication, code: str, *words: str) -> None:
    """503 with Retry-After and the reason, while the process is alive."""
    reply = await asyncio.wait_for(running.client.get("/ready"), timeout=10)
    assert (reply.status_code, reply.json()["code"]) == (503, code), reply.text
    assert int(reply.headers["retry-after"]) >= 1
    assert [word for word in words if word not in reply.json()["detail"]] == []
    assert (await running.client.get("/health")).status_code == 200


async def check_ready(running: RunningApplication) -> None:
    reply = await asyncio.wait_for(running.client.get("/ready"), timeout=10)
    assert reply.status_code == 200, reply.text


async def test_model_file_that_is_gone_is_not_ready(running: RunningApplication) -> None:
    """Though the model in memory could go on: after a restart it could not."""
    file = running.models_directory / f"{FAKE_MODEL_NAME}.gguf"
    away = file.rename(file.with_suffix(".away"))
    await asyncio.sleep(1.1)  # the catalogue looks at its files once a second
    await check_not_ready(running, "model_not_found", FAKE_MODEL_NAME)
    away.rename(file)
    await asyncio.sleep(1.1)
    await check_ready(running)


async def test_engine_whose_worker_ended_is_not_ready_until_it_is_loaded_again(running: RunningApplication) -> None:
    """The next request that finds nobody using it loads it anew; meanwhile it is said."""
    async with running.app.state.services.models.lease(None) as engine:
        engine.batcher.failure = RuntimeError("the worker ended")
        await check_not_ready(running, "model_loading", "replaced")
    await check_ready(running)


async def test_engine_that_hangs_is_not_ready(tmp_path: Path) -> None:
    """A pass that does not end in time is a fault, whatever the store could still answer."""
    async with run_application(tmp_path, ready_timeout_seconds=0.2) as running:
        running.backend.gate.clear()
        await check_not_ready(running, "inference_failed", "0.2 s")
        running.backend.gate.set()
        await check_ready(running)


async def test_locked_database_is_not_ready(running: RunningApplication) -> None:
    """Another process holds it, for longer than a check waits."""
    with closing(sqlite3.connect(running.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await check_not_ready(running, "store_busy", "database")
        other.execute("ROLLBACK")
    await check_ready(running)


async def test_full_disk_is_not_ready(running: RunningApplication) -> None:
    """By SQLite's own bound, which gives the same error at the same place; answers from the store go on."""
    embed = {"text": "kept before the disk was full"}
    await running.client.post("/get_embedding_vector_for_string/", json=embed)
    store = running.app.state.services.embeddings._store

    with store._writer.connect() as connection:
        n_pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {n_pages}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writes, "probe", _write_a_lot)
        await check_not_ready(running, "store_not_writable", "full")
    await check_ready(running)


def _write_a_lot(connection: Connection, payloads: Sequence[None]) -> Sequence[None]:
    connection.exec_driver_sql("CREATE TABLE filler AS SELECT randomblob(10000000) AS content")
    return payloads


async def test_database_that_was_deleted_or_replaced_is_not_ready(running: RunningApplication) -> None:
    """What is written would go to a file that has no name any more."""
    away = running.database.rename(running.directory / "away")
    await check_not_ready(running, "store_unusable", "deleted or replaced")
    running.database.write_bytes(away.read_bytes())
    await check_not_ready(running, "store_unusable", "deleted or replaced")
    away.rename(running.database)
    await check_ready(running)


async def test_overwritten_database_is_not_ready(running: RunningApplication) -> None:
    """The pages in memory still look well; the file, read afresh, does not."""
    with closing(sqlite3.connect(running.database)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the log would make it good again
    kept = running.database.read_bytes()
    with running.database.open("r+b") as file:
        file.write(b"\xff" * 4096)
    await check_not_ready(running, "store_unusable", "damaged")
    with running.database.open("r+b") as file:
        file.write(kept)
    await check_ready(running)


async def test_write_queue_that_ended_is_not_ready(running: RunningApplication) -> None:
    """Reading would go on, but nothing new would be kept."""
    queue = running.app.state.services.embeddings._store._write_queue
    queue._task.cancel()
    await wait_until(queue._task.done)
    await check_not_ready(running, "shutting_down", "no more writes")


async def test_server_that_was_asked_to_stop_is_not_ready(running: RunningApplication) -> None:
    """On connections that are still served."""
    running.app.state.services.readiness.stop()
    await check_not_ready(running, "shutting_down", "shutting down")


async def test_full_queues_are_ready(tmp_path: Path) -> None:
    """The check goes in front of what waits: a server under load is not taken out of service."""
    async with run_application(tmp_path, max_queued_tokens=100, inference_workers=1) as running:
        batcher = running.app.state.services.models.engines()[0].batcher
        running.backend.gate.clear()
        texts = [f"{number} " + "x" * 40 for number in range(6)]
        waiting = [asyncio.create_task(post_text(running, texts[0]))]
        await wait_until(lambda: batcher._queue.n_busy_workers == 1)
        for number, text in enumerate(texts[1:4], start=1):
            waiting.append(asyncio.create_task(post_text(running, text)))
            await wait_until(lambda number=number: batcher.n_queued_texts == number)
        assert (await post_text(running, texts[5])) == 429
        store_queue = running.app.state.services.embeddings._store._write_queue
        store_queue._max_waiting = 0
        ready = asyncio.create_task(running.client.get("/ready"))
        await wait_until(lambda: batcher.n_queued_texts == 4)
        n_passes = len(running.backend.passes)
        running.backend.gate.set()
        assert (await ready).status_code == 200
        store_queue._max_waiting = 1000
        await asyncio.gather(*waiting)
    probe_length = len("The server answers.") + 2
    assert probe_length in running.backend.passes[n_passes] + running.backend.passes[n_passes + 1]


async def post_text(running: RunningApplication, text: str) -> int:
    return (await running.client.post("/get_embedding_vector_for_string/", json={"text": text})).status_code
