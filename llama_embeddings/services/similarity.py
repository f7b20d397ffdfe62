"""How alike two texts are, by any of the measures."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

import similarity_measures
from embeddings_data_models import RequestStamp
from llama_embeddings.errors import UnsupportedMeasure
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.token_embeddings import TokenEmbeddingService


@dataclass(frozen=True, slots=True)
class Similarity:
    """A score with the vectors it was computed from, float32 (n_dims,) each. `measure` is the canonical name."""

    measure: str
    score: float
    vector1: np.ndarray
    vector2: np.ndarray


class SimilarityService:
    """Compares texts by their embeddings, or by those of their tokens where the measure asks for them."""

    def __init__(self, embeddings: EmbeddingService, token_embeddings: TokenEmbeddingService) -> None:
        self._embeddings = embeddings
        self._token_embeddings = token_embeddings

    async def compare(
        self, text1: str, text2: str, *, measure: str, model_name: str | None = None, stamp: RequestStamp | None = None
    ) -> Similarity:
        """Score two texts. Raises UnsupportedMeasure before anything is computed."""
        try:
            resolved = similarity_measures.resolve_measure(measure)
        except similarity_measures.UnknownMeasure as error:
            raise UnsupportedMeasure(measure, error.known) from None
        first, second = await self._embeddings.get_or_compute(
            [text1, text2], model_name=model_name, stamp=stamp, field=("text1", "text2")
        )
        if resolved.kind is similarity_measures.MeasureKind.TOKENS:
            bundles = [
                await self._token_embeddings.get_or_compute(text, model_name=model_name, stamp=stamp)
                for text in (text1, text2)
            ]
            compared = bundles[0].matrix, bundles[1].matrix
        else:
            compared = first.vector, second.vector
        score = await asyncio.to_thread(similarity_measures.compute_similarity, resolved.name, *compared)
        return Similarity(resolved.name, score, first.vector, second.vector)
