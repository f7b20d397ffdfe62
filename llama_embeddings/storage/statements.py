"""The store's SQL, as SQLAlchemy Core statements with named parameters.

Columns come out in the order in which `store.py` and `writes.py` unpack them. Vectors are selected and bound
as plain bytes. Nothing here runs anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import (
    CompoundSelect,
    LargeBinary,
    ScalarSelect,
    Select,
    Table,
    TextClause,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
    type_coerce,
    union,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from embeddings_data_models import (
    HELD_BY_DOCUMENTS,
    Collection,
    CollectionNumber,
    Document,
    DocumentCollection,
    DocumentEmbedding,
    DocumentJobRow,
    DocumentSentence,
    DocumentState,
    EmbeddingCollection,
    FullTextProgress,
    IndexSnapshot,
    JobState,
    RowChange,
    TextEmbedding,
    TokenLevelEmbedding,
    TokenLevelEmbeddingBundle,
    TokenLevelEmbeddingBundleCombinedFeatureVector,
)
from llama_embeddings.storage.engine import PlainInsert, insert_or_overwrite, insert_unless_present

collections = cast(Table, Collection.__table__)
collection_numbers = cast(Table, CollectionNumber.__table__)
embeddings = cast(Table, TextEmbedding.__table__)
embedding_collections = cast(Table, EmbeddingCollection.__table__)
document_collections = cast(Table, DocumentCollection.__table__)
index_snapshots = cast(Table, IndexSnapshot.__table__)
row_changes = cast(Table, RowChange.__table__)
full_text_progress = cast(Table, FullTextProgress.__table__)
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


def _make_read_digits(table: Table, column: str) -> TextClause:
    """Digits of the next hashes of a table, put together, and the last of these hashes.

    In the order of the unique index, which has all that is needed: the table itself is twenty times as large. Put
    together by SQLite, as a million values of their own take Python four times as long.
    """
    return text(f"""
        SELECT coalesce(max(hash), ''), coalesce(group_concat(substr(hash, 1 + :first_digit, :n_digits), ''), '')
        FROM (
            SELECT {column} AS hash FROM {table.name}
            WHERE {column} > :after_hash
            ORDER BY {column}
            LIMIT :limit
        ) AS page
    """)  # noqa: S608 - the program's own words


# Of a row that a request made; see `writes._describe_request`.
_REQUEST_COLUMNS = ("ip_address", "request_time", "response_time", "total_time")

_IS_WANTED_RECIPE = (embeddings.c.model_name == bindparam("model_name"), embeddings.c.recipe == bindparam("recipe"))

# --- what shows ---
# A text shows if it was asked for as one, or stands in a document that is there. Large documents are written and
# removed by parts; one column says whether they are there.

_IS_THERE = document_embeddings.c.state == DocumentState.THERE
# With the number in it, so that the index of these is used.
_IS_NOT_THERE = document_embeddings.c.state != literal_column(f"{DocumentState.THERE:d}")

_STANDS_IN_A_DOCUMENT = (
    select(literal(1))
    .select_from(document_sentences)
    .join(document_embeddings, document_embeddings.c.id == document_sentences.c.document_embedding_id)
    .where(document_sentences.c.embedding_id == embeddings.c.id, _IS_THERE)
    .correlate(embeddings)
    .exists()
)


def has_a_version_that_is_there() -> ColumnElement[bool]:
    """Of a row of `documents`."""
    return exists().where(document_embeddings.c.document_id == documents.c.id, _IS_THERE)


HAS_HIDDEN_DOCUMENTS = select(exists().where(_IS_NOT_THERE))

# Rows that only documents hold which are not there. Those of documents that are there are not looked at.
HIDDEN_ROW_IDS = select(embeddings.c.id).where(
    embeddings.c.document_id.in_(select(document_embeddings.c.id).where(_IS_NOT_THERE)),
    embeddings.c.collection_id == HELD_BY_DOCUMENTS,
    ~_STANDS_IN_A_DOCUMENT,
)

# The same for `fetch_by_ids`.
SHOWS_AS_TEXT = f"""(
    collection_id > {HELD_BY_DOCUMENTS} OR collection_id = {HELD_BY_DOCUMENTS} AND EXISTS (
        SELECT 1 FROM document_sentences
        JOIN document_embeddings ON document_embeddings.id = document_sentences.document_embedding_id
        WHERE document_sentences.embedding_id = embeddings.id AND document_embeddings.state = {DocumentState.THERE:d}
    )
)"""  # noqa: S608 - the program's own words

# --- collections ---

FIND_COLLECTION_ID = select(collections.c.id).where(collections.c.name == bindparam("name"))
INSERT_COLLECTION = insert_unless_present(collections)
READ_COLLECTION_NAMES = select(collections.c.id, collections.c.name).where(
    _is_any_of(collections.c.id, "collection_ids")
)
TAKE_COLLECTION_NUMBER = collection_numbers.insert()
CLEAR_COLLECTION_NUMBERS = delete(collection_numbers)
DELETE_COLLECTION = delete(collections).where(collections.c.id == bindparam("collection_id_to_delete"))
# The second condition lets the index that holds named collections only be used.
IS_COLLECTION_IN_USE = select(
    or_(
        exists().where(
            embeddings.c.collection_id == bindparam("collection_id"), embeddings.c.collection_id > literal_column("1")
        ),
        exists().where(embedding_collections.c.collection_id == bindparam("collection_id")),
        exists().where(document_collections.c.collection_id == bindparam("collection_id")),
    )
)

INSERT_EMBEDDING_COLLECTIONS = insert_unless_present(embedding_collections)
INSERT_DOCUMENT_COLLECTION = insert_unless_present(document_collections)

SET_COLLECTION = (
    update(embeddings)
    .where(embeddings.c.id == bindparam("row_id"))
    .values(collection_id=bindparam("new_collection_id"))
)

# A row of what was not a text before: dates are asked for by the moment from which it is one.
SET_COLLECTION_AND_TIME = (
    update(embeddings)
    .where(embeddings.c.id == bindparam("row_id"))
    .values(collection_id=bindparam("new_collection_id"), request_time=bindparam("new_request_time"))
)

FIND_COLLECTION_IDS_OF_ROWS = select(embeddings.c.id, embeddings.c.collection_id).where(
    _is_any_of(embeddings.c.id, "row_ids")
)

FIND_COLLECTIONS_OF_DOCUMENT = (
    select(collections.c.name)
    .join(document_collections, document_collections.c.collection_id == collections.c.id)
    .join(document_embeddings, document_embeddings.c.document_id == document_collections.c.document_id)
    .where(document_embeddings.c.id == bindparam("document_embedding_id"))
)

# --- embeddings ---

_FURTHER_COLLECTION_IDS = (
    select(func.group_concat(embedding_collections.c.collection_id))
    .where(embedding_collections.c.embedding_id == embeddings.c.id)
    .correlate(embeddings)
    .scalar_subquery()
)

FIND_EMBEDDINGS = select(
    embeddings.c.id,
    embeddings.c.text_hash,
    _as_bytes(embeddings.c.embedding),
    embeddings.c.n_tokens,
    embeddings.c.n_tokens_dropped,
    embeddings.c.collection_id,
    _FURTHER_COLLECTION_IDS,
).where(_is_any_of(embeddings.c.text_hash, "text_hashes"), *_IS_WANTED_RECIPE)

FIND_EMBEDDING_IDS = select(embeddings.c.text_hash, embeddings.c.id, embeddings.c.collection_id).where(
    _is_any_of(embeddings.c.text_hash, "text_hashes"), *_IS_WANTED_RECIPE
)

INSERT_EMBEDDING = PlainInsert.into(
    embeddings,
    "text",
    "text_hash",
    "model_name",
    "recipe",
    "embedding",
    "n_tokens",
    "n_tokens_dropped",
    "collection_id",
    *_REQUEST_COLUMNS,
    "document_id",
)

READ_DIGITS_OF_TEXT_HASHES = _make_read_digits(embeddings, "text_hash")

FIND_TEXTS_OF_ROWS = select(embeddings.c.id, embeddings.c.text).where(_is_any_of(embeddings.c.id, "row_ids"))

COUNT_BY_GROUP = (
    select(embeddings.c.model_name, embeddings.c.recipe, func.count())
    .group_by(embeddings.c.model_name, embeddings.c.recipe)
    .order_by(embeddings.c.model_name, embeddings.c.recipe)
)

FIND_LAST_ROW_ID = select(func.max(embeddings.c.id)).where(*_IS_WANTED_RECIPE)

COUNT_GROUP = select(func.count()).select_from(embeddings).where(*_IS_WANTED_RECIPE)

# Rows are numbered in the index alone; the table is read for those chosen only.
_numbered = (
    select(embeddings.c.id, func.row_number().over(order_by=embeddings.c.id).label("number"))
    .where(*_IS_WANTED_RECIPE)
    .subquery()
)
READ_EVERY_NTH_VECTOR = (
    select(_as_bytes(embeddings.c.embedding))
    .join(_numbered, _numbered.c.id == embeddings.c.id)
    .where(_numbered.c.number % bindparam("every") == 0)
    .order_by(embeddings.c.id)
)

READ_VECTORS = (
    select(embeddings.c.id, _as_bytes(embeddings.c.embedding))
    .where(*_IS_WANTED_RECIPE, embeddings.c.id > bindparam("after_row_id"), embeddings.c.collection_id.is_not(null()))
    .order_by(embeddings.c.id)
    .limit(bindparam("limit"))
)

# Two walks through indexes that have all that is needed: whether a row is in a collection stands behind its vector.
READ_ROW_IDS = text("""
    SELECT coalesce(group_concat(id), '')
    FROM (
        SELECT id FROM embeddings
        WHERE model_name = :model_name AND recipe = :recipe AND id > :after_row_id
        ORDER BY id
        LIMIT :limit
    ) AS page
