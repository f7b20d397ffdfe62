"""Bytes to text, by the type detected in the bytes themselves; file names are never looked at.

`extract_text` detects the type with libmagic and hands the bytes to the extractor that `EXTRACTORS` names for it. An
extractor takes the bytes and the limits and returns an `ExtractedDocument`; a new format is one function and one row.

Text is only tidied where a format's layout would otherwise glue or tear sentences: newlines become "\\n", and in PDFs
running headers are dropped, hyphenation is undone and lines are put together to paragraphs. Letters are never changed,
apart from the ligatures that typesetting makes of "fi" and the like. Finding sentences is not done here, nor is OCR.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pylibmagic  # must come before magic: it makes magic find the libmagic that it bundles

# isort: split
import magic
import pypdf
from charset_normalizer import from_bytes
from pypdf.errors import DependencyError

from llama_embeddings.errors import RequestTooLarge, UnreadableDocument, UnsupportedDocumentType

logger = logging.getLogger(__name__)

# pypdf's messages quote the file, and texts of users stay out of logs.
logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)

EXTRACTION_VERSION = 1
"""Counts up with every change that can alter the text made from the same bytes."""

_DETECTION_BYTES = 256 * 1024
_SAMPLE_CHARACTERS = 20_000
_SAMPLE_BYTES = 64 * 1024
_MAXIMUM_SHARE_OF_ILLEGIBLE_CHARACTERS = 0.05


@dataclass(frozen=True, slots=True)
class ExtractionLimits:
    """How much of a document is taken in; more raises RequestTooLarge."""

    max_pages: int = 5_000
    max_characters: int = 20_000_000


DEFAULT_LIMITS = ExtractionLimits()


@dataclass(frozen=True, slots=True)
class ExtractedDocument:
    """A document's text. `page_starts[i]`: offset in `text` where page i + 1 begins; empty without pages."""

    mimetype: str
    text: str
    page_starts: tuple[int, ...] = ()


Extractor = Callable[[bytes, ExtractionLimits], ExtractedDocument]


def extract_text(data: bytes, *, limits: ExtractionLimits = DEFAULT_LIMITS) -> ExtractedDocument:
    """Extract the text of a document of any supported type.

    Raises UnsupportedDocumentType, UnreadableDocument (damaged, encrypted, without text) and RequestTooLarge.
    """
    if not data:
        raise UnreadableDocument("The document is empty: it has 0 bytes.", field="file")
    mimetype = detect_mimetype(data)
    extractor = EXTRACTORS.get(mimetype)
    if extractor is None:
        raise _unsupported(mimetype)
    document = extractor(data, limits)
    logger.info("Extracted %d characters from %d bytes of %s", len(document.text), len(data), mimetype)
    return document


def _unsupported(detected: str) -> UnsupportedDocumentType:
    return UnsupportedDocumentType(
        f"Documents of the type {detected!r} are not supported. Supported: {', '.join(sorted(EXTRACTORS))}.",
        field="file",
    )


def _check_length(n_characters: int, limits: ExtractionLimits) -> None:
    if n_characters > limits.max_characters:
        raise RequestTooLarge(
            f"The document has more than {limits.max_characters} characters of text, the most that is accepted. "
            "Split it into smaller files.",
            field="file",
        )


# --- Detection -------------------------------------------------------------------------------------------------------

# Text whose markup would end up in the sentences: refused until there is an extractor that understands it.
_MARKUP_TYPES = frozenset({"text/html", "text/xml", "text/rtf"})

# libmagic knows these by two or three characters, which prose can begin with: "P1 is great" is a bitmap to it.
_WEAKLY_DETECTED_TYPES = ("image/", "audio/", "video/", "font/", "application/octet-stream")


