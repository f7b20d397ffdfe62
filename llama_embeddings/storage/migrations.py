"""How a database comes to the present schema: numbered steps, forward only, each in its own transaction.

The statements are frozen text, not made from the tables' classes: a step must do tomorrow what it did when it
was released. A test holds the sum of the steps against the classes. Steps are never edited, only added.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from llama_embeddings.errors import StoreUnusable
from llama_embeddings.storage.engine import read_version, write_version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Migration:
    """One step. `version` is the database's number after it."""

    version: int
    description: str
    statements: tuple[str, ...]


INITIAL_SCHEMA = Migration(
    version=1,
    description="initial schema",
    statements=(
        """
        CREATE TABLE documents (
            id INTEGER NOT NULL,
            filename VARCHAR NOT NULL,
            mimetype VARCHAR NOT NULL,
            model_name VARCHAR NOT NULL,
            document_hash VARCHAR(64) NOT NULL,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            PRIMARY KEY (id),
            CONSTRAINT _document_hash_model_uc UNIQUE (document_hash, model_name, filename)
        )
        """,
        "CREATE INDEX ix_documents_model_name ON documents (model_name)",
        "CREATE INDEX ix_documents_document_hash ON documents (document_hash)",
        """
        CREATE TABLE document_embeddings (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            document_id INTEGER NOT NULL,
            filename VARCHAR NOT NULL,
            mimetype VARCHAR NOT NULL,
            file_hash VARCHAR(64) NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            segmentation VARCHAR NOT NULL,
            n_sentences INTEGER NOT NULL,
            file_data BLOB,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            CONSTRAINT _file_hash_model_uc UNIQUE (file_hash, model_name, recipe, segmentation, filename),
            FOREIGN KEY(document_id) REFERENCES documents (id) ON DELETE CASCADE
        )
        """,
        "CREATE INDEX ix_document_embeddings_document_id ON document_embeddings (document_id)",
        "CREATE INDEX ix_document_embeddings_model_name ON document_embeddings (model_name)",
        """
        CREATE TABLE embeddings (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            text TEXT NOT NULL,
            text_hash VARCHAR(64) NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            embedding BLOB NOT NULL,
            n_tokens INTEGER NOT NULL,
            n_tokens_dropped INTEGER NOT NULL,
            document_id INTEGER,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            CONSTRAINT _text_hash_model_uc UNIQUE (text_hash, model_name, recipe),
            FOREIGN KEY(document_id) REFERENCES document_embeddings (id) ON DELETE SET NULL
        )
        """,
        "CREATE INDEX ix_embeddings_model_name_recipe ON embeddings (model_name, recipe)",
        "CREATE INDEX ix_embeddings_document_id ON embeddings (document_id) WHERE document_id IS NOT NULL",
        """
        CREATE TABLE document_sentences (
            document_embedding_id INTEGER NOT NULL,
            position INTEGER NOT NULL,
            embedding_id INTEGER NOT NULL,
            page INTEGER,
            start INTEGER NOT NULL,
            "end" INTEGER NOT NULL,
            PRIMARY KEY (document_embedding_id, position),
            FOREIGN KEY(document_embedding_id) REFERENCES document_embeddings (id) ON DELETE CASCADE,
            FOREIGN KEY(embedding_id) REFERENCES embeddings (id) ON DELETE CASCADE
        )
        """,
        "CREATE INDEX ix_document_sentences_embedding_id ON document_sentences (embedding_id)",
        """
        CREATE TABLE token_level_embedding_bundles (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            input_text TEXT NOT NULL,
            input_text_hash VARCHAR(64) NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            n_tokens INTEGER NOT NULL,
            n_tokens_dropped INTEGER NOT NULL,
            embeddings BLOB NOT NULL,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            CONSTRAINT _input_text_hash_model_uc UNIQUE (input_text_hash, model_name, recipe)
        )
        """,
        "CREATE INDEX ix_token_level_embedding_bundles_model_name ON token_level_embedding_bundles (model_name)",
        """
        CREATE TABLE token_level_embeddings (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            token TEXT NOT NULL,
            token_hash VARCHAR(64) NOT NULL,
            position INTEGER NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            token_level_embedding_bundle_id INTEGER NOT NULL,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            CONSTRAINT _token_hash_model_uc UNIQUE (token_hash, model_name, recipe),
            FOREIGN KEY(token_level_embedding_bundle_id)
                REFERENCES token_level_embedding_bundles (id) ON DELETE CASCADE
        )
        """,
        """
        CREATE INDEX ix_token_level_embeddings_token_level_embedding_bundle_id
            ON token_level_embeddings (token_level_embedding_bundle_id)
        """,
        """
        CREATE TABLE token_level_embedding_bundle_combined_feature_vectors (
            id INTEGER NOT NULL,
            token_level_embedding_bundle_id INTEGER NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            combined_feature_vector BLOB NOT NULL,
            combined_feature_vector_hash VARCHAR(64) NOT NULL,
            PRIMARY KEY (id),
            CONSTRAINT _combined_feature_vector_hash_model_uc
                UNIQUE (combined_feature_vector_hash, model_name, recipe),
            UNIQUE (token_level_embedding_bundle_id),
            FOREIGN KEY(token_level_embedding_bundle_id)
                REFERENCES token_level_embedding_bundles (id) ON DELETE CASCADE
        )
        """,
        """
        CREATE INDEX ix_token_level_embedding_bundle_combined_feature_vectors_model_name
            ON token_level_embedding_bundle_combined_feature_vectors (model_name)
        """,
    ),
)

