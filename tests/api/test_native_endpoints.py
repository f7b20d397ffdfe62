"""The native endpoints: exact paths, parameters, defaults and replies, and what is found again instead of computed."""

from __future__ import annotations

import io
import json
import sqlite3
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas
import pytest

from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.fake_backend import CLOSING_TOKEN, OPENING_TOKEN, FakeBackend
from tests.pdf_writing import write_text_pdf
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application

EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SIMILARITY = "/compute_similarity_between_strings/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
STRINGS = "/get_all_stored_strings/"
DOCUMENTS = "/get_all_stored_documents/"
MODELS = "/get_list_of_available_model_names/"

ABSENT = "absent"
REQUIRED = "required"
LISTING = {"model_name": ABSENT, "corpus_identifier_string": ABSENT, "limit": ABSENT, "offset": 0, "cursor": ABSENT}
DOWNLOAD = {"json_format": "records", "send_back_json_or_zip_file": "zip", "client_ip": ABSENT}
TEXT = {"text": REQUIRED, "model_name": None, "truncation": None, "input_type": None}
COLLECTED_TEXT = TEXT | {"corpus_identifier_string": None}
SUBMITTED = DOWNLOAD | {"model_name": ABSENT, "corpus_identifier_string": ABSENT}
SCOPE = {
    "query_text": REQUIRED,
    "model_name": None,
    "corpus_identifier_string": None,
    "filename": None,
    "since": None,
    "until": None,
    "exact": False,
}
# Path: method, query parameters with their defaults, fields of the body with theirs.
ENDPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    MODELS: ("get", {}, {}),
    STRINGS: ("get", LISTING, {}),
    DOCUMENTS: ("get", LISTING, {}),
    "/get_all_stored_documents_with_embeddings/": ("get", LISTING, {}),
    "/stored_strings/": ("delete", {}, {"text": REQUIRED}),
    "/stored_documents/": (
        "delete",
        {"filename": ABSENT, "model_name": ABSENT, "corpus_identifier_string": ABSENT},
        {},
    ),
    "/get_list_of_collections/": ("get", {"limit": 1_000, "cursor": ABSENT}, {}),
    EMBED: ("post", {"client_ip": ABSENT}, COLLECTED_TEXT),
    "/get_embedding_vector/": ("post", {"client_ip": ABSENT}, COLLECTED_TEXT),
    TOKENS: ("post", DOWNLOAD, TEXT),
    SIMILARITY: (
        "post",
        {"client_ip": ABSENT},
        {
            "text1": REQUIRED,
            "text2": REQUIRED,
            "model_name": None,
            "similarity_measure": "cosine_similarity",
            "with_percentile": False,
            "corpus_identifier_string": None,
        },
    ),
    "/compute_similarity_matrix/": (
        "post",
        {"client_ip": ABSENT},
        {
            "strings": REQUIRED,
            "other_strings": None,
            "similarity_measure": "cosine_similarity",
            "model_name": None,
        },
    ),
    "/compare_strings_token_by_token/": (
        "post",
        {"client_ip": ABSENT},
        {"text1": REQUIRED, "text2": REQUIRED, "model_name": None},
    ),
    SEARCH: (
        "post",
        {"client_ip": ABSENT},
        SCOPE
        | {
            "number_of_most_similar_strings_to_return": 10,
            "full_text_weight": 0.0,
            "late_interaction": False,
            "with_matched_tokens": False,
        },
    ),
    "/advanced_search_stored_embeddings_with_query_string_for_semantic_similarity/": (
        "post",
        {"client_ip": ABSENT},
        SCOPE
        | {
            "similarity_filter_percentage": 0.02,
            "number_of_most_similar_strings_to_return": 10,
            "result_sorting_metric": "hoeffdings_d",
        },
    ),
    "/get_most_similar_string_from_database/": (
        "post",
        {"client_ip": ABSENT},
        {"text": REQUIRED, "model_name": None, "number_of_most_similar_strings_to_return": 3},
    ),
    DOCUMENT: ("post", SUBMITTED | {"background": False}, {"file": REQUIRED}),
    "/get_all_embeddings_for_document/": (
        "post",
        SUBMITTED | {"background": False},
        {"file": REQUIRED},
    ),
    "/convert_document_to_sentences/": ("post", {}, {"file": REQUIRED}),
    "/jobs": ("get", {"limit": 1_000, "cursor": ABSENT}, {}),
    "/jobs/{job_id}/events": ("get", {}, {}),
    "/jobs/{job_id}/result": ("get", {"json_format": "records", "send_back_json_or_zip_file": "zip"}, {}),
    "/clear_ramdisk/": ("post", {}, {}),
    "/get_list_of_models_with_their_states/": ("get", {}, {}),
    "/load_model/": ("post", {}, {"model_name": REQUIRED}),
    "/unload_model/": ("post", {}, {"model_name": REQUIRED}),
    "/add_new_model/": ("post", {}, {"model_url": REQUIRED}),
    "/health": ("get", {}, {}),
    "/ready": ("get", {}, {}),
}