def detect_mimetype(data: bytes) -> str:
    """Name the type that decides which extractor reads these bytes.

    What libmagic recognises wins. Text that it believes to be a script, a table or the like is "text/plain", as is
    text in an encoding that it takes for binary data.
    """
    with_signature: str = _open_magic().from_buffer(data[:_DETECTION_BYTES])
    if with_signature in EXTRACTORS:
        return with_signature
    if with_signature == "application/octet-stream" and b"%PDF-" in data[:1024]:
        return "application/pdf"
    if with_signature.startswith("text/") and with_signature not in _MARKUP_TYPES:
        return "text/plain"
    is_weak = with_signature.startswith(_WEAKLY_DETECTED_TYPES) and not with_signature.endswith("+xml")
    if is_weak and (text := _decode_certainly(data)) is not None and _is_legible(text):
        return "text/plain"
    return with_signature


@cache
def _open_magic() -> magic.Magic:
    # The database is named, because one of the system belongs to another version of the library.
    return magic.Magic(mime=True, magic_file=str(pylibmagic.data.joinpath("magic.mgc")))


# --- Plain text ------------------------------------------------------------------------------------------------------

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
    decoded = decode_text(data)
    if not _is_legible(decoded):
        raise _unsupported("application/octet-stream")
    text = _normalise_newlines(_drop_invisible_characters(decoded))
    _check_length(len(text), limits)
    if not text.strip():
        raise UnreadableDocument("The document contains no text, only whitespace.", field="file")
    return ExtractedDocument("text/plain", text)


def decode_text(data: bytes) -> str:
    """Decode by byte order mark, as UTF-16 or -32 without one, as UTF-8, else by the likeliest older encoding."""
    text = _decode_certainly(data)
    return _decode_by_likelihood(data) if text is None else text


def _decode_certainly(data: bytes) -> str | None:
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
    telling = b"\n".join(line for line in data.splitlines() if not line.isascii())[:_SAMPLE_BYTES]
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


