"""Replies that are sent while they are made, and work that ends when its caller goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from llama_embeddings.errors import RequestAbandoned
from llama_embeddings.services.downloads import StreamedDownload

Result = TypeVar("Result")

# A reply up to here is sent as a whole, with its length.
SMALL_REPLY_BYTES = 1024 * 1024


async def stream_reply(download: StreamedDownload, headers: dict[str, str] | None = None) -> Response:
    """A small reply as a whole, a large one as a stream.

    What fails within the first bytes is still an error with its status; what fails later breaks the connection off.
    """
    headers = {**download.headers, **(headers or {})}
    head: list[bytes] = []
    n_bytes = 0
    async for content in download.content:
        head.append(content)
        n_bytes += len(content)
        if n_bytes > SMALL_REPLY_BYTES:
            stream = _chain(head, download.content)
            return StreamingResponse(stream, media_type=download.media_type, headers=headers)
    return Response(b"".join(head), media_type=download.media_type, headers=headers)


async def _chain(head: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b"".join(head)
    head.clear()
    async for content in rest:
        yield content


async def run_while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; cancels it and raises RequestAbandoned when the caller goes away first.

    To be called when the request's body has been read. Work that others wait for as well goes on for them.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_for_disconnection(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestAbandoned("The client went away before the answer; its work was stopped.")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
