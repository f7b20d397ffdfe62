"""Every dialect's routes: shapes of replies and of errors, roles, truncation, encodings; one store behind them all."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from llama_embeddings.api.dialects import DIALECT_OF_PATH
from llama_embeddings.inference.fake_backend import CLOSING_TOKEN, N_VOCABULARY, OPENING_TOKEN
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application, wait_until
from tests.tiny_models import write_tiny_model

TOKEN = "a-token-for-tests-only-1234"
NATIVE = "/get_embedding_vector_for_string/"
WINDOW = 32
LONG = "abcdefghijklmnopqrstuvwxyz" * 2
ROOM = WINDOW - 2
PROMPTED_MODEL = "nomic-embed-text-v1.5"
RERANKER = "bge-reranker-v2-m3"
TEXT = "Käse schmeckt"


async def get_native_vector(client: httpx.AsyncClient, text: str, **fields: Any) -> np.ndarray:
    response = await client.post(NATIVE, json={"text": text, **fields})
    assert response.status_code == 200, response.text
    return np.array(response.json()["embedding"], dtype=np.float32)


async def post(client: httpx.AsyncClient, path: str, body: Any, status: int = 200) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """The application with a window of 32 tokens."""
    async with run_application(tmp_path, llm_context_size_in_tokens=WINDOW) as application:
        yield application


@pytest.fixture
async def prompted(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """A default model that wants words of its own in front of queries and documents."""
    (tmp_path / "models").mkdir()
    write_tiny_model(tmp_path / "models" / f"{PROMPTED_MODEL}.gguf", name=PROMPTED_MODEL)
    async with run_application(tmp_path, default_model_name=PROMPTED_MODEL) as application:
        yield application


@pytest.fixture
async def ranking(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """The application with a reranker beside the default model."""
    async with run_application(tmp_path, llm_context_size_in_tokens=WINDOW) as application:
        application.add_model(RERANKER)
        yield application


# One text, one vector, whatever the dialect

# Path, body for a text, and how the vector is found in the reply.
EMBEDDING_ROUTES: dict[str, tuple[str, Any, Any]] = {
    "OpenAI": ("/v1/embeddings", lambda text: {"input": text}, lambda reply: reply["data"][0]["embedding"]),
    "OpenAI list": ("/v1/embeddings", lambda text: {"input": [text]}, lambda reply: reply["data"][0]["embedding"]),
    "TEI": ("/embed", lambda text: {"inputs": text}, lambda reply: reply[0]),
    "TEI root": ("/", lambda text: {"inputs": [text]}, lambda reply: reply[0]),
    "Ollama": (
        "/api/embed",
        lambda text: {"model": FAKE_MODEL_NAME, "input": text},
        lambda reply: reply["embeddings"][0],
    ),
    "Ollama older": (
        "/api/embeddings",
        lambda text: {"model": f"{FAKE_MODEL_NAME}:latest", "prompt": text},
        lambda reply: reply["embedding"],
    ),
    "Cohere": ("/v2/embed", lambda text: {"texts": [text]}, lambda reply: reply["embeddings"]["float"][0]),
    "llama.cpp": ("/embedding", lambda text: {"content": text}, lambda reply: reply[0]["embedding"][0]),
    "small, bare": ("/embeddings", lambda text: {"input": text}, lambda reply: reply),
    "small": (
        "/embeddings",
        lambda text: {"input": [text], "model": FAKE_MODEL_NAME},
        lambda reply: reply["data"][0]["embedding"],
    ),
}


async def test_every_dialect_answers_with_the_same_stored_vector(running: RunningApplication) -> None:
    """Computed once, found again; the headers say so, in every dialect."""
    expected = await get_native_vector(running.client, TEXT)
    for name, (path, make_body, read) in EMBEDDING_ROUTES.items():
        response = await running.client.post(path, json=make_body(TEXT))
        assert response.status_code == 200, (name, response.text)
        np.testing.assert_array_equal(np.array(read(response.json()), dtype=np.float32), expected, name)
        assert response.headers["x-cache-hits"] == "1", name
        assert response.headers["x-embedding-source"] in ("memory", "store")
        assert response.headers["x-tokens-used"] == str(len(TEXT.encode()) + 2)
        assert {"x-queue-seconds", "x-compute-seconds", "x-request-id"} <= set(response.headers)


async def test_replies_by_tokens_say_what_they_took(tmp_path: Path) -> None:
    """As those of texts do: every token's vectors, vectors before scaling, and reranking by them."""
    requests: list[tuple[str, Any, str]] = [
        ("/embed_all", {"inputs": TEXT}, "0"),
        ("/embed", {"inputs": TEXT, "normalize": False}, "1"),
        ("/v1/rerank", {"query": TEXT, "documents": [TEXT, "snow"], "model": FAKE_MODEL_NAME}, "2"),
    ]
    async with run_application(tmp_path, rerank_method="maxsim") as running:
        for path, body, n_hits in requests:
            response = await running.client.post(path, json=body)
            assert response.status_code == 200, response.text
            assert response.headers["x-cache-hits"] == n_hits, path
            assert int(response.headers["x-tokens-used"]) >= len(TEXT.encode()) + 2
            assert (float(response.headers["x-compute-seconds"]) > 0) == (path != "/embed"), path
            assert "x-queue-seconds" in response.headers


