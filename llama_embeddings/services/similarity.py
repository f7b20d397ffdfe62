"""How alike texts are, by any of the measures: two, all pairs of two lists, or token by token.

Scores are computed in threads; the compiled measures release the interpreter's lock, so the event loop goes on.
Pictures are drawn in a process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

import similarity_measures
from embeddings_data_models import DEFAULT_COLLECTION, RequestStamp, StoredTokenLevelBundle
from llama_embeddings.errors import InvalidInput, RequestTooLarge, UnsupportedMeasure
from llama_embeddings.heat_maps import HeatMap, Painter
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.similarity_scales import SimilarityScales, Standing
from llama_embeddings.services.texts import place_of
from llama_embeddings.services.token_embeddings import TokenAnswer, TokenEmbeddingService
from similarity_measures import Measure, MeasureKind

ALL_MEASURES = "all"
# The one that stands for all of them where one number is wanted.
LEADING_MEASURE = "cosine_similarity"
NO_SCALE_FOR_TOKENS = "Percentiles are of measures that compare whole texts; {} compares tokens."


@dataclass(frozen=True, slots=True)
class Similarity:
    """A score with the vectors it was computed from, float32 (n_dims,) each.

    `measure` is the canonical name, or "all"; then `scores` has every measure, and `score` is the cosine's. `standing`
    is there if it was asked for.
    """

    measure: str
    score: float
    scores: Mapping[str, float]
    vector1: np.ndarray
    vector2: np.ndarray
    standing: Standing | None = None

    @property
    def is_of_all(self) -> bool:
        """Whether every measure was asked for."""
        return self.measure == ALL_MEASURES

    @property
    def leading_measure(self) -> str:
        """The measure that `score` is of."""
        return LEADING_MEASURE if self.is_of_all else self.measure


@dataclass(frozen=True, slots=True)
class SimilarityMatrix:
    """Scores float64 (n, m) of n texts with m others, by the canonical name of their measure."""

    measure: Measure
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """Cosines float64 (n₁, n₂) of two texts' tokens, and MaxSim in both directions."""

    tokens1: tuple[str, ...]
    tokens2: tuple[str, ...]
    cosines: np.ndarray
    maxsim: float
    maxsim_reversed: float


