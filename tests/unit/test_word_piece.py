"""The short way through plain ASCII gives the ids that the library gives."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_embeddings.inference import word_piece
from llama_embeddings.inference.word_piece import MAX_CHARACTERS_PER_WORD, WordPieceTokenizer

# As GGUF spells them: what begins a word is marked. Some words and letters are missing, so that there are unknown ones.
WORDS = ["cold", "un", "Cold", "the", "10", *string.ascii_letters[:40], *string.digits[:8], *string.punctuation[:28]]
ENDINGS = ["ing", "er", "s", "d", "0", *string.ascii_lowercase[:20]]
SPELLINGS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581{word}" for word in WORDS), *ENDINGS]
PIECES = st.sampled_from(["cold", "uncolder", "Cold", "the", " ", "\n", "\t", "\r", "[SEP]", "zzz", "10%", "é"])
TEXTS = st.lists(PIECES | st.text(st.characters(max_codepoint=127), max_size=8)).map("".join)


def make_tokenizer(*, lower_case: bool) -> WordPieceTokenizer:
    return WordPieceTokenizer(SPELLINGS, unknown_token=1, lower_case=lower_case, strip_accents=lower_case)


TOKENIZERS = {lower_case: make_tokenizer(lower_case=lower_case) for lower_case in (True, False)}


@pytest.mark.parametrize("lower_case", [True, False])
@given(text=TEXTS)
def test_any_ascii_has_the_ids_of_the_library(lower_case: bool, text: str) -> None:
    """Marks, digits, line breaks, control characters, words that are not in the vocabulary."""
    tokenizer = TOKENIZERS[lower_case]
    assert tokenizer.tokenize(text).tolist() == list(tokenizer._encode(text))


@pytest.mark.parametrize("character", [chr(code) for code in range(128)])
def test_every_character_between_and_within_words(character: str) -> None:
    """Each either ends a word, is one, or is dropped, as the library has it."""
    for tokenizer in TOKENIZERS.values():
        for text in (character, f"co{character}ld", f"cold {character} the{character}"):
            assert tokenizer.tokenize(text).tolist() == list(tokenizer._encode(text))


def test_long_words_are_unknown_and_not_remembered() -> None:
    """They are as long as their sender likes."""
    tokenizer = make_tokenizer(lower_case=True)
    text = f"cold {'c' * (MAX_CHARACTERS_PER_WORD + 1)} {'c' * MAX_CHARACTERS_PER_WORD}"
    assert tokenizer.tokenize(text).tolist() == list(tokenizer._encode(text))
    assert max(map(len, tokenizer._words)) == MAX_CHARACTERS_PER_WORD


def test_no_more_words_are_remembered_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of them have the right ids."""
    monkeypatch.setattr(word_piece, "MAX_REMEMBERED_WORDS", 5)
    tokenizer = make_tokenizer(lower_case=True)
    text = " ".join(f"{first}{second}" for first in "abcdef" for second in "abcdef")
    assert tokenizer.tokenize(text).tolist() == list(tokenizer._encode(text))
    assert 0 < len(tokenizer._words) <= 5
