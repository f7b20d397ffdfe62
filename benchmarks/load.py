"""A load generator that takes little of the machine it measures: keep-alive connections on bare sockets.

`python -m benchmarks.load URL PATH --clients 4 --texts 32 --seconds 6` prints texts per second and latencies as JSON.
Each client sends its next request when it has the answer to the last. Any status but 200 ends the run with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

import numpy as np

from benchmarks.texts import make_texts

WARM_UP_SHARE = 0.15
# Doubled as replies are longer.
INITIAL_BUFFER_BYTES = 2**16
# More than a small model computes on two cores.
PREPARED_TOKENS_PER_SECOND = 12_000


class Client(asyncio.BufferedProtocol):
    """One connection, a request at a time.

    Replies are received into one buffer that stays: the copies of a stream reader would take about as long for a reply
    of a megabyte as the server takes to write it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._buffer = bytearray(INITIAL_BUFFER_BYTES)
        self._reply: asyncio.Future[tuple[int, bytes]] | None = None
        self._begin_reply()

    async def __aenter__(self) -> Client:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, *self._address)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._transport.close()

    async def post(self, path: str, body: bytes) -> bytes:
        """Send a JSON body, return the reply's; RuntimeError unless the status is 200."""
        return _require_success(*await self.exchange("POST", path, body))

    async def get(self, path: str) -> bytes:
        """The reply's body; RuntimeError unless the status is 200."""
        return _require_success(*await self.exchange("GET", path))

    async def exchange(
        self, method: str, path: str, body: bytes = b"", content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send a request; status and body of the reply. ConnectionError if the connection ends before its end."""
        if self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._begin_reply()
        self._reply = asyncio.get_running_loop().create_future()
        self.send(method, path, body, content_type)
        return await self._reply

    def send(self, method: str, path: str, body: bytes, content_type: str) -> None:
        """Send a request without waiting for its reply."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address[0]}\r\n"
        if method == "POST":
            head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(f"{head}\r\n".encode() + body)

    # What the event loop calls.

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._n_received == len(self._buffer):
            self._buffer = self._buffer + bytearray(len(self._buffer))
        return memoryview(self._buffer)[self._n_received :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many more are there."""
        self._n_received += nbytes
        if self._reply is not None and not self._reply.done() and self._is_complete():
            self._reply.set_result((self._status, b"".join(self._parts)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits will get no more."""
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(ConnectionResetError(f"the server closed the connection: {exc}"))

    # A reply.

    def _begin_reply(self) -> None:
        self._n_received = self._n_read = self._status = 0
        self._n_body: int | None = None
        self._parts: list[bytes] = []

    def _is_complete(self) -> bool:
        return (self._status > 0 or self._read_head()) and self._read_body()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, self._n_received)
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if ": " in line)
        self._status = int(first.split(" ", 2)[1])
        self._n_read = end + 4
        self._n_body = None if "transfer-encoding" in headers else int(headers.get("content-length", 0))
        return True

    def _read_body(self) -> bool:
        if self._n_body is None:
            return self._read_chunks()
        return self._take(self._n_body)

    def _read_chunks(self) -> bool:
        while (end := self._buffer.find(b"\r\n", self._n_read, self._n_received)) >= 0:
            size, begin = int(self._buffer[self._n_read : end], 16), end + 2
            if begin + size + 2 > self._n_received:
                return False
            self._n_read = begin
            self._take(size)
            self._n_read += 2
            if size == 0:
                return True
        return False

    def _take(self, count: int) -> bool:
        """Put the next bytes to the body, if they are there."""
        end = self._n_read + count
        if end > self._n_received:
            return False
        self._parts.append(bytes(memoryview(self._buffer)[self._n_read : end]))
        self._n_read = end
        return True


def _require_success(status: int, body: bytes) -> bytes:
    if status != 200:
        raise RuntimeError(f"{status}: {body[:300]!r}")
    return body


