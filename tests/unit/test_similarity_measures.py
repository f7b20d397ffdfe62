"""Each measure against an independent reference, and what all of them promise about input and results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hyppo.independence import Dcorr, Hsic
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import distance
from sklearn.metrics import normalized_mutual_info_score  # type: ignore[import-untyped]

import similarity_measures
from similarity_measures import (
    MEASURES,
    QUICK_MEASURES,
    VECTOR_MEASURES,
    UnknownMeasure,
    chatterjee_xi,
    compute_all,
    compute_similarity,
    compute_token_cosines,
    distance_correlation,
    hoeffdings_d,
    hsic,
    maxsim,
    resolve_measure,
)

Array = NDArray[np.float64]
DEPENDENCES = [name for name in VECTOR_MEASURES if "distance" not in name or name == "distance_correlation"]
SIZES = [5, 6, 17, 64, 65, 384, 1025]
MODULE = Path(similarity_measures.__file__)

# SAS Institute, Base SAS Procedures Guide: Statistical Procedures, the CORR procedure: weight, oxygen intake and time
# to run of 31 men; NaN where a value is missing.
FITNESS = np.array(
    [
        [89.47, 44.609, 11.37], [75.07, 45.313, 10.07], [85.84, 54.297, 8.65], [68.15, 59.571, 8.17],
        [89.02, 49.874, math.nan], [77.45, 44.811, 11.63], [75.98, 45.681, 11.95], [81.19, 49.091, 10.85],
        [81.42, 39.442, 13.08], [81.87, 60.055, 8.63], [73.03, 50.541, 10.13], [87.66, 37.388, 14.03],
        [66.45, 44.754, 11.12], [79.15, 47.273, 10.60], [83.12, 51.855, 10.33], [81.42, 49.156, 8.95],
        [69.63, 40.836, 10.95], [77.91, 46.672, 10.00], [91.63, 46.774, 10.25], [73.37, math.nan, 10.08],
        [73.37, 39.407, 12.63], [79.38, 46.080, 11.17], [76.32, 45.441, 9.63], [70.87, 54.625, 8.92],
        [67.25, 45.118, 11.08], [91.63, 39.203, 12.88], [73.71, 45.790, 10.47], [59.08, 50.545, 9.93],
        [76.32, math.nan, math.nan], [61.24, 47.920, 11.50], [82.78, 47.467, 10.50],
    ]
)  # fmt: skip
WEIGHT, OXYGEN, RUN_TIME = 0, 1, 2


def make_pair(size: int, *, ties: bool = False, seed: int = 0) -> tuple[Array, Array]:
    """Two dependent vectors; with ties, of a few distinct values, neither constant."""
    rng = np.random.default_rng(1000 * seed + size)
    x = rng.standard_normal(size)
    y = 0.5 * x + rng.standard_normal(size)
    if ties:
        x, y = np.round(1.5 * x), np.round(1.5 * y)
        x[:2], y[:2] = (-1, 1), (1, 2)
    return x, y


def select_fitness(first: int, second: int) -> tuple[Array, Array]:
    complete = ~np.isnan(FITNESS[:, [first, second]]).any(axis=1)
    return FITNESS[complete, first], FITNESS[complete, second]


def split_signs(vector: Array) -> Array:
    return np.concatenate([np.maximum(vector, 0), np.maximum(-vector, 0)])


def compute_hoeffding_by_definition(x: Array, y: Array) -> float:
    """Written from the formula, point by point, with every tie looked at."""
    n = len(x)
    R, S = stats.rankdata(x), stats.rankdata(y)
    Q = np.ones(n)
    for i, j in product(range(n), repeat=2):
        if i != j:
            Q[i] += (1.0 if x[j] < x[i] else 0.5 * (x[j] == x[i])) * (1.0 if y[j] < y[i] else 0.5 * (y[j] == y[i]))
    D1, D2 = ((Q - 1) * (Q - 2)).sum(), ((R - 1) * (R - 2) * (S - 1) * (S - 2)).sum()
    D3 = ((R - 2) * (S - 2) * (Q - 1)).sum()
    return 30 * ((n - 2) * (n - 3) * D1 + D2 - 2 * (n - 2) * D3) / (n * (n - 1) * (n - 2) * (n - 3) * (n - 4))


def compute_chatterjee_by_definition(x: Array, y: Array) -> float:
    n = len(x)
    ordered = y[np.argsort(x, kind="stable")]
    r = [(y <= value).sum() for value in ordered]
    left = [(y >= value).sum() for value in ordered]
    return 1 - n * np.abs(np.diff(r)).sum() / (2 * sum(count * (n - count) for count in left))


REFERENCES: dict[str, Any] = {
    "cosine_similarity": lambda x, y: 1 - distance.cosine(x, y),
    "dot_product": np.dot,
    "euclidean_distance": distance.euclidean,
    "manhattan_distance": distance.cityblock,
    "chebyshev_distance": distance.chebyshev,
    "pearson_correlation": lambda x, y: stats.pearsonr(x, y).statistic,
    "spearman_rho": lambda x, y: stats.spearmanr(x, y).statistic,
    "kendall_tau": lambda x, y: stats.kendalltau(x, y).statistic,
    "hsic": lambda x, y: Hsic().statistic(x[:, None], y[:, None]),
    "distance_correlation": lambda x, y: Dcorr().statistic(x[:, None], y[:, None]),
    "jensen_shannon": lambda x, y: 1 - distance.jensenshannon(split_signs(x), split_signs(y), base=2) ** 2,
    "chatterjee_xi": compute_chatterjee_by_definition,
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REFERENCES)
def test_measure_equals_its_independent_implementation(name: str, size: int, ties: bool) -> None:
    """SciPy, NumPy and hyppo give the same value, with and without ties, across word and block boundaries."""
    x, y = make_pair(size, ties=ties)
    assert compute_similarity(name, x, y) == pytest.approx(REFERENCES[name](x, y), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second"), [(WEIGHT, OXYGEN), (WEIGHT, RUN_TIME), (OXYGEN, RUN_TIME), (WEIGHT, WEIGHT)]
)
def test_rank_measures_agree_with_their_references_on_measured_data(first: int, second: int) -> None:
    """Real observations with a few ties, as the weights of 31 men have, against SciPy and Hoeffding's definition."""
    x, y = select_fitness(first, second)
    assert compute_similarity("hoeffdings_d", x, y) == pytest.approx(compute_hoeffding_by_definition(x, y), abs=1e-12)
    for name in ("pearson_correlation", "spearman_rho", "kendall_tau", "chatterjee_xi"):
        assert compute_similarity(name, x, y) == pytest.approx(REFERENCES[name](x, y), abs=1e-12)


