"""Bytes to text: detection, encodings, PDF layout, limits and refusals."""

from __future__ import annotations

import io
import logging
import random
import zlib

import pypdf
import pytest

from llama_embeddings.documents.extracted import SUPPORTED_TYPES, ExtractedDocument, ExtractionLimits
from llama_embeddings.documents.extraction import detect_mimetype, extract_text
from llama_embeddings.documents.plain_text import decode_text
from llama_embeddings.errors import RequestTooLarge, UnreadableDocument, UnsupportedDocumentType
from tests.pdf_writing import write_text_pdf

TEXTS_BY_ENCODING = {
    "cp1252": "Die Brücke führt über die Spree, und drüben liegt das größere Haus mit den grünen Läden.",
    "iso8859_1": "La forêt était déserte, et même le chemin où ils marchaient semblait avoir disparu.",
    "cp1250": "Dziewięć żółtych łodzi płynęło po spokojnej rzece, aż zaszło słońce.",
    "cp1251": "Ветер поднялся к вечеру, и лодки вернулись в гавань раньше обычного.",
    "koi8_r": "Ветер поднялся к вечеру, и лодки вернулись в гавань раньше обычного.",
    "cp1253": "Ο άνεμος δυνάμωσε το βράδυ και οι βάρκες γύρισαν νωρίς στο λιμάνι.",
    "cp932": "夕方になると風が強くなり、舟はいつもより早く港に戻ってきた。",
    "euc_jp": "夕方になると風が強くなり、舟はいつもより早く港に戻ってきた。",
    "iso2022_jp": "夕方になると風が強くなり、舟はいつもより早く港に戻ってきた。",
    "gb18030": "傍晚起了风，渔船比平时更早回到港口。大家都在岸边等着。",
    "big5": "傍晚起了風，漁船比平時更早回到港口。大家都在岸邊等著。",
    "euc_kr": "저녁이 되자 바람이 강해져서 배들이 평소보다 일찍 항구로 돌아왔다.",
    "utf-16": "Ο άνεμος, the wind, ветер, 風.",
    "utf-32": "Ο άνεμος, the wind, ветер, 風.",
    "utf-8-sig": "Ο άνεμος, the wind, ветер, 風.",
    "utf-8": "Ο άνεμος, the wind, ветер, 風 🌬.",
}


