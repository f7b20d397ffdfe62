"""How documents come and go: by parts that hold up no other write for long, and all the same as a whole.

    begin -> write a part, again and again -> publish          hide -> remove a part, again and again
             nobody sees any of it            all is seen       nothing is seen any more

What a document consists of shows if the document's state says so, and the state changes in one small transaction. One
version can take another's place in the same moment: publishing hides those that it replaces. What is half done when the
process ends does not show, and is gone on with or removed later.

Like `writes.py`: each function takes several payloads and answers each, inside a transaction that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any

import numpy as np
from sqlalchemy import Connection

from embeddings_data_models import HELD_BY_DOCUMENTS, DocumentState, NewDocument, SentencePlaces
from llama_embeddings.errors import NotFound, Unavailable
from llama_embeddings.storage import filters, statements
from llama_embeddings.storage.engine import fetch_by_ids, update_by_ids
from llama_embeddings.storage.statements import DocumentSelection
from llama_embeddings.storage.writes import (
    Removal,
    add_to_full_text,
    as_text,
    delete_bundles_of_gone_texts,
    delete_embeddings,
    describe_times,
    resolve_collections,
    without_zone,
)

# How long a part holds up other writes, and how many rows are dealt with before the clock is looked at.
SECONDS_PER_PART = 0.04
ROWS_PER_STEP = 250
# Rows without vectors or texts, of which a second has a hundred thousand.
SENTENCES_PER_STEP = 2_000


@dataclass(frozen=True, slots=True)
class SentencePart:
    """Sentences of a document from a position on: so many as fit into a part are written."""

    document_row_id: int
    places: SentencePlaces
    first: int
    moment: datetime


@dataclass(frozen=True, slots=True)
class Publication:
    """A document that has been written. `replaced_row_ids` are other documents' whose place it takes."""

    document_row_id: int
    document: NewDocument
    replaced_row_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class LeftoverSelection:
    """Documents that were begun and not touched since a moment, but for some; only those of `documents` if given."""

    untouched_since: datetime
    excepted: Sequence[int]
    documents: DocumentSelection | None = None


@dataclass(frozen=True, slots=True)
class HiddenDocuments:
    """How many documents were asked for, and what has to be removed of them."""

    n_documents: int
    row_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RemovedPart:
    """What is gone, and whether that was all of a document."""

    removal: Removal
    is_last: bool


# --- coming ---


def begin_documents(connection: Connection, new_documents: Sequence[NewDocument]) -> list[int]:
    """Row ids (of document_embeddings) of documents that will be written; an earlier attempt is gone on with.

    Raises Unavailable for one that is just being removed.
    """
    return [_begin_document(connection, document) for document in new_documents]


def _begin_document(connection: Connection, document: NewDocument) -> int:
    key = {"file_hash": document.file_hash, "model_name": document.model_name, "filename": document.filename}
    connection.execute(statements.INSERT_DOCUMENT, _describe_document(document))
    document_id = connection.execute(statements.FIND_DOCUMENT_ID, key).scalar_one()
    _place_document(connection, document_id, document.collection)
    key |= {"recipe": document.recipe, "segmentation": document.segmentation}
    found = connection.execute(statements.FIND_DOCUMENT_EMBEDDING_IN_ANY_STATE, key).one_or_none()
    if found is None:
        row = _describe_document_embedding(document, document_id)
        return connection.execute(statements.INSERT_DOCUMENT_EMBEDDING, row).lastrowid
    row_id, state = found
    if state == DocumentState.BEING_REMOVED:
        raise Unavailable("The document is just being deleted. Submit it again.")
    connection.execute(
        statements.TOUCH_DOCUMENT_EMBEDDING, {"touched_id": row_id, "moment": without_zone(document.response_time)}
    )
    return int(row_id)


def write_sentences(connection: Connection, parts: Sequence[SentencePart]) -> list[int]:
    """Write sentences of documents; answers up to which position.

    Raises Unavailable if one was deleted since it was stored.
    """
    return [_write_part(connection, part) for part in parts]


def _write_part(connection: Connection, part: SentencePart) -> int:
    deadline = monotonic() + SECONDS_PER_PART
    position = part.first
    while position < len(part.places):
        rows = _describe_sentences(part.places, part.document_row_id, position)
        _claim_rows(connection, part, list({row["embedding_id"] for row in rows}))
        connection.execute(statements.PUT_SENTENCE, rows)
        position += len(rows)
        if monotonic() >= deadline:
            break
    return position


