"""Clients that mean no good, or have a bad line: against the real program, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from llama_embeddings.api.connections import raise_descriptor_limit
from tests.serving import SERVER_PROGRAM, RunningServer, start_server

EMBED = "/get_embedding_vector_for_string/"
TOKEN = "a-token-for-tests-only-1234"
PATIENCE_SECONDS = 1.0
# A cut comes after the server's patience, sooner than this.
LONGEST_WAIT_SECONDS = 10.0
# Started with few descriptors, it has to raise the limit by itself.
WITH_FEW_DESCRIPTORS = f"""
import resource, runpy, sys
sys.path.insert(0, {str(SERVER_PROGRAM.parent)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
runpy.run_path({str(SERVER_PROGRAM)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that waits a second for its clients."""
    settings = {"RECEIVE_TIMEOUT_SECONDS": str(PATIENCE_SECONDS)}
    with start_server(tmp_path_factory.mktemp("impatient"), settings) as server:
        yield server


def connect(server: RunningServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=LONGEST_WAIT_SECONDS)


def read_until_closed(connection: socket.socket) -> bytes:
    """What comes until the server closes; TimeoutError if it does not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


@contextlib.contextmanager
def dribble(connection: socket.socket, data: bytes) -> Iterator[None]:
    """Send a byte each fifth of a second meanwhile, over and over."""
    has_ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not has_ended.is_set():
                for place in range(len(data)):
                    if has_ended.wait(0.2):
                        return
                    connection.sendall(data[place : place + 1])

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: server", "Content-Type: application/json", *headers, "", ""]
    ).encode()


def check_cut(connection: socket.socket, *, at_least: float = 0.0) -> bytes:
    """The server closes within its patience and some; what it said before."""
    started = time.monotonic()
    received = read_until_closed(connection)
    assert at_least <= time.monotonic() - started < LONGEST_WAIT_SECONDS
    return received


# Too slow, too much


def test_connection_on_which_nothing_comes_is_closed(impatient: RunningServer) -> None:
    """After RECEIVE_TIMEOUT_SECONDS."""
    with connect(impatient) as connection:
        assert check_cut(connection, at_least=PATIENCE_SECONDS / 2) == b""


@pytest.mark.parametrize("data", [b"GET /health HTTP/1.1\r\nX-Endless: " + b"x" * 100, b"\r\n"])
def test_head_that_comes_byte_by_byte_is_cut(data: bytes, impatient: RunningServer) -> None:
    """Each byte comes in time, the whole does not; nor do empty lines in front of a request count."""
    with connect(impatient) as connection, dribble(connection, data):
        assert check_cut(connection) == b""


def test_body_that_comes_byte_by_byte_is_answered_with_408_and_cut(impatient: RunningServer) -> None:
    """The client is told why, and cannot go on on the same connection."""
    with connect(impatient) as connection:
        connection.sendall(head(EMBED, "Content-Length: 1000"))
        with dribble(connection, b'{"text": "' + b"x" * 1000):
            received = check_cut(connection, at_least=PATIENCE_SECONDS / 2)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert json.loads(received.split(b"\r\n\r\n")[1])["code"] == "receive_timeout"


def test_body_that_comes_slowly_but_steadily_is_taken(impatient: RunningServer) -> None:
    """A phone's line: 20 kB/s for three times the patience."""
    text = json.dumps({"text": "slow but steady", "padding": "x" * 60_000}).encode()
    with connect(impatient) as connection:
        connection.sendall(head(EMBED, f"Content-Length: {len(text)}", "Connection: close"))
        for place in range(0, len(text), 2000):
            time.sleep(0.1)
            connection.sendall(text[place : place + 2000])
        assert read_until_closed(connection).startswith(b"HTTP/1.1 200 ")


def test_body_after_a_refusal_keeps_no_connection_open(tmp_path: Path) -> None:
    """A 401 does not wait for the body, nor does the connection for ever."""
    settings = {"RECEIVE_TIMEOUT_SECONDS": str(PATIENCE_SECONDS), "SECURITY_TOKEN": TOKEN}
    with start_server(tmp_path, settings) as server, connect(server) as connection:
        connection.sendall(head(EMBED, "Content-Length: 1000000"))
        with dribble(connection, b"x" * 1000):
            assert check_cut(connection).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("trailer", [b"", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"])
def test_endless_headers_are_cut_before_they_fill_the_memory(trailer: bytes, impatient: RunningServer) -> None:
    """In front of a body or behind one: 64 kB, and what one read of the socket brings."""
    with connect(impatient) as connection:
        connection.sendall(b"POST /health HTTP/1.1\r\nHost: server\r\n" + trailer)
        n_sent = 0
        with contextlib.suppress(ConnectionError):
            while n_sent < 100_000_000:
                connection.sendall(b"X-Header: " + b"x" * 65_000 + b"\r\n")
                n_sent += 65_000
        assert n_sent < 20_000_000  # what the buffers of both ends hold is counted as sent


def test_client_that_never_reads_is_cut(impatient: RunningServer) -> None:
    """Megabytes of reply are not kept for it for ever; one that reads slowly gets all of it."""
    body = json.dumps({"input": [f"text {number}" for number in range(2000)], "encoding_format": "float"}).encode()
    with impatient.client() as client:
        whole = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert whole.status_code == 200
        assert len(whole.content) > 5_000_000
    with connect(impatient) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head("/v1/embeddings", f"Content-Length: {len(body)}") + body)
        server = psutil.Process(impatient.process.pid)
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        local = connection.getsockname()
        while any(other.raddr == local and other.status == "ESTABLISHED" for other in server.net_connections()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(read_until_closed(connection)) < len(whole.content)


def test_client_that_reads_slowly_gets_all_of_it(impatient: RunningServer) -> None:
    """Ten times a second some of it, for longer than the patience."""
    body = json.dumps({"input": [f"text {number}" for number in range(2000)], "encoding_format": "float"}).encode()
    with connect(impatient) as connection:
        connection.sendall(head("/v1/embeddings", f"Content-Length: {len(body)}", "Connection: close") + body)
        received = b""
        while part := connection.recv(400_000):
            received += part
            time.sleep(0.1)
    length = re.search(rb"content-length: (\d+)", received)
    assert length is not None
    assert len(received.split(b"\r\n\r\n", 1)[1]) == int(length[1]) > 5_000_000


# Very many


async def hold_connections(url: str, count: int) -> list[asyncio.StreamWriter]:
    """So many connections, each of which has been answered once and goes on being open."""
    parts = urlsplit(url)

    async def open_one() -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        return writer

    return list(await asyncio.gather(*(open_one() for _ in range(count))))


async def test_a_thousand_idle_connections_and_five_hundred_requests_at_once(tmp_path: Path) -> None:
    """All are answered with 200, by a server that was started with 256 descriptors; then it is as fast as before."""
    raise_descriptor_limit(3000)
    with start_server(tmp_path, program=("-c", WITH_FEW_DESCRIPTORS)) as server:
        writers = await hold_connections(server.url, 1000)
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client:
            assert (await client.get("/health")).status_code == 200
            replies = await asyncio.gather(
                *(client.post(EMBED, json={"text": f"text number {number}"}) for number in range(500))
            )
            assert [reply.status_code for reply in replies] == [200] * 500
            assert (await client.get("/ready")).status_code == 200
        for writer in writers:
            writer.close()
        assert "open files" not in server.output


def test_connections_beyond_the_bound_are_closed_and_others_are_served(tmp_path: Path) -> None:
    """The eleventh of ten; when one of them goes, there is room again."""
    with start_server(tmp_path, {"MAX_CONNECTIONS": "10"}) as server:
        held = [connect(server) for _ in range(10)]
        with connect(server) as eleventh:
            assert read_until_closed(eleventh) == b""
        held.pop().close()
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError), server.client() as client:
                if client.get("/health").status_code == 200:
                    break
            assert time.monotonic() < deadline
        for connection in held:
            connection.close()
        assert "More than 10 connections" in server.output


# Very large


async def test_memory_does_not_follow_the_bodies_that_are_sent(tmp_path: Path) -> None:
    """40 clients send 8 MB each at the same time: 20 MB at a time are let in, the others are told to come again."""
    settings = {"MAX_REQUEST_SIZE_IN_MB": "10", "MAX_REQUEST_SIZES_IN_FLIGHT_IN_MB": "20"}
    body = json.dumps({"text": "x" * 8_000_000}).encode()
    headers = {"content-type": "application/json"}
    with start_server(tmp_path, settings) as server:
        before = read_peak_memory(server.process.pid)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
            replies = await asyncio.gather(
                *(client.post(EMBED, content=body, headers=headers) for _ in range(40)), return_exceptions=True
            )
            assert (await client.post(EMBED, json={"text": "all is well"})).status_code == 200
        grown = read_peak_memory(server.process.pid) - before
    statuses = {reply.status_code for reply in replies if isinstance(reply, httpx.Response)}
    assert statuses <= {413, 429}
    assert 413 in statuses
    assert grown < 150_000_000


def read_peak_memory(pid: int) -> int:
    """The largest resident size so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
