"""The whole service on a database that misbehaves: what callers see, what goes on, and that it recovers by itself."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from tests.integration.test_store_faults import OtherProcess
from tests.serving import run_application, run_until_it_ends

EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
STRINGS = "/get_all_stored_strings/"
LOCKED_SECONDS = 5.0


@contextmanager
def mount_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A small disk of its own."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def locate(directory: Path) -> dict[str, Any]:
    return {"database_url": f"sqlite+aiosqlite:///{directory}/embeddings.sqlite"}


async def ask(client: httpx.AsyncClient, text: str) -> httpx.Response:
    return await client.post(EMBED, json={"text": text})


async def search(client: httpx.AsyncClient, query: str) -> set[str]:
    response = await client.post(SEARCH, json={"query_text": query})
    assert response.status_code == 200, response.text
    return {hit["search_result_text"] for hit in response.json()["results"]}


def check_refusal(response: httpx.Response, code: str, *words: str) -> None:
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["code"] == code
    assert all(word in response.json()["detail"] for word in words)


async def check_that_reads_go_on(client: httpx.AsyncClient, text: str) -> None:
    """Cached and stored texts, listings, and searches, also with words that cannot be written down now."""
    assert (await ask(client, text)).headers["x-embedding-source"] in ("memory", "store")
    assert text in (await client.get(STRINGS)).json()["strings"]
    assert text in await search(client, f"a query that is new at {time.monotonic()}")
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("cache", [0, 32])
async def test_full_disk_refuses_new_texts_and_recovers_when_there_is_room(cache: int, tmp_path: Path) -> None:
    """On a real disk of 3 MB: a clear error for what would have to be written, answers for everything else."""
    with mount_tmpfs(tmp_path / "small", "3m") as disk:
        settings = {"embedding_cache_size_in_mb": cache, "truncation": "right"} | locate(disk)
        async with run_application(tmp_path, **settings) as running:
            answered = ["the first text"]
            assert (await ask(running.client, answered[0])).status_code == 200
            (disk / "ballast").write_bytes(b"\0" * 1_000_000)
            while (response := await ask(running.client, f"{len(answered)} {'long ' * 4_000}")).status_code == 200:
                answered.append(f"{len(answered)} {'long ' * 4_000}")
            check_refusal(response, "store_not_writable", "disk", "full")
            await check_that_reads_go_on(running.client, answered[0])
            (disk / "ballast").unlink()
            assert (await ask(running.client, "there is room again")).status_code == 200
            listed = (await running.client.get(STRINGS)).json()["strings"]
            assert [text for text in (*answered, "there is room again") if text not in listed] == []
        async with run_application(tmp_path, **settings) as running:
            assert (await ask(running.client, answered[-1])).headers["x-embedding-source"] == "store"


async def test_database_that_becomes_read_only_refuses_new_texts_and_recovers(tmp_path: Path) -> None:
    """As after a fault of the disk; files that are open keep a real one from being remounted for the test."""
    async with run_application(tmp_path) as running:
        assert (await ask(running.client, "before")).status_code == 200
        is_read_only = True

        def refuse_writes(connection: Any, _record: Any) -> None:
            if is_read_only:
                connection.cursor().execute("PRAGMA query_only = ON")

        writer = running.app.state.services.contents._store._writer
        event.listen(writer, "connect", refuse_writes)
        writer.dispose()
        check_refusal(await ask(running.client, "refused"), "store_not_writable", "read-only")
        await check_that_reads_go_on(running.client, "before")
        is_read_only = False
        assert (await ask(running.client, "after")).status_code == 200
        assert await search(running.client, "anything") == {"before", "after"}


async def test_no_request_fails_while_another_process_locks_for_five_seconds(tmp_path: Path) -> None:
    """With the default settings: new texts wait for the lock, known ones and listings do not."""
    async with run_application(tmp_path) as running:
        assert (await ask(running.client, "known")).status_code == 200
        other = OtherProcess(running.database, LOCKED_SECONDS)
        started = time.monotonic()
        asking = [asyncio.create_task(ask(running.client, f"new text {number}")) for number in range(20)]
        await check_that_known_texts_answer(running.client)
        assert time.monotonic() - started < LOCKED_SECONDS
        assert [response.status_code for response in await asyncio.gather(*asking)] == [200] * 20
        assert time.monotonic() - started >= LOCKED_SECONDS - 0.5
        other.release()
        assert len((await running.client.get(STRINGS)).json()["strings"]) == 21


async def check_that_known_texts_answer(client: httpx.AsyncClient) -> None:
    assert (await ask(client, "known")).status_code == 200
    assert (await client.get(STRINGS)).json()["strings"] == ["known"]


async def test_lock_for_good_is_a_503_that_says_when_to_come_back(tmp_path: Path) -> None:
    """Nothing that was answered is lost, reads go on, and it is over when the lock is."""
    quick: dict[str, Any] = {"max_retries": 5, "retry_delay_base_seconds": 0.2}
    async with run_application(tmp_path, **quick) as running:
        assert (await ask(running.client, "answered")).status_code == 200
        other = OtherProcess(running.database, 60)
        check_refusal(await ask(running.client, "refused"), "store_busy", "locked by another process")
        check_refusal(
            await running.client.request("DELETE", "/stored_strings/", json={"text": "answered"}), "store_busy"
        )
        await check_that_reads_go_on(running.client, "answered")
        other.release()
        assert (await ask(running.client, "refused")).status_code == 200
        assert await search(running.client, "anything") == {"answered", "refused"}


def make_damaged(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 20_000)


def make_foreign(path: Path) -> None:
    subprocess.run(["python3", "-c", f"import sqlite3; sqlite3.connect({str(path)!r}).execute('CREATE TABLE t (a)')"])


@pytest.mark.parametrize(("make", "words"), [(make_damaged, "damaged"), (make_foreign, "another program")])
def test_server_refuses_to_start_on_a_file_that_it_must_not_touch(make: Any, words: str, tmp_path: Path) -> None:
    """One line that says what to do, exit code 1, and not a byte changed."""
    path = tmp_path / "embeddings.sqlite"
    make(path)
    before = path.read_bytes()
    completed = run_until_it_ends(tmp_path, {})
    assert completed.returncode == 1
    assert words in completed.stderr
    assert "Traceback" not in completed.stderr
    assert path.read_bytes() == before
