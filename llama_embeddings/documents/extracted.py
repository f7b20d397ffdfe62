"""What extraction hands on, its limits, and the refusals that every format shares. Reads no bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_embeddings.errors import RequestTooLarge, UnsupportedDocumentType

EXTRACTION_VERSION = 2
"""Counts up with every change that can alter the text made from the same bytes."""

SUPPORTED_TYPES = {
    "text/plain": "plain text in any encoding",
    "application/pdf": "PDF",
    "text/markdown": "Markdown",
    "text/html": "HTML",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "DOCX",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "PPTX",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "XLSX",
    "application/epub+zip": "EPUB",
    "text/rtf": "RTF",
    "application/vnd.oasis.opendocument.text": "ODT",
    "text/csv": "CSV",
    "application/json": "JSON",
    "message/rfc822": "e-mail (.eml)",
}
"""Every type that is read, with the name that people know it by."""

IMAGE_TYPES = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/tiff": "TIFF",
    "image/webp": "WEBP",
    "image/bmp": "BMP",
    "image/x-ms-bmp": "BMP",
}
"""Types that are read with OCR only, with Pillow's names for them."""


@dataclass(frozen=True, slots=True)
class ExtractionLimits:
    """How much of a document is taken in; more raises RequestTooLarge."""

    max_pages: int = 5_000
    max_characters: int = 64_000_000
    max_unpacked_bytes: int = 500_000_000


DEFAULT_LIMITS = ExtractionLimits()


@dataclass(frozen=True, slots=True)
class OcrOptions:
    """How images are read. `command` is the path of tesseract, None where it is asked for but not installed."""

    command: str | None
    languages: str = "eng"
    data_directory: str = ""
    time_limit_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class ExtractedDocument:
    """A document's text. `page_starts[i]`: offset in `text` where page i + 1 begins; empty without pages."""

    mimetype: str
    text: str
    page_starts: tuple[int, ...] = ()


Extractor = Callable[[bytes, ExtractionLimits], ExtractedDocument]


def unsupported(detected: str) -> UnsupportedDocumentType:
    """The refusal of a type, with the types that are read."""
    hint = " With tesseract installed and USE_OCR=True, the text in it can be read." if detected in IMAGE_TYPES else ""
    return UnsupportedDocumentType(
        f"Documents of the type {detected!r} are not supported.{hint} "
        f"Supported: {', '.join(SUPPORTED_TYPES.values())}.",
        field="file",
    )


def check_length(n_characters: int, limits: ExtractionLimits) -> None:
    """Raise RequestTooLarge for more text than is accepted."""
    if n_characters > limits.max_characters:
        raise RequestTooLarge(
            f"The document has more than {limits.max_characters} characters of text, the most that is accepted "
            "(MAX_DOCUMENT_TEXT_IN_MB). Split it into smaller files.",
            field="file",
        )


def check_page_count(n_pages: int, limits: ExtractionLimits) -> None:
    """Raise RequestTooLarge for more pages than are accepted."""
    if n_pages > limits.max_pages:
        raise RequestTooLarge(
            f"The document has {n_pages} pages, at most {limits.max_pages} are accepted (MAX_DOCUMENT_PAGES). "
            "Split it into smaller files.",
            field="file",
        )
