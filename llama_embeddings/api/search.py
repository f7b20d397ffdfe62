"""Searching what is stored: by meaning, by words, token by token, by every measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from embeddings_data_models import (
    AdvancedSearchRequest,
    AdvancedSearchResponse,
    FirstVersionSemanticSearchRequest,
    RequestStamp,
    SemanticSearchRequest,
    SemanticSearchResponse,
)
from llama_embeddings.api.dependencies import CurrentServices, Stamp
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import render_json
from llama_embeddings.services.container import Services
from llama_embeddings.services.late_interaction import LateInteractionHit
from llama_embeddings.services.search import SearchFilter, SearchHit, SearchOptions

router = APIRouter()

_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503)


@router.post(
    "/search_stored_embeddings_with_query_string_for_semantic_similarity/",
    tags=["Search"],
    response_model=SemanticSearchResponse,
    responses=_ERRORS,
)
async def search_stored_embeddings_with_query_string_for_semantic_similarity(
    request: SemanticSearchRequest, services: CurrentServices, stamp: Stamp
) -> Response:
    """The stored texts nearest in meaning to the query, best first, without the query itself."""
    options = SearchOptions(
        count=request.number_of_most_similar_strings_to_return,
        model_name=request.model_name,
        filter=read_filter(request),
        is_exact=request.exact,
        full_text_weight=request.full_text_weight,
    )
    if request.late_interaction:
        return await _search_by_tokens(request, options, services, stamp)
    hits = await services.search.search(request.query_text, options, stamp=stamp)
    return _render(request.query_text, [_describe(hit) for hit in hits])


async def _search_by_tokens(
    request: SemanticSearchRequest, options: SearchOptions, services: Services, stamp: RequestStamp
) -> Response:
    hits = await services.late_interaction.search(request.query_text, options, stamp=stamp)
    return _render(request.query_text, [_describe_by_tokens(hit, request.with_matched_tokens) for hit in hits])


@router.post(
    "/get_most_similar_string_from_database/",
    tags=["Older names"],
    deprecated=True,
    response_model=SemanticSearchResponse,
    responses=_ERRORS,
)
async def get_most_similar_string_from_database(
    request: FirstVersionSemanticSearchRequest, services: CurrentServices, stamp: Stamp
) -> Response:
    """The first version's search: `text` for the query, three results by default."""
    options = SearchOptions(request.number_of_most_similar_strings_to_return, request.model_name)
    hits = await services.search.search(request.text, options, stamp=stamp, field="text")
    return _render(request.text, [_describe(hit) for hit in hits])


@router.post(
    "/advanced_search_stored_embeddings_with_query_string_for_semantic_similarity/", tags=["Search"], responses=_ERRORS
)
async def advanced_search_stored_embeddings_with_query_string_for_semantic_similarity(
    request: AdvancedSearchRequest, services: CurrentServices, stamp: Stamp
) -> AdvancedSearchResponse:
    """The nearest stored texts by cosine, scored by every measure and ordered by one of them."""
    options = SearchOptions(
        count=request.number_of_most_similar_strings_to_return,
        model_name=request.model_name,
        filter=read_filter(request),
        is_exact=request.exact,
    )
    found = await services.advanced_search.search(
        request.query_text,
        options,
        measure=request.result_sorting_metric,
        candidate_share=request.similarity_filter_percentage,
        stamp=stamp,
    )
    results = [{"search_result_text": hit.text, "similarity_to_query_text": hit.scores} for hit in found.hits]
    return AdvancedSearchResponse.model_validate(
        {
            "query_text": request.query_text,
            "result_sorting_metric": found.measure,
            "number_of_candidates": found.n_candidates,
            "results": results,
        }
    )


def read_filter(request: SemanticSearchRequest | AdvancedSearchRequest) -> SearchFilter:
    """Where a request looks."""
    return SearchFilter(request.corpus_identifier_string, request.filename, request.since, request.until)


def _describe(hit: SearchHit) -> dict[str, Any]:
    described = {"search_result_text": hit.text, "similarity_to_query_text": hit.similarity}
    return described if hit.fused_score is None else described | {"fused_score": hit.fused_score}


def _describe_by_tokens(found: LateInteractionHit, with_matches: bool) -> dict[str, Any]:
    described = _describe(found.hit) | {"maxsim": found.maxsim}
    if with_matches:
        described["matched_tokens"] = [
            {"query_token": match.query_token, "text_token": match.text_token, "similarity": match.similarity}
            for match in found.matches
        ]
    return described


def _render(query_text: str, results: Sequence[dict[str, Any]]) -> Response:
    return render_json({"query_text": query_text, "results": results})
