"""Rows of text and vector to the bytes of a JSON file in pandas' six orientations, and to a zip file to download.

The JSON has the structure that `pandas.DataFrame.to_json` writes and `pandas.read_json` reads, but pandas is not
needed: vectors go from float32 arrays straight to text, in the shortest form that gives the same float32 back.
"""

from __future__ import annotations

import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson

from llama_embeddings.errors import InvalidInput

Rows = Sequence[tuple[str, np.ndarray]]

_MAXIMUM_FILE_NAME_BYTES = 200  # file systems allow 255; room is left for an ending
_EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


# --- JSON ------------------------------------------------------------------------------------------------------------


def render_records(rows: Rows, *, label: str, json_format: str) -> bytes:
    """Render (text, float32 (n_dims,)) rows as UTF-8 JSON with the columns `label` and "embedding".

    `json_format` is an orientation of `pandas.read_json`; the empty string means "records". Raises InvalidInput for
    any other.
    """
    arrange = _ORIENTATIONS.get(json_format or "records")
    if arrange is None:
        raise InvalidInput(
            f"Unknown json_format {json_format!r}. Known: {', '.join(_ORIENTATIONS)}.", field="json_format"
        )
    prepared = [(_make_encodable(text), np.ascontiguousarray(vector, dtype=np.float32)) for text, vector in rows]
    return orjson.dumps(arrange(prepared, label), option=orjson.OPT_SERIALIZE_NUMPY)


def _make_encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot express and tokenisers can produce."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _arrange_records(rows: Rows, label: str) -> Any:
    return [{label: text, "embedding": vector} for text, vector in rows]


def _arrange_split(rows: Rows, label: str) -> Any:
    return {"columns": [label, "embedding"], "index": list(range(len(rows))), "data": _arrange_values(rows, label)}


def _arrange_index(rows: Rows, label: str) -> Any:
    return {str(position): record for position, record in enumerate(_arrange_records(rows, label))}


def _arrange_columns(rows: Rows, label: str) -> Any:
    return {
        label: {str(position): text for position, (text, _) in enumerate(rows)},
        "embedding": {str(position): vector for position, (_, vector) in enumerate(rows)},
    }


def _arrange_values(rows: Rows, label: str) -> Any:
    return [[text, vector] for text, vector in rows]


def _arrange_table(rows: Rows, label: str) -> Any:
    """JSON Table Schema (https://specs.frictionlessdata.io/table-schema/) with the fields that pandas writes."""
    schema = {
        "fields": [
            {"name": "index", "type": "integer"},
            {"name": label, "type": "string", "extDtype": "str"},
            {"name": "embedding", "type": "string"},
        ],
        "primaryKey": ["index"],
        "pandas_version": "1.4.0",  # the version of the schema, which pandas still writes and asks for
    }
    data = [{"index": position, label: text, "embedding": vector} for position, (text, vector) in enumerate(rows)]
    return {"schema": schema, "data": data}


_ORIENTATIONS: dict[str, Callable[[Rows, str], Any]] = {
    "records": _arrange_records,
    "split": _arrange_split,
    "index": _arrange_index,
    "columns": _arrange_columns,
    "values": _arrange_values,
    "table": _arrange_table,
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