SENTENCES = ["Snow fell on the hills all night.", "By noon the road was clear again.", "Nobody had expected the thaw."]
DOCUMENT_BYTES = " ".join(SENTENCES).encode()


def expected_rows(text: str) -> np.ndarray:
    """float32 (n_tokens, n_dims) that the engine gives for a text, asked without queue, store and HTTP."""
    model = FakeBackend().load(Path(), name="", digest="", max_window=512, pooling=Pooling.MEAN)
    tokens = np.concatenate(([OPENING_TOKEN], model.tokenize(text), [CLOSING_TOKEN])).astype(np.int32)
    return model.open_context().compute([tokens], n_threads=1)


def expected_vector(text: str) -> np.ndarray:
    mean = expected_rows(text).astype(np.float64).mean(axis=0)
    return mean / np.linalg.norm(mean)


async def embed(client: httpx.AsyncClient, text: str, **fields: Any) -> httpx.Response:
    response = await client.post(EMBED, json={"text": text, **fields})
    assert response.status_code == 200, response.text
    return response


async def search(client: httpx.AsyncClient, query: str, **fields: Any) -> list[tuple[str, float]]:
    response = await client.post(SEARCH, json={"query_text": query, **fields})
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["query_text", "results"]
    assert response.json()["query_text"] == query
    return [(hit["search_result_text"], hit["similarity_to_query_text"]) for hit in response.json()["results"]]


async def list_all(client: httpx.AsyncClient, path: str, **parameters: Any) -> list[str]:
    response = await client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    [items] = response.json().values()
    return items


