"""How careful searches of the codes have to be, found by trying on the vectors themselves.

What is enough depends on the vectors: those of real texts lie in clusters, random ones nowhere. Two kinds of queries
are tried, each for its 10 and its 100 nearest: stored rows, which are near to others, and queries that may be near to
nothing: mixtures of stored rows, and what was searched for lately. What an exact scan finds is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llama_embeddings.vectors.compressed import CompressedRows, ListScores
from llama_embeddings.vectors.id_arrays import NO_IDS
from llama_embeddings.vectors.searching import Tuning, choose_first_lists, choose_further_lists

N_STORED_QUERIES = 80
N_MIXED_QUERIES = 48
ROWS_PER_MIXTURE = 3
N_NEAREST = 100
DEPTHS = (10, 100)
# Searched for between two looks whether to go on.
QUERIES_PER_STEP = 4
# Above the 0.98 and 0.97 that are promised, as the queries are a sample.
WANTED_RECALL = 0.995
# The least lucky of all queries tried: one in a thousand is unluckier than the worst of a hundred.
WANTED_OF_UNLUCKIEST = 0.9
SCATTERS = (1.0, 1.4, 1.7, 2.0, 2.4, 2.8, 3.3, 4.0, 5.0)
ERRORS = (0.5, 0.8, 1.1, 1.4, 1.7, 2.0, 2.4, 2.8, 3.3, 4.0)
NO_ROW = -1


def make_queries(
    row_ids: np.ndarray, vectors: np.ndarray, recent: Sequence[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries to try, float32 (q, n_dims), and the row that each is, int64 (q,): NO_ROW for those that are none.

    From int64 (n,) ids with float32 (n, n_dims) vectors, and from queries that were asked lately.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(row_ids))[:N_STORED_QUERIES]
    parts = generator.integers(0, len(row_ids), (N_MIXED_QUERIES, ROWS_PER_MIXTURE))
    mixtures = vectors[parts].sum(axis=1)
    mixtures /= np.maximum(np.linalg.norm(mixtures, axis=1, keepdims=True), 1e-9)
    queries = np.concatenate([vectors[chosen], mixtures, *(query[None] for query in recent)]).astype(np.float32)
    return queries, np.concatenate((row_ids[chosen], np.full(len(queries) - len(chosen), NO_ROW)))


class Truth:
    """The true nearest neighbours of float32 (q, n_dims) queries, collected while all rows go by.

    `row_ids`: the row that a query is, which does not count as its own neighbour.
    """

    def __init__(self, queries: np.ndarray, row_ids: np.ndarray) -> None:
        self.queries = queries
        self.row_ids = row_ids
        self._nearest = np.full((len(queries), N_NEAREST), NO_ROW, np.int64)
        self._scores = np.full((len(queries), N_NEAREST), -np.inf, np.float32)

    def see(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Take rows into account; each row once."""
        scores = self.queries @ vectors.T
        scores[row_ids == self.row_ids[:, None]] = -np.inf
        # After the first thousands few rows are among the nearest of any query.
        n_entering = int((scores > self._scores[:, -1:]).sum(axis=1).max())
        if n_entering == 0:
            return
        places = np.argpartition(-scores, min(n_entering, scores.shape[1] - 1), axis=1)[:, :n_entering]
        nearest = np.concatenate((self._nearest, row_ids[places]), axis=1)
        scores = np.concatenate((self._scores, np.take_along_axis(scores, places, axis=1)), axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :N_NEAREST]
        self._nearest = np.take_along_axis(nearest, best, axis=1)
        self._scores = np.take_along_axis(scores, best, axis=1)

    def nearest(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one query: ids int64 (n,) and scores float32 (n,), best first."""
        n_rows = int(np.isfinite(self._scores[place]).sum())
        return self._nearest[place, :n_rows], self._scores[place, :n_rows]


@dataclass(frozen=True, slots=True)
class _Case:
    """A query with its true neighbours: which list each is in, and what the codes say of it."""

    is_stored: bool
    lists: ListScores
    scores: np.ndarray
    places: np.ndarray
    estimates: np.ndarray

    def find_covered(self, depth: int, scatter: float) -> np.ndarray:
        """Which of the nearest lie in the lists that a search looks into: bool (depth,)."""
        is_looked_into = np.zeros(len(self.lists.centres), bool)
        is_looked_into[choose_first_lists(self.lists, 1.0)] = True
        least = float(self.scores[:depth][-1])
        is_looked_into[choose_further_lists(self.lists, ~is_looked_into, least, depth, scatter)] = True
        return is_looked_into[self.places[:depth]]

    def find_compared(self, depth: int, error: float) -> np.ndarray:
        """Which of the nearest have an estimate that lets a search compare them: bool (depth,)."""
        root_mean_square = float(np.sqrt(np.mean((self.scores - self.estimates) ** 2)))
        return self.estimates[:depth] > self.scores[:depth][-1] - error * root_mean_square


def tune(rows: CompressedRows, truth: Truth, check: Callable[[], None]) -> Tuning:
    """The least careful search that finds WANTED_RECALL of the truth; the most careful one if none does.

    `check` is called now and then, and may raise.
    """
    cases = _make_cases(rows, truth, check)
    scatter, error = SCATTERS[-1], ERRORS[-1]
    for scatter in SCATTERS:
        check()
        if _is_enough([[case.find_covered(depth, scatter) for case in cases] for depth in DEPTHS], cases):
            break
    covered = [[case.find_covered(depth, scatter) for case in cases] for depth in DEPTHS]
    for error in ERRORS:
        found = [
            [is_covered & case.find_compared(depth, error) for case, is_covered in zip(cases, of_depth, strict=True)]
            for depth, of_depth in zip(DEPTHS, covered, strict=True)
        ]
        if _is_enough(found, cases):
            break
    return Tuning(scatter, error, _least_recall(found, cases) if cases else 1.0)


def _make_cases(rows: CompressedRows, truth: Truth, check: Callable[[], None]) -> list[_Case]:
    all_ids = np.unique(np.concatenate([NO_IDS, *(truth.nearest(place)[0] for place in range(len(truth.queries)))]))
    all_places = rows.find_lists(all_ids)
    every_list = np.arange(rows.n_lists)
    cases = []
    for number, query in enumerate(truth.queries):
        if number % QUERIES_PER_STEP == 0:
            check()
        row_ids, scores = truth.nearest(number)
        if len(row_ids) == 0:
            continue
        lists = rows.score_lists(query[None])
        found, estimates = rows.search(lists, every_list, len(row_ids), np.sort(row_ids))
        order = np.argsort(found)
        row_ids, scores = row_ids[np.isin(row_ids, found)], scores[np.isin(row_ids, found)]
        ordered = estimates[order][np.searchsorted(found[order], row_ids)]
        places = all_places[np.searchsorted(all_ids, row_ids)]
        if len(row_ids):
            cases.append(_Case(bool(truth.row_ids[number] != NO_ROW), lists, scores, places, ordered))
    return cases


def _split_recalls(found: Sequence[Sequence[np.ndarray]], cases: Sequence[_Case]) -> list[np.ndarray]:
    """The share found of each query, for each depth and kind of query that there is."""
    return [
        np.array(shares)
        for of_depth in found
        for kind in (True, False)
        if (shares := [float(one.mean()) for one, case in zip(of_depth, cases, strict=True) if case.is_stored is kind])
    ]


def _is_enough(found: Sequence[Sequence[np.ndarray]], cases: Sequence[_Case]) -> bool:
    return all(
        shares.mean() >= WANTED_RECALL and shares.min() >= WANTED_OF_UNLUCKIEST
        for shares in _split_recalls(found, cases)
    )


def _least_recall(found: Sequence[Sequence[np.ndarray]], cases: Sequence[_Case]) -> float:
    return min(float(shares.mean()) for shares in _split_recalls(found, cases))
