"""Times the similarity measures against SciPy, NumPy, hyppo and the textbook formulas, and prints the ratios.

    python benchmarks/measures.py

Three tables: one pair of 384 dimensions against the reference implementation of the same quantity (values compared as
well), Hoeffding's D against its O(n²) formula at 4,096 dimensions, and one query against 1,000 candidates. What is
compared runs in turns, and the least of many runs counts, so that a machine with other work gives fair ratios. Every
implementation gets float64 arrays it need not convert. Writes nothing, needs the development requirements.
"""

from __future__ import annotations

import math
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hyppo.independence import Dcorr, Hsic
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import distance
from sklearn.metrics import normalized_mutual_info_score  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import similarity_measures
from similarity_measures import MEASURES, QUICK_MEASURES, VECTOR_MEASURES, compute_all, compute_similarity

Array = NDArray[np.float64]
N_DIMENSIONS = 384
N_CANDIDATES = 1_000


def measure_least_seconds(*calls: Callable[[], Any], budget_seconds: float = 1.0) -> list[float]:
    """The least duration of each call, in turns, so that what else the machine does befalls all of them alike.

    As many rounds as the budget allows, at least five. Short calls are timed many at a time.
    """
    numbers = [max(1, int(0.001 / min(timeit.repeat(call, number=1, repeat=5)))) for call in calls]
    least = [math.inf] * len(calls)
    start, n_rounds = time.perf_counter(), 0
    while n_rounds < 5 or time.perf_counter() - start < budget_seconds:
        for place, (call, number) in enumerate(zip(calls, numbers, strict=True)):
            least[place] = min(least[place], timeit.timeit(call, number=number) / number)
        n_rounds += 1
    return least


def make_vectors(n_rows: int, n_dimensions: int) -> Array:
    """Related unit vectors: what embeddings of texts on one subject look like to a measure."""
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((n_rows, n_dimensions)) + rng.standard_normal(n_dimensions)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def split_signs(vector: Array) -> Array:
    return np.concatenate([np.maximum(vector, 0), np.maximum(-vector, 0)])


def label_bins(vector: Array, n_bins: int = 7) -> NDArray[np.int64]:
    return (2 * stats.rankdata(vector, method="ordinal") - 1) * n_bins // (2 * vector.size)


def compute_hoeffding_by_definition(x: Array, y: Array) -> float:
    """The O(n²) formula, vectorised; for vectors without ties."""
    n = x.size
    R, S = stats.rankdata(x), stats.rankdata(y)
    Q = 1 + ((R[None, :] < R[:, None]) & (S[None, :] < S[:, None])).sum(axis=1)
    D1, D2 = np.sum((Q - 1) * (Q - 2)), np.sum((R - 1) * (R - 2) * (S - 1) * (S - 2))
    D3 = np.sum((R - 2) * (S - 2) * (Q - 1))
    return 30 * ((n - 2) * (n - 3) * D1 + D2 - 2 * (n - 2) * D3) / (n * (n - 1) * (n - 2) * (n - 3) * (n - 4))


def compute_blomqvist_by_definition(x: Array, y: Array) -> float:
    return float(np.mean(np.sign(x - np.median(x)) * np.sign(y - np.median(y))))


REFERENCES: dict[str, tuple[str, Callable[[Array, Array], float]]] = {
    "cosine_similarity": ("SciPy", lambda x, y: 1 - distance.cosine(x, y)),
    "dot_product": ("NumPy", lambda x, y: np.dot(x, y)),
    "euclidean_distance": ("SciPy", distance.euclidean),
    "manhattan_distance": ("SciPy", distance.cityblock),
    "chebyshev_distance": ("SciPy", distance.chebyshev),
    "pearson_correlation": ("SciPy", lambda x, y: stats.pearsonr(x, y).statistic),
    "spearman_rho": ("SciPy", lambda x, y: stats.spearmanr(x, y).statistic),
    "kendall_tau": ("SciPy", lambda x, y: stats.kendalltau(x, y).statistic),
    "hoeffdings_d": ("NumPy, O(n²)", compute_hoeffding_by_definition),
    "hsic": ("hyppo", lambda x, y: Hsic().statistic(x[:, None], y[:, None])),
    "distance_correlation": ("hyppo", lambda x, y: Dcorr().statistic(x[:, None], y[:, None])),
    "mutual_information": ("scikit-learn", lambda x, y: normalized_mutual_info_score(label_bins(x), label_bins(y))),
    "jensen_shannon": ("SciPy", lambda x, y: 1 - distance.jensenshannon(split_signs(x), split_signs(y), 2) ** 2),
    "blomqvist_beta": ("NumPy", compute_blomqvist_by_definition),
    "chatterjee_xi": ("SciPy", lambda x, y: stats.chatterjeexi(x, y).statistic),
}


def print_pair_table() -> None:
    x, y = make_vectors(2, N_DIMENSIONS)
    print(f"One pair, {N_DIMENSIONS} dimensions\n")
    print(f"| {'measure':22} | {'reference':13} | reference µs | ours µs | times faster | difference |")
    print("|---|---|---|---|---|---|")
    for name, (label, reference) in REFERENCES.items():
        theirs, ours = measure_least_seconds(partial(reference, x, y), partial(compute_similarity, name, x, y))
        difference = abs(reference(x, y) - compute_similarity(name, x, y))
        print(
            f"| {name:22} | {label:13} | {theirs * 1e6:12.1f} | {ours * 1e6:7.1f} "
            f"| {theirs / ours:12.1f} | {difference:10.0e} |"
        )


def print_hoeffding_row(n_dimensions: int = 4_096) -> None:
    x, y = make_vectors(2, n_dimensions)
    theirs, ours = measure_least_seconds(
        lambda: compute_hoeffding_by_definition(x, y), lambda: compute_similarity("hoeffdings_d", x, y)
    )
    print(
        f"\nHoeffding's D at {n_dimensions} dimensions: O(n²) formula {theirs * 1e3:.1f} ms, ours {ours * 1e3:.2f} ms, "
        f"{theirs / ours:.0f} times faster"
    )


def print_batch_table() -> None:
    query, *rest = make_vectors(N_CANDIDATES + 1, N_DIMENSIONS)
    candidates = np.array(rest)
    [*seconds_each, everything, quick] = measure_least_seconds(
        *(partial(MEASURES[name].function, query, candidates) for name in VECTOR_MEASURES),
        partial(compute_all, query, candidates),
        partial(compute_all, query, candidates, QUICK_MEASURES),
        budget_seconds=5.0,
    )
    print(f"\nOne query, {N_CANDIDATES} candidates, {N_DIMENSIONS} dimensions\n\n| measure | ms |\n|---|---|")
    for name, duration in zip(VECTOR_MEASURES, seconds_each, strict=True):
        print(f"| {name} | {duration * 1e3:.2f} |")
    left_out = [name for name in VECTOR_MEASURES if name not in QUICK_MEASURES]
    print(f"| all of them, compute_all | {everything * 1e3:.1f} |")
    print(f"| all but {', '.join(left_out)}, compute_all | {quick * 1e3:.1f} |")


def main() -> None:
    start = time.perf_counter()
    similarity_measures.warm_up()
    print(f"warm_up(): {time.perf_counter() - start:.2f} s\n")
    print_pair_table()
    print_hoeffding_row()
    print_batch_table()


if __name__ == "__main__":
    main()
