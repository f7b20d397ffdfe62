"""How many values a JSON text holds, counted while it comes in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_embeddings.api.json_bounds import WEIGHT_OF_CONTAINER, JsonCounter

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\,[]{}:é\n', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(alphabet='a"\\,[', max_size=5), inner, max_size=5)
    ),
    max_leaves=30,
)


def count(value: Any) -> int:
    """What the counter should find: one, one more for each further element, and each container."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return WEIGHT_OF_CONTAINER + max(0, len(inner) - 1) + sum(count(element) for element in inner)
    return 0


def feed(text: bytes, part_length: int) -> int:
    counter = JsonCounter()
    for place in range(0, len(text), part_length):
        counter.feed(text[place : place + part_length])
    return counter.n_values


@given(VALUES, st.booleans(), st.integers(1, 40))
def test_count_is_that_of_the_parsed_text_wherever_it_is_cut(value: Any, is_ascii: bool, part_length: int) -> None:
    """Strings hold quotation marks, backslashes, commas and brackets, escaped or not; keys as well."""
    assert feed(json.dumps(value, ensure_ascii=is_ascii).encode(), part_length) == 1 + count(value)


@pytest.mark.parametrize("part_length", [1, 2, 3, 5, 8, 1000])
def test_backslashes_at_a_cut(part_length: int) -> None:
    """Two of them end a string that three do not."""
    assert feed(rb'["\\",1,2]', part_length) == 1 + WEIGHT_OF_CONTAINER + 2
    assert feed(rb'["\\\",1,2]"]', part_length) == 1 + WEIGHT_OF_CONTAINER


def test_what_is_in_strings_does_not_count() -> None:
    """A megabyte of commas is one value."""
    assert feed(b'{"text": "' + b"," * 1_000_000 + b'"}', 65_536) == 1 + WEIGHT_OF_CONTAINER
