"""The nouns of the program: tables, records and the native API's request and response models.

Three sections, in the order data meets them from the outside in:

1. request and response models of the native API (pydantic), which stop at `api/`;
2. records passed between the layers (frozen dataclasses around float32 arrays);
3. tables (SQLAlchemy), which only `storage/` reads and writes.

Vectors are little-endian float32 BLOBs in the tables; the `*_json` attributes that the tables of the
first version stored as text are read-only properties here. Knows no HTTP, no engine and no settings.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from functools import cached_property
from hashlib import sha3_256
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import (
    DDL,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    event,
)
from sqlalchemy import text as sql_text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Entry = TypeVar("Entry")

RECIPE_FAMILY_LENGTH = 16
RECIPE_RULE_SEPARATOR = ":"

# Where texts and documents go that name no collection.
DEFAULT_COLLECTION = "default"
DEFAULT_COLLECTION_ID = 1
# In `embeddings.collection_id`: in no collection by itself, only in those of the documents that hold it. A search finds
# it while one of these is there.
HELD_BY_DOCUMENTS = 0
MAX_COLLECTION_NAME_LENGTH = 255


def compute_text_hash(text: str) -> str:
    """SHA3-256 of the exact UTF-8 bytes of a text, in hexadecimal. Lone surrogates raise UnicodeEncodeError."""
    return sha3_256(text.encode("utf-8")).hexdigest()


def compute_token_hash(text_hash: str, position: int, token: str) -> str:
    """Identify one token inside one text: the same token elsewhere has another embedding and another hash."""
    return sha3_256(f"{text_hash}\0{position}\0{token}".encode("utf-8", "surrogatepass")).hexdigest()


def utc_now() -> datetime:
    """The current time with its zone; stored without it, always UTC."""
    return datetime.now(UTC)


class Truncation(StrEnum):
    """What happens to a text that is longer than the model's window."""

    REFUSE = "refuse"
    RIGHT = "right"  # the end is cut off
    LEFT = "left"  # the beginning is cut off
    SPLIT = "split"  # computed in parts, combined by their token-weighted mean


class InputType(StrEnum):
    """The part a text plays in retrieval. Some models want their own words in front of each."""

    QUERY = "query"
    DOCUMENT = "document"


