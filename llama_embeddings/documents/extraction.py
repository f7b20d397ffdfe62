"""Bytes to text, by the type detected in the bytes themselves.

`extract_text` detects the type with libmagic and hands the bytes to the extractor that `EXTRACTORS` names for it. An
extractor takes the bytes and the limits and returns an `ExtractedDocument`; a new format is one function and one row.
A file's name is looked at only to tell kinds of text apart that bytes do not tell (`.md`, `.csv`, `.txt`).

Text is only tidied where a format's layout would otherwise glue or tear sentences. Letters are never changed, apart
from the ligatures that typesetting makes of "fi" and the like. Finding sentences is not done here.
"""

from __future__ import annotations

import logging
import re
from functools import cache, partial
from pathlib import PurePath

import pylibmagic  # must come before magic: it makes magic find the libmagic that it bundles

# isort: split
import magic

from llama_embeddings.documents.extracted import (
    DEFAULT_LIMITS,
    IMAGE_TYPES,
    SUPPORTED_TYPES,
    ExtractedDocument,
    ExtractionLimits,
    Extractor,
    OcrOptions,
    unsupported,
)
from llama_embeddings.documents.images import extract_image
from llama_embeddings.documents.pdf import extract_pdf
from llama_embeddings.documents.plain_text import decode_certainly, extract_plain_text, is_legible
from llama_embeddings.documents.structured import (
    PPTX,
    extract_csv,
    extract_html,
    extract_json,
    extract_markdown,
    extract_slides,
    extract_structured,
)
from llama_embeddings.errors import UnreadableDocument

logger = logging.getLogger(__name__)

_DETECTION_BYTES = 256 * 1024

_OWN_EXTRACTORS: dict[str, Extractor] = {
    "text/plain": extract_plain_text,
    "application/pdf": extract_pdf,
    "text/markdown": extract_markdown,
    "text/html": extract_html,
    "text/csv": extract_csv,
    "application/json": extract_json,
    PPTX: extract_slides,
}

EXTRACTORS: dict[str, Extractor] = {
    mimetype: _OWN_EXTRACTORS.get(mimetype) or partial(extract_structured, mimetype=mimetype)
    for mimetype in SUPPORTED_TYPES
}
"""Which function reads which type."""


def extract_text(
    data: bytes,
    *,
    limits: ExtractionLimits = DEFAULT_LIMITS,
    filename: str | None = None,
    ocr: OcrOptions | None = None,
) -> ExtractedDocument:
    """Extract the text of a document of any supported type; of images and scanned PDFs, too, with `ocr`.

    Raises UnsupportedDocumentType, UnreadableDocument (damaged, encrypted, without text) and RequestTooLarge.
    """
    if not data:
        raise UnreadableDocument("The document is empty: it has 0 bytes.", field="file")
    mimetype = detect_mimetype(data, filename)
    extractor = _find_extractor(mimetype, ocr)
    if extractor is None:
        raise unsupported(mimetype)
    document = extractor(data, limits)
    logger.info("Extracted %d characters from %d bytes of %s", len(document.text), len(data), mimetype)
    return document


def _find_extractor(mimetype: str, ocr: OcrOptions | None) -> Extractor | None:
    if ocr is not None and mimetype == "application/pdf":
        return partial(extract_pdf, ocr=ocr)
    if ocr is not None and mimetype in IMAGE_TYPES:
        return partial(extract_image, mimetype=mimetype, ocr=ocr)
    return EXTRACTORS.get(mimetype)


# Text whose markup would end up in the sentences: refused where there is no extractor that understands it.
_MARKUP_TYPES = frozenset({"text/xml"})

# libmagic knows these by two or three characters, which prose can begin with: "P1 is great" is a bitmap to it.
_WEAKLY_DETECTED_TYPES = ("image/", "audio/", "video/", "font/", "application/octet-stream")

_OTHER_NAMES = {
    "application/x-ndjson": "text/plain",
    "application/xhtml+xml": "text/html",
    "application/rtf": "text/rtf",
}
_TYPES_BY_SUFFIX = {".md": "text/markdown", ".markdown": "text/markdown", ".csv": "text/csv", ".txt": "text/plain"}

# Signs of Markdown that ordinary text does without; two different ones make a document Markdown.
_MARKDOWN_SIGNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^#{1,6} \S",
        r"^(?:```|~~~)",
        r"\[[^\]\n]{1,200}\]\([^)\s]{1,500}\)",
        r"\*\*\w[^*\n]{0,200}\*\*",
        r"^\|? ?:?-{3,}:? ?\|",
    )
)


def detect_mimetype(data: bytes, filename: str | None = None) -> str:
    """Name the type that decides which extractor reads these bytes.

    What libmagic recognises wins. Text that it believes to be a script or the like is "text/plain", as is text in an
    encoding that it takes for binary data. A name decides only between kinds of text.
    """
    with_signature: str = _open_magic().from_buffer(data[:_DETECTION_BYTES])
    with_signature = _OTHER_NAMES.get(with_signature, with_signature)
    if with_signature == "application/octet-stream" and b"%PDF-" in data[:1024]:
        return "application/pdf"
    if with_signature in ("text/plain", "text/csv"):
        return _tell_kind_of_text(data, with_signature, filename)
    if with_signature in EXTRACTORS:
        return with_signature
    if with_signature.startswith("text/") and with_signature not in _MARKUP_TYPES:
        return _tell_kind_of_text(data, "text/plain", filename)
    is_weak = with_signature.startswith(_WEAKLY_DETECTED_TYPES) and not with_signature.endswith("+xml")
    if is_weak and (text := decode_certainly(data)) is not None and is_legible(text):
        return "text/plain"
    return with_signature


def _tell_kind_of_text(data: bytes, detected: str, filename: str | None) -> str:
    by_name = _TYPES_BY_SUFFIX.get(PurePath(filename).suffix.lower()) if filename else None
    if by_name:
        return by_name
    sample = data[:_DETECTION_BYTES].decode("utf-8", "replace")
    n_signs = sum(sign.search(sample) is not None for sign in _MARKDOWN_SIGNS)
    return "text/markdown" if detected == "text/plain" and n_signs >= 2 else detected


@cache
def _open_magic() -> magic.Magic:
    # The database is named, because one of the system belongs to another version of the library.
    return magic.Magic(mime=True, magic_file=str(pylibmagic.data.joinpath("magic.mgc")))
