"""What holds for every measure and every pair of vectors, tried on many by hypothesis."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from similarity_measures import MEASURES, MeasureKind, compute_similarity

Array = NDArray[np.float64]
VECTOR_MEASURES = [name for name, measure in MEASURES.items() if measure.kind is MeasureKind.VECTOR]
SYMMETRIC_MEASURES = [name for name in VECTOR_MEASURES if MEASURES[name].symmetric]
RANK_MEASURES = [
    "spearman_rho",
    "kendall_tau",
    "hoeffdings_d",
    "mutual_information",
    "blomqvist_beta",
    "chatterjee_xi",
]
ODD_MEASURES = [
    "cosine_similarity",
    "dot_product",
    "pearson_correlation",
    "spearman_rho",
    "kendall_tau",
    "blomqvist_beta",
]
ONE_FOR_ITSELF = [
    "cosine_similarity",
    "pearson_correlation",
    "spearman_rho",
    "kendall_tau",
    "hsic",
    "distance_correlation",
    "mutual_information",
    "jensen_shannon",
    "blomqvist_beta",
]

# Quarters keep sums exact, so that what is compared is the measure and not its rounding; few values make many ties.
few = settings(max_examples=20, deadline=None, derandomize=True)


@st.composite
def draw_vectors(draw: st.DrawFn, n_vectors: int) -> Array:
    """float64 (n_vectors, d) with 5 to 80 dimensions."""
    n_dimensions, largest = draw(st.integers(5, 80)), draw(st.sampled_from([3, 400]))
    return draw(arrays(np.int64, (n_vectors, n_dimensions), elements=st.integers(-largest, largest))) / 4


@pytest.mark.parametrize("name", VECTOR_MEASURES)
@few
@given(vectors=draw_vectors(n_vectors=2))
def test_results_are_finite_and_in_the_registered_range(name: str, vectors: Array) -> None:
    """Never NaN, never outside; Hoeffding's D may fall below its range where values are tied, as documented."""
    score = compute_similarity(name, *vectors)
    lowest, highest = MEASURES[name].range
    tied = any(np.unique(vector).size < vector.size for vector in vectors)
    assert math.isfinite(score)
    assert score <= highest
    assert score >= lowest or (name == "hoeffdings_d" and tied)


@pytest.mark.parametrize("name", SYMMETRIC_MEASURES)
@few
@given(vectors=draw_vectors(n_vectors=2))
def test_symmetric_measures_do_not_care_which_vector_asks(name: str, vectors: Array) -> None:
    """measure(x, y) = measure(y, x) for all that the registry calls symmetric."""
    x, y = vectors
    assert compute_similarity(name, x, y) == pytest.approx(compute_similarity(name, y, x), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", VECTOR_MEASURES)
@few
@given(vectors=draw_vectors(n_vectors=18))
def test_batch_gives_bit_for_bit_what_single_pairs_give(name: str, vectors: Array) -> None:
    """Neither neighbours in the batch nor its blocks change a result."""
    query, candidates = vectors[0], vectors[1:]
    one_by_one = [compute_similarity(name, query, candidate) for candidate in candidates]
    assert MEASURES[name].function(query, candidates).tolist() == one_by_one


@pytest.mark.parametrize("name", RANK_MEASURES)
@few
@given(vectors=draw_vectors(n_vectors=2))
def test_rank_measures_ignore_strictly_increasing_maps(name: str, vectors: Array) -> None:
    """Only order counts, so cubing one vector and stretching the other changes no bit of the result."""
    x, y = vectors
    assert compute_similarity(name, x**3, 8 * y + 1) == compute_similarity(name, x, y)


@pytest.mark.parametrize("name", ODD_MEASURES)
@few
@given(vectors=draw_vectors(n_vectors=2))
def test_negating_one_vector_negates_signed_measures(name: str, vectors: Array) -> None:
    """Agreement turned over is disagreement of the same strength."""
    x, y = vectors
    assert compute_similarity(name, x, -y) == pytest.approx(-compute_similarity(name, x, y), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in VECTOR_MEASURES if name != "chatterjee_xi"])
@few
@given(vectors=draw_vectors(n_vectors=2), seed=st.integers(0, 99))
def test_order_of_the_dimensions_does_not_count(name: str, vectors: Array, seed: int) -> None:
    """Shuffling both vectors alike changes nothing but rounding (ξ breaks the query's ties by position)."""
    shuffled = np.random.default_rng(seed).permutation(vectors.T).T
    assert compute_similarity(name, *shuffled) == pytest.approx(compute_similarity(name, *vectors), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ONE_FOR_ITSELF)
@few
@given(vectors=draw_vectors(n_vectors=1))
def test_identical_vectors_score_one(name: str, vectors: Array) -> None:
    """A vector is entirely like itself, unless it shows no variation at all, which scores 0.0."""
    score = compute_similarity(name, vectors[0], vectors[0])
    assert score == pytest.approx(1.0, abs=1e-9) or (score == 0.0 and is_degenerate(name, vectors[0]))


def is_degenerate(name: str, vector: Array) -> bool:
    """No direction, no variation, all but one value alike, all values in one bin, or distances that centring undoes."""
    _, counts = np.unique(vector, return_counts=True)
    if name in ("cosine_similarity", "jensen_shannon"):
        return not vector.any()
    if name == "mutual_information":
        return bool(counts.max() > vector.size / 4)
    if name == "distance_correlation" and not u_centre(np.abs(vector[:, None] - vector)).round(12).any():
        return True
    return bool(counts.max() >= vector.size - 1)


def u_centre(distances: Array) -> Array:
    """Székely and Rizzo's U-centring; (-1, 1, 0, 0, 0) is a vector of which nothing is left."""
    n = len(distances)
    rows = distances.sum(axis=0)
    centred = distances - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return centred


@pytest.mark.parametrize("name", ["euclidean_distance", "manhattan_distance", "chebyshev_distance"])
@few
@given(vectors=draw_vectors(n_vectors=3))
def test_distances_are_metrics(name: str, vectors: Array) -> None:
    """Zero to itself, and never longer than the way round by a third vector."""
    x, y, z = vectors
    assert compute_similarity(name, x, x) == 0.0
    direct, detour = compute_similarity(name, x, z), compute_similarity(name, x, y) + compute_similarity(name, y, z)
    assert direct <= detour * (1 + 1e-12)
