"""WordPiece as the models' reference implementation reads texts, over the vocabulary of a GGUF.

llama.cpp's own WordPiece reads some scripts otherwise: it does not take Hangul syllables apart and drops the vowel
signs of Indic scripts, so that Korean or Hindi texts would silently get other vectors than the model intends. Other
kinds of tokenizers are left to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

WORD_START = "\u2581"
# Longer words become the unknown token, as in the reference.
MAX_CHARACTERS_PER_WORD = 100


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

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids, int32 (n,). "[SEP]" in a text is read as the characters it is."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def spans(self, text: str) -> list[tuple[int, int] | None]:
        """Where each token stands, in bytes of UTF-8."""
        ends = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [(int(ends[start]), int(ends[end])) for start, end in offsets]


def _spell_for_word_piece(spelling: str) -> str:
    is_special = len(spelling) > 2 and spelling.startswith("[") and spelling.endswith("]")
    if is_special or spelling.startswith(WORD_START):
        return spelling.removeprefix(WORD_START)
    return f"##{spelling}"
