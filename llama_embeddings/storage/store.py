"""The store: finds what was computed before, keeps what is computed now, forgets what it is told to.

Reads go to a pool of readers and never wait for a write. Writes go through the write queue and return after
their commit: what was answered survives the end of the process. Two writers of the same text are harmless,
the first row stays and both get its id.

Knows no models and no index, and computes no embeddings. Keeps no cache of its own: the one in front of it is
the services'.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, Engine, Executable, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from embeddings_data_models import (
    BulkEmbeddings,
    DocumentJob,
    EmbeddingGroup,
    JobState,
    NewDocument,
    NewEmbedding,
    NewTokenLevelBundle,
    Page,
    RequestStamp,
    Sentence,
    SentencePlaces,
    StoredCollection,
    StoredDocument,
    StoredEmbedding,
    StoredTokenLevelBundle,
)
from llama_embeddings.errors import (
    ConfigurationError,
    FullTextUnavailable,
    InvalidInput,
    ReadOnlyReplica,
    StoreBusy,
    StoreFull,
    StoreUnusable,
    Unavailable,
)
from llama_embeddings.storage import document_writes, filters, full_text, statements, writes
from llama_embeddings.storage.backoff import Backoff, retry_while_locked
from llama_embeddings.storage.changes import CommittedBundle, CommittedRow, Positions, RowChange
from llama_embeddings.storage.collection_names import CollectionNames
from llama_embeddings.storage.database_file import DatabaseFile
from llama_embeddings.storage.document_writes import (
    HiddenDocuments,
    LeftoverSelection,
    Publication,
    RemovedPart,
    SentencePart,
)
from llama_embeddings.storage.engine import (
    N_SEARCHERS,
    WRITER_CACHE_IN_MB,
    CommitMark,
    Fault,
    classify_fault,
    create_erasure_engine,
    create_lookup_engine,
    create_reader_engine,
    create_search_engine,
    create_writer_engine,
    describe_fault,
    empty_log,
    fetch_by_ids,
    find_file,
    forget_snapshots,
    inspect_file,
    inspect_header,
    open_existing_file_only,
    parse_database_url,
    read_commit_mark,
    read_version_of_file,
    vacuum_into,
)
from llama_embeddings.storage.erasure import Erasure
from llama_embeddings.storage.filters import RowFilter
from llama_embeddings.storage.full_text_follower import MAX_ROWS_TO_WAIT_FOR, FullTextFollower
from llama_embeddings.storage.migrations import find_newest_version, migrate
from llama_embeddings.storage.page_gaps import Place, overwrite_remains
from llama_embeddings.storage.replica import RefusedWrites
from llama_embeddings.storage.statements import DocumentSelection
from llama_embeddings.storage.write_queue import WriteFunction, WriteQueue
from llama_embeddings.storage.writes import Placement, Removal, split

Payload = TypeVar("Payload")
Result = TypeVar("Result")

# Some milliseconds' work.
PLACES_PER_WRITE = 250
# How long a readiness check may wait for a locked database.
PROBE_TIMEOUT_SECONDS = 2.0

# Rows by id up to here are read on the thread of the hot lookups: some milliseconds.
MAX_ROWS_OF_A_LOOKUP = 512
# Reading a row in passing costs about a quarter of finding it by its id.
MAX_SPREAD_OF_A_RANGE = 4
# Rows wanted of one range: with those in passing, what is in memory at a time as an object for each row.
MAX_ROWS_OF_A_RANGE = 256


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Figures for readiness and metrics; those of the queue count from its start."""

    n_embeddings: int
    n_token_level_bundles: int
    n_documents: int
    write_queue_depth: int
    n_writes_committed: int
    n_writes_failed: int
    n_write_transactions: int
    n_lock_retries: int


