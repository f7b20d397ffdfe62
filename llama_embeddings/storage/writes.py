"""What the writer does inside a transaction: each function takes several payloads of its kind and answers each.

They neither begin nor end a transaction, and keep nothing between calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha3_256
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, Executable

from embeddings_data_models import (
    DocumentJob,
    NewDocument,
    NewEmbedding,
    NewTokenLevelBundle,
    RequestStamp,
    SentencePlaces,
    compute_text_hash,
    compute_token_hash,
)
from llama_embeddings.errors import Unavailable
from llama_embeddings.storage import statements
from llama_embeddings.storage.engine import MAX_LIST_LENGTH, overwriting_deleted, touch

Element = TypeVar("Element")

SENTENCES_PER_STATEMENT = 10_000

# (model_name, recipe, row id): where an index has to forget what.
RemovedRow = tuple[str, str, int]


def split(elements: Sequence[Element], length: int = MAX_LIST_LENGTH) -> Iterator[Sequence[Element]]:
    """Parts of a list that one statement can take; no part for an empty list."""
    return (elements[start : start + length] for start in range(0, len(elements), length))


def encode_vector(array: np.ndarray) -> bytes:
    """An array of any shape as little-endian float32, row by row."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def compute_feature_vector_hash(text_hash: str, feature_vector: np.ndarray) -> str:
    """SHA3-256 over the text's hash and the vector, since two texts may have the same vector."""
    return sha3_256(text_hash.encode() + encode_vector(feature_vector)).hexdigest()


# --- embeddings ---


def insert_embeddings(connection: Connection, batches: Sequence[Sequence[NewEmbedding]]) -> list[list[int]]:
    """Row ids of each batch; a text that is there already keeps its row."""
    rows = list(chain.from_iterable(batches))
    ids: dict[tuple[str, str, str], int] = {}
    if rows:
        described = [_describe_embedding(row) for row in rows]
        for row_id, *key in connection.execute(statements.INSERT_EMBEDDINGS, described):
            ids[key[0], key[1], key[2]] = row_id
    # What was there already is passed over by the insertion and gives no row back.
    ids |= _find_embedding_ids(connection, [row for row in rows if _key(row) not in ids])
    return [[ids[_key(row)] for row in batch] for batch in batches]


def _find_embedding_ids(connection: Connection, rows: Sequence[NewEmbedding]) -> dict[tuple[str, str, str], int]:
    hashes_by_group: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        hashes_by_group[row.model_name, row.recipe][row.text_hash] = None
    ids = {}
    for (model_name, recipe), hashes in hashes_by_group.items():
        for part in split(list(hashes)):
            parameters = {"text_hashes": part, "model_name": model_name, "recipe": recipe}
            for text_hash, row_id in connection.execute(statements.FIND_EMBEDDING_IDS, parameters):
                ids[text_hash, model_name, recipe] = row_id
    return ids


def _key(row: NewEmbedding) -> tuple[str, str, str]:
    return row.text_hash, row.model_name, row.recipe


def _describe_embedding(row: NewEmbedding) -> dict[str, Any]:
    return {
        "text": row.text,
        "text_hash": row.text_hash,
        "model_name": row.model_name,
        "recipe": row.recipe,
        "embedding": encode_vector(row.vector),
        "n_tokens": row.n_tokens,
        "n_tokens_dropped": row.n_tokens_dropped,
        **_describe_times(row.stamp, row.response_time),
    }


@lru_cache(maxsize=64)  # the rows of a request share their times
def _describe_times(stamp: RequestStamp, response_time: datetime) -> dict[str, Any]:
    return {
        "ip_address": stamp.ip_address,
        "request_time": _without_zone(stamp.request_time),
        "response_time": _without_zone(response_time),
        "total_time": (response_time - stamp.request_time).total_seconds(),
    }


def _without_zone(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)


# --- token-level bundles ---


def insert_bundles(connection: Connection, new_bundles: Sequence[NewTokenLevelBundle]) -> list[int]:
    """Row ids of the bundles; one that is there already stays as it is."""
    return [_insert_bundle(connection, bundle) for bundle in new_bundles]


