"""Nearest neighbours by inner product over unit vectors, one index for each family of comparable vectors.

Small, an index is exact: it holds the vectors. Grown, it holds codes of them, and a search asks its caller for the
vectors of the rows that it has to compare. New rows are found at once either way: they are held as vectors until they
are merged. Knows no texts and no SQL and starts no threads; what it returns are row ids.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from llama_embeddings.vectors.compressed import CompressedRows, ListScores, keep_allowed, scan
from llama_embeddings.vectors.flat import FlatRows, Rows
from llama_embeddings.vectors.id_arrays import NO_IDS, contains, is_ascending, merge
from llama_embeddings.vectors.locks import SharedLock
from llama_embeddings.vectors.rebuilding import Rebuild, go_on
from llama_embeddings.vectors.searching import (
    NO_SCORES,
    CodedRows,
    FewRows,
    FoundRows,
    Search,
    Source,
    Tuning,
    choose_first_lists,
)

# Rows up to which the vectors are held and the search is exact: see docs/decisions/0007.
FLAT_LIMIT = 16_384
# New rows beside the codes before they are merged, and how many at a time: searches wait for one such step.
MERGE_AT = 1_024
ROWS_PER_MERGE = 128
# The lists are made anew when the index is so many times as large as when they were made.
GROWTH_BEFORE_REBUILD = 4
# Rows merged or removed before the snapshot is made anew: this many, and this share of all.
MIN_UNSAVED_ROWS = 10_000
UNSAVED_SHARE = 0.05

# Where no more rows may be found than this, all of them are compared.
FEW_ROWS = 512
# Estimates alone look into twice as many lists at once, as nothing tells them to go on.
SHARE_FOR_ESTIMATES = 0.5
# The lists are made anew when so many of the rows came after that, and lie so much farther from the centres (squared).
DRIFTED_SHARE = 0.2
MAX_DRIFT = 1.25
# Or when so few are left.
SHRINKAGE_BEFORE_REBUILD = 4
# Of each search, to see at the next making whether such queries find what is near them.
N_RECENT_QUERIES = 64

NOTHING: FoundRows = (NO_IDS, NO_SCORES)


class Step(Enum):
    """Upkeep that an index wants."""

    REBUILD = "rebuild"
    MERGE = "merge"
    SAVE = "save"


@dataclass(frozen=True, slots=True)
class FrozenIndex:
    """What of an index is worth keeping: the codes as bytes, their sorted row ids, and how to search them."""

    codes: np.ndarray
    row_ids: np.ndarray
    tuning: Tuning
    n_trained: int
    n_unsaved: int = 0


class VectorIndex:
    """Vectors of one family. All methods are thread-safe; `add` never waits for a search."""

    def __init__(self, n_dims: int, *, flat_limit: int = FLAT_LIMIT, merge_at: int = MERGE_AT) -> None:
        self.n_dims = n_dims
        self._flat_limit = flat_limit
        self._merge_at = merge_at
        # Two locks, always taken in this order. The first: searches of the codes share it, changes of the codes have
        # it alone. The second is held for moments, whenever one of the following is replaced or rows come.
        self._codes_lock = SharedLock()
        self._lock = threading.Lock()
        self._fresh = FlatRows(n_dims)
        self._newest_id = -1
        self._codes: CompressedRows | None = None
        self._coded_ids = NO_IDS
        self._tuning: Tuning | None = None
        self._n_trained = 0
        self._n_unsaved = 0
        self._rebuild: Rebuild | None = None
        self._recent_queries: deque[np.ndarray] = deque(maxlen=N_RECENT_QUERIES)

    @classmethod
    def thaw(cls, frozen: FrozenIndex, *, flat_limit: int = FLAT_LIMIT, merge_at: int = MERGE_AT) -> VectorIndex:
        """The index that was frozen."""
        codes = CompressedRows.from_bytes(frozen.codes)
        index = cls(codes.n_dims, flat_limit=flat_limit, merge_at=merge_at)
        index._codes, index._coded_ids, index._tuning = codes, frozen.row_ids, frozen.tuning
        index._n_trained = frozen.n_trained
        index._newest_id = int(frozen.row_ids[-1]) if len(frozen.row_ids) else -1
        return index

    def __len__(self) -> int:
        with self._lock:
            return len(self._fresh) + len(self._coded_ids)

    @property
    def is_compressed(self) -> bool:
        return self._codes is not None

    @property
    def tuning(self) -> Tuning | None:
        """How the codes are searched; None while there are none."""
        return self._tuning

    def row_ids(self) -> np.ndarray:
        """All ids, sorted."""
        with self._lock:
            return merge(self._coded_ids, self._fresh.row_ids())

    # --- changing ---

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add int64 (n,) ids with float32 (n, n_dims) unit vectors; ids that are in already are left alone."""
        if len(row_ids) == 0:
            return
        if vectors.shape != (len(row_ids), self.n_dims):
            raise ValueError(f"{len(row_ids)} ids and {self.n_dims} dimensions, but vectors of shape {vectors.shape}")
        with self._lock:
            # Nearly always: rows come in the order in which the database numbered them.
            if not (row_ids[0] > self._newest_id and is_ascending(row_ids)):
                new = self._find_new(row_ids)
                row_ids, vectors = row_ids[new], vectors[new]
            self._fresh.add(row_ids, vectors)
            if len(row_ids):
                self._newest_id = max(self._newest_id, int(row_ids[-1]), int(row_ids.max()))

    def _find_new(self, row_ids: np.ndarray) -> np.ndarray:
        """Places of ids that are not in yet, each once, in order."""
        places = np.sort(np.unique(row_ids, return_index=True)[1])
        held = contains(self._coded_ids, row_ids[places]) | contains(np.sort(self._fresh.row_ids()), row_ids[places])
        return places[~held]

    def remove(self, row_ids: np.ndarray) -> int:
        """Remove ids; returns how many were there. Waits for searches under way where there are codes."""
        wanted = np.unique(row_ids)
        with self._codes_lock.alone():
            coded = wanted[contains(self._coded_ids, wanted)]
            coded_ids = self._coded_ids
            if self._codes is not None and len(coded):
                self._codes.remove(coded)
                coded_ids = coded_ids[~contains(coded, coded_ids)]
            with self._lock:
                self._coded_ids = coded_ids
                self._n_unsaved += len(coded)
                if self._rebuild is not None:
                    self._rebuild.forget(wanted)
                return self._fresh.remove(wanted) + len(coded)

    # --- searching ---

    def search(self, vector: np.ndarray, count: int, *, allowed: np.ndarray | None = None) -> Search:
        """Begin to look for the `count` nearest to float32 (n_dims,); see Search. Takes some milliseconds.

        `allowed`: sorted ids, each once, that alone may be found.
        """
        query = np.ascontiguousarray(vector, np.float32).reshape(1, self.n_dims)
        if count <= 0 or (allowed is not None and len(allowed) == 0):
            return Search(query, 0, NOTHING)
        # At one moment, so that a row which moves from the new ones to the codes is in one of them at least.
        with self._lock:
            fresh, coded = self._fresh.views(), (self._codes, self._coded_ids, self._tuning)
        known = _search_flat(query, fresh, count, allowed)
        return Search(query, count, known, self._open(*coded, query, count, allowed))

    def _open(
        self,
        codes: CompressedRows | None,
        coded_ids: np.ndarray,
        tuning: Tuning | None,
        query: np.ndarray,
        count: int,
        allowed: np.ndarray | None,
    ) -> Source | None:
        if codes is None or tuning is None:
            return None
        if allowed is not None and len(allowed) <= 4 * FEW_ROWS:
            allowed = allowed[contains(coded_ids, allowed)]
            if len(allowed) <= FEW_ROWS:
                return FewRows(allowed)
        if allowed is None:
            self._recent_queries.append(query[0])
        share = 1.0 if allowed is None else min(1.0, len(allowed) / max(1, len(coded_ids)))

        def find(scores: ListScores, lists: np.ndarray, n_wanted: int) -> FoundRows:
            with self._codes_lock.shared():
                return codes.search(scores, lists, n_wanted, allowed)

        with self._codes_lock.shared():
            scores = codes.score_lists(query)
        return CodedRows(scores, find, count, tuning, share_allowed=share)

    def estimate(self, queries: np.ndarray, count: int) -> list[FoundRows]:
        """For each of float32 (n, n_dims), about `count` rows that are near it, with scores; best first.

        The scores are estimates where there are codes: for callers that go on to something exact of their own.
        """
        return [self._estimate(np.ascontiguousarray(query[None], np.float32), count) for query in queries]

    def _estimate(self, query: np.ndarray, count: int) -> FoundRows:
        with self._lock:
            fresh, codes = self._fresh.views(), self._codes
        found = _search_flat(query, fresh, count, None)
        if codes is None:
            return found
        with self._codes_lock.shared():
            scores = codes.score_lists(query)
            lists = choose_first_lists(scores, SHARE_FOR_ESTIMATES)
            return _best_of([found, codes.search(scores, lists, count)], count)

    # --- upkeep: one caller at a time ---

    def next_step(self) -> Step | None:
        """What is due; None if nothing is."""
        with self._lock:
            n_fresh, n_coded = len(self._fresh), len(self._coded_ids)
            if self._codes is None:
                return Step.REBUILD if n_fresh >= self._flat_limit else None
            if self._wants_other_lists(n_fresh + n_coded):
                return Step.REBUILD
            if n_fresh >= self._merge_at:
                return Step.MERGE
            is_worth_saving = self._n_unsaved >= max(MIN_UNSAVED_ROWS, UNSAVED_SHARE * n_coded)
            return Step.SAVE if is_worth_saving else None

    def _wants_other_lists(self, n_rows: int) -> bool:
        assert self._codes is not None
        if n_rows >= GROWTH_BEFORE_REBUILD * max(self._n_trained, self._flat_limit):
            return True
        if self._n_trained > self._flat_limit and 0 < n_rows * SHRINKAGE_BEFORE_REBUILD < self._n_trained:
            return True
        scatter = self._codes.scatter
        return scatter.share_of_new >= DRIFTED_SHARE and scatter.drift >= MAX_DRIFT

    @property
    def has_many_new(self) -> bool:
        """Whether there are codes, and so many new rows beside them that they are worth merging."""
        return self._codes is not None and len(self._fresh) >= self._merge_at

    def merge_some(self, n_rows: int = ROWS_PER_MERGE) -> int:
        """Move the oldest new rows to the codes; returns how many. Searches wait for some milliseconds."""
        with self._codes_lock.alone():
            if self._codes is None:
                return 0
            with self._lock:
                row_ids, vectors = self._fresh.first(n_rows)
            if len(row_ids):
                self._codes.add(row_ids, vectors)
                coded_ids = merge(self._coded_ids, row_ids)
                with self._lock:
                    self._coded_ids = coded_ids
                    self._fresh.drop_first(len(row_ids))
                    self._n_unsaved += len(row_ids)
            return len(row_ids)

    def begin_rebuild(
        self, row_ids: np.ndarray | None = None, *, n_threads: int = 1, give_way: Callable[[], None] = go_on
    ) -> Rebuild:
        """Start to make codes for all rows held, or for these sorted ids; see Rebuild. Ends by `adopt` or `abandon`."""
        with self._lock:
            held = merge(self._coded_ids, self._fresh.row_ids()) if row_ids is None else row_ids
            self._rebuild = Rebuild(held, list(self._recent_queries), n_threads=n_threads, give_way=give_way)
            return self._rebuild

    def adopt(self, rebuild: Rebuild) -> np.ndarray:
        """Use what was made, unless rows were merged meanwhile that it lacks: their sorted ids, to be added first."""
        assert rebuild.rows is not None
        assert rebuild.tuning is not None
        with self._codes_lock.alone(), self._lock:
            rebuild.apply_forgotten()
            missing = self._coded_ids[~contains(rebuild.added_ids, self._coded_ids)]
            if len(missing) == 0:
                self._codes, self._coded_ids, self._tuning = rebuild.rows, rebuild.added_ids, rebuild.tuning
                self._n_trained = self._n_unsaved = len(rebuild.added_ids)
                self._fresh.remove(rebuild.added_ids)
                self._newest_id = max(self._newest_id, int(rebuild.added_ids[-1]) if len(rebuild.added_ids) else -1)
                self._rebuild = None
            return missing

    def abandon(self, rebuild: Rebuild) -> None:
        """Go on as before it."""
        rebuild.cancel()
        with self._lock:
            if self._rebuild is rebuild:
                self._rebuild = None

    def freeze(self) -> FrozenIndex | None:
        """The codes as they are now; new rows beside them are left out. None if there are no codes."""
        with self._codes_lock.shared():
            if self._codes is None or self._tuning is None:
                return None
            return FrozenIndex(self._codes.to_bytes(), self._coded_ids, self._tuning, self._n_trained, self._n_unsaved)

    def note_saved(self, frozen: FrozenIndex) -> None:
        """What was frozen is safe; only what was merged or removed since remains to be saved."""
        with self._lock:
            self._n_unsaved -= frozen.n_unsaved

    @property
    def n_unsaved(self) -> int:
        """Rows merged into the codes or removed from them since the last snapshot."""
        return self._n_unsaved