async def send_document(client: httpx.AsyncClient, data: bytes, name: str = "weather.txt", **query: str) -> Any:
    query = {"send_back_json_or_zip_file": "json"} | query
    response = await client.post(DOCUMENT, files={"file": (name, data)}, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def read_single_file(response: httpx.Response, ending: str = ".json") -> bytes:
    """The one file of a zip reply."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        [name] = archive.namelist()
        assert name.endswith(ending)
        return archive.read(name)


# What the endpoints are called and what they take


def resolve_schema(description: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return description["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def describe_body(description: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    """Fields of the body with their defaults."""
    if "requestBody" not in operation:
        return {}
    [content] = operation["requestBody"]["content"].values()
    schema = resolve_schema(description, content["schema"])
    required = schema.get("required", [])
    return {
        name: REQUIRED if name in required else field.get("default") for name, field in schema["properties"].items()
    }


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_endpoint_has_the_parameters_and_defaults_of_the_original(path: str, running: RunningApplication) -> None:
    """Names, methods, parameters and defaults are a contract."""
    method, query, body = ENDPOINTS[path]
    description = (await running.client.get("/openapi.json")).json()
    assert list(description["paths"][path]) == [method]
    operation = description["paths"][path][method]
    parameters = [item for item in operation.get("parameters", []) if item["in"] == "query"]
    found = {item["name"]: item["schema"].get("default", ABSENT) for item in parameters}
    assert found == query
    assert describe_body(description, operation) == body


async def test_examples_shown_by_swagger_are_accepted(tmp_path: Path) -> None:
    """Whoever presses Execute on the example of an endpoint gets its reply, not an error."""
    async with run_application(tmp_path, model_aliases=f"all-MiniLM-L6-v2={FAKE_MODEL_NAME}") as running:
        description = (await running.client.get("/openapi.json")).json()
        tried = 0
        for path, operations in description["paths"].items():
            content = operations.get("post", {}).get("requestBody", {}).get("content", {})
            if "application/json" in content:
                shown = content["application/json"]["schema"]
                for variant in shown.get("oneOf", [shown]):  # where two dialects share a path
                    fields = resolve_schema(description, variant)["properties"].items()
                    example = {name: field["examples"][0] for name, field in fields if "examples" in field}
                    if {"ids", "tokens"} & set(example):
                        continue  # ids of the default model, whose vocabulary the fake engine does not have
                    response = await running.client.post(path, json=example)
                    assert response.status_code in (200, 202), (path, response.text)
                    tried += 1
        assert tried >= 6


# Models


async def test_model_names_are_listed_with_the_default_first(running: RunningApplication) -> None:
    """A GGUF dropped into the directory is a model by its file's stem, without a restart."""
    assert (await running.client.get(MODELS)).json() == {"model_names": [FAKE_MODEL_NAME]}
    running.add_model("another model v1.5")
    assert await list_all(running.client, MODELS) == [FAKE_MODEL_NAME, "another model v1.5"]


async def test_models_never_share_a_cache(running: RunningApplication) -> None:
    """The same text under two models is computed twice and listed for each."""
    running.add_model("other")
    await embed(running.client, "a shared text")
    response = await embed(running.client, "a shared text", model_name="other")
    assert response.headers["x-embedding-source"] == "computed"
    await embed(running.client, "only for the other", model_name="other")
    assert await list_all(running.client, STRINGS, model_name=FAKE_MODEL_NAME) == ["a shared text"]
    assert await list_all(running.client, STRINGS, model_name="other") == ["a shared text", "only for the other"]
    assert await list_all(running.client, STRINGS) == ["a shared text", "only for the other"]
    assert await search(running.client, "a shared text") == []


# The embedding of a string


async def test_embedding_is_the_unit_length_mean_of_the_engine_s_rows(running: RunningApplication) -> None:
    """The vector is the model's own, to float32 precision."""
    response = await embed(running.client, "I feel extremely chilly")
    assert list(response.json()) == ["embedding"]
    vector = np.array(response.json()["embedding"])
    np.testing.assert_allclose(vector, expected_vector("I feel extremely chilly"), atol=1e-6)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)


async def test_reply_s_headers_say_how_it_came_about(running: RunningApplication) -> None:
    """Tokens include the two special ones; a request id is on every reply."""
    headers = (await embed(running.client, "twelve bytes")).headers
    assert headers["x-tokens-used"] == "14"
    assert headers["x-tokens-dropped"] == "0"
    assert headers["x-embedding-source"] == "computed"
    assert float(headers["x-queue-seconds"]) >= 0
    assert float(headers["x-compute-seconds"]) > 0
    assert headers["x-request-id"]


async def test_second_answer_comes_from_memory_and_nothing_is_computed(running: RunningApplication) -> None:
    """The engine sees each text once."""
    first = await embed(running.client, "said twice")
    n_passes = len(running.backend.passes)
    second = await embed(running.client, "said twice")
    assert second.headers["x-embedding-source"] == "memory"
    assert second.json() == first.json()
    assert len(running.backend.passes) == n_passes


async def test_second_answer_comes_from_the_store_without_memory(tmp_path: Path) -> None:
    """With EMBEDDING_CACHE_SIZE_IN_MB=0 the database answers, with the same float32 values."""
    async with run_application(tmp_path, embedding_cache_size_in_mb=0) as running:
        first = await embed(running.client, "said twice")
        n_passes = len(running.backend.passes)
        second = await embed(running.client, "said twice")
        assert second.headers["x-embedding-source"] == "store"
        assert second.json() == first.json()
        assert len(running.backend.passes) == n_passes


async def test_restarted_application_finds_what_was_stored(tmp_path: Path) -> None:
    """Another start on the same database answers from it, and searches it."""
    async with run_application(tmp_path) as running:
        first = await embed(running.client, "kept over the restart")
    async with run_application(tmp_path) as running:
        n_passes = len(running.backend.passes)
        second = await embed(running.client, "kept over the restart")
        assert second.headers["x-embedding-source"] == "store"
        assert second.json() == first.json()
        assert len(running.backend.passes) == n_passes
        assert [text for text, _ in await search(running.client, "kept")] == ["kept over the restart"]


