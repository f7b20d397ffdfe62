"""Alive, and able to answer: two different questions."""

from __future__ import annotations

from fastapi import APIRouter

from embeddings_data_models import HealthResponse, ReadyResponse
from llama_embeddings.api.dependencies import CurrentServices
from llama_embeddings.api.error_responses import describe_statuses

router = APIRouter(tags=["Health"])


@router.get("/health")
async def health() -> HealthResponse:
    """The process is alive and its event loop turns. Says nothing about the engine; `/ready` does."""
    return HealthResponse(status="alive")


@router.get("/ready", responses=describe_statuses(401, 503))
async def ready(services: CurrentServices) -> ReadyResponse:
    """The database took a write, and a real embedding was made for this answer, within READY_TIMEOUT_SECONDS.

    Past all caches, and in front of what waits: a server that is busy is ready. A 503 says what is wrong.
    """
    found = await services.readiness.check()
    return ReadyResponse(
        status="ready", model_name=found.model_name, embedding_seconds=round(found.embedding_seconds, 6)
    )
