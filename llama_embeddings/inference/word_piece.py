"""WordPiece as the models' reference implementation reads texts, over the vocabulary of a GGUF.

llama.cpp's own WordPiece reads some scripts otherwise: it does not take Hangul syllables apart and drops the vowel
signs of Indic scripts, so that Korean or Hindi texts would silently get other vectors than the model intends. Other
kinds of tokenizers are left to llama.cpp.

A word's tokens depend on nothing around it, and in plain ASCII it is clear where words begin and end. There only new
words are asked of the library, which takes longer over a text than everything else that comes before its embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

WORD_START = "\u2581"
# Longer words become the unknown token, as in the reference.
MAX_CHARACTERS_PER_WORD = 100
# Some megabytes. A language's frequent words come back soon after all are forgotten.
MAX_REMEMBERED_WORDS = 20_000
# Letters and digits stay together, each mark is a word, and what is left is white space.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")
# The library drops these from within words.
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class WordPieceTokenizer:
    """Texts to token ids, without special tokens. Thread-safe."""

    def __init__(self, spellings: Sequence[str], *, unknown_token: int, lower_case: bool, strip_accents: bool) -> None:
        """`spellings`: the vocabulary by id as GGUF has it, which marks where a word begins, not where it goes on."""
        pieces = [_spell_for_word_piece(spelling) for spelling in spellings]
        model = WordPiece(
            {piece: token for token, piece in enumerate(pieces)},
            unk_token=pieces[unknown_token],
            max_input_chars_per_word=MAX_CHARACTERS_PER_WORD,
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lower_case
        )
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._words = _RememberedWords(self._encode)
        self._lower_case = lower_case

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids, int32 (n,). "[SEP]" in a text is read as the characters it is."""
        if not text.isascii() or _CONTROL_CHARACTER.search(text):
            return np.array(self._encode(text), dtype=np.int32)
        words = _PLAIN_WORD.findall(text.lower() if self._lower_case else text)
        return np.array([*chain.from_iterable(map(self._words.__getitem__, words))], dtype=np.int32)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def spans(self, text: str) -> list[tuple[int, int] | None]:
        """Where each token stands, in bytes of UTF-8."""
        ends = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [(int(ends[start]), int(ends[end])) for start, end in offsets]


class _RememberedWords(dict[str, tuple[int, ...]]):
    """Words and their token ids, found when they are first asked for; all are forgotten when there are too many."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(word))
        if len(self) >= MAX_REMEMBERED_WORDS:
            self.clear()
        # A longer one is the unknown token, and as long as its sender likes.
        if len(word) <= MAX_CHARACTERS_PER_WORD:
            self[word] = ids
        return ids


def _spell_for_word_piece(spelling: str) -> str:
    is_special = len(spelling) > 2 and spelling.startswith("[") and spelling.endswith("]")
    if is_special or spelling.startswith(WORD_START):
        return spelling.removeprefix(WORD_START)
    return f"##{spelling}"
