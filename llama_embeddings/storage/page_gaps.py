"""Overwrites what SQLite leaves of rows in the free middle of a page when it shares rows out among neighbours.

`secure_delete` overwrites a row where it lies, and pages that become free, but not the copy that stays behind when a
row is moved to a neighbouring page: its bytes stand in the gap between the page's list of rows and the rows themselves.
A row that is deleted may have left such copies in pages beside its place. They are found by reading these pages from
the file, as https://www.sqlite.org/fileformat2.html has them, and overwritten by SQLite itself: a row of the page grows
until it fills the gap, and shrinks again in the same transaction.

Writes nothing but by SQL, so a page that was read too early costs nothing: a row may grow and shrink anywhere.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Connection, text

# The columns that grow for a moment: text, and in no index.
GROWING_COLUMNS = {
    "embeddings": "text",
    "token_level_embedding_bundles": "input_text",
    "token_level_embeddings": "token",
    "documents": "mimetype",
    "document_embeddings": "mimetype",
}
# Leaf pages on each side. Rows are shared out among three to five at a time.
N_NEIGHBOURS = 8

_INTERIOR_OF_TABLE, _LEAF_OF_TABLE = 5, 13
_LONGEST_VARINT = 9
# Left free when a row grows, as the numbers that say how long it is grow with it.
_SPARE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row was."""

    table: str
    row_id: int


@dataclass(frozen=True, slots=True)
class _Gap:
    """A row of a page whose gap is not empty, and how many bytes of it fill the gap."""

    row_id: int
    n_bytes: int


def overwrite_remains(connection: Connection, path: Path, places: Sequence[Place]) -> int:
    """Overwrite the gaps of the pages beside rows that are gone; answers how many there were.

    To be called inside a transaction, after the log was copied into the file.
    """
    n_gaps = 0
    with path.open("rb") as file:
        for table in GROWING_COLUMNS:
            row_ids = sorted(place.row_id for place in places if place.table == table)
            root = connection.execute(text("SELECT rootpage FROM sqlite_master WHERE name = :name"), {"name": table})
            gaps = {gap.row_id: gap for gap in _find_gaps(file, root.scalar_one(), row_ids)}
            for gap in gaps.values():
                _fill(connection, table, gap)
            n_gaps += len(gaps)
    return n_gaps


def _fill(connection: Connection, table: str, gap: _Gap) -> None:
    column = GROWING_COLUMNS[table]
    key = {"row_id": gap.row_id}
    value = connection.execute(text(f"SELECT {column} FROM {table} WHERE id = :row_id"), key).scalar_one_or_none()  # noqa: S608 - the program's own words
    if value is not None:
        update = text(f"UPDATE {table} SET {column} = :value WHERE id = :row_id")  # noqa: S608 - the same
        connection.execute(update, key | {"value": value + " " * gap.n_bytes})
        connection.execute(update, key | {"value": value})


def _find_gaps(file: BinaryIO, root: int, row_ids: Sequence[int]) -> Iterator[_Gap]:
    tree = _Tree(file)
    seen_up_to = 0
    for row_id in row_ids:
        if row_id <= seen_up_to:
            continue
        try:
            leaves = tree.read_leaves_beside(root, row_id)
            gaps = [gap for leaf in leaves if (gap := tree.find_gap(leaf)) is not None]
            seen_up_to = max((tree.read_last_row_id(leaf) for leaf in leaves[: N_NEIGHBOURS + 1]), default=0)
        except (struct.error, IndexError):
            return  # written to meanwhile
        yield from gaps


class _Tree:
    """The pages of a table in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.seek(0)
        header = file.read(100)
        [size] = struct.unpack_from(">H", header, 16)
        self._page_size = 65_536 if size == 1 else size
        self._usable = self._page_size - header[20]

    def read_leaves_beside(self, root: int, row_id: int) -> list[bytes]:
        """The leaf where a row would be, and those on both sides of it."""
        pages = [self._read(root)]
        while pages[0][0] == _INTERIOR_OF_TABLE:
            children = [child for page in pages for child in self._list_children(page)]
            place = bisect_left([last_row_id for last_row_id, _ in children], row_id)
            window = children[max(0, place - N_NEIGHBOURS) : place + N_NEIGHBOURS + 1]
            pages = [self._read(number) for _, number in window]
        return pages

    def _read(self, number: int) -> bytes:
        self._file.seek((number - 1) * self._page_size)
        return self._file.read(self._page_size)

    def _list_children(self, page: bytes) -> list[tuple[int, int]]:
        """The last row id that may stand in each child, and its page number."""
        children = []
        for start in _list_cells(page, 12):
            [number] = struct.unpack_from(">I", page, start)
            children.append((_read_varint(page, start + 4)[0], number))
        [last] = struct.unpack_from(">I", page, 8)
        # Not said here: a little more than the one before it.
        return [*children, (children[-1][0] + 1 if children else 0, last)]

    def read_last_row_id(self, leaf: bytes) -> int:
        """0 for a page without rows."""
        cells = _list_cells(leaf, 8)
        return _read_cell(leaf, cells[-1])[1] if cells else 0

    def find_gap(self, leaf: bytes) -> _Gap | None:
        """A row that can fill the page's gap; None if the gap is clean, or no row can."""
        first_free, n_cells, start, n_fragments = struct.unpack_from(">HHHB", leaf, 1)
        gap = leaf[8 + 2 * n_cells : start or 65_536]
        if leaf[0] != _LEAF_OF_TABLE or not any(gap):
            return None
        n_free = len(gap) + n_fragments + sum(_list_free_blocks(leaf, first_free))
        cells = [_read_cell(leaf, cell) for cell in _list_cells(leaf, 8)]
        # A longer row would go on in pages of its own.
        longest = self._usable - 35
        growing = [(min(n_free - _SPARE_BYTES, longest - length), row_id) for length, row_id in cells]
        n_bytes, row_id = max(growing, default=(0, 0))
        return _Gap(row_id, n_bytes) if n_bytes > 0 else None


def _list_cells(page: bytes, header_length: int) -> tuple[int, ...]:
    [n_cells] = struct.unpack_from(">H", page, 3)
    return struct.unpack_from(f">{n_cells}H", page, header_length)


def _list_free_blocks(page: bytes, first: int) -> Iterator[int]:
    """The lengths of the freed places between a page's rows."""
    while first:
        following, length = struct.unpack_from(">HH", page, first)
        yield length
        if following <= first:
            return
        first = following


def _read_cell(page: bytes, start: int) -> tuple[int, int]:
    """Length of a row and its id."""
    length, start = _read_varint(page, start)
    row_id, _ = _read_varint(page, start)
    return length, row_id


def _read_varint(page: bytes, start: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place in range(start, start + _LONGEST_VARINT - 1):
        value = value << 7 | page[place] & 0x7F
        if page[place] < 0x80:
            return value, place + 1
    return value << 8 | page[start + _LONGEST_VARINT - 1], start + _LONGEST_VARINT
