"""Text Embeddings Inference's API, as Hugging Face's InferenceClient and LlamaIndex speak it.

`/rerank` and `/tokenize` are shared with other dialects and stand in `shared_routes`.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, RootModel

from embeddings_data_models import InputType, RequestStamp, TokenisedText, Truncation
from llama_embeddings.api.dependencies import CurrentServices, stamp_connection
from llama_embeddings.api.dialects import TEI
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.api.openai import TokenIds, split_inputs
from llama_embeddings.api.replies import describe_answers, describe_ranking, render_json, shorten
from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.container import Services

router = APIRouter(tags=["TEI"])

COMPUTING_ERRORS = describe_statuses(400, 401, 404, 413, 422, 429, 500, 502, 503, dialect=TEI)
Inputs = str | TokenIds | list[str | TokenIds]
# What models call the two parts that a text can play; other prompts are nobody's here.
PROMPT_NAMES = {
    "query": InputType.QUERY,
    "search_query": InputType.QUERY,
    "s2p_query": InputType.QUERY,
    "document": InputType.DOCUMENT,
    "search_document": InputType.DOCUMENT,
    "passage": InputType.DOCUMENT,
}


class TruncationChoice(BaseModel):
    """Whether and where a text that is longer than the window is cut; the setting TRUNCATION if absent."""

    truncate: bool | None = Field(None, description="False refuses; absent, the setting TRUNCATION decides.")
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(None, examples=["Right"])

    @property
    def truncation(self) -> Truncation | None:
        if self.truncate is None:
            return None
        if not self.truncate:
            return Truncation.REFUSE
        return Truncation((self.truncation_direction or "right").lower())


class TeiTokensRequest(TruncationChoice):
    inputs: Inputs = Field(
        description="A text or several, as strings or as the model's own token ids.", examples=["I am so cold"]
    )
    prompt_name: str | None = Field(None, description="`query` or `document`, or what models call them.")

    @property
    def input_type(self) -> InputType | None:
        return read_prompt_name(self.prompt_name)


class TeiEmbedRequest(TeiTokensRequest):
    normalize: bool | None = Field(None, description="False: not scaled to unit length. True if absent.")
    dimensions: int | None = Field(None, ge=1, description="Keep so many dimensions, scaled to unit length again.")


class SentencePair(BaseModel):
    source_sentence: str = Field(examples=["I am so cold"])
    sentences: list[str] = Field(examples=[["I feel extremely chilly"]])


class SimilarityParameters(TruncationChoice):
    prompt_name: str | None = None


DEFAULT_PARAMETERS = SimilarityParameters.model_validate({})


class TeiSimilarityRequest(BaseModel):
    inputs: SentencePair = Field(
        examples=[{"source_sentence": "I am so cold", "sentences": ["I feel extremely chilly"]}]
    )
    parameters: SimilarityParameters | None = None


class TeiRootRequest(TruncationChoice):
    """What `/embed` takes, or what `/similarity` takes, told apart by the shape of `inputs`."""

    inputs: Inputs | SentencePair = Field(examples=["I am so cold"])
    prompt_name: str | None = None
    normalize: bool | None = None
    dimensions: int | None = Field(None, ge=1)
    parameters: SimilarityParameters | None = None


class TeiRerankRequest(TruncationChoice):
    query: str = Field(examples=["winter weather"])
    texts: list[str] = Field(examples=[["I feel extremely chilly", "Two and two is four."]])
    raw_scores: bool | None = Field(None, description="The model's own numbers instead of [0, 1].")
    return_text: bool | None = None


class TeiTokenizeRequest(BaseModel):
    inputs: str | list[str] = Field(examples=["I am so cold"])
    add_special_tokens: bool = True
    prompt_name: str | None = None


class TeiDecodeRequest(BaseModel):
    ids: TokenIds | list[TokenIds] = Field(examples=[[1045, 2572, 2061, 3147]])
    skip_special_tokens: bool = True


class TeiVectors(RootModel[list[list[float]]]):
    """One vector per text, also for a single one."""


class TeiRank(BaseModel):
    index: int = Field(examples=[0])
    score: float = Field(examples=[0.7])
    text: str | None = None


class TeiToken(BaseModel):
    id: int = Field(examples=[3147])
    text: str = Field(examples=["cold"])
    special: bool
    start: int | None = Field(description="In bytes of UTF-8; null for special tokens.")
    stop: int | None


class TeiPooling(BaseModel):
    pooling: str = Field(examples=["mean"])


class TeiModelType(BaseModel):
    embedding: TeiPooling | None = None
    reranker: dict[str, Any] | None = None


class TeiInfo(BaseModel):
    model_id: str = Field(examples=["all-MiniLM-L6-v2"])
    model_sha: str | None
    model_dtype: str = Field(examples=["gguf"])
    served_model_name: str
    model_type: TeiModelType
    max_concurrent_requests: int
    max_input_length: int = Field(examples=[512])
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int = Field(examples=[2048])
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None

    model_config = {"protected_namespaces": ()}


def read_prompt_name(name: str | None) -> InputType | None:
    """The part that a text plays. Raises InvalidInput for a name that is not known."""
    if name is None:
        return None
    if name not in PROMPT_NAMES:
        raise InvalidInput(f"Unknown prompt {name!r}. Known: {', '.join(PROMPT_NAMES)}.", field="prompt_name")
    return PROMPT_NAMES[name]


@router.post("/embed", response_model=TeiVectors, responses=COMPUTING_ERRORS)
async def embed(body: TeiEmbedRequest, request: Request, services: CurrentServices) -> Response:
    """The vector of each text, of unit length unless `normalize` is false."""
    return await _embed(body, services, stamp_connection(request))


@router.post("/", response_model=TeiVectors | list[float], responses=COMPUTING_ERRORS)
async def embed_or_compare(body: TeiRootRequest, request: Request, services: CurrentServices) -> Response:
    """As `/embed`, or as `/similarity` where `inputs` holds a source sentence."""
    stamp = stamp_connection(request)
    if isinstance(body.inputs, SentencePair):
        return await _compare(body.inputs, body.parameters or DEFAULT_PARAMETERS, services, stamp)
    return await _embed(TeiEmbedRequest.model_construct(**dict(body)), services, stamp)


async def _embed(body: TeiEmbedRequest, services: Services, stamp: RequestStamp) -> Response:
    texts = await services.tokenization.read_inputs(split_inputs(body.inputs, field="inputs"), field="inputs")
    asked: dict[str, Any] = {
        "truncation": body.truncation,
        "input_type": body.input_type,
        "stamp": stamp,
        "field": "inputs",
    }
    if body.normalize is False:
        unpooled = await services.token_embeddings.get_or_compute_all(texts, **asked)
        vectors = await services.token_embeddings.pool(unpooled, None)
        return render_json([vector[: body.dimensions] for vector in vectors], describe_answers(unpooled))
    answers = await services.embeddings.get_or_compute(texts, **asked)
    return render_json([shorten(answer.vector, body.dimensions) for answer in answers], describe_answers(answers))


@router.post("/embed_all", response_model=list[TeiVectors], responses=COMPUTING_ERRORS)
async def embed_all(body: TeiTokensRequest, request: Request, services: CurrentServices) -> Response:
    """The vector of every token of each text, in its context, before pooling."""
    answers = await services.token_embeddings.get_or_compute_all(
        await services.tokenization.read_inputs(split_inputs(body.inputs, field="inputs"), field="inputs"),
        truncation=body.truncation,
        input_type=body.input_type,
        stamp=stamp_connection(request),
        field="inputs",
    )
    return render_json([answer.matrix for answer in answers], describe_answers(answers))


@router.post("/similarity", response_model=list[float], responses=COMPUTING_ERRORS)
async def compute_similarity(body: TeiSimilarityRequest, request: Request, services: CurrentServices) -> Response:
    """The cosine of a sentence with each of the others."""
    parameters = body.parameters or DEFAULT_PARAMETERS
    return await _compare(body.inputs, parameters, services, stamp_connection(request))


async def _compare(
    pair: SentencePair, parameters: SimilarityParameters, services: Services, stamp: RequestStamp
) -> Response:
    if not pair.sentences:
        raise InvalidInput("The list of sentences is empty; send at least one.", field="sentences")
    source, *others = await services.embeddings.get_or_compute(
        [pair.source_sentence, *pair.sentences],
        truncation=parameters.truncation,
        input_type=read_prompt_name(parameters.prompt_name),
        stamp=stamp,
        field=["source_sentence", *(f"sentences[{index}]" for index in range(len(pair.sentences)))],
    )
    return render_json(
        [min(1.0, float(source.vector @ other.vector)) for other in others], describe_answers([source, *others])
    )


async def rerank(body: TeiRerankRequest, services: Services, stamp: RequestStamp) -> Response:
    """The texts by how well they answer the query, best first."""
    ranking = await services.rerank.rank(body.query, body.texts, truncation=body.truncation, stamp=stamp, field="texts")
    found: list[dict[str, Any]] = [
        {"index": ranked.index, "score": ranked.raw_score if body.raw_scores else ranked.score}
        for ranked in ranking.documents
    ]
    if body.return_text:
        found = [row | {"text": body.texts[row["index"]]} for row in found]
    return render_json(found, describe_ranking(ranking))


async def tokenize(body: TeiTokenizeRequest, services: Services) -> Response:
    """The tokens of each text with their places in it."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    prefix = services.models.prompt(None, read_prompt_name(body.prompt_name))
    prompted = [prefix + text for text in texts]
    tokenised = await services.tokenization.tokenize(prompted, adds_special=body.add_special_tokens)
    # A row per token of a long text takes its time, which is not the event loop's.
    return await asyncio.to_thread(_render_tokens, prompted, tokenised)


