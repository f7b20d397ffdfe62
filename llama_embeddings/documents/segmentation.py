"""What decides which sentences a file gives, as a cache key. Imports no parser: the server's process asks for it."""

from __future__ import annotations

from importlib.metadata import version

from llama_embeddings.documents.extracted import EXTRACTION_VERSION, OcrOptions

SEGMENTATION_NAME = f"pysbd-{version('pysbd')}/2"
"""The splitter and the version of the rules around it; the number counts up with every change of the result."""


def segmentation_key(minimum_length: int, ocr: OcrOptions | None = None) -> str:
    """Everything that decides which sentences a file gives, as part of a cache key."""
    key = f"{SEGMENTATION_NAME};extraction-{EXTRACTION_VERSION};minimum-{minimum_length}"
    return key if ocr is None or ocr.command is None else f"{key};ocr-{ocr.languages}"
