"""Jobs: accepted at once, watched, fetched, cancelled, bounded, and gone on with after a restart."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_embeddings.errors import ModelLoading
from llama_embeddings.services.jobs import N_RUNNING_JOBS, JobService
from tests.api.test_native_endpoints import DOCUMENT, DOCUMENT_BYTES, SENTENCES, send_document
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application, wait_until

FINAL = ("done", "failed", "cancelled")


async def submit(running: RunningApplication, data: bytes = DOCUMENT_BYTES, **query: Any) -> httpx.Response:
    query = {"background": True} | query
    return await running.client.post(DOCUMENT, files={"file": ("weather.txt", data)}, params=query)


async def submit_job(running: RunningApplication, data: bytes = DOCUMENT_BYTES) -> str:
    response = await submit(running, data)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def get_job(running: RunningApplication, job_id: str) -> dict[str, Any]:
    response = await running.client.get(f"/jobs/{job_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


async def wait_until_finished(running: RunningApplication, job_id: str) -> dict[str, Any]:
    """The job's last event."""
    response = await running.client.get(f"/jobs/{job_id}/events")
    return dict(read_events(response.text)[-1])


def read_events(stream: str) -> list[dict[str, Any]]:
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in stream.strip().split("\n\n")]
    assert {event["event"] for event in events} == {"progress"}
    return [json.loads(event["data"]) for event in events]


def spooled_files(running: RunningApplication) -> list[str]:
    return sorted(path.name for path in (running.directory / "embeddings.sqlite-jobs").iterdir())


def make_document(number: int) -> bytes:
    return f"This is the only sentence of document {number}.".encode()


async def test_job_is_accepted_at_once_and_its_result_is_the_waiting_call_s(running: RunningApplication) -> None:
    """202 with its address; done, it gives the same bytes as the call that waits, in every shape."""
    running.backend.gate.clear()
    response = await submit(running)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
    assert (job["filename"], job["model_name"]) == ("weather.txt", FAKE_MODEL_NAME)
    assert (job["size_in_bytes"], job["error"], job["links"]["result"]) == (len(DOCUMENT_BYTES), None, None)
    early = await running.client.get(f"/jobs/{job['id']}/result")
    assert (early.status_code, early.json()["code"]) == (409, "result_not_available")
    running.backend.gate.set()
    done = await wait_until_finished(running, job["id"])
    assert (done["state"], done["n_sentences_done"], done["n_sentences_total"]) == ("done", 3, 3)
    assert (done["source"], done["sentences_per_second"], done["seconds_left"]) == ("computed", None, None)
    query = {"send_back_json_or_zip_file": "json", "json_format": "split"}
    result = await running.client.get(done["links"]["result"], params=query)
    assert result.json() == await send_document(running.client, DOCUMENT_BYTES, json_format="split")
    for kind in ("zip", "npz", "parquet"):
        query = {"send_back_json_or_zip_file": kind}
        result = await running.client.get(done["links"]["result"], params=query)
        waited = await running.client.post(DOCUMENT, files={"file": ("weather.txt", DOCUMENT_BYTES)}, params=query)
        assert (result.status_code, result.content) == (200, waited.content)
    assert spooled_files(running) == []


