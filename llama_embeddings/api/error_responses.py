"""Failures to HTTP: one table of statuses; the bodies are `dialects`' affair.

A class that is not in the table takes the row of its nearest ancestor. A failure that is none of ours is a 500 with its
request id; what it was goes to the log, not to the caller.
"""

from __future__ import annotations

import errno
import logging
import math
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llama_embeddings import errors, observability
from llama_embeddings.api.dialects import NATIVE, SMALL_SERVICES, Dialect, find_dialect
from llama_embeddings.api.validation_errors import describe_validation

logger = logging.getLogger(__name__)

STATUS_OF_ERROR: dict[type[errors.ServiceError], int] = {
    errors.InvalidInput: 400,
    errors.ReceiveTimeout: 408,
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


def describe_statuses(*statuses: int, dialect: Dialect = NATIVE) -> dict[int | str, dict[str, Any]]:
    """What a route declares for Swagger: these statuses answer with the dialect's error."""
    return {status: {"model": dialect.model, "description": DESCRIPTIONS[status]} for status in statuses}


DESCRIPTIONS = {
    400: "The request is malformed; the message names what is wrong.",
    401: "The token is missing or wrong.",
    404: "The model is not known, and the message lists those that are; or there is no such job or text.",
    408: "The body came in too slowly.",
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
    app.add_exception_handler(OSError, _answer_system_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unknown)


async def _answer_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    status = status_of(error)
    if isinstance(error, errors.ModelNotFound) and find_dialect(request.scope) is SMALL_SERVICES:
        status = 422  # these services' clients look for the model among what was wrong with the body
    if status >= 500:
        logger.log(logging.WARNING if status == 503 else logging.ERROR, "%s: %s", error.code, error.message)
    return render_error(request, status, error)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return render_error(request, 422, describe_validation(error.errors()), body=error.body)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.ServiceError):
        # FastAPI wraps what happens while the body comes in, such as its being too large.
        return await _answer_service_error(request, error.__cause__)
    described = errors.InvalidInput(str(error.detail))
    response = render_error(request, error.status_code, described, code=CODE_OF_STATUS.get(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Nobody reads it, but log and metrics say whose fault it was."""
    return render_error(request, 400, errors.InvalidInput("The client left before its request had come in."))


async def _answer_system_error(request: Request, error: Exception) -> Response:
    """Without a file descriptor to be had, nothing is wrong with request or program: it may succeed later."""
    assert isinstance(error, OSError)
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return await _answer_unknown(request, error)
    shortage = errors.Unavailable("The server has as many files and connections open as it may; try again later.")
    return await _answer_service_error(request, shortage)


async def _answer_unknown(request: Request, error: Exception) -> Response:
    logger.error("Unexpected failure of %s %s", request.method, quote(request.url.path), exc_info=error)
    described = errors.ServiceError("The server failed to answer; its log has the reason under this request id.")
    response = render_error(request, 500, described)
    # This reply does not pass through the middleware that puts the id on all others.
    response.headers["x-request-id"] = observability.request_id.get() or ""
    return response


def render_error(
    request: Request, status: int, error: errors.ServiceError, *, code: str | None = None, body: Any = None
) -> Response:
    """The body in the dialect of the request, with the headers that the status calls for."""
    dialect = find_dialect(request.scope, body)
    content = dialect.body(status, error, code or error.code)
    headers: dict[str, str] = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status_code=status, headers=headers)
