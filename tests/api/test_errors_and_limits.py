"""What goes wrong, and how it is said: status, code, place and shape of every error, and the bounds on input."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application, wait_until

EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SIMILARITY = "/compute_similarity_between_strings/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
STRINGS = "/get_all_stored_strings/"
JSON = {"content-type": "application/json"}
# Endpoints that embed one text: path and the field that holds it.
TEXT_FIELDS = [
    (EMBED, "text"),
    ("/get_embedding_vector/", "text"),
    (TOKENS, "text"),
    (SEARCH, "query_text"),
]
WINDOW = 32
ROOM = 30  # the fake model has two special tokens and one token for each byte


def check_error(
    response: httpx.Response, status: int, code: str, *, field: str | None = None, index: int | None = None
) -> str:
    """Every error has one shape; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["detail", "code", "field", "index", "request_id"]
    assert (body["code"], body["field"], body["index"]) == (code, field, index)
    assert body["request_id"] == response.headers["x-request-id"]
    assert isinstance(body["detail"], str)
    assert body["detail"]
    return str(body["detail"])


async def embed(client: httpx.AsyncClient, text: str, **fields: Any) -> httpx.Response:
    return await client.post(EMBED, json={"text": text, **fields})


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """The application with a window of 32 tokens."""
    async with run_application(tmp_path, llm_context_size_in_tokens=WINDOW) as application:
        yield application


# Texts that are none


@pytest.mark.parametrize(("path", "field"), TEXT_FIELDS)
@pytest.mark.parametrize("text", ["", " ", "\t\n\u3000"])
async def test_text_without_a_word_is_refused(path: str, field: str, text: str, running: RunningApplication) -> None:
    """Empty and blank texts are the caller's mistake, and nothing is stored."""
    response = await running.client.post(path, json={field: text})
    assert "empty" in check_error(response, 400, "invalid_request_error", field=field if path == SEARCH else "text")
    assert (await running.client.get(STRINGS)).json() == {"strings": []}


@pytest.mark.parametrize(("path", "field"), TEXT_FIELDS)
async def test_text_that_no_unicode_text_can_be_is_refused(path: str, field: str, running: RunningApplication) -> None:
    """Half of a surrogate pair and NUL, escaped in otherwise valid JSON."""
    half = await running.client.post(path, content=b'{"%s": "ab\\ud800"}' % field.encode(), headers=JSON)
    assert "character 2" in check_error(half, 400, "invalid_request_error", field=field)
    nul = await running.client.post(path, content=b'{"%s": "ab\\u0000c"}' % field.encode(), headers=JSON)
    assert "NUL" in check_error(nul, 400, "invalid_request_error", field=field)


@pytest.mark.parametrize(("text1", "text2", "field"), [("", "good", "text1"), ("good", "\n", "text2")])
async def test_bad_text_of_a_pair_is_located(text1: str, text2: str, field: str, running: RunningApplication) -> None:
    """The place tells which of the two it was."""
    response = await running.client.post(SIMILARITY, json={"text1": text1, "text2": text2})
    check_error(response, 400, "invalid_request_error", field=field)


async def test_text_of_too_many_characters_is_refused_by_the_setting_s_name(tmp_path: Path) -> None:
    """The bound itself is still taken."""
    async with run_application(tmp_path, max_text_length_in_characters=20) as running:
        assert (await embed(running.client, "x" * 20)).status_code == 200
        detail = check_error(await embed(running.client, "x" * 21), 413, "request_too_large", field="text")
        assert "MAX_TEXT_LENGTH_IN_CHARACTERS" in detail
        assert "21" in detail


# Models and measures


@pytest.mark.parametrize("path", [EMBED, TOKENS])
async def test_unknown_model_is_a_404_that_lists_the_known(path: str, running: RunningApplication) -> None:
    """Names match exactly: another case or the file's name is another name."""
    for name in ("no-such-model", FAKE_MODEL_NAME.upper(), f"{FAKE_MODEL_NAME}.gguf", "../models/fake-model", ""):
        response = await running.client.post(path, json={"text": "hello", "model_name": name})
        detail = check_error(response, 404, "model_not_found", field="model_name")
        assert repr(name) in detail
        assert f"Known models: {FAKE_MODEL_NAME}." in detail


