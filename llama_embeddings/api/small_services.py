"""Two paths without prefix, as three small embedding services have them, whose clients go on working.

`POST /embeddings` without a `model` and with a single string answers with the bare vector, everything else with an
object that has the fields of the service that lists its models and OpenAI's beside them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import SMALL_SERVICES
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.openai import OpenAIUsage, split_inputs
from llama_embeddings.api.replies import count_tokens, describe_answers, render_json

router = APIRouter(tags=["Small services"])


class ModelDimensions(BaseModel):
    dim: int | None = Field(examples=[384])


class ModelsByName(BaseModel):
    models: dict[str, ModelDimensions]


class ModelsResponse(BaseModel):
    data: ModelsByName
    generated: str = Field(examples=["2023-12-02 @ 20:39:22"])
    id: str


class EmbeddingsRequest(BaseModel):
    input: str | list[str] = Field(examples=["I am so cold"])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])


class CountedEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int = Field(examples=[0])
    embedding: list[float]
    num_tokens: int = Field(examples=[6])


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[CountedEmbedding]
    generated: str = Field(examples=["2023-12-02 @ 20:50:04"])
    id: str
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    usage: OpenAIUsage


@router.get("/models", responses=describe_statuses(401, 500, dialect=SMALL_SERVICES))
async def list_model_dimensions(services: CurrentServices) -> ModelsResponse:
    """The models that are there, and how many dimensions their vectors have."""
    present = set(services.models.names())
    described = [model for model in await services.models.describe() if model.model_name in present]
    found = {model.model_name: ModelDimensions(dim=model.n_dims) for model in described}
    return ModelsResponse(data=ModelsByName(models=found), generated=_say_now(), id=str(uuid4()))


@router.post(
    "/embeddings",
    response_model=EmbeddingsResponse | list[float],
    responses=describe_statuses(400, 401, 413, 422, 429, 500, 502, 503, dialect=SMALL_SERVICES),
)
async def embed(body: EmbeddingsRequest, request: Request, services: CurrentServices) -> Response:
    """The bare vector of a single string if no model is named, else an object."""
    answers = await services.embeddings.get_or_compute(
        split_inputs(body.input, field="input"),
        model_name=body.model,
        stamp=stamp_connection(request),
        field="input",
    )
    headers = describe_answers(answers)
    if body.model is None and isinstance(body.input, str):
        return render_json(answers[0].vector, headers)
    n_tokens = count_tokens(answers)
    content = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": answer.vector,
                "num_tokens": answer.embedding.n_tokens,
            }
            for index, answer in enumerate(answers)
        ],
        "generated": _say_now(),
        "id": str(uuid4()),
        "model": body.model or services.models.resolve(None),
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return render_json(content, headers)


def _say_now() -> str:
    """UTC, in these services' own form."""
    return datetime.now(UTC).strftime("%Y-%m-%d @ %H:%M:%S")
