"""Search over the stored texts: by meaning, by words, or by both.

    query -> vector -> candidates of the index  -+-> fused by rank -> texts -> hits
          -> words  -> candidates of full text  -+

Filters are applied before the candidates are chosen: a search in a small collection gives as many results as one in
everything. What was only ever a query is no result. Knows no token embeddings: `late_interaction.py` has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from embeddings_data_models import InputType, RequestStamp, Truncation
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.services.models import ModelService
from llama_embeddings.storage.store import EmbeddingStore

RANK_CONSTANT = 60
"""k of reciprocal-rank fusion, 1 / (k + rank): Cormack, Clarke and Büttcher, SIGIR 2009."""
MIN_FUSED_CANDIDATES = 200
"""Of each ranking; a text that is deep in one may be first in the other."""


@dataclass(frozen=True, slots=True)
class SearchFilter:
    """Conditions on what may be found; all that are given have to be met. See the store's RowFilter."""

    collection: str | None = None
    filename: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_of_collection_alone(self) -> bool:
        return self.collection is not None and self.filename is None and self.since is None and self.until is None


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What a search looks for and where. `full_text_weight`: 0 is by meaning alone, 1 by words alone."""

    count: int = 10
    model_name: str | None = None
    filter: SearchFilter = field(default_factory=SearchFilter)
    is_exact: bool = False
    full_text_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A stored text and its cosine similarity to the query. `fused_score` where words counted as well."""

    row_id: int
    text: str
    similarity: float
    fused_score: float | None = None


@dataclass(frozen=True, slots=True)
class SearchScope:
    """A query made ready: its vector, float32 (n_dims,), and the rows among which it is sought."""

    query_text: str
    vector: np.ndarray
    model_name: str
    families: tuple[str, ...]
    allowed: np.ndarray | None
    options: SearchOptions


# Row ids to scores, best first.
_Ranking = dict[int, float]