class EmbeddingStore:
    """A database file in use. Made by `open`, to be ended by `close`.

    Any method may raise StoreBusy (reading: no reader or the log is locked; writing: see WriteQueue.submit) and
    StoreUnusable (the file is damaged). Arrays in results are read-only views of the bytes read.
    """

    def __init__(
        self, writer: Engine | None, url: URL, write_queue: WriteQueue | RefusedWrites, file: DatabaseFile
    ) -> None:
        """Without a `writer` it is a replica."""
        mode = "ro" if writer is None else "rw"
        self._writer = writer
        self._lookups = create_lookup_engine(url, mode=mode)
        self._lookup_thread = ThreadPoolExecutor(1, thread_name_prefix="store-lookup")
        self._searches = create_search_engine(url, mode=mode)
        self._search_threads = ThreadPoolExecutor(N_SEARCHERS, thread_name_prefix="store-search")
        self._readers = create_reader_engine(url, mode=mode)
        self._write_queue = write_queue
        self._collection_names = CollectionNames()
        self._full_text: FullTextFollower | None = None
        self._eraser: Engine | None = None
        self._erasure: Erasure | None = None
        if isinstance(write_queue, WriteQueue):
            self._full_text = FullTextFollower(write_queue, self._read_full_text_position)
            self._eraser = eraser = create_erasure_engine(url)
            self._erasure = Erasure(lambda: empty_log(eraser), self._overwrite_remains)
        self._file = file

    @classmethod
    async def open(
        cls,
        database_url: str,
        *,
        write_batch_size: int = 25,
        max_retries: int = 10,
        retry_delay_base_seconds: float = 1.0,
        jitter_factor: float = 0.1,
        writer_cache_in_mb: int = WRITER_CACHE_IN_MB,
        follows_full_text: bool = True,
        survives_power_cuts: bool = False,
    ) -> EmbeddingStore:
        """Open a database, made if there is none, bring it to the present schema and start its writer.

        Without `follows_full_text`, the full-text index follows only when it is searched or told to. With
        `survives_power_cuts` each group of writes waits for the disk.

        Raises:
            ConfigurationError: the URL does not name an SQLite file in an existing directory.
            StoreUnusable: the file is no database, damaged, another program's or of a newer version.
            StoreBusy, StoreFull: the file cannot be written now.
        """
        url = parse_database_url(database_url)
        is_full_text_damaged = await asyncio.to_thread(inspect_file, find_file(url), find_newest_version())
        backoff = Backoff(max_retries, retry_delay_base_seconds, jitter_factor)
        writer = create_writer_engine(url, cache_in_mb=writer_cache_in_mb, survives_power_cuts=survives_power_cuts)
        try:
            await retry_while_locked(lambda: asyncio.to_thread(migrate, writer), _is_lock, backoff)
        except DBAPIError as error:
            writer.dispose()
            raise _describe_failure(error) from error
        except StoreUnusable:
            writer.dispose()
            raise
        file = DatabaseFile(find_file(url))
        if survives_power_cuts:
            await asyncio.to_thread(_synchronise, file.path.parent)  # or a new file could lose its name
        event.listen(writer, "connect", lambda *_: file.note_connection())
        open_existing_file_only(writer)
        write_queue = WriteQueue(writer, place=file, batch_size=write_batch_size, backoff=backoff)
        write_queue.start()
        store = cls(writer, url, write_queue, file)
        assert store._full_text is not None
        assert store._erasure is not None
        if is_full_text_damaged:
            await store._full_text.start_anew()
        # What an earlier process deleted may stand in its log yet.
        store._erasure.begin()
        if follows_full_text:
            store._full_text.start()
        return store

    @classmethod
    async def open_replica(cls, database_url: str) -> EmbeddingStore:
        """Open a database that another process writes to, for reading alone: every write raises ReadOnlyReplica.

        Raises ConfigurationError if there is no database or one of an older schema, else as `open`.
        """
        url = parse_database_url(database_url)
        path, newest = find_file(url), find_newest_version()
        await asyncio.to_thread(inspect_file, path, newest)
        version = await asyncio.to_thread(read_version_of_file, path)
        if version < newest:
            raise ConfigurationError(
                f"{path} is {'not there' if version == 0 else 'of an earlier version'}, and a replica writes nothing. "
                "Start the server that writes to it first.",
                setting="READ_ONLY_REPLICA",
            )
        return cls(None, url, RefusedWrites(), DatabaseFile(path))

    @property
    def is_replica(self) -> bool:
        """Whether this process may only read."""
        return self._writer is None

    def require_writer(self) -> None:
        """Raise ReadOnlyReplica before anything is computed that could not be kept."""
        if self.is_replica:
            raise ReadOnlyReplica

    @property
    def path(self) -> Path:
        """The database file."""
        return self._file.path

    async def close(self) -> None:
        """Commit the writes that wait, then let go of the file. Later writes get ShuttingDown."""
        if self._full_text is not None:
            await self._full_text.stop()
        await self._write_queue.stop()
        if self._erasure is not None and self._eraser is not None:
            await self._erasure.stop()
            self._eraser.dispose()
        await self._readers.dispose()
        self._lookup_thread.shutdown()
        self._lookups.dispose()
        self._search_threads.shutdown()
        self._searches.dispose()
        # Last, so that it is the one that copies the log into the database and removes it.
        if self._writer is not None:
            await asyncio.to_thread(self._writer.dispose)

    # --- embeddings ---

    async def find_embeddings(
        self, text_hashes: Sequence[str], model_name: str, recipe: str
    ) -> dict[str, StoredEmbedding]:
        """What is known of these texts, by text hash; those unknown are absent. One statement for all of them."""
        found: dict[str, StoredEmbedding] = {}
        for part in split(text_hashes):
            parameters = {"text_hashes": part, "model_name": model_name, "recipe": recipe}
            rows = await self._visit(self._lookup_thread, self._lookups, self._find_embeddings, parameters)
            found.update((embedding.text_hash, embedding) for embedding in rows)
        return found

    def _find_embeddings(self, connection: Connection, parameters: Mapping[str, Any]) -> list[StoredEmbedding]:
        find_names = self._collection_names.find
        return [
            StoredEmbedding(
                row_id,
                text_hash,
                _decode(vector),
                n_tokens,
                n_dropped,
                find_names(connection, first, further),
                first is not None,
            )
            for row_id, text_hash, vector, n_tokens, n_dropped, first, further in connection.execute(
                statements.FIND_EMBEDDINGS, parameters
            ).all()
        ]

    async def add_embeddings(self, rows: Sequence[NewEmbedding]) -> list[int]:
        """Keep embeddings and return their row ids, in order. A text known before keeps its row and its vector.

        It is put into the new row's collection, and so may become searchable.
        """
        if not rows:
            return []
        row_ids = await self._submit_indexed(writes.insert_embeddings, rows)
        if self._full_text is not None:
            self._full_text.notice()
        return row_ids

    async def _submit_indexed(self, function: WriteFunction[Payload, Result], payload: Payload) -> Result:
        """Queue a write that touches the full-text index."""
        if self._full_text is None:
            return await self._write_queue.submit(function, payload)
        return await self._full_text.submit(function, payload)

    async def import_embeddings(self, rows: BulkEmbeddings) -> int:
        """Keep many embeddings in one transaction; returns how many were new. The others join the collection.

        Their order among themselves is not kept. The full-text index does not follow by itself.
        """
        return await self._submit_indexed(writes.import_embeddings, rows)

    async def index_full_text(self) -> None:
        """Bring the full-text index up to date now; a replica leaves that to the server that writes."""
        if self._full_text is not None:
            await self._full_text.catch_up()

    async def place_embeddings(
        self, row_ids: Sequence[int], collection: str, moment: datetime | None = None
    ) -> set[int]:
        """Put stored texts into a collection, too, from a moment on, which is now unless given.

        Returns the rows that are there; those that are gone are passed over.
        """
        placement = Placement(row_ids, collection, moment or RequestStamp().request_time)
        return await self._submit_indexed(writes.place_embeddings, placement)

    async def texts_of_rows(self, row_ids: Sequence[int]) -> dict[int, str]:
        """Texts by row id of the rows that show: queries, and sentences of documents that are not there, are absent.

        This decides what a search finds: an index may hold rows of documents that are just coming or going.
        """
        texts: dict[int, str] = {}
        for part in split(row_ids):
            rows = await self._look_up_rows("id, text", part, statements.SHOWS_AS_TEXT)
            texts.update((row_id, text) for row_id, text in rows)
        return texts

    async def list_texts(
        self, model_name: str | None, limit: int | None, offset: int, collection: str | None = None
    ) -> list[str]:
        """Each distinct text once, oldest first; of every model and collection where None is given.

        Queries are listed among the texts of every collection: they are stored, though they are in none.
        """
        return (await self.list_texts_by_page(model_name, limit, offset, collection)).entries

    async def list_texts_by_page(
        self, model_name: str | None, limit: int | None, offset: int, collection: str | None = None, after: int = 0
    ) -> Page[str]:
        """The same from the end of an earlier page on."""
        statement = statements.list_texts(model_name, _add_one(limit), offset, collection, after)
        return _make_page(await self._fetch(statement), limit)

    async def embedding_groups(self) -> list[EmbeddingGroup]:
        """The pairs of model and recipe with rows, and how many each has."""
        return [EmbeddingGroup(*row) for row in await self._fetch(statements.COUNT_BY_GROUP)]

    async def find_last_row_id(self, model_name: str, recipe: str) -> int:
        """The newest row's id in a group, 0 if it has none; it costs one lookup, however many rows there are."""
        [[row_id]] = await self._fetch(statements.FIND_LAST_ROW_ID, {"model_name": model_name, "recipe": recipe})
        return row_id or 0

    async def find_last_row_id_ever(self) -> int:
        """The highest id that a row of any group has ever had, there or not; 0 if there was none."""
        return await self._find_last_id("embeddings")

    async def find_last_bundle_id_ever(self) -> int:
        """The same for token-level bundles."""
        return await self._find_last_id("token_level_embedding_bundles")

    async def _find_last_id(self, table: str) -> int:
        [[row_id]] = await self._fetch(statements.FIND_LAST_ID_EVER, {"table": table})
        return row_id or 0

    async def sample_vectors(self, model_name: str, recipe: str, *, count: int) -> tuple[int, np.ndarray]:
        """How many rows a group has, and the vectors of at most `count`, float32 (n, n_dims), evenly spaced.

        The same rows give the same sample. It reads the whole of the group in an index.
        """
        group = {"model_name": model_name, "recipe": recipe}
        [[n_rows]] = await self._fetch(statements.COUNT_GROUP, group)
        every = max(1, -(-n_rows // count))
        rows = await self._fetch(statements.READ_EVERY_NTH_VECTOR, {**group, "every": every})
        return n_rows, _stack([vector for (vector,) in rows[:count]])

    async def read_vectors(
        self, model_name: str, recipe: str, *, after_row_id: int, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next `limit` rows of a group: ids int64 (n,) in ascending order, vectors float32 (n, n_dims).

        n below `limit` means that these were the last. Ids are never used twice, so "above the last id seen" is
        what came later. (0,) and (0, 0) if there is nothing.
        """
        parameters = {"model_name": model_name, "recipe": recipe, "after_row_id": after_row_id, "limit": limit}
        return _split_rows(await self._fetch(statements.READ_VECTORS, parameters))

    async def read_row_ids(self, model_name: str, recipe: str, *, rows_per_read: int = 50_000) -> np.ndarray:
        """Ids of all rows of a group that a search may find: int64 (n,), ascending."""
        group = {"model_name": model_name, "recipe": recipe}
        parts = [np.empty(0, np.int64)]
        after_row_id = 0
        of_hidden_documents = await self._fetch_ids(statements.READ_HIDDEN_ROW_IDS, {})
        while True:
            page = await self._fetch_ids(
                statements.READ_ROW_IDS, group | {"after_row_id": after_row_id, "limit": rows_per_read}
            )
            if len(page) == 0:
                return np.concatenate(parts)
            ends = {"first": int(page[0]), "last": int(page[-1])}
            hidden = await self._fetch_ids(statements.READ_UNSEARCHABLE_ROW_IDS, group | ends)
            parts.append(page[~np.isin(page, np.concatenate([hidden, of_hidden_documents]))])
            after_row_id = ends["last"]

    async def _fetch_ids(self, statement: Executable, parameters: dict[str, Any]) -> np.ndarray:
        [(row_ids,)] = await self._fetch(statement, parameters)
        return np.fromstring(row_ids, dtype=np.int64, sep=",")

    async def read_vectors_of_rows(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 (m,), in any order, and vectors float32 (m, n_dims) of rows of one group; rows gone are absent.

        A few are a hot lookup; many take a reader. Ids that lie close together are read as a range.
        """
        if len(row_ids) == 0:
            return _split_rows([])
        wanted: list[int] = row_ids.tolist()
        if len(wanted) <= MAX_ROWS_OF_A_LOOKUP:
            rows = await self._look_up_rows("id, embedding", wanted)
            return _split_rows(rows)
        wanted.sort()
        rows = []
        if wanted[-1] - wanted[0] < MAX_SPREAD_OF_A_RANGE * len(wanted):
            for part in split(wanted, MAX_ROWS_OF_A_RANGE):
                among = set(part)
                found = await self._fetch(statements.READ_VECTORS_OF_RANGE, {"first": part[0], "last": part[-1]})
                rows.extend(row for row in found if row[0] in among)
        else:
            for part in split(wanted):
                rows.extend(await self._fetch(statements.READ_VECTORS_OF_ROWS, {"row_ids": part}))
        return _split_rows(rows)

    def read_digits_of_text_hashes(
        self, first_digit: int, n_digits: int, *, rows_per_read: int = 50_000
    ) -> AsyncIterator[str]:
        """Some digits of all rows' text hashes, of all models, by ascending hash: many at a time, put together.

        A text that has several rows may be there several times.
        """
        return self._read_digits(statements.READ_DIGITS_OF_TEXT_HASHES, first_digit, n_digits, rows_per_read)

    async def _read_digits(
        self, statement: Executable, first_digit: int, n_digits: int, rows_per_read: int
    ) -> AsyncIterator[str]:
        after = ""
        while True:
            parameters = {
                "first_digit": first_digit,
                "n_digits": n_digits,
                "after_hash": after,
                "limit": rows_per_read,
            }
            [(after, digits)] = await self._fetch(statement, parameters)
            if not digits:
                return
            yield digits

    # --- token-level bundles ---

    async def find_token_level_bundle(
        self, text_hash: str, model_name: str, recipe: str
    ) -> StoredTokenLevelBundle | None:
        """A text's token embeddings, or None."""
        key = {"text_hash": text_hash, "model_name": model_name, "recipe": recipe}
        for row_id, matrix, feature_vector, n_tokens, n_dropped in await self._fetch(statements.FIND_BUNDLE, key):
            rows = await self._fetch(statements.FIND_TOKENS, {"bundle_id": row_id})
            tokens = tuple(token for (token,) in rows)
            # Fewer: it was forgotten between the two statements.
            if len(tokens) == n_tokens:
                shaped = _decode(matrix).reshape(n_tokens, -1) if n_tokens else np.empty((0, 0), np.float32)
                return StoredTokenLevelBundle(row_id, text_hash, tokens, shaped, _decode(feature_vector), n_dropped)
        return None

    async def add_token_level_bundle(self, bundle: NewTokenLevelBundle) -> int:
        """Keep a text's token embeddings and return their row id; the existing one's if they are known."""
        if len(bundle.tokens) != len(bundle.matrix):
            raise ValueError(f"{len(bundle.tokens)} tokens, but {len(bundle.matrix)} token embeddings")
        return await self._write_queue.submit(writes.insert_bundles, bundle)

    def read_digits_of_bundle_hashes(
        self, first_digit: int, n_digits: int, *, rows_per_read: int = 50_000
    ) -> AsyncIterator[str]:
        """The same as `read_digits_of_text_hashes` for the texts with token embeddings."""
        return self._read_digits(statements.READ_DIGITS_OF_BUNDLE_HASHES, first_digit, n_digits, rows_per_read)

    async def token_bundle_groups(self) -> list[tuple[str, str]]:
        """The pairs of model and recipe with token-level bundles."""
        return [(model_name, recipe) for model_name, recipe in await self._fetch(statements.FIND_BUNDLE_GROUPS)]

    async def read_bundle_sizes(self, model_name: str, recipe: str) -> list[tuple[int, int]]:
        """Row ids of a group's bundles and how many tokens each has."""
        key = {"model_name": model_name, "recipe": recipe}
        return [(row_id, n_tokens) for row_id, n_tokens in await self._fetch(statements.READ_BUNDLE_SIZES, key)]

    async def read_bundle_matrices(self, bundle_ids: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        """Row ids and token embeddings, float32 (n_tokens, n_dims) each; bundles that are gone or empty are absent."""
        found: list[tuple[int, np.ndarray]] = []
        for part in split(bundle_ids):
            for row_id, n_tokens, matrix in await self._fetch(statements.READ_BUNDLE_MATRICES, {"bundle_ids": part}):
                if n_tokens:
                    found.append((row_id, _decode(matrix).reshape(n_tokens, -1)))
        return found

    async def find_hashes_of_bundles(self, bundle_ids: Sequence[int]) -> dict[int, str]:
        """Hashes of the texts of bundles, by the bundles' row ids; bundles that are gone are absent."""
        hashes: dict[int, str] = {}
        for part in split(bundle_ids):
            rows = await self._fetch(statements.FIND_HASHES_OF_BUNDLES, {"bundle_ids": part})
            hashes.update((row_id, text_hash) for row_id, text_hash in rows)
        return hashes

    # --- documents ---

    async def find_document(
        self, file_hash: str, filename: str, model_name: str, recipe: str, segmentation: str
    ) -> StoredDocument | None:
        """A document whose sentences are all there, or None: also if one of them was forgotten since."""
        key = {
            "file_hash": file_hash,
            "filename": filename,
            "model_name": model_name,
            "recipe": recipe,
            "segmentation": segmentation,
        }
        for (row_id,) in await self._fetch(statements.FIND_DOCUMENT_EMBEDDING, key):
            return await self.describe_document(row_id)
        return None

    async def describe_document(self, row_id: int) -> StoredDocument | None:
        """A document by its row id, or None: also if one of its sentences was forgotten since."""
        key = {"document_embedding_id": row_id}
        for row in await self._fetch(statements.DESCRIBE_DOCUMENT_EMBEDDING, key):
            filename, mimetype, n_sentences, n_present, n_with_page, n_bytes = row
            if n_present == n_sentences:
                has_pages = n_with_page == n_sentences
                names = await self._fetch(statements.FIND_COLLECTIONS_OF_DOCUMENT, key)
                collections = frozenset(name for (name,) in names)
                return StoredDocument(
                    row_id, filename, mimetype, n_sentences, (n_bytes or 0) // 4, has_pages, collections
                )
        return None

    async def read_sentences(self, document: StoredDocument, first: int, count: int) -> list[Sentence]:
        """`count` sentences of a document from `first` on. Raises Unavailable if it was forgotten meanwhile."""
        rows = await self._read_part(statements.READ_SENTENCES, document, first, count)
        return [Sentence(text, page, start, end) for text, page, start, end in rows]

    async def read_sentence_vectors(self, document: StoredDocument, first: int, count: int) -> np.ndarray:
        """float32 (count, n_dims) of the same sentences. Raises Unavailable if they were forgotten meanwhile."""
        rows = await self._read_part(statements.READ_SENTENCE_VECTORS, document, first, count)
        return _stack([vector for (vector,) in rows])

    async def _read_part(
        self, statement: Executable, document: StoredDocument, first: int, count: int
    ) -> Sequence[Any]:
        parameters = {"document_embedding_id": document.row_id, "first": first, "end_position": first + count}
        rows = await self._fetch(statement, parameters)
        if len(rows) != min(count, document.n_sentences - first):
            raise Unavailable("The document was deleted, or a sentence of it, while it was read. Submit it again.")
        return rows

    async def measure_longest_sentence(self, document: StoredDocument) -> int:
        """Characters of the longest sentence; 0 if there is none."""
        key = {"document_embedding_id": document.row_id}
        [[n_characters]] = await self._fetch(statements.MEASURE_LONGEST_SENTENCE, key)
        return int(n_characters)

    async def add_document(self, document: NewDocument) -> int:
        """Keep a document whose sentences are stored, and return its row id; the existing one's if it is known.

        Raises Unavailable if one of the sentences was deleted since it was stored.
        """
        row_id = await self.begin_document(document)
        await self.write_sentences(row_id, document.places, document.stamp.request_time)
        await self.publish_document(row_id, document)
        return row_id

    async def begin_document(self, document: NewDocument) -> int:
        """Prepare for a document's sentences; returns its row id. Nothing of it shows until it is published.

        An earlier attempt that never came to its end is gone on with. Raises Unavailable if the document is just being
        removed.
        """
        return await self._write_queue.submit(document_writes.begin_documents, document)

    async def is_being_written(self, row_id: int) -> bool:
        """Whether a document that was begun is still wanted: it was not deleted since."""
        wanted = {"document_embedding_ids": [row_id]}
        return bool(await self._fetch(statements.FIND_DOCUMENTS_TO_WRITE_FOR, wanted))

    async def write_sentences(self, row_id: int, places: SentencePlaces, moment: datetime) -> Removal:
        """Write down where a document's sentences stand, by parts between which other writes have their turn.

        `moment`: when they were asked for. What an earlier attempt left beside them is removed, and returned. Raises
        Unavailable if one of them was deleted since it was stored.
        """
        position = 0
        while position < len(places):
            part = SentencePart(row_id, places, position, moment)
            position = await self._submit_indexed(document_writes.write_sentences, part)
        await self._write_queue.submit(document_writes.shorten_documents, (row_id, len(places)))
        rows = await self._fetch(statements.FIND_STRAY_ROW_IDS, {"document_embedding_id": row_id})
        removed = Removal()
        for stray in split([stray_id for (stray_id,) in rows], document_writes.ROWS_PER_STEP):
            removed.extend(await self._submit_indexed(document_writes.remove_strays, stray))
        return removed

    async def read_rows_to_show(self, row_id: int, *, sentences_per_read: int = 2_000) -> AsyncIterator[np.ndarray]:
        """Row ids, int64 (n,), of a written document's sentences that nothing shows yet: an index is to hold them."""
        position = -1
        while True:
            parameters = {"document_embedding_id": row_id, "after_position": position, "limit": sentences_per_read}
            [(position, row_ids)] = await self._fetch(statements.READ_ROWS_TO_SHOW, parameters)
            if position < 0:
                return
            if row_ids:
                yield np.unique(np.fromstring(row_ids, dtype=np.int64, sep=","))

    async def publish_document(
        self, row_id: int, document: NewDocument, *, replaced_row_ids: Sequence[int] = ()
    ) -> None:
        """Let a document show whose sentences are all written, in the same moment in which those that it replaces stop.

        What was replaced is to be removed. Raises NotFound if the document was deleted meanwhile, Unavailable if one of
        its sentences was.
        """
        publication = Publication(row_id, document, replaced_row_ids)
        await self._write_queue.submit(document_writes.publish_documents, publication)

    async def place_document(self, row_id: int, collection: str) -> None:
        """Put a stored document into a collection, too, with all its sentences."""
        await self._write_queue.submit(document_writes.place_documents, (row_id, collection))

    async def list_document_filenames(
        self, model_name: str | None, limit: int | None, offset: int, collection: str | None = None
    ) -> list[str]:
        """Each distinct file name once, oldest first; of every model and collection where None is given."""
        return (await self.list_filenames_by_page(model_name, limit, offset, collection)).entries

    async def list_filenames_by_page(
        self, model_name: str | None, limit: int | None, offset: int, collection: str | None = None, after: int = 0
    ) -> Page[str]:
        """The same from the end of an earlier page on."""
        statement = statements.list_filenames(model_name, _add_one(limit), offset, collection, after)
        return _make_page(await self._fetch(statement), limit)

    # --- what a search asks ---

    async def find_row_ids(
        self,
        model_name: str,
        families: Sequence[str],
        *,
        collection: str | None = None,
        filename: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> np.ndarray:
        """Sorted unique int64 ids of a model's searchable rows under recipe families, cut texts included.

        See RowFilter for what the conditions mean; all that are given have to be met.
        """
        wanted = RowFilter(model_name, tuple(families), collection, filename, since, until)
        return await self._visit(self._search_threads, self._searches, filters.find_row_ids, wanted)

    async def holds_everything(self, model_name: str, families: Sequence[str], collection: str) -> bool:
        """Whether a collection has all searchable rows, in no time, so that a search need not filter by it."""
        arguments = (model_name, tuple(families), collection)
        return await self._visit(self._search_threads, self._searches, filters.holds_everything, *arguments)

    async def search_text(
        self,
        query: str,
        *,
        model_name: str,
        families: Sequence[str],
        limit: int,
        row_ids: np.ndarray | None = None,
    ) -> list[tuple[int, float]]:
        """Row ids and BM25 scores (higher is better) of searchable texts with any word of the query, best first.

        Any string is a query; one without a word finds nothing. `row_ids`, sorted, are those that may be returned.
        What was committed before the call is found; by a replica, what the other server has indexed by then. Raises
        FullTextUnavailable while the index is filled with very many rows.
        """
        arguments = (query, model_name, tuple(families), limit, row_ids)
        if self._full_text is None:
            return await self._visit(self._search_threads, self._searches, _search_text, *arguments)
        await self._full_text.catch_up(max_rows=MAX_ROWS_TO_WAIT_FOR)
        try:
            return await self._visit(self._search_threads, self._searches, _search_text, *arguments)
        except FullTextUnavailable as error:
            await self._full_text.start_anew(error)
        await self._full_text.catch_up(max_rows=MAX_ROWS_TO_WAIT_FOR)
        return await self._visit(self._search_threads, self._searches, _search_text, *arguments)

    async def list_collections(self) -> list[StoredCollection]:
        """All collections, oldest first, with the numbers of embeddings and documents in them."""
        return (await self.list_collections_by_page(None)).entries

    async def list_collections_by_page(self, limit: int | None, after: int = 0) -> Page[StoredCollection]:
        """The same from the end of an earlier page on. Not on the searches' threads: it may read all of an index."""
        parameters = {"limit": -1 if limit is None else limit + 1, "after_id": after}
        rows = await self._fetch(statements.LIST_COLLECTIONS, parameters)
        return _make_page([(row_id, StoredCollection(*described)) for row_id, *described in rows], limit)

    async def delete_collection(self, name: str) -> None:
        """Remove an empty collection. Raises NotFound, and InvalidInput for one that is not empty or is the default."""
        await self._write_queue.submit(writes.delete_collections, name)

    async def _read_full_text_position(self) -> tuple[int, int]:
        [[newest, position]] = await self._fetch(statements.READ_FULL_TEXT_POSITION)
        return newest, position

    # --- forgetting ---

    async def delete_text(self, text: str) -> Removal:
        """Forget a text under every model and recipe, in every collection, with its token-level bundles.

        See `erase` for what is left of it.
        """
        return await self._submit_indexed(writes.delete_texts, text)

    async def delete_document(
        self, filename: str, *, model_name: str | None = None, collection: str | None = None
    ) -> Removal:
        """Forget the documents of this name and the sentences that nobody else holds.

        A sentence that another document holds goes with the last of them; one that was asked for by itself stays. A
        document that is in other collections than the one given leaves that one only.
        """
        hidden = await self.hide_documents(filename, model_name=model_name, collection=collection)
        removal = Removal(n_documents=hidden.n_documents)
        for row_id in hidden.row_ids:
            async for part in self.remove_document(row_id):
                removal.extend(part)
        return removal

    async def erase(self, removal: Removal) -> bool:
        """Overwrite what is left of removed texts in the log and between rows. It waits some two seconds at most.

        False: a long read keeps it there; it goes as soon as that ends.
        """
        places = [Place("embeddings", row_id) for _, _, row_id in removal.rows]
        places += [Place("documents", row_id) for row_id in removal.document_ids]
        places += [Place("document_embeddings", row_id) for row_id in removal.document_embedding_ids]
        for _, _, bundle_id, _ in removal.bundles:
            places.append(Place("token_level_embedding_bundles", bundle_id))
            [[token_id]] = await self._fetch(statements.FIND_TOKEN_BEFORE_BUNDLE, {"bundle_id": bundle_id})
            places.append(Place("token_level_embeddings", (token_id or 0) + 1))
        return self._erasure is None or await self._erasure.erase(places)

    async def _overwrite_remains(self, places: Sequence[Place]) -> int:
        def overwrite(connection: Connection, payloads: Sequence[Sequence[Place]]) -> list[int]:
            return [overwrite_remains(connection, self.path, payload) for payload in payloads]

        # In parts, between which other writes have their turn.
        return sum([await self._write_queue.submit(overwrite, part) for part in split(places, PLACES_PER_WRITE)])

    async def hide_documents(
        self, filename: str, *, model_name: str | None = None, collection: str | None = None
    ) -> HiddenDocuments:
        """Let documents show no more, in one moment. What `delete_document` says of them; they are to be removed then.

        Documents of this name that are just being written, or were never finished, are among them.
        """
        selection = DocumentSelection(filename, model_name, collection)
        return await self._write_queue.submit(document_writes.hide_documents, selection)

    async def hide_leftovers(
        self,
        untouched_since: datetime,
        *,
        excepted: Sequence[int] = (),
        documents: DocumentSelection | None = None,
    ) -> list[int]:
        """Mark documents for removal that were begun, never finished, and not gone on with since; returns them.

        Those that a job waits for or works at are left alone.
        """
        selection = LeftoverSelection(untouched_since, excepted, documents)
        return await self._write_queue.submit(document_writes.hide_leftovers, selection)

    async def find_documents_being_removed(self) -> list[int]:
        """Documents that are hidden and not removed yet: an earlier process has ended meanwhile."""
        return [row_id for (row_id,) in await self._fetch(statements.FIND_DOCUMENTS_BEING_REMOVED)]

    async def remove_document(self, row_id: int) -> AsyncIterator[Removal]:
        """Remove a hidden document by parts between which other writes have their turn; what is gone with each."""
        is_last = False
        while not is_last:
            part: RemovedPart = await self._submit_indexed(document_writes.remove_documents, row_id)
            is_last = part.is_last
            yield part.removal

    # --- jobs ---

    async def put_job(self, job: DocumentJob) -> None:
        """Keep a job as it is now, whether it is new or known."""
        await self._write_queue.submit(writes.put_jobs, job)

    async def delete_jobs(self, job_ids: Sequence[str]) -> None:
        """Forget jobs; what they computed stays."""
        await self._write_queue.submit(writes.delete_jobs, job_ids)

    async def list_jobs(self) -> list[DocumentJob]:
        """All jobs, oldest first."""
        return [_decode_job(*row) for row in await self._fetch(statements.LIST_JOBS)]

    # --- what other processes commit ---

    async def read_commit_mark(self) -> CommitMark:
        """Differs from an earlier one if another process has committed in between.

        With a replica, as soon as anybody has. A new connection differs from every other.
        """
        try:
            if isinstance(self._write_queue, WriteQueue):
                return await self._write_queue.read(read_commit_mark)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._lookup_thread, read_commit_mark, self._lookups)
        except (sqlite3.Error, DBAPIError) as error:
            raise _describe_failure(error) from error

    async def read_positions(self) -> Positions:
        """The highest ids given so far, to rows that are there or not."""
        [found] = await self._fetch(statements.READ_POSITIONS)
        return Positions(*(number or 0 for number in found))

    async def read_rows_after(self, row_id: int, *, limit: int) -> list[CommittedRow]:
        """The next rows of all models by ascending id, queries included."""
        rows = await self._fetch(statements.READ_ROWS_AFTER, {"after_row_id": row_id, "limit": limit})
        return [_decode_row(*row) for row in rows]

    async def read_rows(self, row_ids: Sequence[int]) -> list[CommittedRow]:
        """These rows, in any order; those that are gone are absent."""
        found: list[CommittedRow] = []
        for part in split(row_ids):
            found.extend(_decode_row(*row) for row in await self._fetch(statements.READ_ROWS_BY_ID, {"row_ids": part}))
        return found

    async def read_bundles_after(self, row_id: int, *, limit: int) -> list[CommittedBundle]:
        """The next token-level bundles of all models by ascending id."""
        rows = await self._fetch(statements.READ_BUNDLES_AFTER, {"after_row_id": row_id, "limit": limit})
        return [
            CommittedBundle(
                found_id,
                text_hash,
                model_name,
                recipe,
                _decode(matrix).reshape(n_tokens, -1) if n_tokens else np.empty((0, 0), np.float32),
            )
            for found_id, text_hash, model_name, recipe, n_tokens, matrix in rows
        ]

    async def read_changes_after(self, change_id: int, *, limit: int) -> list[RowChange]:
        """The next changes, this process's own among them. The oldest are forgotten: a gap shows in the ids."""
        rows = await self._fetch(statements.READ_CHANGES_AFTER, {"after_id": change_id, "limit": limit})
        return [RowChange(*row) for row in rows]

    def note_foreign_commits(self) -> None:
        """Let go of what this process believes of collections and words."""
        self._collection_names = CollectionNames()
        if self._full_text is not None:
            self._full_text.notice()

    # --- snapshots of indexes ---

    async def find_snapshot_number(self, model_name: str, family: str) -> str | None:
        """The number of the last snapshot of an index that this database knows of, or None.

        A copy of the database that was made before the snapshot does not have it; a backup has none at all.
        """
        key = {"model_name": model_name, "family": family}
        return next((number for (number,) in await self._fetch(statements.FIND_SNAPSHOT_NUMBER, key)), None)

    async def put_snapshot_number(self, model_name: str, family: str, number: str) -> None:
        """Know of a snapshot, in place of the one before it."""
        await self._write_queue.submit(writes.put_snapshot_numbers, (model_name, family, number))

    # --- upkeep ---

    async def back_up(self, target: Path) -> None:
        """Write a copy of the last committed state to `target` while serving goes on.

        `target` appears when the copy is complete and on the disk, never before; it knows of no snapshots of indexes.
        Raises InvalidInput if it exists already or its directory does not, StoreFull if it cannot be written.
        """
        _check_target(target)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            await vacuum_into(self._readers, partial)
            await asyncio.to_thread(forget_snapshots, partial)
            await asyncio.to_thread(_publish, partial, target)
        except FileExistsError:
            raise _refuse_target(target) from None
        except DBAPIError as error:
            if classify_fault(error) in (Fault.FULL, Fault.READ_ONLY):
                raise StoreFull(f"{target} cannot be written: no room on its disk, or a read-only place.") from error
            raise _describe_failure(error) from error
        finally:
            partial.unlink(missing_ok=True)

    async def check_writable(self) -> None:
        """Commit a write that changes nothing. Raises StoreBusy or StoreFull, within some two seconds.

        A replica has nothing to commit; it reads.
        """
        if self.is_replica:
            await self.read_positions()
            return
        try:
            await asyncio.wait_for(self._write_queue.submit(writes.probe, None, is_probe=True), PROBE_TIMEOUT_SECONDS)
        except TimeoutError:
            raise StoreBusy(f"The database took no write for {PROBE_TIMEOUT_SECONDS:.0f} seconds.") from None

    async def check_file(self) -> None:
        """Look whether the file is still the one that was opened, and a database.

        Raises StoreUnusable for one that was deleted, replaced or overwritten: what is written goes nowhere then.
        """
        await asyncio.to_thread(self._check_file_now)

    def _check_file_now(self) -> None:
        self._file.check()
        inspect_header(self._file.path)

    def size_in_bytes(self) -> int:
        """Of the file and its log; 0 if there is none."""
        return sum(path.stat().st_size for path in (self.path, Path(f"{self.path}-wal")) if path.exists())

    async def statistics(self) -> StoreStatistics:
        """Row counts (from the smallest index of each table) and the figures of the write queue."""
        [[n_embeddings, n_bundles, n_documents]] = await self._fetch(statements.COUNT_ROWS)
        counters = self._write_queue.counters
        return StoreStatistics(
            n_embeddings=n_embeddings,
            n_token_level_bundles=n_bundles,
            n_documents=n_documents,
            write_queue_depth=self.write_queue_depth,
            n_writes_committed=counters.n_committed,
            n_writes_failed=counters.n_failed,
            n_write_transactions=counters.n_transactions,
            n_lock_retries=counters.n_lock_retries,
        )

    @property
    def write_queue_depth(self) -> int:
        """How many writes wait for their turn."""
        return self._write_queue.depth

    async def _look_up(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
        """Fetch by key, in one visit to the lookup thread: what every request waits for."""
        return await self._visit(self._lookup_thread, self._lookups, _fetch_now, statement, parameters)

    async def _look_up_rows(self, columns: str, row_ids: Sequence[int], condition: str = "TRUE") -> Sequence[Any]:
        """The same for rows of embeddings by their ids."""
        arguments = (columns, "embeddings", row_ids, condition)
        return await self._visit(self._lookup_thread, self._lookups, fetch_by_ids, *arguments)

    async def _visit(
        self, threads: ThreadPoolExecutor, engine: Engine, read: Callable[..., Result], *arguments: Any
    ) -> Result:
        """The whole of `read(connection, *arguments)` on a thread that has a connection of its own."""
        return await asyncio.get_running_loop().run_in_executor(threads, _read_now, engine, read, arguments)

    async def _fetch(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
        try:
            async with self._readers.connect() as connection:
                return (await connection.execute(statement, parameters)).all()
        except (DBAPIError, PoolTimeoutError) as error:
            raise _describe_failure(error) from error


def _read_now(engine: Engine, read: Callable[..., Result], arguments: Sequence[Any]) -> Result:
    try:
        with engine.connect() as connection:
            return read(connection, *arguments)
    except DBAPIError as error:
        raise _describe_failure(error) from error


def _fetch_now(connection: Connection, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
    return connection.execute(statement, parameters).all()


def _search_text(
    connection: Connection,
    query: str,
    model_name: str,
    families: tuple[str, ...],
    limit: int,
    row_ids: np.ndarray | None,
) -> list[tuple[int, float]]:
    has_others = filters.has_other_rows(connection, model_name, families)
    # Those that may be returned show; where nobody says which, it has to be looked at.
    has_hidden = row_ids is None and filters.has_hidden_documents(connection)

    def are_among(found: np.ndarray) -> np.ndarray:
        wanted = np.ones(len(found), bool) if row_ids is None else np.isin(found, row_ids, assume_unique=True)
        if has_hidden:
            wanted &= filters.do_show(connection, found)
        return wanted & filters.are_of(connection, found, model_name, families) if has_others else wanted

    def list_all() -> np.ndarray:
        return filters.find_row_ids(connection, RowFilter(model_name, families)) if row_ids is None else row_ids

    needs_filter = has_others or has_hidden or row_ids is not None
    wanted = full_text.Wanted(are_among, list_all) if needs_filter else None
    return full_text.search(connection, query, limit=limit, wanted=wanted)


def _add_one(limit: int | None) -> int | None:
    """One more than a page has says that there is another page."""
    return None if limit is None else limit + 1


def _make_page(rows: Sequence[Any], limit: int | None) -> Page[Any]:
    """From pairs of an id and an entry, by ascending id."""
    entries = [entry for _, entry in rows[:limit]]
    return Page(entries, rows[limit - 1][0] if limit is not None and len(rows) > limit else None)


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise InvalidInput(f"The directory of the backup, {target.parent}, does not exist.", field="target")
    if target.exists():
        raise _refuse_target(target)


def _refuse_target(target: Path) -> InvalidInput:
    return InvalidInput(f"{target} exists already. Name another file for the backup.", field="target")


def _publish(partial: Path, target: Path) -> None:
    """Give a complete file its name, unless the name is taken; both survive a power loss from then on."""
    _synchronise(partial)
    os.link(partial, target)
    _synchronise(target.parent)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decode(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<f4")


def _split_rows(rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of id and vector as ids int64 (n,) and vectors float32 (n, n_dims)."""
    row_ids = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
    return row_ids, _stack([row[1] for row in rows])


def _stack(vectors: Sequence[bytes]) -> np.ndarray:
    """Rows of equal length as float32 (n, n_dims), in one copy."""
    if not vectors:
        return np.empty((0, 0), dtype=np.float32)
    data = b"".join(vectors)
    if len(data) != len(vectors) * len(vectors[0]):
        raise StoreUnusable("Vectors of one model and recipe differ in length: the database is damaged.")
    return _decode(data).reshape(len(vectors), -1)


def _decode_job(
    job_id: str,
    state: str,
    filename: str,
    model_name: str,
    collection: str,
    size_in_bytes: int,
    ip_address: str | None,
    request_time: datetime,
    response_time: datetime | None,
    *results: Any,
) -> DocumentJob:
    """A row of LIST_JOBS; `results` are the record's last fields in their order."""
    finished = None if response_time is None else response_time.replace(tzinfo=UTC)
    stamp = RequestStamp(ip_address, request_time.replace(tzinfo=UTC))
    return DocumentJob(
        job_id, JobState(state), filename, model_name, collection, size_in_bytes, stamp, finished, *results
    )


def _decode_row(
    row_id: int, text_hash: str, model_name: str, recipe: str, collection_id: int | None, vector: bytes
) -> CommittedRow:
    return CommittedRow(row_id, text_hash, model_name, recipe, collection_id is not None, _decode(vector))


def _is_lock(error: Exception) -> bool:
    return classify_fault(error) is Fault.LOCKED


def _describe_failure(error: Exception) -> Exception:
    """What callers see of a database error; one that is a mistake in a statement stays as it is."""
    fault = classify_fault(error)
    return error if fault is None else describe_fault(fault)
