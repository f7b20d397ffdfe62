"""What a text must be before anything is done with it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_embeddings.errors import InvalidInput, RequestTooLarge
from llama_embeddings.services.texts import TextLimits, check_texts

LIMITS = TextLimits(max_characters=100, max_texts=4)


def refuse(texts: list[str], limits: TextLimits = LIMITS) -> InvalidInput:
    with pytest.raises(InvalidInput) as refusal:
        check_texts(texts, limits, field="input")
    return refusal.value


def test_hashes_are_sha3_256_of_the_exact_bytes_in_order() -> None:
    """White space and case count: nothing is cleaned up behind the caller's back."""
    texts = ["cold", " cold", "Cold", "café"]
    assert check_texts(texts, LIMITS) == [hashlib.sha3_256(text.encode()).hexdigest() for text in texts]
    assert check_texts([], LIMITS) == []


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=100))
def test_every_other_text_is_taken(text: str) -> None:
    """Any Unicode that is neither blank nor half of a pair nor NUL."""
    if text.strip():
        assert len(check_texts([text], LIMITS)[0]) == 64


@pytest.mark.parametrize("blank", ["", " ", "\t\r\n", "\u3000\u2003", "\u00a0"])
def test_text_without_words_is_refused(blank: str) -> None:
    """Also where the blanks are of other scripts."""
    assert "empty" in refuse([blank]).message


@pytest.mark.parametrize(
    ("text", "reason"),
    [("nul\0inside", "NUL"), ("\0", "NUL"), ("half \ud83d of a pair", "character 5"), ("\udc80", "character 0")],
)
def test_text_that_is_not_unicode_text_is_the_callers_mistake(text: str, reason: str) -> None:
    """Named, and never a failure of the server."""
    assert reason in refuse([text]).message


def test_text_at_the_limit_is_taken_and_one_beyond_is_refused_by_the_settings_name() -> None:
    """Counted in characters, whatever their bytes."""
    assert len(check_texts(["é" * 100], LIMITS)) == 1
    refusal = refuse(["é" * 101])
    assert isinstance(refusal, RequestTooLarge)
    assert "MAX_TEXT_LENGTH_IN_CHARACTERS" in refusal.message
    assert "101" in refusal.message


def test_too_many_texts_are_refused_by_the_settings_name() -> None:
    """Before any of them is looked at."""
    assert len(check_texts(["a"] * 4, LIMITS)) == 4
    refusal = refuse(["a"] * 4 + [""])
    assert isinstance(refusal, RequestTooLarge)
    assert "MAX_TEXTS_PER_REQUEST" in refusal.message
    assert (refusal.field, refusal.index) == ("input", None)


def test_refusal_names_field_and_position_in_a_list_and_the_field_alone_for_one_text() -> None:
    """The first bad text is the one that is named."""
    in_list, alone = refuse(["good", "  ", "\0"]), refuse([" "])
    assert (in_list.field, in_list.index) == ("input", 1)
    assert (alone.field, alone.index) == ("input", None)


@pytest.mark.parametrize("text", ["secret words\0", "secret words" * 20, "secret words\ud800"])
def test_refusal_does_not_repeat_the_text(text: str) -> None:
    """Messages reach logs; texts of users do not."""
    assert "secret" not in refuse([text]).message
