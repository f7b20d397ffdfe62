"""Paths that two dialects share: the body tells which one is spoken, and reply and errors are in that one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from llama_embeddings.api import cohere, llama_cpp_server, tei
from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import LLAMA_CPP, RERANK, TEI, LlamaCppError, TeiError, speak
from llama_embeddings.api.error_responses import describe_statuses

router = APIRouter()

_STATUSES = (400, 401, 404, 413, 422, 429, 500, 502, 503)
_TOKENIZE_ERRORS = describe_statuses(*_STATUSES, dialect=TEI)
for _described in _TOKENIZE_ERRORS.values():
    _described["model"] = TeiError | LlamaCppError


def _choose_by(field: str, if_there: str, otherwise: str) -> Discriminator:
    def choose(body: Any) -> str:
        return if_there if isinstance(body, dict) and field in body else otherwise

    return Discriminator(choose)


RerankBody = Annotated[
    Annotated[cohere.RerankRequest, Tag("RerankRequest")] | Annotated[tei.TeiRerankRequest, Tag("TeiRerankRequest")],
    _choose_by("documents", "RerankRequest", "TeiRerankRequest"),
]
TokenizeBody = Annotated[
    Annotated[llama_cpp_server.LlamaCppTokenizeRequest, Tag("LlamaCppTokenizeRequest")]
    | Annotated[tei.TeiTokenizeRequest, Tag("TeiTokenizeRequest")],
    _choose_by("content", "LlamaCppTokenizeRequest", "TeiTokenizeRequest"),
]


@router.post(
    "/rerank",
    tags=["TEI", "Cohere and Jina"],
    response_model=list[tei.TeiRank] | cohere.RerankResponse,
    responses=describe_statuses(*_STATUSES, dialect=RERANK),
)
async def rerank(body: Annotated[RerankBody, Body()], request: Request, services: CurrentServices) -> Response:
    """With `texts` as TEI answers, with `documents` as Jina and Cohere do."""
    if isinstance(body, tei.TeiRerankRequest):
        return await tei.rerank(body, services, stamp_connection(request))
    return await cohere.rerank(body, services, stamp_connection(request), "2")


@router.post(
    "/tokenize",
    tags=["TEI", "llama.cpp's server"],
    response_model=list[list[tei.TeiToken]] | llama_cpp_server.LlamaCppTokens,
    responses=_TOKENIZE_ERRORS,
)
async def tokenize(body: Annotated[TokenizeBody, Body()], request: Request, services: CurrentServices) -> Response:
    """With `inputs` as TEI answers, with `content` as llama.cpp's server does."""
    if isinstance(body, tei.TeiTokenizeRequest):
        return await tei.tokenize(body, services)
    speak(request.scope, LLAMA_CPP)
    return await llama_cpp_server.tokenize(body, services)
