"""One query's way through the codes: which lists to look into, which rows to compare exactly, and when it is enough.

    lists nearest to the query -> candidates by estimate -> the best of them compared exactly: the k-th best score
    lists that may hold a better row by that score       -> more candidates
    candidates that may be better by the estimates' error -> compared exactly, until none is left

Both questions are answered by what the query itself has met: the k-th best score so far, how far the lists' rows
scatter around their centres, and how far estimates and exact scores were apart. So a query far from everything stored,
a filter that leaves what is far away, or rows of another kind than those trained on cost time instead of results.

Reads no vectors itself and holds no lock: callers bring the vectors of the ids that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llama_embeddings.vectors.compressed import ListScores, scan
from llama_embeddings.vectors.id_arrays import NO_IDS, contains, merge

NO_SCORES = np.empty(0, np.float32)
# Ids int64 (n,) and scores float32 (n,), best first.
FoundRows = tuple[np.ndarray, np.ndarray]

# Looked into before anything is known of the query.
FIRST_SHARE_OF_LISTS = 1 / 32
MIN_FIRST_LISTS = 4
# Compared exactly before the estimates' error is known.
MIN_FIRST_ROWS = 48
# Candidates of one look into lists; more are fetched where all of them may be better than the k-th best.
MIN_CANDIDATES = 256
CANDIDATES_PER_RESULT = 3
MORE_CANDIDATES = 4
# Each time four times as many rows at most, as the k-th best score rises with each and fewer are wanted then.
MORE_ROWS = 4
MAX_ROWS_AT_A_TIME = 2_048
# Rows compared exactly for one search, whatever the codes say: a tenth of a second of reading.
MAX_ROWS = 32_768
# Of the results, how many may be expected in the lists that are left out.
TOLERATED_MISSES = 0.01

# Looks into lists, int64 (n,), for at most so many rows: see CompressedRows.search.
Find = Callable[[ListScores, np.ndarray, int], FoundRows]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How careful a search is, found by trying: see `calibration.py`.

    `scatter` multiplies the deviations of the lists' rows, as rows scatter more in the directions in which queries lie.
    `error` is the number of root mean square errors by which an estimate may be too low. `recall` is the share of the
    nearest found that way.
    """

    scatter: float
    error: float
    recall: float


def choose_first_lists(scores: ListScores, share_allowed: float) -> np.ndarray:
    """The lists nearest to a query, int64 (n,); more where few rows are allowed."""
    n_lists = len(scores.centres)
    n_wanted = max(MIN_FIRST_LISTS, math.ceil(n_lists * FIRST_SHARE_OF_LISTS)) / max(share_allowed, 1e-9)
    return np.argsort(-scores.centres)[: math.ceil(min(n_lists, n_wanted))]


def choose_further_lists(
    scores: ListScores, is_left: np.ndarray, least: float, n_results: int, scatter: float
) -> np.ndarray:
    """The lists among those left, bool (n_lists,), that may hold rows with a score above `least`: int64 (n,).

    Those left out hold TOLERATED_MISSES of the results at most, were the rows' scores normally distributed around their
    centres' with `scatter` times the measured deviation.
    """
    distances = (least - scores.centres) / np.maximum(scatter * scores.deviations, 1e-9)
    expected = np.where(is_left, scores.sizes * _exceed(distances), 0.0)
    order = np.argsort(-expected)
    left_out = np.cumsum(expected[order][::-1])[::-1]
    return order[: int((left_out > TOLERATED_MISSES * n_results).sum())]


def _exceed(distances: np.ndarray) -> np.ndarray:
    """The share of a standard normal distribution above each of float (n,): Abramowitz and Stegun, 26.2.17."""
    x = np.abs(distances)
    t = 1.0 / (1.0 + 0.2316419 * x)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi) * series
    return np.where(distances > 0.0, tail, 1.0 - tail)


