"""What the writer does inside a transaction: each function takes several payloads of its kind and answers each.

They neither begin nor end a transaction, and keep nothing between calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha3_256
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, Executable

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    DEFAULT_COLLECTION_ID,
    HELD_BY_DOCUMENTS,
    BulkEmbeddings,
    DocumentJob,
    NewEmbedding,
    NewTokenLevelBundle,
    RequestStamp,
    compute_text_hash,
    compute_token_hash,
    utc_now,
)
from llama_embeddings.errors import InvalidInput, NotFound, Unavailable
from llama_embeddings.storage import filters, full_text, statements
from llama_embeddings.storage.engine import MAX_LIST_LENGTH, touch

Element = TypeVar("Element")

# (model_name, recipe, row id): where an index has to forget what.
RemovedRow = tuple[str, str, int]

_EmbeddingKey = tuple[str, str, str]


# (model_name, recipe, row id, number of tokens).
RemovedBundle = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class Removal:
    """What was forgotten: rows of embeddings, token-level bundles, and documents.

    `n_documents` counts those that only left a collection, too; the ids are of those that are gone.
    """

    rows: list[RemovedRow] = field(default_factory=list)
    bundles: list[RemovedBundle] = field(default_factory=list)
    n_documents: int = 0
    document_ids: list[int] = field(default_factory=list, compare=False)
    document_embedding_ids: list[int] = field(default_factory=list, compare=False)

    def extend(self, other: Removal) -> None:
        """Add what else was forgotten, but for the number of documents."""
        self.rows.extend(other.rows)
        self.bundles.extend(other.bundles)
        self.document_ids.extend(other.document_ids)
        self.document_embedding_ids.extend(other.document_embedding_ids)


@dataclass(frozen=True, slots=True)
class Placement:
    """Rows that are asked for in a collection, from a moment on."""

    row_ids: Sequence[int]
    collection: str
    moment: datetime


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
    ids: dict[_EmbeddingKey, int] = {}
    if rows:
        _check_documents(connection, {row.document_row_id for row in rows} - {None})
        collection_ids = resolve_collections(connection, {row.collection for row in rows})
        for row in rows:
            row_id = statements.INSERT_EMBEDDING.insert_row(connection, _describe_embedding(row, collection_ids))
            if row_id is not None:
                ids[_key(row)] = row_id
        # What was there already, or came twice, is passed over by the insertion.
        if len(ids) < len(rows):
            ids = _place_known(connection, rows, ids, collection_ids)
    return [[ids[_key(row)] for row in batch] for batch in batches]


def _check_documents(connection: Connection, document_row_ids: Collection[int | None]) -> None:
    """Sentences are only stored for a document that is being written: nobody would ever remove them again."""
    if document_row_ids:
        wanted = {"document_embedding_ids": list(document_row_ids)}
        found = connection.execute(statements.FIND_DOCUMENTS_TO_WRITE_FOR, wanted).scalars()
        if set(document_row_ids) - set(found):
            raise Unavailable("The document was deleted while it was being stored. Submit it again.")


def _place_known(
    connection: Connection,
    rows: Sequence[NewEmbedding],
    inserted: Mapping[_EmbeddingKey, int],
    collection_ids: Mapping[str | None, int],
) -> dict[_EmbeddingKey, int]:
    """Ids of all rows; those that had one before are put into the collection that they were sent for."""
    known = _find_embedding_ids(connection, [row for row in rows if _key(row) not in inserted])
    homes = dict(known.values())
    ids = dict(inserted) | {key: row_id for key, (row_id, _) in known.items()}
    wanted = []
    for row in rows:
        row_id, home = ids[_key(row)], _choose_home(row, collection_ids)
        if row_id in homes:
            wanted.append((row_id, home, row.stamp.request_time))
        homes.setdefault(row_id, home)
    # Sentences are put where they belong with their document.
    _place(connection, homes, [(row_id, home, moment) for row_id, home, moment in wanted if home])
    return ids


def _choose_home(row: NewEmbedding, collection_ids: Mapping[str | None, int]) -> int | None:
    return collection_ids[row.collection] if row.is_searchable else None


def import_embeddings(connection: Connection, batches: Sequence[BulkEmbeddings]) -> list[int]:
    """How many rows of each batch were new; those that were there before are put into its collection."""
    return [_import_batch(connection, batch) for batch in batches]


def _import_batch(connection: Connection, batch: BulkEmbeddings) -> int:
    collection_id = resolve_collections(connection, [batch.collection])[batch.collection]
    hashes = [compute_text_hash(text) for text in batch.texts]
    # In the order of the index of hashes, each of its pages is visited once and not once for each row.
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    vectors = np.ascontiguousarray(batch.vectors, dtype="<f4")
    moment = as_text(without_zone(batch.stamp.request_time))
    before = (batch.model_name, batch.recipe)
    after = (0, 0, collection_id, batch.stamp.ip_address, moment, moment, 0, None)
    rows = [(batch.texts[place], hashes[place], *before, vectors[place].data, *after) for place in order]
    n_new = statements.INSERT_EMBEDDING.insert_rows(connection, rows)
    if n_new < len(set(hashes)):
        _place_imported(connection, batch, hashes, collection_id)
    return n_new


def _place_imported(connection: Connection, batch: BulkEmbeddings, hashes: Sequence[str], collection_id: int) -> None:
    homes: dict[int, int | None] = {}
    for part in split(hashes):
        key = {"text_hashes": part, "model_name": batch.model_name, "recipe": batch.recipe}
        rows = connection.execute(statements.FIND_EMBEDDING_IDS, key)
        homes.update((row_id, home) for _, row_id, home in rows)
    _place(connection, homes, [(row_id, collection_id, batch.stamp.request_time) for row_id in homes])


def _find_embedding_ids(
    connection: Connection, rows: Sequence[NewEmbedding]
) -> dict[_EmbeddingKey, tuple[int, int | None]]:
    """Id and collection of rows that are there."""
    hashes_by_group: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        hashes_by_group[row.model_name, row.recipe][row.text_hash] = None
    ids = {}
    for (model_name, recipe), hashes in hashes_by_group.items():
        for part in split(list(hashes)):
            parameters = {"text_hashes": part, "model_name": model_name, "recipe": recipe}
            for text_hash, row_id, home in connection.execute(statements.FIND_EMBEDDING_IDS, parameters):
                ids[text_hash, model_name, recipe] = row_id, home
    return ids


def _key(row: NewEmbedding) -> _EmbeddingKey:
    return row.text_hash, row.model_name, row.recipe


def _describe_embedding(row: NewEmbedding, collection_ids: Mapping[str | None, int]) -> tuple[Any, ...]:
    return (
        row.text,
        row.text_hash,
        row.model_name,
        row.recipe,
        encode_vector(row.vector),
        row.n_tokens,
        row.n_tokens_dropped,
        _choose_home(row, collection_ids),
        *_describe_request(row.stamp, row.response_time),
        row.document_row_id,
    )


@lru_cache(maxsize=64)  # the rows of a request share their times
def describe_times(stamp: RequestStamp, response_time: datetime) -> dict[str, Any]:
    return {
        "ip_address": stamp.ip_address,
        "request_time": without_zone(stamp.request_time),
        "response_time": without_zone(response_time),
        "total_time": (response_time - stamp.request_time).total_seconds(),
    }


@lru_cache(maxsize=64)
def _describe_request(stamp: RequestStamp, response_time: datetime) -> tuple[Any, ...]:
    """The same for a plain statement."""
    times = describe_times(stamp, response_time)
    return times["ip_address"], as_text(times["request_time"]), as_text(times["response_time"]), times["total_time"]


def without_zone(moment: datetime) -> datetime:
    """As times are stored."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def as_text(moment: datetime) -> str:
    """As SQLAlchemy writes it."""
    return moment.isoformat(" ", "microseconds")