def test_hoeffdings_d_equals_the_published_example_with_threefold_ties() -> None:
    """Heights and weights of ten people, the last three equal in both, from a published explanation of the measure."""
    heights = [55, 62, 68, 70, 72, 65, 67, 78, 78, 78]
    weights = [125, 145, 160, 156, 190, 150, 165, 250, 250, 250]
    assert compute_similarity("hoeffdings_d", heights, weights) == pytest.approx(0.4107142857142857, abs=1e-15)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [5, 8, 63, 64, 65, 200])
def test_hoeffdings_d_equals_the_quadratic_definition(size: int, ties: bool) -> None:
    """The counting tree finds the same bivariate ranks as comparing every point with every other."""
    x, y = make_pair(size, ties=ties, seed=1)
    assert compute_similarity("hoeffdings_d", x, y) == pytest.approx(compute_hoeffding_by_definition(x, y), abs=1e-12)


@pytest.mark.parametrize("measure", [hoeffdings_d, chatterjee_xi])
def test_dependence_averages_zero_over_all_orders(measure: Any) -> None:
    """Both statistics have the expectation 0 under independence, so all permutations of six values cancel out."""
    orders = np.array(list(permutations(range(6))), dtype=np.float64)
    assert measure(np.arange(6.0), orders).mean() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("direction", [1, -1])
def test_hoeffdings_d_of_a_monotone_relation_is_one(direction: int) -> None:
    """Rising or falling, a strictly monotone relation is complete dependence."""
    x, _ = make_pair(384)
    assert compute_similarity("hoeffdings_d", x, direction * np.exp(x)) == pytest.approx(1.0, abs=1e-9)


