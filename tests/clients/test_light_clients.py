"""The official clients of OpenAI, Cohere, Ollama and Hugging Face, unmodified, against a live server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cohere
import httpx
import numpy as np
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient

from tests.clients.checks import (
    ALIAS,
    CHECKS,
    MODEL,
    TEXTS,
    TOKEN,
    Library,
    check_same,
    get_native_vector,
)
from tests.serving import start_server


@pytest.fixture(scope="module", autouse=True)
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a token and an alias."""
    settings = {"SECURITY_TOKEN": TOKEN, "MODEL_ALIASES": f"{ALIAS}={MODEL}"}
    with start_server(tmp_path_factory.mktemp("clients"), settings) as server:
        yield server.url


def connect_openai(url: str, token: str, model: str) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)

    def many(texts: Any) -> Any:
        return [row.embedding for row in client.embeddings.create(model=model, input=texts).data]

    return lambda text: client.embeddings.create(model=model, input=text).data[0].embedding, many


def connect_openai_for_floats(url: str, token: str, model: str) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)

    def many(texts: Any) -> Any:
        reply = client.embeddings.create(model=model, input=texts, encoding_format="float")
        return [row.embedding for row in reply.data]

    return lambda text: many(text)[0], many


def connect_cohere(url: str, token: str, model: str) -> Any:
    client = cohere.ClientV2(token, base_url=url, max_retries=0)

    def many(texts: Any) -> Any:
        reply = client.embed(
            model=model, input_type="classification", texts=texts, embedding_types=["float"], truncate="NONE"
        )
        return reply.embeddings.float_

    return lambda text: many([text])[0], many


def connect_ollama(url: str, token: str, model: str) -> Any:
    client = ollama.Client(url, headers={"Authorization": f"Bearer {token}"})
    return (
        lambda text: client.embeddings(model=model, prompt=text).embedding,
        lambda texts: client.embed(model=f"{model}:latest", input=texts).embeddings,
    )


def connect_hugging_face(url: str, token: str, model: str) -> Any:
    client = InferenceClient(model=url, token=token)
    return lambda text: client.feature_extraction(text)[0], client.feature_extraction


def connect_hugging_face_truncating(url: str, token: str, model: str) -> Any:
    client = InferenceClient(model=f"{url}/embed", token=token)

    def many(texts: Any) -> Any:
        return client.feature_extraction(texts, truncate=True)

    return lambda text: many(text)[0], many


