"""OCR: with the real tesseract, with a stand-in for it, and without any."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llama_embeddings.documents.extracted import ExtractedDocument, ExtractionLimits, OcrOptions
from llama_embeddings.documents.extraction import extract_text
from llama_embeddings.documents.images import MAX_IMAGE_PIXELS
from llama_embeddings.documents.reader import DocumentReader
from llama_embeddings.documents.segmentation import segmentation_key
from llama_embeddings.errors import RequestTooLarge, UnreadableDocument, UnsupportedDocumentType
from llama_embeddings.settings import load_settings
from llama_embeddings_server import make_document_reader
from tests.pdf_writing import write_text_pdf
from tests.scans import draw_page, save_images

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
FIRST, SECOND = "The boats came home early.", "Nobody was surprised by the storm."
MISSING = OcrOptions(None)


def write_stand_in(directory: Path, commands: str) -> OcrOptions:
    """A program in tesseract's place."""
    path = directory / "tesseract"
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return OcrOptions(str(path), time_limit_seconds=60)


def real_ocr() -> OcrOptions:
    """`make test` installs it."""
    command = shutil.which("tesseract")
    assert command is not None, "tesseract is needed: make tesseract"
    return OcrOptions(command, time_limit_seconds=120)


async def test_a_real_scan_is_read_with_its_pages() -> None:
    """By the reading process, tesseract and all."""
    reader = DocumentReader(minimum_length=5, ocr=real_ocr())
    document = await reader.read(save_images(draw_page(FIRST), "PDF", draw_page(SECOND)))
    reader.close()
    assert [(sentence.text, sentence.page) for sentence in document.sentences] == [(FIRST, 1), (SECOND, 2)]


def test_a_real_image_is_read() -> None:
    """Two pages of a fax."""
    document = extract_text(save_images(draw_page(FIRST), "TIFF", draw_page(SECOND)), ocr=real_ocr())
    assert FIRST in document.text
    assert document.text[document.page_starts[1] :] == SECOND


