"""Puts documents into the order in which they answer a query, by what the model can do.

A reranker (pooling RANK) reads query and document together and gives its own score. An embedding model compares what
it has made of each for itself: by the cosine of their vectors, which are kept and found again like all others, or by
MaxSim, the mean over the query's tokens of each one's best cosine among the document's tokens. Which of the two, says a
setting; `docs/decisions/0010-reranking.md` has the measurements. Scores of rerankers are not kept.

Queries and documents are put into no collection: what is only reranked is no result of searches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

import similarity_measures
from embeddings_data_models import InputType, RequestStamp, Truncation
from llama_embeddings.errors import InvalidInput, ServiceError
from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.engine import PairScore
from llama_embeddings.services.embeddings import EmbeddingAnswer, EmbeddingService, Source
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.texts import TextLimits, check_texts, place_of
from llama_embeddings.services.token_embeddings import TokenAnswer, TokenEmbeddingService


class RerankMethod(StrEnum):
    """How an embedding model scores a document."""

    COSINE = "cosine"
    MAXSIM = "maxsim"


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """`index` is the document's place in the request. `score` is in [0, 1], `raw_score` as the model gives it."""

    index: int
    score: float
    raw_score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The documents, best first, and what they cost."""

    documents: list[RankedDocument]
    n_tokens: int
    n_tokens_dropped: int
    n_cache_hits: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Task:
    """One request."""

    query: str
    documents: Sequence[str]
    model_name: str | None
    truncation: Truncation
    stamp: RequestStamp | None
    field: str


class RerankService:
    """Queries and documents in, scores out."""

    def __init__(
        self,
        models: ModelService,
        embeddings: EmbeddingService,
        token_embeddings: TokenEmbeddingService,
        *,
        limits: TextLimits,
        default_truncation: Truncation,
        method: RerankMethod,
    ) -> None:
        self._models = models
        self._embeddings = embeddings
        self._token_embeddings = token_embeddings
        self._limits = limits
        self._default_truncation = default_truncation
        self._method = method

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
        field: str = "documents",
    ) -> Ranking:
        """All documents, best first. Raises what EmbeddingService.get_or_compute raises, naming query or document."""
        if not documents:
            raise InvalidInput("The list of documents is empty; send at least one.", field=field)
        check_texts([query], self._limits, field="query")
        check_texts(documents, self._limits, field=field)
        info = await self._models.info(model_name)
        task = _Task(query, documents, model_name, truncation or self._default_truncation, stamp, field)
        if info.pooling is Pooling.RANK:
            return await self._score_pairs(task, is_probability=info.scores_are_probabilities)
        if self._method is RerankMethod.COSINE:
            return await self._compare_vectors(task)
        return await self._compare_tokens(task)

    async def _score_pairs(self, task: _Task, *, is_probability: bool) -> Ranking:
        async with self._models.lease(task.model_name) as engine:
            outcomes = await engine.score_pairs(task.query, task.documents, task.truncation)
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, ServiceError):
                name, place = place_of(task.field, index, len(outcomes))
                raise outcome.located(field=name, index=place)
        pairs = [outcome for outcome in outcomes if isinstance(outcome, PairScore)]
        raw = np.array([pair.score for pair in pairs])
        return Ranking(
            _order(raw if is_probability else _sigmoid(raw), raw),
            n_tokens=sum(pair.n_tokens for pair in pairs),
            n_tokens_dropped=sum(pair.n_tokens_dropped for pair in pairs),
            queue_seconds=max(pair.queue_seconds for pair in pairs),
            compute_seconds=sum(pair.compute_seconds for pair in pairs),
        )

    async def _compare_vectors(self, task: _Task) -> Ranking:
        get = partial(
            self._embeddings.get_or_compute,
            model_name=task.model_name,
            truncation=task.truncation,
            collection=None,
            stamp=task.stamp,
        )
        (asked,), found = await asyncio.gather(
            get([task.query], input_type=InputType.QUERY, field="query"),
            get(task.documents, input_type=InputType.DOCUMENT, field=task.field),
        )
        cosines = np.stack([answer.vector for answer in found]) @ asked.vector
        return _rank(cosines, [asked, *found])

    async def _compare_tokens(self, task: _Task) -> Ranking:
        get = partial(
            self._token_embeddings.get_or_compute_all,
            model_name=task.model_name,
            truncation=task.truncation,
            stamp=task.stamp,
            must_keep=False,
        )
        (asked,), found = await asyncio.gather(
            get([task.query], input_type=InputType.QUERY, field="query"),
            get(task.documents, input_type=InputType.DOCUMENT, field=task.field),
        )
        scores = await asyncio.to_thread(_compute_maxsim, asked.matrix, [answer.matrix for answer in found])
        return _rank(scores, [asked, *found])


def _rank(cosines: np.ndarray, answers: Sequence[EmbeddingAnswer] | Sequence[TokenAnswer]) -> Ranking:
    """The documents by scores within [-1, 1], and what all answers took."""
    return Ranking(
        _order(_scale_cosines(cosines), cosines),
        n_tokens=sum(answer.n_tokens for answer in answers),
        n_tokens_dropped=sum(answer.n_tokens_dropped for answer in answers),
        n_cache_hits=sum(answer.source is not Source.COMPUTED for answer in answers),
        queue_seconds=max(answer.queue_seconds for answer in answers),
        compute_seconds=sum(answer.compute_seconds for answer in answers),
    )


def _compute_maxsim(query: np.ndarray, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Float32 (n_tokens, n_dims) each in, (len(documents),) out."""
    return np.array([similarity_measures.maxsim(query, document) for document in documents])


def _scale_cosines(cosines: np.ndarray) -> np.ndarray:
    """[-1, 1] to [0, 1], order kept: (1 + cosine) / 2."""
    return np.clip((1.0 + cosines.astype(np.float64)) / 2.0, 0.0, 1.0)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), in the form that cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * scores))


def _order(scores: np.ndarray, raw_scores: np.ndarray) -> list[RankedDocument]:
    """Best first by the raw score; equals in the order of the request."""
    return [
        RankedDocument(int(index), float(scores[index]), float(raw_scores[index]))
        for index in np.argsort(-raw_scores, kind="stable")
    ]
