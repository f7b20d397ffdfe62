"""Documents: every sentence with its place, and with its embedding."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, UploadFile
from fastapi.responses import JSONResponse, Response

from embeddings_data_models import DEFAULT_COLLECTION, JobDescription, SentencesResponse
from llama_embeddings.api.dependencies import CurrentServices, DocumentReplyAs, IntoCollection, JsonFormat, Stamp
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.streaming import run_while_connected, stream_reply
from llama_embeddings.services.document_files import DocumentFile
from llama_embeddings.services.downloads import JSON_TYPE, StreamedDownload, stream_sentences

router = APIRouter()

# Starlette keeps an upload of up to this size in memory, and a larger one in a temporary file.
UPLOAD_IN_MEMORY_BYTES = 1024 * 1024

BINARY = {"schema": {"type": "string", "format": "binary"}}
DOCUMENT_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON, or a file to take away.",
        "content": {"application/zip": BINARY, "application/vnd.apache.parquet": BINARY},
    },
}
READING_ERRORS = describe_statuses(400, 401, 413, 415, 422, 429, 500, 503)
DOCUMENT_ERRORS = describe_statuses(400, 401, 404, 413, 415, 422, 429, 500, 502, 503)
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": JobDescription, "description": "Accepted; `Location` is where to ask how far it is."}
}

InBackground = Annotated[bool, Query(description="Answer with a job at once instead of waiting for the result.")]


@router.post(
    "/get_all_embedding_vectors_for_document/",
    tags=["Documents"],
    response_class=Response,
    responses={**DOCUMENT_REPLIES, **ACCEPTED, **DOCUMENT_ERRORS},
)
@router.post(
    "/get_all_embeddings_for_document/",
    tags=["Older names"],
    deprecated=True,
    response_class=Response,
    responses={**DOCUMENT_REPLIES, **ACCEPTED, **DOCUMENT_ERRORS},
)
async def get_all_embedding_vectors_for_document(
    request: Request,
    file: UploadFile,
    services: CurrentServices,
    stamp: Stamp,
    model_name: str | None = None,
    corpus_identifier_string: IntoCollection = None,
    json_format: JsonFormat = "records",
    send_back_json_or_zip_file: DocumentReplyAs = "zip",
    background: InBackground = False,
) -> Response:
    """Every sentence of a document with its embedding, its page and its place in the text.

    Without `background` the call waits, and stops computing when the client goes away; what was computed stays.
    """
    document_file = await open_upload(file)
    collection = corpus_identifier_string or DEFAULT_COLLECTION
    with document_file:
        filename = file.filename or "document"
        if background:
            job = await services.jobs.submit(
                document_file, filename=filename, model_name=model_name, collection=collection, stamp=stamp
            )
            return accept(job)
        work = services.documents.get_or_compute(
            document_file, filename=filename, model_name=model_name, collection=collection, stamp=stamp
        )
        answer = await run_while_connected(request, work)
    download = await services.document_downloads.render(
        answer.document, json_format=json_format, kind=send_back_json_or_zip_file
    )
    return await stream_reply(download, {"x-embedding-source": str(answer.source)})


@router.post(
    "/convert_document_to_sentences/",
    tags=["Documents"],
    response_model=SentencesResponse,
    responses=READING_ERRORS,
)
async def convert_document_to_sentences(request: Request, file: UploadFile, services: CurrentServices) -> Response:
    """The sentences of a document, each with its page and its place in the text; nothing is embedded or kept."""
    with await open_upload(file) as document_file:
        document = await run_while_connected(request, services.documents.read(document_file, filename=file.filename))
    content = stream_sentences(document, filename=file.filename or "document")
    return await stream_reply(StreamedDownload(content, JSON_TYPE, {}))


async def open_upload(upload: UploadFile) -> DocumentFile:
    """The file that was sent, which outlives the request."""
    if upload.size is not None and upload.size <= UPLOAD_IN_MEMORY_BYTES:
        return DocumentFile.from_bytes(await upload.read())
    return DocumentFile.from_open_file(upload.file)


def accept(job: JobDescription) -> Response:
    return JSONResponse(job.model_dump(mode="json"), status_code=202, headers={"Location": job.links.self})
