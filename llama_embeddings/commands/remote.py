"""A running server as the commands see it: documents are submitted as jobs and waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import httpx2

from llama_embeddings.commands.found_files import FoundFile
from llama_embeddings.errors import ServiceError, Unavailable, UnsupportedDocumentType
from llama_embeddings.services.embeddings import Source

DOCUMENT_PATH = "/get_all_embedding_vectors_for_document/"
POLL_SECONDS = 0.5
REQUEST_TIMEOUT_SECONDS = 120.0


class RemoteServer:
    """An HTTP client of one server; a context."""

    def __init__(
        self, url: str, *, token: str, model_name: str | None, collection: str, transport: Any | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=REQUEST_TIMEOUT_SECONDS, transport=transport
        )
        self._query = {"background": "true"}
        if model_name is not None:
            self._query["model_name"] = model_name
        if collection != "default":
            self._query["corpus_identifier_string"] = collection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def take(self, file: FoundFile, report: Callable[[float], None]) -> tuple[Source, int]:
        """Submit a file, waiting while the server has no room, and see its job through.

        Raises UnsupportedDocumentType, and ServiceError for everything else that goes wrong.
        """
        while True:
            try:
                job = await self._submit(file)
                break
            except Unavailable as error:
                await asyncio.sleep(error.retry_after_seconds)
        path = job["links"]["self"]
        while job["state"] in ("waiting", "running"):
            if job["n_sentences_total"]:
                report(job["n_sentences_done"] / job["n_sentences_total"])
            await asyncio.sleep(POLL_SECONDS)
            job = await self._ask("GET", path)
        if job["state"] != "done":
            error_of_job = job["error"] or {"code": "cancelled", "detail": "The job was cancelled."}
            raise _make_error(error_of_job["code"], error_of_job["detail"])
        return Source(job["source"]), int(job["n_sentences_done"])

    async def _submit(self, file: FoundFile) -> dict[str, Any]:
        with file.path.open("rb") as opened:
            return await self._ask("POST", DOCUMENT_PATH, params=self._query, files={"file": (file.name, opened)})

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path, **options)
        except httpx2.TransportError as error:
            raise ServiceError(f"The server cannot be reached: {error}.") from error
        if response.is_success:
            return dict(response.json())
        detail = _read_detail(response)
        if response.status_code in (429, 503):
            raise Unavailable(detail["detail"], retry_after_seconds=float(response.headers.get("retry-after", 1)))
        raise _make_error(detail["code"], detail["detail"])


def _read_detail(response: httpx2.Response) -> dict[str, str]:
    try:
        content = response.json()
        return {"code": str(content["code"]), "detail": str(content["detail"])}
    except (ValueError, KeyError, TypeError):
        return {"code": "", "detail": f"The server answered with status {response.status_code}."}


def _make_error(code: str, detail: str) -> ServiceError:
    return UnsupportedDocumentType(detail) if code == UnsupportedDocumentType.code else ServiceError(detail)
