"""Who may call: one door in front of the whole application."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_embeddings.api.error_responses import render_error
from llama_embeddings.errors import InvalidToken

# Alive or not, and the page that lets people enter their token, are nobody's secret.
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIXES = ("/static/",)

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The server's token."},
    "token": {"type": "apiKey", "in": "query", "name": "token", "description": "The same as a query parameter."},
}


class RequireToken:
    """Lets nobody past without the token, whatever the path: also not to routes that do not exist.

    Outside of FastAPI's dependencies, so that no route can be without it and a request costs no more for it.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token is not None and scope["type"] == "http" and not is_open(scope["path"], scope["method"]):
            request = Request(scope)
            refusal = find_refusal(find_token(request), self._token)
            if refusal is not None:
                await render_error(request, 401, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def find_refusal(sent: str | None, expected: str) -> InvalidToken | None:
    """Why a token does not open the door; None if it does."""
    if sent is None:
        return InvalidToken("This server asks for a token: send `Authorization: Bearer TOKEN` or `?token=TOKEN`.")
    # Compared in constant time, so that the time of the answer says nothing about the token.
    if not hmac.compare_digest(sent.encode("utf-8", "surrogatepass"), expected.encode("utf-8")):
        return InvalidToken("The token is wrong.")
    return None


def find_token(request: Request) -> str | None:
    """The token of a request, from the header first."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return request.query_params.get("token")


def describe_security(app: FastAPI) -> None:
    """Put the two ways to send a token into the OpenAPI document, for every route that asks for one."""
    describe = app.openapi

    def describe_with_security() -> dict[str, Any]:
        description = describe()
        description.setdefault("components", {})["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in description["paths"].items():
            for method, operation in operations.items():
                operation["security"] = (
                    [] if is_open(path, method.upper()) else [{name: []} for name in SECURITY_SCHEMES]
                )
        return description

    app.openapi = describe_with_security  # type: ignore[method-assign]


def is_open(path: str, method: str = "GET") -> bool:
    """Whether a path answers without a token; what is open is only read."""
    return method in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_PREFIXES))