async def test_unknown_model_of_a_document_is_a_404(running: RunningApplication) -> None:
    """The query parameter is checked like the field of a body."""
    files = {"file": ("a.txt", b"Some sentence of a document.")}
    response = await running.client.post(DOCUMENT, files=files, params={"model_name": "no-such-model"})
    check_error(response, 404, "model_not_found", field="model_name")


async def test_damaged_model_file_fails_its_own_requests_only(running: RunningApplication) -> None:
    """The message names the model; the default model goes on answering."""
    (running.models_directory / "damaged.gguf").write_bytes(b"GGUF" + bytes(100))
    response = await embed(running.client, "hello", model_name="damaged")
    check_error(response, 500, "model_unusable")
    assert (await embed(running.client, "hello")).status_code == 200


async def test_unknown_measure_is_refused_before_anything_is_computed(running: RunningApplication) -> None:
    """The message lists the known ones."""
    n_passes = len(running.backend.passes)
    response = await running.client.post(
        SIMILARITY, json={"text1": "a", "text2": "b", "similarity_measure": "telepathy"}
    )
    detail = check_error(response, 400, "invalid_request_error", field="similarity_measure")
    assert "telepathy" in detail
    assert "hoeffdings_d" in detail
    assert len(running.backend.passes) == n_passes


# Longer than the window


@pytest.mark.parametrize(("path", "field"), TEXT_FIELDS)
async def test_text_beyond_the_window_is_refused_with_its_length(
    path: str, field: str, narrow: RunningApplication
) -> None:
    """Nothing is cut silently: the message names limit and length; a text that just fits is taken."""
    response = await narrow.client.post(path, json={field: "x" * (ROOM + 1)})
    detail = check_error(response, 400, "context_length_exceeded", field=field)
    assert str(WINDOW) in detail
    assert str(WINDOW + 1) in detail
    assert (await narrow.client.post(path, json={field: "x" * ROOM})).status_code == 200


LONG = "abcdefghijklmnopqrstuvwxyz" * 2
KEPT = {"right": LONG[:ROOM], "left": LONG[-ROOM:]}


@pytest.mark.parametrize("truncation", ["right", "left"])
async def test_cut_text_has_the_vector_of_what_was_kept(truncation: str, narrow: RunningApplication) -> None:
    """The headers say how many tokens were used and dropped; the cut text is not taken for the whole one."""
    cut = await embed(narrow.client, LONG, truncation=truncation)
    assert cut.status_code == 200
    assert cut.headers["x-tokens-used"] == str(WINDOW)
    assert cut.headers["x-tokens-dropped"] == str(len(LONG) - ROOM)
    kept = await embed(narrow.client, KEPT[truncation])
    assert kept.headers["x-embedding-source"] == "computed"
    np.testing.assert_allclose(cut.json()["embedding"], kept.json()["embedding"], atol=1e-6)
    again = await embed(narrow.client, LONG, truncation=truncation)
    assert again.headers["x-embedding-source"] == "store"
    assert again.headers["x-tokens-dropped"] == str(len(LONG) - ROOM)
    assert again.json() == cut.json()
    check_error(await embed(narrow.client, LONG), 400, "context_length_exceeded", field="text")


async def test_split_text_has_the_token_weighted_mean_of_its_parts(narrow: RunningApplication) -> None:
    """Every token is used, none dropped."""
    response = await embed(narrow.client, LONG, truncation="split")
    assert response.headers["x-tokens-used"] == str(len(LONG) + 4)
    assert response.headers["x-tokens-dropped"] == "0"
    rows = [await token_rows(narrow.client, part) for part in (LONG[:ROOM], LONG[ROOM:])]
    mean = np.concatenate(rows).mean(axis=0)
    np.testing.assert_allclose(response.json()["embedding"], mean / np.linalg.norm(mean), atol=1e-6)