def test_a_language_that_tesseract_lacks_is_named() -> None:
    """The operator can do something about it."""
    options = OcrOptions(real_ocr().command, "klingon")
    with pytest.raises(UnreadableDocument, match="OCR_LANGUAGES=klingon"):
        extract_text(save_images(draw_page(FIRST), "PNG"), ocr=options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_images_of_every_kind_are_handed_to_tesseract(kind: str, tmp_path: Path) -> None:
    """As PNG, with the language."""
    ocr = write_stand_in(tmp_path, 'head -c 4 | tail -c 3; echo " in $4."')
    assert extract_text(save_images(draw_page(FIRST), kind), ocr=ocr).text == "PNG in eng."


def test_only_pages_without_text_are_recognised(tmp_path: Path) -> None:
    """A text layer is better than any guess; a page on which nothing is drawn is not looked at."""
    ocr = write_stand_in(tmp_path, "exit 3")
    pdf = write_text_pdf([["One is here."], [], ["Three is here."]])
    assert extract_text(pdf, ocr=ocr) == extract_text(pdf)


def test_a_scan_without_letters_is_refused(tmp_path: Path) -> None:
    """Photographs, say."""
    ocr = write_stand_in(tmp_path, "cat > /dev/null")
    for kind in ("PDF", "PNG"):
        with pytest.raises(UnreadableDocument, match="OCR found no"):
            extract_text(save_images(draw_page(FIRST), kind), ocr=ocr)


def test_what_tesseract_fails_on_is_refused(tmp_path: Path) -> None:
    """Its own words stay out of the reply: they may quote the document."""
    ocr = write_stand_in(tmp_path, "echo secret >&2; exit 1")
    with pytest.raises(UnreadableDocument, match="tesseract could not read") as refusal:
        extract_text(save_images(draw_page(FIRST), "PNG"), ocr=ocr)
    assert "secret" not in refusal.value.message


@pytest.mark.parametrize("kind", ["PDF", "PNG"])
def test_without_tesseract_the_refusal_says_that_it_is_missing(kind: str) -> None:
    """It names the setting, too."""
    with pytest.raises(UnreadableDocument, match=r"USE_OCR.*not installed"):
        extract_text(save_images(draw_page(FIRST), kind), ocr=MISSING)


def test_without_ocr_images_and_scans_are_refused_with_what_to_do() -> None:
    """Images are of no supported type; PDFs are, without any text."""
    with pytest.raises(UnsupportedDocumentType, match="USE_OCR=True"):
        extract_text(save_images(draw_page(FIRST), "PNG"))
    with pytest.raises(UnreadableDocument, match="USE_OCR=True"):
        extract_text(save_images(draw_page(FIRST), "PDF"))


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_images_of_too_many_pixels_are_refused_before_they_are_unpacked(side: int, tmp_path: Path) -> None:
    """A few kilobytes can stand for gigabytes."""
    assert side * side > MAX_IMAGE_PIXELS
    data = save_images(Image.new("1", (side, side)), "PNG")
    with pytest.raises(RequestTooLarge, match="pixels"):
        extract_text(data, ocr=write_stand_in(tmp_path, "echo read"))


def test_damaged_images_and_too_many_pages_are_refused(tmp_path: Path) -> None:
    """By the limits of all documents."""
    ocr = write_stand_in(tmp_path, "cat > /dev/null; echo Some text.")
    with pytest.raises(UnreadableDocument, match="damaged"):
        extract_text(save_images(draw_page(FIRST), "PNG")[:1_000], ocr=ocr)
    fax = save_images(draw_page(FIRST), "TIFF", draw_page(SECOND))
    with pytest.raises(RequestTooLarge, match="MAX_DOCUMENT_PAGES"):
        extract_text(fax, ocr=ocr, limits=ExtractionLimits(max_pages=1))


def test_transparent_images_are_read_on_white(tmp_path: Path) -> None:
    """Black letters on nothing would be black on black."""
    ocr = write_stand_in(tmp_path, f"cat > {tmp_path}/seen.png; echo Some text.")
    document = extract_text(save_images(Image.new("RGBA", (10, 10), (0, 0, 0, 0)), "PNG"), ocr=ocr)
    assert document == ExtractedDocument("image/png", "Some text.", (0,))
    assert Image.open(tmp_path / "seen.png").getextrema() == (255, 255)


async def test_tesseract_ends_with_the_reading_process(tmp_path: Path) -> None:
    """Here the caller goes away; the time limit ends it in the same way."""
    os.mkfifo(tmp_path / "began")
    ocr = write_stand_in(tmp_path, f"echo $$ > {tmp_path}/began; exec sleep 600")
    reader = DocumentReader(minimum_length=1, ocr=ocr)
    reading = asyncio.create_task(reader.read(save_images(draw_page(FIRST), "PNG")))
    pid = int(await asyncio.to_thread((tmp_path / "began").read_text))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(10):
        while _runs(pid):
            await asyncio.sleep(0.01)
    reader.close()


PARENT = """
import asyncio, sys
from pathlib import Path
from llama_embeddings.documents.extracted import OcrOptions
from llama_embeddings.documents.reader import DocumentReader
directory = Path(sys.argv[1])
reader = DocumentReader(minimum_length=1, ocr=OcrOptions(str(directory / "tesseract"), time_limit_seconds=60))
asyncio.run(reader.read((directory / "page.png").read_bytes()))
"""


async def test_reading_process_and_tesseract_end_with_a_killed_server(tmp_path: Path) -> None:
    """It cannot ask them to; they would go on for as long as a document may take."""
    os.mkfifo(tmp_path / "began")
    write_stand_in(tmp_path, f"echo $PPID $$ > {tmp_path}/began; exec sleep 600")
    (tmp_path / "page.png").write_bytes(save_images(draw_page(FIRST), "PNG"))
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=PROJECT_DIRECTORY) as parent:
        pids = [int(pid) for pid in (await asyncio.to_thread((tmp_path / "began").read_text)).split()]
        assert all(map(_runs, pids))
        parent.kill()
    async with asyncio.timeout(10):
        while any(map(_runs, pids)):
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ocr_and_its_languages_are_part_of_a_documents_key() -> None:
    """Turned on, it gives what was refused or left out before."""
    keys = {segmentation_key(15), segmentation_key(15, OcrOptions("t")), segmentation_key(15, OcrOptions("t", "deu"))}
    assert len(keys) == 3
    assert segmentation_key(15, MISSING) == segmentation_key(15)


def test_server_without_tesseract_warns_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With it, nothing is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    make_document_reader(load_settings(use_ocr=True)).close()
    assert "tesseract is not installed" in caplog.text
    caplog.clear()
    write_stand_in(tmp_path, "echo")
    make_document_reader(load_settings(use_ocr=True)).close()
    assert caplog.text == ""


def test_the_servers_process_imports_no_parser() -> None:
    """Parsers run in the reading process alone."""
    program = (
        "import sys, llama_embeddings_server; print(*{'kreuzberg', 'pypdf', 'pypdfium2', 'magic'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIRECTORY, capture_output=True, check=True)
    assert found.stdout.strip() == b""