def _claim_rows(connection: Connection, part: SentencePart, row_ids: list[int]) -> None:
    """Let rows go with the document; what was no text until now becomes one by it."""
    rows = fetch_by_ids(connection, "id, collection_id, document_id, request_time", "embeddings", row_ids)
    if len(rows) < len(row_ids):
        raise Unavailable("A sentence of the document was deleted while the document was stored. Submit it again.")
    unclaimed = [row_id for row_id, _, holder, _ in rows if holder is None]
    queries = [row_id for row_id, home, _, _ in rows if home is None]
    moment = without_zone(part.moment)
    limit = as_text(moment)
    earlier = np.array([row[0] for row in rows if row[1] == HELD_BY_DOCUMENTS and row[3] and row[3] < limit], np.int64)
    unseen = earlier[~filters.do_show(connection, earlier)].tolist() if len(earlier) else []
    if unclaimed:
        update_by_ids(connection, "embeddings", "document_id", part.document_row_id, unclaimed)
    if queries or unseen:
        change = {"new_collection_id": HELD_BY_DOCUMENTS, "new_request_time": moment}
        changes = [{"row_id": row_id} | change for row_id in (*queries, *unseen)]
        connection.execute(statements.SET_COLLECTION_AND_TIME, changes)
    add_to_full_text(connection, queries)


def shorten_documents(connection: Connection, lengths: Sequence[tuple[int, int]]) -> list[None]:
    """Remove the places behind the last sentence of documents, which an earlier attempt wrote."""
    for row_id, n_sentences in lengths:
        bounds = {"shortened_id": row_id, "n_sentences_kept": n_sentences}
        connection.execute(statements.DELETE_SENTENCES_BEYOND, bounds)
    return [None] * len(lengths)


def publish_documents(connection: Connection, publications: Sequence[Publication]) -> list[None]:
    """Let documents show whose sentences are all written, and hide those that they replace.

    Raises NotFound for a document that was deleted meanwhile, Unavailable if one of its sentences was.
    """
    for publication in publications:
        _publish_document(connection, publication)
    return [None] * len(publications)


def _publish_document(connection: Connection, publication: Publication) -> None:
    document, row_id = publication.document, publication.document_row_id
    key = {"document_embedding_id": row_id}
    state = connection.execute(statements.READ_DOCUMENT_STATE, key).scalar_one_or_none()
    if state is None or state == DocumentState.BEING_REMOVED:
        raise NotFound(DELETED_MEANWHILE)
    n_sentences = len(document.places)
    if connection.execute(statements.COUNT_SENTENCES, key).scalar_one() != n_sentences:
        raise Unavailable("A sentence of the document was deleted while the document was stored. Submit it again.")
    times = describe_times(document.stamp, document.response_time)
    changes = {
        "published_id": row_id,
        "final_n_sentences": n_sentences,
        "final_file_data": document.file_data,
        "final_response_time": times["response_time"],
        "final_total_time": times["total_time"],
    }
    connection.execute(statements.PUBLISH_DOCUMENT_EMBEDDING, changes)
    if publication.replaced_row_ids:
        connection.execute(
            statements.HIDE_DOCUMENT_EMBEDDINGS, {"document_embedding_ids": list(publication.replaced_row_ids)}
        )


DELETED_MEANWHILE = "The document was deleted while it was being embedded. Submit it again if it is wanted after all."


def place_documents(connection: Connection, placements: Sequence[tuple[int, str]]) -> list[None]:
    """Put documents, by the id of their `document_embeddings`, into a collection; one that is gone is passed over."""
    for row_id, collection in placements:
        key = {"document_embedding_id": row_id}
        document_id = connection.execute(statements.FIND_DOCUMENT_ID_OF_EMBEDDING, key).scalar_one_or_none()
        if document_id is not None:
            _place_document(connection, document_id, collection)
    return [None] * len(placements)


def _place_document(connection: Connection, document_id: int, collection: str) -> None:
    collection_id = resolve_collections(connection, [collection])[collection]
    row = {"document_id": document_id, "collection_id": collection_id}
    connection.execute(statements.INSERT_DOCUMENT_COLLECTION, row)


def _describe_document(document: NewDocument) -> dict[str, Any]:
    return {
        "filename": document.filename,
        "mimetype": document.mimetype,
        "model_name": document.model_name,
        "document_hash": document.file_hash,
        **describe_times(document.stamp, document.response_time),
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
        "n_sentences": 0,
        "file_data": None,
        "state": DocumentState.BEING_WRITTEN,
        **describe_times(document.stamp, document.response_time),
    }


def _describe_sentences(places: SentencePlaces, row_id: int, first: int) -> list[dict[str, Any]]:
    part = slice(first, first + ROWS_PER_STEP)
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


# --- going ---


def hide_documents(connection: Connection, selections: Sequence[DocumentSelection]) -> list[HiddenDocuments]:
    """Let documents show no more, also those that are just being written; what they consist of is to be removed.

    Of a document that is in several collections, one that was selected by one of them only leaves that one.
    """
    return [_hide_documents(connection, selection) for selection in selections]