class JobState(StrEnum):
    """How far a job is. The last three are final."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class DocumentState(IntEnum):
    """Where a document is between coming and going. Only one that is there shows, with all its sentences or none."""

    BEING_WRITTEN = 0
    THERE = 1
    BEING_REMOVED = 2


# ---------------------------------------------------------------------------------------------------------------------
# 1. Requests and responses of the native API
# ---------------------------------------------------------------------------------------------------------------------

MODEL_NAME_DESCRIPTION = (
    "Name of the model as listed by `/get_list_of_available_model_names/`; the default model if absent."
)

SIMILARITY_MEASURE_DESCRIPTION = "A measure by its name or one of its other spellings; the README has the table."


# Beginnings of real vectors of the default model, so that the examples in Swagger are true; held by a test.
CHILLY = [-0.0239, -0.0633, 0.0536]
COLD = [-0.0639, -0.0469, 0.0387]


CollectionName = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_COLLECTION_NAME_LENGTH)
]


class _Request(BaseModel):
    # `model_name` is a field of the API; pydantic would reserve the prefix otherwise.
    model_config = ConfigDict(protected_namespaces=(), extra="ignore")


class TokenLevelRequest(_Request):
    text: str = Field(description="The text to embed, exactly as it is.", examples=["I feel extremely chilly"])
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])
    truncation: Truncation | None = Field(
        None,
        description="What to do with a text longer than the model's window; the setting TRUNCATION if absent.",
        examples=["refuse"],
    )
    input_type: InputType | None = Field(
        None,
        description="Put the model's words for queries or documents in front, where the catalogue knows any.",
        examples=["document"],
    )


class EmbeddingRequest(TokenLevelRequest):
    corpus_identifier_string: CollectionName | None = Field(
        None,
        description="Collection to put the text into; `default` if absent. What is embedded as a query is in none.",
        examples=["default"],
    )


class SimilarityRequest(_Request):
    text1: str = Field(description="The first text.", examples=["I feel extremely chilly"])
    text2: str = Field(description="The second text.", examples=["I am so cold"])
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])
    similarity_measure: str = Field(
        "cosine_similarity", description=SIMILARITY_MEASURE_DESCRIPTION + ' Or "all".', examples=["cosine_similarity"]
    )
    with_percentile: bool = Field(
        False,
        description="Also say where the score stands among random pairs of what is stored under the same model.",
        examples=[False],
    )
    corpus_identifier_string: CollectionName | None = Field(
        None, description="Collection to put both texts into; `default` if absent.", examples=["default"]
    )


class SimilarityMatrixRequest(_Request):
    strings: list[str] = Field(
        min_length=1, description="The texts of the rows.", examples=[["I feel extremely chilly", "I am so cold"]]
    )
    other_strings: list[str] | None = Field(
        None,
        min_length=1,
        description="The texts of the columns; `strings` again if absent.",
        examples=[["winter weather", "a recipe for soup"]],
    )
    similarity_measure: str = Field(
        "cosine_similarity", description=SIMILARITY_MEASURE_DESCRIPTION, examples=["cosine_similarity"]
    )
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])


class TokenComparisonRequest(_Request):
    text1: str = Field(description="The text of the rows.", examples=["I feel extremely chilly"])
    text2: str = Field(description="The text of the columns.", examples=["I am so cold"])
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])


class _SearchRequest(_Request):
    query_text: str = Field(
        description="What to look for; it is embedded and kept, but no search finds it.", examples=["winter"]
    )
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])
    corpus_identifier_string: CollectionName | None = Field(
        None, description="Only texts of this collection; of all if absent.", examples=["default"]
    )
    filename: str | None = Field(None, description="Only sentences of documents of this name.", examples=[None])
    since: datetime | None = Field(
        None,
        description="Only texts first embedded as such at this time or later; UTC unless it names a zone.",
        examples=["2023-12-04T00:00:00Z"],
    )
    until: datetime | None = Field(
        None,
        description="Only texts first embedded as such before this time; UTC unless it names a zone.",
        examples=[None],
    )
    exact: bool = Field(
        False, description="Compare with every vector, however many there are, rather than with an index's candidates."
    )


class SemanticSearchRequest(_SearchRequest):
    number_of_most_similar_strings_to_return: int = Field(10, ge=1, le=10_000, description="How many results at most.")
    full_text_weight: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the words (BM25) in the order of the results, against their meaning: 0 is meaning alone, "
        "1 words alone. The two rankings are fused by reciprocal rank.",
        examples=[0.0],
    )
    late_interaction: bool = Field(
        False, description="Order the nearest texts by MaxSim over the embeddings of their tokens; slower."
    )
    with_matched_tokens: bool = Field(
        False, description="With late_interaction: which token of a result is nearest to each token of the query."
    )


class AdvancedSearchRequest(_SearchRequest):
    similarity_filter_percentage: float = Field(
        0.02,
        gt=0.0,
        le=1.0,
        description="Share of the stored texts, nearest by cosine, that every measure is computed for (0.02 is 2 %): "
        "at least as many as are to be returned, at most 1,000.",
    )
    number_of_most_similar_strings_to_return: int = Field(10, ge=1, le=1_000, description="How many results at most.")
    result_sorting_metric: str = Field(
        "hoeffdings_d", description="Measure that orders the results.", examples=["hoeffdings_d"]
    )


class FirstVersionSemanticSearchRequest(_Request):
    """The search request as the first version of the service named its fields."""

    text: str = Field(description="What to look for.", examples=["winter"])
    model_name: str | None = Field(None, description=MODEL_NAME_DESCRIPTION, examples=["all-MiniLM-L6-v2"])
    number_of_most_similar_strings_to_return: int = Field(3, ge=1, le=10_000, description="How many results at most.")


class ModelNamesResponse(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_names: list[str] = Field(examples=[["all-MiniLM-L6-v2"]])


class _PageResponse(BaseModel):
    next_cursor: str | None = Field(
        default=None,
        description="Send it as `cursor` for what follows. Absent where nothing does, or strings or documents were "
        "asked for without a `cursor`.",
        examples=[None],
    )


class AllStringsResponse(_PageResponse):
    strings: list[str] = Field(description="Each distinct text once, oldest first.", examples=[["I am so cold"]])


class AllDocumentsResponse(_PageResponse):
    documents: list[str] = Field(description="File names, oldest first.", examples=[["sherlock_holmes.txt"]])


class CollectionDescription(BaseModel):
    """A collection and what is in it."""

    corpus_identifier_string: str = Field(examples=["default"])
    number_of_embeddings: int = Field(description="Texts, counted once for each model and recipe.", examples=[1])
    number_of_documents: int = Field(examples=[0])


class CollectionsResponse(_PageResponse):
    collections: list[CollectionDescription] = Field(description="Oldest first.")


class DeleteStringRequest(_Request):
    text: str = Field(description="The text to forget, exactly as it was sent.", examples=["I am so cold"])


class DeletionResponse(BaseModel):
    number_of_deleted_embeddings: int = Field(
        description="Texts that are forgotten, counted once for each model and recipe.", examples=[1]
    )
    erasure: Literal["pending"] | None = Field(
        None,
        description="Only if not all of its bytes are overwritten yet: a long read, such as a backup, keeps them in "
        "the log of the database. No request finds them, and they are overwritten as soon as it ends.",
        examples=["pending"],
    )


class EmbeddingResponse(BaseModel):
    embedding: list[float] = Field(
        description="The vector, of unit length; the example shows its beginning.", examples=[CHILLY]
    )


class TokenEmbedding(BaseModel):
    token: str = Field(examples=[" chilly"])
    embedding: list[float] = Field(examples=[[-0.5745, 0.2355, 0.1076]])


class TokenLevelEmbeddingsResponse(BaseModel):
    """`token_level_embedding_bundle` has the orientation asked for with `json_format`; `records` is shown here."""

    input_text: str = Field(examples=["I feel extremely chilly"])
    token_level_embedding_bundle: list[TokenEmbedding] | dict[str, Any] | list[Any]
    combined_feature_vector: list[float] = Field(
        description="Mean, minimum, maximum and standard deviation of each column of the matrix, one after the other.",
        examples=[[-0.1542, -0.4088, 0.3461, 0.5419]],
    )


class SimilarityResponse(BaseModel):
    text1: str = Field(examples=["I feel extremely chilly"])
    text2: str = Field(examples=["I am so cold"])
    similarity_measure: str = Field(examples=["cosine_similarity"])
    similarity_score: float = Field(description='For "all", the cosine.', examples=[0.742])
    embedding1: list[float] = Field(examples=[CHILLY])
    embedding2: list[float] = Field(examples=[COLD])
    similarity_scores: dict[str, float] | None = Field(
        None, description='Only for "all": the score by every measure.', examples=[{"cosine_similarity": 0.742}]
    )
    percentile: float | None = Field(
        None,
        description="Only if asked for: the share, in per cent, of random pairs that are less similar; null with a "
        "`percentile_reason` where it cannot be told.",
        examples=[99.9],
    )
    percentiles: dict[str, float] | None = Field(
        None, description='Only for "all": the percentile by measure.', examples=[{"cosine_similarity": 99.9}]
    )
    number_of_random_pairs: int | None = Field(
        None, description="Only with a percentile: how many pairs it is made from.", examples=[2048]
    )
    percentile_reason: str | None = Field(None, description="Why there is no percentile.", examples=[None])


class SimilarityMatrixResponse(BaseModel):
    strings: list[str] = Field(examples=[["I feel extremely chilly", "I am so cold"]])
    other_strings: list[str] = Field(examples=[["I feel extremely chilly", "I am so cold"]])
    similarity_measure: str = Field(examples=["cosine_similarity"])
    similarity_matrix: list[list[float]] = Field(
        description="A row for each of `strings`, a column for each of `other_strings`.",
        examples=[[[1.0, 0.742], [0.742, 1.0]]],
    )


class BestMatch(BaseModel):
    """A token and the token of the other text nearest to it; positions count from 0."""

    position: int = Field(examples=[4])
    token: str = Field(examples=[" chilly"])
    best_match_position: int = Field(examples=[4])
    best_match_token: str = Field(examples=[" cold"])
    cosine_similarity: float = Field(examples=[0.780])


class TokenComparisonResponse(BaseModel):
    text1: str = Field(examples=["I feel extremely chilly"])
    text2: str = Field(examples=["I am so cold"])
    tokens1: list[str] = Field(examples=[["[CLS]", " i", " feel", " extremely", " chilly", "[SEP]"]])
    tokens2: list[str] = Field(examples=[["[CLS]", " i", " am", " so", " cold", "[SEP]"]])
    token_similarity_matrix: list[list[float]] = Field(
        description="Cosines: a row for each token of `text1`, a column for each token of `text2`."
    )
    best_matches1: list[BestMatch] = Field(description="For each token of `text1` the nearest of `text2`.")
    best_matches2: list[BestMatch] = Field(description="For each token of `text2` the nearest of `text1`.")
    maxsim_score: float = Field(description="The mean of `best_matches1`: `maxsim` of the two texts.", examples=[0.694])
    maxsim_score_reversed: float = Field(
        description="The mean of `best_matches2`: `maxsim` with the texts swapped.", examples=[0.689]
    )


class MatchedToken(BaseModel):
    query_token: str = Field(examples=[" winter"])
    text_token: str = Field(description="The nearest token of the result.", examples=[" cold"])
    similarity: float = Field(description="Their cosine.", examples=[0.5])


class SearchResult(BaseModel):
    """A stored text. What was not asked for is left out."""

    search_result_text: str = Field(examples=["I am so cold"])
    similarity_to_query_text: float = Field(description="Cosine similarity.", examples=[0.517])
    fused_score: float | None = Field(
        None, description="With full_text_weight: the sum of weight / (60 + rank) over both rankings.", examples=[None]
    )
    maxsim: float | None = Field(None, description="With late_interaction: what orders the results.", examples=[None])
    matched_tokens: list[MatchedToken] | None = Field(
        None, description="With with_matched_tokens: one for each token of the query.", examples=[None]
    )


class SemanticSearchResponse(BaseModel):
    query_text: str = Field(examples=["winter"])
    results: list[SearchResult] = Field(description="Best first, without the query itself.")


class AdvancedSearchResult(BaseModel):
    search_result_text: str = Field(examples=["I am so cold"])
    similarity_to_query_text: dict[str, float] = Field(
        description="The score by every measure of vectors.", examples=[{"cosine_similarity": 0.517}]
    )


class AdvancedSearchResponse(BaseModel):
    query_text: str = Field(examples=["winter"])
    result_sorting_metric: str = Field(examples=["hoeffdings_d"])
    number_of_candidates: int = Field(description="So many texts were compared by every measure.", examples=[1])
    results: list[AdvancedSearchResult] = Field(description="Best first, without the query itself.")


class SentenceOfDocument(BaseModel):
    text: str = Field(examples=["Snow fell on the hills all night."])
    page: int | None = Field(description="Counted from 1; null where the format has no pages.", examples=[None])
    start: int = Field(description="First character, in the document's extracted text.", examples=[0])
    end: int = Field(description="The character after the last one.", examples=[33])


class SentencesResponse(BaseModel):
    filename: str = Field(examples=["weather.txt"])
    mimetype: str = Field(description="Told from the bytes, not from the name.", examples=["text/plain"])
    total_number_of_sentences: int = Field(examples=[1])
    sentences: list[SentenceOfDocument]


class JobError(BaseModel):
    """Why a job failed or, while it is running, what it waits for."""

    code: str = Field(examples=["unreadable_document"])
    detail: str = Field(examples=["The PDF is encrypted; send it without a password."])


class JobLinks(BaseModel):
    self: str = Field(examples=["/jobs/7f9c2ba4e88f827d61604550760585c8"])
    events: str = Field(examples=["/jobs/7f9c2ba4e88f827d61604550760585c8/events"])
    result: str | None = Field(
        None, description="Null until the job is done.", examples=["/jobs/7f9c2ba4e88f827d61604550760585c8/result"]
    )


class JobDescription(BaseModel):
    """A document that is embedded in the background, and how far that is."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(examples=["7f9c2ba4e88f827d61604550760585c8"])
    state: JobState = Field(examples=["running"])
    filename: str = Field(examples=["book.pdf"])
    model_name: str = Field(examples=["all-MiniLM-L6-v2"])
    size_in_bytes: int = Field(examples=[1048576])
    n_sentences_done: int = Field(
        description="Stored already; searches find them when all are, with the document.", examples=[2560]
    )
    n_sentences_total: int | None = Field(None, description="Null until the file was read.", examples=[6012])
    sentences_per_second: float | None = Field(None, description="Over the last half minute.", examples=[165.2])
    seconds_left: float | None = Field(None, description="At that rate.", examples=[20.9])
    source: str | None = Field(
        None, description="`store` if the document was there already, else `computed`.", examples=[None]
    )
    request_time: datetime = Field(description="When it was submitted.", examples=["2025-01-01T12:00:00Z"])
    response_time: datetime | None = Field(None, description="When it was finished.", examples=[None])
    error: JobError | None = Field(None, examples=[None])
    links: JobLinks


