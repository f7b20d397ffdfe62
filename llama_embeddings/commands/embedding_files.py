"""Texts and embeddings that were computed elsewhere, read from files in parts: .npz, .parquet and .jsonl.

Each has `text` and `embedding`: arrays of an .npz file (a fixed-width Unicode array and a matrix), columns of a Parquet
file, or fields of each line. No file is held in memory as a whole. Knows no store and no models.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from llama_embeddings.errors import InvalidInput

# How far from 1 the length of a vector may be that is taken for one of unit length.
UNIT_LENGTH_TOLERANCE = 1e-3
_UNREADABLE = (OSError, ValueError, KeyError, zipfile.BadZipFile, pyarrow.ArrowException)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a file: n texts and float32 (n, n_dims). `first_row` counts from 0."""

    first_row: int
    texts: list[str]
    vectors: np.ndarray


def read_parts(path: Path, rows_per_part: int) -> Iterator[Part]:
    """The rows of a file. Raises InvalidInput, naming file and row, for what cannot be read."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidInput(f"{path} is none of the known kinds of file: {', '.join(_READERS)}.")
    first_row = 0
    try:
        for texts, vectors in reader(path, rows_per_part):
            yield Part(first_row, texts, vectors)
            first_row += len(texts)
    except _UNREADABLE as error:
        raise InvalidInput(f"{path} cannot be read after row {first_row} ({type(error).__name__}: {error}).") from error


def count_rows(path: Path) -> int | None:
    """How many rows a file says that it has; None if only reading it would tell."""
    try:
        if path.suffix.lower() == ".parquet":
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as file:
                return int(_read_header(file)[0][0])
    except _UNREADABLE:
        pass  # reading it will say what is wrong
    return None


def normalise(path: Path, part: Part, n_dims: int) -> np.ndarray:
    """The vectors with unit length, those left alone that have it. Raises InvalidInput, naming the row."""
    if part.vectors.ndim != 2 or part.vectors.shape[1] != n_dims:
        found = part.vectors.shape[1] if part.vectors.ndim == 2 else "no"
        raise InvalidInput(f"{path}: the embeddings have {found} dimensions, those of the model have {n_dims}.")
    lengths = np.linalg.norm(part.vectors.astype(np.float64), axis=1)
    for is_bad, reason in ((~np.isfinite(lengths), "is not finite"), (lengths == 0, "has no direction")):
        if is_bad.any():
            raise InvalidInput(f"{path}: the embedding of row {part.first_row + int(is_bad.argmax())} {reason}.")
    needs_scaling = np.abs(lengths - 1) > UNIT_LENGTH_TOLERANCE
    vectors = np.ascontiguousarray(part.vectors, np.float32)
    if needs_scaling.any():
        vectors = vectors.copy()
        vectors[needs_scaling] /= lengths[needs_scaling, None]
    return vectors


_Rows = Iterator[tuple[list[str], np.ndarray]]


def _read_jsonl(path: Path, rows_per_part: int) -> _Rows:
    with path.open("rb") as file:
        while lines := list(itertools.islice(file, rows_per_part)):
            rows = [orjson.loads(line) for line in lines if line.strip()]
            texts = [row["text"] for row in rows]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a text is no string")
            yield texts, np.array([row["embedding"] for row in rows], np.float32)


def _read_parquet(path: Path, rows_per_part: int) -> _Rows:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(rows_per_part, columns=["text", "embedding"]):
            texts, embeddings = batch.column("text"), batch.column("embedding")
            if texts.null_count or embeddings.null_count:
                raise ValueError("a text or an embedding is missing")
            values = embeddings.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            n_dims = len(values) // max(1, len(texts))
            lengths = pyarrow.compute.list_value_length(embeddings).to_numpy(zero_copy_only=False)
            if (lengths != n_dims).any():
                raise ValueError("embeddings differ in length")
            yield texts.to_pylist(), values.reshape(len(texts), n_dims)


def _read_npz(path: Path, rows_per_part: int) -> _Rows:
    # Not `np.load`: it would read each array as a whole.
    with (
        zipfile.ZipFile(path) as archive,
        archive.open("text.npy") as text_file,
        archive.open("embedding.npy") as embedding_file,
    ):
        (n_texts,), text_type = _read_header(text_file)
        (n_rows, n_dims), embedding_type = _read_header(embedding_file)
        if text_type.kind != "U" or embedding_type.kind != "f":
            raise ValueError("`text` is to be an array of Unicode strings, `embedding` one of floats")
        if n_texts != n_rows:
            raise ValueError(f"{n_texts} texts, but {n_rows} embeddings")
        for start in range(0, n_rows, rows_per_part):
            count = min(rows_per_part, n_rows - start)
            texts = _read_array(text_file, text_type, count)
            vectors = _read_array(embedding_file, embedding_type, count * n_dims)
            yield texts.tolist(), vectors.astype(np.float32, copy=False).reshape(count, n_dims)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the array format is not known")
    shape, is_fortran, kind = readers[version](file)
    if is_fortran and len(shape) > 1:
        raise ValueError("the matrix is stored by columns; save a copy in C order")
    return shape, kind


def _read_array(file: IO[bytes], kind: np.dtype[Any], count: int) -> np.ndarray:
    data = file.read(count * kind.itemsize)
    if len(data) < count * kind.itemsize:
        raise ValueError("the file ends too early")
    return np.frombuffer(data, kind)


_READERS: dict[str, Callable[[Path, int], _Rows]] = {
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
}
