"""The store's SQL, as SQLAlchemy Core statements with named parameters.

Columns come out in the order in which `store.py` and `writes.py` unpack them. Vectors are selected and bound
as plain bytes. Nothing here runs anything.
"""

from __future__ import annotations

from typing import cast

from sqlalchemy import (
    LargeBinary,
    Select,
    Table,
    bindparam,
    delete,
    exists,
    func,
    literal,
    null,
    select,
    type_coerce,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from embeddings_data_models import (
    Document,
    DocumentEmbedding,
    DocumentJobRow,
    DocumentSentence,
    TextEmbedding,
    TokenLevelEmbedding,
    TokenLevelEmbeddingBundle,
    TokenLevelEmbeddingBundleCombinedFeatureVector,
)
from llama_embeddings.storage.engine import insert_or_overwrite, insert_unless_present

embeddings = cast(Table, TextEmbedding.__table__)
documents = cast(Table, Document.__table__)
document_embeddings = cast(Table, DocumentEmbedding.__table__)
document_sentences = cast(Table, DocumentSentence.__table__)
document_jobs = cast(Table, DocumentJobRow.__table__)
bundles = cast(Table, TokenLevelEmbeddingBundle.__table__)
tokens = cast(Table, TokenLevelEmbedding.__table__)
feature_vectors = cast(Table, TokenLevelEmbeddingBundleCombinedFeatureVector.__table__)


def _as_bytes(column: ColumnElement[object]) -> ColumnElement[bytes]:
    # The column's own type would call Python once a row only to wrap the same bytes.
    return type_coerce(column, LargeBinary)


def _is_any_of(column: ColumnElement[object], parameter: str) -> ColumnElement[bool]:
    return column.in_(bindparam(parameter, expanding=True))


_IS_WANTED_RECIPE = (embeddings.c.model_name == bindparam("model_name"), embeddings.c.recipe == bindparam("recipe"))

# --- embeddings ---

FIND_EMBEDDINGS = select(
    embeddings.c.id,
    embeddings.c.text_hash,
    _as_bytes(embeddings.c.embedding),
    embeddings.c.n_tokens,
    embeddings.c.n_tokens_dropped,
).where(_is_any_of(embeddings.c.text_hash, "text_hashes"), *_IS_WANTED_RECIPE)

FIND_EMBEDDING_IDS = select(embeddings.c.text_hash, embeddings.c.id).where(
    _is_any_of(embeddings.c.text_hash, "text_hashes"), *_IS_WANTED_RECIPE
)

INSERT_EMBEDDINGS = (
    insert_unless_present(embeddings)
    .values(
        {
            "text": bindparam("text"),
            "text_hash": bindparam("text_hash"),
            "model_name": bindparam("model_name"),
            "recipe": bindparam("recipe"),
            "embedding": bindparam("embedding", type_=LargeBinary),
            "n_tokens": bindparam("n_tokens"),
            "n_tokens_dropped": bindparam("n_tokens_dropped"),
            "ip_address": bindparam("ip_address"),
            "request_time": bindparam("request_time"),
            "response_time": bindparam("response_time"),
            "total_time": bindparam("total_time"),
        }
    )
    .returning(embeddings.c.id, embeddings.c.text_hash, embeddings.c.model_name, embeddings.c.recipe)
)

READ_TEXT_HASHES = (
    select(embeddings.c.id, embeddings.c.text_hash)
    .where(embeddings.c.id > bindparam("after_row_id"))
    .order_by(embeddings.c.id)
    .limit(bindparam("limit"))
)

FIND_TEXTS_OF_ROWS = select(embeddings.c.id, embeddings.c.text).where(_is_any_of(embeddings.c.id, "row_ids"))

COUNT_ROWS_PRESENT = select(func.count()).select_from(embeddings).where(_is_any_of(embeddings.c.id, "row_ids"))

COUNT_BY_GROUP = (
    select(embeddings.c.model_name, embeddings.c.recipe, func.count())
    .group_by(embeddings.c.model_name, embeddings.c.recipe)
    .order_by(embeddings.c.model_name, embeddings.c.recipe)
)

READ_VECTORS = (
    select(embeddings.c.id, _as_bytes(embeddings.c.embedding))
    .where(*_IS_WANTED_RECIPE, embeddings.c.id > bindparam("after_row_id"))
    .order_by(embeddings.c.id)
    .limit(bindparam("limit"))
)

DELETE_EMBEDDINGS_OF_TEXT = (
    delete(embeddings)
    .where(embeddings.c.text_hash == bindparam("text_hash_to_delete"))
    .returning(embeddings.c.model_name, embeddings.c.recipe, embeddings.c.id)
)

COUNT_ROWS = select(
    select(func.count()).select_from(embeddings).scalar_subquery(),
    select(func.count()).select_from(bundles).scalar_subquery(),
    select(func.count()).select_from(documents).scalar_subquery(),
)


def list_texts(model_name: str | None, limit: int | None, offset: int) -> Select[tuple[str]]:
    """Each distinct text once, in the order in which it came first."""
    # The first row of each text is found in an index alone; texts are then read only for the part asked for.
    first_rows = select(func.min(embeddings.c.id).label("id")).group_by(embeddings.c.text_hash)
    if model_name is not None:
        # An expression, so that the unique index is read from end to end. It has all that is needed; the index on
        # the model's name would fetch the hash of every row from the table, which takes five times as long.
        first_rows = first_rows.where(embeddings.c.model_name + literal("") == model_name)
    part = first_rows.order_by(func.min(embeddings.c.id)).limit(limit).offset(offset).subquery()
    return select(embeddings.c.text).join(part, part.c.id == embeddings.c.id).order_by(embeddings.c.id)


# --- token-level bundles ---

FIND_BUNDLE = (
    select(
        bundles.c.id,
        _as_bytes(bundles.c.embeddings),
        _as_bytes(feature_vectors.c.combined_feature_vector),
        bundles.c.n_tokens,
        bundles.c.n_tokens_dropped,
    )
    .join(feature_vectors, feature_vectors.c.token_level_embedding_bundle_id == bundles.c.id)
    .where(
        bundles.c.input_text_hash == bindparam("text_hash"),
        bundles.c.model_name == bindparam("model_name"),
        bundles.c.recipe == bindparam("recipe"),
    )
)

FIND_BUNDLE_ID = select(bundles.c.id).where(
    bundles.c.input_text_hash == bindparam("text_hash"),
    bundles.c.model_name == bindparam("model_name"),
    bundles.c.recipe == bindparam("recipe"),
)

FIND_TOKENS = (
    select(tokens.c.token)
    .where(tokens.c.token_level_embedding_bundle_id == bindparam("bundle_id"))
    .order_by(tokens.c.position)
)

INSERT_BUNDLE = insert_unless_present(bundles)
INSERT_TOKENS = insert_unless_present(tokens)
INSERT_FEATURE_VECTOR = insert_unless_present(feature_vectors)

DELETE_BUNDLES_OF_TEXT = delete(bundles).where(bundles.c.input_text_hash == bindparam("text_hash_to_delete"))

# --- documents ---

_IS_WANTED_DOCUMENT_EMBEDDING = (
    document_embeddings.c.file_hash == bindparam("file_hash"),
    document_embeddings.c.model_name == bindparam("model_name"),
    document_embeddings.c.recipe == bindparam("recipe"),
    document_embeddings.c.segmentation == bindparam("segmentation"),
    document_embeddings.c.filename == bindparam("filename"),
)

FIND_DOCUMENT_EMBEDDING = select(document_embeddings.c.id).where(*_IS_WANTED_DOCUMENT_EMBEDDING)

_SENTENCES_OF_DOCUMENT = document_sentences.c.document_embedding_id == document_embeddings.c.id

DESCRIBE_DOCUMENT_EMBEDDING = select(
    document_embeddings.c.filename,
    document_embeddings.c.mimetype,
    document_embeddings.c.n_sentences,
    select(func.count()).where(_SENTENCES_OF_DOCUMENT).correlate(document_embeddings).scalar_subquery(),
    select(func.count(document_sentences.c.page))
    .where(_SENTENCES_OF_DOCUMENT)
    .correlate(document_embeddings)
    .scalar_subquery(),
    select(func.length(embeddings.c.embedding))
    .join(document_sentences, document_sentences.c.embedding_id == embeddings.c.id)
    .where(_SENTENCES_OF_DOCUMENT, document_sentences.c.position == 0)
    .correlate(document_embeddings)
    .scalar_subquery(),
).where(document_embeddings.c.id == bindparam("document_embedding_id"))

_IS_PART_OF_DOCUMENT = (
    document_sentences.c.document_embedding_id == bindparam("document_embedding_id"),
    document_sentences.c.position >= bindparam("first"),
    document_sentences.c.position < bindparam("end_position"),
)

READ_SENTENCES = (
    select(embeddings.c.text, document_sentences.c.page, document_sentences.c.start, document_sentences.c.end)
    .join(embeddings, embeddings.c.id == document_sentences.c.embedding_id)
    .where(*_IS_PART_OF_DOCUMENT)
    .order_by(document_sentences.c.position)
)

READ_SENTENCE_VECTORS = (
    select(_as_bytes(embeddings.c.embedding))
    .join(document_sentences, embeddings.c.id == document_sentences.c.embedding_id)
    .where(*_IS_PART_OF_DOCUMENT)
    .order_by(document_sentences.c.position)
)

MEASURE_LONGEST_SENTENCE = (
    select(func.coalesce(func.max(func.length(embeddings.c.text)), 0))
    .join(document_sentences, embeddings.c.id == document_sentences.c.embedding_id)
    .where(document_sentences.c.document_embedding_id == bindparam("document_embedding_id"))
)

FIND_DOCUMENT_ID = select(documents.c.id).where(
    documents.c.document_hash == bindparam("file_hash"),
    documents.c.model_name == bindparam("model_name"),
    documents.c.filename == bindparam("filename"),
)

INSERT_DOCUMENT = insert_unless_present(documents)
INSERT_DOCUMENT_EMBEDDING = insert_unless_present(document_embeddings)
INSERT_SENTENCES = document_sentences.insert()

DELETE_SENTENCES = delete(document_sentences).where(
    document_sentences.c.document_embedding_id == bindparam("old_document_embedding_id")
)

# A row belongs to the first document that holds it.
CLAIM_SENTENCES = (
    update(embeddings)
    .where(
        embeddings.c.document_id.is_(null()),
        embeddings.c.id.in_(
            select(document_sentences.c.embedding_id).where(
                document_sentences.c.document_embedding_id == bindparam("holder_id")
            )
        ),
    )
    .values(document_id=bindparam("holder_id"))
)

FIND_DOCUMENT_EMBEDDINGS_OF_FILENAME = (
    select(document_embeddings.c.id)
    .join(documents, documents.c.id == document_embeddings.c.document_id)
    .where(documents.c.filename == bindparam("filename"))
)

# In the next two, `doomed` are the document_embeddings that go; others may hold the same rows.
_HELD_BY_OTHERS = (
    document_sentences.c.embedding_id == embeddings.c.id,
    document_sentences.c.document_embedding_id.not_in(bindparam("doomed", expanding=True)),
)

DELETE_SENTENCES_NOBODY_ELSE_HOLDS = (
    delete(embeddings)
    .where(_is_any_of(embeddings.c.document_id, "doomed"), ~exists().where(*_HELD_BY_OTHERS))
    .returning(embeddings.c.model_name, embeddings.c.recipe, embeddings.c.id)
)

HAND_ON_SENTENCES = (
    update(embeddings)
    .where(_is_any_of(embeddings.c.document_id, "doomed"))
    .values(
        document_id=select(func.min(document_sentences.c.document_embedding_id))
        .where(*_HELD_BY_OTHERS)
        .correlate(embeddings)
        .scalar_subquery()
    )
)

DELETE_DOCUMENTS = delete(documents).where(documents.c.filename == bindparam("filename_to_delete"))


def list_filenames(model_name: str | None, limit: int | None, offset: int) -> Select[tuple[str]]:
    """Each distinct file name once, in the order in which it came first."""
    statement = select(documents.c.filename).group_by(documents.c.filename).order_by(func.min(documents.c.id))
    if model_name is not None:
        statement = statement.where(documents.c.model_name == model_name)
    return statement.limit(limit).offset(offset)


# --- jobs ---

PUT_JOB = insert_or_overwrite(document_jobs)

DELETE_JOB = delete(document_jobs).where(document_jobs.c.id == bindparam("job_id"))

LIST_JOBS = select(
    document_jobs.c.id,
    document_jobs.c.state,
    document_jobs.c.filename,
    document_jobs.c.model_name,
    document_jobs.c.collection,
    document_jobs.c.size_in_bytes,
    document_jobs.c.ip_address,
    document_jobs.c.request_time,
    document_jobs.c.response_time,
    document_jobs.c.n_sentences,
    document_jobs.c.source,
    document_jobs.c.document_embedding_id,
    document_jobs.c.error_code,
    document_jobs.c.error_message,
).order_by(document_jobs.c.request_time, document_jobs.c.id)
