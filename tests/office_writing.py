"""Small documents of every type but PDF, written by hand, for tests. Each holds SENTENCE."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

SENTENCE = "The boats came home early."

_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"


def write_archive(parts: Mapping[str, str | bytes], mimetype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        if mimetype:
            archive.writestr("mimetype", mimetype, zipfile.ZIP_STORED)
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _types(**parts: str) -> str:
    prefix = "application/vnd.openxmlformats-officedocument."
    rows = [f'<Override PartName="{name}" ContentType="{prefix}{kind}+xml"/>' for kind, name in parts.items()]
    return (
        f'{_XML}<Types xmlns="{_PACKAGE}/content-types"><Default Extension="xml" ContentType="application/xml"/>'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f"{''.join(rows)}</Types>"
    )


def _relations(*relations: tuple[str, str]) -> str:
    rows = [
        f'<Relationship Id="rId{number}" Type="{_OFFICE}/{kind}" Target="{target}"/>'
        for number, (kind, target) in enumerate(relations, start=1)
    ]
    return f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{"".join(rows)}</Relationships>'


def write_docx(*, prolog: str = "", paragraph: str = SENTENCE, more: Mapping[str, str | bytes] | None = None) -> bytes:
    """A heading, a paragraph, and a table of one row with a short, a short and a long cell."""
    cells = "".join(f"<w:tc>{_paragraph(text)}</w:tc>" for text in ("Clara", "12 tons", "She was the last one in."))
    heading = '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Harbour report</w:t></w:r></w:p>'
    body = f"{heading}{_paragraph(paragraph)}<w:tbl><w:tr>{cells}</w:tr></w:tbl>"
    namespace = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    parts = {
        "[Content_Types].xml": _types(**{"wordprocessingml.document.main": "/word/document.xml"}),
        "_rels/.rels": _relations(("officeDocument", "word/document.xml")),
        "word/document.xml": f'{_XML}{prolog}<w:document xmlns:w="{namespace}"><w:body>{body}</w:body></w:document>',
    }
    return write_archive({**parts, **(more or {})})


def _paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def write_pptx() -> bytes:
    """Two slides of a title; SENTENCE is on the second."""
    namespaces = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        f'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" xmlns:r="{_OFFICE}"'
    )

    def slide(text: str) -> str:
        return (
            f'{_XML}<p:sld {namespaces}><p:cSld><p:spTree><p:sp><p:nvSpPr><p:cNvPr id="2" name="t"/><p:cNvSpPr/>'
            f"<p:nvPr/></p:nvSpPr><p:spPr/><p:txBody><a:bodyPr/><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p:txBody></p:sp></p:spTree>"
            "</p:cSld></p:sld>"
        )

    ids = '<p:sldId id="256" r:id="rId1"/><p:sldId id="257" r:id="rId2"/>'
    slides = f"<p:sldIdLst>{ids}</p:sldIdLst>"
    return write_archive(
        {
            "[Content_Types].xml": _types(**{"presentationml.presentation.main": "/ppt/presentation.xml"}),
            "_rels/.rels": _relations(("officeDocument", "ppt/presentation.xml")),
            "ppt/presentation.xml": f"{_XML}<p:presentation {namespaces}>{slides}</p:presentation>",
            "ppt/_rels/presentation.xml.rels": _relations(
                ("slide", "slides/slide1.xml"), ("slide", "slides/slide2.xml")
            ),
            "ppt/slides/slide1.xml": slide("The first title"),
            "ppt/slides/slide2.xml": slide(SENTENCE),
        }
    )


def write_xlsx() -> bytes:
    """One row: a name, a number, SENTENCE."""
    namespace = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    cells = f'<c t="inlineStr"><is><t>Clara</t></is></c><c><v>12</v></c><c t="inlineStr"><is><t>{SENTENCE}</t></is></c>'
    sheets = '<sheets><sheet name="Boats" sheetId="1" r:id="rId1"/></sheets>'
    return write_archive(
        {
            "[Content_Types].xml": _types(**{"spreadsheetml.sheet.main": "/xl/workbook.xml"}),
            "_rels/.rels": _relations(("officeDocument", "xl/workbook.xml")),
            "xl/workbook.xml": f'{_XML}<workbook {namespace} xmlns:r="{_OFFICE}">{sheets}</workbook>',
            "xl/_rels/workbook.xml.rels": _relations(("worksheet", "worksheets/sheet1.xml")),
            "xl/worksheets/sheet1.xml": (
                f'{_XML}<worksheet {namespace}><sheetData><row r="1">{cells}</row></sheetData></worksheet>'
            ),
        }
    )


def write_odt() -> bytes:
    """A heading and a paragraph."""
    oasis = "urn:oasis:names:tc:opendocument:xmlns"
    content = (
        f'{_XML}<office:document-content xmlns:office="{oasis}:office:1.0" xmlns:text="{oasis}:text:1.0"><office:body>'
        f"<office:text><text:h>Harbour report</text:h><text:p>{SENTENCE}</text:p></office:text></office:body>"
        "</office:document-content>"
    )
    return write_archive({"content.xml": content}, "application/vnd.oasis.opendocument.text")


def write_epub() -> bytes:
    """One chapter."""
    container = (
        f'{_XML}<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    book = (
        f'{_XML}<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/><manifest>'
        '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="a"/></spine></package>'
    )
    chapter = f'<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>One</h1><p>{SENTENCE}</p></body></html>'
    parts = {"META-INF/container.xml": container, "book.opf": book, "a.xhtml": chapter}
    return write_archive(parts, "application/epub+zip")


HTML = b"""<!DOCTYPE html><html><head><title>Boats</title><script>var x = 1;</script></head><body>
<h1>Harbour report</h1><p>The boats came <b>home</b> early.</p><ul><li>first item</li></ul></body></html>"""
MARKDOWN = b"# Harbour report\n\nThe boats came **home** early.\n\n- first item\n"
RTF = rb"{\rtf1\ansi{\b Harbour report}\par The boats came home early.\par Gr\'fc\'dfe.\par}"
MAIL = (
    b"From: Clara <c@example.org>\r\nTo: b@example.org\r\nSubject: Harbour report\r\n\r\nThe boats came home early.\r\n"
)
CSV = b'boat,remark,tons\nClara,The boats came home early.,12\nBerta,"Lost, oars and all.",9\n'
JSON = b'{"boats": [{"name": "Clara", "remark": "The boats came home early.", "tons": 12}]}'

DOCUMENTS = {
    "DOCX": write_docx(),
    "PPTX": write_pptx(),
    "XLSX": write_xlsx(),
    "ODT": write_odt(),
    "EPUB": write_epub(),
    "HTML": HTML,
    "Markdown": MARKDOWN,
    "RTF": RTF,
    "e-mail (.eml)": MAIL,
    "CSV": CSV,
    "JSON": JSON,
}
"""By the names of SUPPORTED_TYPES."""
