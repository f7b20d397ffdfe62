"""Image files by Pillow and OCR; each frame of a TIFF is a page. Recognises no letters itself."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

from PIL import Image, ImageOps, ImageSequence

from llama_embeddings.documents.extracted import (
    IMAGE_TYPES,
    ExtractedDocument,
    ExtractionLimits,
    OcrOptions,
    check_length,
    check_page_count,
)
from llama_embeddings.documents.ocr import TextRecogniser
from llama_embeddings.documents.pdf import clean_typeset_text, lay_out_pages
from llama_embeddings.errors import RequestTooLarge, ServiceError, UnreadableDocument

logger = logging.getLogger(__name__)

# A3 at 600 dots per inch; below what Pillow warns of.
MAX_IMAGE_PIXELS = 80_000_000


def extract_image(data: bytes, limits: ExtractionLimits, *, mimetype: str, ocr: OcrOptions) -> ExtractedDocument:
    """The text that stands in an image.

    Raises UnreadableDocument if it is damaged, has no text, or tesseract is missing; RequestTooLarge for too many
    pixels or pages.
    """
    recogniser = TextRecogniser(ocr)
    texts, n_characters = [], 0
    for frame in _read_frames(data, mimetype, limits):
        texts.append(clean_typeset_text(recogniser.read_image(frame)))
        n_characters += len(texts[-1])
        check_length(n_characters, limits)
    if not any(text.strip() for text in texts):
        raise UnreadableDocument("OCR found no text in the image.", field="file")
    return lay_out_pages(mimetype, texts)


def _read_frames(data: bytes, mimetype: str, limits: ExtractionLimits) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=[IMAGE_TYPES[mimetype]]) as image:
            # The frames of other formats are an animation's.
            is_paged = mimetype == "image/tiff"
            check_page_count(getattr(image, "n_frames", 1) if is_paged else 1, limits)
            for frame in ImageSequence.Iterator(image):
                _check_size(frame)
                yield ImageOps.exif_transpose(frame)
                if not is_paged:
                    return
    except (ServiceError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RequestTooLarge(
            f"The image has more than {MAX_IMAGE_PIXELS} pixels, the most that is accepted.", field="file"
        ) from None
    except Exception as error:  # noqa: BLE001 a damaged file makes Pillow raise nearly anything
        logger.info("An image of %d bytes could not be read: %s", len(data), type(error).__name__)
        raise UnreadableDocument("The image is damaged and cannot be read.", field="file") from None


def _check_size(image: Image.Image) -> None:
    """Before anything of it is unpacked."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise RequestTooLarge(
            f"The image has {image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} are accepted.",
            field="file",
        )
