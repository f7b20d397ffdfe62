"""Alive, and able to answer: two different questions."""

from __future__ import annotations

from fastapi import APIRouter, Request

from embeddings_data_models import HealthResponse, ReadyResponse
from llama_embeddings.api.dependencies import CurrentServices
from llama_embeddings.api.error_responses import describe_statuses

router = APIRouter(tags=["Health"])


@router.get("/health")
async def health() -> HealthResponse:
    """The process is alive and its event loop turns. Says nothing about the engine; `/ready` does."""
    return HealthResponse(status="alive")


@router.get("/ready", responses=describe_statuses(401, 500, 503))
async def ready(request: Request, services: CurrentServices) -> ReadyResponse:
    """A real embedding was made for this answer, past all caches, within READY_TIMEOUT_SECONDS."""
    seconds = await services.models.compute_probe(timeout_seconds=request.app.state.ready_timeout_seconds)
    return ReadyResponse(status="ready", model_name=services.models.resolve(None), embedding_seconds=round(seconds, 6))
