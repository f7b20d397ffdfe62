"""Sorted arrays of row ids: eight bytes an id, where a set of Python integers takes more than sixty.

Pure functions on int64 (n,) arrays; those called sorted are ascending and without repetition.
"""

from __future__ import annotations

import numpy as np

NO_IDS = np.empty(0, np.int64)


def contains(sorted_ids: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """Which of `row_ids` are among `sorted_ids`: bool (len(row_ids),)."""
    if len(sorted_ids) == 0:
        return np.zeros(len(row_ids), bool)
    places = np.minimum(np.searchsorted(sorted_ids, row_ids), len(sorted_ids) - 1)
    found: np.ndarray = sorted_ids[places] == row_ids
    return found


def merge(sorted_ids: np.ndarray, new_ids: np.ndarray) -> np.ndarray:
    """Both together, sorted; `new_ids` in any order and none of them among `sorted_ids`."""
    together = np.concatenate((sorted_ids, np.sort(new_ids)))
    is_in_order = len(sorted_ids) == 0 or len(new_ids) == 0 or new_ids.min() > sorted_ids[-1]
    return together if is_in_order else np.sort(together, kind="stable")


def is_ascending(row_ids: np.ndarray) -> bool:
    """Whether each id is above the one before it."""
    return len(row_ids) < 2 or bool((np.diff(row_ids) > 0).all())