class SimilarityService:
    """Compares texts by their embeddings, or by those of their tokens where the measure asks for them."""

    def __init__(
        self,
        embeddings: EmbeddingService,
        token_embeddings: TokenEmbeddingService,
        models: ModelService,
        scales: SimilarityScales,
        painter: Painter,
        *,
        max_cells: int,
    ) -> None:
        self._embeddings = embeddings
        self._token_embeddings = token_embeddings
        self._models = models
        self._scales = scales
        self._max_cells = max_cells
        self._painter = painter

    async def compare(
        self,
        text1: str,
        text2: str,
        *,
        measure: str,
        model_name: str | None = None,
        with_percentile: bool = False,
        collection: str = DEFAULT_COLLECTION,
        stamp: RequestStamp | None = None,
    ) -> Similarity:
        """Score two texts by a measure, or by "all". Raises UnsupportedMeasure before anything is computed."""
        wanted = _resolve_all(measure)
        first, second = await self._embeddings.get_or_compute(
            [text1, text2], model_name=model_name, collection=collection, stamp=stamp, field=("text1", "text2")
        )
        vectors = first.vector, second.vector
        _check_dimensions(wanted, len(first.vector))
        scores = await asyncio.to_thread(_score_pair, _names_of(wanted, MeasureKind.VECTOR), *vectors)
        if token_measures := _names_of(wanted, MeasureKind.TOKENS):
            one, other = await self._get_bundles([text1, text2], ("text1", "text2"), model_name, stamp)
            scores |= await asyncio.to_thread(_score_pair, token_measures, one.matrix, other.matrix)
        is_of_all = len(wanted) > 1
        similarity = Similarity(
            ALL_MEASURES if is_of_all else wanted[0].name,
            scores[LEADING_MEASURE if is_of_all else wanted[0].name],
            scores,
            *vectors,
        )
        return await self._with_standing(similarity, model_name) if with_percentile else similarity

    async def _with_standing(self, similarity: Similarity, model_name: str | None) -> Similarity:
        placed = {
            name: score for name, score in similarity.scores.items() if name in similarity_measures.VECTOR_MEASURES
        }
        if placed:
            family = (await self._models.recipe(model_name)).family
            name = self._models.resolve(model_name)
            standing = await self._scales.place(placed, model_name=name, family=family)
        else:
            standing = Standing(reason=NO_SCALE_FOR_TOKENS.format(similarity.measure))
        return replace(similarity, standing=standing)

    async def compare_all_pairs(
        self,
        strings: Sequence[str],
        other_strings: Sequence[str] | None = None,
        *,
        measure: str,
        model_name: str | None = None,
        stamp: RequestStamp | None = None,
    ) -> SimilarityMatrix:
        """Score every string with every other one, or with all strings among themselves.

        Raises UnsupportedMeasure, and RequestTooLarge for more cells than the server computes for one request.
        """
        resolved = _resolve(measure)
        n_columns = len(strings if other_strings is None else other_strings)
        self._check_cells(len(strings), n_columns, "strings")
        rows = await self._get_comparable(strings, "strings", resolved, model_name, stamp)
        if other_strings is None:
            scores = await asyncio.to_thread(_score_among_themselves, resolved, rows)
        else:
            columns = await self._get_comparable(other_strings, "other_strings", resolved, model_name, stamp)
            scores = await asyncio.to_thread(_score_all_pairs, resolved, rows, columns)
        return SimilarityMatrix(resolved, scores)

    async def _get_comparable(
        self, texts: Sequence[str], field: str, measure: Measure, model_name: str | None, stamp: RequestStamp | None
    ) -> list[np.ndarray]:
        """What the measure compares: a vector (n_dims,) for each text, or its tokens' (n_tokens, n_dims)."""
        answers = await self._embeddings.get_or_compute(texts, model_name=model_name, stamp=stamp, field=field)
        if measure.kind is MeasureKind.VECTOR:
            _check_dimensions([measure], len(answers[0].vector))
            return [answer.vector for answer in answers]
        bundles = await self._get_bundles(texts, field, model_name, stamp)
        return [bundle.matrix for bundle in bundles]

    async def compare_token_by_token(
        self, text1: str, text2: str, *, model_name: str | None = None, stamp: RequestStamp | None = None
    ) -> TokenComparison:
        """The cosine of every token of one text with every token of the other, each as seen in its own text.

        Raises RequestTooLarge for more pairs of tokens than the server computes for one request.
        """
        bundles = await self._get_bundles([text1, text2], ("text1", "text2"), model_name, stamp)
        self._check_cells(len(bundles[0].tokens), len(bundles[1].tokens), "text1")
        cosines = await asyncio.to_thread(
            similarity_measures.compute_token_cosines, bundles[0].matrix, bundles[1].matrix
        )
        return TokenComparison(
            bundles[0].tokens,
            bundles[1].tokens,
            cosines,
            maxsim=float(cosines.max(axis=1).mean()),
            maxsim_reversed=float(cosines.max(axis=0).mean()),
        )

    async def _get_bundles(
        self,
        texts: Sequence[str],
        field: str | Sequence[str],
        model_name: str | None,
        stamp: RequestStamp | None,
    ) -> list[StoredTokenLevelBundle]:
        """Token embeddings in the order of the texts; errors name the first text at fault."""
        outcomes = await asyncio.gather(
            *(self._token_embeddings.get_or_compute(text, model_name=model_name, stamp=stamp) for text in texts),
            return_exceptions=True,
        )
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, InvalidInput):
                name, place = place_of(field, index, len(texts))
                raise outcome.located(field=name, index=place)
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome.bundle for outcome in outcomes if isinstance(outcome, TokenAnswer)]

    def _check_cells(self, n_rows: int, n_columns: int, field: str) -> None:
        if n_rows * n_columns > self._max_cells:
            raise RequestTooLarge(
                f"A matrix of {n_rows} x {n_columns} has {n_rows * n_columns} cells, at most {self._max_cells} are "
                "computed for one request (MAX_SIMILARITY_MATRIX_CELLS). Ask for it in parts.",
                field=field,
            )

    async def draw_matrix(
        self, matrix: SimilarityMatrix, strings: Sequence[str], other_strings: Sequence[str] | None
    ) -> bytes:
        """A PNG of the matrix with the strings along its sides."""
        columns = strings if other_strings is None else other_strings
        return await self._painter.draw(
            HeatMap(
                matrix.scores,
                tuple(strings),
                tuple(columns),
                title=matrix.measure.name,
                higher_is_better=matrix.measure.higher_is_more_similar,
            )
        )

    async def draw_token_comparison(self, comparison: TokenComparison) -> bytes:
        """A PNG of the tokens' cosines with the best of each row marked: their mean is the MaxSim."""
        return await self._painter.draw(
            HeatMap(
                comparison.cosines,
                comparison.tokens1,
                comparison.tokens2,
                title=f"Cosines of tokens. MaxSim {comparison.maxsim:.3f}, the mean of each row's best",
                marks=comparison.cosines.argmax(axis=1),
            )
        )