async def test_texts_are_told_apart_by_their_exact_characters(running: RunningApplication) -> None:
    """Nothing is stripped, folded or normalised: each of these is a text of its own."""
    texts = ["Café", "café", "café ", unicodedata.normalize("NFD", "café"), "寒い", "🥶", "a\nb", "'; DROP TABLE x; --"]
    for text in texts:
        assert (await embed(running.client, text)).headers["x-embedding-source"] == "computed"
    assert await list_all(running.client, STRINGS) == texts


@pytest.mark.parametrize("query", [{}, {"client_ip": "203.0.113.9"}])
async def test_client_s_address_is_the_connection_s(query: dict[str, str], running: RunningApplication) -> None:
    """`client_ip` is taken by every endpoint, but only believed from a trusted proxy: `test_clients.py`."""
    expected = "127.0.0.1"
    await running.client.post(EMBED, json={"text": "from somewhere"}, params=query)
    with sqlite3.connect(running.database) as connection:
        assert connection.execute("SELECT ip_address FROM embeddings").fetchall() == [(expected,)]


# Token-level embeddings


async def test_token_level_reply_holds_every_token_s_contextual_row(running: RunningApplication) -> None:
    """One row per token of the model's tokenizer, special ones included, as the model computed it in the whole text."""
    response = await running.client.post(
        TOKENS, json={"text": "so cold"}, params={"send_back_json_or_zip_file": "json"}
    )
    reply = response.json()
    assert list(reply) == ["input_text", "token_level_embedding_bundle", "combined_feature_vector"]
    assert reply["input_text"] == "so cold"
    assert [row["token"] for row in reply["token_level_embedding_bundle"]] == ["[CLS]", *"so cold", "[SEP]"]
    matrix = np.array([row["embedding"] for row in reply["token_level_embedding_bundle"]])
    np.testing.assert_allclose(matrix, expected_rows("so cold"), rtol=1e-6)
    assert response.headers["x-tokens-used"] == "9"
    other = await running.client.post(TOKENS, json={"text": "so"}, params={"send_back_json_or_zip_file": "json"})
    in_other_context = other.json()["token_level_embedding_bundle"][1]
    assert in_other_context["token"] == reply["token_level_embedding_bundle"][1]["token"] == "s"
    assert in_other_context["embedding"] != reply["token_level_embedding_bundle"][1]["embedding"]


async def test_mean_of_the_token_rows_is_the_text_s_embedding(running: RunningApplication) -> None:
    """Both endpoints show the same computation."""
    reply = await running.client.post(TOKENS, json={"text": "one text"}, params={"send_back_json_or_zip_file": "json"})
    rows = np.array([row["embedding"] for row in reply.json()["token_level_embedding_bundle"]])
    mean = rows.mean(axis=0)
    pooled = (await embed(running.client, "one text")).json()["embedding"]
    np.testing.assert_allclose(mean / np.linalg.norm(mean), pooled, atol=1e-6)


async def test_combined_feature_vector_is_mean_minimum_maximum_and_deviation(running: RunningApplication) -> None:
    """4 n_dims numbers: the four statistics of every column, one after the other."""
    response = await running.client.post(
        TOKENS, json={"text": "features"}, params={"send_back_json_or_zip_file": "json"}
    )
    rows = pandas.DataFrame(expected_rows("features").astype(np.float64))
    expected = [*rows.mean(), *rows.min(), *rows.max(), *rows.std(ddof=0)]
    assert len(expected) == 4 * running.backend.n_dims
    np.testing.assert_allclose(response.json()["combined_feature_vector"], expected, rtol=1e-5, atol=1e-6)


async def test_token_level_reply_is_a_zip_of_one_json_file_by_default(running: RunningApplication) -> None:
    """The file holds what the JSON reply holds."""
    as_json = await running.client.post(TOKENS, json={"text": "zipped"}, params={"send_back_json_or_zip_file": "json"})
    as_zip = await running.client.post(TOKENS, json={"text": "zipped"})
    assert json.loads(read_single_file(as_zip)) == as_json.json()
    assert as_zip.headers["content-disposition"].startswith("attachment; filename=")
    assert as_zip.headers["x-tokens-used"] == "8"
    for response, source, n_hits in ((as_json, "computed", "0"), (as_zip, "store", "1")):
        assert (response.headers["x-embedding-source"], response.headers["x-cache-hits"]) == (source, n_hits)
        assert (float(response.headers["x-compute-seconds"]) > 0) == (source == "computed")