async def test_events_tell_of_progress_until_the_job_is_finished(running: RunningApplication) -> None:
    """Numbers never fall, and the last event is the final state."""
    texts = [f"This is sentence {number} of a rather long report." for number in range(1500)]
    running.backend.seconds_per_pass = 0.005
    job_id = await submit_job(running, " ".join(texts).encode())
    response = await running.client.get(f"/jobs/{job_id}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    done = [event["n_sentences_done"] for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1]["n_sentences_total"] == 1500
    assert [event["state"] in FINAL for event in events] == [False] * (len(events) - 1) + [True]
    under_way = [event for event in events if 0 < event["n_sentences_done"] < 1500]
    assert under_way
    assert under_way[-1]["sentences_per_second"] > 0
    assert under_way[-1]["seconds_left"] > 0


async def test_document_that_cannot_be_read_is_a_failed_job(running: RunningApplication) -> None:
    """It says why, and so does its result."""
    job = await wait_until_finished(running, await submit_job(running, b"%PDF-1.4 nothing else"))
    assert job["state"] == "failed"
    assert job["error"]["code"] == "unreadable_document"
    result = await running.client.get(f"/jobs/{job['id']}/result")
    assert result.status_code == 409
    assert job["error"]["detail"] in result.json()["detail"]
    assert spooled_files(running) == []


async def test_unknown_model_is_refused_before_a_job_is_made(running: RunningApplication) -> None:
    """A 404, not a job that fails."""
    assert (await submit(running, model_name="absent")).status_code == 404
    assert (await running.client.get("/jobs")).json() == {"jobs": []}


@pytest.mark.parametrize("path", ["", "/events", "/result"])
async def test_job_that_does_not_exist_is_a_404(path: str, running: RunningApplication) -> None:
    """Whatever is asked of it."""
    response = await running.client.get(f"/jobs/{'0' * 32}{path}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert (await running.client.delete(f"/jobs/{'0' * 32}")).status_code == 404


async def test_cancelled_jobs_stop_and_what_was_computed_stays(running: RunningApplication) -> None:
    """One that runs and one that waits; the engine is free for others afterwards."""
    running.backend.gate.clear()
    job_ids = [await submit_job(running, make_document(number)) for number in range(3)]
    documents = running.app.state.services.documents
    await wait_until(lambda: len(documents._flights._flights) == 2)
    for job_id in job_ids:
        response = await running.client.delete(f"/jobs/{job_id}")
        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    await wait_until(lambda: not documents._flights._flights)
    running.backend.gate.set()
    assert spooled_files(running) == []
    assert (await running.client.get("/get_all_stored_documents/")).json() == {"documents": []}
    assert [row["text"] for row in await send_document(running.client, DOCUMENT_BYTES)] == SENTENCES


async def test_finished_job_is_forgotten_when_it_is_deleted(running: RunningApplication) -> None:
    """Its document stays."""
    job_id = await submit_job(running)
    await wait_until_finished(running, job_id)
    assert (await running.client.delete(f"/jobs/{job_id}")).json()["state"] == "done"
    assert (await running.client.get(f"/jobs/{job_id}")).status_code == 404
    assert (await running.client.get("/get_all_stored_documents/")).json() == {"documents": ["weather.txt"]}


async def test_too_many_waiting_jobs_are_refused_with_the_time_to_wait(tmp_path: Path) -> None:
    """The bound is on those that wait; the ones accepted are all done."""
    async with run_application(tmp_path, max_waiting_jobs=2) as running:
        running.backend.gate.clear()
        documents = running.app.state.services.documents
        running_ids = [await submit_job(running, make_document(number)) for number in range(2)]
        await wait_until(lambda: len(documents._flights._flights) == 2)
        waiting_ids = [await submit_job(running, make_document(number)) for number in range(2, 4)]
        response = await submit(running, make_document(4))
        assert (response.status_code, response.json()["code"]) == (429, "overloaded")
        assert "MAX_WAITING_JOBS" in response.json()["detail"]
        assert int(response.headers["retry-after"]) >= 1
        assert spooled_files(running) == sorted(running_ids + waiting_ids)
        running.backend.gate.set()
        for job_id in running_ids + waiting_ids:
            assert (await wait_until_finished(running, job_id))["state"] == "done"
        jobs = (await running.client.get("/jobs")).json()["jobs"]
        assert [job["id"] for job in jobs] == running_ids + waiting_ids


async def test_finished_jobs_are_forgotten_after_a_while(tmp_path: Path) -> None:
    """Here at once; in the database as well."""
    async with run_application(tmp_path, keep_finished_jobs_hours=0) as running:
        first = await submit_job(running, make_document(1))
        await wait_until_finished(running, first)
        second = await submit_job(running, make_document(2))
        assert [job["id"] for job in (await running.client.get("/jobs")).json()["jobs"]] == [second]
        with sqlite3.connect(running.database) as connection:
            assert connection.execute("SELECT id FROM document_jobs").fetchall() == [(second,)]


async def test_jobs_go_on_after_a_restart(tmp_path: Path) -> None:
    """One that was running and one that waited; one that was done can still be fetched; stray files are removed."""
    async with run_application(tmp_path) as running:
        done = await submit_job(running, make_document(0))
        await wait_until_finished(running, done)
        running.backend.gate.clear()
        left = [await submit_job(running, make_document(number)) for number in range(1, 5)]
        running.app.state.services.jobs._workers[0].cancel()  # so that the last ones surely still wait
        await running.app.state.services.jobs.stop()
    (tmp_path / "embeddings.sqlite-jobs" / "stray.partial").write_bytes(b"half")
    async with run_application(tmp_path) as running:
        for job_id in left:
            assert (await wait_until_finished(running, job_id))["state"] == "done"
        result = await running.client.get(f"/jobs/{done}/result", params={"send_back_json_or_zip_file": "json"})
        assert [row["text"] for row in result.json()] == [make_document(0).decode()]
        assert spooled_files(running) == []


async def test_job_waits_for_what_may_come_and_says_so(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is being loaded or downloaded does not make it fail."""
    documents = running.app.state.services.documents
    compute, n_calls = documents.get_or_compute, 0
    is_ready = asyncio.Event()

    async def compute_when_ready(*arguments: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if not is_ready.is_set():
            raise ModelLoading("The model is being downloaded: 10 %.", retry_after_seconds=0.01)
        return await compute(*arguments, **options)

    monkeypatch.setattr(documents, "get_or_compute", compute_when_ready)
    job_id = await submit_job(running)
    await wait_until(lambda: n_calls > 2)
    job = await get_job(running, job_id)
    assert (job["state"], job["error"]["code"]) == ("running", "model_loading")
    is_ready.set()
    job = await wait_until_finished(running, job_id)
    assert (job["state"], job["error"]) == ("done", None)


async def test_result_of_a_deleted_document_is_gone(running: RunningApplication) -> None:
    """The job outlives it and says so."""
    job_id = await submit_job(running)
    await wait_until_finished(running, job_id)
    await running.app.state.services.documents._store.delete_document("weather.txt")
    response = await running.client.get(f"/jobs/{job_id}/result")
    assert response.status_code == 404
    assert "deleted" in response.json()["detail"]


async def test_job_and_waiting_call_share_their_work(running: RunningApplication) -> None:
    """The call joins what the job has begun; cancelling the job leaves the call its result."""
    running.backend.gate.clear()
    job_id = await submit_job(running)
    waiting = asyncio.create_task(send_document(running.client, DOCUMENT_BYTES))
    flights = running.app.state.services.documents._flights._flights
    await wait_until(lambda: any(flight.n_waiters == 2 for flight in flights.values()))
    assert (await running.client.delete(f"/jobs/{job_id}")).json()["state"] == "cancelled"
    running.backend.gate.set()
    assert [row["text"] for row in await waiting] == SENTENCES
    assert (await get_job(running, job_id))["state"] == "cancelled"


async def test_workers_outlive_a_mistake(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many jobs could not be brought to an end, the next one is."""

    async def fail(*_: object) -> None:
        raise PermissionError("no such right")

    with monkeypatch.context() as patch:
        patch.setattr(JobService, "_end", fail)
        for number in range(N_RUNNING_JOBS):
            await submit_job(running, make_document(number))
        await wait_until(lambda: caplog.text.count("could not be brought to an end") == N_RUNNING_JOBS)
    job = await wait_until_finished(running, await submit_job(running))
    assert job["state"] == "done"
