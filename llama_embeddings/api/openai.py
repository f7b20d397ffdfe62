"""OpenAI's embeddings API, as its official clients speak it.

The clients ask for base64 unless told otherwise, so that is the fast path: from the float32 buffer to text without a
Python float. A reply never holds floats where base64 was asked for: some clients read those as bytes.
"""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.native import describe_answers, render_json
from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.models import ModelService

router = APIRouter(prefix="/v1", tags=["OpenAI"])

REFUSAL_OF_NUMBERS = (
    "Token ids are not taken: they belong to another model's vocabulary. Send strings; LangChain's OpenAIEmbeddings "
    "does so with check_embedding_ctx_length=False."
)


class OpenAIEmbeddingRequest(BaseModel):
    input: str | list[str] | list[int] | list[list[int]] = Field(examples=[["I feel extremely chilly"]])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    encoding_format: Literal["float", "base64"] = Field("float", examples=["float"])
    dimensions: int | None = Field(None, ge=1, description="Keep so many dimensions, scaled to unit length again.")
    user: str | None = None


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int = Field(examples=[0])
    embedding: list[float] | str = Field(description="Floats, or little-endian float32 in base64.")


class OpenAIUsage(BaseModel):
    prompt_tokens: int = Field(examples=[6])
    total_tokens: int = Field(examples=[6])


class OpenAIEmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    id: str = Field(examples=["all-MiniLM-L6-v2"])
    object: Literal["model"] = "model"
    created: int = Field(examples=[1700000000])
    owned_by: str = Field(examples=["local"])


class OpenAIModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


@router.post(
    "/embeddings",
    response_model=OpenAIEmbeddingResponse,
    responses=describe_statuses(400, 401, 404, 413, 422, 429, 500, 503),
)
async def create_embeddings(body: OpenAIEmbeddingRequest, request: Request, services: CurrentServices) -> Response:
    """Embeddings of one or many strings."""
    answers = await services.embeddings.get_or_compute(
        read_input(body.input), model_name=body.model, stamp=stamp_connection(request), field="input"
    )
    vectors = [shorten(answer.vector, body.dimensions) for answer in answers]
    encode = encode_base64 if body.encoding_format == "base64" else np.ascontiguousarray
    n_tokens = sum(answer.embedding.n_tokens for answer in answers)
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": body.model or services.models.resolve(None),
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return render_json(content, describe_answers(answers))


@router.get("/models", responses=describe_statuses(401))
async def list_models(services: CurrentServices) -> OpenAIModelList:
    """The models that can be asked for, and their aliases."""
    return OpenAIModelList(data=[_describe(services.models, name) for name in services.models.names_and_aliases()])


@router.get("/models/{model:path}", responses=describe_statuses(401, 404))
async def retrieve_model(model: str, services: CurrentServices) -> OpenAIModel:
    """One model."""
    await services.models.check_known(model)
    return _describe(services.models, model)


def _describe(models: ModelService, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=models.created(name), owned_by="local")


def read_input(given: str | list[str] | list[int] | list[list[int]]) -> list[str]:
    """The texts of a request. Raises InvalidInput for none at all and for token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidInput("The list of inputs is empty; send at least one string.", field="input")
    texts = [item for item in given if isinstance(item, str)]
    if len(texts) < len(given):
        raise InvalidInput(REFUSAL_OF_NUMBERS, field="input")
    return texts


def shorten(vector: np.ndarray, n_dims: int | None) -> np.ndarray:
    """The first `n_dims` of float32 (n_dims,), scaled to unit length again. Raises InvalidInput if it has fewer."""
    if n_dims is None or n_dims == len(vector):
        return vector
    if n_dims > len(vector):
        raise InvalidInput(f"The model has {len(vector)} dimensions, {n_dims} were asked for.", field="dimensions")
    kept = vector[:n_dims]
    return kept / np.linalg.norm(kept)


def encode_base64(vector: np.ndarray) -> str:
    """Little-endian float32 bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
