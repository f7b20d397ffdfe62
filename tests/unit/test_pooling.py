"""Pooling, scaling and combining, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.pooling import combine_parts, normalise, pool_rows

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def make_rows(lengths: list[int], n_dims: int = 5) -> np.ndarray:
    return np.random.default_rng(sum(lengths)).standard_normal((sum(lengths), n_dims)).astype(np.float32)


def split_by_text(rows: np.ndarray, lengths: list[int]) -> list[list[list[float]]]:
    remaining = rows.astype(np.float64).tolist()
    texts = []
    for length in lengths:
        texts.append(remaining[:length])
        remaining = remaining[length:]
    return texts


@given(LENGTHS)
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.NONE])
def test_mean_is_taken_over_the_rows_of_each_text_alone(pooling: Pooling, lengths: list[int]) -> None:
    """Added up column by column in Python; a model that states no pooling is pooled the same way."""
    rows = make_rows(lengths)
    expected = [
        [sum(column) / len(text) for column in zip(*text, strict=True)] for text in split_by_text(rows, lengths)
    ]
    pooled = pool_rows(rows, lengths, pooling)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    assert pooled.dtype == np.float32


@given(LENGTHS)
@pytest.mark.parametrize(("pooling", "position"), [(Pooling.CLS, 0), (Pooling.LAST, -1)])
def test_one_row_of_each_text_is_taken_as_it_is(pooling: Pooling, position: int, lengths: list[int]) -> None:
    """The first or the last of the text's own rows, not of the pass."""
    rows = make_rows(lengths)
    expected = [text[position] for text in split_by_text(rows, lengths)]
    np.testing.assert_array_equal(pool_rows(rows, lengths, pooling), np.array(expected, np.float32))


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.NONE])
def test_pooled_vectors_outlive_the_rows(pooling: Pooling) -> None:
    """The rows are a view on memory that the next pass overwrites."""
    rows = make_rows([3, 4])
    pooled = pool_rows(rows, [3, 4], pooling)
    kept = pooled.copy()
    rows[:] = np.nan
    np.testing.assert_array_equal(pooled, kept)


@given(st.integers(1, 20), st.floats(1e-10, 1e10))
def test_normalised_rows_have_unit_length_and_their_direction(n_rows: int, scale: float) -> None:
    """Whatever their length was; the directions are compared in float64."""
    vectors = np.random.default_rng(n_rows).standard_normal((n_rows, 7)) * scale
    scaled = normalise(vectors.astype(np.float32))
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    assert scaled.dtype == np.float32


@pytest.mark.filterwarnings("error")
def test_row_of_zeros_becomes_nan_without_a_warning() -> None:
    """It has no direction, and whoever asked refuses it; the rows beside it are not touched."""
    scaled = normalise(np.array([[0, 0], [3, 4]], np.float32))
    assert np.isnan(scaled[0]).all()
    np.testing.assert_allclose(scaled[1], [0.6, 0.8], atol=1e-6)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=8))
def test_parts_are_weighted_by_their_tokens(n_tokens: list[int]) -> None:
    """The weighted mean written out term by term."""
    vectors = make_rows([len(n_tokens)])
    expected = [
        sum(weight * value for weight, value in zip(n_tokens, column, strict=True)) / sum(n_tokens)
        for column in vectors.astype(np.float64).T.tolist()
    ]
    np.testing.assert_allclose(combine_parts(vectors, n_tokens), expected, atol=1e-5)