def rank(vector: np.ndarray, row_ids: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best of int64 (n,) ids by the inner products of their float32 (n, n_dims), with these."""
    if len(row_ids) == 0 or count <= 0:
        return NO_IDS, NO_SCORES
    places, scores = scan(np.ascontiguousarray(vector, np.float32)[None], np.ascontiguousarray(vectors), count)
    return row_ids[places[0]], scores[0]


def _search_flat(query: np.ndarray, views: list[Rows], count: int, allowed: np.ndarray | None) -> FoundRows:
    return _best_of([rank(query[0], *keep_allowed(*view, allowed), count) for view in views], count)


def _best_of(found: list[FoundRows], count: int) -> FoundRows:
    if len(found) < 2:
        return found[0] if found else NOTHING
    row_ids = np.concatenate([row_ids for row_ids, _ in found])
    scores = np.concatenate([scores for _, scores in found])
    best = np.argsort(-scores, kind="stable")[:count]
    return row_ids[best], scores[best]


Key = tuple[str, str]


class VectorIndexes:
    """One index per (model name, recipe family), made when its first vector comes."""

    def __init__(self, *, flat_limit: int = FLAT_LIMIT, merge_at: int = MERGE_AT) -> None:
        self.flat_limit = flat_limit
        self._merge_at = merge_at
        self._indexes: dict[Key, VectorIndex] = {}

    def get(self, model_name: str, family: str) -> VectorIndex | None:
        """The index of a key, if it has one."""
        return self._indexes.get((model_name, family))

    def get_or_make(self, model_name: str, family: str, n_dims: int) -> VectorIndex:
        """The index of a key, an empty one if it had none."""
        key = (model_name, family)
        if key not in self._indexes:
            self._indexes.setdefault(key, VectorIndex(n_dims, flat_limit=self.flat_limit, merge_at=self._merge_at))
        return self._indexes[key]

    def thaw(self, model_name: str, family: str, frozen: FrozenIndex) -> VectorIndex:
        """Put in what was frozen, in place of what there is."""
        index = VectorIndex.thaw(frozen, flat_limit=self.flat_limit, merge_at=self._merge_at)
        self._indexes[model_name, family] = index
        return index

    def add(self, model_name: str, family: str, row_ids: np.ndarray, vectors: np.ndarray) -> VectorIndex | None:
        """See VectorIndex.add; returns the index, or None if there was nothing to add."""
        if len(row_ids) == 0:
            return None
        index = self.get_or_make(model_name, family, vectors.shape[1])
        index.add(row_ids, vectors)
        return index

    def remove(self, model_name: str, family: str, row_ids: np.ndarray) -> int:
        """See VectorIndex.remove."""
        index = self.get(model_name, family)
        return index.remove(row_ids) if index is not None else 0

    def items(self) -> list[tuple[Key, VectorIndex]]:
        """All indexes by their key, as of now."""
        return list(self._indexes.items())

    def sizes(self) -> dict[Key, int]:
        """Vectors held, by model name and recipe family."""
        return {key: len(index) for key, index in self.items()}
