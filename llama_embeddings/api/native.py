"""The native API: the endpoints of the service's first versions, under today's names and their older ones."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    AddModelRequest,
    AllDocumentsResponse,
    AllStringsResponse,
    CollectionDescription,
    CollectionName,
    CollectionsResponse,
    DeleteStringRequest,
    DeletionResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    MessageResponse,
    ModelDescriptionsResponse,
    ModelNameRequest,
    ModelNamesResponse,
    Page,
    TokenLevelEmbeddingsResponse,
    TokenLevelRequest,
)
from llama_embeddings.api.dependencies import (
    DEFAULT_PAGE_LIMIT,
    CurrentServices,
    Cursor,
    InCollection,
    JsonFormat,
    Limit,
    ModelName,
    Offset,
    PageLimit,
    ReplyAs,
    Stamp,
)
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import describe_answers, render_download, render_json
from llama_embeddings.services.contents import Deletion
from llama_embeddings.services.downloads import render_token_level_bundle

router = APIRouter()

_LISTING_ERRORS = describe_statuses(401, 404, 422, 503)
_DELETING_ERRORS = describe_statuses(400, 401, 404, 422, 503)
_COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503)
_MODEL_ERRORS = describe_statuses(400, 401, 404, 422, 429, 500, 502, 503)
_STILL_IN_USE: dict[int | str, dict[str, Any]] = {
    202: {"model": MessageResponse, "description": "Requests still use it; its memory is freed after the last of them."}
}
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


@router.get("/get_all_stored_strings/", tags=["Stored"], response_model_exclude_none=True, responses=_LISTING_ERRORS)
async def get_all_stored_strings(
    services: CurrentServices,
    model_name: ModelName = None,
    corpus_identifier_string: InCollection = None,
    limit: Limit = None,
    offset: Offset = 0,
    cursor: Cursor = None,
) -> AllStringsResponse:
    """Every text that was ever embedded, each once, oldest first; search queries only where no collection is named.

    By pages with `limit` and `cursor`, or with `limit` and `offset`. Sentences of a document are listed once that is
    complete.
    """
    texts = await services.contents.list_texts(
        model_name, limit, offset, collection=corpus_identifier_string, after=cursor or 0
    )
    return AllStringsResponse(strings=texts.entries, next_cursor=_write_cursor(texts, is_wanted=cursor is not None))


@router.delete("/stored_strings/", tags=["Stored"], responses=_DELETING_ERRORS, response_model_exclude_none=True)
async def delete_stored_string(request: DeleteStringRequest, services: CurrentServices) -> DeletionResponse:
    """Forget a text: its embeddings by every model, in every collection, and those of its tokens."""
    return _describe_deletion(await services.contents.delete_text(request.text))


@router.get("/get_all_stored_documents/", tags=["Stored"], response_model_exclude_none=True, responses=_LISTING_ERRORS)
@router.get(
    "/get_all_stored_documents_with_embeddings/",
    tags=["Older names"],
    deprecated=True,
    response_model_exclude_none=True,
    responses=_LISTING_ERRORS,
)
async def get_all_stored_documents(
    services: CurrentServices,
    model_name: ModelName = None,
    corpus_identifier_string: InCollection = None,
    limit: Limit = None,
    offset: Offset = 0,
    cursor: Cursor = None,
) -> AllDocumentsResponse:
    """Names of all files that were ever embedded, oldest first.

    By pages with `limit` and `cursor`, or with `limit` and `offset`.
    """
    filenames = await services.contents.list_document_filenames(
        model_name, limit, offset, collection=corpus_identifier_string, after=cursor or 0
    )
    next_cursor = _write_cursor(filenames, is_wanted=cursor is not None)
    return AllDocumentsResponse(documents=filenames.entries, next_cursor=next_cursor)


@router.delete("/stored_documents/", tags=["Stored"], responses=_DELETING_ERRORS, response_model_exclude_none=True)
async def delete_stored_document(
    filename: Annotated[str, Query(description="Name of the file as it is listed.", examples=["sherlock_holmes.txt"])],
    services: CurrentServices,
    model_name: ModelName = None,
    corpus_identifier_string: InCollection = None,
) -> DeletionResponse:
    """Forget a document and its sentences, but for those that were embedded by themselves or stand in another one.

    It disappears as a whole, before its sentences are removed. One that is just being embedded is forgotten as well, as
    is what is left of one that never was to its end.
    """
    deletion = await services.contents.delete_document(
        filename, model_name=model_name, collection=corpus_identifier_string
    )
    return _describe_deletion(deletion)


def _describe_deletion(deletion: Deletion) -> DeletionResponse:
    return DeletionResponse(
        number_of_deleted_embeddings=deletion.n_embeddings,
        erasure=None if deletion.is_erased else "pending",
    )


@router.get(
    "/get_list_of_collections/",
    tags=["Stored"],
    response_model_exclude_none=True,
    responses=describe_statuses(401, 422, 503),
)
async def get_list_of_collections(
    services: CurrentServices, limit: PageLimit = DEFAULT_PAGE_LIMIT, cursor: Cursor = None
) -> CollectionsResponse:
    """Every collection, oldest first, with how much is in it, by pages."""
    page = await services.contents.list_collections(limit, cursor or 0)
    collections = [
        CollectionDescription(
            corpus_identifier_string=collection.name,
            number_of_embeddings=collection.n_embeddings,
            number_of_documents=collection.n_documents,
        )
        for collection in page.entries
    ]
    return CollectionsResponse(collections=collections, next_cursor=_write_cursor(page))


@router.delete("/stored_collections/", tags=["Stored"], responses=_DELETING_ERRORS)
async def delete_stored_collection(
    corpus_identifier_string: Annotated[CollectionName, Query(description="Name of an empty collection.")],
    services: CurrentServices,
) -> MessageResponse:
    """Forget the name of a collection that is empty; `default` stays."""
    await services.contents.delete_collection(corpus_identifier_string)
    return MessageResponse(message=f"The collection {corpus_identifier_string!r} is deleted.")


def _write_cursor(page: Page[Any], *, is_wanted: bool = True) -> str | None:
    return None if page.next_after is None or not is_wanted else str(page.next_after)


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
        collection=request.corpus_identifier_string or DEFAULT_COLLECTION,
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
    request: TokenLevelRequest,
    services: CurrentServices,
    stamp: Stamp,
    json_format: JsonFormat = "records",
    send_back_json_or_zip_file: ReplyAs = "zip",
) -> Response:
    """One embedding per token, each in the context of the whole text, and the vector that sums them up."""
    answer = await services.token_embeddings.get_or_compute(
        request.text, model_name=request.model_name, truncation=request.truncation, stamp=stamp
    )
    download = render_token_level_bundle(
        request.text, answer.bundle, json_format=json_format, as_zip=send_back_json_or_zip_file == "zip"
    )
    return render_download(download, describe_answers([answer]))


@router.get("/get_list_of_models_with_their_states/", tags=["Models"], responses=describe_statuses(401))
async def get_list_of_models_with_their_states(services: CurrentServices) -> ModelDescriptionsResponse:
    """Every model: loaded, on disk, being downloaded (with its percentage), or known how to get."""
    return ModelDescriptionsResponse(models=await services.models.describe())


@router.post("/load_model/", tags=["Models"], responses=_MODEL_ERRORS)
async def load_model(request: ModelNameRequest, services: CurrentServices) -> MessageResponse:
    """Load a model now rather than at the first request for it; one of the catalogue is downloaded first."""
    return MessageResponse(message=await services.models.load(request.model_name))


@router.post("/unload_model/", tags=["Models"], responses=_MODEL_ERRORS | _STILL_IN_USE)
async def unload_model(request: ModelNameRequest, response: Response, services: CurrentServices) -> MessageResponse:
    """Free a model's memory after the requests that use it; its file and its embeddings stay.

    Requests that come meanwhile wait and load it again. One that is used for long is freed after the reply, a 202.
    """
    unloaded = await services.models.unload(request.model_name)
    if unloaded.is_pending:
        response.status_code = 202
    return MessageResponse(message=unloaded.message)


@router.post("/add_new_model/", tags=["Models"], status_code=202, responses=describe_statuses(400, 401, 422, 429, 503))
async def add_new_model(request: AddModelRequest, services: CurrentServices) -> MessageResponse:
    """Download a GGUF from its address on the model hub; the list of models says how far it is."""
    return MessageResponse(message=services.models.add(request.model_url))


@router.post("/clear_ramdisk/", tags=["Models"], responses=describe_statuses(401, 500))
async def clear_ramdisk(services: CurrentServices) -> MessageResponse:
    """Remove the models from the RAM disk and unmount it; loaded models go on answering."""
    return MessageResponse(message=await services.models.clear_ramdisk())
