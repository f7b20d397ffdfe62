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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from embeddings_data_models import (
    DocumentJob,
    EmbeddingGroup,
    JobState,
    NewDocument,
    NewEmbedding,
    NewTokenLevelBundle,
    RequestStamp,
    Sentence,
    StoredDocument,
    StoredEmbedding,
    StoredTokenLevelBundle,
)
from llama_embeddings.errors import InvalidInput, StoreBusy, StoreFull, StoreUnusable, Unavailable
from llama_embeddings.storage import statements, writes
from llama_embeddings.storage.backoff import Backoff, retry_while_locked
from llama_embeddings.storage.engine import (
    Fault,
    classify_fault,
    create_lookup_engine,
    create_reader_engine,
    create_writer_engine,
    describe_fault,
    inspect_file,
    parse_database_url,
    vacuum_into,
)
from llama_embeddings.storage.migrations import find_newest_version, migrate
from llama_embeddings.storage.write_queue import WriteQueue
from llama_embeddings.storage.writes import RemovedRow, split

# How long a readiness check may wait for a locked database.
PROBE_TIMEOUT_SECONDS = 2.0


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

    def __init__(self, writer: Engine, lookups: Engine, readers: AsyncEngine, write_queue: WriteQueue) -> None:
        self._writer = writer
        self._lookups = lookups
        self._lookup_thread = ThreadPoolExecutor(1, thread_name_prefix="store-lookup")
        self._readers = readers
        self._write_queue = write_queue

    @classmethod
    async def open(
        cls,
        database_url: str,
        *,
        write_batch_size: int = 25,
        max_retries: int = 10,
        retry_delay_base_seconds: float = 1.0,
        jitter_factor: float = 0.1,
    ) -> EmbeddingStore:
        """Open a database, made if there is none, bring it to the present schema and start its writer.

        Raises:
            ConfigurationError: the URL does not name an SQLite file in an existing directory.
            StoreUnusable: the file is no database, damaged, another program's or of a newer version.
            StoreBusy, StoreFull: the file cannot be written now.
        """
        url = parse_database_url(database_url)
        await asyncio.to_thread(inspect_file, Path(str(url.database)), find_newest_version())
        backoff = Backoff(max_retries, retry_delay_base_seconds, jitter_factor)
        writer = create_writer_engine(url)
        try:
            await retry_while_locked(lambda: asyncio.to_thread(migrate, writer), _is_lock, backoff)
        except DBAPIError as error:
            writer.dispose()
            raise _describe_failure(error) from error
        except StoreUnusable:
            writer.dispose()
            raise
        write_queue = WriteQueue(writer, batch_size=write_batch_size, backoff=backoff)
        write_queue.start()
        return cls(writer, create_lookup_engine(url), create_reader_engine(url), write_queue)

    async def close(self) -> None:
        """Commit the writes that wait, then let go of the file. Later writes get ShuttingDown."""
        await self._write_queue.stop()
        await self._readers.dispose()
        self._lookup_thread.shutdown()
        self._lookups.dispose()
        # Last, so that it is the one that copies the log into the database and removes it.
        await asyncio.to_thread(self._writer.dispose)

    # --- embeddings ---

    async def find_embeddings(
        self, text_hashes: Sequence[str], model_name: str, recipe: str
    ) -> dict[str, StoredEmbedding]:
        """What is known of these texts, by text hash; those unknown are absent. One statement for all of them."""
        found: dict[str, StoredEmbedding] = {}
        for part in split(text_hashes):
            parameters = {"text_hashes": part, "model_name": model_name, "recipe": recipe}
            for row_id, text_hash, vector, n_tokens, n_dropped in await self._look_up(
                statements.FIND_EMBEDDINGS, parameters
            ):
                found[text_hash] = StoredEmbedding(row_id, text_hash, _decode(vector), n_tokens, n_dropped)
        return found

    async def add_embeddings(self, rows: Sequence[NewEmbedding]) -> list[int]:
        """Keep embeddings and return their row ids, in order. A text known before keeps its row and its vector."""
        return await self._write_queue.submit(writes.insert_embeddings, rows) if rows else []

    async def texts_of_rows(self, row_ids: Sequence[int]) -> dict[int, str]:
        """Texts by row id; rows that are gone are absent."""
        texts: dict[int, str] = {}
        for part in split(row_ids):
            rows = await self._look_up(statements.FIND_TEXTS_OF_ROWS, {"row_ids": part})
            texts.update((row_id, text) for row_id, text in rows)
        return texts

    async def list_texts(self, model_name: str | None, limit: int | None, offset: int) -> list[str]:
        """Each distinct text once, oldest first; of every model if `model_name` is None."""
        rows = await self._fetch(statements.list_texts(model_name, limit, offset))
        return [text for (text,) in rows]

    async def embedding_groups(self) -> list[EmbeddingGroup]:
        """The pairs of model and recipe with rows, and how many each has."""
        return [EmbeddingGroup(*row) for row in await self._fetch(statements.COUNT_BY_GROUP)]

    async def read_vectors(
        self, model_name: str, recipe: str, *, after_row_id: int, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next `limit` rows of a group: ids int64 (n,) in ascending order, vectors float32 (n, n_dims).

        n below `limit` means that these were the last. Ids are never used twice, so "above the last id seen" is
        what came later. (0,) and (0, 0) if there is nothing.
        """
        parameters = {"model_name": model_name, "recipe": recipe, "after_row_id": after_row_id, "limit": limit}
        rows = await self._fetch(statements.READ_VECTORS, parameters)
        row_ids = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
        return row_ids, _stack([row[1] for row in rows])

    async def read_text_hashes(self, *, after_row_id: int, limit: int) -> tuple[int, list[str]]:
        """The next `limit` rows' text hashes, of all models, and the id of the last; (after_row_id, []) at the end."""
        rows = await self._fetch(statements.READ_TEXT_HASHES, {"after_row_id": after_row_id, "limit": limit})
        return (rows[-1][0] if rows else after_row_id), [text_hash for _, text_hash in rows]

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
                return StoredDocument(row_id, filename, mimetype, n_sentences, (n_bytes or 0) // 4, has_pages)
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
        return await self._write_queue.submit(writes.insert_documents, document)

    async def list_document_filenames(self, model_name: str | None, limit: int | None, offset: int) -> list[str]:
        """Each distinct file name once, oldest first; of every model if `model_name` is None."""
        rows = await self._fetch(statements.list_filenames(model_name, limit, offset))
        return [filename for (filename,) in rows]

    # --- forgetting ---

    async def delete_text(self, text: str) -> list[RemovedRow]:
        """Forget a text under every model and recipe. Returns (model_name, recipe, row id) of what was removed."""
        return await self._write_queue.submit(writes.delete_texts, text)

    async def delete_document(self, filename: str) -> list[RemovedRow]:
        """Forget the documents of this name and the sentences that only they hold.

        A sentence that another document holds stays, and goes with the last of them. Returns
        (model_name, recipe, row id) of the sentences removed.
        """
        return await self._write_queue.submit(writes.delete_documents, filename)

    # --- jobs ---

    async def put_job(self, job: DocumentJob) -> None:
        """Keep a job as it is now, whether it is new or known."""
        await self._write_queue.submit(writes.put_jobs, job)

    async def delete_job(self, job_id: str) -> None:
        """Forget a job; what it computed stays."""
        await self._write_queue.submit(writes.delete_jobs, job_id)

    async def list_jobs(self) -> list[DocumentJob]:
        """All jobs, oldest first."""
        return [_decode_job(*row) for row in await self._fetch(statements.LIST_JOBS)]

    # --- upkeep ---

    async def back_up(self, target: Path) -> None:
        """Write a copy of the last committed state to `target` while serving goes on.

        `target` appears when the copy is complete and on the disk, never before. Raises InvalidInput if it exists
        already or its directory does not, StoreFull if it cannot be written.
        """
        _check_target(target)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            await vacuum_into(self._readers, partial)
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
        """Commit a write that changes nothing. Raises StoreBusy or StoreFull, within some two seconds."""
        try:
            await asyncio.wait_for(self._write_queue.submit(writes.probe, None), PROBE_TIMEOUT_SECONDS)
        except TimeoutError:
            raise StoreBusy(f"The database took no write for {PROBE_TIMEOUT_SECONDS:.0f} seconds.") from None

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
        return await asyncio.get_running_loop().run_in_executor(
            self._lookup_thread, self._look_up_now, statement, parameters
        )

    def _look_up_now(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
        try:
            with self._lookups.connect() as connection:
                return connection.execute(statement, parameters).all()
        except DBAPIError as error:
            raise _describe_failure(error) from error

    async def _fetch(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
        try:
            async with self._readers.connect() as connection:
                return (await connection.execute(statement, parameters)).all()
        except (DBAPIError, PoolTimeoutError) as error:
            raise _describe_failure(error) from error


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


def _is_lock(error: Exception) -> bool:
    return classify_fault(error) is Fault.LOCKED


def _describe_failure(error: Exception) -> Exception:
    """What callers see of a database error; one that is a mistake in a statement stays as it is."""
    fault = classify_fault(error)
    return error if fault is None else describe_fault(fault)
