"""What handlers ask for in their signatures.

All `async`, as others would take a turn through a thread pool each, and none asks for another: FastAPI's resolving of
dependencies is a good part of what a request costs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from embeddings_data_models import RequestStamp
from llama_embeddings.services.container import Services
from llama_embeddings.services.contents import ContentsService
from llama_embeddings.services.documents import DocumentService
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.search import SearchService
from llama_embeddings.services.similarity import SimilarityService
from llama_embeddings.services.token_embeddings import TokenEmbeddingService

LARGEST_INTEGER = 2**63 - 1  # the database's


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _stamp(
    request: Request,
    client_ip: Annotated[
        str | None, Query(max_length=64, description="Address to note as the caller's, instead of the connection's.")
    ] = None,
) -> RequestStamp:
    connected = request.client.host if request.client is not None else None
    return RequestStamp(ip_address=client_ip or connected)


Stamp = Annotated[RequestStamp, Depends(_stamp)]
ModelName = Annotated[str | None, Query(description="Only of this model; of all models if absent.")]
Limit = Annotated[int | None, Query(ge=1, le=LARGEST_INTEGER, description="How many at most; all if absent.")]
Offset = Annotated[int, Query(ge=0, le=LARGEST_INTEGER, description="How many to leave out first.")]
JsonFormat = Annotated[
    Literal["records", "split", "index", "columns", "values", "table"],
    Query(description="Orientation of the rows, as in pandas' `to_json`."),
]
ReplyAs = Annotated[Literal["json", "zip"], Query(description="JSON in the reply's body, or a zip file that holds it.")]


async def _models(request: Request) -> ModelService:
    return get_services(request).models


async def _contents(request: Request) -> ContentsService:
    return get_services(request).contents


async def _embeddings(request: Request) -> EmbeddingService:
    return get_services(request).embeddings


async def _token_embeddings(request: Request) -> TokenEmbeddingService:
    return get_services(request).token_embeddings


async def _documents(request: Request) -> DocumentService:
    return get_services(request).documents


async def _search(request: Request) -> SearchService:
    return get_services(request).search


async def _similarity(request: Request) -> SimilarityService:
    return get_services(request).similarity


Models = Annotated[ModelService, Depends(_models)]
Contents = Annotated[ContentsService, Depends(_contents)]
Embeddings = Annotated[EmbeddingService, Depends(_embeddings)]
TokenEmbeddings = Annotated[TokenEmbeddingService, Depends(_token_embeddings)]
Documents = Annotated[DocumentService, Depends(_documents)]
Search = Annotated[SearchService, Depends(_search)]
Similarities = Annotated[SimilarityService, Depends(_similarity)]
