"""Documents embedded in the background: submitted, watched, cancelled, and gone on with after a restart.

A job is a row in the store and, until it is finished, a file in the spool directory that holds the document's bytes.
Both are written before the job is accepted, so that it survives the end of the process, `kill -9` included; it then
starts again, and finds the sentences that it has computed already in the store. Jobs are worked off in the order of
their submission, some at a time, and share the work on one document with everybody else who asks for it. A job that
failed or was cancelled leaves its sentences, which no search finds, for the next attempt; they go with the job.

Knows no HTTP. Only one process may work off the jobs of a database: the server does, the commands do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from bisect import bisect_right, insort
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from embeddings_data_models import (
    DEFAULT_COLLECTION,
    DocumentJob,
    JobDescription,
    JobError,
    JobLinks,
    JobState,
    RequestStamp,
    StoredDocument,
    utc_now,
)
from llama_embeddings.errors import (
    InvalidInput,
    NotFound,
    Overloaded,
    ResultNotAvailable,
    ServiceError,
    StoreFull,
    StoreUnusable,
    Unavailable,
)
from llama_embeddings.services.document_files import DocumentFile
from llama_embeddings.services.documents import DocumentAnswer, DocumentService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.progress import Progress
from llama_embeddings.services.removals import DocumentRemovals
from llama_embeddings.storage.store import EmbeddingStore

logger = logging.getLogger(__name__)

# A second job can be read while the first one is computed; more would only share the engine.
N_RUNNING_JOBS = 2
# What a job that has to wait (for a model's download, a locked database) waits at most before it tries again.
MAX_PAUSE_SECONDS = 30.0
# Those who watch a job hear of it this often at most, and of one that stands still this often at least.
MIN_EVENT_INTERVAL_SECONDS = 0.25
MAX_EVENT_INTERVAL_SECONDS = 15.0
SPOOL_MODE = 0o700
# Each submission makes room for others; a day's jobs at once would keep it waiting.
MAX_FORGOTTEN_AT_A_TIME = 1_000

# Where a job stands in a listing: when it was submitted, and its id.
_Place = tuple[datetime, str]


@dataclass(slots=True, eq=False)
class _Job:
    """A job in this process: what the store keeps of it, and what only matters while it runs."""

    record: DocumentJob
    progress: Progress = field(default_factory=Progress)
    task: asyncio.Task[DocumentAnswer] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    obstacle: ServiceError | None = None

    def report(self, n_done: int, n_total: int | None) -> None:
        self.obstacle = None
        self.progress.report(n_done, n_total)
        self.notify()

    async def wait_out(self, obstacle: ServiceError) -> None:
        """Note what keeps the job from going on for the moment, and wait until it is worth another try."""
        self.obstacle = obstacle
        self.notify()
        await asyncio.sleep(_choose_pause(obstacle))

    def notify(self) -> None:
        """Wake everybody who waits for a change, and let those who come wait for the next one."""
        self.changed.set()
        self.changed = asyncio.Event()


class JobService:
    """All jobs of a server; made idle, to be started and stopped."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        documents: DocumentService,
        removals: DocumentRemovals,
        *,
        spool_directory: Path,
        max_waiting: int,
        keep_finished: timedelta,
    ) -> None:
        self._store = store
        self._models = models
        self._documents = documents
        self._removals = removals
        self._spool_directory = spool_directory
        self._max_waiting = max_waiting
        self._keep_finished = keep_finished
        self._jobs: dict[str, _Job] = {}
        # There may be a hundred thousand finished ones: whatever is done for a request goes through few of them.
        self._places: list[_Place] = []
        self._unfinished: dict[str, _Job] = {}
        self._finished: deque[_Job] = deque()
        self._n_arriving = 0
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []
        self._is_stopping = False

    # --- start and stop ---

    async def start(self) -> None:
        """Take up the jobs that an earlier process left, oldest first, and begin to work."""
        await asyncio.to_thread(self._spool_directory.mkdir, mode=SPOOL_MODE, parents=True, exist_ok=True)
        for record in await self._store.list_jobs():
            self._take_up(_Job(record))
        self._finished = deque(sorted(self._finished, key=_finished_at))
        await asyncio.to_thread(self._remove_stray_files)
        if self._waiting.qsize():
            logger.info("Going on with %d jobs that were not finished", self._waiting.qsize())
        self._workers = [asyncio.create_task(self._work(), name=f"job-worker-{i}") for i in range(N_RUNNING_JOBS)]

    def _take_up(self, job: _Job) -> None:
        self._jobs[job.record.id] = job
        insort(self._places, _place(job.record))
        if job.record.state.is_final:
            self._finished.append(job)
        else:
            self._unfinished[job.record.id] = job
            self._waiting.put_nowait(job)

    def _remove_stray_files(self) -> None:
        """Files of jobs that are finished or were never accepted: the process ended between the two steps."""
        for path in self._spool_directory.iterdir():
            if path.name not in self._unfinished:
                path.unlink()

    async def stop(self) -> None:
        """Stop working; what is not finished is gone on with after the next start."""
        self._is_stopping = True
        tasks = [*self._workers, *(job.task for job in self._unfinished.values() if job.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in self._jobs.values():
            job.notify()

    # --- what callers ask for ---

    async def submit(
        self,
        file: DocumentFile,
        *,
        filename: str,
        model_name: str | None = None,
        collection: str = DEFAULT_COLLECTION,
        stamp: RequestStamp | None = None,
    ) -> JobDescription:
        """Accept a document, which from here on survives a restart.

        Raises ModelNotFound, Overloaded if too many jobs wait already, and StoreBusy or StoreFull.
        """
        self._store.require_writer()
        name = self._models.resolve(model_name)
        await self._models.check_known(name)
        await self._forget_expired()
        with self._arriving():
            record = DocumentJob(
                uuid4().hex, JobState.WAITING, filename, name, collection, file.size_in_bytes, stamp or RequestStamp()
            )
            await self._keep_new(record, file)
            job = _Job(record)
            self._take_up(job)
        logger.info("Accepted job %s: a document of %d bytes", record.id, record.size_in_bytes)
        return _describe(job)

    @contextlib.contextmanager
    def _arriving(self) -> Iterator[None]:
        """Count a job that is being written down among those that wait. Raises Overloaded if they are too many."""
        waiting = [job for job in self._unfinished.values() if job.record.state is JobState.WAITING]
        if len(waiting) + self._n_arriving >= self._max_waiting:
            raise Overloaded(
                f"{len(waiting)} jobs are waiting already (MAX_WAITING_JOBS). Submit the document again later.",
                retry_after_seconds=self._estimate_wait(),
            )
        self._n_arriving += 1
        try:
            yield
        finally:
            self._n_arriving -= 1

    def _estimate_wait(self) -> float:
        """Until the first of the running jobs is done, which makes room."""
        running = [job for job in self._unfinished.values() if job.record.state is JobState.RUNNING]
        left = [job.progress.seconds_left for job in running]
        return min((seconds for seconds in left if seconds is not None), default=MAX_PAUSE_SECONDS)

    async def _keep_new(self, record: DocumentJob, file: DocumentFile) -> None:
        path = self._spool_path(record.id)
        try:
            await asyncio.to_thread(file.copy_to, path)
            await self._store.put_job(record)
        except OSError as error:
            raise StoreFull(f"The document cannot be kept until its turn: {error.strerror}.") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def list_page(self, limit: int, after: str | None = None) -> tuple[list[JobDescription], str | None]:
        """Jobs, oldest first, from where an earlier page ended; and where this one ends, if more follow.

        Raises InvalidInput for what is not the end of a page, ReadOnlyReplica where another server has the jobs.
        """
        self._store.require_writer()
        first = bisect_right(self._places, _read_cursor(after)) if after is not None else 0
        places = self._places[first : first + limit]
        has_more = first + limit < len(self._places)
        return [_describe(self._jobs[job_id]) for _, job_id in places], _write_cursor(places[-1]) if has_more else None

    def get(self, job_id: str) -> JobDescription:
        """How far a job is. Raises NotFound."""
        return _describe(self._find(job_id))

    async def watch(self, job_id: str) -> AsyncIterator[JobDescription]:
        """How far a job is, now and after every change, until it is finished. Raises NotFound before the first."""
        job = self._find(job_id)
        while not self._is_stopping:
            changed = job.changed
            description = _describe(job)
            yield description
            if description.state.is_final:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), MAX_EVENT_INTERVAL_SECONDS)
            await asyncio.sleep(MIN_EVENT_INTERVAL_SECONDS)

    async def find_result(self, job_id: str) -> StoredDocument:
        """The document of a job that is done. Raises NotFound, and ResultNotAvailable for any other job."""
        record = self._find(job_id).record
        if record.state is not JobState.DONE:
            reason = f": {record.error_message}" if record.error_message else "."
            raise ResultNotAvailable(f"The job is {record.state}, so it has no result{reason}")
        assert record.document_row_id is not None
        document = await self._documents.find_by_row_id(record.document_row_id)
        if document is None:
            raise NotFound("The document of this job was deleted since. Submit it again.")
        return document

    async def cancel(self, job_id: str) -> JobDescription:
        """End a job, or forget it if it has ended already. Raises NotFound.

        A document that is there stays. What a job computed that did not come to its end goes with it.
        """
        job = self._find(job_id)
        record = job.record
        if record.state.is_final:
            await self._forget([job])
            if record.state is not JobState.DONE:
                await self._removals.delete_unfinished(
                    record.filename, model_name=record.model_name, collection=record.collection
                )
        else:
            await self._end(job, replace(job.record, state=JobState.CANCELLED, response_time=utc_now()))
            if job.task is not None:
                job.task.cancel()
        return _describe(job)

    def _find(self, job_id: str) -> _Job:
        self._store.require_writer()
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound("There is no such job, or it was finished long ago and is forgotten.", field="job_id")
        return job

    # --- the work ---

    async def _work(self) -> None:
        while True:
            job = await self._waiting.get()
            if job.record.state is not JobState.WAITING:
                continue
            try:
                await self._run(job)
            except Exception:
                # A worker that has ended would let all further jobs wait for ever.
                logger.exception("Job %s could not be brought to an end", job.record.id)
                job.notify()

    async def _run(self, job: _Job) -> None:
        # Not written down: after a restart it is one that waits.
        job.record = replace(job.record, state=JobState.RUNNING)
        job.notify()
        job.task = asyncio.create_task(self._compute(job))
        await asyncio.wait([job.task])
        if not job.record.state.is_final and not job.task.cancelled():
            await self._end(job, _conclude(job.record, job.task))
        job.task = None

    async def _compute(self, job: _Job) -> DocumentAnswer:
        """Embed the job's document; waits and tries again where that may help."""
        record = job.record
        with await asyncio.to_thread(_open_spooled, self._spool_path(record.id)) as file:
            while True:
                try:
                    return await self._documents.get_or_compute(
                        file,
                        filename=record.filename,
                        model_name=record.model_name,
                        collection=record.collection,
                        stamp=record.stamp,
                        report=job.report,
                    )
                except (Unavailable, StoreUnusable) as error:
                    # A database that was moved away cannot be told that the job failed; it may come back.
                    await job.wait_out(error)

    async def _end(self, job: _Job, record: DocumentJob) -> None:
        """Write down how a job ended, then let go of its file."""
        job.record = record
        while True:
            try:
                await self._store.put_job(record)
                break
            except (Unavailable, StoreUnusable) as error:
                logger.warning("Job %s ended, which cannot be written down yet: %s", record.id, error.message)
                await asyncio.sleep(_choose_pause(error))
        await asyncio.to_thread(self._spool_path(record.id).unlink, missing_ok=True)
        if self._unfinished.pop(record.id, None) is not None:
            self._finished.append(job)
        job.notify()
        logger.info("Job %s: %s", record.id, record.state)

    async def _forget_expired(self) -> None:
        oldest = utc_now() - self._keep_finished
        expired: list[_Job] = []
        while self._finished and _finished_at(self._finished[0]) < oldest and len(expired) < MAX_FORGOTTEN_AT_A_TIME:
            expired.append(self._finished.popleft())
        try:
            await self._forget([job for job in expired if job.record.id in self._jobs])
        except ServiceError:
            self._finished.extendleft(reversed(expired))
            raise

    async def _forget(self, jobs: list[_Job]) -> None:
        if jobs:
            await self._store.delete_jobs([job.record.id for job in jobs])
        for job in jobs:
            if self._jobs.pop(job.record.id, None) is not None:
                del self._places[bisect_right(self._places, _place(job.record)) - 1]

    def _spool_path(self, job_id: str) -> Path:
        return self._spool_directory / job_id


