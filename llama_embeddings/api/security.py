"""Who may call: one dependency on the whole application."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyQuery, HTTPAuthorizationCredentials, HTTPBearer

from llama_embeddings.errors import InvalidToken

# Alive or not, and the page that lets people enter their token, are nobody's secret.
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
OPEN_PREFIXES = ("/static/",)

_bearer = HTTPBearer(auto_error=False, description="The server's token.")
_query = APIKeyQuery(name="token", auto_error=False, description="The server's token, as a query parameter.")


async def require_token(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    token: Annotated[str | None, Depends(_query)],
) -> None:
    """Let the caller pass if no token is asked for, or if the right one was sent. Raises InvalidToken."""
    expected: str | None = request.app.state.security_token
    if expected is None or is_open(request.url.path):
        return
    sent = bearer.credentials if bearer is not None else token
    if sent is None:
        raise InvalidToken("This server asks for a token: send `Authorization: Bearer TOKEN` or `?token=TOKEN`.")
    # Compared in constant time, so that the time of the answer says nothing about the token.
    if not hmac.compare_digest(sent.encode("utf-8", "surrogatepass"), expected.encode("utf-8")):
        raise InvalidToken("The token is wrong.")


def is_open(path: str) -> bool:
    """Whether a path answers without a token."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