def _is_legible(text: str) -> bool:
    """Whether a sample from all over the text is nearly free of control, unassigned and replacement characters."""
    sample = text[:: len(text) // _SAMPLE_CHARACTERS + 1]
    n_illegible = sum(
        character == "\ufffd" or (not character.isspace() and unicodedata.category(character) in ("Cc", "Cn", "Co"))
        for character in sample
    )
    return n_illegible <= _MAXIMUM_SHARE_OF_ILLEGIBLE_CHARACTERS * len(sample)


_INVISIBLE_CHARACTERS = re.compile(r"\u00ad[ \t]*\r?\n[ \t]*|[\x00-\x08\x0e-\x1b\x7f\u00ad\ufeff]")


def _drop_invisible_characters(text: str) -> str:
    return _INVISIBLE_CHARACTERS.sub("", text)


def _normalise_newlines(text: str) -> str:
    """One "\\n" for every kind of line end; a page feed inside a paragraph is only a line end too."""
    text = re.sub(r"\r\n?|[\x0b\x1c-\x1e\x85\u2028]", "\n", text)
    return re.sub(r"\n?\f", "\n", text).replace("\u2029", "\n\n")


# --- Lines and paragraphs --------------------------------------------------------------------------------------------

_LIST_ITEM = re.compile(r"(?:[-*+•‣⁃·▪◦]\s|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{2,5})[.)]\s|•|⁃)\s*\S")
_HEADING_MARK = re.compile(r"#{1,6}\s")
_MAXIMUM_WRAPPED_WIDTH = 200
_MINIMUM_WRAPPED_WIDTH = 40


def measure_width(lines: Sequence[str]) -> int:
    """The width, in columns, that lines seem to be wrapped at; longer than 200 is not wrapping."""
    widths = map(_count_columns, lines)
    return max((width for width in widths if width <= _MAXIMUM_WRAPPED_WIDTH), default=0)


def _count_columns(line: str) -> int:
    """Chinese and Japanese characters are two columns wide."""
    return len(line) if line.isascii() else len(line) + sum(map(is_written_without_spaces, line))


def ends_paragraph(line: str, next_line: str, width: int) -> bool:
    """Whether the line end between two lines was put there by the author and not by wrapping at `width`.

    It was where a list item or heading begins or ends, and where the next line's first word had easily fitted in.
    A next line that begins with a small letter always continues.
    """
    if _LIST_ITEM.match(next_line) or _HEADING_MARK.match(next_line) or _HEADING_MARK.match(line):
        return True
    if next_line[:1].islower():
        return False
    n_columns = _count_columns(line)
    if n_columns > _MAXIMUM_WRAPPED_WIDTH:
        return True
    needed = n_columns + 1 + min(12, len(next_line.split(maxsplit=1)[0]))
    return needed <= 0.75 * max(width, _MINIMUM_WRAPPED_WIDTH)


def is_written_without_spaces(character: str) -> bool:
    """Whether a character belongs to Chinese or Japanese, where a wrapped line continues without a space."""
    return (
        "\u3000" <= character <= "\u30ff"
        or "\u3400" <= character <= "\u9fff"
        or "\uf900" <= character <= "\ufaff"
        or "\uff00" <= character <= "\uffef"
        or "\U00020000" <= character <= "\U0003ffff"
    )


# --- PDF -------------------------------------------------------------------------------------------------------------

_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
_LIGATURE = re.compile("|".join(_LIGATURES))
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# First halves that a hyphen nearly always stays behind; everything else is decided by the document's own words.
_HYPHENATED_PREFIXES = frozenset({"well", "self", "half"})
_MINIMUM_PAGES_FOR_RUNNING_LINES = 3
_MINIMUM_SHARE_OF_RUNNING_LINES = 0.4  # headers of left and right pages differ, so each is on half of them at best
_DEEPEST_RUNNING_LINE = 3


def extract_pdf(data: bytes, limits: ExtractionLimits = DEFAULT_LIMITS) -> ExtractedDocument:
    """Extract a PDF's text: paragraphs parted by blank lines, no running headers, no hyphenation.

    Raises UnreadableDocument if it is damaged, encrypted with a password, or has no text (a scan).
    """
    pages, n_characters = [], 0
    for page_text in _read_pdf_pages(data, limits):
        n_characters += len(page_text)
        _check_length(n_characters, limits)
        pages.append([line.strip() for line in page_text.split("\n")])
    if not any(any(lines) for lines in pages):
        raise UnreadableDocument(
            "The PDF contains no text. It probably is a scan: run OCR on it first and send the result.", field="file"
        )
    without_running_lines = drop_running_lines(pages)
    return ExtractedDocument("application/pdf", *_assemble_pages(without_running_lines))


def _read_pdf_pages(data: bytes, limits: ExtractionLimits) -> Iterator[str]:
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableDocument("The PDF is encrypted. Remove its password first.", field="file")
        _check_page_count(len(reader.pages), limits)
        for page in reader.pages:
            yield _clean_pdf_text(page.extract_text())
    except (UnreadableDocument, RequestTooLarge):
        raise
    except DependencyError:
        raise UnreadableDocument(
            "The PDF is encrypted in a way that cannot be opened here, even without a password. Save it unprotected.",
            field="file",
        ) from None
    except Exception as error:  # noqa: BLE001 a damaged file makes pypdf raise nearly anything, KeyError and RecursionError included
        logger.info("A PDF of %d bytes could not be read: %s", len(data), type(error).__name__)
        # Not chained: pypdf's messages quote the file.
        raise UnreadableDocument("The PDF is damaged and cannot be read. Try saving it anew.", field="file") from None


def _check_page_count(n_pages: int, limits: ExtractionLimits) -> None:
    if n_pages > limits.max_pages:
        raise RequestTooLarge(
            f"The PDF has {n_pages} pages, at most {limits.max_pages} are accepted. Split it into smaller files.",
            field="file",
        )


def _clean_pdf_text(text: str) -> str:
    text = _LIGATURE.sub(lambda match: _LIGATURES[match.group()], text)
    text = _LONE_SURROGATE.sub("\ufffd", text)  # from broken character maps; such text could not even be hashed
    return _normalise_newlines(_drop_invisible_characters(text))


def drop_running_lines(pages: list[list[str]]) -> list[list[str]]:
    """Take off the headers and footers: outermost lines that repeat on many pages, apart from their numbers.

    Pages are peeled from the outside in, so a line inside the text is never taken. Texts that would lose everything
    keep all their lines.
    """
    trimmed = [_trim_blank_lines(lines) for lines in pages]
    if sum(bool(lines) for lines in trimmed) < _MINIMUM_PAGES_FOR_RUNNING_LINES:
        return trimmed
    kept = [list(reversed(lines)) for lines in _peel_running_tops(trimmed)]
    kept = [list(reversed(lines)) for lines in _peel_running_tops(kept)]
    return kept if any(kept) else trimmed


def _peel_running_tops(pages: list[list[str]]) -> list[list[str]]:
    for _ in range(_DEEPEST_RUNNING_LINE):
        patterns = Counter(_generalise_numbers(lines[0]) for lines in pages if lines)
        n_needed = max(_MINIMUM_PAGES_FOR_RUNNING_LINES, _MINIMUM_SHARE_OF_RUNNING_LINES * sum(map(bool, pages)))
        running = {pattern for pattern, n_pages in patterns.items() if n_pages >= n_needed}
        pages = [
            _trim_blank_lines(lines[1:]) if lines and _generalise_numbers(lines[0]) in running else lines
            for lines in pages
        ]
    return pages


def _generalise_numbers(line: str) -> str:
    """The same string for "12 | Results" and "13 | Results", and for the page numbers iv and vii."""
    if re.fullmatch(r"[-–—\s]*[ivxlc]+[-–—\s]*", line):
        return "#"
    return re.sub(r"\d+", "#", " ".join(line.split()))


def _trim_blank_lines(lines: Sequence[str]) -> list[str]:
    first = next((k for k, line in enumerate(lines) if line), len(lines))
    last = next((k for k in range(len(lines), first, -1) if lines[k - 1]), first)
    return list(lines[first:last])


def _assemble_pages(pages: list[list[str]]) -> tuple[str, tuple[int, ...]]:
    """Put lines together to paragraphs, across pages too: text and the offset at which each page begins."""
    parts: list[str] = []
    length, page_starts, previous, blank = 0, [], "", False
    words = _count_words(pages)
    width = 0
    for lines in pages:
        # A page break alone does not end a paragraph, so the width to compare with is still the page's before.
        at_page_start = True
        for line in lines:
            if not line:
                blank = True
                continue
            separator = "\n\n" if blank and previous else _choose_separator(previous, line, width, words)
            if separator == "hyphen":
                parts[-1] = parts[-1][:-1]
                length, separator = length - 1, ""
            if at_page_start:
                page_starts.append(length + len(separator))
                width, at_page_start = measure_width(lines), False
            parts += [separator, line]
            length, previous, blank = length + len(separator) + len(line), line, False
        if at_page_start:
            page_starts.append(length)
    return "".join(parts), tuple(page_starts)


def _choose_separator(line: str, next_line: str, width: int, words: Counter[str]) -> str:
    """What goes between two lines: nothing, a space, a blank line, or "hyphen" to take the hyphen away."""
    if not line:
        return ""
    if re.search(r"[^\W\d_]-$", line) and line[-2].islower() and next_line[:1].islower():
        return "" if _keeps_hyphen(line, next_line, words) else "hyphen"
    if ends_paragraph(line, next_line, width):
        return "\n\n"
    if is_written_without_spaces(line[-1]) and is_written_without_spaces(next_line[0]):
        return ""
    return " "


def _keeps_hyphen(line: str, next_line: str, words: Counter[str]) -> bool:
    """Decide whether "well-" + "known" is "well-known" and "exam-" + "ple" is "example", by words used elsewhere."""
    first = re.split(r"[^\w-]", line[:-1])[-1].lower()
    second = re.match(r"\w*", next_line).group().lower()  # type: ignore[union-attr]  # \w* always matches
    if words[first + second]:
        return False
    return bool(words[f"{first}-{second}"]) or first in _HYPHENATED_PREFIXES


def _count_words(pages: list[list[str]]) -> Counter[str]:
    return Counter(
        word.lower() for lines in pages for line in lines for word in re.findall(r"\w+(?:-\w+)*(?![\w-])", line)
    )


EXTRACTORS: dict[str, Extractor] = {
    "text/plain": extract_plain_text,
    "application/pdf": extract_pdf,
}
"""Which function reads which type. The keys are what an UnsupportedDocumentType lists."""
