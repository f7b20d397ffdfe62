"""Office files, e-books, mail, markup and tables: every type gives its sentence, whole and apart."""

from __future__ import annotations

import pytest

from llama_embeddings.documents.extracted import SUPPORTED_TYPES
from llama_embeddings.documents.extraction import EXTRACTORS, detect_mimetype, extract_text
from llama_embeddings.documents.sentences import split_into_sentences
from tests.office_writing import CSV, DOCUMENTS, HTML, JSON, RTF, SENTENCE, write_docx, write_pptx


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_type_is_told_from_its_bytes_and_gives_its_sentence_apart(name: str) -> None:
    """The sentence is glued to no heading, item or cell, and its offsets cover it."""
    document = extract_text(DOCUMENTS[name])
    assert SUPPORTED_TYPES[document.mimetype] == name
    sentences = split_into_sentences(document, minimum_length=1)
    [sentence] = [sentence for sentence in sentences if sentence.text == SENTENCE]
    assert document.text[sentence.start : sentence.end] == SENTENCE


def test_every_supported_type_has_an_extractor_and_a_sample() -> None:
    """README's table is made of the same names."""
    assert set(EXTRACTORS) == set(SUPPORTED_TYPES)
    assert {*DOCUMENTS, "PDF", "plain text in any encoding"} == set(SUPPORTED_TYPES.values())


def test_short_cells_of_a_row_are_one_paragraph_and_long_ones_stand_alone() -> None:
    """A number means nothing without its neighbours, a sentence does."""
    assert "Clara | 12 tons\n\nShe was the last one in." in extract_text(write_docx()).text
    assert extract_text(CSV).text.endswith("Berta\n\nLost, oars and all.\n\n9")


def test_markup_and_scripts_are_no_text() -> None:
    """Neither are JSON's keys and numbers."""
    assert extract_text(HTML).text == "Harbour report\n\nThe boats came home early.\n\nfirst item"
    assert extract_text(JSON).text == "Clara\n\nThe boats came home early."
    assert "Grüße." in extract_text(RTF).text


def test_sentences_of_slides_know_their_slide() -> None:
    """Slides are pages."""
    sentences = split_into_sentences(extract_text(write_pptx()), minimum_length=1)
    assert [(sentence.page, sentence.text) for sentence in sentences] == [(1, "The first title"), (2, SENTENCE)]


@pytest.mark.parametrize(
    ("filename", "detected"),
    [("a.md", "text/markdown"), ("a.TXT", "text/plain"), (None, "text/plain"), ("a.pdf", "text/plain")],
)
def test_a_name_decides_between_kinds_of_text_only(filename: str | None, detected: str) -> None:
    """Bytes that are text are never read as a PDF."""
    assert detect_mimetype(b"# A heading\n\nand words under it.", filename) == detected
    assert detect_mimetype(b"%PDF-1.7\n", "a.txt") == "application/pdf"