def _insert_bundle(connection: Connection, bundle: NewTokenLevelBundle) -> int:
    inserted = connection.execute(statements.INSERT_BUNDLE, _describe_bundle(bundle))
    key = {"text_hash": bundle.text_hash, "model_name": bundle.model_name, "recipe": bundle.recipe}
    bundle_id: int = connection.execute(statements.FIND_BUNDLE_ID, key).scalar_one()
    if inserted.rowcount:
        connection.execute(statements.INSERT_FEATURE_VECTOR, _describe_feature_vector(bundle, bundle_id))
        if bundle.tokens:
            connection.execute(statements.INSERT_TOKENS, _describe_tokens(bundle, bundle_id))
    return bundle_id


def _describe_bundle(bundle: NewTokenLevelBundle) -> dict[str, Any]:
    return {
        "input_text": bundle.text,
        "input_text_hash": bundle.text_hash,
        "model_name": bundle.model_name,
        "recipe": bundle.recipe,
        "n_tokens": len(bundle.tokens),
        "n_tokens_dropped": bundle.n_tokens_dropped,
        "embeddings": bundle.matrix.reshape(-1),
        **_describe_times(bundle.stamp, bundle.response_time),
    }


def _describe_tokens(bundle: NewTokenLevelBundle, bundle_id: int) -> list[dict[str, Any]]:
    shared = {
        "model_name": bundle.model_name,
        "recipe": bundle.recipe,
        "token_level_embedding_bundle_id": bundle_id,
        **_describe_times(bundle.stamp, bundle.response_time),
    }
    return [
        {
            "token": token,
            "token_hash": compute_token_hash(bundle.text_hash, position, token),
            "position": position,
            **shared,
        }
        for position, token in enumerate(bundle.tokens)
    ]


def _describe_feature_vector(bundle: NewTokenLevelBundle, bundle_id: int) -> dict[str, Any]:
    return {
        "token_level_embedding_bundle_id": bundle_id,
        "model_name": bundle.model_name,
        "recipe": bundle.recipe,
        "combined_feature_vector": bundle.feature_vector,
        "combined_feature_vector_hash": compute_feature_vector_hash(bundle.text_hash, bundle.feature_vector),
    }


# --- documents ---


def insert_documents(connection: Connection, new_documents: Sequence[NewDocument]) -> list[int]:
    """Row ids (of document_embeddings) of the documents. One that is there already gets its sentences again."""
    return [_insert_document(connection, document) for document in new_documents]


def _insert_document(connection: Connection, document: NewDocument) -> int:
    _check_sentences_exist(connection, document)
    key = {"file_hash": document.file_hash, "model_name": document.model_name, "filename": document.filename}
    connection.execute(statements.INSERT_DOCUMENT, _describe_document(document))
    document_id = connection.execute(statements.FIND_DOCUMENT_ID, key).scalar_one()
    connection.execute(statements.INSERT_DOCUMENT_EMBEDDING, _describe_document_embedding(document, document_id))
    key |= {"recipe": document.recipe, "segmentation": document.segmentation}
    row_id: int = connection.execute(statements.FIND_DOCUMENT_EMBEDDING, key).scalar_one()
    _replace_sentences(connection, document, row_id)
    return row_id


def _check_sentences_exist(connection: Connection, document: NewDocument) -> None:
    """A text may be forgotten between the storing of the sentences and the storing of their document."""
    wanted = np.unique(document.places.row_ids).tolist()
    n_found = 0
    for part in split(wanted):
        n_found += connection.execute(statements.COUNT_ROWS_PRESENT, {"row_ids": part}).scalar_one()
    if n_found < len(wanted):
        raise Unavailable("A sentence of the document was deleted while the document was stored. Submit it again.")


def _replace_sentences(connection: Connection, document: NewDocument, row_id: int) -> None:
    connection.execute(statements.DELETE_SENTENCES, {"old_document_embedding_id": row_id})
    for first in range(0, len(document.places), SENTENCES_PER_STATEMENT):
        connection.execute(statements.INSERT_SENTENCES, _describe_sentences(document.places, row_id, first))
    if len(document.places):
        connection.execute(statements.CLAIM_SENTENCES, {"holder_id": row_id})


def _describe_document(document: NewDocument) -> dict[str, Any]:
    return {
        "filename": document.filename,
        "mimetype": document.mimetype,
        "model_name": document.model_name,
        "document_hash": document.file_hash,
        **_describe_times(document.stamp, document.response_time),
    }