async def test_token_level_embeddings_are_kept_and_found_again(tmp_path: Path) -> None:
    """Asked again, also after a restart, they come from the store; the reply is the same to the byte."""
    async with run_application(tmp_path) as running:
        first = await running.client.post(TOKENS, json={"text": "remember the tokens"})
        n_passes = len(running.backend.passes)
        assert (await running.client.post(TOKENS, json={"text": "remember the tokens"})).content == first.content
        assert len(running.backend.passes) == n_passes
    async with run_application(tmp_path) as running:
        n_passes = len(running.backend.passes)
        assert (await running.client.post(TOKENS, json={"text": "remember the tokens"})).content == first.content
        assert len(running.backend.passes) == n_passes


# Six orientations


def from_records(content: Any, label: str) -> list[list[Any]]:
    return [[row[label], row["embedding"]] for row in content]


def from_columns(content: Any, label: str) -> list[list[Any]]:
    return [[column[key] for column in content.values()] for key in content[label]]


ORIENTATIONS: dict[str, Callable[[Any, str], list[list[Any]]]] = {
    "records": from_records,
    "split": lambda content, label: content["data"] if content["columns"][:2] == [label, "embedding"] else [],
    "index": lambda content, label: from_records([content[str(i)] for i in range(len(content))], label),
    "columns": from_columns,
    "values": lambda content, label: content,
    "table": lambda content, label: from_records(content["data"], label),
}


@pytest.mark.parametrize("json_format", ORIENTATIONS)
async def test_token_level_bundle_comes_in_every_orientation(json_format: str, running: RunningApplication) -> None:
    """`json_format` turns the bundle round, the rows stay the same."""
    query = {"send_back_json_or_zip_file": "json", "json_format": json_format}
    reply = (await running.client.post(TOKENS, json={"text": "abc"}, params=query)).json()
    rows = ORIENTATIONS[json_format](reply["token_level_embedding_bundle"], "token")
    assert [token for token, _ in rows] == ["[CLS]", "a", "b", "c", "[SEP]"]
    np.testing.assert_allclose([vector for _, vector in rows], expected_rows("abc"), rtol=1e-6)


# Similarity


async def test_similarity_is_the_cosine_unless_another_measure_is_named(running: RunningApplication) -> None:
    """Both embeddings are in the reply and kept like any other."""
    response = await running.client.post(SIMILARITY, json={"text1": "I feel cold", "text2": "I am so cold"})
    reply = response.json()
    fields = ["text1", "text2", "similarity_measure", "similarity_score", "embedding1", "embedding2"]
    assert list(reply) == fields
    assert (reply["text1"], reply["text2"]) == ("I feel cold", "I am so cold")
    assert reply["similarity_measure"] == "cosine_similarity"
    first, second = expected_vector("I feel cold"), expected_vector("I am so cold")
    assert reply["similarity_score"] == pytest.approx(first @ second, abs=1e-6)
    np.testing.assert_allclose(reply["embedding1"], first, atol=1e-6)
    np.testing.assert_allclose(reply["embedding2"], second, atol=1e-6)
    assert await list_all(running.client, STRINGS) == ["I feel cold", "I am so cold"]


@pytest.mark.parametrize("measure", ["cosine_similarity", "hoeffdings_d", "hsic"])
async def test_similarity_of_a_text_with_itself_is_the_highest(measure: str, running: RunningApplication) -> None:
    """For all three of the original's measures; the same text twice is computed once."""
    scores = {}
    for other in ("the very same", "quite another"):
        body = {"text1": "the very same", "text2": other, "similarity_measure": measure}
        reply = (await running.client.post(SIMILARITY, json=body)).json()
        assert reply["similarity_measure"] == measure
        scores[other] = reply["similarity_score"]
    assert scores["the very same"] == pytest.approx(1.0, abs=1e-6)
    assert scores["the very same"] > scores["quite another"]


