"""A minute of `make fuzz`: each property for a moment, every operation of the API some requests.

What was found at length is said in `docs/reliability.md`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from tests.fuzz.api import ApiFigures, Fuzzer, fuzz_api, list_operations, open_session, start_fuzzed_server
from tests.fuzz.properties import PROPERTIES, Property, try_property

EXAMPLES = 300
API_SECONDS = 5.0
REQUESTS_PER_OPERATION_AND_KIND = 3


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_property_holds(prop: Property) -> None:
    """For whatever hypothesis draws; a failure names the smallest example."""
    assert try_property(prop, n_examples=EXAMPLES).n_examples > 0


def test_api_answers_whatever_is_sent_to_it(tmp_path: Path) -> None:
    """Documented statuses and bodies, no 5xx but honest ones, no hang, no growth."""
    with start_fuzzed_server(tmp_path) as server:
        figures = fuzz_api(server, seconds=API_SECONDS, examples_per_round=REQUESTS_PER_OPERATION_AND_KIND)
    assert figures.failures == {}
    assert figures.statuses[200] > 0
    assert figures.n_requests > figures.n_operations


def make_faulty_app() -> FastAPI:
    app = FastAPI()

    @app.post("/fails")
    async def fail(number: int) -> int:
        return 1 // 0

    @app.get("/lies")
    async def lie() -> dict[str, int]:
        raise StopAsyncIteration

    return app


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_faults_of_an_api_are_found() -> None:
    """A program that finds nothing may be one that looks for nothing."""
    figures = ApiFigures()
    with serve(make_faulty_app()) as url, open_session() as session:
        for operation in list_operations(url):
            Fuzzer(url, session, operation, figures).run(5, 0)
    assert {failure.split(":")[0] for failure in figures.failures} == {"POST /fails", "GET /lies"}
    assert "POST /fails: 500, which is not documented" in figures.failures
