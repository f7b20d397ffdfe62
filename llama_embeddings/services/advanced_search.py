"""Search in two steps: the nearest texts by cosine, then every measure on them, ordered by the one asked for."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import numpy as np

import similarity_measures
from embeddings_data_models import RequestStamp
from llama_embeddings.errors import UnsupportedMeasure
from llama_embeddings.services.search import SearchHit, SearchOptions, SearchScope, SearchService
from llama_embeddings.storage.store import EmbeddingStore

MAX_CANDIDATES = 1_000
"""All measures on so many take about a second."""


@dataclass(frozen=True, slots=True)
class AdvancedHit:
    """A stored text with its score by every measure of vectors."""

    text: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class AdvancedResult:
    """`measure` is the canonical name of what the hits are ordered by; `n_candidates` were compared by it."""

    measure: str
    n_candidates: int
    hits: list[AdvancedHit]


class AdvancedSearchService:
    """Queries in, stored texts with all their scores out."""

    def __init__(self, store: EmbeddingStore, search: SearchService) -> None:
        self._store = store
        self._search = search

    async def search(
        self,
        query_text: str,
        options: SearchOptions,
        *,
        measure: str,
        candidate_share: float,
        stamp: RequestStamp | None = None,
    ) -> AdvancedResult:
        """The best of the `candidate_share` (0 to 1) of all rows that are nearest by cosine.

        At least as many candidates as results are wanted, and at most MAX_CANDIDATES or that. Raises UnsupportedMeasure
        before anything is computed.
        """
        resolved = _resolve(measure)
        scope = await self._search.open_scope(query_text, options, stamp=stamp)
        share = math.ceil(candidate_share * self._search.count_rows(scope))
        n_candidates = max(min(share, MAX_CANDIDATES), options.count)
        candidates = await self._search.search_scope(scope, n_candidates)
        hits = await self._score(scope, candidates)
        hits.sort(key=lambda hit: hit.scores[resolved.name], reverse=resolved.higher_is_more_similar)
        return AdvancedResult(resolved.name, len(hits), hits[: options.count])

    async def _score(self, scope: SearchScope, candidates: list[SearchHit]) -> list[AdvancedHit]:
        """Every measure on those candidates that are still there, in one pass."""
        texts = {hit.row_id: hit.text for hit in candidates}
        row_ids, vectors = await self._store.read_vectors_of_rows(np.array(list(texts), np.int64))
        if len(row_ids) == 0:
            return []
        scores = await asyncio.to_thread(similarity_measures.compute_all, scope.vector, vectors)
        names, columns = list(scores), np.stack(list(scores.values()), axis=1)
        return [
            AdvancedHit(texts[row_id], dict(zip(names, row, strict=True)))
            for row_id, row in zip(row_ids.tolist(), columns.tolist(), strict=True)
        ]


def _resolve(name: str) -> similarity_measures.Measure:
    """A measure of vectors by any of its spellings."""
    known = similarity_measures.VECTOR_MEASURES
    try:
        measure = similarity_measures.resolve_measure(name)
    except similarity_measures.UnknownMeasure:
        raise UnsupportedMeasure(name, known) from None
    if measure.name not in known:
        raise UnsupportedMeasure(name, known)
    return measure
