"""Small PDFs with text, written by hand, for tests; Latin letters only (WinAnsi encoding, Helvetica)."""

from __future__ import annotations

from collections.abc import Sequence

_TOP, _LEFT, _LEADING = 800, 50, 14


def write_text_pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """Write a PDF in which each item is a page and each string a line; an empty string leaves a line blank."""
    objects: list[bytes] = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    page_numbers = []
    for lines in pages:
        content = _write_page(lines)
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        page_numbers.append(len(objects))
    kids = b" ".join(b"%d 0 R" % number for number in page_numbers)
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(page_numbers))
    return _write_file(objects)


def _write_page(lines: Sequence[str]) -> bytes:
    shown = [b"(%s) Tj 0 -%d Td" % (_escape(line), _LEADING) for line in lines]
    return b"BT /F1 10 Tf %d %d Td\n%s\nET" % (_LEFT, _TOP, b"\n".join(shown)) if shown else b""


def _escape(line: str) -> bytes:
    encoded = (line or " ").encode("cp1252")
    return encoded.replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")


def _write_file(objects: Sequence[bytes]) -> bytes:
    content = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table_offset = len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    content += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    content += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table_offset)
    return bytes(content)