class JobsResponse(_PageResponse):
    jobs: list[JobDescription] = Field(description="Oldest first.")


class ModelDescription(BaseModel):
    """A model and what is known of it; what only its file can tell is null until that is there."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str = Field(examples=["all-MiniLM-L6-v2"])
    state: Literal["known", "downloading", "failed", "on_disk", "loading", "loaded"] = Field(examples=["loaded"])
    is_default: bool = Field(examples=[True])
    kind: Literal["embedding", "reranker"] = Field(examples=["embedding"])
    architecture: str | None = Field(None, examples=["bert"])
    n_dims: int | None = Field(None, examples=[384])
    window: int | None = Field(None, description="Longest text in tokens, as the model was trained.", examples=[512])
    pooling: str | None = Field(None, examples=["mean"])
    size_in_bytes: int | None = Field(None, examples=[27060352])
    licence: str | None = Field(None, examples=["apache-2.0"])
    recipe: str | None = Field(
        None, description="Family of its vectors, once it was loaded.", examples=["e23425c31a80cc52"]
    )
    percentage: float | None = Field(None, description="How far a download has come.", examples=[None])
    error: str | None = Field(None, description="Why a download failed.", examples=[None])


class ModelDescriptionsResponse(BaseModel):
    models: list[ModelDescription]


class ModelNameRequest(_Request):
    model_name: str = Field(description="A model of the list.", examples=["all-MiniLM-L6-v2"])


class AddModelRequest(_Request):
    model_url: str = Field(
        description="Address of a GGUF file on the model hub; https, on a host of MODEL_HUB_HOSTS.",
        examples=[
            "https://huggingface.co/nomic-ai/nomic-embed-text-v1.5-GGUF/resolve/main/nomic-embed-text-v1.5.Q8_0.gguf"
        ],
    )


class MessageResponse(BaseModel):
    message: str = Field(examples=["RAM disks are not in use, so there is nothing to clear."])


class ErrorResponse(BaseModel):
    """What every native endpoint answers instead of its result when something is wrong."""

    detail: str = Field(description="What was wrong and what to do.", examples=["Unknown similarity measure 'cosin'."])
    code: str = Field(description="Stable name of the failure.", examples=["invalid_request_error"])
    field: str | None = Field(None, description="The parameter at fault.", examples=["similarity_measure"])
    index: int | None = Field(None, description="Position in a list at fault.", examples=[None])
    request_id: str | None = Field(None, description="The reply's `x-request-id`.", examples=["7f9c2ba4e88f827d"])


class HealthResponse(BaseModel):
    status: str = Field(examples=["alive"])


class ReadyResponse(BaseModel):
    status: str = Field(examples=["ready"])
    model_name: str = Field(examples=["all-MiniLM-L6-v2"])
    embedding_seconds: float = Field(description="Time of the real embedding made for this answer.", examples=[0.004])

    model_config = ConfigDict(protected_namespaces=())


# ---------------------------------------------------------------------------------------------------------------------
# 2. Records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestStamp:
    """Who asked and when; travels with what a request causes to be stored."""

    ip_address: str | None = None
    request_time: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from any other that is put into its place, without reading it.

    A program can give a file any size and any time of modification (`cp -p`, `touch -r`), but neither the inode of
    another nor a time of its last change (`ctime`) in the past. Times in nanoseconds since 1970.
    """

    size_in_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> FileStamp | None:
        """None if there is no such file, or if what is there is none."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file that can be loaded. `digest` is the SHA-256 of its bytes, in hexadecimal.

    `sidecar` is where measurements of this file are kept; it may be absent and may be unwritable. `stamp` is the file's
    as it was before the digest was taken; None for a file that nobody replaces.
    """

    name: str
    path: Path
    digest: str
    size_in_bytes: int
    sidecar: Path
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class Recipe:
    """How a vector is made; only vectors made the same way are comparable.

    `family` is the digest of what two comparable vectors share. A text that had to be cut or split to fit the
    window gets the rule appended: it must not be taken for the whole text's vector, but is found by the same
    search. So a wider window, set later, leaves every stored vector of a text that fitted valid.
    """

    model_digest: str
    pooling: str
    prompt: str = ""
    normalisation: str = "l2"

    @cached_property
    def family(self) -> str:
        parts = "\0".join((self.model_digest, self.pooling, self.normalisation, self.prompt))
        return sha3_256(parts.encode("utf-8")).hexdigest()[:RECIPE_FAMILY_LENGTH]

    def for_cut_text(self, truncation: str, window: int) -> str:
        """The recipe of a text longer than the window under a truncation rule."""
        return f"{self.family}{RECIPE_RULE_SEPARATOR}{truncation}{window}"