def _choose_pause(obstacle: ServiceError) -> float:
    seconds = obstacle.retry_after_seconds if isinstance(obstacle, Unavailable) else MAX_PAUSE_SECONDS
    return min(seconds, MAX_PAUSE_SECONDS)


def _place(record: DocumentJob) -> _Place:
    return record.stamp.request_time, record.id


def _finished_at(job: _Job) -> datetime:
    return job.record.response_time or job.record.stamp.request_time


def _write_cursor(place: _Place) -> str:
    return f"{place[0].isoformat()}/{place[1]}"


def _read_cursor(cursor: str) -> _Place:
    moment, _, job_id = cursor.partition("/")
    try:
        return datetime.fromisoformat(moment).astimezone(UTC), job_id
    except (ValueError, OverflowError):
        message = "This is not where a listing of jobs ended. Send the `next_cursor` of an earlier reply."
        raise InvalidInput(message, field="cursor") from None


def _open_spooled(path: Path) -> DocumentFile:
    try:
        return DocumentFile.from_path(path)
    except OSError as error:
        raise ServiceError(f"The job's file is gone or cannot be read ({error.strerror}). Submit it again.") from error


def _conclude(record: DocumentJob, task: asyncio.Task[DocumentAnswer]) -> DocumentJob:
    """The record of a job whose task has ended by itself."""
    finished = replace(record, response_time=utc_now())
    error = task.exception()
    if error is None:
        answer = task.result()
        return replace(
            finished,
            state=JobState.DONE,
            n_sentences=answer.document.n_sentences,
            source=str(answer.source),
            document_row_id=answer.document.row_id,
        )
    if isinstance(error, ServiceError):
        return replace(finished, state=JobState.FAILED, error_code=error.code, error_message=error.message)
    logger.error("Job %s failed unexpectedly", record.id, exc_info=error)
    message = "The server failed to do this job; its log has the reason under the job's id."
    return replace(finished, state=JobState.FAILED, error_code=ServiceError.code, error_message=message)


