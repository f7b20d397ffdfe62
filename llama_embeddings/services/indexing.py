"""The index in service: rows are added and removed, searches ranked exactly, and upkeep done beside them.

The database is the truth. At the start an index is what its snapshot holds, less the rows that are gone, plus those
that came since; without a usable snapshot it is made from the database. Later a task in the background compresses an
index that has grown, merges new rows, and writes snapshots. What a vector stands for is a source's matter: texts have
one, other kinds of rows bring theirs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from embeddings_data_models import recipe_family
from llama_embeddings.errors import ServiceError
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.storage.writes import RemovedRow
from llama_embeddings.vectors.compressed import Cancelled
from llama_embeddings.vectors.id_arrays import NO_IDS, contains
from llama_embeddings.vectors.index import Key, Step, VectorIndex, VectorIndexes, rank
from llama_embeddings.vectors.memory import release_memory
from llama_embeddings.vectors.rebuilding import Rebuild
from llama_embeddings.vectors.searching import NO_SCORES, FoundRows
from llama_embeddings.vectors.snapshots import (
    Snapshot,
    UnusableSnapshot,
    compute_digests,
    delete_leftovers,
    draw_number,
    read_snapshot,
    write_snapshot,
)

logger = logging.getLogger(__name__)

# Each row comes as an object of its own before it is copied: what many of them leave behind stays in the heap.
ROWS_PER_READ = 1_024
N_WITNESSES = 96
N_NEWEST_WITNESSES = 32
# Between two steps of a merge, so that searches that waited come first.
PAUSE_SECONDS = 0.001
RETRY_SECONDS = 30.0
# How often new rows are counted while an index is made anew.
LOOK_AGAIN_SECONDS = 0.2
# Exact scans read every vector; more than this many at a time would take the readers from everybody else.
MAX_EXACT_SCANS = 2
# Upkeep yields to whatever else wants the processor.
NICENESS = 10
# Each of its steps waits for the engine to have nothing to compute, for so long at most, and looks so often: a text
# that is alone has all cores, and its threads wait for each other, so that one disturbed core delays them all.
MAX_WAIT_SECONDS = 0.05
POLL_SECONDS = 0.002

Result = TypeVar("Result")


class VectorSource(Protocol):
    """Where the vectors of some indexes are stored. Vectors have unit length."""

    # What the recipe families of its indexes begin with; of several that fit, the longest counts. Holds no colon, which
    # divides a family from what may follow it in a recipe.
    prefix: str

    async def keys(self) -> list[Key]:
        """The indexes there should be: model names and recipe families with rows."""

    async def read_row_ids(self, model_name: str, family: str) -> np.ndarray:
        """Ids of all rows that a search may find: int64 (n,), ascending."""

    async def read_vectors(self, row_ids: np.ndarray) -> FoundRows:
        """Ids int64 (m,) and vectors float32 (m, n_dims) of those rows of one index that are there, in any order."""

    async def read_last_id(self) -> int:
        """The highest id that a row ever had, there or not: a snapshot with a higher one is of another database."""

    async def find_snapshot_number(self, model_name: str, family: str) -> str | None:
        """The number of the last snapshot of an index that was committed, or None."""

    async def put_snapshot_number(self, model_name: str, family: str, number: str) -> None:
        """Commit the number of a snapshot, whose rows are all committed."""


class TextVectors:
    """The embeddings of texts."""

    prefix = ""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self.read_vectors = store.read_vectors_of_rows
        self.read_last_id = store.find_last_row_id_ever
        self.find_snapshot_number = store.find_snapshot_number
        self.put_snapshot_number = store.put_snapshot_number

    async def keys(self) -> list[Key]:
        """Every model and recipe family with rows."""
        groups = await self._store.embedding_groups()
        return sorted({(group.model_name, recipe_family(group.recipe)) for group in groups})

    async def read_row_ids(self, model_name: str, family: str) -> np.ndarray:
        parts = [
            await self._store.read_row_ids(model_name, group.recipe)
            for group in await self._store.embedding_groups()
            if (group.model_name, recipe_family(group.recipe)) == (model_name, family)
        ]
        return np.sort(np.concatenate([NO_IDS, *parts]))


class IndexService:
    """The one way to the indexes. Used on the event loop; what takes long is done on threads."""

    def __init__(
        self,
        indexes: VectorIndexes,
        sources: Sequence[VectorSource],
        directory: Path | None,
        *,
        is_computing: Callable[[], bool] = lambda: False,
        writes_snapshots: bool = True,
    ) -> None:
        """`directory` holds the snapshots; without one there are none. `is_computing`: whether to give way just now.

        One process at a time writes snapshots: others read them.
        """
        self._writes_snapshots = writes_snapshots and directory is not None
        self._is_computing = is_computing
        self._indexes = indexes
        self._sources = sorted(sources, key=lambda source: -len(source.prefix))
        self._directory = directory
        self._exact_scans = asyncio.Semaphore(MAX_EXACT_SCANS)
        self._upkeep_thread = ThreadPoolExecutor(1, thread_name_prefix="index-upkeep", initializer=_be_nice)
        self._upkeep: asyncio.Task[None] | None = None
        self._is_wanted = asyncio.Event()
        self._rebuilds: dict[Key, Rebuild] = {}

    # --- rows ---

    def add(self, model_name: str, family: str, row_ids: np.ndarray, vectors: np.ndarray) -> None:
        """Let int64 (n,) rows with float32 (n, n_dims) unit vectors be found from now on. Takes microseconds."""
        index = self._indexes.add(model_name, family, row_ids, vectors)
        if index is not None and not self._is_wanted.is_set() and index.next_step() is not None:
            self._is_wanted.set()

    async def remove(self, removed: Sequence[RemovedRow]) -> int:
        """Let rows of the database that were deleted not be found any more; returns how many could be."""
        n_removed = 0
        keyed = sorted((model_name, recipe_family(recipe), row_id) for model_name, recipe, row_id in removed)
        for key, rows in groupby(keyed, key=lambda row: row[:2]):
            row_ids = np.array([row_id for *_, row_id in rows], np.int64)
            model_name, family = key
            n_removed += await asyncio.to_thread(self._indexes.remove, model_name, family, row_ids)
        return n_removed

    async def reconcile(self) -> list[RemovedRow]:
        """Hold every index against the database: rows that are there are added, others removed; returns the latter."""
        removed: list[RemovedRow] = []
        keys = {key for source in self._sources for key in await source.keys()} | self._indexes.sizes().keys()
        for key in sorted(keys):
            source = self._find_source(key[1])
            last_id = await source.read_last_id()
            row_ids = await source.read_row_ids(*key)
            index = self._indexes.get(*key)
            held = await asyncio.to_thread(index.row_ids) if index is not None else NO_IDS
            # A row that came while the ids were read is in the index, and not gone.
            gone = held[~contains(row_ids, held) & (held <= last_id)]
            if index is not None:
                await asyncio.to_thread(index.remove, gone)
            removed += [(*key, row_id) for row_id in gone.tolist()]
            for part in _split(row_ids[~contains(held, row_ids)]):
                self.add(*key, *await source.read_vectors(part))
        return removed

    # --- searching ---

    def size(self, model_name: str, family: str) -> int:
        """How many rows an index holds."""
        index = self._indexes.get(model_name, family)
        return len(index) if index is not None else 0

    def sizes(self) -> dict[Key, int]:
        """The same for all, by model name and recipe family."""
        return self._indexes.sizes()

    async def search(
        self,
        model_name: str,
        family: str,
        vector: np.ndarray,
        count: int,
        *,
        allowed: np.ndarray | None = None,
        exact: bool = False,
    ) -> FoundRows:
        """The `count` rows nearest to float32 (n_dims,): ids int64 (n,) and cosines float32 (n,), best first.

        Fewer only if fewer are there. `allowed`: sorted row ids, each once, that alone may be found. `exact`: compare
        with every vector, at the price of reading them all where the index holds codes of them only.
        """
        index = self._indexes.get(model_name, family)
        if index is None or count <= 0:
            return NO_IDS, NO_SCORES
        if exact and index.is_compressed:
            return await self._scan(index, self._find_source(family), vector, count, allowed)
        found = await asyncio.to_thread(index.search, vector, count, allowed=allowed)
        source = self._find_source(family)
        while len(found.wanted_ids):
            await asyncio.to_thread(found.take, *await source.read_vectors(found.wanted_ids))
        return found.best()

    async def find_candidates(
        self, model_name: str, family: str, queries: np.ndarray, count: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each of float32 (n, n_dims), about `count` rows that are near it: ids and cosines, best first.

        The cosines are estimates where the index holds codes, and rows may be among them that are gone: for callers
        who go on to something exact of their own.
        """
        index = self._indexes.get(model_name, family)
        if index is None:
            return []
        return await asyncio.to_thread(index.estimate, queries, count)

    async def _scan(
        self, index: VectorIndex, source: VectorSource, vector: np.ndarray, count: int, allowed: np.ndarray | None
    ) -> FoundRows:
        row_ids = await asyncio.to_thread(index.row_ids)
        if allowed is not None:
            row_ids = row_ids[contains(allowed, row_ids)]
        best: FoundRows = (NO_IDS, NO_SCORES)
        async with self._exact_scans:
            for part in _split(row_ids):
                found_ids, vectors = await source.read_vectors(part)
                found = await asyncio.to_thread(rank, vector, found_ids, vectors, count)
                best = _best_of_both(best, found, count)
        return best

    def _find_source(self, family: str) -> VectorSource:
        return next(source for source in self._sources if family.startswith(source.prefix))

    # --- the start ---

    async def load(self) -> int:
        """Make every index from its snapshot and the database; returns how many rows they hold."""
        keys = [(key, source) for source in self._sources for key in await source.keys()]
        for key, source in keys:
            started = time.perf_counter()
            origin = await self._load_index(key, source)
            n_rows = self._indexes.sizes().get(key, 0)
            seconds = time.perf_counter() - started
            logger.info("Indexed %d rows of %s from %s in %.1f s", n_rows, key[0], origin, seconds)
        if self._writes_snapshots and self._directory is not None and self._directory.is_dir():
            await self._try_files(delete_leftovers, self._directory, {key for key, _ in keys})
        release_memory()
        return sum(self._indexes.sizes().values())

    async def _load_index(self, key: Key, source: VectorSource) -> str:
        """Make one index; says from what."""
        row_ids = await source.read_row_ids(*key)
        index = await self._thaw(key, source)
        origin = "the database" if index is None else "its snapshot"
        if index is not None:
            held = index.row_ids()
            index.remove(held[~contains(row_ids, held)])
            row_ids = row_ids[~contains(held, row_ids)]
        elif len(row_ids) >= self._indexes.flat_limit:
            index = await self._build(key, source, row_ids)
            row_ids = row_ids[~contains(index.row_ids(), row_ids)] if index is not None else row_ids
        for part in _split(row_ids):
            index = self._indexes.add(*key, *await source.read_vectors(part)) or index
            while index is not None and index.next_step() is Step.MERGE:
                await asyncio.to_thread(index.merge_some, ROWS_PER_READ)
        return origin

    async def _thaw(self, key: Key, source: VectorSource) -> VectorIndex | None:
        if self._directory is None:
            return None
        try:
            snapshot = await asyncio.to_thread(read_snapshot, self._directory, key)
            if snapshot is None:
                return None
            await self._check_history(snapshot, source)
            await self._check_witnesses(snapshot, source)
        except (UnusableSnapshot, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The snapshot of the index of %s is not used, as %s; made anew", key[0], error)
            return None
        return self._indexes.thaw(*key, snapshot.frozen)

    async def _check_history(self, snapshot: Snapshot, source: VectorSource) -> None:
        """Raise UnusableSnapshot unless the database went through the state that the snapshot is of.

        A restored backup gives ids that the snapshot knows to other rows. It either lacks the number, or was made after
        the snapshot: then it has used all of the snapshot's ids already, and never gives them again.
        """
        if not snapshot.number or snapshot.number != await source.find_snapshot_number(*snapshot.key):
            raise UnusableSnapshot("it is of another database, or of another state of this one")
        row_ids = snapshot.frozen.row_ids
        if len(row_ids) and int(row_ids[-1]) > await source.read_last_id():
            raise UnusableSnapshot("it holds rows that the database has never had")

    async def _check_witnesses(self, snapshot: Snapshot, source: VectorSource) -> None:
        """Raise UnusableSnapshot if rows of these ids now hold other vectors: the database was replaced."""
        row_ids, vectors = await source.read_vectors(np.array(list(snapshot.witnesses), np.int64))
        for row_id, digest in zip(row_ids.tolist(), compute_digests(vectors), strict=True):
            if snapshot.witnesses[row_id] != digest:
                raise UnusableSnapshot("it is of another database")

    async def _build(self, key: Key, source: VectorSource, row_ids: np.ndarray) -> VectorIndex | None:
        """An index of codes from the database, with all cores: nobody else wants them yet."""
        _, vectors = await source.read_vectors(row_ids[:1])
        index = self._indexes.get_or_make(*key, vectors.shape[1])
        rebuild = index.begin_rebuild(row_ids, n_threads=os.cpu_count() or 1)
        with ThreadPoolExecutor(1, thread_name_prefix="index-building") as thread:
            if not await self._run_rebuild(index, rebuild, source, thread):
                return None
        await self._save(key, index, source)
        return index

    # --- upkeep ---

    def start(self) -> None:
        """Begin the upkeep in the background."""
        self._upkeep = asyncio.create_task(self._keep_up(), name="index upkeep")
        self._is_wanted.set()

    async def close(self) -> None:
        """End the upkeep, then write the snapshots that are out of date."""
        for rebuild in self._rebuilds.values():
            rebuild.cancel()
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.gather(self._upkeep, return_exceptions=True)
        await asyncio.to_thread(self._upkeep_thread.shutdown)
        for key, index in self._indexes.items():
            if index.n_unsaved and self._writes_snapshots:
                try:
                    await self._save(key, index, self._find_source(key[1]))
                except ServiceError as error:
                    # What else has to be ended must be, with a database that cannot be read as well.
                    logger.warning("The index of %s is made anew at the next start: %s", key[0], error)

    async def _keep_up(self) -> None:
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            for key, index in self._indexes.items():
                while (step := index.next_step()) is not None:
                    try:
                        await self._do(step, key, index)
                    except Exception as error:
                        # Whatever it was: without upkeep the rows pile up as vectors, and nobody would know why.
                        trace = None if isinstance(error, ServiceError | OSError) else error
                        logger.warning(
                            "Upkeep of the index of %s failed, tried again later: %s", key[0], error, exc_info=trace
                        )
                        await asyncio.sleep(RETRY_SECONDS)

    async def _do(self, step: Step, key: Key, index: VectorIndex) -> None:
        if step is Step.MERGE:
            await self._merge(index)
        elif step is Step.SAVE:
            await self._save(key, index, self._find_source(key[1]))
        else:
            await self._rebuild(key, index)

    async def _merge(self, index: VectorIndex) -> None:
        # Not on the slow thread: searches wait for it.
        while await asyncio.to_thread(index.merge_some):  # noqa: ASYNC110 - it is this that makes room
            await asyncio.sleep(PAUSE_SECONDS)

    async def _rebuild(self, key: Key, index: VectorIndex) -> None:
        started = time.perf_counter()
        self._rebuilds[key] = rebuild = index.begin_rebuild(give_way=self._give_way)
        merging = asyncio.create_task(self._merge_while_rebuilding(index))
        try:
            is_adopted = await self._run_rebuild(index, rebuild, self._find_source(key[1]), self._upkeep_thread)
        finally:
            merging.cancel()
            await asyncio.gather(merging, return_exceptions=True)
            index.abandon(rebuild)
            del self._rebuilds[key]
        if is_adopted and index.tuning is not None:
            seconds = time.perf_counter() - started
            logger.info("Compressed the index of %s, %d rows, in %.1f s: %s", key[0], len(index), seconds, index.tuning)
        release_memory()

    def _give_way(self) -> None:
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while self._is_computing() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    async def _merge_while_rebuilding(self, index: VectorIndex) -> None:
        """New rows go to the codes that are in use meanwhile, or they would pile up as vectors."""
        while index.is_compressed:
            if index.has_many_new:
                await self._merge(index)
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    async def _run_rebuild(
        self, index: VectorIndex, rebuild: Rebuild, source: VectorSource, thread: ThreadPoolExecutor
    ) -> bool:
        """Every step of a rebuild; False if it was cancelled, or every row is gone."""
        try:
            row_ids, vectors = await _read_sample(rebuild.sample_ids, index.n_dims, source)
            await _run_on(thread, partial(rebuild.train, row_ids, vectors))
            del row_ids, vectors
            await self._add_rows(rebuild, rebuild.row_ids, source, thread)
            await _run_on(thread, rebuild.calibrate)
            while len(missing := await asyncio.to_thread(index.adopt, rebuild)):
                await self._add_rows(rebuild, missing, source, thread)
        except Cancelled:
            index.abandon(rebuild)
            return False
        return True

    async def _add_rows(
        self, rebuild: Rebuild, row_ids: np.ndarray, source: VectorSource, thread: ThreadPoolExecutor
    ) -> None:
        for part in _split(row_ids):
            found_ids, vectors = await source.read_vectors(part)
            await _run_on(thread, partial(rebuild.add, found_ids, vectors))

    # --- snapshots ---

    async def _save(self, key: Key, index: VectorIndex, source: VectorSource) -> None:
        """Write a snapshot; where that fails, the index is made from the database at the next start."""
        frozen = await asyncio.to_thread(index.freeze)
        if frozen is None or self._directory is None:
            return
        if not self._writes_snapshots:
            index.note_saved(frozen)
            return
        witnesses = await source.read_vectors(_choose_witnesses(frozen.row_ids))
        digests = dict(zip(witnesses[0].tolist(), compute_digests(witnesses[1]), strict=True))
        # Also where it fails: with no room on the disk, trying again after each row helps nobody.
        index.note_saved(frozen)
        snapshot = Snapshot(key, frozen, digests, draw_number())
        loop = asyncio.get_running_loop()

        def commit_number() -> None:
            asyncio.run_coroutine_threadsafe(source.put_snapshot_number(*key, snapshot.number), loop).result()

        await self._try_files(write_snapshot, self._directory, snapshot, commit_number)

    async def _try_files(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            await asyncio.to_thread(function, *arguments)
        except (OSError, ServiceError) as error:
            logger.warning("The snapshots of the indexes cannot be kept up to date: %s", error)


async def _run_on(thread: ThreadPoolExecutor, function: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(thread, function)


async def _read_sample(wanted_ids: np.ndarray, n_dims: int, source: VectorSource) -> FoundRows:
    """The rows that are there, written where they stay: the largest block of a rebuild is there once."""
    row_ids, vectors = np.empty(len(wanted_ids), np.int64), np.empty((len(wanted_ids), n_dims), np.float32)
    end = 0
    for part in _split(wanted_ids):
        found_ids, found_vectors = await source.read_vectors(part)
        start, end = end, end + len(found_ids)
        if len(found_ids):
            row_ids[start:end], vectors[start:end] = found_ids, found_vectors
    return row_ids[:end], vectors[:end]


def _split(row_ids: np.ndarray) -> list[np.ndarray]:
    return [row_ids[start : start + ROWS_PER_READ] for start in range(0, len(row_ids), ROWS_PER_READ)]


def _best_of_both(first: FoundRows, second: FoundRows, count: int) -> FoundRows:
    row_ids, scores = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    best = np.argsort(-scores, kind="stable")[:count]
    return row_ids[best], scores[best]


def _choose_witnesses(row_ids: np.ndarray) -> np.ndarray:
    """Ids from all over, and the newest: a restored backup gives the ids above its own a second time."""
    spread = np.linspace(0, len(row_ids) - 1, N_WITNESSES, dtype=np.int64)
    return np.union1d(row_ids[spread] if len(row_ids) else NO_IDS, row_ids[-N_NEWEST_WITNESSES:])


def _be_nice() -> None:
    """On Linux priorities are of threads: this one waits for the others. Elsewhere it takes its share."""
    if sys.platform != "linux":
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError:
        logger.debug("The thread of the index's upkeep keeps its priority")