class Search:
    """The nearest rows to one query, found step by step.

        while len(search.wanted_ids):
            search.take(*read_vectors(search.wanted_ids))
        row_ids, scores = search.best()

    `known` are the best of those rows whose vectors are at hand already, ids and scores, and `source` has the others.
    """

    def __init__(self, query: np.ndarray, count: int, known: FoundRows, source: Source | None = None) -> None:
        self.query = query
        self._count = count
        self._best_ids, self._best_scores = known
        self._source = source
        self.wanted_ids = source.begin() if source is not None else NO_IDS

    @property
    def _least(self) -> float:
        """The score that a row has to exceed to be among the best."""
        return float(self._best_scores[self._count - 1]) if len(self._best_scores) >= self._count else -math.inf

    def take(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Rank those of the wanted rows that are there, then see what is wanted next. May take some milliseconds."""
        assert self._source is not None
        scores = NO_SCORES
        if len(row_ids):
            places, ranked = scan(self.query, np.ascontiguousarray(vectors), len(row_ids))
            row_ids, scores = row_ids[places[0]], ranked[0]
            self._add(row_ids, scores)
        self.wanted_ids = self._source.go_on(row_ids, scores, self._least)

    def _add(self, row_ids: np.ndarray, scores: np.ndarray) -> None:
        # A row that was merged into the codes meanwhile comes a second time.
        is_new = ~contains(np.sort(self._best_ids), row_ids)
        together = np.concatenate((self._best_ids, row_ids[is_new]))
        all_scores = np.concatenate((self._best_scores, scores[is_new]))
        best = np.argsort(-all_scores, kind="stable")[: self._count]
        self._best_ids, self._best_scores = together[best], all_scores[best]

    def best(self) -> FoundRows:
        """Ids int64 (n,) and scores float32 (n,), best first; fewer than were sought only if no more are there."""
        return self._best_ids, self._best_scores


class Source(Protocol):
    """Where the rows come from whose vectors are not at hand."""

    def begin(self) -> np.ndarray:
        """Ids int64 (n,) of the rows to compare first."""

    def go_on(self, row_ids: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
        """Ids of the rows to compare next, or none.

        `row_ids` and `scores` are those asked for before that are there; a row is sought whose score is above `least`.
        """


class FewRows:
    """Rows so few that all are compared: sorted ids."""

    def __init__(self, row_ids: np.ndarray) -> None:
        self._row_ids = row_ids

    def begin(self) -> np.ndarray:
        return self._row_ids

    def go_on(self, row_ids: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
        return NO_IDS


@dataclass(slots=True)
class _Look:
    """Lists looked into. There may be more rows in them with estimates up to `lowest`; none if it is -inf."""

    lists: np.ndarray
    n_asked: int
    lowest: float


class CodedRows:
    """What was seen of the codes for one query."""

    def __init__(
        self, scores: ListScores, find: Find, count: int, tuning: Tuning, *, share_allowed: float = 1.0
    ) -> None:
        self._scores = scores
        self._find = find
        self._count = count
        self._tuning = tuning
        self._share_allowed = share_allowed
        self._is_left = np.ones(len(scores.centres), bool)
        self._looks: list[_Look] = []
        self._seen = NO_IDS  # sorted
        # Seen and not compared yet, best first, and their estimates.
        self._waiting_ids, self._waiting = NO_IDS, NO_SCORES
        self._asked: dict[int, float] = {}
        self._sum_of_squared_errors, self._n_errors = 0.0, 0
        self._n_compared = self._n_asked = 0

    def begin(self) -> np.ndarray:
        self._look_into(choose_first_lists(self._scores, self._share_allowed))
        self._n_asked = max(MIN_FIRST_ROWS, 2 * self._count)
        first = self._ask(self._n_asked)
        # A filter may have left nothing near the query.
        return first if len(first) else self.go_on(NO_IDS, NO_SCORES, -math.inf)

    def go_on(self, row_ids: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
        self._note(row_ids, scores)
        while True:
            bound = self._find_bound(least)
            self._look_into(self._choose_lists(least))
            self._look_again(bound)
            n_wanted = int((self._waiting > bound).sum())
            if n_wanted or least > -math.inf or not self._is_left.any():
                self._n_asked = min(MORE_ROWS * self._n_asked, max(MAX_ROWS_AT_A_TIME, self._n_asked))
                return self._ask(min(n_wanted, self._n_asked))

    def _note(self, row_ids: np.ndarray, scores: np.ndarray) -> None:
        estimates = np.array([self._asked[row_id] for row_id in row_ids.tolist()], np.float64)
        self._sum_of_squared_errors += float(((scores - estimates) ** 2).sum())
        self._n_errors += len(row_ids)
        self._asked.clear()

    def _choose_lists(self, least: float) -> np.ndarray:
        n_left = int(self._is_left.sum())
        if least > -math.inf:
            return choose_further_lists(self._scores, self._is_left, least, self._count, self._tuning.scatter)
        # Too few rows so far: as many lists again as were looked into.
        order = np.argsort(np.where(self._is_left, -self._scores.centres, math.inf))
        return order[: min(n_left, len(order) - n_left)]

    def _find_bound(self, least: float) -> float:
        """The estimate from which on a row may have a score above `least`."""
        if not self._n_errors:
            return -math.inf
        return least - self._tuning.error * math.sqrt(self._sum_of_squared_errors / self._n_errors)

    def _look_into(self, lists: np.ndarray) -> None:
        if len(lists):
            self._is_left[lists] = False
            self._looks.append(_Look(lists, 0, math.inf))
            self._look(self._looks[-1], max(MIN_CANDIDATES, CANDIDATES_PER_RESULT * self._count))

    def _look_again(self, bound: float) -> None:
        """Fetch more where all that was fetched may be good enough."""
        for look in self._looks:
            while look.lowest > bound and look.n_asked < self._room:
                self._look(look, MORE_CANDIDATES * look.n_asked)

    def _look(self, look: _Look, n_wanted: int) -> None:
        n_rows = int(self._scores.sizes[look.lists].sum())
        row_ids, estimates = self._find(self._scores, look.lists, n_wanted)
        look.n_asked = n_wanted
        look.lowest = float(estimates[-1]) if len(row_ids) == n_wanted < n_rows else -math.inf
        is_new = ~contains(self._seen, row_ids)
        self._seen = merge(self._seen, row_ids[is_new])
        waiting = np.concatenate((self._waiting, estimates[is_new]))
        order = np.argsort(-waiting, kind="stable")
        self._waiting = waiting[order]
        self._waiting_ids = np.concatenate((self._waiting_ids, row_ids[is_new]))[order]

    @property
    def _room(self) -> int:
        return max(MAX_ROWS, CANDIDATES_PER_RESULT * self._count) - self._n_compared

    def _ask(self, n_rows: int) -> np.ndarray:
        n_rows = min(n_rows, self._room)
        row_ids = self._waiting_ids[:n_rows]
        self._asked = dict(zip(row_ids.tolist(), self._waiting[:n_rows].tolist(), strict=True))
        self._waiting_ids, self._waiting = self._waiting_ids[n_rows:], self._waiting[n_rows:]
        self._n_compared += len(row_ids)
        return row_ids
