"""Jobs: documents that are embedded in the background, watched, fetched and cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse

from embeddings_data_models import JobDescription, JobsResponse
from llama_embeddings.api.dependencies import (
    DEFAULT_PAGE_LIMIT,
    CurrentServices,
    DocumentReplyAs,
    JsonFormat,
    PageLimit,
)
from llama_embeddings.api.documents import DOCUMENT_REPLIES
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.streaming import stream_reply

router = APIRouter(prefix="/jobs", tags=["Jobs"])

JOB_ERRORS = describe_statuses(401, 404, 422, 503)
EVENT_STREAM = "text/event-stream"
# A proxy that buffered events would hold them back until the job is over.
EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@router.get("", response_model_exclude_unset=True, responses=describe_statuses(400, 401, 422))
async def list_jobs(
    services: CurrentServices,
    limit: PageLimit = DEFAULT_PAGE_LIMIT,
    cursor: Annotated[
        str | None, Query(max_length=100, description="The `next_cursor` of an earlier reply: go on from there.")
    ] = None,
) -> JobsResponse:
    """Every job that waits, runs or was finished lately, oldest first, by pages."""
    jobs, next_cursor = services.jobs.list_page(limit, cursor)
    return JobsResponse(jobs=jobs) if next_cursor is None else JobsResponse(jobs=jobs, next_cursor=next_cursor)


@router.get("/{job_id}", responses=JOB_ERRORS)
async def get_job(job_id: str, services: CurrentServices) -> JobDescription:
    """How far a job is, how fast it goes and how long it will take."""
    return services.jobs.get(job_id)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"description": "Events named `progress`.", "content": {EVENT_STREAM: {}}}, **JOB_ERRORS},
)
async def watch_job(job_id: str, services: CurrentServices) -> Response:
    """The same as server-sent events, one for each change, until the job is finished."""
    services.jobs.get(job_id)
    events = render_events(services.jobs.watch(job_id))
    return StreamingResponse(events, media_type=EVENT_STREAM, headers=EVENT_HEADERS)


@router.get(
    "/{job_id}/result",
    response_class=Response,
    responses={**DOCUMENT_REPLIES, **JOB_ERRORS, **describe_statuses(409)},
)
async def get_job_result(
    job_id: str,
    services: CurrentServices,
    json_format: JsonFormat = "records",
    send_back_json_or_zip_file: DocumentReplyAs = "zip",
) -> Response:
    """What `/get_all_embedding_vectors_for_document/` would have answered."""
    document = await services.jobs.find_result(job_id)
    download = await services.document_downloads.render(
        document, json_format=json_format, kind=send_back_json_or_zip_file
    )
    return await stream_reply(download)


@router.delete("/{job_id}", responses=JOB_ERRORS)
async def cancel_job(job_id: str, services: CurrentServices) -> JobDescription:
    """Cancel a job, or forget one that is finished. The document of one that was done stays.

    No search finds what a cancelled or failed job computed. It is kept for the next attempt until the job is forgotten
    or the document deleted.
    """
    return await services.jobs.cancel(job_id)


async def render_events(descriptions: AsyncIterator[JobDescription]) -> AsyncIterator[bytes]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    async for description in descriptions:
        yield b"event: progress\ndata: " + description.model_dump_json().encode() + b"\n\n"
