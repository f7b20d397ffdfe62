"""How many lists to look into and how many candidates to rank again, found by trying on the vectors themselves.

What is enough depends on the vectors: those of real texts lie in clusters, random ones nowhere. Some stored vectors are
searched for, and what the exact scan finds is the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama_embeddings.vectors.compressed import CompressedRows, scan

N_QUERIES = 160
# Searched for between two looks whether to go on.
QUERIES_PER_STEP = 8
N_NEAREST = 10
# Above the 0.97 that is promised, as the queries are a sample: other queries found 0.981 of theirs, and 0.975 at 0.985.
WANTED_RECALL = 0.99
MAX_CANDIDATES = 2000
MIN_CANDIDATES = 32
# Where few rows are allowed: of one in twenty, 0.96 of the nearest were found without more, 0.99 with twice as many.
MAX_MORE_CANDIDATES = 4.0
MIN_PROBES = 4
# Measured for 384 dimensions, with the database in the page cache: only their ratio counts.
MICROSECONDS_PER_CODE = 0.008
MICROSECONDS_PER_CANDIDATE = 6.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """Lists to look into and candidates to rank for the ten nearest, and the share of them found that way."""

    n_probes: int
    n_candidates: int
    recall: float

    def candidates_for(self, count: int, share_allowed: float = 1.0) -> int:
        """Candidates to rank for the `count` nearest; their share of false ones falls as there are more.

        The nearest of a few allowed rows lie far away and much alike, and the codes tell them apart less well.
        """
        more = max(1.0, count / N_NEAREST) ** 0.5 * min(MAX_MORE_CANDIDATES, max(share_allowed, 1e-9) ** -0.25)
        return max(2 * count, math.ceil(self.n_candidates * more))

    def probes_for(self, count: int, share_allowed: float) -> int:
        """Lists to look into: the fewer rows are allowed, the farther apart the nearest of them lie."""
        return math.ceil(self.n_probes * max(1.0, count / N_NEAREST) ** 0.5 / max(share_allowed, 1e-9))


class Truth:
    """The true nearest neighbours of some rows, int64 (n,) and float32 (n, n_dims), collected while all rows go by."""

    def __init__(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        self.row_ids = row_ids
        self.queries = vectors
        n_queries = len(self.row_ids)
        self._nearest = np.full((n_queries, N_NEAREST), -1, np.int64)
        self._scores = np.full((n_queries, N_NEAREST), -np.inf, np.float32)

    def see(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Take rows into account; each row once."""
        # One more than wanted, as the nearest of all is the row itself.
        places, scores = scan(self.queries, vectors, N_NEAREST + 1)
        found = row_ids[places]
        scores[found == self.row_ids[:, None]] = -np.inf
        nearest = np.concatenate((self._nearest, found), axis=1)
        scores = np.concatenate((self._scores, scores), axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :N_NEAREST]
        self._nearest = np.take_along_axis(nearest, best, axis=1)
        self._scores = np.take_along_axis(scores, best, axis=1)

    def n_to_find(self) -> int:
        return int(np.isfinite(self._scores).sum())

    def ranks(self, candidates: np.ndarray) -> np.ndarray:
        """At which place of its candidates, int64 (n_queries, k), each true neighbour stands: those found, sorted."""
        ranks = []
        for own, nearest, scores, found in zip(self.row_ids, self._nearest, self._scores, candidates, strict=True):
            others = found[found != own]
            ranks.append(np.flatnonzero(np.isin(others, nearest[np.isfinite(scores)])))
        return np.sort(np.concatenate(ranks)) if ranks else np.empty(0, np.int64)


def tune(rows: CompressedRows, truth: Truth, check: Callable[[], None]) -> Tuning:
    """The cheapest search that finds WANTED_RECALL of the truth; if none does, all lists and MAX_CANDIDATES.

    `check` is called now and then, and may raise.
    """
    n_to_find = truth.n_to_find()
    if n_to_find == 0:
        return Tuning(rows.n_lists, MAX_CANDIDATES, 1.0)
    best = Tuning(rows.n_lists, MAX_CANDIDATES, 0.0)
    least_cost = math.inf
    for n_probes in _double_up_to(rows.n_lists):
        scan_cost = n_probes * len(rows) / rows.n_lists * MICROSECONDS_PER_CODE
        if scan_cost >= least_cost:
            break
        tuning = _try(rows, truth, n_probes, n_to_find, check)
        cost = scan_cost + tuning.n_candidates * MICROSECONDS_PER_CANDIDATE
        if tuning.recall >= WANTED_RECALL and cost < least_cost:
            best, least_cost = tuning, cost
        elif least_cost == math.inf:
            best = tuning
    return best


def _try(rows: CompressedRows, truth: Truth, n_probes: int, n_to_find: int, check: Callable[[], None]) -> Tuning:
    """The fewest candidates that are enough with so many lists, or MAX_CANDIDATES."""
    n_wanted = min(MAX_CANDIDATES, len(rows))
    candidates = []
    for number, query in enumerate(truth.queries):
        if number % QUERIES_PER_STEP == 0:
            check()
        candidates.append(rows.search(query[None], min(n_wanted + 1, len(rows)), n_probes)[0][0])
    ranks = truth.ranks(np.stack(candidates))
    needed = math.ceil(WANTED_RECALL * n_to_find)
    if len(ranks) >= needed and ranks[needed - 1] < MAX_CANDIDATES:
        n_candidates = max(MIN_CANDIDATES, int(ranks[needed - 1]) + 1)
    else:
        n_candidates = MAX_CANDIDATES
    return Tuning(n_probes, n_candidates, float((ranks < n_candidates).sum() / n_to_find))


def _double_up_to(limit: int) -> list[int]:
    steps = []
    n = MIN_PROBES
    while n < limit:
        steps.append(n)
        n *= 2
    return [*steps, limit]