class SearchService:
    """Queries in, stored texts out."""

    def __init__(
        self, store: EmbeddingStore, models: ModelService, embeddings: EmbeddingService, index: IndexService
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._index = index

    async def search(
        self,
        query_text: str,
        options: SearchOptions,
        *,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
        field: str = "query_text",
    ) -> list[SearchHit]:
        """The distinct stored texts that fit the query best, best first, without the query itself.

        Fewer than asked for only if fewer are there.
        """
        scope = await self.open_scope(query_text, options, truncation=truncation, stamp=stamp, field=field)
        return await self.search_scope(scope, options.count)

    async def open_scope(
        self,
        query_text: str,
        options: SearchOptions,
        *,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
        field: str = "query_text",
    ) -> SearchScope:
        """The query's vector and the rows to look among."""
        [answer] = await self._embeddings.get_or_compute(
            [query_text],
            model_name=options.model_name,
            truncation=truncation,
            input_type=InputType.QUERY,
            stamp=stamp,
            field=field,
            collection=None,
        )
        name = self._models.resolve(options.model_name)
        families = await self._find_families(options.model_name)
        allowed = await self._find_allowed(name, families, options.filter)
        return SearchScope(query_text, answer.vector, name, families, allowed, options)

    async def _find_allowed(self, name: str, families: Sequence[str], wanted: SearchFilter) -> np.ndarray | None:
        """Sorted ids of the rows that may be found; None if that is all of them."""
        if wanted == SearchFilter():
            return None
        if wanted.is_of_collection_alone and await self._store.holds_everything(
            name, families, wanted.collection or ""
        ):
            return None
        return await self._store.find_row_ids(
            name,
            families,
            collection=wanted.collection,
            filename=wanted.filename,
            since=wanted.since,
            until=wanted.until,
        )

    async def _find_families(self, model_name: str | None) -> tuple[str, ...]:
        """Texts embedded as documents, and those embedded without a part to play; often the same."""
        recipes = [await self._models.recipe(model_name, part) for part in (None, InputType.DOCUMENT)]
        return tuple(dict.fromkeys(recipe.family for recipe in recipes))

    async def search_scope(self, scope: SearchScope, count: int) -> list[SearchHit]:
        """The `count` best of a scope."""
        # One more than asked for, as the query may be among the stored texts; more again if that was not enough.
        n_wanted = count + 1
        while True:
            ranking, cosines = await self._rank(scope, n_wanted)
            hits = await self._find_texts(scope, ranking, cosines)
            if len(hits) >= count or len(ranking) < n_wanted:
                return hits[:count]
            n_wanted *= 2

    async def find_hits(self, scope: SearchScope, text_hashes: Sequence[str]) -> list[SearchHit]:
        """Those of these texts that a scope holds, with their cosines; the query left out."""
        found: _Ranking = {}
        for family in scope.families:
            rows = await self._store.find_embeddings(text_hashes, scope.model_name, family)
            found |= {row.row_id: float(row.vector @ scope.vector) for row in rows.values() if row.is_searchable}
        if scope.allowed is not None:
            among = set(scope.allowed[np.isin(scope.allowed, list(found))].tolist())
            found = {row_id: cosine for row_id, cosine in found.items() if row_id in among}
        return await self._find_texts(scope, found, found)

    def count_rows(self, scope: SearchScope) -> int:
        """How many rows a scope holds."""
        if scope.allowed is not None:
            return len(scope.allowed)
        return sum(self._index.size(scope.model_name, family) for family in scope.families)

    async def _rank(self, scope: SearchScope, count: int) -> tuple[_Ranking, _Ranking]:
        """The `count` best rows with the score that they are ordered by, and with their cosines."""
        weight = scope.options.full_text_weight
        if weight == 0.0:
            dense = await self._rank_by_meaning(scope, count)
            return dense, dense
        n_candidates = max(count, MIN_FUSED_CANDIDATES)
        dense, words = await asyncio.gather(
            self._rank_by_meaning(scope, n_candidates), self._rank_by_words(scope, n_candidates)
        )
        fused = fuse_rankings([(1.0 - weight, dense), (weight, words)])
        best = dict(list(fused.items())[:count])
        return best, await self._complete_cosines(scope, dense, best)

    async def _rank_by_meaning(self, scope: SearchScope, count: int) -> _Ranking:
        found: list[tuple[int, float]] = []
        for family in scope.families:
            row_ids, scores = await self._index.search(
                scope.model_name, family, scope.vector, count, allowed=scope.allowed, exact=scope.options.is_exact
            )
            found.extend(zip(row_ids.tolist(), scores.tolist(), strict=True))
        return dict(sorted(found, key=lambda hit: -hit[1])[:count])

    async def _rank_by_words(self, scope: SearchScope, count: int) -> _Ranking:
        found = await self._store.search_text(
            scope.query_text,
            model_name=scope.model_name,
            families=scope.families,
            limit=count,
            row_ids=scope.allowed,
        )
        return dict(found)

    async def _complete_cosines(self, scope: SearchScope, known: _Ranking, rows: _Ranking) -> _Ranking:
        """The cosines of all `rows`: those that only their words brought in are computed now."""
        missing = np.array([row_id for row_id in rows if row_id not in known], np.int64)
        row_ids, vectors = await self._store.read_vectors_of_rows(missing)
        cosines = vectors @ scope.vector if len(row_ids) else np.empty(0, np.float32)
        return known | dict(zip(row_ids.tolist(), cosines.tolist(), strict=True))

    async def _find_texts(self, scope: SearchScope, ranking: _Ranking, cosines: _Ranking) -> list[SearchHit]:
        """One hit for each distinct text, in the order of the ranking, the query left out."""
        texts = await self._store.texts_of_rows(list(ranking))
        is_fused = scope.options.full_text_weight > 0.0
        hits: dict[str, SearchHit] = {}
        for row_id, score in ranking.items():
            text = texts.get(row_id)
            if text is not None and text != scope.query_text and row_id in cosines:
                hits.setdefault(text, SearchHit(row_id, text, cosines[row_id], score if is_fused else None))
        return list(hits.values())


def fuse_rankings(rankings: Sequence[tuple[float, _Ranking]]) -> _Ranking:
    """Weighted reciprocal-rank fusion: the sum of weight / (k + rank) over the rankings that hold a row, best first.

    Scores of different kinds are not comparable, ranks are. Rankings of weight 0 do not bring in rows of their own.
    """
    fused: _Ranking = {}
    for weight, ranking in rankings:
        if weight > 0.0:
            for rank, row_id in enumerate(ranking, start=1):
                fused[row_id] = fused.get(row_id, 0.0) + weight / (RANK_CONSTANT + rank)
    return dict(sorted(fused.items(), key=lambda entry: -entry[1]))
