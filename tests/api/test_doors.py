"""What stands in front of every endpoint: proxies, rates, sizes, times, and the headers of every reply."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import RunningApplication, run_application, wait_until

EMBED = "/get_embedding_vector_for_string/"
OPENAI = "/v1/embeddings"
TOKEN = "a-token-for-tests-only-1234"
PROXY = "10.0.0.7"
PUBLIC = "8.8.8.8"
JSON = {"content-type": "application/json"}


@asynccontextmanager
async def call_from(running: RunningApplication, address: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose connections come from this address."""
    transport = httpx.ASGITransport(app=running.app, raise_app_exceptions=False, client=(address, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://server", **options) as client:
        yield client


def read_addresses(running: RunningApplication) -> list[str]:
    with sqlite3.connect(running.database) as connection:
        return [address for (address,) in connection.execute("SELECT ip_address FROM embeddings ORDER BY id")]


# Trusted proxies


async def test_trusted_proxy_is_believed_and_nobody_else(tmp_path: Path) -> None:
    """`X-Forwarded-For` and `client_ip` count from the proxy; from others the connection's address is noted."""
    forwarded = {"x-forwarded-for": "198.51.100.1, 203.0.113.9"}
    async with run_application(tmp_path, trusted_proxies="10.0.0.0/8") as running:
        async with call_from(running, PROXY) as client:
            await client.post(EMBED, json={"text": "through the proxy"}, headers=forwarded)
            await client.post(EMBED, json={"text": "the proxy says who"}, params={"client_ip": "192.0.2.44"})
            await client.post(EMBED, json={"text": "the proxy itself"})
        async with call_from(running, PUBLIC) as client:
            await client.post(EMBED, json={"text": "made up"}, headers=forwarded)
            await client.post(EMBED, json={"text": "made up, too"}, params={"client_ip": "192.0.2.44"})
        assert read_addresses(running) == ["203.0.113.9", "192.0.2.44", PROXY, PUBLIC, PUBLIC]


async def test_redirect_behind_a_proxy_keeps_its_scheme(tmp_path: Path) -> None:
    """A slash is added under https, if it was https that the client asked by."""
    async with run_application(tmp_path, trusted_proxies=PROXY) as running:
        for address, scheme in ((PROXY, "https"), (PUBLIC, "http")):
            async with call_from(running, address, headers={"x-forwarded-proto": "https"}) as client:
                reply = await client.get("/get_all_stored_strings")
                assert reply.headers["location"] == f"{scheme}://server/get_all_stored_strings/"


# Rates


async def test_client_that_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    """429 with Retry-After in the dialect of the path, for this client alone; /health always answers."""
    async with run_application(tmp_path, max_requests_per_minute=5) as running:
        async with call_from(running, PUBLIC) as client:
            for _ in range(5):
                assert (await client.get("/get_all_stored_strings/")).status_code == 200
            native = await client.get("/get_all_stored_strings/")
            openai = await client.post(OPENAI, json={"input": "hello"})
            assert (native.status_code, native.json()["code"]) == (429, "overloaded")
            assert (openai.status_code, openai.json()["error"]["code"]) == (429, "overloaded")
            assert 1 <= int(native.headers["retry-after"]) <= 12
            assert "MAX_REQUESTS_PER_MINUTE" in native.json()["detail"]
            assert (await client.get("/health")).status_code == 200
        async with call_from(running, "9.9.9.9") as client:
            assert (await client.get("/get_all_stored_strings/")).status_code == 200


async def test_rate_is_the_client_s_and_not_the_proxy_s(tmp_path: Path) -> None:
    """Behind a trusted proxy each address has its own."""
    settings = {"max_requests_per_minute": 2, "trusted_proxies": PROXY}
    async with run_application(tmp_path, **settings) as running, call_from(running, PROXY) as client:
        statuses = [
            (await client.get("/v1/models", headers={"x-forwarded-for": address})).status_code
            for address in ("203.0.113.1", "203.0.113.1", "203.0.113.1", "203.0.113.2")
        ]
        assert statuses == [200, 200, 429, 200]


async def test_public_address_that_guesses_tokens_is_not_listened_to_for_a_while(tmp_path: Path) -> None:
    """Not even the right token opens from there then; other addresses, and private ones, are not touched by it."""
    wrong, right = {"authorization": "Bearer guess"}, {"authorization": f"Bearer {TOKEN}"}
    settings = {"security_token": TOKEN, "max_wrong_tokens_per_minute": 3}
    async with run_application(tmp_path, **settings) as running:
        async with call_from(running, PUBLIC) as client:
            statuses = [(await client.get("/v1/models", headers=wrong)).status_code for _ in range(5)]
            assert statuses == [401, 401, 401, 429, 429]
            refused = await client.get("/v1/models", headers=right)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await client.get("/v1/models")).status_code == 401
        async with call_from(running, "9.9.9.9") as client:
            assert (await client.get("/v1/models", headers=right)).status_code == 200
        async with call_from(running, PROXY) as client:
            statuses = [(await client.get("/v1/models", headers=wrong)).status_code for _ in range(5)]
            assert statuses == [401] * 5
            assert (await client.get("/v1/models", headers=right)).status_code == 200


async def test_right_tokens_are_never_counted_as_guesses(tmp_path: Path) -> None:
    """However often they come."""
    settings = {"security_token": TOKEN, "max_wrong_tokens_per_minute": 1}
    async with run_application(tmp_path, **settings) as running, call_from(running, PUBLIC) as client:
        for _ in range(10):
            assert (await client.get("/v1/models", params={"token": TOKEN})).status_code == 200


# Tokens of a file


async def test_tokens_of_the_file_open_the_door_and_their_names_are_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the server's own token; the log says who, never with what."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "tokens.txt"
    path.write_text("# people\nreporting token-of-reporting-1234\ntoken-without-a-name-5678\n")
    async with run_application(tmp_path, security_token=TOKEN, security_tokens_file=str(path)) as running:
        for token, status in (
            (TOKEN, 200),
            ("token-of-reporting-1234", 200),
            ("token-without-a-name-5678", 200),
            ("reporting", 401),
        ):
            headers = {"authorization": f"Bearer {token}"}
            assert (await running.client.get("/v1/models", headers=headers)).status_code == status, token
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("llama_embeddings")]
    ends = [line.rpartition(" ms")[2] for line in lines if line.startswith("GET /v1/models")]
    assert ends == ["", " by reporting", " by line-3", ""]
    assert not [line for line in lines if "-1234" in line or "-5678" in line]


