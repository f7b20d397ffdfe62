"""Archives that are written while they are sent: every byte is handed out once, and readers accept the whole."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pyarrow.parquet

from llama_embeddings.documents.archives import ParquetWriter, ZipWriter, plan_npz
from llama_embeddings.documents.export import Batch


def write_zip(members: dict[str, list[bytes]], about_bytes: int = 0) -> bytes:
    writer = ZipWriter()
    sent = []
    for name, pieces in members.items():
        sent.append(writer.begin_member(name, about_bytes=about_bytes))
        sent += [writer.write(piece) for piece in pieces]
        sent.append(writer.end_member())
    return b"".join([*sent, writer.finish()])


def test_zip_in_pieces_is_a_zip() -> None:
    """Members in their order, names made harmless, checksums right; the same every time."""
    members = {"../Größe 風.json": [b"a" * 1000, b"b" * 1000], "two.npy": [bytes(range(256))]}
    archive = write_zip(members)
    assert archive == write_zip(members)
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert opened.testzip() is None
        assert opened.namelist() == ["Größe 風.json", "two.npy"]
        assert opened.read("Größe 風.json") == b"a" * 1000 + b"b" * 1000
        assert opened.getinfo("two.npy").external_attr >> 16 == 0o600


def test_zip_of_a_very_large_file_uses_the_longer_fields() -> None:
    """It is announced before it is written; a small one stays readable for old programs."""
    large, small = (write_zip({"a": [b"x"]}, about_bytes=size) for size in (2**31, 2**31 - 1))
    assert len(large) > len(small)
    with zipfile.ZipFile(io.BytesIO(large)) as opened:
        assert opened.read("a") == b"x"


def test_npz_of_nothing_is_read_back() -> None:
    """Five empty arrays with the right types."""
    arrays = plan_npz(0, 0, 0)
    archive = write_zip({f"{name}.npy": [part.opening] for name, part in arrays.items()})
    loaded = np.load(io.BytesIO(archive))
    assert {name: loaded[name].shape for name in loaded} == {
        "text": (0,),
        "embedding": (0, 0),
        "page": (0,),
        "start": (0,),
        "end": (0,),
    }


def test_parquet_keeps_pages_and_places() -> None:
    """Null where there is no page; vectors bit by bit."""
    vectors = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    columns = {"text": ["a", "風"], "embedding": vectors, "page": [None, 3], "start": [0, 2**40], "end": [1, 2**40 + 1]}
    writer = ParquetWriter()
    content = writer.write(Batch(0, columns)) + writer.write(Batch(2, columns)) + writer.finish()
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    assert table.num_rows == 4
    assert table["page"].to_pylist() == [None, 3] * 2
    assert table["start"].to_pylist() == [0, 2**40] * 2
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), np.concatenate([vectors] * 2))
