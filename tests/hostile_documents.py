"""Files made to harm a service that reads documents, generated for tests."""

from __future__ import annotations

import random
import struct

from tests.office_writing import write_archive, write_docx
from tests.pdf_writing import write_text_pdf

UNPACKED_LIMIT = 20_000_000


def write_bomb() -> bytes:
    """A DOCX of some kilobytes that unpacks to more than UNPACKED_LIMIT."""
    return write_docx(more={"word/media/zeros": bytes(UNPACKED_LIMIT + 1)})


def write_lying_bomb() -> bytes:
    """The same, with a list of contents that says it were small."""
    size = UNPACKED_LIMIT + 1
    return write_bomb().replace(struct.pack("<I", size), struct.pack("<I", 100))


def write_overlapping_archive() -> bytes:
    """Two entries of the list of contents that share one part of the file."""
    data = bytearray(write_docx())
    central = data.rfind(b"PK\x01\x02")
    data[central + 42 : central + 46] = bytes(4)
    return bytes(data)


def write_billion_laughs() -> bytes:
    """XML whose nested entities would grow to gigabytes."""
    entities = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12))
    return write_docx(prolog=f'<!DOCTYPE x [<!ENTITY a0 "laughter ">{entities}]>', paragraph="&a11;")


def write_external_entity() -> bytes:
    """XML that asks for a file of the machine."""
    return write_docx(prolog='<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>', paragraph="&e; is a file.")


HOSTILE_DOCUMENTS = {
    "empty": b"",
    "binary": random.Random(1).randbytes(50_000),
    "binary after text": b"Some words of text. " * 20 + random.Random(2).randbytes(50_000),
    "zip bomb": write_bomb(),
    "zip bomb that lies": write_lying_bomb(),
    "nested zips": write_docx(more={"word/embeddings/a.zip": write_archive({"b.zip": write_bomb()})}),
    "overlapping parts": write_overlapping_archive(),
    "billion laughs": write_billion_laughs(),
    "external entity": write_external_entity(),
    "names with ../": write_docx(more={"../../../../tmp/evil.txt": "evil", "/tmp/evil.txt": "evil"}),
    "truncated DOCX": write_docx()[:500],
    "damaged DOCX": write_docx().replace(b"PK\x01\x02", b"PK\x09\x09"),
    "truncated PDF": write_text_pdf([["Some words of text."]])[:300],
    "PDF in name only": b"%PDF-1.7\nnothing follows",
    "deeply nested JSON": b"[" * 200_000 + b'"The words are deep inside."' + b"]" * 200_000,
    "deeply nested HTML": b"<html><body>" + b"<div>" * 100_000 + b"Words deep inside are here.",
    "unclosed RTF": b"{\\rtf1" + b"{" * 100_000 + b" Words deep inside are here.",
    "one long line": b"word " * 400_000,
    "one long word": b"x" * 3_000_000,
    "many short lines": b"a\n" * 300_000,
    "wide CSV": b"," * 1_000_000 + b"\nThe words are here.",
}
