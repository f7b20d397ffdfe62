"""What becomes of requests that the server cannot finish before it ends.

How long the server waits for requests under way, before it cancels them, is decided where it is started. Cancellations
of any other origin pass through.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_embeddings.api.error_responses import render_error, status_of
from llama_embeddings.errors import ShuttingDown

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5.0


class AnswerWhenStopped:
    """Answers requests that are given up at the end with 503 and a time to come again, in their dialect."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            # Half a reply says it by the end of the connection.
            if has_begun or not scope["app"].state.services.readiness.is_stopping:
                raise
            error = ShuttingDown(
                "The server is shutting down and could not finish this request; send it again.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
            logger.warning("Gave up a request: %s", error.message)
            await render_error(Request(scope), status_of(error), error)(scope, receive, send)
