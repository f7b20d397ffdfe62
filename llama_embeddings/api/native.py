"""The native API: the endpoints of the service's first versions, under today's names and their older ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.responses import Response

from embeddings_data_models import (
    AddModelRequest,
    AllDocumentsResponse,
    AllStringsResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    FirstVersionSemanticSearchRequest,
    MessageResponse,
    ModelDescriptionsResponse,
    ModelNameRequest,
    ModelNamesResponse,
    SearchResult,
    SemanticSearchRequest,
    SemanticSearchResponse,
    SimilarityRequest,
    SimilarityResponse,
    TokenLevelEmbeddingsResponse,
)
from llama_embeddings.api.dependencies import (
    CurrentServices,
    JsonFormat,
    Limit,
    ModelName,
    Offset,
    ReplyAs,
    Stamp,
)
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.services.downloads import Download, render_token_level_bundle
from llama_embeddings.services.embeddings import EmbeddingAnswer
from llama_embeddings.services.search import SearchHit

router = APIRouter()

_LISTING_ERRORS = describe_statuses(401, 404, 422, 503)
_COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503)
_MODEL_ERRORS = describe_statuses(400, 401, 404, 422, 429, 500, 502, 503)
_ZIP_OR_JSON: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON, or a zip file that holds it.",
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/get_list_of_available_model_names/", tags=["Models"], responses=describe_statuses(401))
async def get_list_of_available_model_names(services: CurrentServices) -> ModelNamesResponse:
    """Names of the models that can be asked for, the default one first."""
    return ModelNamesResponse(model_names=services.models.names())


@router.get("/get_all_stored_strings/", tags=["Stored"], responses=_LISTING_ERRORS)
async def get_all_stored_strings(
    services: CurrentServices, model_name: ModelName = None, limit: Limit = None, offset: Offset = 0
) -> AllStringsResponse:
    """Every text that was ever embedded, each once, oldest first."""
    return AllStringsResponse(strings=await services.contents.list_texts(model_name, limit, offset))


@router.get("/get_all_stored_documents/", tags=["Stored"], responses=_LISTING_ERRORS)
@router.get(
    "/get_all_stored_documents_with_embeddings/", tags=["Older names"], deprecated=True, responses=_LISTING_ERRORS
)
async def get_all_stored_documents(
    services: CurrentServices, model_name: ModelName = None, limit: Limit = None, offset: Offset = 0
) -> AllDocumentsResponse:
    """Names of all files that were ever embedded, oldest first."""
    return AllDocumentsResponse(documents=await services.contents.list_document_filenames(model_name, limit, offset))


@router.post(
    "/get_embedding_vector_for_string/",
    tags=["Embeddings"],
    response_model=EmbeddingResponse,
    responses=_COMPUTING_ERRORS,
)
@router.post(
    "/get_embedding_vector/",
    tags=["Older names"],
    deprecated=True,
    response_model=EmbeddingResponse,
    responses=_COMPUTING_ERRORS,
)
async def get_embedding_vector_for_string(
    request: EmbeddingRequest, services: CurrentServices, stamp: Stamp
) -> Response:
    """The embedding vector of a text, from the store or computed now. Headers say how it came about."""
    answers = await services.embeddings.get_or_compute(
        [request.text],
        model_name=request.model_name,
        truncation=request.truncation,
        input_type=request.input_type,
        stamp=stamp,
    )
    return render_json({"embedding": answers[0].vector}, describe_answers(answers))


@router.post(
    "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/",
    tags=["Embeddings"],
    response_model=TokenLevelEmbeddingsResponse,
    responses={**_ZIP_OR_JSON, **_COMPUTING_ERRORS},
)
async def get_token_level_embeddings_matrix_and_combined_feature_vector_for_string(
    request: EmbeddingRequest,
    services: CurrentServices,
    stamp: Stamp,
    json_format: JsonFormat = "records",
    send_back_json_or_zip_file: ReplyAs = "zip",
) -> Response:
    """One embedding per token, each in the context of the whole text, and the vector that sums them up."""
    bundle = await services.token_embeddings.get_or_compute(
        request.text, model_name=request.model_name, truncation=request.truncation, stamp=stamp
    )
    download = render_token_level_bundle(
        request.text, bundle, json_format=json_format, as_zip=send_back_json_or_zip_file == "zip"
    )
    headers = {"x-tokens-used": str(len(bundle.tokens)), "x-tokens-dropped": str(bundle.n_tokens_dropped)}
    return render_download(download, headers)


@router.post(
    "/compute_similarity_between_strings/",
    tags=["Similarity"],
    response_model=SimilarityResponse,
    responses=_COMPUTING_ERRORS,
)
async def compute_similarity_between_strings(
    request: SimilarityRequest, services: CurrentServices, stamp: Stamp
) -> Response:
    """How alike two texts are, by the measure asked for, with both embeddings."""
    similarity = await services.similarity.compare(
        request.text1,
        request.text2,
        measure=request.similarity_measure,
        model_name=request.model_name,
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
        }
    )


@router.post(
    "/search_stored_embeddings_with_query_string_for_semantic_similarity/",
    tags=["Search"],
    responses=_COMPUTING_ERRORS,
)
async def search_stored_embeddings_with_query_string_for_semantic_similarity(
    request: SemanticSearchRequest, services: CurrentServices, stamp: Stamp
) -> SemanticSearchResponse:
    """The stored texts nearest in meaning to the query, best first, without the query itself."""
    hits = await services.search.search(
        request.query_text,
        count=request.number_of_most_similar_strings_to_return,
        model_name=request.model_name,
        stamp=stamp,
    )
    return _render_hits(request.query_text, hits)


@router.post(
    "/get_most_similar_string_from_database/", tags=["Older names"], deprecated=True, responses=_COMPUTING_ERRORS
)
async def get_most_similar_string_from_database(
    request: FirstVersionSemanticSearchRequest, services: CurrentServices, stamp: Stamp
) -> SemanticSearchResponse:
    """The first version's search: `text` for the query, three results by default."""
    hits = await services.search.search(
        request.text,
        count=request.number_of_most_similar_strings_to_return,
        model_name=request.model_name,
        stamp=stamp,
        field="text",
    )
    return _render_hits(request.text, hits)


