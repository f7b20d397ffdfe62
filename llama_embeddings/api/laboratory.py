"""The laboratory of similarity measures: two texts, all pairs of many, token by token; as JSON or as a picture."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    SimilarityMatrixRequest,
    SimilarityMatrixResponse,
    SimilarityRequest,
    SimilarityResponse,
    TokenComparisonRequest,
    TokenComparisonResponse,
)
from llama_embeddings.api.dependencies import CurrentServices, Stamp
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import render_json
from llama_embeddings.services.similarity import Similarity, TokenComparison

router = APIRouter(tags=["Similarity"])

PNG = "image/png"
_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503)
_JSON_OR_PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON, or a heat map with `Accept: image/png`.",
        "content": {PNG: {"schema": {"type": "string", "format": "binary"}}},
    }
}


def prefers_png(accept: str) -> bool:
    """Whether an Accept header wants a PNG more than JSON; JSON wins where both are as welcome, or neither."""
    return _weigh(accept, PNG) > _weigh(accept, "application/json")


def _weigh(accept: str, media_type: str) -> float:
    """The q of the most exact range that the type falls into, 0 if it falls into none. Source: RFC 9110, 12.5.1."""
    exactness = {"*/*": 0, f"{media_type.partition('/')[0]}/*": 1, media_type: 2}
    found = (-1, 0.0)
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        if media_range in exactness:
            found = max(found, (exactness[media_range], _read_quality(parameters)))
    return found[1]


def _read_quality(parameters: list[str]) -> float:
    text = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    return min(float(text), 1.0) if text.replace(".", "", 1).isdecimal() else 0.0


async def _wants_png(request: Request) -> bool:
    return prefers_png(request.headers.get("accept", ""))


WantsPng = Annotated[bool, Depends(_wants_png)]


@router.post("/compute_similarity_between_strings/", response_model=SimilarityResponse, responses=_ERRORS)
async def compute_similarity_between_strings(
    request: SimilarityRequest, services: CurrentServices, stamp: Stamp
) -> Response:
    """How alike two texts are, by the measure asked for or by all, with both embeddings."""
    similarity = await services.similarity.compare(
        request.text1,
        request.text2,
        measure=request.similarity_measure,
        model_name=request.model_name,
        with_percentile=request.with_percentile,
        collection=request.corpus_identifier_string or DEFAULT_COLLECTION,
        stamp=stamp,
    )
    return render_json(
        {
            "text1": request.text1,
            "text2": request.text2,
            "similarity_measure": similarity.measure,
            "similarity_score": similarity.score,
            "embedding1": similarity.vector1,
            "embedding2": similarity.vector2,
            **_describe_extras(similarity),
        }
    )


def _describe_extras(similarity: Similarity) -> dict[str, Any]:
    """The fields that are there only if they were asked for."""
    extras: dict[str, Any] = {}
    if similarity.is_of_all:
        extras["similarity_scores"] = similarity.scores
    standing = similarity.standing
    if standing is not None:
        extras["percentile"] = standing.percentiles.get(similarity.leading_measure)
        if similarity.is_of_all:
            extras["percentiles"] = standing.percentiles
        extras["number_of_random_pairs"] = standing.n_pairs
        extras["percentile_reason"] = standing.reason
    return extras


@router.post(
    "/compute_similarity_matrix/", response_model=SimilarityMatrixResponse, responses={**_JSON_OR_PNG, **_ERRORS}
)
async def compute_similarity_matrix(
    request: SimilarityMatrixRequest, services: CurrentServices, stamp: Stamp, wants_png: WantsPng
) -> Response:
    """How alike all strings are: among themselves, or each with each of another list.

    The reply is JSON, or with `Accept: image/png` a heat map with the strings along its sides.
    """
    matrix = await services.similarity.compare_all_pairs(
        request.strings,
        request.other_strings,
        measure=request.similarity_measure,
        model_name=request.model_name,
        stamp=stamp,
    )
    if wants_png:
        picture = await services.similarity.draw_matrix(matrix, request.strings, request.other_strings)
        return Response(picture, media_type=PNG)
    return render_json(
        {
            "strings": request.strings,
            "other_strings": request.strings if request.other_strings is None else request.other_strings,
            "similarity_measure": matrix.measure.name,
            "similarity_matrix": matrix.scores,
        }
    )


@router.post(
    "/compare_strings_token_by_token/", response_model=TokenComparisonResponse, responses={**_JSON_OR_PNG, **_ERRORS}
)
async def compare_strings_token_by_token(
    request: TokenComparisonRequest, services: CurrentServices, stamp: Stamp, wants_png: WantsPng
) -> Response:
    """The cosine of every token of one text with every token of the other, and the MaxSim score that they explain.

    The reply is JSON, or with `Accept: image/png` a heat map with the best match of each row outlined.
    """
    comparison = await services.similarity.compare_token_by_token(
        request.text1, request.text2, model_name=request.model_name, stamp=stamp
    )
    if wants_png:
        return Response(await services.similarity.draw_token_comparison(comparison), media_type=PNG)
    return render_json({"text1": request.text1, "text2": request.text2, **_describe_comparison(comparison)})


def _describe_comparison(comparison: TokenComparison) -> dict[str, Any]:
    tokens1, tokens2, cosines = comparison.tokens1, comparison.tokens2, comparison.cosines
    return {
        "tokens1": tokens1,
        "tokens2": tokens2,
        "token_similarity_matrix": cosines,
        "best_matches1": _describe_matches(tokens1, tokens2, cosines.argmax(axis=1), cosines.max(axis=1)),
        "best_matches2": _describe_matches(tokens2, tokens1, cosines.argmax(axis=0), cosines.max(axis=0)),
        "maxsim_score": comparison.maxsim,
        "maxsim_score_reversed": comparison.maxsim_reversed,
    }


def _describe_matches(
    tokens: tuple[str, ...], others: tuple[str, ...], best: Any, cosines: Any
) -> list[dict[str, Any]]:
    return [
        {
            "position": position,
            "token": token,
            "best_match_position": int(best[position]),
            "best_match_token": others[best[position]],
            "cosine_similarity": float(cosines[position]),
        }
        for position, token in enumerate(tokens)
    ]