def test_dependences_see_a_parabola_that_correlations_do_not() -> None:
    """y = x² has no linear correlation, and strong dependence."""
    x = np.linspace(-1, 1, 385)
    assert abs(compute_similarity("pearson_correlation", x, x**2)) < 1e-9
    for name in ("hoeffdings_d", "hsic", "distance_correlation", "mutual_information", "chatterjee_xi"):
        assert compute_similarity(name, x, x**2) > 0.15


def test_chatterjee_xi_equals_scipy_and_is_directed() -> None:
    """SciPy's statistic, and a parabola is a function of x while x is none of the parabola."""
    x, y = make_pair(384)
    assert compute_similarity("chatterjee_xi", x, y) == pytest.approx(stats.chatterjeexi(x, y).statistic, abs=1e-12)
    x = np.linspace(-1, 1.1, 384)
    assert compute_similarity("chatterjee_xi", x, x**2) > compute_similarity("chatterjee_xi", x**2, x) + 0.3


def test_chatterjee_xi_of_identical_vectors_is_its_documented_maximum() -> None:
    """(d - 2) / (d + 1) without ties."""
    assert compute_similarity("chatterjee_xi", range(384), range(384)) == pytest.approx(382 / 385, abs=1e-12)


@pytest.mark.parametrize("size", [4, 5, 100])
def test_distance_correlation_equals_its_definition_by_matrices(size: int) -> None:
    """The sums by sorting equal the products of the U-centred distance matrices."""

    def center(values: Array) -> Array:
        D = np.abs(values[:, None] - values[None, :])
        D = D - (D.sum(0)[None, :] + D.sum(1)[:, None]) / (size - 2) + D.sum() / ((size - 1) * (size - 2))
        np.fill_diagonal(D, 0)
        return D

    x, y = make_pair(size, seed=2)
    A, B = center(x), center(y)
    expected = (A * B).sum() / math.sqrt((A * A).sum() * (B * B).sum())
    assert compute_similarity("distance_correlation", x, y) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("measure", [hsic, distance_correlation])
def test_one_hot_vectors_have_no_centred_variance_and_give_zero(measure: Any) -> None:
    """The U-centred matrix of a vector with all but one value the same is zero; rounding must not divide by it."""
    one_hot = np.full(50, 0.1)
    one_hot[7] = 0.9
    assert measure(one_hot, [one_hot, np.arange(50.0)]).tolist() == [0.0, 0.0]


def test_hsic_takes_its_bandwidth_from_the_query_alone() -> None:
    """As in hyppo the first vector's median distance serves both kernels, so the order of the two matters."""
    x, y = make_pair(100)
    for first, second in ((x, 3 * y), (3 * y, x)):
        expected = Hsic().statistic(first[:, None], second[:, None])
        assert compute_similarity("hsic", first, second) == pytest.approx(expected, abs=1e-9)
    assert compute_similarity("hsic", x, 3 * y) != pytest.approx(compute_similarity("hsic", 3 * y, x), abs=1e-3)