def _render_hits(query_text: str, hits: Sequence[SearchHit]) -> SemanticSearchResponse:
    results = [SearchResult(search_result_text=hit.text, similarity_to_query_text=hit.similarity) for hit in hits]
    return SemanticSearchResponse(query_text=query_text, results=results)


@router.get("/get_list_of_models_with_their_states/", tags=["Models"], responses=describe_statuses(401))
async def get_list_of_models_with_their_states(services: CurrentServices) -> ModelDescriptionsResponse:
    """Every model: loaded, on disk, being downloaded (with its percentage), or known how to get."""
    return ModelDescriptionsResponse(models=await services.models.describe())


@router.post("/load_model/", tags=["Models"], responses=_MODEL_ERRORS)
async def load_model(request: ModelNameRequest, services: CurrentServices) -> MessageResponse:
    """Load a model now rather than at the first request for it; one of the catalogue is downloaded first."""
    return MessageResponse(message=await services.models.load(request.model_name))


@router.post("/unload_model/", tags=["Models"], responses=_MODEL_ERRORS)
async def unload_model(request: ModelNameRequest, services: CurrentServices) -> MessageResponse:
    """Free a model's memory; its file and its embeddings stay."""
    return MessageResponse(message=await services.models.unload(request.model_name))


@router.post("/add_new_model/", tags=["Models"], status_code=202, responses=describe_statuses(400, 401, 422, 429, 503))
async def add_new_model(request: AddModelRequest, services: CurrentServices) -> MessageResponse:
    """Download a GGUF from its address on the model hub; the list of models says how far it is."""
    return MessageResponse(message=services.models.add(request.model_url))


@router.post("/clear_ramdisk/", tags=["Models"], responses=describe_statuses(401, 500))
async def clear_ramdisk(services: CurrentServices) -> MessageResponse:
    """Remove the models from the RAM disk and unmount it; loaded models go on answering."""
    return MessageResponse(message=await services.models.clear_ramdisk())


def render_json(content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """JSON with float32 arrays written as they are, in the shortest digits that give the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json", headers=headers)


def render_download(download: Download, headers: dict[str, str] | None = None) -> Response:
    return Response(download.content, media_type=download.media_type, headers={**download.headers, **(headers or {})})


def describe_answers(answers: Sequence[EmbeddingAnswer]) -> dict[str, str]:
    """Headers: tokens used and dropped, where the answers came from, time in the queue and in the engine."""
    sources = sorted({str(answer.source) for answer in answers})
    return {
        "x-tokens-used": str(sum(answer.embedding.n_tokens for answer in answers)),
        "x-tokens-dropped": str(sum(answer.embedding.n_tokens_dropped for answer in answers)),
        "x-embedding-source": ",".join(sources),
        "x-queue-seconds": f"{max(answer.queue_seconds for answer in answers):.6f}",
        "x-compute-seconds": f"{sum(answer.compute_seconds for answer in answers):.6f}",
    }
