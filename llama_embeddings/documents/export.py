"""Rows of text and vector as JSON in pandas' six orientations, in parts or whole, and the names of downloads.

The JSON has the structure that `pandas.DataFrame.to_json` writes and `pandas.read_json` reads, but pandas is not
needed: vectors go from float32 arrays straight to text, in the shortest form that gives the same float32 back. Knows
neither where rows come from nor how files are sent; binary formats and archives are in `archives.py`.
"""

from __future__ import annotations

import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson

from llama_embeddings.errors import InvalidInput

_MAXIMUM_FILE_NAME_BYTES = 200  # file systems allow 255; room is left for an ending
_EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


# --- JSON ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring rows, the first of which is row `first`: values by column, vectors as float32 (n, n_dims)."""

    first: int
    columns: Mapping[str, Sequence[Any] | np.ndarray]

    def rows(self) -> list[tuple[Any, ...]]:
        return list(zip(*self.columns.values(), strict=True))


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file that goes once through all rows: `opening`, the batches with `separator` between, `closing`.

    `render` takes batches of the columns named.
    """

    opening: bytes
    render: Callable[[Batch], bytes]
    closing: bytes
    columns: tuple[str, ...]
    separator: bytes = b","


# Names of the columns with their types in JSON Table Schema, in their order.
Columns = Mapping[str, str]
EMBEDDING_COLUMNS: Columns = {"text": "string", "embedding": "string"}


def plan_json(json_format: str, columns: Columns, n_rows: int) -> list[Part]:
    """The parts of a JSON file of `n_rows` rows. Most orientations are one part; "columns" is one for each column.

    `json_format` is an orientation of `pandas.read_json`; the empty string means "records". Raises InvalidInput for
    any other.
    """
    plan = _ORIENTATIONS.get(json_format or "records")
    if plan is None:
        raise InvalidInput(
            f"Unknown json_format {json_format!r}. Known: {', '.join(_ORIENTATIONS)}.", field="json_format"
        )
    return plan(columns, n_rows)


def describe_rows(
    texts: Sequence[str], vectors: np.ndarray, *, label: str, json_format: str
) -> list[dict[str, Any]] | orjson.Fragment:
    """Rows of a text and a vector, of (n, n_dims), with the columns `label` and "embedding", for orjson to dump.

    With OPT_SERIALIZE_NUMPY. `json_format` as in plan_json. Raises InvalidInput.
    """
    matrix = np.ascontiguousarray(vectors, np.float32)
    columns: dict[str, Any] = {label: [_make_encodable(text) for text in texts], "embedding": list(matrix)}
    if (json_format or "records") == "records":
        # As objects, so that a large file is written once and not put together from parts.
        return [{label: text, "embedding": vector} for text, vector in zip(*columns.values(), strict=True)]
    rendered = []
    for part in plan_json(json_format, {label: "string", "embedding": "string"}, len(texts)):
        batch = Batch(0, {name: columns[name] for name in part.columns})
        rendered += [part.opening, part.render(batch), part.closing]
    return orjson.Fragment(b"".join(rendered))


def _make_encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot express and tokenisers can produce."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _dump_inside(value: Any) -> bytes:
    """A list or an object without its brackets, to be put together with others."""
    return _dump(value)[1:-1]


def _plan_records(columns: Columns, n_rows: int) -> list[Part]:
    return [Part(b"[", _render_records, b"]", tuple(columns))]


def _render_records(batch: Batch) -> bytes:
    return _dump_inside([dict(zip(batch.columns, row, strict=True)) for row in batch.rows()])


def _plan_values(columns: Columns, n_rows: int) -> list[Part]:
    return [Part(b"[", _render_values, b"]", tuple(columns))]


def _render_values(batch: Batch) -> bytes:
    return _dump_inside(batch.rows())


def _plan_split(columns: Columns, n_rows: int) -> list[Part]:
    head = _dump({"columns": list(columns), "index": list(range(n_rows))})
    return [Part(head[:-1] + b',"data":[', _render_values, b"]}", tuple(columns))]


def _plan_index(columns: Columns, n_rows: int) -> list[Part]:
    return [Part(b"{", _render_index, b"}", tuple(columns))]


def _render_index(batch: Batch) -> bytes:
    rows = enumerate(batch.rows(), batch.first)
    return _dump_inside({str(position): dict(zip(batch.columns, row, strict=True)) for position, row in rows})


def _plan_columns(columns: Columns, n_rows: int) -> list[Part]:
    *others, last = columns
    parts = [Part(_dump(name) + b":{", _render_column, b"},", (name,)) for name in others]
    parts.append(Part(_dump(last) + b":{", _render_column, b"}}", (last,)))
    return [replace(parts[0], opening=b"{" + parts[0].opening), *parts[1:]]


def _render_column(batch: Batch) -> bytes:
    [values] = batch.columns.values()
    return _dump_inside({str(position): value for position, value in enumerate(values, batch.first)})


def _plan_table(columns: Columns, n_rows: int) -> list[Part]:
    """JSON Table Schema (https://specs.frictionlessdata.io/table-schema/) with the fields that pandas writes."""
    first, *others = columns
    schema = {
        "fields": [
            {"name": "index", "type": "integer"},
            {"name": first, "type": "string", "extDtype": "str"},
            *({"name": name, "type": columns[name]} for name in others),
        ],
        "primaryKey": ["index"],
        "pandas_version": "1.4.0",  # the version of the schema, which pandas still writes and asks for
    }
    return [Part(b'{"schema":' + _dump(schema) + b',"data":[', _render_table, b"]}", tuple(columns))]


def _render_table(batch: Batch) -> bytes:
    names = ("index", *batch.columns)
    rows = enumerate(batch.rows(), batch.first)
    return _dump_inside([dict(zip(names, (position, *row), strict=True)) for position, row in rows])


_ORIENTATIONS: dict[str, Callable[[Columns, int], list[Part]]] = {
    "records": _plan_records,
    "split": _plan_split,
    "index": _plan_index,
    "columns": _plan_columns,
    "values": _plan_values,
    "table": _plan_table,
}


# --- Files -----------------------------------------------------------------------------------------------------------


def zip_single_file(file_name: str, content: bytes) -> bytes:
    """Pack one file into a zip archive; the same content always gives the same bytes."""
    entry = zipfile.ZipInfo(safe_file_name(file_name), date_time=_EARLIEST_ZIP_TIME)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16  # otherwise unpacked without any permission
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # Digits hardly compress further: level 6 takes several times as long.
        archive.writestr(entry, content, compresslevel=1)
    return buffer.getvalue()


def safe_file_name(name: str) -> str:
    """Reduce what a client calls a file to a plain file name: no directories, control characters or quotes.

    Letters of all scripts stay. Names are cut to 200 bytes of UTF-8, their ending kept; nothing left gives "document".
    """
    last_part = re.split(r"[/\\]", unicodedata.normalize("NFC", _make_encodable(name)))[-1]
    printable = "".join(
        " " if character.isspace() else character
        for character in last_part
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
    )
    plain = re.sub(r"[\"'`<>:|?*;]", "_", printable)
    return _shorten_file_name(" ".join(plain.split()).strip(". ")) or "document"


def _shorten_file_name(name: str) -> str:
    if len(name.encode()) <= _MAXIMUM_FILE_NAME_BYTES:
        return name
    stem, dot, ending = name.rpartition(".")
    if not dot or len(ending.encode()) > 16:
        stem, dot, ending = name, "", ""
    room = _MAXIMUM_FILE_NAME_BYTES - len((dot + ending).encode())
    return stem.encode()[:room].decode("utf-8", "ignore").strip() + dot + ending


def content_disposition(file_name: str) -> str:
    """The header of a download (RFC 6266): an ASCII name for old clients and the real one as RFC 8187 encodes it."""
    name = safe_file_name(file_name)
    decomposed = unicodedata.normalize("NFKD", name)
    without_accents = "".join(character for character in decomposed if not unicodedata.combining(character))
    fallback = re.sub(r"[^\x20-\x7e]|%", "_", without_accents)
    return f"attachment; filename=\"{fallback}\"; filename*=UTF-8''{quote(name, safe='')}"
