"""SIGTERM at bad moments, against the real program: under load, with more work than time, and while it starts."""

from __future__ import annotations

import itertools
import signal
import sqlite3
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from benchmarks.texts import make_texts
from tests.serving import OUTPUT_FILE_NAME, RunningServer, launch, run_until_it_ends, start_server

EMBED = "/get_embedding_vector_for_string/"
OPENAI = "/v1/embeddings"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
N_CLIENTS = 8
TOKENS_PER_TEXT = 180
# More than the engine can do in the time that is left to requests under way.
TEXTS_TOO_MANY = 2000
SECONDS_TO_STOP = 15.0
START_IS_UNDER_WAY = "Starting; will answer on"


@dataclass
class Client:
    """Sends one request after the other until the server takes no more; keeps what came of them."""

    server: RunningServer
    number: int
    answered: dict[str, list[float]] = field(default_factory=dict)
    refused: list[httpx.Response] = field(default_factory=list)
    last: Exception | None = None

    def run(self) -> Client:
        with self.server.client() as client:
            for text in make_texts(TOKENS_PER_TEXT, seed=self.number):
                try:
                    reply = client.post(EMBED, json={"text": text})
                except httpx.TransportError as error:
                    self.last = error
                    return self
                if reply.status_code == 200:
                    self.answered[text] = reply.json()["embedding"]
                else:
                    self.refused.append(reply)
        raise AssertionError


def stop_under_load(server: RunningServer, pool: ThreadPoolExecutor) -> tuple[list[Future[Client]], float]:
    """Eight busy clients, then SIGTERM; what became of them, and the seconds that the server took to end."""
    clients = [pool.submit(Client(server, number).run) for number in range(N_CLIENTS)]
    time.sleep(2.0)
    started = time.monotonic()
    assert server.stop() == 0
    return clients, time.monotonic() - started


def read_stored(server: RunningServer) -> set[str]:
    with sqlite3.connect(server.database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {text for (text,) in connection.execute("SELECT text FROM embeddings")}


def test_requests_under_way_are_finished_and_nothing_answered_is_lost(tmp_path: Path) -> None:
    """Each request gets its 200 or finds the door closed before it was taken in; exit code 0; all is found again."""
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        with start_server(tmp_path) as server:
            running, seconds = stop_under_load(server, pool)
        clients = [client.result() for client in running]
    assert seconds < SECONDS_TO_STOP
    assert [reply.status_code for client in clients for reply in client.refused] == []
    # Refused, not broken off: no request that had been taken in was left without its answer.
    assert {type(client.last) for client in clients} == {httpx.ConnectError}
    answered = {text: vector for client in clients for text, vector in client.answered.items()}
    assert len(answered) > N_CLIENTS
    assert read_stored(server) == set(answered)
    with start_server(tmp_path) as server, server.client() as client:
        for text, vector in itertools.islice(answered.items(), 20):
            reply = client.post(EMBED, json={"text": text})
            assert reply.headers["x-embedding-source"] == "store"
            assert reply.json()["embedding"] == vector


def post_too_many(server: RunningServer, path: str) -> httpx.Response:
    """More texts than can be computed before the server ends, in one request."""
    texts = list(itertools.islice(make_texts(TOKENS_PER_TEXT, seed=100), TEXTS_TOO_MANY))
    with server.client() as client:
        if path == OPENAI:
            return client.post(path, json={"input": texts, "model": "all-MiniLM-L6-v2"})
        return client.post(path, files={"file": ("long.txt", ". ".join(texts).encode())})


def test_requests_that_would_take_too_long_are_told_to_come_again(tmp_path: Path) -> None:
    """503 with Retry-After in their dialect; what was computed until then is kept; the end comes in time."""
    with ThreadPoolExecutor(2) as pool, start_server(tmp_path) as server:
        running = {path: pool.submit(post_too_many, server, path) for path in (OPENAI, DOCUMENT)}
        time.sleep(2.0)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < SECONDS_TO_STOP
        replies = {path: reply.result() for path, reply in running.items()}
    assert {path: reply.status_code for path, reply in replies.items()} == {OPENAI: 503, DOCUMENT: 503}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies.values())
    assert all(reply.headers["x-request-id"] for reply in replies.values())
    assert replies[OPENAI].json()["error"]["code"] == "shutting_down"
    assert replies[DOCUMENT].json()["code"] == "shutting_down"
    assert "Traceback" not in server.output
    read_stored(server)


def wait_for_output(directory: Path, part: str) -> None:
    deadline = time.monotonic() + 60
    while part not in (directory / OUTPUT_FILE_NAME).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5])
def test_sigterm_while_starting_ends_the_start_at_once(tmp_path: Path, seconds: float) -> None:
    """So long after it has begun; the next start finds nothing in its way."""
    process = launch(tmp_path, {})
    wait_for_output(tmp_path, START_IS_UNDER_WAY)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    # 143 is what shells call an end by SIGTERM; 0 if it was already ready.
    assert process.wait(SECONDS_TO_STOP) in (128 + signal.SIGTERM, 0)
    with start_server(tmp_path) as server, server.client() as client:
        assert client.post(EMBED, json={"text": "after all"}).status_code == 200


def test_taken_port_is_said_in_a_line_and_the_other_server_goes_on(tmp_path: Path) -> None:
    """Exit code 1, the setting's name, no traceback, nothing loaded first."""
    other = tmp_path / "other"
    other.mkdir()
    with start_server(tmp_path) as server, server.client() as client:
        port = httpx.URL(server.url).port
        refused = run_until_it_ends(other, {"LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(port)})
        assert refused.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr
        assert "LLAMA_EMBEDDING_SERVER_LISTEN_PORT" in refused.stderr
        assert "Traceback" not in refused.stdout + refused.stderr
        assert "Opened the database" not in refused.stdout
        assert client.post(EMBED, json={"text": "undisturbed"}).status_code == 200