def make_body(texts: list[str], path: str) -> bytes:
    """The request of a path's dialect."""
    if path.startswith("/v1/"):
        return json.dumps({"input": texts, "model": "all-MiniLM-L6-v2", "encoding_format": "base64"}).encode()
    return json.dumps({"text": texts[0]}).encode()


def make_bodies(path: str, texts_per_request: int, n_tokens: int, seed: int) -> Iterator[bytes]:
    """Requests with ever new texts."""
    texts = make_texts(n_tokens, seed=seed)
    while True:
        yield make_body(list(itertools.islice(texts, texts_per_request)), path)


async def run_clients(
    url: str, path: str, *, n_clients: int, texts_per_request: int, n_tokens: int, seconds: float, seed: int
) -> dict[str, float]:
    """Texts per second after the warm-up, and the latency of a request at the 50th and 99th percentile.

    So that the last requests are as long as the others, the load goes on until those that were sent in time are
    answered.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    # Beforehand: meanwhile, the making of texts would take from the machine what they are measured with.
    n_prepared = math.ceil(seconds * PREPARED_TOKENS_PER_SECOND / n_tokens / texts_per_request / n_clients)
    bodies = [make_bodies(path, texts_per_request, n_tokens, seed * 100 + number) for number in range(n_clients)]
    prepared = [list(itertools.islice(bodies[number], n_prepared)) for number in range(n_clients)]
    started = time.perf_counter()
    measured_from, ends = started + WARM_UP_SHARE * seconds, started + seconds
    exchanges: list[tuple[float, float]] = []
    n_open = 0

    async def work(number: int) -> None:
        nonlocal n_open
        async with Client(parts.hostname or "", parts.port or 0) as client:
            for body in itertools.chain(prepared[number], bodies[number]):
                sent = time.perf_counter()
                is_in_time = sent < ends
                if not is_in_time and n_open == 0:
                    return
                n_open += is_in_time
                await client.post(path, body)
                n_open -= is_in_time
                exchanges.append((sent, time.perf_counter()))

    await asyncio.gather(*(work(number) for number in range(n_clients)))
    n_inside = count_inside(exchanges, measured_from, ends)
    latencies = np.array([end - sent for sent, end in exchanges if measured_from <= end <= ends])
    return {
        "texts_per_second": n_inside * texts_per_request / (ends - measured_from),
        "p50_seconds": float(np.median(latencies)),
        "p99_seconds": float(np.quantile(latencies, 0.99)),
        "n_requests": len(latencies),
        "n_texts": len(exchanges) * texts_per_request,
    }


def count_inside(exchanges: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """How many requests a time saw, of their beginnings and ends: one that lies across an edge by its share inside.

    Of a few long ones, whole numbers would say little.
    """
    return sum(max(0.0, min(ended, end) - max(sent, begin)) / (ended - sent) for sent, ended in exchanges)


async def poll_health(url: str, seconds: float, interval: float = 0.02) -> dict[str, float]:
    """Latency of GET /health while something else keeps the server busy."""
    parts = urlsplit(url)
    latencies = []
    ends = time.perf_counter() + seconds
    async with Client(parts.hostname or "", parts.port or 0) as client:
        while time.perf_counter() < ends:
            sent = time.perf_counter()
            await client.get("/health")
            latencies.append(time.perf_counter() - sent)
            await asyncio.sleep(interval)
    return {"p50_seconds": float(np.median(latencies)), "p99_seconds": float(np.quantile(latencies, 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("path")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=35)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--health", action="store_true", help="poll GET /health instead")
    arguments = parser.parse_args()
    if arguments.health:
        print(json.dumps(asyncio.run(poll_health(arguments.url, arguments.seconds))))
        return
    result = run_clients(
        arguments.url,
        arguments.path,
        n_clients=arguments.clients,
        texts_per_request=arguments.texts,
        n_tokens=arguments.tokens,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    print(json.dumps(asyncio.run(result)))


if __name__ == "__main__":
    main()