async def test_similarity_by_tokens_uses_the_token_embeddings(running: RunningApplication) -> None:
    """A measure of late interaction: each token's best cosine in the other text, averaged."""
    body = {"text1": "ab", "text2": "bcd", "similarity_measure": "maxsim"}
    reply = (await running.client.post(SIMILARITY, json=body)).json()
    rows = [expected_rows(text).astype(np.float64) for text in ("ab", "bcd")]
    first, second = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in rows)
    assert reply["similarity_score"] == pytest.approx((first @ second.T).max(axis=1).mean(), abs=1e-6)


# Search


async def store_texts(client: httpx.AsyncClient, count: int) -> list[str]:
    texts = [f"{number} bottles {'x' * (number % 7)} of {number * 31 % 97}" for number in range(count)]
    for text in texts:
        await embed(client, text)
    return texts


async def test_search_agrees_with_brute_force_and_leaves_the_query_out(running: RunningApplication) -> None:
    """Best first, exactly as many as asked for although the query itself is stored and nearest."""
    texts = await store_texts(running.client, 25)
    query = texts[3]
    cosines = {text: float(expected_vector(text) @ expected_vector(query)) for text in texts if text != query}
    expected = sorted(cosines.items(), key=lambda item: -item[1])[:7]
    found = await search(running.client, query, number_of_most_similar_strings_to_return=7)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)


async def test_search_gives_ten_results_by_default_and_three_under_its_older_name(running: RunningApplication) -> None:
    """The older endpoint calls the query `text` and answers in the same shape."""
    await store_texts(running.client, 15)
    assert len(await search(running.client, "bottles")) == 10
    older = await running.client.post("/get_most_similar_string_from_database/", json={"text": "bottles"})
    assert older.json()["query_text"] == "bottles"
    assert older.json()["results"] == [
        {"search_result_text": text, "similarity_to_query_text": score}
        for text, score in await search(running.client, "bottles", number_of_most_similar_strings_to_return=3)
    ]


async def test_search_gives_what_there_is_when_less_is_stored(running: RunningApplication) -> None:
    """Nothing at first; queries are kept, but no search finds them until they are embedded as texts."""
    assert await search(running.client, "the first query") == []
    assert await search(running.client, "the second query") == []
    assert await list_all(running.client, STRINGS) == ["the first query", "the second query"]
    assert (await embed(running.client, "the first query")).headers["x-embedding-source"] == "memory"
    assert [text for text, _ in await search(running.client, "the second query")] == ["the first query"]


async def test_search_names_each_text_once_however_often_it_was_sent(running: RunningApplication) -> None:
    """Repeated texts and sentences of several documents are one result each."""
    for _ in range(3):
        await embed(running.client, SENTENCES[0])
    await send_document(running.client, DOCUMENT_BYTES, "one.txt")
    await send_document(running.client, DOCUMENT_BYTES + b" And then it rained again.", "two.txt")
    found = [text for text, _ in await search(running.client, "snow on hills")]
    assert sorted(found) == sorted([*SENTENCES, "And then it rained again."])


# Documents


async def test_sentences_of_a_document_are_strings_like_any_other(running: RunningApplication) -> None:
    """They are listed, found by search, and answered from memory; the document again computes nothing."""
    first = await send_document(running.client, DOCUMENT_BYTES)
    n_passes = len(running.backend.passes)
    assert await send_document(running.client, DOCUMENT_BYTES) == first
    assert len(running.backend.passes) == n_passes
    assert await list_all(running.client, DOCUMENTS) == ["weather.txt"]
    assert await list_all(running.client, STRINGS) == SENTENCES
    assert (await embed(running.client, SENTENCES[1])).headers["x-embedding-source"] == "memory"
    assert {text for text, _ in await search(running.client, "anything")} == set(SENTENCES)


async def test_pdf_is_read(running: RunningApplication) -> None:
    """Its type is told from its bytes, whatever its name."""
    data = write_text_pdf([[SENTENCES[0]], [SENTENCES[1]]])
    assert [row["text"] for row in await send_document(running.client, data, "no-ending")] == SENTENCES[:2]