""")
# The plus keeps the ids out of the choice of the index.
READ_UNSEARCHABLE_ROW_IDS = text("""
    SELECT coalesce(group_concat(id), '') FROM embeddings
    WHERE model_name = :model_name AND recipe = :recipe AND collection_id IS NULL AND +id BETWEEN :first AND :last
""")
READ_HIDDEN_ROW_IDS = select(func.coalesce(func.group_concat(HIDDEN_ROW_IDS.subquery().c.id), ""))

READ_VECTORS_OF_ROWS = select(embeddings.c.id, _as_bytes(embeddings.c.embedding)).where(
    _is_any_of(embeddings.c.id, "row_ids")
)

READ_VECTORS_OF_RANGE = select(embeddings.c.id, _as_bytes(embeddings.c.embedding)).where(
    embeddings.c.id.between(bindparam("first"), bindparam("last"))
)

# What has to be known of a row that is gone. Columns alone: SQLite before 3.41 takes `collection_id IS NOT NULL` in
# RETURNING to be true of every row.
_REMAINS = (embeddings.c.model_name, embeddings.c.recipe, embeddings.c.id, embeddings.c.text)

DELETE_EMBEDDINGS_OF_TEXT = (
    delete(embeddings).where(embeddings.c.text_hash == bindparam("text_hash_to_delete")).returning(*_REMAINS)
)

READ_FULL_TEXT_POSITION = select(
    func.coalesce(select(func.max(embeddings.c.id)).scalar_subquery(), 0), full_text_progress.c.last_row_id
)

COUNT_ROWS = select(
    select(func.count()).select_from(embeddings).scalar_subquery(),
    select(func.count()).select_from(bundles).scalar_subquery(),
    select(func.count()).select_from(documents).where(has_a_version_that_is_there()).scalar_subquery(),
)


def list_texts(
    model_name: str | None, limit: int | None, offset: int, collection: str | None = None, after_row_id: int = 0
) -> Select[int, str]:
    """Row ids and texts: each distinct text once, in the order in which it came first, behind a row."""
    # The first row of each text is found in an index alone; texts are then read only for the part asked for.
    first_rows = (
        select(func.min(embeddings.c.id).label("id"))
        .where(embeddings.c.id.not_in(HIDDEN_ROW_IDS.correlate(None)))
        .group_by(embeddings.c.text_hash)
    )
    if model_name is not None:
        # An expression, so that the unique index is read from end to end. It has all that is needed; the index on
        # the model's name would fetch the hash of every row from the table, which takes five times as long.
        first_rows = first_rows.where(embeddings.c.model_name + literal("") == model_name)
    if collection is not None:
        first_rows = first_rows.where(embeddings.c.id.in_(select_members(collection)))
    if after_row_id:
        first_rows = first_rows.having(func.min(embeddings.c.id) > after_row_id)
    part = first_rows.order_by(func.min(embeddings.c.id)).limit(limit).offset(offset).subquery()
    return select(embeddings.c.id, embeddings.c.text).join(part, part.c.id == embeddings.c.id).order_by(embeddings.c.id)


# SQLite's own table: ids of AUTOINCREMENT keys are never given twice.
FIND_LAST_ID_EVER = text("SELECT max(seq) FROM sqlite_sequence WHERE name = :table")

FIND_SNAPSHOT_NUMBER = select(index_snapshots.c.number).where(
    index_snapshots.c.model_name == bindparam("model_name"), index_snapshots.c.family == bindparam("family")
)
PUT_SNAPSHOT_NUMBER = insert_or_overwrite(index_snapshots)

# --- what other processes changed ---

READ_POSITIONS = text("""
    SELECT
        (SELECT max(seq) FROM sqlite_sequence WHERE name = 'embeddings'),
        (SELECT max(seq) FROM sqlite_sequence WHERE name = 'token_level_embedding_bundles'),
        (SELECT max(seq) FROM sqlite_sequence WHERE name = 'row_changes')