LIBRARIES = (
    Library("openai", connect_openai),
    Library("openai, floats", connect_openai_for_floats),
    Library("cohere", connect_cohere),
    Library("ollama", connect_ollama, cuts=True),
    Library("huggingface_hub", connect_hugging_face, model=None),
    Library("huggingface_hub, truncating", connect_hugging_face_truncating, model=None, cuts=True),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_client_gets_what_it_expects(library: Library, check: Callable[[Library, str], None], url: str) -> None:
    """One text and several, over-long ones, a wrong model, a wrong token."""
    check(library, url)


def test_openai_client_raises_its_own_classes(url: str) -> None:
    """By status, with code and place as the dialect has them."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="no-such-model", input="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model=MODEL, input=["a", ""])
    assert empty.value.param == "input[1]"
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model=MODEL, input="a", dimensions=0)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_openai_client_lists_models_and_asks_by_alias_and_dimensions(url: str) -> None:
    """The alias answers with the model's vector; fewer dimensions have unit length."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    assert {MODEL, ALIAS} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(ALIAS).id == ALIAS
    reply = client.embeddings.create(model=ALIAS, input=TEXTS[0], dimensions=64)
    whole = get_native_vector(url, TEXTS[0])[:64]
    check_same(reply.data[0].embedding, whole / np.linalg.norm(whole))
    assert reply.usage.prompt_tokens == 6


def test_openai_client_may_send_the_model_s_own_token_ids(url: str) -> None:
    """As `/tokenize` gives them; others, such as cl100k_base's, are refused."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as plain:
        [tokens] = plain.post("/tokenize", json={"inputs": TEXTS[0]}).json()
        ids = [token["id"] for token in tokens]
        assert (ids[0], ids[-1]) == (101, 102)
        assert plain.post("/decode", json={"ids": ids}).json() == ["i feel extremely chilly"]
        spans = [TEXTS[0][token["start"] : token["stop"]] for token in tokens if not token["special"]]
        assert "".join(spans) == TEXTS[0].replace(" ", "")
    lower = get_native_vector(url, TEXTS[0].lower())
    check_same(client.embeddings.create(model=MODEL, input=ids).data[0].embedding, lower)
    hello_world_of_cl100k_base = [15339, 1917]
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model=MODEL, input=hello_world_of_cl100k_base)


DOCUMENTS = ["Two and two is four.", "I am freezing in this cold weather.", "The cat sat on the mat."]
QUERY = "Is it cold outside?"


def test_cohere_clients_rerank(url: str) -> None:
    """Both versions: best first, in [0, 1], so many as asked for, with the documents where asked for."""
    second = cohere.ClientV2(TOKEN, base_url=url, max_retries=0)
    ranked = second.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=2)
    assert ranked.results[0].index == 1
    assert len(ranked.results) == 2
    assert 1 >= ranked.results[0].relevance_score > ranked.results[1].relevance_score >= 0
    first = cohere.Client(TOKEN, base_url=url, max_retries=0)
    listed = first.rerank(query=QUERY, documents=DOCUMENTS, model=MODEL, return_documents=True)
    assert listed.results[0].document is not None
    assert listed.results[0].document.text == DOCUMENTS[1]
    with pytest.raises(cohere.NotFoundError):
        second.rerank(model="no-such-model", query=QUERY, documents=DOCUMENTS)


def test_cohere_client_gets_every_encoding_and_tokens(url: str) -> None:
    """Bytes near the floats, bits of their signs, base64 their buffer; tokens without special ones."""
    client = cohere.ClientV2(TOKEN, base_url=url, max_retries=0)
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    reply = client.embed(
        model=MODEL, input_type="search_query", texts=[TEXTS[0]], embedding_types=kinds, output_dimension=128
    )
    vector = np.array(reply.embeddings.float_[0])
    assert len(vector) == 128
    eighth = np.array(reply.embeddings.int8[0], dtype=np.float64)
    assert eighth @ vector / np.linalg.norm(eighth) == pytest.approx(1.0, abs=1e-3)
    assert len(reply.embeddings.ubinary[0]) == len(reply.embeddings.binary[0]) == 16
    assert reply.embeddings.base64
    tokens = cohere.Client(TOKEN, base_url=url, max_retries=0).tokenize(text="I am so cold", model=MODEL, offline=False)
    assert tokens.tokens == [1045, 2572, 2061, 3147]


def test_ollama_client_lists_and_shows(url: str) -> None:
    """Names with the tag; loaded ones; facts; errors as its own class with the status."""
    client = ollama.Client(url, headers={"Authorization": f"Bearer {TOKEN}"})
    assert f"{MODEL}:latest" in [model.model for model in client.list().models]
    assert client.ps().models[0].name == f"{MODEL}:latest"
    assert client.show(MODEL).modelinfo["bert.embedding_length"] == 384
    reply = client.embed(model=MODEL, input=TEXTS[0], dimensions=64)
    assert len(reply.embeddings[0]) == 64
    assert reply.prompt_eval_count == 6
    with pytest.raises(ollama.ResponseError) as unknown:
        client.embed(model="no-such-model", input="a")
    assert unknown.value.status_code == 404


def test_hugging_face_client_compares_sentences_at_the_same_address(url: str) -> None:
    """The root tells the two by the shape of `inputs`."""
    client = InferenceClient(model=url, token=TOKEN)
    scores = client.sentence_similarity(TEXTS[0], [TEXTS[0], DOCUMENTS[0]])
    vectors = [get_native_vector(url, text) for text in (TEXTS[0], DOCUMENTS[0])]
    assert scores == pytest.approx([1.0, float(vectors[0] @ vectors[1])], abs=1e-5)