# --- collections ---


def resolve_collections(connection: Connection, names: Collection[str | None]) -> dict[str | None, int]:
    """Ids of collections, those made that are new. None is what only documents hold."""
    ids: dict[str | None, int] = {None: HELD_BY_DOCUMENTS, DEFAULT_COLLECTION: DEFAULT_COLLECTION_ID}
    for name in names:
        if name not in ids:
            ids[name] = _find_or_make_collection(connection, str(name))
    return ids


def _find_or_make_collection(connection: Connection, name: str) -> int:
    found = connection.execute(statements.FIND_COLLECTION_ID, {"name": name}).scalar_one_or_none()
    if found is None:
        found = connection.execute(statements.TAKE_COLLECTION_NUMBER).lastrowid
        connection.execute(statements.CLEAR_COLLECTION_NUMBERS)
        row = {"id": found, "name": name, "creation_time": without_zone(utc_now())}
        connection.execute(statements.INSERT_COLLECTION, row)
    return int(found)


def delete_collections(connection: Connection, names: Sequence[str]) -> list[None]:
    """Remove collections. Raises NotFound, and InvalidInput for one that is not empty or cannot be removed."""
    for name in names:
        _delete_collection(connection, name)
    return [None] * len(names)


def _delete_collection(connection: Connection, name: str) -> None:
    found = connection.execute(statements.FIND_COLLECTION_ID, {"name": name}).scalar_one_or_none()
    if found is None:
        raise NotFound(f"There is no collection {name!r}.", field="corpus_identifier_string")
    if found == DEFAULT_COLLECTION_ID:
        message = f"The collection {name!r} cannot be deleted: what names no collection goes there."
        raise InvalidInput(message, field="corpus_identifier_string")
    if connection.execute(statements.IS_COLLECTION_IN_USE, {"collection_id": found}).scalar_one():
        message = f"The collection {name!r} is not empty. Delete its documents and its strings first."
        raise InvalidInput(message, field="corpus_identifier_string")
    connection.execute(statements.DELETE_COLLECTION, {"collection_id_to_delete": found})


