"""The memory in front of the database: bounded by bytes, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embeddings_data_models import StoredEmbedding
from llama_embeddings.services.memory_cache import OVERHEAD_IN_BYTES, EmbeddingMemoryCache

Key = tuple[str, str, str]


def make_key(text_hash: str, model: str = "m", recipe: str = "r") -> Key:
    return text_hash, model, recipe


def make_embedding(row_id: int, n_dims: int = 10) -> StoredEmbedding:
    return StoredEmbedding(row_id, "hash", np.zeros(n_dims, np.float32), 3, 0)


def make_room_for(count: int, n_dims: int = 10) -> EmbeddingMemoryCache:
    return EmbeddingMemoryCache(count * (4 * n_dims + OVERHEAD_IN_BYTES))


def test_what_was_put_is_found_and_counted() -> None:
    """By text, model and recipe: any other of the three is another entry."""
    cache = make_room_for(5)
    first, second = make_embedding(1), make_embedding(2)
    cache.put(make_key("a"), first)
    cache.put(make_key("a", model="other"), second)
    assert cache.get(make_key("a")) is first
    assert cache.get(make_key("a", model="other")) is second
    assert cache.get(make_key("a", recipe="other")) is None
    assert (cache.n_hits, cache.n_misses, len(cache)) == (2, 1, 2)


def test_least_recently_used_leaves_first() -> None:
    """Reading counts as use."""
    cache = make_room_for(3)
    for name in "abc":
        cache.put(make_key(name), make_embedding(1))
    cache.get(make_key("a"))
    cache.put(make_key("d"), make_embedding(1))
    assert [cache.get(make_key(name)) is not None for name in "abcd"] == [True, False, True, True]


def test_bound_counts_bytes_so_that_a_wide_vector_pushes_out_several() -> None:
    """One vector with the bytes of four small ones takes the place of the four oldest of six."""
    cache = make_room_for(6)
    for name in "abcdef":
        cache.put(make_key(name), make_embedding(1))
    size_of_four = 4 * (4 * 10 + OVERHEAD_IN_BYTES)
    cache.put(make_key("wide"), make_embedding(2, n_dims=(size_of_four - OVERHEAD_IN_BYTES) // 4))
    assert [cache.get(make_key(name)) is not None for name in ("d", "e", "f", "wide")] == [False, True, True, True]
    assert cache.n_bytes == 6 * (4 * 10 + OVERHEAD_IN_BYTES)


def test_vector_larger_than_the_whole_memory_pushes_nobody_out() -> None:
    """It is not kept; what is there stays."""
    cache = make_room_for(2)
    cache.put(make_key("a"), make_embedding(1))
    cache.put(make_key("huge"), make_embedding(2, n_dims=100_000))
    assert cache.get(make_key("huge")) is None
    assert cache.get(make_key("a")) is not None


def test_memory_of_zero_bytes_keeps_nothing() -> None:
    """EMBEDDING_CACHE_SIZE_IN_MB=0 turns it off."""
    cache = EmbeddingMemoryCache(0)
    cache.put(make_key("a"), make_embedding(1))
    assert (cache.get(make_key("a")), len(cache), cache.n_bytes) == (None, 0, 0)


def test_forgotten_rows_are_gone_under_every_key() -> None:
    """Others stay, and the bytes are given back."""
    cache = make_room_for(9)
    for model in ("m", "n"):
        for recipe in ("r", "s"):
            cache.put(make_key("a", model, recipe), make_embedding(1))
    cache.put(make_key("b"), make_embedding(2))
    cache.discard_rows({1, 77})
    assert (len(cache), cache.n_bytes) == (1, 40 + OVERHEAD_IN_BYTES)
    assert cache.get(make_key("b")) is not None


def test_newer_description_replaces_that_of_the_same_row_only() -> None:
    """What is not remembered, or is another row by now, is left alone."""
    cache = make_room_for(3)
    cache.put(make_key("a"), make_embedding(1))
    newer = make_embedding(1)
    cache.replace(make_key("a"), newer)
    cache.replace(make_key("a"), make_embedding(2))
    cache.replace(make_key("b"), make_embedding(1))
    assert cache.get(make_key("a")) is newer
    assert (cache.get(make_key("b")), len(cache), cache.n_bytes) == (None, 1, 40 + OVERHEAD_IN_BYTES)


KEYS = st.sampled_from("abcdefgh")
ACTIONS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.integers(1, 400)),
    st.tuples(st.just("get"), KEYS, st.just(0)),
    st.tuples(st.just("discard"), KEYS, st.just(0)),
)


@given(st.lists(ACTIONS, max_size=60))
def test_memory_behaves_like_an_ordered_dictionary_with_a_scale(actions: list[tuple[str, str, int]]) -> None:
    """Against a model that recounts all bytes after every step."""
    max_bytes = 4 * (400 + OVERHEAD_IN_BYTES)
    cache = EmbeddingMemoryCache(max_bytes)
    expected: OrderedDict[str, int] = OrderedDict()
    for action, name, n_dims in actions:
        if action == "put":
            cache.put(make_key(name), make_embedding(ord(name), n_dims))
            expected.setdefault(name, 4 * n_dims + OVERHEAD_IN_BYTES)
            while sum(expected.values()) > max_bytes:
                expected.popitem(last=False)
        elif action == "get":
            assert (cache.get(make_key(name)) is not None) == (name in expected)
            if name in expected:
                expected.move_to_end(name)
        else:
            cache.discard_rows({ord(name)})
            expected.pop(name, None)
        assert (len(cache), cache.n_bytes) == (len(expected), sum(expected.values()))