async def test_text_without_a_word_is_a_400_in_every_dialect(running: RunningApplication) -> None:
    """Never a 5xx, which clients would retry."""
    for path, make_body, _ in EMBEDDING_ROUTES.values():
        assert "empty" in json.dumps(await post(running.client, path, make_body("  "), 400))


# Errors in the caller's shape


def read_message(path: str, body: Any) -> str:
    """The message of an error by the dialect of the path, whose exact keys are checked."""
    dialect = "TEI" if path == "/" else DIALECT_OF_PATH[path].name if path in DIALECT_OF_PATH else path.split("/")[1]
    if dialect == "v1":
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"]
        return str(body["error"]["message"])
    if dialect in ("v2", "Cohere"):
        assert list(body) == ["message", "code", "param"]
        return str(body["message"])
    if dialect == "TEI":
        assert list(body) == ["error", "error_type"]
        return str(body["error"])
    if dialect == "Rerank":
        assert list(body) == ["error", "error_type", "message", "detail", "code"]
        return str(body["message"])
    if dialect == "api":
        assert list(body) == ["error"]
        return str(body["error"])
    if dialect == "llama.cpp":
        assert list(body["error"]) == ["code", "message", "type"]
        return str(body["error"]["message"])
    assert dialect == "Small services"
    assert list(body) == ["detail"]
    return str(body["detail"])


POST_ROUTES = [
    "/v1/embeddings",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v2/embed",
    "/v1/tokenize",
    "/",
    "/embed",
    "/embed_all",
    "/similarity",
    "/tokenize",
    "/decode",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
    "/embedding",
    "/detokenize",
    "/embeddings",
]


async def test_refusals_before_and_after_the_body_is_read_have_the_dialect_s_shape(tmp_path: Path) -> None:
    """401, 413, 422 for JSON that is none and 422 for fields that are missing or mistyped."""
    async with run_application(tmp_path, security_token=TOKEN, max_request_size_in_mb=0.001) as running:
        for path in POST_ROUTES:
            await check_refusals(running.client, path)


async def check_refusals(client: httpx.AsyncClient, path: str) -> None:
    refused = await client.post(path, json={})
    assert refused.status_code == 401, path
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "token" in read_message(path, refused.json())
    headers = {"Authorization": f"Bearer {TOKEN}"}
    large = await client.post(path, json={"input": "x" * 2000}, headers=headers)
    assert large.status_code == 413, path
    assert "MAX_REQUEST_SIZE_IN_MB" in read_message(path, large.json())
    broken = await client.post(path, content=b"{", headers=headers | {"Content-Type": "application/json"})
    assert broken.status_code == 422, path
    assert "JSON" in read_message(path, broken.json())
    wrong = dict.fromkeys(("input", "inputs", "query", "prompt", "texts", "tokens", "text", "ids"), 1.5)
    for body in ({}, [], wrong | {"model": 5}):
        mistyped = await client.post(path, json=body, headers=headers)
        # Two of the routes ask for nothing that must be there by its name.
        expected = {"/api/show": 404, "/v2/embed": 400}.get(path, 422) if body == {} else 422
        assert mistyped.status_code == expected, (path, body, mistyped.text)
        message = read_message(path, mistyped.json())
        assert message
        assert "Request" not in message  # no name of a class here
        assert mistyped.headers["x-request-id"]


