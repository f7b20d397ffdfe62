"""The models that are known by name: where their files lie on the model hub, and what their makers say of them.

Where each fact was looked up, and which could not be, is in `docs/decisions/0005-catalogue-facts.md`. A digest that is
not known is None: then the digest that the hub announces is what a download is held against. A revision that is not
known is `main`, which becomes a commit when the download begins.

What a GGUF says of itself (dimensions, window, pooling) counts once it is there; the figures here are for lists of
models that are not. Downloads nothing and opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from llama_embeddings.catalogue import default_model

LATEST_REVISION = "main"


class ModelKind(StrEnum):
    """What a model computes: a vector of a text, or how well a text answers another."""

    EMBEDDING = "embedding"
    RERANKER = "reranker"


@dataclass(frozen=True, slots=True)
class HubFile:
    """One GGUF of a repository. `endpoint` is the hub's address where it is not the configured one."""

    repository: str
    file_name: str
    revision: str = LATEST_REVISION
    sha256: str | None = None
    size_in_bytes: int | None = None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class HubConversion:
    """A sentence-transformers directory that is made into GGUF here. `file_digests`: SHA-256 by path in it."""

    repository: str
    revision: str = LATEST_REVISION
    quantisation: str = "Q8_0"
    file_digests: Mapping[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that can be had. The prompts go in front of queries and documents; they are part of the recipe.

    `window` is in tokens. `pooling` ("mean", "cls", "last", "none", "rank") overrides what the GGUF says.
    """

    name: str
    kind: ModelKind
    source: HubFile | HubConversion
    licence: str | None = None
    n_dims: int | None = None
    window: int | None = None
    pooling: str | None = None
    query_prompt: str = ""
    document_prompt: str = ""


_ENTRIES = (
    CatalogueEntry(
        name=default_model.MODEL_NAME,
        kind=ModelKind.EMBEDDING,
        source=HubConversion(
            repository=default_model.HUB_REPOSITORY,
            revision=default_model.HUB_REVISION,
            quantisation=default_model.MODEL_QUANTISATION,
            file_digests=MappingProxyType(dict(default_model.SHA256_DIGESTS)),
        ),
        licence=default_model.MODEL_LICENCE,
        n_dims=384,
        window=512,
    ),
    CatalogueEntry(
        name="all-MiniLM-L12-v2",
        kind=ModelKind.EMBEDDING,
        source=HubConversion(
            repository="sentence-transformers/all-MiniLM-L12-v2", revision="c004d8e3e901237d8fa7e9fff12774962e391ce5"
        ),
        licence="apache-2.0",
        n_dims=384,
    ),
    CatalogueEntry(
        name="all-MiniLM-L6-v1",
        kind=ModelKind.EMBEDDING,
        source=HubConversion(repository="sentence-transformers/all-MiniLM-L6-v1"),
        n_dims=384,
    ),
    CatalogueEntry(
        name="nomic-embed-text-v1.5",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="nomic-ai/nomic-embed-text-v1.5-GGUF",
            file_name="nomic-embed-text-v1.5.Q8_0.gguf",
            revision="0188c9bf409793f810680a5a431e7b899c46104c",
            sha256="3e24342164b3d94991ba9692fdc0dd08e3fd7362e0aacc396a9a5c54a544c3b7",
            size_in_bytes=146_146_432,
        ),
        licence="apache-2.0",
        n_dims=768,
        window=2048,  # what the GGUF states; 8,192 need its rotation scaled
        query_prompt="search_query: ",
        document_prompt="search_document: ",
    ),
    CatalogueEntry(
        name="bge-m3",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="ggml-org/bge-m3-Q8_0-GGUF",
            file_name="bge-m3-q8_0.gguf",
            revision="9eba04c5d75ba5a1595e45de734d36bef4e5cb98",
            sha256="aa473d51f451a22f0fcf39ba3330c14bed38a385712b1113440f69df4047a173",
            size_in_bytes=634_553_760,
        ),
        licence="mit",
        n_dims=1024,
        window=8192,
    ),
    CatalogueEntry(
        name="mxbai-embed-large-v1",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="ChristianAzinn/mxbai-embed-large-v1-gguf",
            file_name="mxbai-embed-large-v1_fp16.gguf",
            sha256="819c2adf5ce6df2b6bd2ae4ca90d2a69f060afeb438d0c171db57daa02e39c3d",
            size_in_bytes=669_603_712,
        ),
        licence="apache-2.0",
        n_dims=1024,
        window=512,
        query_prompt="Represent this sentence for searching relevant passages: ",
    ),
    CatalogueEntry(
        name="Qwen3-Embedding-0.6B",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="Qwen/Qwen3-Embedding-0.6B-GGUF",
            file_name="Qwen3-Embedding-0.6B-Q8_0.gguf",
            revision="370f27d7550e0def9b39c1f16d3fbaa13aa67728",
            sha256="06507c7b42688469c4e7298b0a1e16deff06caf291cf0a5b278c308249c3e439",
            size_in_bytes=639_150_592,
        ),
        licence="apache-2.0",
        n_dims=1024,
        window=32_768,
        pooling="last",
        query_prompt="Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    ),
    CatalogueEntry(
        name="embeddinggemma-300m",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="ggml-org/embeddinggemma-300M-GGUF",
            file_name="embeddinggemma-300M-Q8_0.gguf",
            revision="0f741b5a6585bd53aeb15cd1372c56f2a0f65e12",
            sha256="b5ce9d77a3fc4b3b39ccb5643c36777911cc4eb46a66962eadfa3f5f60490d63",
            size_in_bytes=333_590_944,
        ),
        licence="gemma",
        n_dims=768,
        query_prompt="task: search result | query: ",
        document_prompt="title: none | text: ",
    ),
    CatalogueEntry(
        name="snowflake-arctic-embed-l-v2.0",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="Casual-Autopsy/snowflake-arctic-embed-l-v2.0-gguf",
            file_name="snowflake-arctic-embed-l-v2.0-q8_0.gguf",
            sha256="0be8320ecb0fb6e205f0a1419ce3d468834bc44d02cbfda5fd171b3681b12597",
            size_in_bytes=634_554_752,
        ),
        licence="apache-2.0",
        n_dims=1024,
        window=8192,
        pooling="cls",
        query_prompt="query: ",
    ),
    CatalogueEntry(
        name="bge-reranker-v2-m3",
        kind=ModelKind.RERANKER,
        source=HubFile(
            repository="gpustack/bge-reranker-v2-m3-GGUF",
            file_name="bge-reranker-v2-m3-Q8_0.gguf",
            revision="3093af03b1a635e67b084b1d8c03c5f5e020fd05",
            sha256="a43c7c9b11a4c1517e5bf95151960e1621d1b72f7a493364b01e386cf1aaa1d3",
            size_in_bytes=635_676_416,
        ),
        licence="apache-2.0",
        pooling="rank",
    ),
    CatalogueEntry(
        name="llama2_7b_chat_uncensored",
        kind=ModelKind.EMBEDDING,
        source=HubFile(
            repository="TheBloke/llama2_7b_chat_uncensored-GGUF",
            file_name="llama2_7b_chat_uncensored.Q4_K_M.gguf",
            revision="b58448a7e5adf686db9c5021a501054f2d35b1be",
        ),
    ),
)

ENTRIES: Mapping[str, CatalogueEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every known model by its name, the default model first. A model's file is named after it: `<name>.gguf`."""
