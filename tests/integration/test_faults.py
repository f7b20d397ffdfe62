"""What else goes wrong on a machine that nobody looks after, against the real program with the real model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.texts import make_texts
from llama_embeddings.observability import LOG_FILE_NAME
from tests.serving import SERVER_PROGRAM, RunningServer, start_server

EMBED = "/get_embedding_vector_for_string/"
OPENAI = "/v1/embeddings"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
LONGEST_WAIT_SECONDS = 15.0


def ask_everything(client: httpx.Client, number: int) -> list[int]:
    """Statuses of a fresh text, the same again, its tokens, a search and a document."""
    text = f"Round {number} of everything."
    replies = [
        client.post(EMBED, json={"text": text}),
        client.post(EMBED, json={"text": text}),
        client.post(TOKENS, json={"text": text}),
        client.post(SEARCH, json={"query_text": text}),
        client.post(DOCUMENT, files={"file": (f"{number}.txt", f"{text} And another sentence.".encode())}),
    ]
    return [reply.status_code for reply in replies]


# Too many at once


async def test_five_hundred_requests_at_once_are_all_answered_honestly(tmp_path: Path) -> None:
    """With room for a few only: 200, or 429 with a time to come again; who comes again is served."""
    settings = {"MAX_QUEUED_TOKENS": "2000"}
    texts = [text for text, _ in zip(make_texts(60, seed=3), range(500), strict=False)]
    statuses: dict[int, int] = {}

    async def ask_until_served(client: httpx.AsyncClient, text: str) -> None:
        while (reply := await client.post(EMBED, json={"text": text})).status_code != 200:
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            assert reply.status_code == 429, reply.text
            assert reply.json()["code"] == "overloaded"
            await asyncio.sleep(min(1.0, int(reply.headers["retry-after"])))
        statuses[200] = statuses.get(200, 0) + 1

    with start_server(tmp_path, settings) as server:
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client:
            await asyncio.gather(*(ask_until_served(client, text) for text in texts))
    assert statuses[200] == 500
    assert statuses[429] > 0


# A bad client among good ones


def send_nonsense(server: RunningServer, seed: int, stopping: threading.Event) -> int:
    """Broken requests of all kinds, many left in the middle, until told to stop; how many."""
    generator = random.Random(seed)
    url = httpx.URL(server.url)
    count = 0
    while not stopping.is_set():
        body = generator.choice(
            [b'{"text": ', b"[" * 5000, b"\xff\xfe", b'{"text": "\\ud800"}', b'{"text": "a\\u0000b"}']
        )
        length = len(body) + generator.choice([0, 0, 1000])
        path = generator.choice([EMBED, OPENAI, SEARCH, DOCUMENT, "/../../etc/passwd", "/%ff"])
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        with contextlib.suppress(OSError), socket.create_connection((url.host, url.port or 0), timeout=5) as connection:
            connection.sendall(head.encode() + body)
            if generator.random() < 0.5:
                # Gone without a word: a reset instead of an orderly end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif length == len(body):
                status = int(connection.recv(65536).split(b" ", 2)[1])
                assert 400 <= status < 500, (path, body, status)
        count += 1
    return count


def embed_many(server: RunningServer, seed: int, count: int) -> dict[str, list[float]]:
    vectors = {}
    with server.client() as client:
        for text, _ in zip(make_texts(20, seed=seed), range(count), strict=False):
            reply = client.post(EMBED, json={"text": text})
            assert reply.status_code == 200, reply.text
            vectors[text] = reply.json()["embedding"]
    return vectors


def test_bad_clients_change_nothing_for_good_ones(tmp_path: Path) -> None:
    """Every good request gets its 200 and the vector that it gets in quiet."""
    stopping = threading.Event()
    with start_server(tmp_path) as server, ThreadPoolExecutor(6) as pool:
        bad = [pool.submit(send_nonsense, server, seed, stopping) for seed in range(2)]
        good = [pool.submit(embed_many, server, seed, 40) for seed in range(4)]
        try:
            vectors = {text: vector for one in good for text, vector in one.result().items()}
        finally:
            stopping.set()
        assert min(one.result() for one in bad) > 10
        assert "Traceback" not in server.output
        assert not re.search(r"(POST|GET) \S+ 5\d\d in", server.output)
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    with start_server(quiet) as server:
        for seed in range(4):
            for text, vector in embed_many(server, seed, 5).items():
                assert float(np.dot(vector, vectors[text])) == pytest.approx(1, abs=1e-3)


# No room for the log


def test_full_disk_under_the_log_stops_no_answer(tmp_path: Path) -> None:
    """It is said once, not for each line; the lines themselves are on stdout."""
    (tmp_path / LOG_FILE_NAME).symlink_to("/dev/full")
    with start_server(tmp_path) as server, server.client() as client:
        for number in range(5):
            assert ask_everything(client, number) == [200] * 5
        assert client.get("/ready").status_code == 200
        assert server.stop() == 0
        assert f"POST {EMBED} 200 in" in server.output
        assert server.output.count("The log file cannot be written") == 1
        assert "Traceback" not in server.output


# No file descriptors left

WITH_A_LOW_LIMIT = f"""
import resource, runpy, sys
sys.path.insert(0, {str(SERVER_PROGRAM.parent)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
runpy.run_path({str(SERVER_PROGRAM)!r}, run_name="__main__")
"""


def take_all_descriptors(server: RunningServer) -> list[socket.socket]:
    """Connections until the server can take no more."""
    url = httpx.URL(server.url)
    return [socket.create_connection((url.host, url.port or 0), timeout=5) for _ in range(200)]


@pytest.mark.parametrize("has_answered_before", [True, False])
def test_server_out_of_descriptors_recovers(tmp_path: Path, has_answered_before: bool) -> None:
    """Known clients get 200 or 503, whether all files are open already or not; new ones get in once there is room."""
    with start_server(tmp_path, program=("-c", WITH_A_LOW_LIMIT)) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        if has_answered_before:
            assert ask_everything(client, 0) == [200] * 5
        held = take_all_descriptors(server)
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        while len(os.listdir(f"/proc/{server.process.pid}/fd")) < 155:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert set(ask_everything(client, 1)) <= {200, 503}
        for connection in held:
            connection.close()
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError), server.client() as newcomer:
                if ask_everything(newcomer, 2) == [200] * 5:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.process.poll() is None


# A clock that goes back

WITH_A_CLOCK_THAT_GOES_BACK = f"""
import itertools, runpy, sys, time
from datetime import UTC, datetime, timedelta
sys.path.insert(0, {str(SERVER_PROGRAM.parent)!r})
import embeddings_data_models

hours = itertools.count()
now, started = time.time, datetime.now(UTC)
time.time = lambda: now() - 3600 * next(hours)
embeddings_data_models.utc_now = lambda: started - timedelta(hours=next(hours))
runpy.run_path({str(SERVER_PROGRAM)!r}, run_name="__main__")
"""


@pytest.fixture
def server_in_the_past(tmp_path: Path) -> Iterator[RunningServer]:
    with start_server(tmp_path, program=("-c", WITH_A_CLOCK_THAT_GOES_BACK)) as server:
        yield server


def test_clock_that_goes_back_moves_stamps_and_nothing_else(server_in_the_past: RunningServer, tmp_path: Path) -> None:
    """An hour at each look: all is answered, found again in the order in which it came, and after a restart, too."""
    texts = [f"Text number {number}." for number in range(10)]
    with server_in_the_past.client() as client:
        for number in range(3):
            assert ask_everything(client, number) == [200] * 5
        vectors = [client.post(EMBED, json={"text": text}).json()["embedding"] for text in texts]
        assert client.get("/ready").status_code == 200
    assert server_in_the_past.stop() == 0
    with contextlib.closing(sqlite3.connect(server_in_the_past.database)) as connection:
        stamps = [stamp for (stamp,) in connection.execute("SELECT response_time FROM embeddings ORDER BY id")]
    assert stamps == sorted(stamps, reverse=True)
    assert len(set(stamps)) > 5
    with start_server(tmp_path) as server, server.client() as client:
        for text, vector in zip(texts, vectors, strict=True):
            reply = client.post(EMBED, json={"text": text})
            assert reply.headers["x-embedding-source"] in ("store", "memory")
            assert reply.json()["embedding"] == vector
        stored = client.get("/get_all_stored_strings/").json()["strings"]
        assert [text for text in stored if text in texts] == texts