def place_embeddings(connection: Connection, placements: Sequence[Placement]) -> list[set[int]]:
    """Put rows that are there into collections; answers which these are. Those that are in already stay in."""
    collection_ids = resolve_collections(connection, {placement.collection for placement in placements})
    found: list[set[int]] = []
    for placement in placements:
        homes: dict[int, int | None] = {}
        for part in split(list(placement.row_ids)):
            rows = connection.execute(statements.FIND_COLLECTION_IDS_OF_ROWS, {"row_ids": part})
            homes.update((row_id, home) for row_id, home in rows)
        found.append(set(homes))
        collection_id = collection_ids[placement.collection]
        _place(connection, homes, [(row_id, collection_id, placement.moment) for row_id in homes])
    return found


def _place(connection: Connection, homes: dict[int, int | None], wanted: Sequence[tuple[int, int, datetime]]) -> None:
    """Put rows into collections from a moment on, beside those that they are in; `homes` has the first of each.

    What was no text before, a query or a sentence of a document that is not there, gets the moment as its date.
    """
    held = [row_id for row_id, home in homes.items() if home == HELD_BY_DOCUMENTS]
    texts_before = set(np.array(held)[filters.do_show(connection, np.array(held))].tolist()) if held else set()
    first, first_and_dated, further, queries = [], [], [], []
    for row_id, collection_id, moment in wanted:
        home = homes[row_id]
        if home is None:
            queries.append(row_id)
        if home is None or home == HELD_BY_DOCUMENTS:
            row = {"row_id": row_id, "new_collection_id": collection_id}
            if row_id in texts_before:
                first.append(row)
            else:
                first_and_dated.append(row | {"new_request_time": without_zone(moment)})
            homes[row_id] = collection_id
        elif collection_id != home:
            further.append({"embedding_id": row_id, "collection_id": collection_id})
    for statement, rows in (
        (statements.SET_COLLECTION, first),
        (statements.SET_COLLECTION_AND_TIME, first_and_dated),
        (statements.INSERT_EMBEDDING_COLLECTIONS, further),
    ):
        if rows:
            connection.execute(statement, rows)
    add_to_full_text(connection, queries)


def add_to_full_text(connection: Connection, row_ids: Sequence[int]) -> None:
    """Take in rows that were only queries until now."""
    for part in split(row_ids):
        rows = connection.execute(statements.FIND_TEXTS_OF_ROWS, {"row_ids": part})
        full_text.add_rows(connection, [(row_id, text) for row_id, text in rows])


# --- token-level bundles ---


def insert_bundles(connection: Connection, new_bundles: Sequence[NewTokenLevelBundle]) -> list[int]:
    """Row ids of the bundles; one that is there already stays as it is."""
    return [_insert_bundle(connection, bundle) for bundle in new_bundles]


def _insert_bundle(connection: Connection, bundle: NewTokenLevelBundle) -> int:
    bundle_id = statements.INSERT_BUNDLE.insert_row(connection, _describe_bundle(bundle))
    if bundle_id is None:
        key = {"text_hash": bundle.text_hash, "model_name": bundle.model_name, "recipe": bundle.recipe}
        known_id: int = connection.execute(statements.FIND_BUNDLE_ID, key).scalar_one()
        return known_id
    statements.INSERT_FEATURE_VECTOR.insert_row(connection, _describe_feature_vector(bundle, bundle_id))
    statements.INSERT_TOKEN.insert_rows(connection, _describe_tokens(bundle, bundle_id))
    return bundle_id


