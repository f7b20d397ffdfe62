"""Search by meaning over every text that was embedded with a model, queries left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embeddings_data_models import InputType, RequestStamp, Truncation
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.services.models import ModelService
from llama_embeddings.storage.store import EmbeddingStore


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A stored text and its cosine similarity to the query."""

    text: str
    similarity: float


class SearchService:
    """Queries in, stored texts out."""

    def __init__(
        self, store: EmbeddingStore, models: ModelService, embeddings: EmbeddingService, indexing: IndexService
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._indexing = indexing

    async def search(
        self,
        query_text: str,
        *,
        count: int,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
        field: str = "query_text",
    ) -> list[SearchHit]:
        """The `count` distinct stored texts nearest to the query, best first, without the query itself.

        Fewer only if fewer are stored.
        """
        [answer] = await self._embeddings.get_or_compute(
            [query_text],
            model_name=model_name,
            truncation=truncation,
            input_type=InputType.QUERY,
            collection=None,
            stamp=stamp,
            field=field,
        )
        name = self._models.resolve(model_name)
        # Texts embedded as documents, and those embedded without a part to play; most models make no difference.
        families = {(await self._models.recipe(model_name, part)).family for part in (None, InputType.DOCUMENT)}
        # One more than asked for, as the query may be among the stored texts; more again if that was not enough.
        n_wanted = count + 1
        while True:
            found = await self._search_families(name, families, answer.vector, n_wanted)
            texts = await self._store.texts_of_rows([row_id for row_id, _ in found])
            hits: dict[str, float] = {}
            for row_id, score in found:
                text = texts.get(row_id)
                if text is not None and text != query_text:
                    hits.setdefault(text, score)
            if len(hits) >= count or len(found) < n_wanted:
                return [SearchHit(text, score) for text, score in list(hits.items())[:count]]
            n_wanted *= 2

    async def _search_families(
        self, name: str, families: set[str], vector: np.ndarray, count: int
    ) -> list[tuple[int, float]]:
        """Row ids and cosines over all families, best first."""
        found: list[tuple[int, float]] = []
        for family in families:
            row_ids, scores = await self._indexing.search(name, family, vector, count)
            found.extend(zip(row_ids.tolist(), scores.tolist(), strict=True))
        return sorted(found, key=lambda hit: -hit[1])[:count]