""")

_DESCRIBED_ROW = (
    embeddings.c.id,
    embeddings.c.text_hash,
    embeddings.c.model_name,
    embeddings.c.recipe,
    embeddings.c.collection_id,
    _as_bytes(embeddings.c.embedding),
)
READ_ROWS_AFTER = (
    select(*_DESCRIBED_ROW)
    .where(embeddings.c.id > bindparam("after_row_id"))
    .order_by(embeddings.c.id)
    .limit(bindparam("limit"))
)
READ_ROWS_BY_ID = select(*_DESCRIBED_ROW).where(_is_any_of(embeddings.c.id, "row_ids"))

READ_BUNDLES_AFTER = (
    select(
        bundles.c.id,
        bundles.c.input_text_hash,
        bundles.c.model_name,
        bundles.c.recipe,
        bundles.c.n_tokens,
        _as_bytes(bundles.c.embeddings),
    )
    .where(bundles.c.id > bindparam("after_row_id"))
    .order_by(bundles.c.id)
    .limit(bindparam("limit"))
)

READ_CHANGES_AFTER = (
    select(
        row_changes.c.id,
        row_changes.c.kind,
        row_changes.c.row_id,
        row_changes.c.model_name,
        row_changes.c.recipe,
        row_changes.c.n_tokens,
    )
    .where(row_changes.c.id > bindparam("after_id"))
    .order_by(row_changes.c.id)
    .limit(bindparam("limit"))
)

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

INSERT_BUNDLE = PlainInsert.into(
    bundles,
    "input_text",
    "input_text_hash",
    "model_name",
    "recipe",
    "n_tokens",
    "n_tokens_dropped",
    "embeddings",
    *_REQUEST_COLUMNS,
)
INSERT_TOKEN = PlainInsert.into(
    tokens,
    "token",
    "token_hash",
    "position",
    "model_name",
    "recipe",
    "token_level_embedding_bundle_id",
    *_REQUEST_COLUMNS,
)
INSERT_FEATURE_VECTOR = PlainInsert.into(
    feature_vectors,
    "token_level_embedding_bundle_id",
    "model_name",
    "recipe",
    "combined_feature_vector",
    "combined_feature_vector_hash",
)

DELETE_BUNDLES_OF_TEXT = (
    delete(bundles)
    .where(bundles.c.input_text_hash == bindparam("text_hash_to_delete"))
    .returning(bundles.c.model_name, bundles.c.recipe, bundles.c.id, bundles.c.n_tokens)
)

DELETE_BUNDLES_OF_GONE_TEXTS = (
    delete(bundles)
    .where(
        _is_any_of(bundles.c.input_text_hash, "text_hashes"),
        ~exists().where(embeddings.c.text_hash == bundles.c.input_text_hash),
    )
    .returning(bundles.c.model_name, bundles.c.recipe, bundles.c.id, bundles.c.n_tokens)
)

# Near which the tokens of a bundle were.
FIND_TOKEN_BEFORE_BUNDLE = select(
    select(tokens.c.id)
    .where(tokens.c.token_level_embedding_bundle_id < bindparam("bundle_id"))
    .order_by(tokens.c.token_level_embedding_bundle_id.desc(), tokens.c.position.desc())
    .limit(1)
    .scalar_subquery()
)

READ_DIGITS_OF_BUNDLE_HASHES = _make_read_digits(bundles, "input_text_hash")

FIND_BUNDLE_GROUPS = select(bundles.c.model_name, bundles.c.recipe).distinct()

READ_BUNDLE_SIZES = select(bundles.c.id, bundles.c.n_tokens).where(
    bundles.c.model_name == bindparam("model_name"), bundles.c.recipe == bindparam("recipe")
)

READ_BUNDLE_MATRICES = select(bundles.c.id, bundles.c.n_tokens, _as_bytes(bundles.c.embeddings)).where(
    _is_any_of(bundles.c.id, "bundle_ids")
)

FIND_HASHES_OF_BUNDLES = select(bundles.c.id, bundles.c.input_text_hash).where(_is_any_of(bundles.c.id, "bundle_ids"))

# --- documents ---

_IS_WANTED_DOCUMENT_EMBEDDING = (
    document_embeddings.c.file_hash == bindparam("file_hash"),
    document_embeddings.c.model_name == bindparam("model_name"),
    document_embeddings.c.recipe == bindparam("recipe"),
    document_embeddings.c.segmentation == bindparam("segmentation"),
    document_embeddings.c.filename == bindparam("filename"),
)

FIND_DOCUMENT_EMBEDDING = select(document_embeddings.c.id).where(*_IS_WANTED_DOCUMENT_EMBEDDING, _IS_THERE)

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
).where(document_embeddings.c.id == bindparam("document_embedding_id"), _IS_THERE)

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
INSERT_DOCUMENT_EMBEDDING = document_embeddings.insert()

# --- documents being written ---

FIND_DOCUMENT_EMBEDDING_IN_ANY_STATE = select(document_embeddings.c.id, document_embeddings.c.state).where(
    *_IS_WANTED_DOCUMENT_EMBEDDING
)
READ_DOCUMENT_STATE = select(document_embeddings.c.state).where(
    document_embeddings.c.id == bindparam("document_embedding_id")
)
FIND_DOCUMENTS_TO_WRITE_FOR = select(document_embeddings.c.id).where(
    _is_any_of(document_embeddings.c.id, "document_embedding_ids"),
    document_embeddings.c.state != DocumentState.BEING_REMOVED,
)
TOUCH_DOCUMENT_EMBEDDING = (
    update(document_embeddings)
    .where(document_embeddings.c.id == bindparam("touched_id"))
    .values(response_time=bindparam("moment"))
)
# What an earlier attempt wrote at the same place is overwritten.
PUT_SENTENCE = insert_or_overwrite(document_sentences)
CLAIM_SENTENCE = (
    update(embeddings)
    .where(embeddings.c.id == bindparam("claimed_row_id"))
    .values(document_id=bindparam("claiming_document_id"))
)
DELETE_SENTENCES_BEYOND = delete(document_sentences).where(
    document_sentences.c.document_embedding_id == bindparam("shortened_id"),
    document_sentences.c.position >= bindparam("n_sentences_kept"),
)
COUNT_SENTENCES = select(func.count()).where(
    document_sentences.c.document_embedding_id == bindparam("document_embedding_id")
)
PUBLISH_DOCUMENT_EMBEDDING = (
    update(document_embeddings)
    .where(document_embeddings.c.id == bindparam("published_id"))
    .values(
        state=DocumentState.THERE,
        n_sentences=bindparam("final_n_sentences"),
        file_data=bindparam("final_file_data"),
        response_time=bindparam("final_response_time"),
        total_time=bindparam("final_total_time"),
    )
)
# Rows of a document that no search finds yet, after a position; those that others show are in the index already.
READ_ROWS_TO_SHOW = text(f"""
    SELECT coalesce(max(position), -1), coalesce(group_concat(id), '')
    FROM (
        SELECT sentence.position AS position, CASE WHEN embeddings.collection_id = {HELD_BY_DOCUMENTS} AND NOT EXISTS (
            SELECT 1 FROM document_sentences AS other
            JOIN document_embeddings ON document_embeddings.id = other.document_embedding_id
            WHERE other.embedding_id = embeddings.id AND document_embeddings.state = {DocumentState.THERE:d}
        ) THEN embeddings.id END AS id
        FROM document_sentences AS sentence
        JOIN embeddings ON embeddings.id = sentence.embedding_id
        WHERE sentence.document_embedding_id = :document_embedding_id AND sentence.position > :after_position
        ORDER BY sentence.position
        LIMIT :limit
    ) AS page