def _describe(job: _Job) -> JobDescription:
    record, progress = job.record, job.progress
    is_running = record.state is JobState.RUNNING
    is_done = record.state is JobState.DONE
    return JobDescription(
        id=record.id,
        state=record.state,
        filename=record.filename,
        model_name=record.model_name,
        size_in_bytes=record.size_in_bytes,
        n_sentences_done=(record.n_sentences or 0) if is_done else progress.n_done,
        n_sentences_total=record.n_sentences if is_done else progress.n_total,
        sentences_per_second=progress.steps_per_second if is_running else None,
        seconds_left=progress.seconds_left if is_running else None,
        source=record.source,
        request_time=record.stamp.request_time,
        response_time=record.response_time,
        error=_describe_error(job),
        links=JobLinks(
            self=f"/jobs/{record.id}",
            events=f"/jobs/{record.id}/events",
            result=f"/jobs/{record.id}/result" if is_done else None,
        ),
    )


def _describe_error(job: _Job) -> JobError | None:
    record = job.record
    if record.error_code is not None and record.error_message is not None:
        return JobError(code=record.error_code, detail=record.error_message)
    if record.state is JobState.RUNNING and job.obstacle is not None:
        return JobError(code=job.obstacle.code, detail=job.obstacle.message)
    return None