def _describe_document_embedding(document: NewDocument, document_id: int) -> dict[str, Any]:
    return {
        "document_id": document_id,
        "filename": document.filename,
        "mimetype": document.mimetype,
        "file_hash": document.file_hash,
        "model_name": document.model_name,
        "recipe": document.recipe,
        "segmentation": document.segmentation,
        "n_sentences": len(document.places),
        "file_data": document.file_data,
        **_describe_times(document.stamp, document.response_time),
    }


def _describe_sentences(places: SentencePlaces, row_id: int, first: int) -> list[dict[str, Any]]:
    """The next rows of a document's sentences; all at once would take more memory than the document."""
    part = slice(first, first + SENTENCES_PER_STATEMENT)
    columns = (places.row_ids, places.pages, places.starts, places.ends)
    return [
        {
            "document_embedding_id": row_id,
            "position": position,
            "embedding_id": embedding_id,
            "page": page or None,
            "start": start,
            "end": end,
        }
        for position, (embedding_id, page, start, end) in enumerate(
            zip(*(column[part].tolist() for column in columns), strict=True), start=first
        )
    ]


# --- forgetting ---


def delete_texts(connection: Connection, texts: Sequence[str]) -> list[list[RemovedRow]]:
    """Remove each text's embeddings and token-level bundles under every model and recipe."""
    with overwriting_deleted(connection):
        return [_delete_text(connection, text) for text in texts]


def _delete_text(connection: Connection, text: str) -> list[RemovedRow]:
    key = {"text_hash_to_delete": compute_text_hash(text)}
    connection.execute(statements.DELETE_BUNDLES_OF_TEXT, key)
    return _delete_returning(connection, statements.DELETE_EMBEDDINGS_OF_TEXT, key)


def delete_documents(connection: Connection, filenames: Sequence[str]) -> list[list[RemovedRow]]:
    """Remove the documents of each name with the sentences that they brought and that no other document holds."""
    with overwriting_deleted(connection):
        return [_delete_documents_of_name(connection, filename) for filename in filenames]


def _delete_documents_of_name(connection: Connection, filename: str) -> list[RemovedRow]:
    found = connection.execute(statements.FIND_DOCUMENT_EMBEDDINGS_OF_FILENAME, {"filename": filename})
    doomed = {"doomed": list(found.scalars())}
    removed: list[RemovedRow] = []
    if doomed["doomed"]:
        removed = _delete_returning(connection, statements.DELETE_SENTENCES_NOBODY_ELSE_HOLDS, doomed)
        connection.execute(statements.HAND_ON_SENTENCES, doomed)
    connection.execute(statements.DELETE_DOCUMENTS, {"filename_to_delete": filename})
    return removed


def _delete_returning(connection: Connection, statement: Executable, parameters: Mapping[str, Any]) -> list[RemovedRow]:
    rows = connection.execute(statement, parameters)
    return [(model_name, recipe, row_id) for model_name, recipe, row_id in rows]


# --- jobs ---


def put_jobs(connection: Connection, jobs: Sequence[DocumentJob]) -> list[None]:
    """Keep jobs as they are now."""
    connection.execute(statements.PUT_JOB, [_describe_job(job) for job in jobs])
    return [None] * len(jobs)


def _describe_job(job: DocumentJob) -> dict[str, Any]:
    seconds = None if job.response_time is None else (job.response_time - job.stamp.request_time).total_seconds()
    return {
        "id": job.id,
        "state": str(job.state),
        "filename": job.filename,
        "model_name": job.model_name,
        "collection": job.collection,
        "size_in_bytes": job.size_in_bytes,
        "n_sentences": job.n_sentences,
        "source": job.source,
        "document_embedding_id": job.document_row_id,
        "error_code": job.error_code,
        "error_message": job.error_message,
        "ip_address": job.stamp.ip_address,
        "request_time": _without_zone(job.stamp.request_time),
        "response_time": None if job.response_time is None else _without_zone(job.response_time),
        "total_time": seconds,
    }


def delete_jobs(connection: Connection, job_ids: Sequence[str]) -> list[None]:
    """Forget jobs; what they computed stays."""
    for job_id in job_ids:
        connection.execute(statements.DELETE_JOB, {"job_id": job_id})
    return [None] * len(job_ids)


# --- readiness ---


def probe(connection: Connection, requests: Sequence[None]) -> list[None]:
    """Write a page that changes nothing."""
    touch(connection)
    return list(requests)