""")  # noqa: S608 - the program's own words

# --- documents being removed ---

HIDE_DOCUMENTS = (
    update(document_embeddings)
    .where(_is_any_of(document_embeddings.c.document_id, "document_ids"))
    .values(state=DocumentState.BEING_REMOVED)
)
HIDE_DOCUMENT_EMBEDDINGS = (
    update(document_embeddings)
    .where(_is_any_of(document_embeddings.c.id, "document_embedding_ids"))
    .values(state=DocumentState.BEING_REMOVED)
)
FIND_DOCUMENTS_BEING_REMOVED = select(document_embeddings.c.id).where(
    _IS_NOT_THERE, document_embeddings.c.state == DocumentState.BEING_REMOVED
)
# A row notes the first document that holds it: that one's removal looks whether others do.
FIND_ROWS_OF_DOCUMENT = (
    select(
        embeddings.c.id,
        embeddings.c.collection_id,
        select(func.min(document_sentences.c.document_embedding_id))
        .where(
            document_sentences.c.embedding_id == embeddings.c.id,
            document_sentences.c.document_embedding_id != bindparam("document_embedding_id"),
        )
        .correlate(embeddings)
        .scalar_subquery(),
    )
    .where(embeddings.c.document_id == bindparam("document_embedding_id"))
    .limit(bindparam("limit"))
)
# The same of rows that do not stand in the document that they note.
FIND_STRAY_ROW_IDS = select(embeddings.c.id).where(
    embeddings.c.document_id == bindparam("document_embedding_id"),
    ~exists().where(
        document_sentences.c.embedding_id == embeddings.c.id,
        document_sentences.c.document_embedding_id == bindparam("document_embedding_id"),
    ),
)
FIND_STRAYS = select(
    embeddings.c.id,
    embeddings.c.collection_id,
    select(func.min(document_sentences.c.document_embedding_id))
    .where(
        document_sentences.c.embedding_id == embeddings.c.id,
        document_sentences.c.document_embedding_id != embeddings.c.document_id,
    )
    .correlate(embeddings)
    .scalar_subquery(),
).where(_is_any_of(embeddings.c.id, "row_ids"))
DELETE_ROWS = delete(embeddings).where(_is_any_of(embeddings.c.id, "row_ids")).returning(*_REMAINS)
FIND_LAST_SENTENCE = select(func.max(document_sentences.c.position)).where(
    document_sentences.c.document_embedding_id == bindparam("document_embedding_id")
)
DELETE_DOCUMENT_EMBEDDING = (
    delete(document_embeddings)
    .where(document_embeddings.c.id == bindparam("removed_id"))
    .returning(document_embeddings.c.document_id)
)
DELETE_DOCUMENT_WITHOUT_VERSIONS = delete(documents).where(
    documents.c.id == bindparam("document_id"), ~exists().where(document_embeddings.c.document_id == documents.c.id)
)

FIND_DOCUMENT_ID_OF_EMBEDDING = select(document_embeddings.c.document_id).where(
    document_embeddings.c.id == bindparam("document_embedding_id")
)

FIND_EMBEDDINGS_OF_DOCUMENTS = select(document_embeddings.c.id).where(
    _is_any_of(document_embeddings.c.document_id, "document_ids")
)

DELETE_DOCUMENT_COLLECTION = delete(document_collections).where(
    _is_any_of(document_collections.c.document_id, "document_ids"),
    document_collections.c.collection_id.in_(select(collections.c.id).where(collections.c.name == bindparam("name"))),
)

FIND_DOCUMENTS_WITH_COLLECTION = (
    select(document_collections.c.document_id)
    .where(_is_any_of(document_collections.c.document_id, "document_ids"))
    .distinct()
)


@dataclass(frozen=True, slots=True)
class DocumentSelection:
    """The documents of a name; of one model and in one collection, where these are given."""

    filename: str
    model_name: str | None = None
    collection: str | None = None


def find_document_ids(selection: DocumentSelection) -> Select[int]:
    """Documents in any state."""
    of_name = select(document_embeddings.c.document_id).where(document_embeddings.c.filename == selection.filename)
    statement = select(documents.c.id).where(documents.c.id.in_(of_name))
    if selection.model_name is not None:
        statement = statement.where(documents.c.model_name == selection.model_name)
    if selection.collection is not None:
        statement = statement.where(documents.c.id.in_(_select_documents(selection.collection)))
    return statement


def find_leftovers(untouched_since: datetime, of: DocumentSelection | None) -> Select[int]:
    """Of documents that never came to their end, that nobody has touched since, and that no job is about to finish."""
    statement = select(document_embeddings.c.id).where(
        _IS_NOT_THERE,
        document_embeddings.c.state == DocumentState.BEING_WRITTEN,
        document_embeddings.c.response_time < untouched_since,
        ~exists().where(
            document_jobs.c.filename == document_embeddings.c.filename,
            document_jobs.c.model_name == document_embeddings.c.model_name,
            document_jobs.c.state.in_([JobState.WAITING, JobState.RUNNING]),
        ),
    )
    return statement if of is None else statement.where(document_embeddings.c.document_id.in_(find_document_ids(of)))


def list_filenames(
    model_name: str | None, limit: int | None, offset: int, collection: str | None = None, after_id: int = 0
) -> Select[int, str]:
    """Ids and names: each distinct file name once, in the order in which it came first, behind a document."""
    statement = (
        select(func.min(documents.c.id), documents.c.filename)
        .where(has_a_version_that_is_there())
        .group_by(documents.c.filename)
        .order_by(func.min(documents.c.id))
    )
    if model_name is not None:
        statement = statement.where(documents.c.model_name == model_name)
    if collection is not None:
        statement = statement.where(documents.c.id.in_(_select_documents(collection)))
    if after_id:
        statement = statement.having(func.min(documents.c.id) > after_id)
    return statement.limit(limit).offset(offset)


# A page of collections with what is in each, in one statement, which reads each index once. A text counts once, though
# it was asked for and stands in several documents.
LIST_COLLECTIONS = text(f"""
    WITH page AS (SELECT id, name FROM collections WHERE id > :after_id ORDER BY id LIMIT :limit),
    members AS (
        SELECT collection_id, id AS embedding_id FROM embeddings WHERE collection_id IN (SELECT id FROM page)
        UNION
        SELECT collection_id, embedding_id FROM embedding_collections WHERE collection_id IN (SELECT id FROM page)
        UNION
        SELECT placed.collection_id, sentence.embedding_id
        FROM document_collections AS placed
        JOIN document_embeddings AS version
            ON version.document_id = placed.document_id AND version.state = {DocumentState.THERE:d}
        JOIN document_sentences AS sentence ON sentence.document_embedding_id = version.id
        WHERE placed.collection_id IN (SELECT id FROM page)
    ),
    embedding_counts AS (SELECT collection_id, count(*) AS n FROM members GROUP BY collection_id),
    document_counts AS (
        SELECT placed.collection_id AS collection_id, count(*) AS n FROM document_collections AS placed
        WHERE placed.collection_id IN (SELECT id FROM page) AND EXISTS (
            SELECT 1 FROM document_embeddings AS version
            WHERE version.document_id = placed.document_id AND version.state = {DocumentState.THERE:d}
        )
        GROUP BY placed.collection_id
    )
    SELECT page.id, page.name, coalesce(embedding_counts.n, 0), coalesce(document_counts.n, 0)
    FROM page
    LEFT JOIN embedding_counts ON embedding_counts.collection_id = page.id
    LEFT JOIN document_counts ON document_counts.collection_id = page.id
    ORDER BY page.id
