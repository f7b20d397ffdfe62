"""OpenAI's embeddings API, as its official clients speak it.

The clients ask for base64 unless told otherwise, so that is the fast path: from the float32 buffer to text without a
Python float. A reply never holds floats where base64 was asked for: some clients read those as bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictInt

from embeddings_data_models import InputType
from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import OPENAI
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import count_tokens, describe_answers, encode_base64, render_json, shorten
from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.models import ModelService

router = APIRouter(prefix="/v1", tags=["OpenAI"])

INPUT_TYPES = {
    "query": InputType.QUERY,
    "search_query": InputType.QUERY,
    "document": InputType.DOCUMENT,
    "search_document": InputType.DOCUMENT,
    "passage": InputType.DOCUMENT,
}
TokenIds = list[Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]]


class OpenAIEmbeddingRequest(BaseModel):
    input: str | list[str] | TokenIds | list[TokenIds] = Field(
        description="A text or several. Token ids are taken where they are the model's own beyond doubt.",
        examples=[["I feel extremely chilly"]],
    )
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    encoding_format: Literal["float", "base64"] = Field("float", examples=["float"])
    dimensions: int | None = Field(None, ge=1, description="Keep so many dimensions, scaled to unit length again.")
    user: str | None = Field(None, description="Taken and ignored.")
    input_type: Literal["query", "search_query", "document", "search_document", "passage"] | None = Field(
        None,
        description="The part that the texts play, as several services of this dialect call it. Absent: none. What is "
        "embedded as a query is found by no search.",
    )


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
    responses=describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503, dialect=OPENAI),
)
async def create_embeddings(body: OpenAIEmbeddingRequest, request: Request, services: CurrentServices) -> Response:
    """Embeddings of one or many strings."""
    given = split_inputs(body.input, field="input")
    answers = await services.embeddings.get_or_compute(
        await services.tokenization.read_inputs(given, model_name=body.model, field="input"),
        model_name=body.model,
        input_type=INPUT_TYPES[body.input_type] if body.input_type is not None else None,
        stamp=stamp_connection(request),
        field="input",
    )
    encode = encode_base64 if body.encoding_format == "base64" else np.ascontiguousarray
    n_tokens = count_tokens(answers)
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(shorten(answer.vector, body.dimensions))}
            for index, answer in enumerate(answers)
        ],
        "model": body.model or services.models.resolve(None),
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return render_json(content, describe_answers(answers))


@router.get("/models", responses=describe_statuses(401, 500, dialect=OPENAI))
async def list_models(services: CurrentServices) -> OpenAIModelList:
    """The models that can be asked for, and their aliases."""
    return OpenAIModelList(data=[_describe(services.models, name) for name in services.models.names_and_aliases()])


@router.get("/models/{model:path}", responses=describe_statuses(401, 404, 422, 500, 502, 503, dialect=OPENAI))
async def retrieve_model(model: str, services: CurrentServices) -> OpenAIModel:
    """One model."""
    await services.models.check_known(model)
    return _describe(services.models, model)


def _describe(models: ModelService, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=models.created(name), owned_by="local")


def split_inputs(given: str | list[str] | TokenIds | list[TokenIds] | list[str | TokenIds], *, field: str) -> list:
    """A list with one string or one list of token ids per text. Raises InvalidInput for none at all."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidInput("The list of inputs is empty; send at least one string.", field=field)
    return [given] if isinstance(given[0], int) else given
