"""Documents in the background with the real program and the real model: kill -9, events, and clients that go away."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving import RunningServer, start_server

DOCUMENT = "/get_all_embedding_vectors_for_document/"
N_SENTENCES = 3000
TIMEOUT_SECONDS = 120.0


def make_document(subject: str, count: int = N_SENTENCES) -> bytes:
    sentences = [f"The {subject} number {number} crossed the river before the winter came." for number in range(count)]
    return " ".join(sentences).encode()


def submit(client: httpx.Client, data: bytes, name: str) -> str:
    response = client.post(DOCUMENT, files={"file": (name, data)}, params={"background": True})
    assert response.status_code == 202, response.text
    return str(response.headers["location"])


def follow(client: httpx.Client, location: str) -> Iterator[dict[str, Any]]:
    """The job's events, as they come."""
    with client.stream("GET", f"{location}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def count_embeddings(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])


def test_job_is_gone_on_with_after_kill_9(tmp_path: Path) -> None:
    """What was computed before is found, the rest is computed, and the result is whole; a waiting job is done, too."""
    with start_server(tmp_path) as server, server.client() as client:
        first = submit(client, make_document("wagon"), "wagons.txt")
        second = submit(client, make_document("horse", 20), "horses.txt")
        for event in follow(client, first):
            if event["n_sentences_done"]:
                break
        server.kill()
    n_before = count_embeddings(tmp_path / "embeddings.sqlite")
    assert 0 < n_before < N_SENTENCES
    with start_server(tmp_path) as server, server.client() as client:
        assert [job["links"]["self"] for job in client.get("/jobs").json()["jobs"]] == [first, second]
        check_that_no_part_is_found(client, first)
        for location, count in ((first, N_SENTENCES), (second, 20)):
            last = list(follow(client, location))[-1]
            assert (last["state"], last["n_sentences_done"]) == ("done", count)
            result = client.get(f"{location}/result", params={"send_back_json_or_zip_file": "json"}).json()
            assert len(result) == count
        assert "The wagon number 0 crossed" not in server.log
        assert not any((tmp_path / "embeddings.sqlite-jobs").iterdir())
        check_vectors(client, result)
    # With the query that was searched for.
    assert count_embeddings(tmp_path / "embeddings.sqlite") == N_SENTENCES + 20 + 1


def check_that_no_part_is_found(client: httpx.Client, location: str) -> None:
    """Of a document that was written in part when the process ended, searches find all sentences or none."""
    for event in follow(client, location):
        body = {"query_text": "wagons", "number_of_most_similar_strings_to_return": 10_000}
        path = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
        found = [hit for hit in client.post(path, json=body).json()["results"] if "wagon" in hit["search_result_text"]]
        assert len(found) in ((N_SENTENCES,) if event["state"] == "done" else (0, N_SENTENCES))


def check_vectors(client: httpx.Client, rows: list[dict[str, Any]]) -> None:
    """The rows' vectors are those of their texts."""
    for row in rows[::7]:
        alone = client.post("/get_embedding_vector_for_string/", json={"text": row["text"]}).json()["embedding"]
        assert float(np.dot(alone, row["embedding"])) == pytest.approx(1.0, abs=1e-4)


def test_events_come_while_the_job_runs_and_a_cancelled_job_stops(tmp_path: Path) -> None:
    """A client that reads the stream sees it grow; after the cancellation nothing more is computed."""
    with start_server(tmp_path) as server, server.client() as client, server.client() as other_client:
        location = submit(client, make_document("ferry"), "ferries.txt")
        states = []
        for event in follow(client, location):
            states.append(event["state"])
            if event["n_sentences_done"] and event["sentences_per_second"] and states[-1] == "running":
                assert event["seconds_left"] > 0
                other_client.delete(location).raise_for_status()
        assert states[-1] == "cancelled"
        check_that_nothing_more_is_computed(server, other_client)


def check_that_nothing_more_is_computed(server: RunningServer, client: httpx.Client) -> None:
    """Fewer sentences are stored than the document has, and no more after another text was computed."""
    client.post("/get_embedding_vector_for_string/", json={"text": "The engine is free again."}).raise_for_status()
    n_stored = count_embeddings(server.database)
    assert n_stored < N_SENTENCES
    client.post("/get_embedding_vector_for_string/", json={"text": "It has nothing else to do."}).raise_for_status()
    assert count_embeddings(server.database) == n_stored + 1
    assert client.get("/get_all_stored_documents/").json() == {"documents": []}


def test_computing_stops_when_the_client_goes_away(tmp_path: Path) -> None:
    """Without `background`, the work is its client's."""
    with start_server(tmp_path) as server, server.client() as client:
        hasty = httpx.Timeout(TIMEOUT_SECONDS, read=2.0)
        with pytest.raises(httpx.ReadTimeout):
            client.post(DOCUMENT, files={"file": ("boats.txt", make_document("boat"))}, timeout=hasty)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while f"{DOCUMENT} 499" not in server.log and time.monotonic() < deadline:
            time.sleep(0.05)
        check_that_nothing_more_is_computed(server, client)