""")  # noqa: S608 - the program's own words


def _select_collection(name: str) -> ScalarSelect[int]:
    return select(collections.c.id).where(collections.c.name == name).scalar_subquery()


def _select_documents(collection: str) -> Select[tuple[int]]:
    return select(document_collections.c.document_id).where(
        document_collections.c.collection_id == _select_collection(collection)
    )


# --- members of a collection, and other filters of a search ---
# A text is in a collection if it was asked for in it, or stands in a document that was submitted to it.


def select_members(collection: str) -> CompoundSelect[tuple[int]]:
    """Ids of all rows in a collection."""
    first = select(embeddings.c.id).where(embeddings.c.collection_id == _select_collection(collection))
    further = select(embedding_collections.c.embedding_id).where(
        embedding_collections.c.collection_id == _select_collection(collection)
    )
    return union(first, further, select_sentences(collection=collection))


def select_sentences(
    *, filename: str | None = None, collection: str | None = None, model_name: str | None = None
) -> Select[tuple[int]]:
    """Ids of the rows in documents: of a name, in a collection, of a model."""
    statement = select(document_sentences.c.embedding_id).join(
        document_embeddings,
        and_(document_embeddings.c.id == document_sentences.c.document_embedding_id, _IS_THERE),
    )
    if filename is not None:
        statement = statement.where(document_embeddings.c.filename == filename)
    if collection is not None:
        statement = statement.where(document_embeddings.c.document_id.in_(_select_documents(collection)))
    if model_name is not None:
        statement = statement.where(document_embeddings.c.model_name == model_name)
    return statement


# --- jobs ---

PUT_JOB = insert_or_overwrite(document_jobs)

DELETE_JOBS = delete(document_jobs).where(_is_any_of(document_jobs.c.id, "job_ids"))

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