COLLECTIONS_AND_FULL_TEXT = Migration(
    version=2,
    description="collections and full-text index",
    statements=(
        """
        CREATE TABLE collections (
            id INTEGER NOT NULL,
            name VARCHAR NOT NULL,
            creation_time DATETIME NOT NULL,
            PRIMARY KEY (id),
            UNIQUE (name)
        )
        """,
        "INSERT INTO collections VALUES (1, 'default', strftime('%Y-%m-%d %H:%M:%f000', 'now'))",
        # Rows that are there already get the default without being written.
        "ALTER TABLE embeddings ADD COLUMN collection_id INTEGER DEFAULT 1",
        # Those that documents brought; nothing is known of whether they were asked for by themselves as well.
        "UPDATE embeddings SET collection_id = 0 WHERE document_id IS NOT NULL",
        "CREATE INDEX ix_embeddings_filters ON embeddings (model_name, recipe, collection_id, request_time)",
        """
        CREATE TABLE embedding_collections (
            embedding_id INTEGER NOT NULL,
            collection_id INTEGER NOT NULL,
            PRIMARY KEY (embedding_id, collection_id),
            FOREIGN KEY(embedding_id) REFERENCES embeddings (id) ON DELETE CASCADE,
            FOREIGN KEY(collection_id) REFERENCES collections (id)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX ix_embedding_collections_collection_id ON embedding_collections (collection_id)",
        """
        CREATE TABLE document_collections (
            document_id INTEGER NOT NULL,
            collection_id INTEGER NOT NULL,
            PRIMARY KEY (document_id, collection_id),
            FOREIGN KEY(document_id) REFERENCES documents (id) ON DELETE CASCADE,
            FOREIGN KEY(collection_id) REFERENCES collections (id)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX ix_document_collections_collection_id ON document_collections (collection_id)",
        "INSERT INTO document_collections SELECT id, 1 FROM documents",
        "CREATE INDEX ix_document_embeddings_filename ON document_embeddings (filename)",
        # Without the texts, which `embeddings` has; rows are removed by being told what was put in.
        """
        CREATE VIRTUAL TABLE full_text USING fts5(
            text,
            content = '',
            tokenize = 'porter unicode61 remove_diacritics 2 categories ''L* N* Co M*'''
        )
        """,
        "CREATE TABLE full_text_progress (id INTEGER NOT NULL, last_row_id INTEGER NOT NULL, PRIMARY KEY (id))",
        "INSERT INTO full_text_progress VALUES (1, 0)",
    ),
)

DOCUMENT_JOBS = Migration(
    version=3,
    description="documents embedded in the background",
    statements=(
        """
        CREATE TABLE document_jobs (
            id VARCHAR(32) NOT NULL,
            state VARCHAR NOT NULL,
            filename VARCHAR NOT NULL,
            model_name VARCHAR NOT NULL,
            collection VARCHAR NOT NULL,
            size_in_bytes INTEGER NOT NULL,
            n_sentences INTEGER,
            source VARCHAR,
            document_embedding_id INTEGER,
            error_code VARCHAR,
            error_message TEXT,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            PRIMARY KEY (id)
        )
        """,
    ),
)

# Their hashes follow from the bundle's and the position, which tell them apart as well: an index in the order in which
# rows come, where that of the hashes wrote a page for each token.
TOKENS_BY_POSITION = Migration(
    version=4,
    description="tokens told apart by bundle and position",
    statements=(
        "ALTER TABLE token_level_embeddings RENAME TO earlier_token_level_embeddings",
        """
        CREATE TABLE token_level_embeddings (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            token TEXT NOT NULL,
            token_hash VARCHAR(64) NOT NULL,
            position INTEGER NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            token_level_embedding_bundle_id INTEGER NOT NULL,
            ip_address VARCHAR,
            request_time DATETIME,
            response_time DATETIME,
            total_time FLOAT,
            CONSTRAINT _token_level_embedding_bundle_position_uc UNIQUE (token_level_embedding_bundle_id, position),
            FOREIGN KEY(token_level_embedding_bundle_id)
                REFERENCES token_level_embedding_bundles (id) ON DELETE CASCADE
        )
        """,
        """
        INSERT INTO token_level_embeddings (
            id, token, token_hash, position, model_name, recipe, token_level_embedding_bundle_id,
            ip_address, request_time, response_time, total_time
        )
        SELECT
            id, token, token_hash, position, model_name, recipe, token_level_embedding_bundle_id,
            ip_address, request_time, response_time, total_time
        FROM earlier_token_level_embeddings
        """,
        "DROP TABLE earlier_token_level_embeddings",
    ),
)

# With SQLite before 3.41, rows were removed from it that it never held, so its totals are wrong. It may be damaged so
# far that no statement can name it: -1 has the program make it anew, see `full_text.UNKNOWN_POSITION`.
FULL_TEXT_ANEW = Migration(
    version=5,
    description="full-text index made anew",
    statements=("UPDATE full_text_progress SET last_row_id = -1",),
)

# A file beside the database is only believed if the database has the file's number: see `vectors/snapshots.py`.
SNAPSHOT_NUMBERS = Migration(
    version=6,
    description="numbers of the indexes' snapshots",
    statements=(
        """
        CREATE TABLE index_snapshots (
            model_name VARCHAR NOT NULL,
            family VARCHAR NOT NULL,
            number VARCHAR(32) NOT NULL,
            PRIMARY KEY (model_name, family)
        ) WITHOUT ROWID
        """,
    ),
)

# Several processes may use a database. What one of them changes, the others find here. Triggers note it, so that no way
# to change a row can forget it. The newest 100,000 are kept: a process that missed more looks at everything.
ROW_CHANGES = Migration(
    version=7,
    description="changes of rows, for other processes",
    statements=(
        """
        CREATE TABLE row_changes (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            kind VARCHAR NOT NULL,
            row_id INTEGER NOT NULL,
            model_name VARCHAR NOT NULL,
            recipe VARCHAR NOT NULL,
            n_tokens INTEGER NOT NULL
        )
        """,
        """
        CREATE TRIGGER note_deleted_embedding AFTER DELETE ON embeddings BEGIN
            INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
            VALUES ('embeddings', old.id, old.model_name, old.recipe, 0);
        END
        """,
        # By their types, as `IS NULL` of a trigger's row cannot be relied upon in every SQLite.
        """
        CREATE TRIGGER note_placed_embedding AFTER UPDATE OF collection_id ON embeddings
        WHEN typeof(old.collection_id) <> typeof(new.collection_id) BEGIN
            INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
            VALUES ('embeddings', new.id, new.model_name, new.recipe, 0);
        END
        """,
        """
        CREATE TRIGGER note_deleted_bundle AFTER DELETE ON token_level_embedding_bundles BEGIN
            INSERT INTO row_changes (kind, row_id, model_name, recipe, n_tokens)
            VALUES ('token_level_embedding_bundles', old.id, old.model_name, old.recipe, old.n_tokens);
        END
        """,
        """
        CREATE TRIGGER forget_old_changes AFTER INSERT ON row_changes WHEN new.id % 1000 = 0 BEGIN
            DELETE FROM row_changes WHERE id <= new.id - 100000;
        END
        """,
    ),
)

# Sentences without a document are those of documents that never came to their end. They are put together in one that
# does not show, so that they are found by no search and removed with it.
DOCUMENTS_COME_AND_GO_AS_A_WHOLE = Migration(
    version=8,
    description="documents that come and go as a whole, collections that can be deleted",
    statements=(
        "ALTER TABLE document_embeddings ADD COLUMN state INTEGER DEFAULT 1 NOT NULL",
        "CREATE INDEX ix_document_embeddings_state ON document_embeddings (state) WHERE state != 1",
        """
        INSERT INTO documents (filename, mimetype, model_name, document_hash)
        SELECT '', '', '', ''
        WHERE EXISTS (SELECT 1 FROM embeddings WHERE collection_id = 0 AND document_id IS NULL)
        """,
        """
        INSERT INTO document_embeddings (
            document_id, filename, mimetype, file_hash, model_name, recipe, segmentation, n_sentences,
            response_time, state
        )
        SELECT id, '', '', '', '', '', '', 0, strftime('%Y-%m-%d %H:%M:%f000', 'now'), 0
        FROM documents WHERE filename = '' AND document_hash = ''
        """,
        """
        UPDATE embeddings SET document_id = (SELECT id FROM document_embeddings WHERE filename = '' AND file_hash = '')
        WHERE collection_id = 0 AND document_id IS NULL
        """,
        "CREATE INDEX ix_embeddings_collection_id ON embeddings (collection_id) WHERE collection_id > 1",
        "CREATE TABLE collection_numbers (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT)",
        "INSERT INTO collection_numbers SELECT max(id) FROM collections",
        "DELETE FROM collection_numbers",
    ),
)

MIGRATIONS: tuple[Migration, ...] = (
    INITIAL_SCHEMA,
    COLLECTIONS_AND_FULL_TEXT,
    DOCUMENT_JOBS,
    TOKENS_BY_POSITION,
    FULL_TEXT_ANEW,
    SNAPSHOT_NUMBERS,
    ROW_CHANGES,
    DOCUMENTS_COME_AND_GO_AS_A_WHOLE,
)


def find_newest_version(migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """The version that this program brings a database to."""
    return migrations[-1].version


def migrate(engine: Engine, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """Apply the steps that a database lacks and return its version.

    A step that fails leaves the database at the version before it. Two processes may do this at the same time:
    the version is read under the write lock. Raises StoreUnusable if the database is newer than the steps.
    """
    for migration in migrations:
        with engine.begin() as connection:
            version = read_version(connection)
            if version >= migration.version:
                continue
            for statement in migration.statements:
                connection.exec_driver_sql(statement)
            write_version(connection, migration.version)
        logger.info("migrated the database to version %d: %s", migration.version, migration.description)
    return _check_version(engine, find_newest_version(migrations))


def _check_version(engine: Engine, newest: int) -> int:
    with engine.connect() as connection:
        version = read_version(connection)
    if version > newest:
        raise StoreUnusable(f"The database has version {version}, this program knows versions up to {newest}.")
    return version