@pytest.mark.parametrize("size", [2, 27, 384, 1000])
def test_mutual_information_equals_scikit_learn_on_the_same_bins(size: int) -> None:
    """Equal-frequency bins made by ordinal ranks, scored by scikit-learn."""
    x, y = make_pair(size)
    n_bins = max(2, round(size ** (1 / 3)))
    x_bins, y_bins = ((2 * stats.rankdata(v) - 1) * n_bins // (2 * size) for v in (x, y))
    assert np.ptp(np.unique(x_bins, return_counts=True)[1]) <= 1
    expected = normalized_mutual_info_score(x_bins, y_bins)
    assert compute_similarity("mutual_information", x, y) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_by_hand() -> None:
    """Two bins of two: the same bins share one bit of one, crossed bins share none."""
    assert compute_similarity("mutual_information", [1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(1.0)
    assert compute_similarity("mutual_information", [1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.0)


def test_jensen_shannon_by_hand() -> None:
    """Scale does not count, opposite signs share nothing, and half the mass in common is half a bit."""
    assert compute_similarity("jensen_shannon", [1, -2, 3], [2, -4, 6]) == pytest.approx(1.0)
    assert compute_similarity("jensen_shannon", [1, -2, 3], [-1, 2, -3]) == 0.0
    assert compute_similarity("jensen_shannon", [1, 1, 0], [1, 0, -1]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.0),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1.0),  # the middle point lies on both medians
        ([1, 2, 3, 4, 5], [1, 3, 2, 4, 5], 0.75),  # one point lies on each median
        ([0, 0, 0, 0, 9], [1, 2, 3, 4, 5], 0.5),  # four points lie on a median: 1 / √(1 · 4)
    ],
)
def test_blomqvist_beta_by_hand(x: list[float], y: list[float], expected: float) -> None:
    """Quadrant counts small enough to do on paper."""
    assert compute_similarity("blomqvist_beta", x, y) == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_blomqvist_beta_equals_signs_about_numpys_median(size: int, ties: bool) -> None:
    """Counting ranks gives the signs that subtracting the median gives."""
    x, y = make_pair(size, ties=ties)
    s, t = np.sign(x - np.median(x)), np.sign(y - np.median(y))
    assert compute_similarity("blomqvist_beta", x, y) == pytest.approx((s @ t) / math.sqrt((s @ s) * (t @ t)))


def test_maxsim_is_the_mean_of_the_best_cosines() -> None:
    """By hand: one query token has its twin, the other meets the candidate at 45 degrees."""
    assert maxsim([[2, 0], [0, 5]], [[1, 0], [1, 1]]) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert maxsim([[1, 0]], [[1, 0], [0, 1]]) == 1.0
    assert maxsim([[1, 0], [0, 1]], [[1, 0]]) == 0.5


def test_maxsim_equals_pairwise_cosines_of_scipy() -> None:
    """Every token against every token by SciPy, best of each row, mean."""
    rng = np.random.default_rng(3)
    queries, candidates = rng.standard_normal((7, 32)), rng.standard_normal((11, 32))
    expected = (1 - distance.cdist(queries, candidates, "cosine")).max(axis=1).mean()
    assert compute_similarity("maxsim", queries, candidates) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", DEPENDENCES)
def test_constant_vectors_score_zero(name: str) -> None:
    """Where the formula divides by zero the result is 0.0 and never NaN: against others and against itself."""
    x, _ = make_pair(50)
    flat = np.zeros(50) if name in ("cosine_similarity", "dot_product", "jensen_shannon") else np.full(50, 0.1)
    scores = [compute_similarity(name, *pair) for pair in ((flat, x), (x, flat), (flat, flat))]
    assert scores == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", VECTOR_MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e101])
def test_unusable_values_are_refused_with_their_place(name: str, bad: float) -> None:
    """NaN, infinity and absurd magnitudes raise ValueError naming candidate and dimension."""
    x, y = make_pair(20)
    broken = y.copy()
    broken[13] = bad
    with pytest.raises(ValueError, match=r"candidate 1 has the value .* at dimension 13"):
        MEASURES[name].function(x, [y, broken])
    with pytest.raises(ValueError, match=r"query has the value .* at dimension 13"):
        MEASURES[name].function(broken, [y])


@pytest.mark.parametrize("name", VECTOR_MEASURES)
def test_wrong_shapes_are_refused(name: str) -> None:
    """Different lengths, empty vectors and too few dimensions raise ValueError with the numbers in the message."""
    measure = MEASURES[name]
    with pytest.raises(ValueError, match="different lengths: 6 and 7"):
        compute_similarity(name, range(6), range(7))
    with pytest.raises(ValueError, match="0 dimensions"):
        compute_similarity(name, [], [])
    with pytest.raises(ValueError, match="Expected"):
        compute_similarity(name, np.ones((2, 6)), np.ones((2, 6)))
    if measure.minimum_dimensions > 1:
        with pytest.raises(ValueError, match=f"at least {measure.minimum_dimensions}"):
            compute_similarity(name, range(measure.minimum_dimensions - 1), range(measure.minimum_dimensions - 1))
    assert math.isfinite(compute_similarity(name, range(measure.minimum_dimensions), range(measure.minimum_dimensions)))


@pytest.mark.parametrize(
    ("query", "candidate", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "different lengths: 3 and 4"),
        (np.ones((0, 3)), np.ones((2, 3)), "query token embeddings"),
        (np.ones(3), np.ones((2, 3)), "query token embeddings"),
        (np.ones((2, 3)), np.full((2, 3), math.nan), "candidate token 0"),
    ],
)
def test_maxsim_refuses_what_it_cannot_compare(query: Array, candidate: Array, message: str) -> None:
    """The same promises for token matrices."""
    with pytest.raises(ValueError, match=message):
        maxsim(query, candidate)


