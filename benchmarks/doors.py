"""What each door in front of the endpoints costs a request, in microseconds: `python -m benchmarks.doors`.

An application that answers at once is called through one door after the other in the same rounds; the figure is the
difference to calling it bare, the median of the rounds. No network and no routes: those cost the same either way.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from ipaddress import ip_network

import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_embeddings.api.clients import LimitRequests, TrustProxies
from llama_embeddings.api.middleware import Limits, LimitSizeAndTime, RequestContext
from llama_embeddings.api.security import RequireToken
from llama_embeddings.api.tokens import Tokens
from llama_embeddings.observability import RequestMeter

TOKEN = "a-token-that-is-long-enough"
BODY = b'{"text": "I feel extremely chilly"}'
LIMITS = Limits(
    max_bytes=50_000_000, max_bytes_in_flight=200_000_000, max_json_values=500_000, receive_seconds=20, work_seconds=600
)
HEADERS = [
    (b"host", b"127.0.0.1:8089"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"authorization", f"Bearer {TOKEN}".encode()),
    (b"x-forwarded-for", b"203.0.113.9"),
]


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def build_doors() -> dict[str, ASGIApp]:
    """The bare application, each door alone in front of it, and those of a server with default settings."""
    meter = RequestMeter()
    limited = LimitSizeAndTime(answer, limits=LIMITS)
    guarded = RequireToken(limited, tokens=Tokens(TOKEN), max_wrong_per_minute=30)
    return {
        "bare": answer,
        "id, log line, headers, metrics": RequestContext(answer, meter=meter, slow_request_seconds=10),
        "sizes and times": limited,
        "token": RequireToken(answer, tokens=Tokens(TOKEN), max_wrong_per_minute=30),
        "rate": LimitRequests(answer, per_minute=10**9),
        "proxies": TrustProxies(answer, networks=[ip_network("127.0.0.0/8")]),
        "default, with a token": RequestContext(guarded, meter=meter, slow_request_seconds=10),
    }


async def measure(app: ASGIApp, n_requests: int) -> float:
    """Seconds per request."""

    async def receive() -> Message:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        pass

    started = time.perf_counter()
    for _ in range(n_requests):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/get_embedding_vector_for_string/",
            "query_string": b"",
            "headers": HEADERS,
            "client": ("127.0.0.1", 4711),
        }
        await app(scope, receive, send)
    return (time.perf_counter() - started) / n_requests


async def measure_all(n_rounds: int, n_requests: int) -> dict[str, float]:
    """Microseconds of each door, the log's own writing left out."""
    doors = build_doors()
    rounds: dict[str, list[float]] = {name: [] for name in doors}
    for _ in range(n_rounds):
        for name, app in doors.items():
            rounds[name].append(await measure(app, n_requests))
    medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    return {name: round(1e6 * (seconds - medians["bare"]), 2) for name, seconds in medians.items() if name != "bare"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=5000)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(json.dumps(uvloop.run(measure_all(arguments.rounds, arguments.requests)), indent=1))


if __name__ == "__main__":
    main()
