"""A database that is moved away, deleted or replaced while the server runs: nothing is called kept that is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from llama_embeddings.services import jobs
from tests.serving import RunningApplication, run_application

EMBED = "/get_embedding_vector_for_string/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    async with run_application(tmp_path, keep_finished_jobs_hours=1) as running:
        await running.client.post(EMBED, json={"text": "stored while all was well"})
        yield running


async def submit_document(running: RunningApplication, text: str, **query: str) -> httpx.Response:
    files = {"file": ("notes.txt", text.encode())}
    return await running.client.post(DOCUMENT, files=files, params=query)


def list_texts(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {text for (text,) in connection.execute("SELECT text FROM embeddings")}


async def check_writes_are_refused(running: RunningApplication) -> None:
    replies = [
        await running.client.post(EMBED, json={"text": "a text that would be lost"}),
        await running.client.post(TOKENS, json={"text": "tokens that would be lost"}),
        await submit_document(running, "A sentence of a document that would be lost."),
        await submit_document(running, "A sentence of a job that would be lost.", background="true"),
        await running.client.request("DELETE", "/stored_strings/", json={"text": "stored while all was well"}),
    ]
    for reply in replies:
        assert reply.status_code == 500, reply.text
        assert reply.json()["code"] == "store_unusable"
        assert "deleted or replaced" in reply.json()["detail"]
    assert (await running.client.get("/ready")).json()["code"] == "store_unusable"


async def test_nothing_is_kept_while_the_file_is_away_and_all_goes_on_when_it_is_back(
    running: RunningApplication,
) -> None:
    """Embeddings, token matrices, documents and jobs alike; what was refused is not there afterwards."""
    away = running.database.rename(running.directory / "away")
    await check_writes_are_refused(running)
    assert not running.database.exists()
    away.rename(running.database)
    reply = await running.client.post(EMBED, json={"text": "stored when it was back"})
    assert reply.status_code == 200
    assert list_texts(running.database) == {"stored while all was well", "stored when it was back"}


async def test_nothing_is_kept_where_another_file_has_the_name(running: RunningApplication) -> None:
    """A restored backup under a running server, for example."""
    away = running.database.rename(running.directory / "away")
    running.database.write_bytes(away.read_bytes())
    await check_writes_are_refused(running)
    away.rename(running.database)


async def test_nothing_is_kept_where_a_link_leads_elsewhere(tmp_path: Path) -> None:
    """DATABASE_URL may name a symbolic link."""
    (tmp_path / "first.sqlite").touch()
    (tmp_path / "second.sqlite").touch()
    link = tmp_path / "embeddings.sqlite"
    link.symlink_to("first.sqlite")
    async with run_application(tmp_path) as running:
        link.unlink()
        link.symlink_to("second.sqlite")
        await check_writes_are_refused(running)
        link.unlink()
        link.symlink_to("first.sqlite")


async def test_nothing_is_kept_where_the_log_was_deleted(running: RunningApplication) -> None:
    """What was committed last is in the log alone until it is copied."""
    log = Path(f"{running.database}-wal")
    away = log.rename(running.directory / "away")
    reply = await running.client.post(EMBED, json={"text": "a text that would be lost"})
    assert (reply.status_code, reply.json()["code"]) == (500, "store_unusable")
    assert "embeddings.sqlite-wal" in reply.json()["detail"]
    away.rename(log)


async def test_job_waits_for_its_database_to_come_back(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was accepted while the database was there, and is not lost."""
    monkeypatch.setattr(jobs, "MAX_PAUSE_SECONDS", 0.02)
    running.backend.gate.clear()
    job = (await submit_document(running, "A sentence of a job that has to wait.", background="true")).json()
    away = running.database.rename(running.directory / "away")
    running.backend.gate.set()
    while (state := (await running.client.get(job["links"]["self"])).json())["error"] is None:
        await asyncio.sleep(0.01)
    assert (state["state"], state["error"]["code"]) == ("running", "store_unusable")
    away.rename(running.database)
    while state["state"] == "running":
        state = (await running.client.get(job["links"]["self"])).json()
        await asyncio.sleep(0.01)
    assert state["state"] == "done"