def recipe_family(recipe: str) -> str:
    """The part of a recipe that comparable vectors share."""
    return recipe.split(RECIPE_RULE_SEPARATOR, 1)[0]


@dataclass(frozen=True, slots=True)
class NewEmbedding:
    """One text's embedding on its way into the store. `vector`: float32 (n_dims,).

    `collection` is the one it was asked for in; None for a sentence, which is where its documents are, and for a
    query, which is in none. Only a query's row is not `is_searchable`. `document_row_id` is the document for which a
    sentence is stored: with that it goes.
    """

    text: str
    text_hash: str
    model_name: str
    recipe: str
    vector: np.ndarray
    n_tokens: int
    n_tokens_dropped: int
    stamp: RequestStamp
    response_time: datetime
    collection: str | None = DEFAULT_COLLECTION
    is_searchable: bool = True
    document_row_id: int | None = None


@dataclass(frozen=True, slots=True)
class BulkEmbeddings:
    """Many texts' embeddings from elsewhere, under one recipe. `vectors`: float32 (n_texts, n_dims).

    How many tokens they had is not known, and stored as 0.
    """

    texts: Sequence[str]
    vectors: np.ndarray
    model_name: str
    recipe: str
    collection: str = DEFAULT_COLLECTION
    stamp: RequestStamp = field(default_factory=RequestStamp)


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """One text's embedding as the store holds it. `vector`: float32 (n_dims,), read-only.

    `collections` are those it was asked for in, without those that only its documents are in. What is not
    `is_searchable` was only ever a query.
    """

    row_id: int
    text_hash: str
    vector: np.ndarray
    n_tokens: int
    n_tokens_dropped: int
    collections: frozenset[str] = frozenset()
    is_searchable: bool = True


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """A text's tokens. `spans` are bytes of its UTF-8, None for special tokens and where that cannot be told."""

    ids: list[int]
    texts: list[str]
    spans: list[tuple[int, int] | None]
    is_special: list[bool]


