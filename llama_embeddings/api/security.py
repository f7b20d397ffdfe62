"""Who may call: one dependency on the whole application."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request

from llama_embeddings.errors import InvalidToken

# Alive or not, and the page that lets people enter their token, are nobody's secret.
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIXES = ("/static/",)

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The server's token."},
    "token": {"type": "apiKey", "in": "query", "name": "token", "description": "The same as a query parameter."},
}


async def require_token(request: Request) -> None:
    """Let the caller pass if no token is asked for, or if the right one was sent. Raises InvalidToken."""
    expected: str | None = request.app.state.security_token
    if expected is None or is_open(request.url.path):
        return
    sent = find_token(request)
    if sent is None:
        raise InvalidToken("This server asks for a token: send `Authorization: Bearer TOKEN` or `?token=TOKEN`.")
    # Compared in constant time, so that the time of the answer says nothing about the token.
    if not hmac.compare_digest(sent.encode("utf-8", "surrogatepass"), expected.encode("utf-8")):
        raise InvalidToken("The token is wrong.")


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
            for operation in operations.values():
                operation["security"] = [] if is_open(path) else [{name: []} for name in SECURITY_SCHEMES]
        return description

    app.openapi = describe_with_security  # type: ignore[method-assign]


def is_open(path: str) -> bool:
    """Whether a path answers without a token."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
