"""The routes of llama.cpp's own server that are about embeddings and tokens.

`/tokenize` is shared with TEI and stands in `shared_routes`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import LLAMA_CPP
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.openai import TokenIds, split_inputs
from llama_embeddings.api.replies import describe_answers, render_json
from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.container import Services

router = APIRouter(tags=["llama.cpp's server"])

COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503, dialect=LLAMA_CPP)
UNIT_LENGTH = 2


class LlamaCppEmbeddingRequest(BaseModel):
    content: str | TokenIds | list[str | TokenIds] = Field(examples=["I am so cold"])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    embd_normalize: int = Field(UNIT_LENGTH, description="2, unit length, is what is stored; others are refused.")


class LlamaCppEmbedding(BaseModel):
    index: int
    embedding: list[list[float]] = Field(description="One row: the pooled vector.")


class LlamaCppTokenizeRequest(BaseModel):
    content: str = Field(examples=["I am so cold"])
    add_special: bool = False
    parse_special: bool = Field(True, description="Taken and ignored: texts are read as the characters they are.")
    with_pieces: bool = False
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])


class LlamaCppPiece(BaseModel):
    id: int = Field(examples=[3147])
    piece: str = Field(examples=[" cold"])


class LlamaCppTokens(BaseModel):
    tokens: list[int] | list[LlamaCppPiece] = Field(examples=[[1045, 2572, 2061, 3147]])


class LlamaCppDetokenizeRequest(BaseModel):
    tokens: TokenIds = Field(examples=[[1045, 2572, 2061, 3147]])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])


class LlamaCppText(BaseModel):
    content: str = Field(examples=["i am so cold"])


@router.post("/embedding", response_model=list[LlamaCppEmbedding], responses=COMPUTING_ERRORS)
async def embed_content(body: LlamaCppEmbeddingRequest, request: Request, services: CurrentServices) -> Response:
    """The vector of each text."""
    if body.embd_normalize != UNIT_LENGTH:
        raise InvalidInput("Vectors are stored with unit length: embd_normalize must be 2.", field="embd_normalize")
    given = split_inputs(body.content, field="content")
    answers = await services.embeddings.get_or_compute(
        await services.tokenization.read_inputs(given, model_name=body.model, field="content"),
        model_name=body.model,
        stamp=stamp_connection(request),
        field="content",
    )
    content = [{"index": index, "embedding": [answer.vector]} for index, answer in enumerate(answers)]
    return render_json(content, describe_answers(answers))


async def tokenize(body: LlamaCppTokenizeRequest, services: Services) -> Response:
    """Ids, or ids with what they stand for."""
    if not body.content:
        return render_json({"tokens": []})
    [tokens] = await services.tokenization.tokenize(
        [body.content], model_name=body.model, adds_special=body.add_special, field="content"
    )
    listed: list[Any] = tokens.ids
    if body.with_pieces:
        listed = [{"id": token, "piece": piece} for token, piece in zip(tokens.ids, tokens.texts, strict=True)]
    return render_json({"tokens": listed})


@router.post("/detokenize", response_model=LlamaCppText, responses=COMPUTING_ERRORS)
async def detokenize(body: LlamaCppDetokenizeRequest, services: CurrentServices) -> Response:
    """The text that token ids stand for, special ones included."""
    if not body.tokens:
        return render_json({"content": ""})
    [text] = await services.tokenization.decode(
        [body.tokens], model_name=body.model, skips_special=False, field="tokens"
    )
    return render_json({"content": text})
