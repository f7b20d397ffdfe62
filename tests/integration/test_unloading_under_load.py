"""The default model unloaded over and over while clients use it, in the real server with the real engine.

Memory of the engine that is freed under a call ends the process, and no `except` sees it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving import PROJECT_DIRECTORY, RunningServer, start_server

NAME = "all-MiniLM-L6-v2"
SECONDS = 6.0
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"


# Fixed, so that no load has to measure and there are many.
ENGINE = {"INFERENCE_WORKERS": "2", "INFERENCE_THREADS_PER_WORKER": "1", "INFERENCE_TOKEN_BUDGET": "192"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with start_server(tmp_path, ENGINE) as server:
        yield server


def embed_tokens(client: httpx.Client, number: int) -> httpx.Response:
    body = {"text": f"Ferry {number} leaves at noon, and its whistle is heard across the bay. " * (1 + number % 5)}
    return client.post(TOKENS, json=body, params={"send_back_json_or_zip_file": "json"})


def embed(client: httpx.Client, number: int) -> httpx.Response:
    texts = [f"Parcel {number}.{place} is on its way to the harbour" for place in range(8)]
    return client.post("/v1/embeddings", json={"model": NAME, "input": texts})


def tokenize(client: httpx.Client, number: int) -> httpx.Response:
    """Long enough to be done on a thread, which goes on when its client has left."""
    return client.post("/tokenize", json={"inputs": f"Letter {number} has not arrived. " * 2_000})


def leave_early(client: httpx.Client, number: int) -> httpx.Response:
    """Ask and go away; the answer of another request stands for the one that nobody waits for."""
    try:
        client.post("/tokenize", json={"inputs": f"Nobody waits for number {number}. " * 4_000}, timeout=0.02)
    except httpx.TimeoutException:
        time.sleep(0.2)
    return client.get("/health")


def unload(client: httpx.Client, _number: int) -> httpx.Response:
    time.sleep(0.02)
    return client.post("/unload_model/", json={"model_name": NAME})


def repeat(server: RunningServer, ask: Callable[[httpx.Client, int], httpx.Response], first: int) -> list[int]:
    """Statuses of the replies to one client that asks for new texts until the time is up."""
    deadline = time.monotonic() + SECONDS
    statuses = []
    with server.client() as client:
        while time.monotonic() < deadline:
            statuses.append(ask(client, first + len(statuses)).status_code)
    return statuses


def test_model_unloaded_in_a_loop_under_traffic_serves_every_request(server: RunningServer) -> None:
    """Token rows, vectors and tokens of several clients, some of whom leave: every reply is a 200."""
    users = [embed_tokens] * 3 + [embed, embed, tokenize, leave_early]
    with ThreadPoolExecutor(len(users) + 2) as pool:
        unloading = [pool.submit(repeat, server, unload, 0) for _ in range(2)]
        using = [pool.submit(repeat, server, ask, 1_000_000 * place) for place, ask in enumerate(users)]
        answered = [future.result() for future in using]
        unloaded = [future.result() for future in unloading]
    assert server.process.poll() is None
    assert all(answered)
    assert {status for statuses in answered for status in statuses} == {200}
    assert {status for statuses in unloaded for status in statuses} <= {200, 202}
    with server.client() as client:
        assert embed(client, 0).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_call_that_does_not_return_holds_up_neither_unloading_nor_the_end(tmp_path: Path) -> None:
    """Its memory is left alone: unloading says that it is pending, and the process ends without a crash."""
    program = PROJECT_DIRECTORY / "tests" / "serving_with_stuck_engine.py"
    with start_server(tmp_path, ENGINE, program=[program]) as server, server.client() as client:
        assert embed(client, 0).status_code == 200
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(client.post, "/v1/embeddings", json={"model": NAME, "input": "away " * 200})
            time.sleep(0.5)
            unloaded = client.post("/unload_model/", json={"model_name": NAME})
            assert (unloaded.status_code, "still in use" in unloaded.json()["message"]) == (202, True)
            assert client.get("/health").status_code == 200
            assert server.stop() == 0
            assert stuck.result().status_code == 503
        assert "A pass does not end" in server.log