UNKNOWN = {
    "/v1/embeddings": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v2/embed": {"texts": ["a"]},
    "/v1/tokenize": {"text": "a"},
    "/api/embed": {"input": "a"},
    "/api/embeddings": {"prompt": "a"},
    "/api/show": {},
    "/embedding": {"content": "a"},
    "/detokenize": {"tokens": [97]},
    "/embeddings": {"input": "a"},
}


async def test_unknown_model_is_named_in_the_dialect_s_shape(running: RunningApplication) -> None:
    """404; 422 where clients look for the model among the faults of the body."""
    for path, fields in UNKNOWN.items():
        status = 422 if path == "/embeddings" else 404
        message = read_message(path, await post(running.client, path, fields | {"model": "no-such"}, status))
        assert "no-such" in message, path
        assert FAKE_MODEL_NAME in message, path


async def test_unknown_model_of_a_small_service_has_its_place(running: RunningApplication) -> None:
    """FastAPI's list, `loc` at the model."""
    body = await post(running.client, "/embeddings", {"input": "a", "model": "x"}, 422)
    [problem] = body["detail"]
    assert problem["loc"] == ["body", "model"]
    assert "'x' is not available" in problem["msg"]


async def test_full_queue_is_a_429_with_the_time_to_wait_in_every_dialect(tmp_path: Path) -> None:
    """In its own shape."""
    async with run_application(tmp_path, max_queued_tokens=100, inference_workers=1) as running:
        batcher = running.app.state.services.models.engines()[0].batcher
        running.backend.gate.clear()
        waiting = [asyncio.create_task(post(running.client, NATIVE, {"text": "held in the engine"}))]
        await wait_until(lambda: batcher._queue.n_busy_workers == 1)
        texts = [f"{number} " + "x" * 40 for number in range(3)]
        waiting += [asyncio.create_task(post(running.client, NATIVE, {"text": text})) for text in texts]
        await wait_until(lambda: batcher.n_queued_tokens >= 100)
        for path, make_body, _ in EMBEDDING_ROUTES.values():
            response = await running.client.post(path, json=make_body("one more"))
            assert response.status_code == 429, path
            assert int(response.headers["retry-after"]) >= 1
            assert "waiting" in read_message(path, response.json())
        running.backend.gate.set()
        await asyncio.gather(*waiting)


async def test_unexpected_failure_is_a_500_with_its_request_id_in_every_dialect(running: RunningApplication) -> None:
    """Its reason goes to the log, not to the caller."""
    running.app.state.services.embeddings.get_or_compute = fail_with_a_secret
    for path, make_body, _ in EMBEDDING_ROUTES.values():
        response = await running.client.post(path, json=make_body(TEXT), headers={"x-request-id": "mine"})
        assert response.status_code == 500, path
        assert response.headers["x-request-id"] == "mine"
        assert "log" in read_message(path, response.json())
        assert "secret" not in response.text


async def fail_with_a_secret(*_: Any, **__: Any) -> None:
    raise RuntimeError("a secret")


@pytest.mark.parametrize(
    ("given", "place", "message"),
    [
        (["a", 5], "input[1]", "input[1]: Input should be a valid string"),
        (5, "input", "input: Input should be a valid string or a valid list"),
        ([[1, "x"]], "input[0]", "input[0][1]: Input should be a valid integer"),
        ([1, -1], "input[1]", "input[1]: Input should be greater than or equal to 0"),
        (None, "input", "input: Input should be a valid string or a valid list"),
    ],
)
async def test_field_of_several_types_gets_one_readable_complaint(
    given: Any, place: str, message: str, running: RunningApplication
) -> None:
    """That of the type which came furthest, not one per type."""
    body = await post(running.client, "/v1/embeddings", {"input": given}, 422)
    assert (body["error"]["param"], body["error"]["message"]) == (place, message)


# OpenAI


