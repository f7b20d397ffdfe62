"""Clients with many dependencies, unmodified, against a live server; `make test-clients` runs them in an environment.

Run by pytest by its name, with SERVER_URL set; the server is started by `run_heavy_clients`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import chromadb.utils.embedding_functions as chroma
import litellm
import openai
import pytest
from checks import ALIAS, CHECKS, TEXTS, TOKEN, Library, check_same, get_native_vector
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.dataclasses import Document
from haystack.utils import Secret
from langchain_ollama import OllamaEmbeddings
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

URL = os.environ["SERVER_URL"]
Connection = tuple[Callable[[str], Any], Callable[[Any], Any]]


def connect_langchain_openai(url: str, token: str, model: str) -> Connection:
    embeddings = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key=token, model=model, max_retries=0, check_embedding_ctx_length=False
    )
    return embeddings.embed_query, embeddings.embed_documents


def connect_langchain_ollama(url: str, token: str, model: str) -> Connection:
    headers = {"headers": {"Authorization": f"Bearer {token}"}}
    embeddings = OllamaEmbeddings(base_url=url, model=model, client_kwargs=headers)
    return embeddings.embed_query, embeddings.embed_documents


def connect_llama_index_openai(url: str, token: str, model: str) -> Connection:
    embedding = OpenAIEmbedding(api_base=f"{url}/v1", api_key=token, model_name=model, max_retries=0)
    return embedding.get_text_embedding, embedding.get_text_embedding_batch


def connect_llama_index_ollama(url: str, token: str, model: str) -> Connection:
    headers = {"headers": {"Authorization": f"Bearer {token}"}}
    embedding = OllamaEmbedding(model_name=model, base_url=url, client_kwargs=headers)
    return embedding.get_text_embedding, embedding.get_text_embedding_batch


def connect_llama_index_tei(url: str, token: str, model: str) -> Connection:
    embedding = TextEmbeddingsInference(
        model_name=model,
        base_url=url,
        auth_token=token,
        truncate_text=True,
        text_instruction="",
        query_instruction="",
    )
    return embedding.get_text_embedding, embedding.get_text_embedding_batch


def connect_haystack(url: str, token: str, model: str) -> Connection:
    asked: dict[str, Any] = {
        "api_key": Secret.from_token(token),
        "api_base_url": f"{url}/v1",
        "model": model,
        "max_retries": 0,
    }
    texts = OpenAITextEmbedder(**asked)
    documents = OpenAIDocumentEmbedder(**asked, progress_bar=False, raise_on_failure=True)

    def many(given: Any) -> Any:
        embedded = documents.run([Document(content=text) for text in given])["documents"]
        return [document.embedding for document in embedded]

    return lambda text: texts.run(text)["embedding"], many


def connect_chroma_openai(url: str, token: str, model: str) -> Connection:
    embed = chroma.OpenAIEmbeddingFunction(api_key=token, api_base=f"{url}/v1", model_name=model)
    return lambda text: embed([text])[0], embed


def connect_chroma_ollama(url: str, token: str, model: str) -> Connection:
    # The library has no place for a token but the address.
    embed = chroma.OllamaEmbeddingFunction(url=url, model_name=model)
    embed._client._client.headers["Authorization"] = f"Bearer {token}"
    return lambda text: embed([text])[0], embed


def connect_litellm(url: str, token: str, model: str) -> Connection:
    def many(texts: Any) -> Any:
        reply = litellm.embedding(
            model=f"openai/{model}", input=texts, api_base=f"{url}/v1", api_key=token, max_retries=0
        )
        return [row["embedding"] for row in reply.data]

    return lambda text: many([text])[0], many


LIBRARIES = (
    Library("langchain-openai", connect_langchain_openai),
    Library("langchain-ollama", connect_langchain_ollama, cuts=True),
    Library("llama-index openai", connect_llama_index_openai),
    Library("llama-index ollama", connect_llama_index_ollama, cuts=True),
    Library("llama-index tei", connect_llama_index_tei, cuts=True, model=None),
    Library("haystack-ai", connect_haystack),
    Library("chromadb openai", connect_chroma_openai),
    Library("chromadb ollama", connect_chroma_ollama, cuts=True),
    Library("litellm", connect_litellm),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_client_gets_what_it_expects(library: Library, check: Callable[[Library, str], None]) -> None:
    """One text and several, over-long ones, a wrong model, a wrong token."""
    check(library, URL)


def test_langchain_s_own_tokens_are_refused_with_the_way_out() -> None:
    """It sends ids of cl100k_base unless told not to; the message says what to tell it."""
    embeddings = OpenAIEmbeddings(base_url=f"{URL}/v1", api_key=TOKEN, model=ALIAS, max_retries=0)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.embed_query(TEXTS[0])


def test_langchain_s_own_tokens_are_read_where_the_server_has_their_table() -> None:
    """The second server was started with CL100K_TABLE_PATH; texts in any script come out as they went in."""
    url = os.environ["SERVER_WITH_TABLE_URL"]
    embeddings = OpenAIEmbeddings(base_url=f"{url}/v1", api_key=TOKEN, model=ALIAS, max_retries=0)
    for text, vector in zip(TEXTS, embeddings.embed_documents(list(TEXTS)), strict=True):
        check_same(vector, get_native_vector(url, text))
