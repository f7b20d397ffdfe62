"""Ollama's API, as far as it is about embeddings and models, as its official clients speak it.

Tags: a model is known by its own name and with `:latest` behind it. `options` and `keep_alive` are taken and ignored:
the window is the server's setting, and models stay loaded until others need their place.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from embeddings_data_models import ModelDescription, Truncation
from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import OLLAMA
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import count_tokens, describe_answers, render_json, shorten
from llama_embeddings.services.container import Services
from llama_embeddings.services.models import ModelService

router = APIRouter(prefix="/api", tags=["Ollama"])

COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503, dialect=OLLAMA)
LISTING_ERRORS = describe_statuses(401, 500, dialect=OLLAMA)
DEFAULT_TAG = ":latest"
NEVER = datetime(9999, 1, 1, tzinfo=UTC)


class OllamaRequest(BaseModel):
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    options: dict[str, Any] | None = Field(None, description="Taken and ignored.")
    keep_alive: float | str | None = Field(None, description="Taken and ignored.")


class OllamaEmbedRequest(OllamaRequest):
    input: str | list[str] = Field(examples=["I am so cold"])
    truncate: bool | None = Field(None, description="False refuses a text longer than the window; else it is cut.")
    dimensions: int | None = Field(None, ge=0, description="Keep so many dimensions; 0 for all.")


class OllamaEmbedResponse(BaseModel):
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    embeddings: list[list[float]]
    total_duration: int = Field(description="In nanoseconds.")
    load_duration: int = Field(description="In nanoseconds; always 0.")
    prompt_eval_count: int = Field(description="Tokens, the special ones included.", examples=[6])


class OllamaPromptRequest(OllamaRequest):
    prompt: str = Field(examples=["I am so cold"])


class OllamaPromptResponse(BaseModel):
    embedding: list[float]


class OllamaVersion(BaseModel):
    version: str = Field(examples=["0.1.0"])


class OllamaDetails(BaseModel):
    parent_model: str = ""
    format: str = "gguf"
    family: str = Field(examples=["bert"])
    families: list[str] = Field(examples=[["bert"]])
    parameter_size: str = ""
    quantization_level: str = ""


class OllamaModel(BaseModel):
    name: str = Field(examples=["all-MiniLM-L6-v2:latest"])
    model: str = Field(examples=["all-MiniLM-L6-v2:latest"])
    modified_at: datetime
    size: int = Field(description="In bytes.", examples=[27060352])
    digest: str = Field(description="SHA-256 of the model's file.")
    details: OllamaDetails


class OllamaModelList(BaseModel):
    models: list[OllamaModel]


class OllamaLoadedModel(OllamaModel):
    size_vram: int = 0
    expires_at: datetime


class OllamaLoadedModelList(BaseModel):
    models: list[OllamaLoadedModel]


class OllamaShowRequest(BaseModel):
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    name: str | None = Field(None, description="Older clients' word for `model`.")
    verbose: bool | None = None


class OllamaShowResponse(BaseModel):
    modelfile: str
    parameters: str
    template: str
    license: str
    details: OllamaDetails
    model_info: dict[str, Any] = Field(examples=[{"general.architecture": "bert", "bert.embedding_length": 384}])
    capabilities: list[str] = Field(examples=[["embedding"]])
    modified_at: datetime

    model_config = {"protected_namespaces": ()}


def read_name(models: ModelService, name: str) -> str:
    """The model's name without the tag that stands for the newest, unless there is one of exactly that name."""
    if name.endswith(DEFAULT_TAG) and name not in models.names_and_aliases():
        return name.removesuffix(DEFAULT_TAG)
    return name


@router.post("/embed", response_model=OllamaEmbedResponse, responses=COMPUTING_ERRORS)
async def embed(body: OllamaEmbedRequest, request: Request, services: CurrentServices) -> Response:
    """Vectors of one or many texts; none for an empty list, with which clients load a model."""
    started = time.perf_counter_ns()
    texts = [body.input] if isinstance(body.input, str) else body.input
    name = read_name(services.models, body.model)
    if not texts:
        await services.models.info(name)
    answers = await services.embeddings.get_or_compute(
        texts,
        model_name=name,
        truncation=Truncation.REFUSE if body.truncate is False else Truncation.RIGHT,
        stamp=stamp_connection(request),
        field="input",
    )
    content = {
        "model": body.model,
        "embeddings": [shorten(answer.vector, body.dimensions or None) for answer in answers],
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": 0,
        "prompt_eval_count": count_tokens(answers),
    }
    return render_json(content, describe_answers(answers))


@router.post("/embeddings", response_model=OllamaPromptResponse, responses=COMPUTING_ERRORS)
async def embed_prompt(body: OllamaPromptRequest, request: Request, services: CurrentServices) -> Response:
    """The vector of one text, as older clients ask for it."""
    answers = await services.embeddings.get_or_compute(
        [body.prompt],
        model_name=read_name(services.models, body.model),
        truncation=Truncation.RIGHT,
        stamp=stamp_connection(request),
        field="prompt",
    )
    return render_json({"embedding": answers[0].vector}, describe_answers(answers))


@router.get("/version", responses=LISTING_ERRORS)
async def get_version(request: Request) -> OllamaVersion:
    """This server's version."""
    return OllamaVersion(version=request.app.version)


@router.get("/tags", responses=LISTING_ERRORS)
async def list_models(services: CurrentServices) -> OllamaModelList:
    """The models that are there."""
    return OllamaModelList(models=[OllamaModel(**facts) for facts in await _list(services, is_loaded=False)])


@router.get("/ps", responses=LISTING_ERRORS)
async def list_loaded_models(services: CurrentServices) -> OllamaLoadedModelList:
    """The models in memory. They stay there until others need their place."""
    loaded = await _list(services, is_loaded=True)
    return OllamaLoadedModelList(models=[OllamaLoadedModel(**facts, expires_at=NEVER) for facts in loaded])


async def _list(services: Services, *, is_loaded: bool) -> list[dict[str, Any]]:
    present = set(services.models.names())
    return [
        await _describe(services.models, model)
        for model in await services.models.describe()
        if model.model_name in present and model.architecture and (model.state == "loaded" or not is_loaded)
    ]


async def _describe(models: ModelService, model: ModelDescription) -> dict[str, Any]:
    tagged = model.model_name + DEFAULT_TAG
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": datetime.fromtimestamp(models.created(model.model_name), UTC),
        "size": model.size_in_bytes or 0,
        "digest": await models.digest(model.model_name),
        "details": _describe_format(model),
    }


def _describe_format(model: ModelDescription) -> OllamaDetails:
    family = model.architecture or ""
    return OllamaDetails(family=family, families=[family])


@router.post("/show", responses=describe_statuses(400, 401, 404, 413, 422, 500, 502, 503, dialect=OLLAMA))
async def show_model(body: OllamaShowRequest, services: CurrentServices) -> OllamaShowResponse:
    """Facts about a model."""
    model = await services.models.describe_one(read_name(services.models, body.model or body.name or ""))
    family = model.architecture or ""
    return OllamaShowResponse(
        modelfile="",
        parameters="",
        template="",
        license=model.licence or "",
        details=_describe_format(model),
        model_info={
            "general.architecture": family,
            f"{family}.embedding_length": model.n_dims,
            f"{family}.context_length": model.window,
        },
        capabilities=["embedding"] if model.kind == "embedding" else [],
        modified_at=datetime.fromtimestamp(services.models.created(model.model_name), UTC),
    )
