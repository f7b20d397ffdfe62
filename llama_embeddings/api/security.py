"""Who may call: one door in front of the whole application."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_embeddings import observability
from llama_embeddings.api.clients import Buckets, name_client, parse_address
from llama_embeddings.api.error_responses import render_error
from llama_embeddings.api.tokens import Tokens
from llama_embeddings.errors import InvalidToken, Overloaded, ServiceError

logger = logging.getLogger(__name__)

# Alive or not, and the page that lets people enter their token, are nobody's secret.
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIXES = ("/static/",)

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The server's token."},
    "token": {"type": "apiKey", "in": "query", "name": "token", "description": "The same as a query parameter."},
}


class RequireToken:
    """Lets nobody past without a token, whatever the path: also not to routes that do not exist.

    Outside of FastAPI's dependencies, so that no route can be without it and a request costs no more for it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens,
        open_paths: frozenset[str] = OPEN_PATHS,
        max_wrong_per_minute: int = 0,
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._open_paths = open_paths
        self._wrong = Buckets(max_wrong_per_minute) if max_wrong_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"], scope["method"], self._open_paths):
            refusal = self._find_refusal(scope)
            if refusal is not None:
                status = 429 if isinstance(refusal, Overloaded) else 401
                await render_error(Request(scope), status, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _find_refusal(self, scope: Scope) -> ServiceError | None:
        """Why a request's token does not open the door; None if it does."""
        sent = find_token(scope)
        if sent is None:
            return InvalidToken("This server asks for a token: send `Authorization: Bearer TOKEN` or `?token=TOKEN`.")
        wait = self._wrong.seconds_until_one(name_client(scope)) if self._wrong is not None else 0.0
        if wait:
            # Not even compared: who guesses learns nothing from here on.
            return Overloaded("Too many wrong tokens from your address; try again later.", retry_after_seconds=wait)
        holder = self._tokens.find_holder(sent)
        if holder is None:
            self._count_wrong(scope)
            return InvalidToken("The token is wrong.")
        observability.note_caller(holder)
        return None

    def _count_wrong(self, scope: Scope) -> None:
        # Behind an address that is not public there may be a proxy with everybody behind it.
        if self._wrong is not None and is_public(scope):
            self._wrong.take(name_client(scope))
        logger.warning("A wrong token from %s", scope["client"][0] if scope.get("client") else "an unknown address")


def is_public(scope: Scope) -> bool:
    """Whether a request comes from an address of the Internet rather than from this machine or its networks."""
    address = parse_address(scope["client"][0]) if scope.get("client") else None
    return address is not None and address.is_global


def find_token(scope: Scope) -> str | None:
    """The token of a request, from the header first."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, credentials = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and credentials.strip():
                return str(credentials.strip())
            break
    return Request(scope).query_params.get("token")


def describe_security(app: FastAPI, open_paths: frozenset[str]) -> None:
    """Put the two ways to send a token into the OpenAPI document, for every route that asks for one."""
    describe: Callable[[], dict[str, Any]] = app.openapi

    def describe_with_security() -> dict[str, Any]:
        description = describe()
        description.setdefault("components", {})["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in description["paths"].items():
            for method, operation in operations.items():
                operation["security"] = (
                    [] if is_open(path, method.upper(), open_paths) else [{name: []} for name in SECURITY_SCHEMES]
                )
        return description

    app.openapi = describe_with_security  # type: ignore[method-assign]


def is_open(path: str, method: str = "GET", open_paths: frozenset[str] = OPEN_PATHS) -> bool:
    """Whether a path answers without a token; what is open is only read."""
    return method in ("GET", "HEAD") and (path in open_paths or path.startswith(OPEN_PREFIXES))