@pytest.mark.parametrize("encoding", TEXTS_BY_ENCODING)
def test_text_in_any_encoding_comes_back_letter_by_letter(encoding: str) -> None:
    """The text is what it was before it was encoded, and carries no byte order mark."""
    text = TEXTS_BY_ENCODING[encoding]
    assert extract_text(text.encode(encoding)) == ExtractedDocument("text/plain", text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_found_without_a_byte_order_mark(encoding: str) -> None:
    """The places of the NUL bytes tell which one it is."""
    text = "The wind rose in the evening; the größte boat came home first."
    assert extract_text(text.encode(encoding)).text == text


@pytest.mark.parametrize(
    "text", ["It’s late.", "“Who is there?” – nobody…", "That costs 100 € at least.", "El niño soñaba mañana y noche."]
)
def test_short_windows_texts_with_few_special_characters_are_read_as_western(text: str) -> None:
    """Statistics alone take such texts for Chinese or Polish."""
    assert decode_text(text.encode("cp1252")) == text


def test_a_cut_off_utf8_file_stays_utf8() -> None:
    """One broken character at the end does not turn all the others into another encoding's."""
    text = "Ветер поднялся к вечеру. " * 20
    assert decode_text(text.encode()[:-3]).startswith("Ветер поднялся")


def test_nul_padding_soft_hyphens_and_line_ends_are_tidied_but_letters_stay() -> None:
    """NULs and soft hyphens go, every kind of line end becomes a newline."""
    data = "Größe\r\nund\rFar\u00ad\nbe im Haus\u00adflur\x00\x00\x00".encode()
    assert extract_text(data).text == "Größe\nund\nFarbe im Hausflur"


@pytest.mark.parametrize(
    "text", ["P1 is great. It rained all day.", "import os, he said, is a line of Python.\nSo it is."]
)
def test_prose_that_begins_like_another_format_is_text(text: str) -> None:
    """libmagic takes the first for a bitmap."""
    assert detect_mimetype(text.encode()) == "text/plain"


@pytest.mark.parametrize(
    ("data", "detected"),
    [
        (b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00;", "image/gif"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00", "image/png"),
        (b'<?xml version="1.0"?><note><to>Hello there.</to></note>', "text/xml"),
        (random.Random(1).randbytes(5000), "application/octet-stream"),
    ],
)
def test_other_types_are_refused_by_what_the_bytes_are(data: bytes, detected: str) -> None:
    """The message names the type that was detected and all those that are supported."""
    with pytest.raises(UnsupportedDocumentType) as raised:
        extract_text(data)
    assert detected in raised.value.message
    assert all(mimetype in raised.value.message for mimetype in SUPPORTED_TYPES.values())


def test_binary_data_behind_a_page_of_text_is_refused() -> None:
    """libmagic looks at the beginning only; the extractor looks everywhere."""
    data = b"A perfectly ordinary line of text.\n" * 10_000 + zlib.compress(random.Random(2).randbytes(400_000))
    with pytest.raises(UnsupportedDocumentType):
        extract_text(data)


@pytest.mark.parametrize("data", [b"", b" \n\t\n "])
def test_documents_without_text_are_refused(data: bytes) -> None:
    """Nothing in, nothing to embed: the caller is told."""
    with pytest.raises(UnreadableDocument):
        extract_text(data)


def test_too_much_text_is_refused() -> None:
    """The limit holds for plain text and for PDFs, and the message names it."""
    limits = ExtractionLimits(max_characters=50)
    for data in (b"word " * 11, write_text_pdf([["word " * 6], ["word " * 6]])):
        with pytest.raises(RequestTooLarge, match="50"):
            extract_text(data, limits=limits)


def test_pdf_pages_begin_where_page_starts_say() -> None:
    """A page without text begins where the next one does, or before the space in front of it."""
    document = extract_text(write_text_pdf([["First page here."], [], ["Größe, déjà vu, 5 €."]]))
    assert document.mimetype == "application/pdf"
    assert document.text == "First page here.\n\nGröße, déjà vu, 5 €."
    first, empty, last = document.page_starts
    assert first == 0
    assert first < empty <= last
    assert document.text[last:] == "Größe, déjà vu, 5 €."


def test_pdf_lines_become_paragraphs_and_hyphenation_is_undone() -> None:
    """Wrapped lines are joined, a hyphen between two small letters goes, blank lines and headings stay apart."""
    lines = [
        "The Harbour",
        "The wind rose in the evening, and this is one more exam-",
        "ple of the well-",
        "known weather of a harbour that everybody calls Anglo-",
        "Saxon for a reason.",
        "",
        "Nobody was surprised by the storm.",
    ]
    assert extract_text(write_text_pdf([lines])).text.split("\n\n") == [
        "The Harbour",
        "The wind rose in the evening, and this is one more example of the well-known weather of a harbour that "
        "everybody calls Anglo- Saxon for a reason.",
        "Nobody was surprised by the storm.",
    ]


def test_a_hyphen_stays_if_the_document_writes_the_word_with_it_elsewhere() -> None:
    """The document's own spelling decides."""
    lines = [
        "A large-scale test is a test, and after a long while we made another large-",
        "scale test of the same kind.",
    ]
    assert "another large-scale test" in extract_text(write_text_pdf([lines])).text


def test_a_sentence_that_crosses_pages_stays_one_paragraph() -> None:
    """Neither the page break nor a hyphen at the page's end tears it."""
    pages = [["The boats that had left the harbour early in the morn-"], ["ing came home before the storm."]]
    document = extract_text(write_text_pdf(pages))
    assert document.text == "The boats that had left the harbour early in the morning came home before the storm."
    assert document.text[document.page_starts[1] :].startswith("ing came home")


def test_running_headers_and_footers_are_dropped_whatever_their_page_number() -> None:
    """They would stand in the middle of sentences that cross pages."""
    bodies = ["boats leave early", "wind rises slowly", "rain falls softly", "night comes again"]
    pages = [
        [
            "A History of Weather",
            f"Here the {body} and nobody is surprised by it at all.",
            f"Page {number} of 4",
            "Draft",
        ]
        for number, body in enumerate(bodies, start=1)
    ]
    text = extract_text(write_text_pdf(pages)).text
    assert "History" not in text
    assert "Page" not in text
    assert "Draft" not in text
    assert all(body in text for body in bodies)


def test_lines_that_are_all_a_document_has_are_not_taken_for_headers() -> None:
    """A form that says the same on every page keeps its text."""
    document = extract_text(write_text_pdf([["This page is left blank."]] * 4))
    assert document.text.count("This page is left blank.") == 4


def test_scans_are_refused_with_a_word_about_ocr() -> None:
    """A PDF of images has pages but no text."""
    with pytest.raises(UnreadableDocument, match="OCR"):
        extract_text(write_text_pdf([[], []]))


def _encrypt(data: bytes, user_password: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt(user_password=user_password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_encrypted_pdfs_open_with_the_empty_password_only() -> None:
    """Protection against printing is no hindrance, a password is."""
    data = write_text_pdf([["Nobody may print this."]])
    assert extract_text(_encrypt(data, "")).text == "Nobody may print this."
    with pytest.raises(UnreadableDocument, match="is encrypted"):
        extract_text(_encrypt(data, "secret"))


@pytest.mark.parametrize("length", [9, 60, 300])
def test_damaged_pdfs_are_refused_and_nothing_of_them_is_logged(length: int, caplog: pytest.LogCaptureFixture) -> None:
    """The error is not chained to pypdf's, whose messages quote the file, and pypdf itself logs nothing."""
    data = write_text_pdf([["Confidential wording inside."]])[:length] + b" Confidential wording inside."
    with caplog.at_level(logging.DEBUG), pytest.raises(UnreadableDocument) as raised:
        extract_text(data)
    assert raised.value.__cause__ is None
    assert "Confidential" not in caplog.text + raised.value.message
    assert not [record for record in caplog.records if record.name.startswith("pypdf")]


def test_too_many_pages_are_refused_before_any_is_read() -> None:
    """The message names how many there are and how many may be."""
    with pytest.raises(RequestTooLarge, match=r"3 pages, at most 2"):
        extract_text(write_text_pdf([["One."], ["Two."], ["Three."]]), limits=ExtractionLimits(max_pages=2))