def _hide_documents(connection: Connection, selection: DocumentSelection) -> HiddenDocuments:
    statement = statements.find_document_ids(selection)
    selected = list(connection.execute(statement).scalars())
    doomed = _leave_collection(connection, selected, selection.collection) if selection.collection else selected
    if not doomed:
        return HiddenDocuments(len(selected), [])
    connection.execute(statements.HIDE_DOCUMENTS, {"document_ids": doomed})
    found = connection.execute(statements.FIND_EMBEDDINGS_OF_DOCUMENTS, {"document_ids": doomed})
    return HiddenDocuments(len(selected), list(found.scalars()))


def _leave_collection(connection: Connection, document_ids: list[int], collection: str) -> list[int]:
    """Take documents out of a collection; those that are in no other are left to be removed."""
    connection.execute(statements.DELETE_DOCUMENT_COLLECTION, {"document_ids": document_ids, "name": collection})
    found = connection.execute(statements.FIND_DOCUMENTS_WITH_COLLECTION, {"document_ids": document_ids})
    remaining = set(found.scalars())
    return [document_id for document_id in document_ids if document_id not in remaining]


def hide_leftovers(connection: Connection, selections: Sequence[LeftoverSelection]) -> list[list[int]]:
    """Mark for removal what was begun and never finished; answers what is to be removed.

    Documents that a job waits for or works at are left alone.
    """
    found: list[list[int]] = []
    for selection in selections:
        statement = statements.find_leftovers(without_zone(selection.untouched_since), selection.documents)
        rows = set(connection.execute(statement).scalars()) - set(selection.excepted)
        found.append(sorted(rows))
        if rows:
            connection.execute(statements.HIDE_DOCUMENT_EMBEDDINGS, {"document_embedding_ids": found[-1]})
    return found


def remove_documents(connection: Connection, row_ids: Sequence[int]) -> list[RemovedPart]:
    """Remove a part of each hidden document, with the sentences that nobody else holds: no other document, and no
    collection by itself. With a sentence go the embeddings of its tokens, unless another row has the same text."""
    return [_remove_part(connection, row_id) for row_id in row_ids]


def _remove_part(connection: Connection, row_id: int) -> RemovedPart:
    deadline = monotonic() + SECONDS_PER_PART
    removed = Removal(document_embedding_ids=[row_id])
    while True:
        n_rows = _remove_rows(connection, row_id, removed)
        if n_rows == 0 and not _remove_sentences(connection, row_id):
            found = connection.execute(statements.DELETE_DOCUMENT_EMBEDDING, {"removed_id": row_id})
            for document_id in found.scalars().all():
                connection.execute(statements.DELETE_DOCUMENT_WITHOUT_VERSIONS, {"document_id": document_id})
                removed.document_ids.append(document_id)
            return RemovedPart(removed, is_last=True)
        if monotonic() >= deadline:
            return RemovedPart(removed, is_last=False)


def _remove_rows(connection: Connection, row_id: int, removed: Removal) -> int:
    """Remove or hand on the next rows that note the document as their holder; answers how many there were."""
    parameters = {"document_embedding_id": row_id, "limit": ROWS_PER_STEP}
    found = connection.execute(statements.FIND_ROWS_OF_DOCUMENT, parameters).all()
    _let_go(connection, found, removed)
    return len(found)


def remove_strays(connection: Connection, groups: Sequence[Sequence[int]]) -> list[Removal]:
    """Remove rows that were stored for a document and do not stand in it, unless somebody else holds them."""
    answers: list[Removal] = []
    for row_ids in groups:
        removed = Removal()
        _let_go(connection, connection.execute(statements.FIND_STRAYS, {"row_ids": row_ids}).all(), removed)
        answers.append(removed)
    return answers


def _let_go(connection: Connection, found: Sequence[Any], removed: Removal) -> None:
    """Rows with their collection and another document that holds them: remove those that have neither."""
    doomed, kept = [], []
    for embedding_id, home, other_holder in found:
        if other_holder is None and home in (None, HELD_BY_DOCUMENTS):
            doomed.append(embedding_id)
        else:
            kept.append({"claimed_row_id": embedding_id, "claiming_document_id": other_holder})
    if doomed:
        rows = delete_embeddings(connection, statements.DELETE_ROWS, {"row_ids": doomed})
        removed.rows.extend(row for row, _ in rows)
        removed.bundles.extend(delete_bundles_of_gone_texts(connection, {text for _, text in rows}))
    if kept:
        connection.execute(statements.CLAIM_SENTENCE, kept)


def _remove_sentences(connection: Connection, row_id: int) -> bool:
    """Remove the last places of sentences; answers whether there were any."""
    last = connection.execute(statements.FIND_LAST_SENTENCE, {"document_embedding_id": row_id}).scalar_one()
    if last is None:
        return False
    bounds = {"shortened_id": row_id, "n_sentences_kept": last + 1 - SENTENCES_PER_STEP}
    connection.execute(statements.DELETE_SENTENCES_BEYOND, bounds)
    return True
