"""Results as files to take away: JSON in the orientation asked for, alone or in a zip, npz and Parquet.

A document's sentences and vectors are read from the store by parts while the file is sent, so that it never exists as a
whole. Everything was computed and stored before; what can still fail breaks the transfer off, so that it cannot be
taken for a complete one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from embeddings_data_models import Sentence, StoredDocument, StoredTokenLevelBundle
from llama_embeddings.documents.archives import ParquetWriter, ZipWriter, plan_npz
from llama_embeddings.documents.export import (
    Batch,
    Part,
    content_disposition,
    describe_rows,
    plan_json,
    zip_single_file,
)
from llama_embeddings.documents.reader import ReadDocument
from llama_embeddings.storage.store import EmbeddingStore

JSON_TYPE = "application/json"
ZIP_TYPE = "application/zip"
PARQUET_TYPE = "application/vnd.apache.parquet"

# Numbers rendered at a time: two milliseconds of JSON, during which Python does nothing else.
NUMBERS_PER_BATCH = 65_536
# Row groups of Parquet should not be small, for the sake of those who read them.
NUMBERS_PER_ROW_GROUP = 1_048_576
JSON_BYTES_PER_NUMBER = 12


@dataclass(frozen=True, slots=True)
class Download:
    """Bytes with their media type and the headers that go with them."""

    content: bytes
    media_type: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class StreamedDownload:
    """The same with the bytes still to come."""

    content: AsyncIterator[bytes]
    media_type: str
    headers: dict[str, str]


class DocumentDownloads:
    """Renders documents of the store."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store

    async def render(self, document: StoredDocument, *, json_format: str, kind: str) -> StreamedDownload:
        """Sentences with their embeddings, as "json", "zip" (of JSON), "npz" or "parquet".

        Raises InvalidInput for an unknown orientation.
        """
        name = f"{document.filename}.embeddings"
        if kind == "npz":
            longest = await self._store.measure_longest_sentence(document)
            arrays = plan_npz(document.n_sentences, document.n_dims, longest)
            members = {f"{array}.npy": [part] for array, part in arrays.items()}
            return _pack(self._stream_archive(document, members), f"{name}.npz", ZIP_TYPE)
        if kind == "parquet":
            return _pack(self._stream_parquet(document), f"{name}.parquet", PARQUET_TYPE)
        parts = plan_json(json_format, _describe_columns(document), document.n_sentences)
        if kind == "zip":
            return _pack(self._stream_archive(document, {f"{name}.json": parts}), f"{name}.zip", ZIP_TYPE)
        return StreamedDownload(self._stream_parts(document, parts), JSON_TYPE, {})

    async def _stream_parts(self, document: StoredDocument, parts: Iterable[Part]) -> AsyncIterator[bytes]:
        for part in parts:
            yield part.opening
            async for batch in self._read_batches(document, part.columns, NUMBERS_PER_BATCH):
                rendered = await asyncio.to_thread(part.render, batch)
                yield part.separator + rendered if batch.first else rendered
            yield part.closing

    async def _stream_archive(self, document: StoredDocument, members: dict[str, list[Part]]) -> AsyncIterator[bytes]:
        archive = ZipWriter()
        about_bytes = document.n_sentences * document.n_dims * JSON_BYTES_PER_NUMBER
        for name, parts in members.items():
            yield archive.begin_member(name, about_bytes=about_bytes)
            async for content in self._stream_parts(document, parts):
                yield await asyncio.to_thread(archive.write, content)
            yield archive.end_member()
        yield archive.finish()

    async def _stream_parquet(self, document: StoredDocument) -> AsyncIterator[bytes]:
        writer = await asyncio.to_thread(ParquetWriter)
        async for batch in self._read_batches(document, ParquetWriter.columns, NUMBERS_PER_ROW_GROUP):
            yield await asyncio.to_thread(writer.write, batch)
        yield await asyncio.to_thread(writer.finish)

    async def _read_batches(
        self, document: StoredDocument, columns: Sequence[str], n_numbers: int
    ) -> AsyncIterator[Batch]:
        n_rows = max(1, n_numbers // max(1, document.n_dims))
        for first in range(0, document.n_sentences, n_rows):
            yield await self._read_batch(document, columns, first, n_rows)

    async def _read_batch(self, document: StoredDocument, columns: Sequence[str], first: int, n_rows: int) -> Batch:
        values: dict[str, Any] = dict.fromkeys(columns)
        if "embedding" in values:
            values["embedding"] = await self._store.read_sentence_vectors(document, first, n_rows)
        if columns != ("embedding",):
            sentences = await self._store.read_sentences(document, first, n_rows)
            values |= _make_columns(sentences, [name for name in columns if name != "embedding"])
        return Batch(first, values)


def _describe_columns(document: StoredDocument) -> dict[str, str]:
    """Names and types. A column of whole numbers must have one in each row, or pandas does not read it back."""
    page = "integer" if document.has_pages else "number"
    return {"text": "string", "embedding": "string", "page": page, "start": "integer", "end": "integer"}


def _make_columns(sentences: Sequence[Sentence], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [getattr(sentence, name) for sentence in sentences] for name in names}


def _pack(content: AsyncIterator[bytes], file_name: str, media_type: str) -> StreamedDownload:
    return StreamedDownload(content, media_type, {"Content-Disposition": content_disposition(file_name)})


SENTENCES_PER_BATCH = 1_000
_SENTENCE_COLUMNS = {"text": "string", "page": "number", "start": "integer", "end": "integer"}


async def stream_sentences(document: ReadDocument, *, filename: str) -> AsyncIterator[bytes]:
    """A document's sentences without embeddings, as the JSON of SentencesResponse."""
    head = {
        "filename": filename,
        "mimetype": document.mimetype,
        "total_number_of_sentences": len(document.sentences),
    }
    [part] = plan_json("records", _SENTENCE_COLUMNS, len(document.sentences))
    yield orjson.dumps(head)[:-1] + b',"sentences":' + part.opening
    for first in range(0, len(document.sentences), SENTENCES_PER_BATCH):
        sentences = document.sentences[first : first + SENTENCES_PER_BATCH]
        rendered = await asyncio.to_thread(part.render, Batch(first, _make_columns(sentences, part.columns)))
        yield part.separator + rendered if first else rendered
    yield part.closing + b"}"


def render_token_level_bundle(text: str, bundle: StoredTokenLevelBundle, *, json_format: str, as_zip: bool) -> Download:
    """Tokens with their embeddings and the combined feature vector. Raises InvalidInput for an unknown orientation."""
    content = orjson.dumps(
        {
            "input_text": text,
            "token_level_embedding_bundle": describe_rows(
                bundle.tokens, bundle.matrix, label="token", json_format=json_format
            ),
            "combined_feature_vector": bundle.feature_vector,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    name = f"token_level_embeddings_{bundle.text_hash[:16]}"
    if not as_zip:
        return Download(content, JSON_TYPE, {})
    packed = zip_single_file(f"{name}.json", content)
    return Download(packed, ZIP_TYPE, {"Content-Disposition": content_disposition(f"{name}.zip")})
