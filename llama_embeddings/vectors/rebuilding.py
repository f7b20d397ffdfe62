"""The making of a compressed index beside the one in use: train, add every row, calibrate, catch up.

Holds no lock of the index that it is made for, so that searches and additions go on. Reads no vectors itself: callers
bring those of the ids it asks for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from llama_embeddings.vectors.calibration import Truth, make_queries, tune
from llama_embeddings.vectors.compressed import (
    TRAINING_ROWS_PER_LIST,
    Cancelled,
    CompressedRows,
    choose_n_lists,
    use_threads,
)
from llama_embeddings.vectors.id_arrays import NO_IDS, contains
from llama_embeddings.vectors.searching import Tuning

SAMPLING_SEED = 7
# A few milliseconds' work.
ROWS_PER_STEP = 512


def go_on() -> None:
    """Give way to nobody."""


class Rebuild:
    """Steps in order: `train` on the vectors of `sample_ids`, `add` those of `row_ids`, `calibrate`.

    `give_way` is called every few milliseconds, on the thread of the step, and may take its time.
    """

    def __init__(
        self,
        row_ids: np.ndarray,
        recent_queries: Sequence[np.ndarray] = (),
        *,
        n_threads: int = 1,
        give_way: Callable[[], None] = go_on,
    ) -> None:
        self.row_ids = row_ids
        self._recent_queries = recent_queries
        self._added_parts = [NO_IDS]
        self.rows: CompressedRows | None = None
        self.tuning: Tuning | None = None
        self._n_lists = choose_n_lists(len(row_ids))
        self._n_threads = n_threads
        self._give_way = give_way
        self._truth: Truth | None = None
        self._is_cancelled = threading.Event()
        # Written under the lock of the index that this is for.
        self._forgotten: list[np.ndarray] = []

    @property
    def sample_ids(self) -> np.ndarray:
        """Sorted ids to train on: all, or as many at random as the lists want."""
        n_wanted = self._n_lists * TRAINING_ROWS_PER_LIST
        if n_wanted >= len(self.row_ids):
            return self.row_ids
        chosen = np.random.default_rng(SAMPLING_SEED).choice(len(self.row_ids), n_wanted, replace=False)
        return self.row_ids[np.sort(chosen)]

    @property
    def added_ids(self) -> np.ndarray:
        """Sorted ids of the rows added."""
        if len(self._added_parts) > 1:
            self._added_parts = [np.sort(np.concatenate(self._added_parts))]
        return self._added_parts[0]

    def cancel(self) -> None:
        """Let the step under way raise Cancelled soon."""
        self._is_cancelled.set()

    def check(self) -> None:
        """Give way, then raise Cancelled if it was."""
        self._give_way()
        if self._is_cancelled.is_set():
            raise Cancelled

    def train(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Find the lists' centres; raises Cancelled also if every row of the sample is gone. Spoils the vectors."""
        if len(row_ids) == 0:
            raise Cancelled
        use_threads(self._n_threads)
        self._truth = Truth(*make_queries(row_ids, vectors, self._recent_queries, SAMPLING_SEED))
        self.rows = CompressedRows.train(vectors, min(self._n_lists, len(row_ids)), self.check)

    def add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add rows, none of which was added before."""
        self.check()
        for start in range(0, len(row_ids), ROWS_PER_STEP):
            if start:
                self.check()
            self._add(row_ids[start : start + ROWS_PER_STEP], vectors[start : start + ROWS_PER_STEP])

    def _add(self, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        assert self.rows is not None
        use_threads(self._n_threads)
        self.rows.add(row_ids, vectors)
        self._added_parts.append(row_ids)
        if self._truth is not None:
            self._truth.see(row_ids, vectors)

    def calibrate(self) -> None:
        """Find how to search it; what is added later is not taken into account."""
        assert self.rows is not None
        assert self._truth is not None
        self.rows.scatter.end_training()
        self.tuning = tune(self.rows, self._truth, self.check)
        self._truth = None

    def forget(self, row_ids: np.ndarray) -> None:
        """Note that ids were removed from the index in use; under its lock."""
        self._forgotten.append(row_ids)

    def apply_forgotten(self) -> None:
        """Remove what was noted; under the lock of the index in use."""
        if self._forgotten and self.rows is not None:
            doomed = np.unique(np.concatenate(self._forgotten))
            self.rows.remove(doomed)
            self._added_parts = [self.added_ids[~contains(doomed, self.added_ids)]]
        self._forgotten.clear()
