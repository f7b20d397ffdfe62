"""Where a score stands among pairs of texts drawn at random from what is stored.

A raw cosine means nothing between models: 0.7 is next to identical for one and next to nothing for another. A scale
holds the scores of a few thousand random pairs under one model and recipe, sorted, so that a score can be placed among
them. Scales are drawn when they are first asked for, kept in memory, and drawn anew when the store has grown.

The draw is seeded: the same rows give the same scale. Rows of texts that had to be cut take no part. Knows no texts and
no tokens.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

import similarity_measures
from llama_embeddings.storage.store import EmbeddingStore

MIN_TEXTS = 50
N_QUERIES = 256
N_PAIRS = 2_048
# Texts drawn at most: 1.5 MB of vectors of 384 dimensions.
MAX_TEXTS = 1_024
# A scale is drawn anew when this share of new rows has come since.
GROWTH = 0.25
MAX_SCALES = 8
SEED = 20231204


@dataclass(frozen=True, slots=True)
class Standing:
    """Percentiles by measure: the share, in per cent, of random pairs that are less similar.

    Where none can be told, `percentiles` is empty and `reason` says why.
    """

    percentiles: Mapping[str, float] = field(default_factory=dict)
    n_pairs: int = 0
    reason: str | None = None


@dataclass(slots=True)
class _Scale:
    """The pairs drawn, and their sorted scores by measure as far as they were asked for.

    `queries` float32 (q, d); `partners` float32 (q, N_PAIRS / q, d): the texts that each query is paired with.
    """

    n_texts: int
    last_row_id: int
    queries: np.ndarray
    partners: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)


class SimilarityScales:
    """Scales by model and recipe family. For one event loop."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self._scales: OrderedDict[tuple[str, str], _Scale] = OrderedDict()
        self._lock = asyncio.Lock()

    async def place(self, scores: Mapping[str, float], *, model_name: str, family: str) -> Standing:
        """Place the scores of one pair, by canonical name of their vector measures, among those of random pairs."""
        async with self._lock:
            scale = await self._get(model_name, family)
            if scale.n_texts < MIN_TEXTS:
                return Standing(reason=_explain_too_few(scale.n_texts))
            missing = [name for name in scores if name not in scale.scores]
            if missing:
                scale.scores |= await asyncio.to_thread(_score_pairs, scale.queries, scale.partners, missing)
        percentiles = {name: compute_percentile(name, score, scale.scores[name]) for name, score in scores.items()}
        return Standing(percentiles, N_PAIRS)

    async def _get(self, model_name: str, family: str) -> _Scale:
        key = (model_name, family)
        scale = self._scales.get(key)
        last_row_id = await self._store.find_last_row_id(model_name, family)
        if scale is None or last_row_id - scale.last_row_id > GROWTH * scale.n_texts or scale.n_texts < MIN_TEXTS:
            scale = await self._draw(model_name, family)
        self._scales[key] = scale
        self._scales.move_to_end(key)
        while len(self._scales) > MAX_SCALES:
            self._scales.popitem(last=False)
        return scale

    async def _draw(self, model_name: str, family: str) -> _Scale:
        last_row_id = await self._store.find_last_row_id(model_name, family)
        n_texts, vectors = await self._store.sample_vectors(model_name, family, count=MAX_TEXTS)
        if len(vectors) < MIN_TEXTS:
            return _Scale(len(vectors), last_row_id, vectors, vectors)
        queries, partners = draw_pairs(len(vectors), np.random.default_rng(SEED))
        return _Scale(n_texts, last_row_id, vectors[queries], vectors[partners])


def _explain_too_few(n_texts: int) -> str:
    return (
        f"{n_texts} texts are stored under this model and recipe; percentiles are given from {MIN_TEXTS} on, "
        "as pairs of fewer say little."
    )


def draw_pairs(n_texts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries (N_QUERIES,) and of the partners of each (N_QUERIES, N_PAIRS / N_QUERIES), never the same.

    Each query has several partners so that the measures sort it once for all of them.
    """
    queries = rng.integers(0, n_texts, N_QUERIES)
    steps = rng.integers(1, n_texts, (N_QUERIES, N_PAIRS // N_QUERIES))
    return queries, (queries[:, None] + steps) % n_texts


def _score_pairs(queries: np.ndarray, partners: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    rows = [
        similarity_measures.compute_all(query, candidates, names)
        for query, candidates in zip(queries, partners, strict=True)
    ]
    return {name: np.sort(np.concatenate([row[name] for row in rows])) for name in names}


def compute_percentile(name: str, score: float, ordered: np.ndarray) -> float:
    """The share of the pairs, in per cent, that are less similar than a pair with this score; `ordered` is rising."""
    if similarity_measures.MEASURES[name].higher_is_more_similar:
        n_less_similar = np.searchsorted(ordered, score, side="left")
    else:
        n_less_similar = len(ordered) - np.searchsorted(ordered, score, side="right")
    return float(100.0 * n_less_similar / len(ordered))