@pytest.mark.parametrize("name", VECTOR_MEASURES)
def test_no_candidates_give_no_scores(name: str) -> None:
    """An empty batch is an answer, not an error."""
    scores = MEASURES[name].function(np.arange(8.0), np.empty((0, 8)))
    assert scores.shape == (0,)
    assert scores.dtype == np.float64


@pytest.mark.parametrize("name", VECTOR_MEASURES)
def test_results_do_not_depend_on_how_the_array_lies_in_memory(name: str) -> None:
    """Read-only, strided, column-major, unaligned, big-endian, lists: the same values, nothing compiled again."""
    rng = np.random.default_rng(5)
    Y = rng.standard_normal((3, 40)).astype(np.float32).astype(np.float64)
    x = Y[0] + Y[1]
    function = MEASURES[name].function
    expected = function(x, Y)
    compiled = count_compiled_signatures()
    read_only = np.frombuffer(Y.tobytes()).reshape(3, 40)
    unaligned = np.frombuffer(b"-" + Y.tobytes(), offset=1).reshape(3, 40)
    strided = np.repeat(Y, 2, axis=1)[:, ::2]
    for variant in (read_only, unaligned, strided, np.asfortranarray(Y), Y.astype(">f8"), Y.astype("f4"), Y.tolist()):
        np.testing.assert_array_equal(function(x, variant), expected)
    assert count_compiled_signatures() == compiled


def count_compiled_signatures() -> int:
    functions = vars(similarity_measures).values()
    return sum(len(function.signatures) for function in functions if hasattr(function, "signatures"))


def test_warm_up_compiles_everything_a_request_needs() -> None:
    """After it, no measure compiles anything, for a pair or for a batch, of float32 or float64."""
    similarity_measures.warm_up()
    compiled = count_compiled_signatures()
    Y = np.random.default_rng(6).standard_normal((130, 70))
    for name in VECTOR_MEASURES:
        MEASURES[name].function(Y[0].astype(np.float32), Y.astype(np.float32))
        compute_similarity(name, Y[0], Y[1])
    assert count_compiled_signatures() == compiled


