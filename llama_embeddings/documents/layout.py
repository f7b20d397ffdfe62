"""Lines and paragraphs: where a line end was put by the author, and where by wrapping. Knows no file format."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LIST_ITEM = re.compile(r"(?:[-*+•‣⁃·▪◦]\s|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{2,5})[.)]\s|•|⁃)\s*\S")
_HEADING_MARK = re.compile(r"#{1,6}\s")
_MAXIMUM_WRAPPED_WIDTH = 200
_MINIMUM_WRAPPED_WIDTH = 40


def measure_width(lines: Sequence[str]) -> int:
    """The width, in columns, that lines seem to be wrapped at; longer than 200 is not wrapping."""
    widths = map(_count_columns, lines)
    return max((width for width in widths if width <= _MAXIMUM_WRAPPED_WIDTH), default=0)


def _count_columns(line: str) -> int:
    """Chinese and Japanese characters are two columns wide."""
    return len(line) if line.isascii() else len(line) + sum(map(is_written_without_spaces, line))


def ends_paragraph(line: str, next_line: str, width: int) -> bool:
    """Whether the line end between two lines was put there by the author and not by wrapping at `width`.

    It was where a list item or heading begins or ends, and where the next line's first word had easily fitted in.
    A next line that begins with a small letter always continues.
    """
    if _LIST_ITEM.match(next_line) or _HEADING_MARK.match(next_line) or _HEADING_MARK.match(line):
        return True
    if next_line[:1].islower():
        return False
    n_columns = _count_columns(line)
    if n_columns > _MAXIMUM_WRAPPED_WIDTH:
        return True
    needed = n_columns + 1 + min(12, len(next_line.split(maxsplit=1)[0]))
    return needed <= 0.75 * max(width, _MINIMUM_WRAPPED_WIDTH)


def is_written_without_spaces(character: str) -> bool:
    """Whether a character belongs to Chinese or Japanese, where a wrapped line continues without a space."""
    return (
        "\u3000" <= character <= "\u30ff"
        or "\u3400" <= character <= "\u9fff"
        or "\uf900" <= character <= "\ufaff"
        or "\uff00" <= character <= "\uffef"
        or "\U00020000" <= character <= "\U0003ffff"
    )
