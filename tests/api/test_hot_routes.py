"""The short ways to the busiest endpoints answer as the long way does, and leave to it what is not plain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import RunningApplication, run_application

NATIVE = "/get_embedding_vector_for_string/"
OPENAI = "/v1/embeddings"
TOKEN_LEVEL = (
    "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"
)
JSON = "application/json"
# Not the plain type, so that FastAPI has it.
LONG_WAY = "application/json; charset=utf-8"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    async with run_application(tmp_path) as running:
        yield running


async def ask(running: RunningApplication, path: str, content: bytes | str, content_type: str) -> httpx.Response:
    return await running.client.post(path, content=content, headers={"content-type": content_type, "x-request-id": "x"})


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (NATIVE, '{"text": "hello"}'),
        (NATIVE, '{"text": "hello", "model_name": "no such"}'),
        (NATIVE, '{"text": ""}'),
        (NATIVE, '{"text": 5}'),
        (NATIVE, "{}"),
        (NATIVE, "[]"),
        (NATIVE, "not json"),
        (NATIVE, ""),
        (NATIVE, '{"text": "\\ud800"}'),
        (NATIVE, b'\xff{"text": "hello"}'),
        (NATIVE, '{"text": "hello", "truncation": "sideways"}'),
        (OPENAI, '{"input": "hello"}'),
        (OPENAI, '{"input": ["hello", "there"], "encoding_format": "base64"}'),
        (OPENAI, '{"input": []}'),
        (OPENAI, '{"input": [1, "two"]}'),
        (OPENAI, '{"input": "hello", "dimensions": 0}'),
        (OPENAI, '{"input": "hello", "model": "no such"}'),
        (OPENAI, "{"),
        (TOKEN_LEVEL, '{"text": "hello"}'),
        (TOKEN_LEVEL, '{"text": ""}'),
        (TOKEN_LEVEL, '{"text": 5}'),
        (TOKEN_LEVEL, '{"text": "hello", "truncation": "left"}'),
        (f"{TOKEN_LEVEL}&json_format=split", '{"text": "hello"}'),
        (TOKEN_LEVEL.partition("?")[0], '{"text": "hello"}'),
    ],
)
async def test_short_way_answers_as_the_long_way_does(
    running: RunningApplication, path: str, content: bytes | str
) -> None:
    """Status, body and headers are the same, for good requests and bad ones; only where an answer came from differs."""
    await ask(running, path, content, LONG_WAY)
    short, long = [await ask(running, path, content, kind) for kind in (JSON, LONG_WAY)]
    assert short.status_code == long.status_code
    assert short.content == long.content
    assert dict(short.headers) == dict(long.headers)


@pytest.mark.parametrize("content_type", [JSON, LONG_WAY])
async def test_query_is_read_on_either_way(running: RunningApplication, content_type: str) -> None:
    """Parameters are FastAPI's matter: one that is too long is refused."""
    reply = await ask(running, f"{NATIVE}?client_ip={'1' * 65}", '{"text": "hello"}', content_type)
    assert reply.status_code == 422


async def test_other_methods_are_refused_and_no_route_is_described_twice(running: RunningApplication) -> None:
    """The short way is no second route to anybody."""
    assert (await running.client.get(NATIVE)).status_code == 405
    described: dict[str, Any] = (await running.client.get("/openapi.json")).json()["paths"]
    assert list(described[NATIVE]) == ["post"]


async def test_short_way_is_taken_by_plain_requests(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that FastAPI does not know of answers."""
    seen: list[str] = []
    services = running.app.state.services
    get = services.embeddings.get_or_compute

    async def note(texts: list[str], **options: Any) -> Any:
        seen.append(texts[0])
        return await get(texts, **options)

    monkeypatch.setattr(services.embeddings, "get_or_compute", note)
    monkeypatch.setattr("fastapi.routing.run_endpoint_function", None)
    assert (await ask(running, NATIVE, '{"text": "short"}', JSON)).status_code == 200
    assert (await ask(running, TOKEN_LEVEL, '{"text": "short"}', JSON)).status_code == 200
    assert (await ask(running, NATIVE, '{"text": "long"}', LONG_WAY)).status_code == 500
    assert seen == ["short"]