def _render_tokens(texts: list[str], tokenised: list[TokenisedText]) -> Response:
    return render_json([_list_tokens(text, tokens) for text, tokens in zip(texts, tokenised, strict=True)])


def _list_tokens(text: str, tokens: TokenisedText) -> list[dict[str, Any]]:
    encoded = text.encode("utf-8")
    rows = []
    for token, name, span, is_special in zip(tokens.ids, tokens.texts, tokens.spans, tokens.is_special, strict=True):
        start, stop = span or (None, None)
        shown = name if span is None else encoded[start:stop].decode("utf-8", "replace")
        rows.append({"id": token, "text": shown, "special": is_special, "start": start, "stop": stop})
    return rows


@router.post("/decode", response_model=list[str], responses=COMPUTING_ERRORS)
async def decode(body: TeiDecodeRequest, services: CurrentServices) -> Response:
    """The text that token ids stand for."""
    given: Any = body.ids
    lists = given if given and isinstance(given[0], list) else [given]
    return render_json(await services.tokenization.decode(lists, skips_special=body.skip_special_tokens, field="ids"))


@router.get("/info", responses=describe_statuses(401, 404, 500, 502, 503, dialect=TEI))
async def describe_server(request: Request, services: CurrentServices) -> TeiInfo:
    """The default model and the limits of requests."""
    info = await services.models.info(None)
    limits = services.limits
    is_reranker = info.pooling == "rank"
    return TeiInfo(
        model_id=info.name,
        model_sha=info.digest,
        model_dtype="gguf",
        served_model_name=info.name,
        model_type=TeiModelType(reranker={})
        if is_reranker
        else TeiModelType(embedding=TeiPooling(pooling=info.pooling)),
        max_concurrent_requests=services.max_texts_in_flight,
        max_input_length=info.window,
        max_batch_tokens=info.window,
        max_batch_requests=None,
        max_client_batch_size=limits.max_texts,
        auto_truncate=services.default_truncation is not Truncation.REFUSE,
        tokenization_workers=1,
        version=request.app.version,
        sha=None,
        docker_label=None,
    )
