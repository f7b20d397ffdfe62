"""What every request passes through: its id, its line in the log, the bound on its body, the headers of its reply.

Pure ASGI, so that replies stream and the cost is microseconds. Query strings are never logged: they can hold tokens.
"""

from __future__ import annotations

import logging
import re
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_embeddings import observability
from llama_embeddings.errors import RequestTooLarge

logger = logging.getLogger(__name__)

_PLAUSIBLE_REQUEST_ID = re.compile(r"[\w\-.:]{1,128}")


class RequestContext:
    """Gives each request an id, says in the log how it ended and puts the id on the reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        current = _find_request_id(scope)
        observability.request_id.set(current)
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = current
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            milliseconds = 1000 * (time.monotonic() - started)
            level = logging.DEBUG if scope["path"] == "/health" else logging.INFO
            # Quoted again: a path can hold line breaks that would look like lines of the log's own.
            logger.log(level, "%s %s %d in %.1f ms", scope["method"], quote(scope["path"]), status, milliseconds)


def _find_request_id(scope: Scope) -> str:
    """The caller's id if it sent a plausible one, else a new one."""
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if _PLAUSIBLE_REQUEST_ID.fullmatch(sent) else observability.new_request_id()


class BodyLimit:
    """Refuses bodies over a bound: by their announced length at once, else while they come in."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        received = int(announced) if announced.isdigit() and int(announced) > self._max_bytes else 0

        async def receive_bounded() -> Message:
            nonlocal received
            if received > self._max_bytes:
                raise self._refusal()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._refusal()
            return message

        await self._app(scope, receive_bounded, send)

    def _refusal(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The request's body is larger than {self._max_bytes} bytes (MAX_REQUEST_SIZE_IN_MB). "
            "Send it in parts, or raise the setting."
        )