@dataclass(frozen=True, slots=True)
class NewTokenLevelBundle:
    """All token embeddings of one text. `matrix`: float32 (n_tokens, n_dims); `feature_vector`: float32 (4 n_dims,)."""

    text: str
    text_hash: str
    model_name: str
    recipe: str
    tokens: tuple[str, ...]
    matrix: np.ndarray
    feature_vector: np.ndarray
    n_tokens_dropped: int
    stamp: RequestStamp
    response_time: datetime


@dataclass(frozen=True, slots=True)
class StoredTokenLevelBundle:
    """A bundle as the store holds it; shapes as in NewTokenLevelBundle."""

    row_id: int
    text_hash: str
    tokens: tuple[str, ...]
    matrix: np.ndarray
    feature_vector: np.ndarray
    n_tokens_dropped: int


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a document with its provenance.

    `page` counts from 1 and is None where the format has no pages; `start` and `end` are character
    offsets into the document's extracted text.
    """

    text: str
    page: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SentencePlaces:
    """Where the sentences of a document stand and which rows hold them, each an int64 (n_sentences,).

    Arrays, since a book has hundreds of thousands of sentences. A page of 0 means that the format has no pages.
    """

    row_ids: np.ndarray
    pages: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document whose sentences are all stored already."""

    filename: str
    mimetype: str
    file_hash: str
    file_data: bytes | None
    model_name: str
    recipe: str
    segmentation: str
    places: SentencePlaces
    stamp: RequestStamp
    response_time: datetime
    collection: str = DEFAULT_COLLECTION


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document with all of its sentences in the store, from where they are read in parts.

    `n_dims` is 0 where there are no sentences; `has_pages` says that every sentence has a page.
    """

    row_id: int
    filename: str
    mimetype: str
    n_sentences: int
    n_dims: int
    has_pages: bool
    collections: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DocumentJob:
    """A document submitted to be embedded in the background, as the store keeps it.

    A job that was running when the process ended is kept as waiting: it starts again, and what was computed is found.
    """

    id: str
    state: JobState
    filename: str
    model_name: str
    collection: str
    size_in_bytes: int
    stamp: RequestStamp
    response_time: datetime | None = None
    n_sentences: int | None = None
    source: str | None = None
    document_row_id: int | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingGroup:
    """Rows that are comparable with each other, and so share one index."""

    model_name: str
    recipe: str
    n_rows: int


@dataclass(frozen=True, slots=True)
class Page(Generic[Entry]):
    """A part of a listing. `next_after` is what the next part comes after; None: this was the last."""

    entries: list[Entry]
    next_after: int | None = None


@dataclass(frozen=True, slots=True)
class StoredCollection:
    """A collection with the number of embeddings (texts by model and recipe) and of documents in it."""

    name: str
    n_embeddings: int
    n_documents: int


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tables
# ---------------------------------------------------------------------------------------------------------------------


class Float32Vector(TypeDecorator[np.ndarray]):
    """A one-dimensional float32 array as a little-endian BLOB."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: np.ndarray | None, dialect: Any) -> bytes | None:
        return None if value is None else np.ascontiguousarray(value, dtype="<f4").tobytes()

    def process_result_value(self, value: bytes | None, dialect: Any) -> np.ndarray | None:
        return None if value is None else np.frombuffer(value, dtype="<f4")