async def token_rows(client: httpx.AsyncClient, text: str, **fields: str) -> np.ndarray:
    query = {"send_back_json_or_zip_file": "json"}
    response = await client.post(TOKENS, json={"text": text, **fields}, params=query)
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["token_level_embedding_bundle"]])


async def test_token_rows_of_a_cut_text_are_those_of_what_was_kept(narrow: RunningApplication) -> None:
    """The closing special token stays; the headers count what was dropped."""
    np.testing.assert_allclose(
        await token_rows(narrow.client, LONG, truncation="right"), await token_rows(narrow.client, KEPT["right"])
    )
    response = await narrow.client.post(TOKENS, json={"text": LONG, "truncation": "left"})
    assert (response.headers["x-tokens-used"], response.headers["x-tokens-dropped"]) == ("32", "22")


async def test_setting_decides_where_the_request_does_not(tmp_path: Path) -> None:
    """TRUNCATION=left for requests that name nothing; a request may still refuse."""
    async with run_application(tmp_path, llm_context_size_in_tokens=WINDOW, truncation="left") as running:
        response = await embed(running.client, LONG)
        assert response.headers["x-tokens-dropped"] == "22"
        refused = await embed(running.client, LONG, truncation="refuse")
        check_error(refused, 400, "context_length_exceeded", field="text")


# Requests that are malformed


@pytest.mark.parametrize("content", [b"", b"{", b'{"text": nope}', b"[1,2]", b'"text"', b"\xff\xfe", b"null"])
async def test_malformed_json_is_refused(content: bytes, running: RunningApplication) -> None:
    """Whatever comes in is answered in the one shape."""
    response = await running.client.post(EMBED, content=content, headers=JSON)
    assert response.status_code in (400, 422)
    check_error(response, response.status_code, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (EMBED, {}, "text"),
        (EMBED, {"text": 5}, "text"),
        (EMBED, {"text": None}, "text"),
        (EMBED, {"text": ["a"]}, "text"),
        (EMBED, {"text": "a", "model_name": 5}, "model_name"),
        (EMBED, {"text": "a", "truncation": "middle"}, "truncation"),
        (SIMILARITY, {"text1": "a"}, "text2"),
        (SEARCH, {"text": "a"}, "query_text"),
        (
            SEARCH,
            {"query_text": "a", "number_of_most_similar_strings_to_return": 0},
            "number_of_most_similar_strings_to_return",
        ),
        (
            SEARCH,
            {"query_text": "a", "number_of_most_similar_strings_to_return": "many"},
            "number_of_most_similar_strings_to_return",
        ),
    ],
)
async def test_missing_or_mistyped_field_is_named(
    path: str, body: dict[str, Any], field: str, running: RunningApplication
) -> None:
    """A 422 whose message and place name the field; the caller's value is not repeated."""
    response = await running.client.post(path, json=body)
    assert field in check_error(response, 422, "invalid_request_error", field=field)


@pytest.mark.parametrize(
    ("method", "path", "query", "field"),
    [
        ("POST", TOKENS, {"json_format": "diagonal"}, "json_format"),
        ("POST", TOKENS, {"send_back_json_or_zip_file": "tar"}, "send_back_json_or_zip_file"),
        ("POST", TOKENS, {"client_ip": "1" * 65}, "client_ip"),
        ("GET", STRINGS, {"limit": "0"}, "limit"),
        ("GET", STRINGS, {"limit": "ten"}, "limit"),
        ("GET", STRINGS, {"offset": "-1"}, "offset"),
        ("GET", STRINGS, {"limit": "99999999999999999999"}, "limit"),
        ("GET", STRINGS, {"offset": "99999999999999999999"}, "offset"),
        ("GET", "/get_all_stored_documents/", {"limit": "99999999999999999999"}, "limit"),
    ],
)
async def test_bad_query_parameter_is_named(
    method: str, path: str, query: dict[str, str], field: str, running: RunningApplication
) -> None:
    """Unknown orientations and replies, and numbers that no list can have."""
    body = {"text": "a"} if method == "POST" else None
    response = await running.client.request(method, path, json=body, params=query)
    assert field in check_error(response, 422, "invalid_request_error", field=field)


