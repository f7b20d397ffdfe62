"""What a process has to take note of that other processes committed: new rows, and rows that changed.

Values only; the store reads them, the services act on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EMBEDDINGS = "embeddings"
BUNDLES = "token_level_embedding_bundles"


@dataclass(frozen=True, slots=True)
class Positions:
    """Up to where a process has seen a database: ids of rows, of token-level bundles and of noted changes."""

    row_id: int
    bundle_id: int
    change_id: int


@dataclass(frozen=True, slots=True)
class CommittedRow:
    """An embedding as it stands in the database. `vector`: float32 (n_dims,)."""

    row_id: int
    text_hash: str
    model_name: str
    recipe: str
    is_searchable: bool
    vector: np.ndarray


@dataclass(frozen=True, slots=True)
class CommittedBundle:
    """The same of a text's token embeddings. `matrix`: float32 (n_tokens, n_dims)."""

    row_id: int
    text_hash: str
    model_name: str
    recipe: str
    matrix: np.ndarray


@dataclass(frozen=True, slots=True)
class RowChange:
    """A row of the table `kind` that was deleted, or that searches find or do not find any more."""

    id: int
    kind: str
    row_id: int
    model_name: str
    recipe: str
    n_tokens: int