# Sizes and times


async def send_slowly(gate: asyncio.Event, first: bytes, last: bytes) -> AsyncIterator[bytes]:
    yield first
    await gate.wait()
    yield last


async def test_bodies_in_flight_are_bounded_together(tmp_path: Path) -> None:
    """While one large body is being received, another is refused with 429; a lone one is always let in."""
    async with run_application(tmp_path, max_request_sizes_in_flight_in_mb=0.001) as running:
        alone = await running.client.post(EMBED, json={"text": "x" * 400, "padding": "y" * 5000})
        assert alone.status_code == 200
        gate = asyncio.Event()
        slow = asyncio.create_task(
            running.client.post(
                EMBED, content=send_slowly(gate, b'{"text": "slow", "padding": "' + b"x" * 900, b'"}'), headers=JSON
            )
        )
        await asyncio.sleep(0.05)
        refused = await running.client.post(EMBED, json={"text": "x" * 400})
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert "MAX_REQUEST_SIZES_IN_FLIGHT_IN_MB" in refused.json()["detail"]
        gate.set()
        assert (await slow).status_code == 200
        assert (await running.client.post(EMBED, json={"text": "x" * 400})).status_code == 200


async def test_request_that_takes_too_long_is_given_up_with_503(tmp_path: Path) -> None:
    """In the caller's dialect; its texts are not computed any more, and the next request is answered."""
    async with run_application(tmp_path, max_request_seconds=0.3, inference_workers=1) as running:
        batcher = running.app.state.services.models.engines()[0].batcher
        running.backend.gate.clear()
        held = asyncio.create_task(running.client.post(EMBED, json={"text": "holds up the engine"}))
        await wait_until(lambda: batcher._queue.n_busy_workers == 1)
        waits = asyncio.create_task(running.client.post(OPENAI, json={"input": "waits behind it"}))
        replies = await asyncio.wait_for(asyncio.gather(held, waits), timeout=5)
        assert [reply.status_code for reply in replies] == [503, 503]
        assert replies[0].json()["code"] == replies[1].json()["error"]["code"] == "request_timeout"
        assert "MAX_REQUEST_SECONDS" in replies[0].json()["detail"]
        assert int(replies[0].headers["retry-after"]) >= 1
        await wait_until(lambda: batcher.counters.n_skipped_texts == 1)
        running.backend.gate.set()
        assert (await running.client.post(EMBED, json={"text": "and on"})).status_code == 200