@pytest.mark.parametrize("n_candidates", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("ties", [False, True])
def test_all_measures_in_one_pass_are_bit_for_bit_those_of_their_functions(n_candidates: int, ties: bool) -> None:
    """Sharing the ranks changes nothing; constant candidates and queries included."""
    rng = np.random.default_rng(n_candidates)
    Y = rng.standard_normal((n_candidates, 65)).astype(np.float32)
    x = rng.standard_normal(65)
    if ties:
        x, Y = np.round(x), np.round(Y)
        Y[::3] = 0.25
    for query in (x, np.full(65, 0.5)):
        found = compute_all(query, Y)
        assert list(found) == list(VECTOR_MEASURES)
        for name, scores in found.items():
            np.testing.assert_array_equal(scores, MEASURES[name].function(query, Y), err_msg=name)


def test_some_measures_can_be_asked_for_by_any_spelling() -> None:
    """Only those named are computed, in the registry's order, and only they decide how many dimensions are needed."""
    found = compute_all([1, 2, 3], [[3, 2, 1]], ["kendall", "cosine_similarity", "spearman_rho"])
    assert list(found) == ["cosine_similarity", "spearman_rho", "kendall_tau"]
    assert found["kendall_tau"].tolist() == [-1.0]
    assert set(QUICK_MEASURES) == set(VECTOR_MEASURES) - {"hsic", "distance_correlation", "mutual_information"}
    assert compute_all([1], [[1]], []) == {}


@pytest.mark.parametrize(
    ("names", "message"), [(["telepathy"], "Unknown"), (["maxsim"], "token measure"), (["hoeffdings_d"], "at least 5")]
)
def test_all_measures_refuse_what_they_cannot_compute(names: list[str], message: str) -> None:
    """A ValueError that says why."""
    with pytest.raises(ValueError, match=message):
        compute_all([1, 2], [[3, 4]], names)


def test_compiled_functions_release_the_interpreters_lock() -> None:
    """Another thread makes progress while one call computes for a tenth of a second or more."""
    compiled = [found for found in vars(similarity_measures).values() if hasattr(found, "signatures")]
    assert compiled
    assert all(found.targetoptions["nogil"] for found in compiled)
    rng = np.random.default_rng(8)
    x, Y = rng.standard_normal(384), rng.standard_normal((1_000, 384))
    hsic(x, Y[:1])
    is_done, n_turns = threading.Event(), 0

    def compute() -> None:
        hsic(x, Y)
        is_done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    while not is_done.wait(0.001):
        n_turns += 1
    thread.join()
    assert n_turns > 3


def test_token_cosines_are_those_of_scipy_and_maxsim_is_the_mean_of_their_best() -> None:
    """The matrix that explains the score."""
    rng = np.random.default_rng(9)
    queries, candidates = rng.standard_normal((5, 16)), rng.standard_normal((8, 16))
    cosines = compute_token_cosines(queries, candidates)
    np.testing.assert_allclose(cosines, 1 - distance.cdist(queries, candidates, "cosine"), atol=1e-12)
    assert maxsim(queries, candidates) == cosines.max(axis=1).mean()


def test_every_alias_resolves_and_none_is_ambiguous() -> None:
    """Names and aliases are unique, and spelling variants lead to the same measure."""
    spellings = [name for measure in MEASURES.values() for name in (measure.name, *measure.aliases)]
    assert len(spellings) == len(set(spellings))
    for measure in MEASURES.values():
        assert all(resolve_measure(spelling) is measure for spelling in (measure.name, *measure.aliases))
    assert resolve_measure(" Hoeffding's-D ").name == "hoeffdings_d"
    assert resolve_measure("approximate_distance_correlation").name == "distance_correlation"
    assert resolve_measure("jensen_shannon_dependency_measure").name == "jensen_shannon"


def test_unknown_measure_is_a_value_error_that_lists_the_known_ones() -> None:
    """The caller learns what there is."""
    with pytest.raises(UnknownMeasure, match=r"cosin.*Known: cosine_similarity, ") as caught:
        compute_similarity("cosin", [1, 2], [3, 4])
    assert isinstance(caught.value, ValueError)
    assert caught.value.known == tuple(MEASURES)


def test_every_measure_documents_itself() -> None:
    """The registry's name is the function's, its first line fits a table, and range and cost stand in the text."""
    for name, measure in MEASURES.items():
        text = measure.function.__doc__ or ""
        assert measure.function is getattr(similarity_measures, name)
        assert 20 < len(measure.summary) < 120
        assert "Range " in text or "Unbounded" in text
        assert measure.cost in text
        assert ("lower is more similar" in text) is not measure.higher_is_more_similar
        assert measure.symmetric is ("directed" not in text.lower())


def run_python(code: str, directory: Path, **environment: str) -> str:
    """Output of a Python process that imports the module from this directory."""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
        env={**os.environ, **environment, "PYTHONPATH": str(directory)},
    )
    return completed.stdout


def test_import_brings_neither_hyppo_nor_scipy() -> None:
    """They take seconds to import and serve only as references."""
    code = "import json, sys, similarity_measures; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_python(code, MODULE.parent))
    assert not {"hyppo", "scipy.stats", "sklearn", "pandas"} & set(loaded)


def test_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """With no directory for machine code, beside the module or elsewhere, it compiles in memory and is right."""
    (tmp_path / "similarity_measures.py").write_bytes(MODULE.read_bytes())
    obstacle = tmp_path / "__pycache__"
    obstacle.write_text("a file where directories would have to be")
    places = {"HOME": str(obstacle), "XDG_CACHE_HOME": str(obstacle / "cache"), "NUMBA_CACHE_DIR": ""}
    code = (
        "import similarity_measures as s; print(type(s._dot_rows._cache).__name__, s.dot_product([1, 2], [[3, 4]])[0])"
    )
    output = run_python(code, tmp_path, PYTHONDONTWRITEBYTECODE="1", **places)
    assert output.split() == ["NullCache", "11.0"]