class Base(DeclarativeBase):
    """Common ancestor of the tables."""


class _RequestTimes:
    """Columns that say who caused a row and how long it took."""

    ip_address: Mapped[str | None] = mapped_column(String)
    request_time: Mapped[datetime | None] = mapped_column(DateTime)
    response_time: Mapped[datetime | None] = mapped_column(DateTime)
    total_time: Mapped[float | None] = mapped_column(Float)


def _vector_json(vector: np.ndarray) -> str:
    return json.dumps([float(str(component)) for component in vector])


class Collection(Base):
    """A name under which texts and documents are put together."""

    __tablename__ = "collections"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String, unique=True)
    creation_time: Mapped[datetime] = mapped_column(DateTime)


class TextEmbedding(_RequestTimes, Base):
    """One text's embedding by one model and one recipe."""

    __tablename__ = "embeddings"
    __table_args__ = (
        UniqueConstraint("text_hash", "model_name", "recipe", name="_text_hash_model_uc"),
        Index("ix_embeddings_model_name_recipe", "model_name", "recipe"),
        # Has all that the filters of a search ask for, so that they need not read the table.
        Index("ix_embeddings_filters", "model_name", "recipe", "collection_id", "request_time"),
        # Only rows of collections that were named, to tell which are empty.
        Index(
            "ix_embeddings_collection_id",
            "collection_id",
            sqlite_where=sql_text(f"collection_id > {DEFAULT_COLLECTION_ID}"),
            postgresql_where=sql_text(f"collection_id > {DEFAULT_COLLECTION_ID}"),
        ),
        # Only rows that a document brought: without it, forgetting a document would read every row of the table.
        Index(
            "ix_embeddings_document_id",
            "document_id",
            sqlite_where=sql_text("document_id IS NOT NULL"),
            postgresql_where=sql_text("document_id IS NOT NULL"),
        ),
        # Ids of deleted rows are never given out again: the indexes know rows by their id.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    text_hash: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String)
    recipe: Mapped[str] = mapped_column(String)
    embedding: Mapped[np.ndarray] = mapped_column(Float32Vector)
    n_tokens: Mapped[int] = mapped_column(Integer)
    n_tokens_dropped: Mapped[int] = mapped_column(Integer, default=0)
    document_id: Mapped[int | None] = mapped_column(ForeignKey("document_embeddings.id", ondelete="SET NULL"))

    # The collection it was first asked for in, HELD_BY_DOCUMENTS, or NULL for what was only ever a search query. No
    # foreign key: a column with one cannot be added without writing every row anew. Only empty collections are deleted.
    collection_id: Mapped[int | None] = mapped_column(
        Integer, server_default=sql_text(str(DEFAULT_COLLECTION_ID)), sort_order=1
    )

    document: Mapped[DocumentEmbedding | None] = relationship()

    @property
    def embedding_json(self) -> str:
        """The vector as the JSON text that the first version stored."""
        return _vector_json(self.embedding)


class CollectionNumber(Base):
    """Numbers for collections, none given out twice: a number that was another's would still stand for its name.

    A row is removed as soon as its number is taken.
    """

    __tablename__ = "collection_numbers"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)


