"""Log lines in both forms, masked tokens, and what is noted about a request."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from llama_embeddings import observability
from llama_embeddings.observability import (
    DURATION_BUCKETS,
    JsonFormatter,
    RequestMeter,
    TextFormatter,
    TimedStore,
    begin_request,
    mask_tokens,
    note_engine,
)


def make_record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("llama_embeddings.part", logging.WARNING, "part.py", 1, message, arguments, None)
    record.__dict__.update(fields)
    return record


@pytest.fixture
def _within_a_request() -> Iterator[None]:
    token = observability.request_id.set("request-1")
    yield
    observability.request_id.reset(token)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("GET /v1/models?token=secret HTTP/1.1", "GET /v1/models?token=*** HTTP/1.1"),
        ("?limit=1&token=se%20cret&offset=2", "?limit=1&token=***&offset=2"),
        ("{'authorization': 'Bearer secret'}", "{'authorization': 'Bearer ***'}"),
        ("Authorization: bearer  secret", "Authorization: bearer  ***"),
        ("Token=secret", "Token=***"),
        ("14 tokens, max_token = 5, a bearer of news", "14 tokens, max_token = 5, a bearer *** news"),
        ("hf_token_length=5", "hf_token_length=5"),
    ],
)
def test_what_looks_like_a_token_is_masked(line: str, expected: str) -> None:
    """In addresses and headers, wherever they are quoted; a word too much is no harm."""
    assert mask_tokens(line) == expected


@pytest.mark.usefixtures("_within_a_request")
def test_request_s_id_is_in_every_line_of_either_form() -> None:
    """In front of the message for people, as a field for programs; twice formatted it is there once."""
    record = make_record("took %d ms", 5)
    for _ in range(2):
        assert TextFormatter().format(record).endswith(" - WARNING - [request-1] took 5 ms")
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["request_id"], entry["message"], entry["level"]) == ("request-1", "took 5 ms", "WARNING")


def test_line_outside_of_a_request_has_no_id() -> None:
    """As at the start."""
    assert TextFormatter().format(make_record("Ready")).endswith(" - WARNING - Ready")
    assert "request_id" not in json.loads(JsonFormatter().format(make_record("Ready")))


def test_json_line_is_one_line_whatever_is_in_it() -> None:
    """Line breaks, quotes, tracebacks; tokens are masked in all of them."""
    try:
        raise ValueError("asked for /x?token=secret")
    except ValueError:
        record = make_record('said "so"\nand ?token=secret', exc_info=sys.exc_info(), fields={"route": "/x"})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "secret" not in line
    entry = json.loads(line)
    assert list(entry) == ["time", "level", "logger", "message", "exception", "route"]
    assert entry["message"] == 'said "so"\nand ?token=***'
    assert "ValueError" in entry["exception"]
    assert entry["time"].endswith("+00:00")


def test_traceback_for_people_is_masked() -> None:
    """An exception's message can hold an address."""
    try:
        raise ValueError("asked for /x?token=secret")
    except ValueError:
        record = make_record("failed", exc_info=sys.exc_info())
    assert "secret" not in TextFormatter().format(record)


async def test_notes_of_a_request_come_from_the_tasks_it_starts() -> None:
    """And from no other request's."""

    async def work(seconds: float) -> None:
        note_engine(queue_seconds=seconds, compute_seconds=seconds)
        with TimedStore():
            await asyncio.sleep(0)

    async def answer(name: str, seconds: float) -> observability.RequestNotes:
        notes = begin_request(name)
        await asyncio.gather(work(seconds), asyncio.create_task(work(2 * seconds)))
        return notes

    first, second = await asyncio.gather(asyncio.create_task(answer("a", 1.0)), asyncio.create_task(answer("b", 10.0)))
    assert (first.queue_seconds, first.compute_seconds) == (2.0, 3.0)
    assert (second.queue_seconds, second.compute_seconds) == (20.0, 30.0)
    assert first.store_seconds > 0


def test_noting_outside_of_a_request_does_nothing() -> None:
    """Services may be called by anybody."""
    note_engine(queue_seconds=1.0, compute_seconds=1.0)
    with TimedStore():
        pass


def test_durations_are_counted_in_the_first_bucket_that_holds_them() -> None:
    """Bounds belong to their bucket; what is beyond the last has one of its own."""
    meter = RequestMeter()
    for seconds in (0.0, 0.001, 0.0011, 300.0, 301.0):
        meter.count("GET", "/x", 200, seconds)
    [series] = meter.series.values()
    assert len(series.counts) == len(DURATION_BUCKETS) + 1
    assert (series.counts[0], series.counts[1], series.counts[-2], series.counts[-1]) == (2, 1, 1, 1)
    assert series.seconds == pytest.approx(601.0021)