async def test_time_for_the_work_ends_with_the_reply_s_first_byte(tmp_path: Path) -> None:
    """A download under way is never cut, however slowly it is taken."""
    async with run_application(tmp_path, max_request_seconds=0.2) as running:

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(6):
                await asyncio.sleep(0.1)
                await send({"type": "http.response.body", "body": b"part", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        running.app.mount("/slow_download", stream)
        assert (await running.client.get("/slow_download/")).content == b"part" * 6


async def test_body_that_stops_coming_is_answered_with_408(tmp_path: Path) -> None:
    """After RECEIVE_TIMEOUT_SECONDS, in the caller's dialect; the time for the work does not count."""
    settings = {"receive_timeout_seconds": 0.2, "max_request_seconds": 0}
    async with run_application(tmp_path, **settings) as running:
        for path, key in ((EMBED, "text"), (OPENAI, "input")):
            content = send_slowly(asyncio.Event(), b'{"%s": "half' % key.encode(), b"")
            reply = await asyncio.wait_for(running.client.post(path, content=content, headers=JSON), timeout=5)
            body = reply.json()
            assert reply.status_code == 408, reply.text
            assert (body.get("error") or body)["code"] == "receive_timeout"


async def test_caller_who_leaves_is_not_taken_for_a_timeout(running: RunningApplication) -> None:
    """A cancellation that the clock did not cause goes its way."""
    running.backend.gate.clear()
    request = asyncio.create_task(running.client.post(EMBED, json={"text": "never mind"}))
    await asyncio.sleep(0.05)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


@pytest.mark.parametrize("unit", ["[]", "{}", "1", '"a"', "[[]]", '{"a":[1,2]}'])
async def test_json_of_too_many_values_is_refused_before_it_is_parsed(unit: str, running: RunningApplication) -> None:
    """A few megabytes of it would take gigabytes and the event loop's time; a document of as many commas does not."""
    body = f'{{"input": [{",".join([unit] * 600_000)}]}}'
    started = time.process_time()
    for path in (OPENAI, EMBED):
        reply = await running.client.post(path, content=body.encode(), headers=JSON)
        answer = reply.json()
        assert (reply.status_code, (answer.get("error") or answer)["code"]) == (413, "request_too_large")
        assert "MAX_JSON_VALUES_PER_REQUEST" in reply.text
    assert time.process_time() - started < 5
    document = await running.client.post(
        "/get_all_embedding_vectors_for_document/", files={"file": ("list.txt", b"A list of commas: " + b"," * 600_000)}
    )
    assert document.status_code != 413


async def test_answer_to_many_mistakes_is_short(running: RunningApplication) -> None:
    """The first ones are named, the others counted; of a field of several types, the first alone is."""
    one = await running.client.post(OPENAI, json={"input": [{}] * 5000})
    many = await running.client.post("/compute_similarity_matrix/", json={"strings": [{}] * 5000})
    for reply in (one, many):
        assert reply.status_code == 422
        assert len(reply.content) < 2000
    assert "problems more" in many.text


async def test_json_of_very_deep_lists_is_the_caller_s_mistake(running: RunningApplication) -> None:
    """Deeper than any parser goes, within the bound on values."""
    content = b'{"input": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    reply = await running.client.post(OPENAI, content=content, headers=JSON)
    assert 400 <= reply.status_code < 500, reply.text


# Headers


async def test_every_reply_has_the_headers_for_safety(tmp_path: Path) -> None:
    """Answers, errors, refusals and pages; no server's name or version."""
    async with run_application(tmp_path, security_token=TOKEN) as running:
        with_token = {"authorization": f"Bearer {TOKEN}"}
        for path, headers, status in (
            ("/get_all_stored_strings/", with_token, 200),
            ("/get_all_stored_strings/", {}, 401),
            ("/no/such/path", with_token, 404),
            ("/health", {}, 200),
            ("/", {}, 200),
            ("/static/swagger.js", {}, 200),
        ):
            reply = await running.client.get(path, headers=headers)
            assert reply.status_code == status
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["x-frame-options"] == "DENY"
            assert reply.headers["referrer-policy"] == "no-referrer"
            policy = reply.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in policy
            assert ("script-src 'self'" in policy) is (status == 200 and path in ("/", "/static/swagger.js"))
            assert "unsafe-eval" not in policy
            assert "server" not in reply.headers
            assert len(reply.headers.get_list("x-request-id")) == 1
        assert (await running.client.get("/v1/models", headers=with_token)).headers["cache-control"] == "no-store"


async def test_token_in_the_address_is_on_no_error_page(tmp_path: Path) -> None:
    """Whatever goes wrong."""
    async with run_application(tmp_path, security_token=TOKEN) as running:
        replies = [
            await running.client.get("/no/such/path", params={"token": TOKEN}),
            await running.client.get(EMBED, params={"token": TOKEN}),
            await running.client.post(EMBED, params={"token": TOKEN}, content=b"{"),
            await running.client.post(EMBED, params={"token": TOKEN + "x"}, content=b"{"),
            await running.client.get("/get_all_stored_strings/", params={"token": TOKEN, "limit": "0"}),
        ]
        running.backend.fail_when_more_than = 0
        replies.append(await running.client.post(EMBED, params={"token": TOKEN}, json={"text": "fails"}))
        assert [reply.status_code for reply in replies] == [404, 405, 422, 401, 422, 500]
        assert not [reply.text for reply in replies if TOKEN in reply.text or "token=" in reply.text]
