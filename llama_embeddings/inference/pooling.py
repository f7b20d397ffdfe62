"""From token embeddings to one vector per text, and to unit length.

Sources: mean, first-token (CLS) and last-token pooling as in Reimers & Gurevych, "Sentence-BERT" (2019), section 3,
and in the model cards of decoder models that pool the last token. Does not know where the rows come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_embeddings.inference.backend import Pooling


def pool_rows(rows: np.ndarray, lengths: Sequence[int], pooling: Pooling) -> np.ndarray:
    """Pool float32 (sum of lengths, n_dims), the texts one after another, into float32 (len(lengths), n_dims).

    A model without pooling of its own (NONE) is pooled by the mean, the usual choice for one vector per text.
    """
    ends = np.cumsum(lengths)
    if pooling is Pooling.CLS:
        return rows[ends - np.asarray(lengths)].copy()
    if pooling is Pooling.LAST:
        return rows[ends - 1].copy()
    sums = np.add.reduceat(rows, ends - np.asarray(lengths), axis=0)
    return sums / np.asarray(lengths, dtype=np.float32)[:, None]


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale each row of float32 (n, n_dims) to unit Euclidean length. Rows of zeros become NaN, to be refused."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def combine_parts(vectors: np.ndarray, n_tokens: Sequence[int]) -> np.ndarray:
    """Token-weighted mean of the parts of one text: float32 (n_parts, n_dims) to float32 (n_dims,)."""
    weights = np.asarray(n_tokens, dtype=np.float32)
    return (weights @ vectors) / weights.sum()
