"""PDF by pypdf: paragraphs without running headers and hyphenation. Pages without text are left to `ocr.py`."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pypdf
from pypdf.errors import DependencyError

from llama_embeddings.documents.extracted import (
    DEFAULT_LIMITS,
    ExtractedDocument,
    ExtractionLimits,
    OcrOptions,
    check_length,
    check_page_count,
)
from llama_embeddings.documents.layout import ends_paragraph, is_written_without_spaces, measure_width
from llama_embeddings.documents.ocr import TESSERACT_IS_MISSING, TextRecogniser
from llama_embeddings.documents.plain_text import drop_invisible_characters, normalise_newlines
from llama_embeddings.errors import RequestTooLarge, UnreadableDocument

logger = logging.getLogger(__name__)

# pypdf's messages quote the file, and texts of users stay out of logs.
logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)

_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
_LIGATURE = re.compile("|".join(_LIGATURES))
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# First halves that a hyphen nearly always stays behind; everything else is decided by the document's own words.
_HYPHENATED_PREFIXES = frozenset({"well", "self", "half"})
_MINIMUM_PAGES_FOR_RUNNING_LINES = 3
_MINIMUM_SHARE_OF_RUNNING_LINES = 0.4  # headers of left and right pages differ, so each is on half of them at best
_DEEPEST_RUNNING_LINE = 3


def extract_pdf(
    data: bytes, limits: ExtractionLimits = DEFAULT_LIMITS, *, ocr: OcrOptions | None = None
) -> ExtractedDocument:
    """Extract a PDF's text: paragraphs parted by blank lines, no running headers, no hyphenation.

    With `ocr`, pages without text are read as images. Raises UnreadableDocument if the PDF is damaged, encrypted with
    a password, or has no text (a scan, without OCR).
    """
    texts, n_characters = [], 0
    for page_text in _read_pdf_pages(data, limits):
        n_characters += len(page_text)
        check_length(n_characters, limits)
        texts.append(page_text)
    if ocr is not None and not all(text.strip() for text in texts):
        _fill_in_scans(texts, data, ocr)
        check_length(sum(map(len, texts)), limits)
    if not any(text.strip() for text in texts):
        raise _refuse_scan(ocr)
    return lay_out_pages("application/pdf", texts)


def _fill_in_scans(texts: list[str], data: bytes, ocr: OcrOptions) -> None:
    """Put what OCR reads in place of the pages' texts that are empty. Without tesseract, pages with text are enough."""
    if ocr.command is None:
        return
    scans = [position for position, text in enumerate(texts) if not text.strip()]
    for position, recognised in TextRecogniser(ocr).read_pdf_pages(data, scans):
        texts[position] = clean_typeset_text(recognised)


def _refuse_scan(ocr: OcrOptions | None) -> UnreadableDocument:
    if ocr is None:
        outcome = (
            "It probably is a scan: run OCR on it first and send the result, or start the server with USE_OCR=True."
        )
    elif ocr.command is None:
        outcome = f"It probably is a scan. {TESSERACT_IS_MISSING}"
    else:
        outcome = "OCR found none in its pages' images either."
    return UnreadableDocument(f"The PDF contains no text. {outcome}", field="file")


def lay_out_pages(mimetype: str, texts: Sequence[str]) -> ExtractedDocument:
    """Pages of lines, as they stand on paper, to paragraphs."""
    pages = [[line.strip() for line in text.split("\n")] for text in texts]
    return ExtractedDocument(mimetype, *_assemble_pages(drop_running_lines(pages)))


def _read_pdf_pages(data: bytes, limits: ExtractionLimits) -> Iterator[str]:
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableDocument("The PDF is encrypted. Remove its password first.", field="file")
        check_page_count(len(reader.pages), limits)
        for page in reader.pages:
            yield clean_typeset_text(page.extract_text())
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


def clean_typeset_text(text: str) -> str:
    """Undo ligatures and drop what cannot be seen."""
    text = _LIGATURE.sub(lambda match: _LIGATURES[match.group()], text)
    text = _LONE_SURROGATE.sub("\ufffd", text)  # from broken character maps; such text could not even be hashed
    return normalise_newlines(drop_invisible_characters(text))


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
