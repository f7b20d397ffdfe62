"""Files that are written while they are sent: zip archives, NumPy's npz and Parquet.

Each is a function or a writer that takes batches and gives bytes; nothing is held but the batch at hand, and nothing
lies in a temporary file. Knows neither where rows come from nor HTTP.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from llama_embeddings.documents.export import Batch, Part, safe_file_name

if TYPE_CHECKING:
    import pyarrow

# Above this, a member of an archive needs the longer fields of zip64, which not every old program reads.
_ZIP64_FROM_BYTES = 2**31
# Digits hardly compress further: level 6 takes several times as long.
_COMPRESSION_LEVEL = 1
_NO_PAGE = 0


class _Sink(io.RawIOBase):
    """Takes what a writer writes and hands it out again; without a position to go back to."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(data)

    def drain(self) -> bytes:
        """What was written since the last time."""
        written = b"".join(self._written)
        self._written.clear()
        return written


class ZipWriter:
    """A zip archive in the making; every method gives the bytes that are ready to be sent."""

    def __init__(self) -> None:
        self._sink = _Sink()
        self._archive = zipfile.ZipFile(self._sink, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION_LEVEL)
        self._member: IO[bytes] | None = None

    def begin_member(self, name: str, *, about_bytes: int) -> bytes:
        """Begin a file of about so many bytes. The same content always gives the same bytes: no clock enters."""
        self.end_member()
        self._member = self._archive.open(safe_file_name(name), "w", force_zip64=about_bytes >= _ZIP64_FROM_BYTES)
        return self._sink.drain()

    def write(self, data: bytes) -> bytes:
        """Go on with the file begun last."""
        assert self._member is not None
        self._member.write(data)
        return self._sink.drain()

    def end_member(self) -> bytes:
        if self._member is not None:
            self._member.close()
            self._member = None
        return self._sink.drain()

    def finish(self) -> bytes:
        """The last bytes: the archive's table of contents."""
        self.end_member()
        self._archive.close()
        return self._sink.drain()


def plan_npz(n_rows: int, n_dims: int, longest_text: int) -> dict[str, Part]:
    """The arrays of an npz file by name, as `numpy.load` reads them without pickle.

    `text` is an array of strings, all padded to the longest one; `page` is 0 where the format has no pages.
    """
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "text": (f"<U{max(1, longest_text)}", (n_rows,)),
        "embedding": ("<f4", (n_rows, n_dims)),
        "page": ("<i8", (n_rows,)),
        "start": ("<i8", (n_rows,)),
        "end": ("<i8", (n_rows,)),
    }
    return {name: _plan_array(name, dtype, shape) for name, (dtype, shape) in arrays.items()}


def _plan_array(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})

    def render(batch: Batch) -> bytes:
        values = batch.columns[name]
        if name == "page":
            values = [_NO_PAGE if page is None else page for page in values]
        return np.asarray(values, dtype=dtype).tobytes()

    return Part(header.getvalue(), render, b"", (name,), separator=b"")


class ParquetWriter:
    """A Parquet file in the making, one row group for each batch; every method gives the bytes that are ready.

    `embedding` is a list of float32, `page` null where the format has no pages.
    """

    columns = ("text", "embedding", "page", "start", "end")

    def __init__(self) -> None:
        # Imported here: it takes 40 MB, and few ask for it.
        import pyarrow
        import pyarrow.parquet

        self._sink = _Sink()
        self._schema = pyarrow.schema(
            {
                "text": pyarrow.string(),
                "embedding": pyarrow.list_(pyarrow.float32()),
                "page": pyarrow.int32(),
                "start": pyarrow.int64(),
                "end": pyarrow.int64(),
            }
        )
        self._writer = pyarrow.parquet.ParquetWriter(
            self._sink, self._schema, compression="zstd", compression_level=1, use_dictionary=False
        )

    def write(self, batch: Batch) -> bytes:
        """Append a row group."""
        self._writer.write_table(self._make_table(batch))
        return self._sink.drain()

    def _make_table(self, batch: Batch) -> pyarrow.Table:
        import pyarrow

        columns = dict(batch.columns)
        columns["embedding"] = _make_lists(np.asarray(columns["embedding"], dtype=np.float32))
        return pyarrow.table(columns, schema=self._schema)

    def finish(self) -> bytes:
        """The last bytes: the description of the row groups."""
        self._writer.close()
        return self._sink.drain()


def _make_lists(vectors: np.ndarray) -> pyarrow.ListArray:
    """float32 (n, n_dims) as a column of lists, without a Python object for each number."""
    import pyarrow

    offsets: Sequence[int] | np.ndarray = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, vectors.reshape(-1))