class EmbeddingCollection(Base):
    """A further collection that a text was asked for in, after the one in its row."""

    __tablename__ = "embedding_collections"
    __table_args__ = ({"sqlite_with_rowid": False},)

    embedding_id: Mapped[int] = mapped_column(ForeignKey("embeddings.id", ondelete="CASCADE"), primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collections.id"), primary_key=True, index=True)


class Document(_RequestTimes, Base):
    """A file that was taken in, told apart by its bytes, its name and the model used on it."""

    __tablename__ = "documents"
    __table_args__ = (UniqueConstraint("document_hash", "model_name", "filename", name="_document_hash_model_uc"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    filename: Mapped[str] = mapped_column(String)
    mimetype: Mapped[str] = mapped_column(String)
    model_name: Mapped[str] = mapped_column(String, index=True)
    document_hash: Mapped[str] = mapped_column(String(64), index=True)

    document_embeddings: Mapped[list[DocumentEmbedding]] = relationship(back_populates="document")


class DocumentCollection(Base):
    """A collection that a document was submitted to."""

    __tablename__ = "document_collections"
    __table_args__ = ({"sqlite_with_rowid": False},)

    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collections.id"), primary_key=True, index=True)


class DocumentEmbedding(_RequestTimes, Base):
    """A document's sentences as one recipe and one segmentation made them."""

    __tablename__ = "document_embeddings"
    __table_args__ = (
        UniqueConstraint("file_hash", "model_name", "recipe", "segmentation", "filename", name="_file_hash_model_uc"),
        # Only those that do not show, which are few: a search asks whether there are any.
        Index(
            "ix_document_embeddings_state",
            "state",
            sqlite_where=sql_text(f"state != {DocumentState.THERE:d}"),
            postgresql_where=sql_text(f"state != {DocumentState.THERE:d}"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), index=True)
    filename: Mapped[str] = mapped_column(String, index=True)
    mimetype: Mapped[str] = mapped_column(String)
    file_hash: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String, index=True)
    recipe: Mapped[str] = mapped_column(String)
    segmentation: Mapped[str] = mapped_column(String)
    # Tells a document whose sentences are all there from one that lost some when a text was forgotten.
    n_sentences: Mapped[int] = mapped_column(Integer)
    file_data: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)
    # A DocumentState. Large documents are written and removed by parts; this makes them come and go as a whole.
    state: Mapped[int] = mapped_column(
        Integer, server_default=sql_text(f"{DocumentState.THERE:d}"), default=DocumentState.THERE, sort_order=1
    )

    document: Mapped[Document] = relationship(back_populates="document_embeddings")
    sentences: Mapped[list[DocumentSentence]] = relationship(order_by="DocumentSentence.position")

    @property
    def document_embedding_results_json(self) -> str:
        """Sentences and vectors as the JSON text that the first version stored."""
        return json.dumps(
            [
                {"text": sentence.embedding.text, "embedding": json.loads(sentence.embedding.embedding_json)}
                for sentence in self.sentences
            ]
        )


class DocumentSentence(Base):
    """Where in a document a stored text stands; a text may stand in many documents, and more than once in one."""

    __tablename__ = "document_sentences"

    document_embedding_id: Mapped[int] = mapped_column(
        ForeignKey("document_embeddings.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    embedding_id: Mapped[int] = mapped_column(ForeignKey("embeddings.id", ondelete="CASCADE"), index=True)
    page: Mapped[int | None] = mapped_column(Integer)
    start: Mapped[int] = mapped_column(Integer)
    end: Mapped[int] = mapped_column(Integer)

    embedding: Mapped[TextEmbedding] = relationship()


class FullTextProgress(Base):
    """How far the full-text index has come: one row. The index itself is a virtual table without a class."""

    __tablename__ = "full_text_progress"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    last_row_id: Mapped[int] = mapped_column(Integer)


class IndexSnapshot(Base):
    """The last snapshot of an index; the file is only believed if it has this number."""

    __tablename__ = "index_snapshots"
    __table_args__ = ({"sqlite_with_rowid": False},)

    model_name: Mapped[str] = mapped_column(String, primary_key=True)
    family: Mapped[str] = mapped_column(String, primary_key=True)
    number: Mapped[str] = mapped_column(String(32))


class RowChange(Base):
    """A row that went, or that searches find or do not find any more: what other processes have to take note of.

    Written by triggers, whoever makes the change. New rows are not here: their ids are higher than all before.
    """

    __tablename__ = "row_changes"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    # The table's name.
    kind: Mapped[str] = mapped_column(String)
    row_id: Mapped[int] = mapped_column(Integer)
    model_name: Mapped[str] = mapped_column(String)
    recipe: Mapped[str] = mapped_column(String)
    # Of a bundle; 0 for a text's embedding.
    n_tokens: Mapped[int] = mapped_column(Integer)


# By their types, as `IS NULL` of a trigger's row cannot be relied upon in every SQLite.
_TRIGGERS = (
    """
    CREATE TRIGGER note_deleted_embedding AFTER DELETE ON embeddings BEGIN
        INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
        VALUES ('embeddings', old.id, old.model_name, old.recipe, 0);
    END
    """,
    """
    CREATE TRIGGER note_placed_embedding AFTER UPDATE OF collection_id ON embeddings
    WHEN typeof(old.collection_id) <> typeof(new.collection_id) BEGIN
        INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
        VALUES ('embeddings', new.id, new.model_name, new.recipe, 0);
    END
    """,
    """
    CREATE TRIGGER note_deleted_bundle AFTER DELETE ON token_level_embedding_bundles BEGIN
        INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
        VALUES ('token_level_embedding_bundles', old.id, old.model_name, old.recipe, old.n_tokens);
    END
    """,
    """
    CREATE TRIGGER forget_old_changes AFTER INSERT ON row_changes WHEN new.id % 1000 = 0 BEGIN
        DELETE FROM row_changes WHERE id <= new.id - 100000;
    END
    """,
)
for _trigger in _TRIGGERS:
    event.listen(Base.metadata, "after_create", DDL(_trigger.replace("%", "%%")))


class DocumentJobRow(_RequestTimes, Base):
    """A document submitted to be embedded in the background; its bytes lie in a file until it is finished."""

    __tablename__ = "document_jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    state: Mapped[str] = mapped_column(String)
    filename: Mapped[str] = mapped_column(String)
    model_name: Mapped[str] = mapped_column(String)
    collection: Mapped[str] = mapped_column(String)
    size_in_bytes: Mapped[int] = mapped_column(Integer)
    n_sentences: Mapped[int | None] = mapped_column(Integer)
    source: Mapped[str | None] = mapped_column(String)
    # No foreign key: the document may be forgotten before its job is, and its id is never given out again.
    document_embedding_id: Mapped[int | None] = mapped_column(Integer)
    error_code: Mapped[str | None] = mapped_column(String)
    error_message: Mapped[str | None] = mapped_column(Text)


class TokenLevelEmbeddingBundle(_RequestTimes, Base):
    """All token embeddings of one text, as one row-major matrix."""

    __tablename__ = "token_level_embedding_bundles"
    __table_args__ = (
        UniqueConstraint("input_text_hash", "model_name", "recipe", name="_input_text_hash_model_uc"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    input_text: Mapped[str] = mapped_column(Text)
    input_text_hash: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String, index=True)
    recipe: Mapped[str] = mapped_column(String)
    n_tokens: Mapped[int] = mapped_column(Integer)
    n_tokens_dropped: Mapped[int] = mapped_column(Integer, default=0)
    embeddings: Mapped[np.ndarray] = mapped_column(Float32Vector)

    token_level_embeddings: Mapped[list[TokenLevelEmbedding]] = relationship(
        back_populates="token_level_embedding_bundle", order_by="TokenLevelEmbedding.position"
    )
    combined_feature_vector: Mapped[TokenLevelEmbeddingBundleCombinedFeatureVector | None] = relationship(
        back_populates="token_level_embedding_bundle"
    )

    @property
    def matrix(self) -> np.ndarray:
        """float32 (n_tokens, n_dims)."""
        return self.embeddings.reshape(self.n_tokens, -1)

    @property
    def token_level_embeddings_bundle_json(self) -> str:
        """Tokens and vectors as the JSON text that the first version stored."""
        return json.dumps(
            [
                {"token": row.token, "embedding": json.loads(row.token_level_embedding_json)}
                for row in self.token_level_embeddings
            ]
        )


class TokenLevelEmbedding(_RequestTimes, Base):
    """One token of one text; its vector is row `position` of the bundle's matrix, so it is not stored twice."""

    __tablename__ = "token_level_embeddings"
    __table_args__ = (
        UniqueConstraint(
            "token_level_embedding_bundle_id", "position", name="_token_level_embedding_bundle_position_uc"
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    token: Mapped[str] = mapped_column(Text)
    token_hash: Mapped[str] = mapped_column(String(64))
    position: Mapped[int] = mapped_column(Integer)
    model_name: Mapped[str] = mapped_column(String)
    recipe: Mapped[str] = mapped_column(String)
    token_level_embedding_bundle_id: Mapped[int] = mapped_column(
        ForeignKey("token_level_embedding_bundles.id", ondelete="CASCADE")
    )

    token_level_embedding_bundle: Mapped[TokenLevelEmbeddingBundle] = relationship(
        back_populates="token_level_embeddings"
    )

    @property
    def token_level_embedding_json(self) -> str:
        """The token's vector as the JSON text that the first version stored."""
        return _vector_json(self.token_level_embedding_bundle.matrix[self.position])


class TokenLevelEmbeddingBundleCombinedFeatureVector(Base):
    """Column-wise mean, minimum, maximum and standard deviation of a bundle's matrix, float32 (4 n_dims,).

    The hash covers the text's hash as well as the vector: an uncased model gives "Cold" and "cold" the same
    vector, and both must be storable.
    """

    __tablename__ = "token_level_embedding_bundle_combined_feature_vectors"
    __table_args__ = (
        UniqueConstraint(
            "combined_feature_vector_hash", "model_name", "recipe", name="_combined_feature_vector_hash_model_uc"
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    token_level_embedding_bundle_id: Mapped[int] = mapped_column(
        ForeignKey("token_level_embedding_bundles.id", ondelete="CASCADE"), unique=True
    )
    model_name: Mapped[str] = mapped_column(String, index=True)
    recipe: Mapped[str] = mapped_column(String)
    combined_feature_vector: Mapped[np.ndarray] = mapped_column(Float32Vector)
    combined_feature_vector_hash: Mapped[str] = mapped_column(String(64))

    token_level_embedding_bundle: Mapped[TokenLevelEmbeddingBundle] = relationship(
        back_populates="combined_feature_vector"
    )

    @property
    def combined_feature_vector_json(self) -> str:
        """The vector as the JSON text that the first version stored."""
        return _vector_json(self.combined_feature_vector)


def compute_combined_feature_vector(matrix: np.ndarray) -> np.ndarray:
    """Summarise token embeddings float32 (n_tokens, n_dims) as mean, minimum, maximum, standard deviation: (4 n_dims,).

    The standard deviation is the population's (divided by n), so that it is 0, not NaN, for a single token.
    """
    columns = (matrix.mean(axis=0), matrix.min(axis=0), matrix.max(axis=0), matrix.std(axis=0))
    return np.concatenate(columns).astype(np.float32)