def _resolve(measure: str) -> Measure:
    try:
        return similarity_measures.resolve_measure(measure)
    except similarity_measures.UnknownMeasure as error:
        raise UnsupportedMeasure(measure, error.known) from None


def _resolve_all(measure: str) -> list[Measure]:
    """The measure of this name, or every one for "all"."""
    if measure.strip().lower() == ALL_MEASURES:
        return list(similarity_measures.MEASURES.values())
    return [_resolve(measure)]


def _names_of(measures: Sequence[Measure], kind: MeasureKind) -> list[str]:
    return [measure.name for measure in measures if measure.kind is kind]


def _check_dimensions(measures: Sequence[Measure], n_dims: int) -> None:
    """Raise InvalidInput where the model's vectors are too short for a measure."""
    for measure in measures:
        if n_dims < measure.minimum_dimensions:
            raise InvalidInput(
                f"The model's embeddings have {n_dims} dimensions; {measure.name} needs at least "
                f"{measure.minimum_dimensions}. Choose another measure.",
                field="similarity_measure",
            )


def _score_pair(names: Sequence[str], first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    if len(names) > 1:
        scored = similarity_measures.compute_all(first, second[None], names)
        return {name: float(scores[0]) for name, scores in scored.items()}
    return {name: similarity_measures.compute_similarity(name, first, second) for name in names}


def _score_all_pairs(measure: Measure, rows: Sequence[np.ndarray], columns: Sequence[np.ndarray]) -> np.ndarray:
    """float64 (n, m); a row is one call for a vector measure."""
    if measure.kind is MeasureKind.VECTOR:
        candidates = np.asarray(columns, np.float64)
        return np.array([measure.function(row, candidates) for row in rows], np.float64)
    return np.array([[measure.function(row, column) for column in columns] for row in rows], np.float64)


def _score_among_themselves(measure: Measure, rows: Sequence[np.ndarray]) -> np.ndarray:
    """float64 (n, n); each pair once where the measure does not care about the order."""
    if not measure.symmetric:
        return _score_all_pairs(measure, rows, rows)
    scores = np.empty((len(rows), len(rows)))
    matrix = np.asarray(rows, np.float64)
    for place in range(len(rows)):
        scores[place, place:] = scores[place:, place] = measure.function(matrix[place], matrix[place:])
    return scores
