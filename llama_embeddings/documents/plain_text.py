"""Plain text: bytes in any encoding to text. Finds no structure in it."""

from __future__ import annotations

import codecs
import re
import unicodedata

from charset_normalizer import from_bytes

from llama_embeddings.documents.extracted import (
    DEFAULT_LIMITS,
    ExtractedDocument,
    ExtractionLimits,
    check_length,
    unsupported,
)
from llama_embeddings.errors import UnreadableDocument

_SAMPLE_CHARACTERS = 20_000
_SAMPLE_BYTES = 64 * 1024
_TELLING_BYTES = 1024 * 1024
_MAXIMUM_SHARE_OF_ILLEGIBLE_CHARACTERS = 0.05

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# What detection may answer: encodings that files are found in. Left to itself it prefers exotic ones for short texts.
_DETECTABLE_ENCODINGS = [
    *(f"cp{page}" for page in (*range(1250, 1259), 437, 850, 866, 874, 932, 949)),
    *("koi8_r", "koi8_u", "iso8859_2", "iso8859_7", "iso8859_8", "mac_roman", "euc_jp", "gb18030", "big5"),
]

_WESTERN_PUNCTUATION = frozenset("“”„‘’…–—•«»€£§°©®™½¿¡ªº\xa0\xad")
_WESTERN_ALPHABETS = tuple(  # French, German, Spanish, Portuguese, Italian, Nordic
    frozenset(letters + letters.upper()) | _WESTERN_PUNCTUATION
    for letters in ("àâæçéèêëîïôœùûü", "äöüßé", "áéíñóúü", "àáâãçéêíóôõúü", "àèéìîòóù", "åäæéöø")
)


def extract_plain_text(data: bytes, limits: ExtractionLimits = DEFAULT_LIMITS) -> ExtractedDocument:
    """Decode text in any encoding; line ends become "\\n", soft hyphens and NUL characters go.

    Raises UnsupportedDocumentType for binary data that only begins like text.
    """
    check_length(len(data) // 4, limits)
    decoded = decode_text(data)
    if not is_legible(decoded):
        raise unsupported("application/octet-stream")
    text = normalise_newlines(drop_invisible_characters(decoded))
    check_length(len(text), limits)
    if not text.strip():
        raise UnreadableDocument("The document contains no text, only whitespace.", field="file")
    return ExtractedDocument("text/plain", text)


def decode_text(data: bytes) -> str:
    """Decode by byte order mark, as UTF-16 or -32 without one, as UTF-8, else by the likeliest older encoding."""
    text = decode_certainly(data)
    return _decode_by_likelihood(data) if text is None else text


def decode_certainly(data: bytes) -> str | None:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    wide = _find_wide_encoding(data[:4096])
    if wide is not None:
        return data.decode(wide, "replace")
    if re.search(rb"\x1b\$[@B]|\x1b\([IJ]", data[:_SAMPLE_BYTES]):
        return data.decode("iso2022_jp_ext", "replace")
    return _decode_utf8(data.rstrip(b"\0"))


def _find_wide_encoding(sample: bytes) -> str | None:
    """Tell UTF-16 and UTF-32 without a mark by where their NUL bytes stand: Latin letters have one half empty."""
    if len(sample) < 8:
        return None
    empty = [column.count(0) / len(column) for column in (sample[k::4] for k in range(4))]
    if min(empty[1:]) > 0.9 and empty[0] < 0.1:
        return "utf-32-le"
    if min(empty[:3]) > 0.9 and empty[3] < 0.1:
        return "utf-32-be"
    if min(empty[1::2]) > 0.3 and max(empty[::2]) < 0.05:
        return "utf-16-le"
    if min(empty[::2]) > 0.3 and max(empty[1::2]) < 0.05:
        return "utf-16-be"
    return None


def _decode_utf8(data: bytes) -> str | None:
    """Decode UTF-8; a stray bad byte among many good characters (a cut end, say) becomes U+FFFD."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    n_good = sum(not character.isascii() for character in text[:_SAMPLE_CHARACTERS]) - n_bad
    return text if n_bad * 10 <= n_good else None


def _decode_by_likelihood(data: bytes) -> str:
    # Lines in ASCII say nothing, and leaving them out keeps detection fast on long texts.
    first = re.search(rb"[\x80-\xff]", data)
    start = max(0, first.start() - 200) if first else 0
    sample = data[start : start + _TELLING_BYTES]
    telling = b"\n".join(line for line in sample.splitlines() if not line.isascii())[:_SAMPLE_BYTES]
    encoding = _find_kana_encoding(telling) or ("cp1252" if _is_western(telling) else None)
    if encoding is None:
        best = from_bytes(telling, cp_isolation=_DETECTABLE_ENCODINGS).best() or from_bytes(telling).best()
        encoding = "cp1252" if best is None else best.encoding
    return data.decode(encoding, "replace")


def _is_western(data: bytes) -> bool:
    """Whether cp1252 makes of all bytes above 127 punctuation and the letters of one Western language."""
    foreign = {character for character in data.decode("cp1252", "replace") if not character.isascii()}
    return any(foreign <= alphabet for alphabet in _WESTERN_ALPHABETS)


def _find_kana_encoding(data: bytes) -> str | None:
    """Tell Japanese by its kana, which no other language's bytes turn into."""
    for encoding in ("cp932", "euc_jp"):
        foreign = [character for character in data.decode(encoding, "replace") if not character.isascii()]
        if sum("\u3040" <= character <= "\u30ff" for character in foreign) > 0.2 * len(foreign):
            return encoding
    return None


def is_legible(text: str) -> bool:
    """Whether a sample from all over the text is nearly free of control, unassigned and replacement characters."""
    sample = text[:: len(text) // _SAMPLE_CHARACTERS + 1]
    n_illegible = sum(
        character == "\ufffd" or (not character.isspace() and unicodedata.category(character) in ("Cc", "Cn", "Co"))
        for character in sample
    )
    return n_illegible <= _MAXIMUM_SHARE_OF_ILLEGIBLE_CHARACTERS * len(sample)


_INVISIBLE_CHARACTERS = re.compile(r"\u00ad[ \t]*\r?\n[ \t]*|[\x00-\x08\x0e-\x1b\x7f\u00ad\ufeff]")


def drop_invisible_characters(text: str) -> str:
    return _INVISIBLE_CHARACTERS.sub("", text)


def normalise_newlines(text: str) -> str:
    """One "\\n" for every kind of line end; a page feed inside a paragraph is only a line end too."""
    text = re.sub(r"\r\n?|[\x0b\x1c-\x1e\x85\u2028]", "\n", text)
    return re.sub(r"\n?\f", "\n", text).replace("\u2029", "\n\n")