async def test_base64_is_the_float32_buffer(running: RunningApplication) -> None:
    """Little-endian; usage counts all tokens."""
    reply = await post(running.client, "/v1/embeddings", {"input": ["a", "bc"], "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(reply["data"][1]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, await get_native_vector(running.client, "bc"))
    assert reply["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [row["index"] for row in reply["data"]] == [0, 1]
    assert reply["model"] == FAKE_MODEL_NAME


async def test_fewer_dimensions_have_unit_length(running: RunningApplication) -> None:
    """The first ones, scaled; more than there are is refused."""
    whole = await get_native_vector(running.client, "a")
    reply = await post(running.client, "/v1/embeddings", {"input": "a", "dimensions": 4})
    expected = whole[:4] / np.linalg.norm(whole[:4])
    np.testing.assert_allclose(reply["data"][0]["embedding"], expected, rtol=1e-6)
    refused = await post(running.client, "/v1/embeddings", {"input": "a", "dimensions": 17}, 400)
    assert refused["error"]["param"] == "dimensions"


async def test_2048_inputs_are_taken_and_none_is_refused(running: RunningApplication) -> None:
    """One more than MAX_TEXTS_PER_REQUEST is too large."""
    texts = [f"{number}" for number in range(2048)]
    reply = await post(running.client, "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    assert len(reply["data"]) == 2048
    await post(running.client, "/v1/embeddings", {"input": [*texts, "more"]}, 413)
    for empty in ([], [[]], [""]):
        await post(running.client, "/v1/embeddings", {"input": empty}, 400)


async def test_models_answer_to_their_aliases(tmp_path: Path) -> None:
    """In the list, one by one, and in requests; an alias of nothing is not listed."""
    aliases = f"text-embedding-3-small={FAKE_MODEL_NAME},all-minilm={FAKE_MODEL_NAME},gone=absent"
    async with run_application(tmp_path, model_aliases=aliases) as running:
        listed = (await running.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [FAKE_MODEL_NAME, "all-minilm", "text-embedding-3-small"]
        one = await running.client.get("/v1/models/text-embedding-3-small")
        assert one.json()["object"] == "model"
        assert (await running.client.get("/v1/models/absent")).status_code == 404
        reply = await post(running.client, "/v1/embeddings", {"input": "a", "model": "text-embedding-3-small"})
        assert reply["model"] == "text-embedding-3-small"
        await post(running.client, "/api/embed", {"input": "a", "model": "all-minilm:latest"})


# Token ids

OWN = [OPENING_TOKEN, *b"hello", CLOSING_TOKEN]


@pytest.mark.parametrize(
    ("path", "make_body"),
    [
        ("/v1/embeddings", lambda ids: {"input": ids}),
        ("/embed", lambda ids: {"inputs": ids}),
        ("/embedding", lambda ids: {"content": ids}),
    ],
)
async def test_token_ids_are_taken_only_where_they_are_the_model_s_own(
    path: str, make_body: Any, running: RunningApplication
) -> None:
    """Between its special tokens, in its vocabulary, and the tokens of the text they stand for."""
    for given in (OWN, [OWN], [OWN, OWN]):
        response = await running.client.post(path, json=make_body(given))
        assert response.status_code == 200, response.text
    strings = (await running.client.get("/get_all_stored_strings/")).json()["strings"]
    assert strings == ["hello"]
    for strange in ([104, 105], [OPENING_TOKEN, 0xFF, CLOSING_TOKEN], [N_VOCABULARY], [100_000, 5], [*OWN, 97]):
        body = await post(running.client, path, make_body([strange]), 400)
        assert "check_embedding_ctx_length=False" in read_message(path, body)


async def test_token_ids_of_cl100k_base_are_read_where_its_table_is_there(tmp_path: Path) -> None:
    """As text, by the bytes of the table; ids that it does not have are refused."""
    pieces = {0: b"K", 1: "ä".encode(), 2: b"se", 3: "ä".encode()[:1]}
    table = tmp_path / "cl100k_base.tiktoken"
    table.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in pieces.items()))
    async with run_application(tmp_path, cl100k_table_path=str(table)) as running:
        reply = await post(running.client, "/v1/embeddings", {"input": [[0, 1, 2]]})
        np.testing.assert_array_equal(
            np.array(reply["data"][0]["embedding"], dtype=np.float32), await get_native_vector(running.client, "Käse")
        )
        await post(running.client, "/v1/embeddings", {"input": [[0, 3]]}, 400)
        await post(running.client, "/v1/embeddings", {"input": [[0, 9]]}, 400)


# TEI


async def test_similarity_is_the_cosine_also_at_the_root(running: RunningApplication) -> None:
    """`inputs` with a source sentence; the sentence at fault is named."""
    body = {"inputs": {"source_sentence": "a", "sentences": ["a", "bcd"]}, "parameters": {}}
    vectors = [await get_native_vector(running.client, text) for text in ("a", "bcd")]
    for path in ("/similarity", "/"):
        np.testing.assert_allclose(await post(running.client, path, body), [1.0, vectors[0] @ vectors[1]], rtol=1e-5)
    bad = {"inputs": {"source_sentence": "a", "sentences": ["a", ""]}}
    for path in ("/similarity", "/"):
        await post(running.client, path, bad, 400)


async def test_embedding_that_is_not_normalised_has_the_same_direction(running: RunningApplication) -> None:
    """The pooled vector as the model gives it."""
    [raw] = np.array(await post(running.client, "/embed", {"inputs": "abc", "normalize": False}))
    assert abs(np.linalg.norm(raw) - 1) > 1e-3
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw), await get_native_vector(running.client, "abc"), rtol=1e-4, atol=1e-6
    )


async def test_rows_of_every_token_are_those_of_the_native_endpoint(running: RunningApplication) -> None:
    """Of several texts in one pass; found again afterwards."""
    rows = await post(running.client, "/embed_all", {"inputs": ["ab", "xyz", "ab"]})
    assert [len(row) for row in rows] == [4, 5, 4]
    assert rows[0] == rows[2]
    n_passes = len(running.backend.passes)
    path = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"
    native = await post(running.client, path, {"text": "xyz"})
    assert [row["embedding"] for row in native["token_level_embedding_bundle"]] == rows[1]
    assert len(running.backend.passes) == n_passes


@pytest.mark.parametrize(
    ("truncate", "direction", "kept"),
    [(True, None, LONG[:ROOM]), (True, "Right", LONG[:ROOM]), (True, "left", LONG[-ROOM:]), (False, "left", None)],
)
async def test_tei_truncates_as_asked(
    truncate: bool, direction: str | None, kept: str | None, narrow: RunningApplication
) -> None:
    """And says how much was dropped; without `truncate` the setting decides, which refuses."""
    body = {"inputs": LONG, "truncate": truncate, "truncation_direction": direction}
    for path in ("/embed", "/"):
        response = await narrow.client.post(path, json=body)
        assert response.status_code == (400 if kept is None else 200)
        if kept is not None:
            assert response.headers["x-tokens-dropped"] == str(len(LONG) - ROOM)
            np.testing.assert_allclose(response.json()[0], await get_native_vector(narrow.client, kept), rtol=1e-5)
    await post(narrow.client, "/embed", {"inputs": LONG}, 400)


async def test_tokens_have_their_places_in_bytes(running: RunningApplication) -> None:
    """Null for special tokens, which may be left out; decoding gives the text back."""
    [rows] = await post(running.client, "/tokenize", {"inputs": "aé"})
    assert [row["id"] for row in rows] == [OPENING_TOKEN, *"aé".encode(), CLOSING_TOKEN]
    assert [(row["start"], row["stop"]) for row in rows] == [(None, None), (0, 1), (1, 2), (2, 3), (None, None)]
    assert [row["special"] for row in rows] == [True, False, False, False, True]
    bare = await post(running.client, "/tokenize", {"inputs": ["a", "b"], "add_special_tokens": False})
    assert [[row["id"] for row in row_list] for row_list in bare] == [[97], [98]]
    ids = [row["id"] for row in rows]
    assert await post(running.client, "/decode", {"ids": ids}) == ["aé"]
    assert await post(running.client, "/decode", {"ids": [ids, [98]], "skip_special_tokens": True}) == ["aé", "b"]
    assert "9999" in (await post(running.client, "/decode", {"ids": [9999]}, 400))["error"]
    await post(running.client, "/decode", {"ids": []}, 400)


async def test_info_tells_the_window_and_the_limits(narrow: RunningApplication) -> None:
    """Of the default model."""
    info = (await narrow.client.get("/info")).json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == (FAKE_MODEL_NAME, 32, 2048)
    assert info["model_type"]["embedding"] == {"pooling": "mean"}
    assert info["auto_truncate"] is False


# llama.cpp's server


async def test_llama_cpp_s_tokenizer_shares_its_path_with_tei_s(running: RunningApplication) -> None:
    """`content` asks for its shape, in errors, too."""
    assert await post(running.client, "/tokenize", {"content": "ab"}) == {"tokens": [97, 98]}
    assert await post(running.client, "/tokenize", {"content": ""}) == {"tokens": []}
    special = await post(running.client, "/tokenize", {"content": "a", "add_special": True, "with_pieces": True})
    assert special["tokens"][:2] == [{"id": OPENING_TOKEN, "piece": "[CLS]"}, {"id": 97, "piece": "a"}]
    mistyped = await post(running.client, "/tokenize", {"content": 5}, 422)
    assert mistyped["error"]["message"] == "content: Input should be a valid string"
    unknown = await post(running.client, "/tokenize", {"content": "a", "model": "no-such"}, 404)
    assert unknown["error"]["type"] == "not_found_error"
    assert await post(running.client, "/detokenize", {"tokens": [97, 98]}) == {"content": "ab"}
    assert await post(running.client, "/detokenize", {"tokens": []}) == {"content": ""}


async def test_llama_cpp_s_normalisations_other_than_unit_length_are_refused(running: RunningApplication) -> None:
    """The message names the field."""
    refused = await post(running.client, "/embedding", {"content": "a", "embd_normalize": -1}, 400)
    assert "embd_normalize" in refused["error"]["message"]


# Ollama


async def test_ollama_cuts_unless_told_not_to(narrow: RunningApplication) -> None:
    """As its own default is; the header counts what was dropped."""
    body = {"model": FAKE_MODEL_NAME, "input": LONG}
    response = await narrow.client.post("/api/embed", json=body)
    assert response.status_code == 200
    assert response.headers["x-tokens-dropped"] == str(len(LONG) - ROOM)
    assert response.json()["prompt_eval_count"] == WINDOW
    assert response.json()["total_duration"] > 0
    await post(narrow.client, "/api/embed", body | {"truncate": False}, 400)


async def test_ollama_s_lists_tell_the_same_model(running: RunningApplication) -> None:
    """Tagged `:latest`; loaded ones in `ps`; facts in `show`, by either name of the field."""
    tags = (await running.client.get("/api/tags")).json()["models"]
    assert [model["name"] for model in tags] == [f"{FAKE_MODEL_NAME}:latest"]
    assert [model["digest"] for model in (await running.client.get("/api/ps")).json()["models"]] == [tags[0]["digest"]]
    running.add_model("second")
    assert len((await running.client.get("/api/tags")).json()["models"]) == 2
    assert len((await running.client.get("/api/ps")).json()["models"]) == 1
    for field in ("model", "name"):
        shown = await post(running.client, "/api/show", {field: f"{FAKE_MODEL_NAME}:latest"})
        assert shown["capabilities"] == ["embedding"]
        assert shown["model_info"]["bert.embedding_length"] == 64
    version = (await running.client.get("/api/version")).json()["version"]
    assert version == running.app.version


async def test_ollama_s_empty_list_loads_and_fewer_dimensions_are_cut(running: RunningApplication) -> None:
    """Clients load a model with an empty list; 0 dimensions are all."""
    loaded = await post(running.client, "/api/embed", {"model": FAKE_MODEL_NAME, "input": []})
    assert loaded["embeddings"] == []
    for n_dims, expected in ((0, 16), (4, 4)):
        reply = await post(running.client, "/api/embed", {"model": FAKE_MODEL_NAME, "input": "a", "dimensions": n_dims})
        assert len(reply["embeddings"][0]) == expected


# Cohere


async def test_every_encoding_is_made_from_the_stored_vector(running: RunningApplication) -> None:
    """Float and base64 exactly; bytes by the largest magnitude; bits by sign."""
    vector = await get_native_vector(running.client, "abc")
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    reply = await post(running.client, "/v2/embed", {"texts": ["abc"], "embedding_types": kinds})
    found = {kind: values[0] for kind, values in reply["embeddings"].items()}
    assert list(found) == kinds
    np.testing.assert_array_equal(np.array(found["float"], dtype=np.float32), vector)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(found["base64"]), dtype="<f4"), vector)
    scaled = np.array(found["int8"]) / 127 * np.abs(vector).max()
    np.testing.assert_allclose(scaled, vector, atol=np.abs(vector).max() / 254 * 1.01)
    np.testing.assert_array_equal(np.array(found["uint8"]) - 128, found["int8"])
    bits = np.unpackbits(np.array(found["ubinary"], dtype=np.uint8))
    np.testing.assert_array_equal(bits.astype(bool), vector > 0)
    np.testing.assert_array_equal(np.array(found["binary"]) + 128, found["ubinary"])
    assert reply["meta"]["billed_units"] == {"input_tokens": 5}
    assert reply["response_type"] == "embeddings_by_type"


