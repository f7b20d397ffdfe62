"""Office files, e-books, mail, markup and tables to text, by kreuzberg and Python's own CSV and JSON readers.

Each heading, paragraph, list item and long cell becomes a paragraph of its own, so that no sentence is glued to its
neighbour; the short cells of a table's row are one paragraph, with bars between them. Fetches nothing, runs no macro.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from kreuzberg import ExtractionConfig, PageConfig, extract_bytes_sync

from llama_embeddings.documents.extracted import ExtractedDocument, ExtractionLimits, check_length, check_page_count
from llama_embeddings.documents.plain_text import decode_text, drop_invisible_characters, normalise_newlines
from llama_embeddings.errors import RequestTooLarge, ServiceError, UnreadableDocument

logger = logging.getLogger(__name__)

PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"

_SHORT_CELL_CHARACTERS = 40
_MAXIMUM_ARCHIVE_MEMBERS = 20_000
# A private character, which no text of a slide holds; `{page_num}` is kreuzberg's.
_PAGE_MARK = "\ue0f1"
_PAGE_MARKS = PageConfig(insert_page_markers=True, marker_format=f"\n\n{_PAGE_MARK}{{page_num}}{_PAGE_MARK}\n\n")
_HEAD = re.compile(r"<head[\s>].*?</head\s*>", re.IGNORECASE | re.DOTALL)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w-]+)", re.IGNORECASE)


def extract_structured(data: bytes, limits: ExtractionLimits, *, mimetype: str) -> ExtractedDocument:
    """The text of a document of one of kreuzberg's types, in its own order.

    Raises UnreadableDocument if it is damaged or has no text, RequestTooLarge if it would unpack to too much.
    """
    if data.startswith(b"PK"):
        check_archive(data, limits)
    with _refusing_damage(mimetype):
        config = ExtractionConfig(use_cache=False, include_document_structure=True)
        document: Mapping[str, Any] = extract_bytes_sync(data, mimetype, config).document or {}
        blocks = list(_read_nodes(document.get("nodes") or ()))
    return ExtractedDocument(mimetype, _join(blocks, limits))


def extract_slides(data: bytes, limits: ExtractionLimits) -> ExtractedDocument:
    """A presentation; each slide is a page. Raises as extract_structured does."""
    check_archive(data, limits)
    with _refusing_damage(PPTX):
        text = extract_bytes_sync(data, PPTX, ExtractionConfig(use_cache=False, pages=_PAGE_MARKS)).content
        pages = [page.strip() for page in re.split(f"{_PAGE_MARK}\\d+{_PAGE_MARK}", text)[1:]] or [text.strip()]
    check_page_count(len(pages), limits)
    starts, length = [], 0
    pages = [_tidy(page) for page in pages]
    for page in pages:
        starts.append(length)
        length += len(page) + 2
    return ExtractedDocument(PPTX, _join(pages, limits), tuple(starts))


def extract_html(data: bytes, limits: ExtractionLimits) -> ExtractedDocument:
    """A web page without its head, scripts and styles: read as Markdown first, which keeps its structure."""
    check_length(len(data) // 4, limits)
    declared = _CHARSET.search(data[:4096])
    body = _HEAD.sub("", _decode_declared(data, declared.group(1).decode() if declared else "utf-8"), count=1)
    with _refusing_damage("text/html"):
        config = ExtractionConfig(use_cache=False, output_format="markdown")
        markdown = extract_bytes_sync(body.encode("utf-8", "replace"), "text/html", config).content
    return ExtractedDocument("text/html", extract_structured(markdown.encode(), limits, mimetype="text/markdown").text)


def extract_markdown(data: bytes, limits: ExtractionLimits) -> ExtractedDocument:
    """Markdown in any encoding, without its marks."""
    check_length(len(data) // 4, limits)
    return extract_structured(decode_text(data).encode("utf-8", "replace"), limits, mimetype="text/markdown")


def extract_csv(data: bytes, limits: ExtractionLimits) -> ExtractedDocument:
    """A table of comma, semicolon, tab or bar separated values, row by row."""
    check_length(len(data) // 4, limits)
    text = decode_text(data).replace("\0", "")
    with _refusing_damage("text/csv"):
        rows = csv.reader(io.StringIO(text), delimiter=_find_delimiter(text))
        blocks = [block for row in rows for block in _join_cells(row)]
    return ExtractedDocument("text/csv", _join(blocks, limits))


def extract_json(data: bytes, limits: ExtractionLimits) -> ExtractedDocument:
    """The strings of a JSON document, each a paragraph; keys, numbers and truth values are not text."""
    check_length(len(data) // 4, limits)
    with _refusing_damage("application/json"):
        blocks = list(_find_strings(json.loads(decode_text(data))))
    return ExtractedDocument("application/json", _join(blocks, limits))


def check_archive(data: bytes, limits: ExtractionLimits) -> None:
    """Look at an archive's list of contents before anything is unpacked; names in it are never used as paths."""
    with _refusing_damage("application/zip"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        is_encrypted = any(member.flag_bits & 1 for member in members)
        spans = sorted((member.header_offset, member.compress_size) for member in members)
    n_bytes = sum(member.file_size for member in members)
    if n_bytes > limits.max_unpacked_bytes or len(members) > _MAXIMUM_ARCHIVE_MEMBERS:
        raise RequestTooLarge(
            f"The document would unpack to {n_bytes} bytes in {len(members)} parts; at most "
            f"{limits.max_unpacked_bytes} bytes and {_MAXIMUM_ARCHIVE_MEMBERS} parts are accepted "
            "(DOCUMENT_MEMORY_LIMIT_IN_MB).",
            field="file",
        )
    if is_encrypted:
        raise UnreadableDocument("The document is encrypted. Remove its password first.", field="file")
    if any(start + size > following for (start, size), (following, _) in pairwise(spans)):
        raise UnreadableDocument("The document is damaged: parts of its archive overlap.", field="file")


class _refusing_damage:  # noqa: N801 used as a function is
    """Turns whatever a damaged file makes a parser raise into UnreadableDocument, without the file's own words."""

    def __init__(self, mimetype: str) -> None:
        self._mimetype = mimetype

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None or isinstance(error, ServiceError | MemoryError) or not isinstance(error, Exception):
            return
        logger.info("A document of %s could not be read: %s", self._mimetype, kind.__name__)
        raise UnreadableDocument(
            f"The document is damaged or encrypted and cannot be read as {self._mimetype}. Try saving it anew.",
            field="file",
        ) from None


def _decode_declared(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (LookupError, UnicodeDecodeError):
        return decode_text(data)


def _read_nodes(nodes: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text of each node once; groups and lists repeat what their children say."""
    for node in nodes:
        content = node["content"]
        if "grid" in content:
            cells = content["grid"]["cells"]
            for _, row in groupby(sorted(cells, key=lambda cell: (cell["row"], cell["col"])), lambda cell: cell["row"]):
                yield from _join_cells([cell["content"] for cell in row])
        elif content["node_type"] == "metadata_block":
            yield from (value for name, value in content["entries"] if name.lower() in ("subject", "title"))
        elif content.get("text"):
            yield content["text"]


def _join_cells(cells: Sequence[str]) -> Iterator[str]:
    """Long cells alone, runs of short ones with bars between them."""
    filled = [stripped for cell in cells if (stripped := cell.strip())]
    for is_short, run in groupby(filled, lambda cell: len(cell) <= _SHORT_CELL_CHARACTERS and cell[-1] not in ".!?"):
        texts = list(run)
        yield from [" | ".join(texts)] if is_short else texts


def _find_delimiter(text: str) -> str:
    first_line = text[:10_000].strip().partition("\n")[0]
    return max(",;\t|", key=first_line.count)


def _find_strings(value: Any) -> Iterator[str]:
    """Strings of a parsed JSON document in their order; a stack, because documents may be nested deeply."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting.extend(reversed(item.values()))
        elif isinstance(item, list):
            waiting.extend(reversed(item))


def _tidy(text: str) -> str:
    # Lone surrogates come from JSON's escapes; such text could not even be hashed.
    return normalise_newlines(drop_invisible_characters(re.sub("[\ud800-\udfff]", "\ufffd", text))).strip()


def _join(blocks: Iterable[str], limits: ExtractionLimits) -> str:
    text = "\n\n".join(filter(None, map(_tidy, blocks)))
    check_length(len(text), limits)
    if not text.strip():
        raise UnreadableDocument("The document contains no text.", field="file")
    return text