async def test_unknown_path_and_wrong_method_are_answered_in_the_same_shape(running: RunningApplication) -> None:
    """404 and 405, the latter with the allowed method."""
    check_error(await running.client.get("/no/such/path"), 404, "not_found")
    wrong_method = await running.client.get(EMBED)
    check_error(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    check_error(await running.client.get("/static/no-such-file.js"), 404, "not_found")


async def test_request_id_of_the_caller_is_kept_if_it_is_a_plain_one(running: RunningApplication) -> None:
    """Others are replaced, so that nobody writes into headers and logs through it."""
    plain = await running.client.get("/no/such/path", headers={"x-request-id": "caller-1234.a:b"})
    assert plain.json()["request_id"] == plain.headers["x-request-id"] == "caller-1234.a:b"
    odd = await running.client.get("/no/such/path", headers={"x-request-id": "a b\tc"})
    assert re.fullmatch("[0-9a-f]{16}", odd.headers["x-request-id"])


# Documents


async def test_documents_that_cannot_be_read_are_refused_by_reason(running: RunningApplication) -> None:
    """Another type 415, damaged 422, no sentence long enough 422 with the setting's name, no file 422."""
    cases = [
        (b"\x89PNG\r\n\x1a\n" + bytes(64), 415, "unsupported_document_type"),
        (b"PK\x03\x04" + bytes(64), 415, "unsupported_document_type"),
        (b"%PDF-1.7\nnothing of a PDF follows", 422, "unreadable_document"),
        (b"Too short.", 422, "unreadable_document"),
    ]
    for data, status, code in cases:
        response = await running.client.post(DOCUMENT, files={"file": ("anything", data)})
        detail = check_error(response, status, code, field="file")
    assert "MINIMUM_STRING_LENGTH_FOR_DOCUMENT_EMBEDDING" in detail
    without_file = await running.client.post(DOCUMENT, files={"document": ("a.txt", b"A whole sentence, misnamed.")})
    assert "file" in check_error(without_file, 422, "invalid_request_error", field="file")
    assert (await running.client.get("/get_all_stored_documents/")).json() == {"documents": []}


# Bodies beyond the bound


async def test_body_beyond_the_bound_is_refused_announced_or_not(tmp_path: Path) -> None:
    """By its content-length, while it comes in chunks, and as a document; a body just within is taken."""
    async with run_application(tmp_path, max_request_size_in_mb=0.01) as running:
        small = await embed(running.client, "y" * 200)
        assert small.status_code == 200
        announced = await embed(running.client, "x" * 20_000)
        assert "MAX_REQUEST_SIZE_IN_MB" in check_error(announced, 413, "request_too_large")
        chunked = await running.client.post(EMBED, content=send_in_chunks(), headers=JSON)
        assert "MAX_REQUEST_SIZE_IN_MB" in check_error(chunked, 413, "request_too_large")
        document = await running.client.post(DOCUMENT, files={"file": ("a.txt", b"Long. " * 5_000)})
        assert "MAX_REQUEST_SIZE_IN_MB" in check_error(document, 413, "request_too_large")


async def send_in_chunks() -> AsyncIterator[bytes]:
    yield b'{"text": "'
    for _ in range(100):
        yield b"x" * 200
    yield b'"}'


# The engine's failures


async def test_failing_text_is_a_500_and_the_next_one_is_answered(running: RunningApplication) -> None:
    """The failure is not stored: asked again when the engine has recovered, the text is computed."""
    running.backend.failing_token = ord("#")
    check_error(await embed(running.client, "a # fails"), 500, "inference_failed", field="text")
    assert (await embed(running.client, "others do not")).status_code == 200
    running.backend.failing_token = None
    assert (await embed(running.client, "a # fails")).headers["x-embedding-source"] == "computed"


async def test_failing_text_does_not_fail_those_computed_with_it(running: RunningApplication) -> None:
    """Ten concurrent callers, one of them with the bad text: nine answers and one error."""
    running.backend.failing_token = ord("#")
    running.backend.gate.clear()
    texts = [f"text number {number}" for number in range(9)] + ["# the bad one"]
    requests = [asyncio.create_task(embed(running.client, text)) for text in texts]
    await asyncio.sleep(0.05)
    running.backend.gate.set()
    replies = await asyncio.gather(*requests)
    assert [reply.status_code for reply in replies] == [200] * 9 + [500]


async def test_readiness_says_so_when_the_engine_fails_and_when_it_is_too_slow(tmp_path: Path) -> None:
    """The store's answers do not hide it."""
    async with run_application(tmp_path, ready_timeout_seconds=0.1) as running:
        assert (await running.client.get("/ready")).status_code == 200
        running.backend.gate.clear()
        response = await running.client.get("/ready")
        running.backend.gate.set()
        assert "0.1 s" in check_error(response, response.status_code, "inference_failed")
        assert response.status_code >= 500


# Too much at a time


async def test_full_queue_answers_at_once_with_the_time_to_wait(tmp_path: Path) -> None:
    """429 with Retry-After for what comes on top; what waited is answered, and later requests are taken again."""
    async with run_application(tmp_path, max_queued_tokens=100, inference_workers=1) as running:
        batcher = running.app.state.services.models.engines()[0].batcher
        running.backend.gate.clear()
        n_texts_before = batcher.counters.n_texts
        waiting = [asyncio.create_task(embed(running.client, "held in the engine"))]
        # The worker counts a pass as under way once it has taken its texts out of the queue.
        await wait_until(lambda: batcher._queue.n_busy_workers == 1)
        waiting += [asyncio.create_task(embed(running.client, f"{number} " + "x" * 40)) for number in range(3)]
        await wait_until(lambda: batcher.n_queued_tokens >= 100)
        overload = await asyncio.wait_for(embed(running.client, "one too many"), timeout=5)
        assert "waiting" in check_error(overload, 429, "overloaded")
        assert 1 <= int(overload.headers["retry-after"]) <= 120
        running.backend.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*waiting)] == [200] * 4
        assert (await embed(running.client, "one too many")).status_code == 200
        await wait_until(lambda: batcher.counters.n_texts == n_texts_before + 5)


async def test_identical_texts_of_many_callers_are_computed_once(running: RunningApplication) -> None:
    """100 concurrent requests for one new text: one sequence goes to the engine, one row is stored."""
    n_passes = len(running.backend.passes)
    running.backend.gate.clear()
    requests = [asyncio.create_task(embed(running.client, "asked for by everybody")) for _ in range(100)]
    await asyncio.sleep(0.1)
    running.backend.gate.set()
    replies = await asyncio.gather(*requests)
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.content for reply in replies}) == 1
    assert running.backend.passes[n_passes:] == [[len("asked for by everybody") + 2]]
    assert (await running.client.get(STRINGS)).json() == {"strings": ["asked for by everybody"]}


async def test_callers_who_leave_do_not_disturb_those_who_stay(running: RunningApplication) -> None:
    """Of three callers of one text two give up while it is computed; the third gets its answer."""
    running.backend.gate.clear()
    requests = [asyncio.create_task(embed(running.client, "wait for it")) for _ in range(3)]
    await wait_until(lambda: running.app.state.services.models.engines()[0].batcher.n_queued_texts == 0)
    await asyncio.sleep(0.05)
    for request in requests[:2]:
        request.cancel()
    running.backend.gate.set()
    assert (await requests[2]).status_code == 200
