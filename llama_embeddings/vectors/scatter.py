"""How far the rows of each inverted list lie from its centre, measured on some of them. Knows no codes and no FAISS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A list of which few rows were measured is taken to be much as the others are: by so many rows of theirs.
N_ROWS_OF_OTHERS = 8
# Fewer new rows say little about whether they are of another kind.
MIN_ROWS_OF_DRIFT = 64


@dataclass(slots=True)
class Scatter:
    """Squared distances from the centres: how many were measured and their sums, float64 (n_lists,) each.

    `n_trained` and `trained` are the count and the sum over all lists when the training ended.
    """

    counts: np.ndarray
    sums: np.ndarray
    n_trained: float = 0.0
    trained: float = 0.0

    @classmethod
    def of_nothing(cls, n_lists: int) -> Scatter:
        return cls(np.zeros(n_lists), np.zeros(n_lists))

    def measure(self, lists: np.ndarray, squares: np.ndarray) -> None:
        """Take in rows of some lists, int64 (n,), by their squared distances from the centres, float (n,)."""
        np.add.at(self.counts, lists, 1.0)
        np.add.at(self.sums, lists, squares)

    def end_training(self) -> None:
        """Let what was measured so far be what later rows are compared with."""
        self.n_trained, self.trained = float(self.counts.sum()), float(self.sums.sum())

    @property
    def share_of_new(self) -> float:
        """Of the rows measured, how many came after the training."""
        n_measured = float(self.counts.sum())
        return (n_measured - self.n_trained) / n_measured if n_measured else 0.0

    @property
    def drift(self) -> float:
        """The mean squared distance of what came after the training, as a multiple of what it was in it.

        1.0 while few have come.
        """
        n_new = float(self.counts.sum()) - self.n_trained
        if n_new < MIN_ROWS_OF_DRIFT or self.trained <= 0.0:
            return 1.0
        return (float(self.sums.sum()) - self.trained) / n_new / (self.trained / self.n_trained)

    def deviations(self, n_dims: int) -> np.ndarray:
        """Standard deviation along one direction of n_dims, for each list: float32 (n_lists,)."""
        mean = self.sums.sum() / max(1.0, float(self.counts.sum()))
        squares = (self.sums + N_ROWS_OF_OTHERS * mean) / (self.counts + N_ROWS_OF_OTHERS)
        # Rounding may leave less than nothing of rows that lie on their centres.
        return np.sqrt(np.maximum(squares, 0.0) / n_dims).astype(np.float32)

    def to_bytes(self) -> np.ndarray:
        """All of it as uint8 (n,), its length first."""
        numbers = np.concatenate(([len(self.counts), self.n_trained, self.trained], self.counts, self.sums))
        return numbers.astype("<f8").view(np.uint8)

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> tuple[Scatter, np.ndarray]:
        """What `to_bytes` gave, and the bytes behind it."""
        n_lists, n_trained, trained = np.frombuffer(data[:24].tobytes(), "<f8")
        end = 24 + 16 * int(n_lists)
        counts, sums = np.frombuffer(data[24:end].tobytes(), "<f8").reshape(2, -1).copy()
        return cls(counts, sums, float(n_trained), float(trained)), data[end:]