def _describe_bundle(bundle: NewTokenLevelBundle) -> tuple[Any, ...]:
    return (
        bundle.text,
        bundle.text_hash,
        bundle.model_name,
        bundle.recipe,
        len(bundle.tokens),
        bundle.n_tokens_dropped,
        encode_vector(bundle.matrix),
        *_describe_request(bundle.stamp, bundle.response_time),
    )


def _describe_tokens(bundle: NewTokenLevelBundle, bundle_id: int) -> list[tuple[Any, ...]]:
    shared = (
        bundle.model_name,
        bundle.recipe,
        bundle_id,
        *_describe_request(bundle.stamp, bundle.response_time),
    )
    return [
        (token, compute_token_hash(bundle.text_hash, position, token), position, *shared)
        for position, token in enumerate(bundle.tokens)
    ]


def _describe_feature_vector(bundle: NewTokenLevelBundle, bundle_id: int) -> tuple[Any, ...]:
    return (
        bundle_id,
        bundle.model_name,
        bundle.recipe,
        encode_vector(bundle.feature_vector),
        compute_feature_vector_hash(bundle.text_hash, bundle.feature_vector),
    )


# --- forgetting ---


def delete_texts(connection: Connection, texts: Sequence[str]) -> list[Removal]:
    """Remove each text's embeddings and token-level bundles under every model and recipe."""
    return [_delete_text(connection, text) for text in texts]


def _delete_text(connection: Connection, text: str) -> Removal:
    key = {"text_hash_to_delete": compute_text_hash(text)}
    bundles = _fetch_bundles(connection, statements.DELETE_BUNDLES_OF_TEXT, key)
    rows = delete_embeddings(connection, statements.DELETE_EMBEDDINGS_OF_TEXT, key)
    return Removal([row for row, _ in rows], bundles)


def delete_bundles_of_gone_texts(connection: Connection, texts: Collection[str]) -> list[RemovedBundle]:
    """Remove the token-level bundles of texts that no row has any more."""
    bundles: list[RemovedBundle] = []
    for part in split([compute_text_hash(text) for text in texts]):
        bundles.extend(_fetch_bundles(connection, statements.DELETE_BUNDLES_OF_GONE_TEXTS, {"text_hashes": part}))
    return bundles


def _fetch_bundles(connection: Connection, statement: Executable, parameters: Mapping[str, Any]) -> list[RemovedBundle]:
    return [
        (model_name, recipe, row_id, n) for model_name, recipe, row_id, n in connection.execute(statement, parameters)
    ]


def delete_embeddings(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any]
) -> list[tuple[RemovedRow, str]]:
    """Remove rows by a statement that returns what has to be known of them, and their words with them.

    Answers the rows with their texts.
    """
    rows = connection.execute(statement, parameters).all()
    full_text.remove_rows(connection, [(row_id, text) for _, _, row_id, text in rows])
    return [((model_name, recipe, row_id), text) for model_name, recipe, row_id, text in rows]


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
        "request_time": without_zone(job.stamp.request_time),
        "response_time": None if job.response_time is None else without_zone(job.response_time),
        "total_time": seconds,
    }


def delete_jobs(connection: Connection, groups: Sequence[Sequence[str]]) -> list[None]:
    """Forget jobs by their ids; what they computed stays."""
    for part in split([job_id for group in groups for job_id in group]):
        connection.execute(statements.DELETE_JOBS, {"job_ids": part})
    return [None] * len(groups)


# --- snapshots of indexes ---


def put_snapshot_numbers(connection: Connection, snapshots: Sequence[tuple[str, str, str]]) -> list[None]:
    """Know of snapshots by model name, recipe family and number."""
    for model_name, family, number in snapshots:
        row = {"model_name": model_name, "family": family, "number": number}
        connection.execute(statements.PUT_SNAPSHOT_NUMBER, row)
    return [None] * len(snapshots)


# --- readiness ---


def probe(connection: Connection, requests: Sequence[None]) -> list[None]:
    """Write a page that changes nothing."""
    touch(connection)
    return list(requests)
