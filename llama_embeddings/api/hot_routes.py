"""Short ways to the endpoints that are asked thousands of times a second.

FastAPI takes longer over a small request (its routing, its dependencies, its stacks of exits) than finding a cached
embedding and writing it as JSON takes. A hot route goes around it: it reads the body by the same model and calls the
same handler. It takes plain requests only: JSON by name, and one spelling of the query, mostly none. Everything else,
and every body that the model refuses, goes FastAPI's way, so that there is one description, one validation and one
shape of errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from embeddings_data_models import EmbeddingRequest, TokenLevelRequest
from llama_embeddings.api import native, openai
from llama_embeddings.api.dependencies import stamp_connection

Body = TypeVar("Body", bound=BaseModel)

# In a request's scope: FastAPI is to have it.
_GOES_THE_LONG_WAY = "llama_embeddings.long_way"


class HotRoute(Route):
    """One path with one query, answered by a function of the parsed body and the request."""

    def __init__(
        self,
        path: str,
        model: type[Body],
        answer: Callable[[Body, Request], Awaitable[Response]],
        *,
        query: bytes = b"",
    ) -> None:
        super().__init__(path, self._answer_unread, methods=["POST"], include_in_schema=False)
        self._model = model
        self._query = query
        self._answer = answer

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Plain requests alone; never a partial match, which would answer other methods with 405."""
        if (
            scope["type"] == "http"
            and scope["path"] == self.path
            and scope["method"] == "POST"
            and scope["query_string"] == self._query
            and (b"content-type", b"application/json") in scope["headers"]
            and _GOES_THE_LONG_WAY not in scope
        ):
            return Match.FULL, {"endpoint": self.endpoint, "route": self}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        content = await request.body()
        try:
            body = self._model.model_validate_json(content)
        except ValidationError:
            scope[_GOES_THE_LONG_WAY] = True
            await request.app.router(scope, replay(content, receive), send)
            return
        response = await self._answer(body, request)
        await response(scope, receive, send)

    async def _answer_unread(self, request: Request) -> Response:
        raise NotImplementedError("a hot route answers in `handle`")


def replay(content: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _answer_native(body: EmbeddingRequest, request: Request) -> Response:
    return await native.get_embedding_vector_for_string(body, request.app.state.services, stamp_connection(request))


async def _answer_token_level(body: TokenLevelRequest, request: Request) -> Response:
    return await native.get_token_level_embeddings_matrix_and_combined_feature_vector_for_string(
        body, request.app.state.services, stamp_connection(request), send_back_json_or_zip_file="json"
    )


async def _answer_openai(body: openai.OpenAIEmbeddingRequest, request: Request) -> Response:
    return await openai.create_embeddings(body, request, request.app.state.services)


def add_hot_routes(app: FastAPI) -> None:
    """Put them in front of all other routes."""
    app.router.routes[:0] = [
        HotRoute("/get_embedding_vector_for_string/", EmbeddingRequest, _answer_native),
        HotRoute("/v1/embeddings", openai.OpenAIEmbeddingRequest, _answer_openai),
        HotRoute(
            "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/",
            TokenLevelRequest,
            _answer_token_level,
            query=b"send_back_json_or_zip_file=json",
        ),
    ]