async def test_repeated_sentence_stands_in_the_reply_as_often_as_in_the_document(running: RunningApplication) -> None:
    """It is computed once."""
    data = f"{SENTENCES[0]} {SENTENCES[1]} {SENTENCES[0]}".encode()
    reply = await send_document(running.client, data)
    assert [row["text"] for row in reply] == [SENTENCES[0], SENTENCES[1], SENTENCES[0]]
    assert reply[0]["embedding"] == reply[2]["embedding"]
    assert sum(len(sequences) for sequences in running.backend.passes[2:]) == 2


async def test_sentence_longer_than_the_window_is_halved_not_cut(tmp_path: Path) -> None:
    """All of its words are in the reply."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    async with run_application(tmp_path, llm_context_size_in_tokens=32) as running:
        rows = await send_document(running.client, words.encode())
        assert len(rows) > 1
        assert " ".join(row["text"] for row in rows) == words


async def test_zip_of_a_document_keeps_its_name_in_every_script(running: RunningApplication) -> None:
    """The name inside the zip is the document's, without directories."""
    response = await running.client.post(DOCUMENT, files={"file": ("../погода ☃.txt", DOCUMENT_BYTES)})
    read_single_file(response, "погода ☃.txt.embeddings.json")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == ["погода ☃.txt.embeddings.json"]


# Listings


async def test_strings_are_listed_once_oldest_first_in_parts(running: RunningApplication) -> None:
    """`limit` and `offset` go through all of them without a gap or a repetition."""
    texts = await store_texts(running.client, 7)
    await embed(running.client, texts[0])
    assert await list_all(running.client, STRINGS) == texts
    assert await list_all(running.client, STRINGS, limit=3) == texts[:3]
    assert await list_all(running.client, STRINGS, limit=3, offset=5) == texts[5:]
    assert await list_all(running.client, STRINGS, offset=2) == texts[2:]
    assert await list_all(running.client, STRINGS, offset=100) == []


async def test_documents_are_listed_by_name_in_parts_and_by_model(running: RunningApplication) -> None:
    """The older name of the endpoint answers the same."""
    running.add_model("other")
    for number in range(4):
        await send_document(running.client, DOCUMENT_BYTES, f"{number}.txt")
    await send_document(running.client, DOCUMENT_BYTES, "other.txt", model_name="other")
    for path in (DOCUMENTS, "/get_all_stored_documents_with_embeddings/"):
        assert (await running.client.get(path)).json() == {
            "documents": ["0.txt", "1.txt", "2.txt", "3.txt", "other.txt"]
        }
        assert await list_all(running.client, path, limit=2, offset=1) == ["1.txt", "2.txt"]
        assert await list_all(running.client, path, model_name="other") == ["other.txt"]


async def test_alias_stands_for_its_model_everywhere(tmp_path: Path) -> None:
    """What was stored under the model is found by its alias, and filtered by it."""
    async with run_application(tmp_path, model_aliases=f"public-name={FAKE_MODEL_NAME}") as running:
        await embed(running.client, "stored under the model")
        by_alias = await embed(running.client, "stored under the model", model_name="public-name")
        assert by_alias.headers["x-embedding-source"] == "memory"
        assert await list_all(running.client, STRINGS, model_name="public-name") == ["stored under the model"]


# Older names and the RAM disk


async def test_older_names_answer_like_today_s(running: RunningApplication) -> None:
    """Vector and document, under both names, are the same and share the cache."""
    vector = (await embed(running.client, "either name")).json()
    older = await running.client.post("/get_embedding_vector/", json={"text": "either name"})
    assert older.json() == vector
    assert older.headers["x-embedding-source"] == "memory"
    document = await send_document(running.client, DOCUMENT_BYTES)
    older = await running.client.post(
        "/get_all_embeddings_for_document/", files={"file": ("weather.txt", DOCUMENT_BYTES)}
    )
    assert json.loads(read_single_file(older)) == document


async def test_clearing_the_ramdisk_says_that_none_is_in_use(running: RunningApplication) -> None:
    """It is not an error to ask."""
    response = await running.client.post("/clear_ramdisk/")
    assert response.status_code == 200
    assert response.json() == {"message": "RAM disks are not in use, so there is nothing to clear."}
