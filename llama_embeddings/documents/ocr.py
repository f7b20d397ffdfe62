"""Letters in images by tesseract, one image at a time, as a child of the reading process. Lays out no paragraphs.

PDFium draws the pages of a PDF, so that a scan is read however it is stored and turned.
"""

from __future__ import annotations

import io
import logging
import subprocess
import time
from collections.abc import Iterator, Sequence

import pypdfium2
from PIL import Image

from llama_embeddings.documents.extracted import OcrOptions
from llama_embeddings.errors import UnreadableDocument

logger = logging.getLogger(__name__)

TESSERACT_IS_MISSING = "OCR is on (USE_OCR), but tesseract is not installed on the server."
_DOTS_PER_INCH = 300  # what tesseract's models were made for
_POINTS_PER_INCH = 72
# A poster is drawn coarser.
_MAX_PAGE_PIXELS = 20_000_000


class TextRecogniser:
    """Reads the images of one document; its time begins when it is made."""

    def __init__(self, options: OcrOptions) -> None:
        if options.command is None:
            raise UnreadableDocument(TESSERACT_IS_MISSING, field="file")
        self._command = options.command
        self._languages = options.languages
        self._environment = {"OMP_THREAD_LIMIT": "1", "LANG": "C.UTF-8"}
        if options.data_directory:
            self._environment["TESSDATA_PREFIX"] = options.data_directory
        self._deadline = time.monotonic() + options.time_limit_seconds

    def read_image(self, image: Image.Image) -> str:
        """The text of an image, line by line. Raises UnreadableDocument."""
        encoded = io.BytesIO()
        _flatten(image).save(encoded, "PNG", compress_level=1)
        return self._run(encoded.getvalue())

    def read_pdf_pages(self, data: bytes, positions: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The text of a PDF's pages, drawn as images; a page on which nothing is drawn has none."""
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError:
            raise UnreadableDocument("The PDF is damaged: its pages cannot be drawn.", field="file") from None
        with document:
            for position in positions:
                page_image = _draw_page(document, position)
                if page_image is not None:
                    yield position, self.read_image(page_image)

    def _run(self, png: bytes) -> str:
        command = [self._command, "stdin", "stdout", "-l", self._languages, "--dpi", str(_DOTS_PER_INCH)]
        seconds_left = max(0.0, self._deadline - time.monotonic())
        try:
            ended = subprocess.run(  # noqa: S603 a list of the operator's settings, no word of the caller's
                command, input=png, capture_output=True, timeout=seconds_left, env=self._environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise UnreadableDocument(
                "OCR of the document took too long (DOCUMENT_TIME_LIMIT_IN_SECONDS).", field="file"
            ) from None
        if ended.returncode:
            raise _refuse_failure(ended.stderr, self._languages)
        return ended.stdout.decode("utf-8", "replace").replace("\f", "\n")


def _refuse_failure(complaint: bytes, languages: str) -> UnreadableDocument:
    if b"language" in complaint:
        reason = f"it lacks a language of OCR_LANGUAGES={languages}"
    else:
        reason = "the image is beyond it, or needs more memory than it may take (DOCUMENT_MEMORY_LIMIT_IN_MB)"
    return UnreadableDocument(f"tesseract could not read the document: {reason}.", field="file")


def _flatten(image: Image.Image) -> Image.Image:
    """Grey, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("L")
    with_alpha = image.convert("LA")
    white = Image.new("L", image.size, 255)
    white.paste(with_alpha.getchannel("L"), mask=with_alpha.getchannel("A"))
    return white


def _draw_page(document: pypdfium2.PdfDocument, position: int) -> Image.Image | None:
    try:
        page = document[position]
        if next(page.get_objects(max_depth=1), None) is None:
            return None
        width, height = page.get_size()
        scale = min(_DOTS_PER_INCH / _POINTS_PER_INCH, (_MAX_PAGE_PIXELS / max(1.0, width * height)) ** 0.5)
        image: Image.Image = page.render(scale=scale, grayscale=True).to_pil()
    except pypdfium2.PdfiumError:
        logger.info("A page of a PDF could not be drawn")
        return None
    return image
