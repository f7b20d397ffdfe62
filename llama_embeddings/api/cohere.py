"""Cohere's API, as its official clients speak it, and Jina's reranking, whose replies are a union with Cohere's.

`/rerank` is shared with TEI and stands in `shared_routes`. Quantised vectors are made from the stored float32; how each
is scaled, `replies` says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from embeddings_data_models import InputType, RequestStamp, Truncation
from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import COHERE
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.replies import (
    ENCODINGS,
    count_tokens,
    describe_answers,
    describe_ranking,
    render_json,
    shorten,
)
from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.container import Services

router = APIRouter(tags=["Cohere and Jina"])

COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503, dialect=COHERE)
TRUNCATIONS = {"NONE": Truncation.REFUSE, "START": Truncation.LEFT, "END": Truncation.RIGHT}
INPUT_TYPES = {"search_query": InputType.QUERY, "search_document": InputType.DOCUMENT}
# What Cohere counts as one unit of search.
DOCUMENTS_PER_SEARCH_UNIT = 100
MaxTokens = Annotated[int | None, Field(ge=1, le=1_000_000, description="Cut each text after so many tokens.")]


class TextDocument(BaseModel):
    text: str = Field(examples=["I feel extremely chilly"])


class RerankRequest(BaseModel):
    """Cohere's of both versions and Jina's."""

    query: str = Field(examples=["winter weather"])
    documents: list[str | TextDocument] = Field(examples=[["I feel extremely chilly", "Two and two is four."]])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    top_n: int | None = Field(None, ge=1, description="How many results at most; all if absent.")
    return_documents: bool | None = None
    raw_scores: bool | None = Field(None, description="The model's own numbers instead of [0, 1].")
    max_tokens_per_doc: MaxTokens = None


class RerankResult(BaseModel):
    index: int = Field(description="The document's place in the request.", examples=[0])
    relevance_score: float = Field(description="In [0, 1].", examples=[0.7])
    document: TextDocument | None = None


class ApiVersion(BaseModel):
    version: str = Field(examples=["2"])


class BilledUnits(BaseModel):
    search_units: int | None = None
    input_tokens: int | None = None


class Meta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits | None = None


class RerankUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    model: str = Field(examples=["all-MiniLM-L6-v2"])
    results: list[RerankResult] = Field(description="Best first.")
    usage: RerankUsage
    meta: Meta


class ContentPart(BaseModel):
    type: str = Field(examples=["text"])
    text: str | None = None


class EmbedInput(BaseModel):
    content: list[ContentPart]


class EmbedRequest(BaseModel):
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])
    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"] | None = Field(
        None, description="The two for search put the model's own words in front, where it has any."
    )
    texts: list[str] | None = Field(None, examples=[["I feel extremely chilly"]])
    inputs: list[EmbedInput] | None = Field(None, description="The same in parts; parts that are no text are refused.")
    images: list[str] | None = Field(None, description="Refused: no model here reads images.")
    max_tokens: MaxTokens = None
    output_dimension: int | None = Field(None, ge=1, description="Keep so many dimensions, scaled to unit length.")
    embedding_types: list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]] | None = None
    truncate: Literal["NONE", "START", "END"] = Field("END", description="NONE refuses a text longer than the window.")


class EmbeddingsByType(BaseModel):
    floats: list[list[float]] | None = Field(None, alias="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class EmbedResponse(BaseModel):
    id: str
    embeddings: EmbeddingsByType
    texts: list[str]
    meta: Meta
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"


class TokenizeRequest(BaseModel):
    text: str = Field(examples=["I am so cold"])
    model: str | None = Field(None, examples=["all-MiniLM-L6-v2"])


class TokenizeResponse(BaseModel):
    tokens: list[int] = Field(examples=[[1045, 2572, 2061, 3147]])
    token_strings: list[str] = Field(examples=[[" i", " am", " so", " cold"]])
    meta: Meta


@router.post("/v1/rerank", response_model=RerankResponse, responses=COMPUTING_ERRORS)
@router.post("/v2/rerank", response_model=RerankResponse, responses=COMPUTING_ERRORS)
async def rerank_documents(body: RerankRequest, request: Request, services: CurrentServices) -> Response:
    """Documents by how well they answer the query, best first; long ones are cut at their ends."""
    version = "1" if request.url.path.startswith("/v1") else "2"
    return await rerank(body, services, stamp_connection(request), version)


async def rerank(body: RerankRequest, services: Services, stamp: RequestStamp, version: str) -> Response:
    """The union of Cohere's reply and Jina's."""
    documents = [item if isinstance(item, str) else item.text for item in body.documents]
    cut = documents
    if body.max_tokens_per_doc is not None:
        cut = await services.tokenization.shorten(
            documents,
            max_tokens=body.max_tokens_per_doc,
            truncation=Truncation.RIGHT,
            model_name=body.model,
            field="documents",
        )
    ranking = await services.rerank.rank(
        body.query, cut, model_name=body.model, truncation=Truncation.RIGHT, stamp=stamp
    )
    results: list[dict[str, Any]] = [
        {"index": ranked.index, "relevance_score": ranked.raw_score if body.raw_scores else ranked.score}
        for ranked in ranking.documents[: body.top_n]
    ]
    if body.return_documents:
        results = [result | {"document": {"text": documents[result["index"]]}} for result in results]
    n_units = -(-len(documents) // DOCUMENTS_PER_SEARCH_UNIT)
    content = {
        "id": str(uuid4()),
        "object": "list",
        "model": body.model or services.models.resolve(None),
        "results": results,
        "usage": {"prompt_tokens": ranking.n_tokens, "total_tokens": ranking.n_tokens},
        "meta": _describe_units(version, search_units=n_units),
    }
    return render_json(content, describe_ranking(ranking))


def _describe_units(version: str, **units: int) -> dict[str, Any]:
    return {"api_version": {"version": version}, "billed_units": units}


@router.post("/v2/embed", response_model=EmbedResponse, responses=COMPUTING_ERRORS)
async def embed_texts(body: EmbedRequest, request: Request, services: CurrentServices) -> Response:
    """Vectors in every encoding that is asked for; `float` if none is."""
    texts = read_texts(body)
    truncation = TRUNCATIONS[body.truncate]
    cut = texts
    if body.max_tokens is not None:
        cut = await services.tokenization.shorten(
            texts, max_tokens=body.max_tokens, truncation=truncation, model_name=body.model, field="texts"
        )
    answers = await services.embeddings.get_or_compute(
        cut,
        model_name=body.model,
        truncation=truncation,
        input_type=INPUT_TYPES.get(body.input_type or ""),
        stamp=stamp_connection(request),
        field="texts",
    )
    vectors = [shorten(answer.vector, body.output_dimension, "output_dimension") for answer in answers]
    encodings = dict.fromkeys(body.embedding_types or ["float"])
    content = {
        "id": str(uuid4()),
        "embeddings": {name: [ENCODINGS[name](vector) for vector in vectors] for name in encodings},
        "texts": texts,
        "meta": _describe_units("2", input_tokens=count_tokens(answers)),
        "response_type": "embeddings_by_type",
    }
    return render_json(content, describe_answers(answers))


def read_texts(body: EmbedRequest) -> list[str]:
    """The texts of a request, wherever they stand in it. Raises InvalidInput for images and for none at all."""
    if body.images or body.input_type == "image":
        raise InvalidInput("Images are not embedded here: the models read text. Send texts.", field="images")
    texts = list(body.texts or [])
    for index, item in enumerate(body.inputs or []):
        parts = [part.text for part in item.content if part.type == "text" and part.text is not None]
        if len(parts) < len(item.content) or not parts:
            raise InvalidInput("Only parts of type `text` are embedded here.", field="inputs", index=index)
        texts.append("\n".join(parts))
    if not texts:
        raise InvalidInput("There are no texts; send at least one.", field="texts")
    return texts


@router.post("/v1/tokenize", response_model=TokenizeResponse, responses=COMPUTING_ERRORS)
async def tokenize_text(body: TokenizeRequest, services: CurrentServices) -> Response:
    """The tokens of a text, without special ones."""
    [tokens] = await services.tokenization.tokenize(
        [body.text], model_name=body.model, adds_special=False, field="text"
    )
    return render_json({"tokens": tokens.ids, "token_strings": tokens.texts, "meta": {"api_version": {"version": "1"}}})
