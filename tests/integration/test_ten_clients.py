"""Ten concurrent clients on all endpoints of the real server: no error, and an event loop that goes on turning."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from tests.serving import REQUEST_TIMEOUT_SECONDS, start_server

WATCHED_SERVER = Path(__file__).resolve().parent.parent / "serving_with_watch.py"
N_CLIENTS = 10
LOAD_SECONDS = 10.0
LONGEST_STALL_SECONDS = 0.1
# The first requests of all kinds come at once, each the first to use its code: 0.16 s on busy cores without AVX-512.
COLD_SECONDS = 1.0
LONGEST_COLD_STALL_SECONDS = 0.3

Call = Callable[[httpx.AsyncClient, int], Awaitable[httpx.Response]]


def make_text(number: int) -> str:
    return (
        f"Text number {number}: the weather of day {number * 7 % 365} was {'very ' * (number % 20)}cold in the hills."
    )


def make_document(number: int) -> bytes:
    return "\n".join(make_text(100_000 + 12 * number + part) for part in range(12)).encode()


def post(path: str, **fields: str) -> Call:
    """A call with fresh texts: `{}` in a field stands for one."""

    async def call(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.post(path, json={name: value.format(make_text(number)) for name, value in fields.items()})

    return call


def get(path: str) -> Call:
    async def call(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.get(path)

    return call


def send_document(path: str) -> Call:
    async def call(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.post(path, files={"file": (f"{number}.txt", make_document(number))})

    return call


CALLS: list[Call] = [
    post("/get_embedding_vector_for_string/", text="{}"),
    post("/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/", text="{}"),
    post("/compute_similarity_between_strings/", text1="{}", text2="Other: {}", similarity_measure="hsic"),
    post("/search_stored_embeddings_with_query_string_for_semantic_similarity/", query_text="{}"),
    send_document("/get_all_embedding_vectors_for_document/"),
    get("/get_all_stored_strings/"),
    post("/compute_similarity_between_strings/", text1="{}", text2="Cold", similarity_measure="hoeffdings_d"),
    post("/get_embedding_vector/", text="The same text for everybody"),
    get("/get_all_stored_documents/"),
    post("/get_most_similar_string_from_database/", text="{}"),
    get("/get_list_of_available_model_names/"),
    send_document("/get_all_embeddings_for_document/"),
    get("/ready"),
    post("/compute_similarity_between_strings/", text1="{}", text2="Cold", similarity_measure="cosine_similarity"),
    get("/get_all_stored_documents_with_embeddings/?limit=5"),
    post("/clear_ramdisk/"),
]


async def load_server(url: str) -> tuple[dict[int, list[int]], list[int]]:
    """Statuses of each kind of call, and those of /health in between."""
    numbers = itertools.count()
    statuses: dict[int, list[int]] = {kind: [] for kind in range(len(CALLS))}
    health: list[int] = []
    deadline = time.monotonic() + LOAD_SECONDS

    async def call_in_turn(client: httpx.AsyncClient, first: int) -> None:
        for turn in itertools.count(first):
            if time.monotonic() > deadline:
                return
            kind = turn % len(CALLS)
            statuses[kind].append((await CALLS[kind](client, next(numbers))).status_code)

    async def poll_health(client: httpx.AsyncClient) -> None:
        while time.monotonic() < deadline:
            health.append((await client.get("/health")).status_code)
            await asyncio.sleep(0.02)

    async with (
        httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(poll_health(client))
        for number in range(N_CLIENTS):
            # Each starts elsewhere in the list, so that at any time different endpoints are asked.
            group.create_task(call_in_turn(client, number * len(CALLS) // N_CLIENTS))
    return statuses, health


def test_ten_clients_get_no_error_and_the_event_loop_never_stalls(tmp_path: Path) -> None:
    """All endpoints for ten seconds; the loop's latest wake-up is measured inside the server."""
    report = tmp_path / "event_loop.json"
    with start_server(tmp_path, program=[WATCHED_SERVER, report]) as server:
        statuses, health = asyncio.run(load_server(server.url))
        server.stop()
    assert {status for kind in statuses.values() for status in kind} == {200}, statuses
    assert all(statuses.values()), "every kind of call was made"
    assert set(health) == {200}
    assert len(health) > LOAD_SECONDS
    measured = json.loads(report.read_text())
    assert measured["n_samples"] > 100
    assert max(late for late, _, since in measured["worst"] if since > COLD_SECONDS) < LONGEST_STALL_SECONDS, measured
    assert measured["max_seconds"] < LONGEST_COLD_STALL_SECONDS, measured
    assert "Stopped" in server.log
    assert " - ERROR - " not in server.log
    assert "Traceback" not in server.output
