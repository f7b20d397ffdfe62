"""How each dialect says that something is wrong: the shape of its error, and which dialect a request speaks.

A dialect is told by the path. Where two share a path, the request's body tells them apart, so that a refusal made
before the body was read has to choose: on `/rerank` it has the keys of all who ask there. Statuses are the same in all
dialects but one; they are decided in `error_responses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.types import Scope

from embeddings_data_models import ErrorResponse
from llama_embeddings import observability
from llama_embeddings.errors import ModelNotFound, ServiceError

ErrorBody = dict[str, Any]
SCOPE_KEY = "dialect"


@dataclass(frozen=True, slots=True)
class Dialect:
    """A name for people, the body of an error by status, failure and code, and its model for the OpenAPI document."""

    name: str
    body: Callable[[int, ServiceError, str], ErrorBody]
    model: type[BaseModel]


def _place(error: ServiceError) -> str | None:
    """Where in the request, as the dialects name the model's field."""
    field = "model" if error.field == "model_name" else error.field
    return field if error.index is None or field is None else f"{field}[{error.index}]"


def _is_callers(status: int) -> bool:
    return status < 500 and status != 429


class OpenAIErrorDetail(BaseModel):
    message: str = Field(description="What was wrong and what to do.")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The place in the request.", examples=["input[3]"])
    code: str | None = Field(examples=["model_not_found"])


class OpenAIError(BaseModel):
    """OpenAI's envelope; its clients read all four keys."""

    error: OpenAIErrorDetail


def openai_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    kind = "invalid_request_error" if _is_callers(status) else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": _place(error), "code": code}}


class CohereError(BaseModel):
    """As Cohere's clients hand it on."""

    message: str
    code: str = Field(examples=["model_not_found"])
    param: str | None = Field(description="The place in the request.", examples=["texts[3]"])


def cohere_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    return {"message": error.message, "code": code, "param": _place(error)}


TeiErrorType = Literal["Validation", "Overloaded", "Unhealthy", "Backend"]


class TeiError(BaseModel):
    """Text Embeddings Inference's."""

    error: str
    error_type: TeiErrorType


def _tei_type(status: int) -> TeiErrorType:
    kinds: dict[int, TeiErrorType] = {429: "Overloaded", 503: "Unhealthy"}
    return kinds.get(status, "Backend" if status >= 500 else "Validation")


def tei_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    return {"error": error.message, "error_type": _tei_type(status)}


class RerankError(BaseModel):
    """The keys of all dialects that ask on `/rerank`: TEI's, Jina's and Cohere's."""

    error: str
    error_type: TeiErrorType
    message: str
    detail: str
    code: str


def rerank_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    return tei_body(status, error, code) | {"message": error.message, "detail": error.message, "code": code}


class OllamaError(BaseModel):
    error: str = Field(examples=["model 'x' not found; known models: all-MiniLM-L6-v2"])


def ollama_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    if isinstance(error, ModelNotFound):
        return {"error": f"model {error.model_name!r} not found; known models: {', '.join(error.known) or 'none'}"}
    return {"error": error.message}


class LlamaCppErrorDetail(BaseModel):
    code: int = Field(description="The status.", examples=[400])
    message: str
    type: str = Field(examples=["invalid_request_error"])


class LlamaCppError(BaseModel):
    """llama.cpp's server's."""

    error: LlamaCppErrorDetail


_LLAMA_CPP_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "unavailable_error",
    503: "unavailable_error",
}


def llama_cpp_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    kind = _LLAMA_CPP_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"code": status, "message": error.message, "type": kind}}


class SmallServiceProblem(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "model"]])
    msg: str = Field(examples=["The model 'x' is not available. Known models: all-MiniLM-L6-v2."])
    type: str = Field(examples=["model_not_found"])


class SmallServiceError(BaseModel):
    """FastAPI's own shape: problems with their places, or one sentence where there is no place."""

    detail: list[SmallServiceProblem] | str


def small_service_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    if error.field is None:
        return {"detail": error.message}
    field = "model" if error.field == "model_name" else error.field
    place: list[str | int] = ["body", field]
    if error.index is not None:
        place.append(error.index)
    return {"detail": [{"loc": place, "msg": error.message, "type": code}]}


def native_body(status: int, error: ServiceError, code: str) -> ErrorBody:
    """ErrorResponse, as the native endpoints answer."""
    return {
        "detail": error.message,
        "code": code,
        "field": error.field,
        "index": error.index,
        "request_id": observability.request_id.get(),
    }


NATIVE = Dialect("native", native_body, ErrorResponse)
OPENAI = Dialect("OpenAI", openai_body, OpenAIError)
COHERE = Dialect("Cohere", cohere_body, CohereError)
TEI = Dialect("TEI", tei_body, TeiError)
RERANK = Dialect("Rerank", rerank_body, RerankError)
OLLAMA = Dialect("Ollama", ollama_body, OllamaError)
LLAMA_CPP = Dialect("llama.cpp", llama_cpp_body, LlamaCppError)
SMALL_SERVICES = Dialect("Small services", small_service_body, SmallServiceError)

DIALECT_OF_PATH = {
    "/v1/rerank": COHERE,
    "/v1/tokenize": COHERE,
    "/embed": TEI,
    "/embed_all": TEI,
    "/similarity": TEI,
    "/tokenize": TEI,
    "/decode": TEI,
    "/info": TEI,
    "/rerank": RERANK,
    "/embedding": LLAMA_CPP,
    "/detokenize": LLAMA_CPP,
    "/embeddings": SMALL_SERVICES,
    "/models": SMALL_SERVICES,
}
# Tried in this order for all other paths.
DIALECT_OF_PREFIX = {"/v1/": OPENAI, "/v2/": COHERE, "/api/": OLLAMA}


def find_dialect(scope: Scope, body: Any = None) -> Dialect:
    """The dialect of a request; `body` is what came in, where it was read already."""
    path = scope["path"]
    if path == "/" and scope["method"] == "POST":
        return TEI
    if path == "/tokenize" and SCOPE_KEY not in scope and isinstance(body, dict) and "content" in body:
        return LLAMA_CPP
    chosen: Dialect | None = scope.get(SCOPE_KEY) or DIALECT_OF_PATH.get(path)
    if chosen is not None:
        return chosen
    return next((dialect for prefix, dialect in DIALECT_OF_PREFIX.items() if path.startswith(prefix)), NATIVE)


def speak(scope: Scope, dialect: Dialect) -> None:
    """From here on this request's errors are answered in `dialect`: its body has told which one it is."""
    scope[SCOPE_KEY] = dialect
