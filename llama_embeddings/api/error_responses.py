"""Failures to HTTP: one table of statuses, one body shape per dialect.

A class that is not in the table takes the row of its nearest ancestor. A failure that is none of ours is a 500 with its
request id; what it was goes to the log, not to the caller.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from embeddings_data_models import ErrorResponse
from llama_embeddings import errors, observability

logger = logging.getLogger(__name__)

STATUS_OF_ERROR: dict[type[errors.ServiceError], int] = {
    errors.InvalidInput: 400,
    errors.RequestTooLarge: 413,
    errors.UnsupportedDocumentType: 415,
    errors.UnreadableDocument: 422,
    errors.ResultNotAvailable: 409,
    errors.RequestAbandoned: 499,
    errors.NotFound: 404,
    errors.InvalidToken: 401,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.DownloadFailed: 502,
    errors.ServiceError: 500,
}

CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def status_of(error: errors.ServiceError) -> int:
    """The status of the nearest class in the table."""
    return next(STATUS_OF_ERROR[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUS_OF_ERROR)


def describe_statuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares for Swagger: these statuses answer with ErrorResponse."""
    return {status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses}


DESCRIPTIONS = {
    400: "The request is malformed; the message names what is wrong.",
    401: "The token is missing or wrong.",
    404: "The model is not known, and the message lists those that are; or there is no such job.",
    409: "The job has no result: it is not done, it failed or it was cancelled; the message says which.",
    413: "The request is larger than a setting allows; the message names it.",
    415: "Documents of this type are not supported; the message lists those that are.",
    422: "A field is missing or has a wrong type, or a document cannot be read.",
    429: "Too much is waiting already; `Retry-After` says when to try again.",
    499: "The client went away; nobody sees this but the log.",
    500: "A fault of the server; the log has it under the request id.",
    502: "A model could not be downloaded; the message says why.",
    503: "The model is loading, the store is busy or the server is stopping; `Retry-After` says when to try again.",
}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every failure of every route in the caller's dialect."""
    app.add_exception_handler(errors.ServiceError, _answer_service_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unknown)


async def _answer_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    status = status_of(error)
    if status >= 500:
        logger.log(logging.WARNING if status == 503 else logging.ERROR, "%s: %s", error.code, error.message)
    return render_error(request, status, error)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return render_error(request, 422, _describe_validation(error.errors()))


def _describe_validation(problems: Sequence[Any]) -> errors.InvalidInput:
    """One sentence for all problems; the first one's place. The caller's input is not repeated."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return errors.InvalidInput(f"The body is not valid JSON: {reason} at character {first['loc'][-1]}.")
    sentences = []
    for problem in problems:
        place = ".".join(str(part) for part in problem["loc"][1:]) or str(problem["loc"][0])
        sentences.append(f"{place}: {problem['msg']}")
    index = next((part for part in first["loc"] if isinstance(part, int)), None)
    # The first name is the parameter; what follows may be the variants of its type that were tried.
    field = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    return errors.InvalidInput("; ".join(sentences), field=field, index=index)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.ServiceError):
        # FastAPI wraps what happens while the body comes in, such as its being too large.
        return await _answer_service_error(request, error.__cause__)
    described = errors.InvalidInput(str(error.detail))
    response = render_error(request, error.status_code, described, code=CODE_OF_STATUS.get(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _answer_unknown(request: Request, error: Exception) -> Response:
    logger.error("Unexpected failure of %s %s", request.method, quote(request.url.path), exc_info=error)
    described = errors.ServiceError("The server failed to answer; its log has the reason under this request id.")
    return render_error(request, 500, described)


def native_body(status: int, error: errors.ServiceError, code: str) -> dict[str, Any]:
    """ErrorResponse, as the native endpoints answer."""
    return {
        "detail": error.message,
        "code": code,
        "field": error.field,
        "index": error.index,
        "request_id": observability.request_id.get(),
    }


def openai_body(status: int, error: errors.ServiceError, code: str) -> dict[str, Any]:
    """OpenAI's envelope; its clients read all four keys, and `param` is the place in the request."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    place = error.field if error.index is None else f"{error.field}[{error.index}]"
    return {"error": {"message": error.message, "type": kind, "param": place, "code": code}}


# By the beginning of the path; all other paths answer natively.
BODY_OF_DIALECT: dict[str, Callable[[int, errors.ServiceError, str], dict[str, Any]]] = {"/v1/": openai_body}


def render_error(request: Request, status: int, error: errors.ServiceError, *, code: str | None = None) -> Response:
    """The body in the dialect of the route, with the headers that the status calls for."""
    body = next((body for prefix, body in BODY_OF_DIALECT.items() if request.url.path.startswith(prefix)), native_body)
    content = body(status, error, code or error.code)
    headers: dict[str, str] = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status_code=status, headers=headers)