@pytest.mark.parametrize(("rule", "kept"), [("START", LONG[-ROOM:]), ("END", LONG[:ROOM]), (None, LONG[:ROOM])])
async def test_cohere_truncates_at_the_end_that_is_named(
    rule: str | None, kept: str, narrow: RunningApplication
) -> None:
    """At the end if nothing is said; NONE refuses; `max_tokens` cuts before the window does."""
    body = {"texts": [LONG]} | ({"truncate": rule} if rule else {})
    reply = await post(narrow.client, "/v2/embed", body)
    np.testing.assert_allclose(reply["embeddings"]["float"][0], await get_native_vector(narrow.client, kept), rtol=1e-5)
    reply = await post(narrow.client, "/v2/embed", body | {"max_tokens": 5})
    fewer = LONG[-5:] if rule == "START" else LONG[:5]
    np.testing.assert_allclose(
        reply["embeddings"]["float"][0], await get_native_vector(narrow.client, fewer), rtol=1e-5
    )
    for refused in ({"truncate": "NONE"}, {"truncate": "NONE", "max_tokens": 5}):
        await post(narrow.client, "/v2/embed", {"texts": [LONG]} | refused, 400)


async def test_cohere_s_inputs_in_parts_are_texts_and_images_are_refused(running: RunningApplication) -> None:
    """The parts of one input make one text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = await post(running.client, "/v2/embed", {"inputs": [{"content": parts}], "output_dimension": 8})
    assert reply["texts"] == ["a\nb"]
    assert len(reply["embeddings"]["float"][0]) == 8
    image = {"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    for refused in ({"inputs": [image]}, {"images": ["data:"]}, {"texts": ["a"], "input_type": "image"}, {"texts": []}):
        await post(running.client, "/v2/embed", refused, 400)


# Roles


async def test_roles_put_the_model_s_own_words_in_front(prompted: RunningApplication) -> None:
    """Cohere's `input_type` and TEI's `prompt_name`; without one, the text stands alone."""
    client = prompted.client
    for native, cohere, tei in (
        ("query", "search_query", "query"),
        ("document", "search_document", "passage"),
        (None, "clustering", None),
    ):
        expected = await get_native_vector(client, "a", input_type=native)
        embedded = await post(client, "/v2/embed", {"texts": ["a"], "input_type": cohere})
        np.testing.assert_array_equal(np.float32(embedded["embeddings"]["float"][0]), expected)
        for path in ("/embed", "/"):
            [vector] = await post(client, path, {"inputs": "a", "prompt_name": tei})
            np.testing.assert_array_equal(np.float32(vector), expected)
    assert "Known: query" in (await post(client, "/embed", {"inputs": "a", "prompt_name": "x"}, 400))["error"]
    [rows] = await post(client, "/tokenize", {"inputs": "a", "prompt_name": "query", "add_special_tokens": False})
    assert bytes(row["id"] for row in rows) == b"search_query: a"
    query = await get_native_vector(client, "a", input_type="query")
    document = await get_native_vector(client, "bc", input_type="document")
    [ranked] = await post(client, "/rerank", {"query": "a", "texts": ["bc"]})
    assert 0 <= ranked["score"] <= 1
    assert query.shape == document.shape


async def test_root_answers_those_who_only_look_who_is_there(running: RunningApplication) -> None:
    """Ollama's clients ask for the head of the page."""
    assert (await running.client.head("/")).status_code == 200


# CORS


async def test_web_pages_may_call_only_where_the_setting_lets_them(tmp_path: Path) -> None:
    """The question before the request needs no token, the request does; other origins get no leave."""
    asks = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with run_application(
        tmp_path, security_token=TOKEN, cors_allowed_origins="https://app.example, https://other.example"
    ) as running:
        leave = await running.client.options("/v1/embeddings", headers=asks)
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in leave.headers["access-control-allow-headers"].lower()
        stranger = await running.client.options("/v1/embeddings", headers=asks | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        refused = await running.client.post("/v1/embeddings", json={"input": "a"}, headers={"Origin": asks["Origin"]})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == asks["Origin"]
        headers = {"Origin": asks["Origin"], "Authorization": f"Bearer {TOKEN}"}
        answered = await running.client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
        assert answered.status_code == 200
        assert "x-request-id" in answered.headers["access-control-expose-headers"]


async def test_web_pages_may_not_call_by_default(running: RunningApplication) -> None:
    """No header gives leave."""
    response = await running.client.get("/health", headers={"Origin": "https://app.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
