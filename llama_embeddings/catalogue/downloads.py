"""Model files from the model hub: resumed, checked, one download a model, and nothing half done under a model's name.

A download lies in `.downloads/<name>/` of the models directory until its size, its SHA-256 and `check_gguf` say that it
is what it should be; then it is moved to `<name>.gguf` in one step. What came in before a cut, a stop or a `kill -9`
stays there and is continued, by this process or the next one. Processes that share the directory wait for each other.

The client is `huggingface_hub`: its addresses, headers, metadata, sessions and errors. Only the loop that writes bytes
is here, because `hf_hub_download` (2.4) begins anew with every call and cannot be bounded; for the same reasons files
come by plain HTTP, which every repository offers, also those that offer Xet (docs/decisions/0005).

Each download has a thread of its own, a daemon: the process may end at any moment. Loads no model, and knows nothing of
what is done with one.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import HfFileMetadata, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm, validate_repo_id

from llama_embeddings.catalogue import default_model
from llama_embeddings.catalogue.conversion import convert_sentence_transformers_to_gguf
from llama_embeddings.catalogue.entries import ENTRIES, CatalogueEntry, HubConversion, HubFile, ModelKind
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.errors import (
    DownloadFailed,
    InvalidInput,
    ModelUnusable,
    Overloaded,
    ServiceError,
    ShuttingDown,
)

logger = logging.getLogger(__name__)

HUB_ENDPOINT = "https://huggingface.co"
WORKSHOP = ".downloads"
LARGEST_NUMBER_OF_DOWNLOADS = 4  # at a time
LARGEST_NUMBER_OF_RECORDS = 100  # of downloads that are over
# Failures in a row, without a byte in between, after which a download is given up; and in all, whatever came in.
LARGEST_NUMBER_OF_FAILURES = 5
LARGEST_NUMBER_OF_ATTEMPTS = 100
LONGEST_PAUSE_SECONDS = 30.0
ANSWER_TIMEOUT_SECONDS = 15.0  # until the next bytes, not for the whole
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
RANGE_NOT_SATISFIABLE = 416
OPTIONAL_FILES = frozenset({"sentence_bert_config.json", "modules.json", "README.md"})
CONVERSION_FILES = (*default_model.NEEDED_FILES, "README.md")
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

LONGEST_ADDRESS = 2048
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
REVISION_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
PART_PATTERN = re.compile(r"-\d{5}-of-\d{5}$")
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
GIT_DIGEST_PATTERN = re.compile(r"[0-9a-f]{40}")

Result = TypeVar("Result")


class DownloadStage(StrEnum):
    DOWNLOADING = "downloading"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class DownloadState:
    """How far a download has come. `n_bytes_total` is None until the hub has announced it."""

    state: DownloadStage
    n_bytes_done: int
    n_bytes_total: int | None
    error: str | None = None

    @property
    def percentage(self) -> float | None:
        """From 0 to 100, with one decimal."""
        if not self.n_bytes_total:
            return None
        return min(round(100 * self.n_bytes_done / self.n_bytes_total, 1), 100.0)


class Downloads:
    """Downloads into one models directory. Used on one event loop; the work is done in threads."""

    def __init__(
        self,
        models_directory: Path,
        *,
        allowed_hosts: frozenset[str],
        max_bytes: int,
        endpoint: str = HUB_ENDPOINT,
        token: str | None = None,
        pause_seconds: float = 1.0,
    ) -> None:
        """`max_bytes` bounds one model; `pause_seconds` is the first pause after a failure, doubled with each next.

        `allowed_hosts` are those of which addresses may be given. The token goes to `endpoint` only.
        """
        self._directory = models_directory
        self._endpoint = endpoint.rstrip("/")
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_bytes = max_bytes
        self._token = token
        self._pause_seconds = pause_seconds
        self._closing = threading.Event()
        self._downloads: dict[str, Download] = {}

    def parse_address(self, url: str) -> CatalogueEntry:
        """The model behind the address of a GGUF on the hub, named after the file.

        Raises InvalidInput, which says what an address must be like.
        """
        parts = split_address(url)
        self._check_host(parts)
        file = parse_hub_path(parts)
        name = check_name(Path(file.file_name).name.removesuffix(".gguf"))
        origin = f"{parts.scheme}://{parts.netloc.lower()}"
        if name in ENTRIES:
            refuse_address(f"{name!r} is a model of the catalogue; ask for it by its name")
        source = HubFile(
            file.repository, file.file_name, file.revision, endpoint=None if origin == self._endpoint else origin
        )
        return CatalogueEntry(name=name, kind=ModelKind.EMBEDDING, source=source)

    def _check_host(self, parts: SplitResult) -> None:
        host = parts.hostname or ""
        if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not is_loopback(host)):
            refuse_address("it must begin with https://")
        if host not in self._allowed_hosts:
            refuse_address(
                f"the host {host!r} is not among the allowed ones ({', '.join(sorted(self._allowed_hosts))})"
            )
        if parts.port is not None and not is_loopback(host):
            refuse_address("it must not name a port")

    async def fetch(self, entry: CatalogueEntry) -> Path:
        """The model's file, downloaded now if it is not there. Callers that go away do not stop the download.

        Raises DownloadFailed, Overloaded when too many downloads are under way, and ShuttingDown.
        """
        target = self._find_target(entry)
        if target.is_file():
            return target
        return await asyncio.shield(asyncio.wrap_future(self._join_or_begin(entry).outcome))

    def start(self, entry: CatalogueEntry) -> None:
        """Begin a download in the background, unless it is under way or the file is there. Raises as `fetch` does."""
        if not self._find_target(entry).is_file():
            self._join_or_begin(entry)

    def states(self) -> dict[str, DownloadState]:
        """Downloads by the names of their models: those under way, and how the latest ones ended."""
        return {name: download.describe() for name, download in self._downloads.items()}

    async def close(self, *, timeout_seconds: float = 5.0) -> None:
        """Stop all downloads; what came in stays for the next time. A thread that does not stop in time is left."""
        self._closing.set()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while self._list_unfinished() and loop.time() < deadline:  # noqa: ASYNC110 threads set no event of this loop
            await asyncio.sleep(0.02)
        for download in self._list_unfinished():
            logger.warning(
                "The download of %s did not stop within %g s and is left behind", download.name, timeout_seconds
            )
            download.fail(ShuttingDown("The server is shutting down; the download goes on at its next start."))

    def _list_unfinished(self) -> list[Download]:
        return [download for download in self._downloads.values() if not download.outcome.done()]

    def _find_target(self, entry: CatalogueEntry) -> Path:
        return self._directory / f"{check_name(entry.name)}.gguf"

    def _join_or_begin(self, entry: CatalogueEntry) -> Download:
        known = self._downloads.get(entry.name)
        if known is not None and not known.outcome.done():
            if known.entry.source != entry.source:
                refuse_address(f"another file is being downloaded under the name {entry.name!r}")
            return known
        self._check_room_for_one_more()
        self._downloads.pop(entry.name, None)  # so that the newest come last
        download = self._downloads[entry.name] = Download(entry)
        threading.Thread(target=self._work, args=(download,), name=f"download-{entry.name}", daemon=True).start()
        return download

    def _check_room_for_one_more(self) -> None:
        if self._closing.is_set():
            raise ShuttingDown("The server is shutting down; ask again when it is back.")
        unfinished = self._list_unfinished()
        if len(unfinished) >= LARGEST_NUMBER_OF_DOWNLOADS:
            names = ", ".join(download.name for download in unfinished)
            raise Overloaded(f"Already downloading {names}. Try again when one is done.", retry_after_seconds=60.0)
        over = [name for name, download in self._downloads.items() if download.outcome.done()]
        for name in over[: max(0, len(over) - LARGEST_NUMBER_OF_RECORDS + 1)]:
            del self._downloads[name]

    # What follows runs in the download's thread.

    def _work(self, download: Download) -> None:
        """Answer the download's future, whatever happens."""
        try:
            with download.show_bar():
                download.succeed(self._obtain(download))
        except ServiceError as error:
            logger.warning("The download of %s failed: %s", download.name, error.message)
            download.fail(error)
        except OSError as error:
            download.fail(self._explain_os_error(download, error))
        except Exception as error:  # broad: whoever waits must be answered, and a thread has no caller to raise to
            logger.exception("The download of %s failed", download.name)
            download.fail(
                DownloadFailed(f"{download.name} could not be downloaded ({type(error).__name__}); see the log.")
            )

    def _explain_os_error(self, download: Download, error: OSError) -> DownloadFailed:
        logger.warning("The download of %s failed: %s", download.name, error)
        reason = error.strerror or type(error).__name__
        if error.errno not in NO_ROOM:
            return DownloadFailed(
                f"{download.name} cannot be written to the models directory ({reason}). Check that it is a directory "
                "that the server may write to."
            )
        # A full disk stops more than downloads: give back what was taken.
        shutil.rmtree(self._directory / WORKSHOP / download.name, ignore_errors=True)
        return DownloadFailed(f"There is no room left for {download.name} ({reason}). Make room and start it again.")

    def _obtain(self, download: Download) -> Path:
        target = self._find_target(download.entry)
        if download.name == default_model.MODEL_NAME:
            return default_model.get_default_model(self._directory, progress=logger.info)
        workspace = self._directory / WORKSHOP / download.name
        workspace.parent.mkdir(parents=True, exist_ok=True)
        with self._hold_lock(download.name):
            if not target.is_file():
                workspace.mkdir(exist_ok=True)
                self._make(download, workspace, target)
            shutil.rmtree(workspace, ignore_errors=True)
        return target

    @contextmanager
    def _hold_lock(self, name: str) -> Iterator[None]:
        """Be the only process that downloads this model; the others find the file when it is their turn."""
        lock = FileLock(self._directory / WORKSHOP / f"{name}.lock")
        while True:
            self._check_open()
            try:
                lock.acquire(timeout=0.5)
                break
            except Timeout:
                continue
        try:
            yield
        finally:
            lock.release()

    def _make(self, download: Download, workspace: Path, target: Path) -> None:
        ready = workspace / target.name
        source = download.entry.source
        if isinstance(source, HubFile):
            self._bring_file(download, source, workspace, ready)
        else:
            self._bring_and_convert(download, source, workspace, ready)
        try:
            check_gguf(ready)
        except ModelUnusable as error:
            ready.unlink(missing_ok=True)
            raise DownloadFailed(f"What was downloaded as {download.name} cannot be used: {error.message}") from error
        os.replace(ready, target)
        logger.info("Downloaded %s, %d bytes", target.name, target.stat().st_size)

    def _bring_file(self, download: Download, source: HubFile, workspace: Path, ready: Path) -> None:
        transfer = self._new_transfer(source.endpoint)
        remote = transfer.look_up(source.repository, source.file_name, source.revision)
        remote = remote.expect(source.sha256, source.size_in_bytes)
        self._check_sizes(download, [remote], workspace)
        transfer.bring(remote, workspace, ready, download.move_to)

    def _bring_and_convert(self, download: Download, source: HubConversion, workspace: Path, ready: Path) -> None:
        """The files of the directory, all of one commit, then the conversion."""
        transfer = self._new_transfer(None)
        directory = workspace / "source"
        remotes = look_up_directory(transfer, source)
        self._check_sizes(download, remotes, workspace)
        n_bytes = 0
        for remote in remotes:
            transfer.bring(remote, workspace, directory / remote.name, partial(download.move_past, n_bytes))
            n_bytes += (directory / remote.name).stat().st_size
        try:
            convert_sentence_transformers_to_gguf(
                directory,
                ready,
                quantisation=source.quantisation,
                model_name=download.name,
                licence=download.entry.licence,
            )
        except ModelUnusable as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise DownloadFailed(f"{download.name} cannot be converted to GGUF: {error.message}") from error

    def _check_sizes(self, download: Download, remotes: list[RemoteFile], workspace: Path) -> None:
        """Hold what is announced against the bound and the room on the disk, before a byte is fetched."""
        sizes = [remote.size_in_bytes for remote in remotes]
        total = sum(size for size in sizes if size is not None)
        if total > self._max_bytes:
            raise DownloadFailed(
                f"{download.name} has {total} bytes; at most {self._max_bytes} may be downloaded for one model."
            )
        if None not in sizes:
            download.n_bytes_total = total
        there = sum(path.stat().st_size for path in workspace.rglob("*") if path.is_file())
        free = shutil.disk_usage(workspace).free
        if total - there > free:
            raise DownloadFailed(
                f"{download.name} needs {total - there} more bytes in the models directory, where {free} are free. "
                "Make room and start it again."
            )

    def _new_transfer(self, endpoint: str | None) -> Transfer:
        return Transfer(
            endpoint=endpoint or self._endpoint,
            token=self._token if endpoint is None else None,
            max_bytes=self._max_bytes,
            pause_seconds=self._pause_seconds,
            closing=self._closing,
        )

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise ShuttingDown("The server is shutting down; the download goes on at its next start.")


class Download:
    """One model on its way: its progress, on the console and for lists, and its outcome."""

    def __init__(self, entry: CatalogueEntry) -> None:
        self.entry = entry
        self.name = entry.name
        self.n_bytes_done = 0
        self.n_bytes_total: int | None = None
        self.outcome: Future[Path] = Future()
        self.outcome.set_running_or_notify_cancel()  # from here on nobody can cancel it
        self._bar: tqdm | None = None
        self._n_tenths_logged = 0

    @contextmanager
    def show_bar(self) -> Iterator[None]:
        """Draw a bar on the console, if there is one, for as long as the block lasts."""
        with tqdm(desc=self.name, unit="B", unit_scale=True, disable=None) as bar:
            self._bar = bar
            yield

    def move_past(self, n_bytes_before: int, n_bytes: int) -> None:
        """So many bytes of a file are there, and those of the files before it."""
        self.move_to(n_bytes_before + n_bytes)

    def move_to(self, n_bytes: int) -> None:
        """So many bytes are there in all. The number goes down when a file has to begin anew."""
        moved, self.n_bytes_done = n_bytes - self.n_bytes_done, n_bytes
        if self._bar is None:
            return
        self._bar.total = self.n_bytes_total
        self._bar.update(moved)
        tenths = 10 * n_bytes // self.n_bytes_total if self.n_bytes_total else 0
        if self._bar.disable and tenths > self._n_tenths_logged:  # no console: say it in the log, now and then
            logger.info("Downloading %s: %d %% of %d bytes", self.name, 10 * tenths, self.n_bytes_total)
            self._n_tenths_logged = tenths

    def succeed(self, path: Path) -> None:
        try:
            self.outcome.set_result(path)
        except InvalidStateError:
            logger.info("The download of %s ended after it had been given up", self.name)

    def fail(self, error: ServiceError) -> None:
        try:
            self.outcome.set_exception(error)
        except InvalidStateError:
            logger.info("The download of %s ended after it had been given up", self.name)

    def describe(self) -> DownloadState:
        if not self.outcome.done():
            return DownloadState(DownloadStage.DOWNLOADING, self.n_bytes_done, self.n_bytes_total)
        error = self.outcome.exception()
        if error is None:
            return DownloadState(DownloadStage.DONE, self.n_bytes_done, self.n_bytes_total)
        return DownloadState(DownloadStage.FAILED, self.n_bytes_done, self.n_bytes_total, str(error))


# From the hub to the disk


class Interrupted(Exception):
    """A delivery ended early or was not what was asked for; another attempt may do better."""


class FileMissing(DownloadFailed):
    """The repository is there, but has no such file."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the hub announces of a file. `digest` is its SHA-256 or, for files in git, the digest that git gives it."""

    repository: str
    name: str
    commit: str
    digest: str
    size_in_bytes: int | None

    def expect(self, sha256: str | None, size_in_bytes: int | None) -> RemoteFile:
        """The same, held against what is known. Raises DownloadFailed if the hub has another file."""
        announced = self.digest if SHA256_PATTERN.fullmatch(self.digest) else None
        if sha256 is not None and announced is not None and sha256 != announced:
            raise DownloadFailed(
                f"The hub's {self.name} has the SHA-256 {announced}, expected is {sha256}: it is another file."
            )
        if sha256 is None and announced is None and not GIT_DIGEST_PATTERN.fullmatch(self.digest):
            raise DownloadFailed(f"The hub announces no digest of {self.name}, so it is not downloaded.")
        sizes = {size for size in (self.size_in_bytes, size_in_bytes) if size is not None}
        if len(sizes) > 1:
            raise DownloadFailed(
                f"The hub's {self.name} has {self.size_in_bytes} bytes, expected are {size_in_bytes}: "
                "it is another file."
            )
        return replace(self, digest=sha256 or self.digest, size_in_bytes=next(iter(sizes), None))


def look_up_directory(transfer: Transfer, source: HubConversion) -> list[RemoteFile]:
    """The files that a conversion needs, all of the commit that the first one has."""
    remotes: list[RemoteFile] = []
    for name in CONVERSION_FILES:
        revision = remotes[0].commit if remotes else source.revision
        try:
            remote = transfer.look_up(source.repository, name, revision)
        except FileMissing:
            if name not in OPTIONAL_FILES:
                raise
        else:
            remotes.append(remote.expect((source.file_digests or {}).get(name), None))
    return remotes


class Transfer:
    """Fetches files from one hub, with patience. Blocks."""

    def __init__(
        self, *, endpoint: str, token: str | None, max_bytes: int, pause_seconds: float, closing: threading.Event
    ) -> None:
        self._endpoint = endpoint
        # False, not None: with None the client would look for a token in the environment and in the user's home.
        self._token: str | bool = token if token is not None else False
        self._max_bytes = max_bytes
        self._pause_seconds = pause_seconds
        self._closing = closing

    def look_up(self, repository: str, name: str, revision: str) -> RemoteFile:
        """Ask the hub for a file's commit, digest and size. Raises DownloadFailed, and FileMissing."""
        url = hf_hub_url(repository, name, revision=revision, endpoint=self._endpoint)

        def ask() -> HfFileMetadata:
            return get_hf_file_metadata(url, token=self._token, timeout=ANSWER_TIMEOUT_SECONDS, endpoint=self._endpoint)

        with explaining(repository, name, revision):
            metadata = self._persist(name, ask, lambda: 0)
        if metadata.commit_hash is None or metadata.etag is None:
            raise DownloadFailed(f"{self._endpoint} does not answer as a model hub does; check its address.")
        return RemoteFile(repository, name, metadata.commit_hash, metadata.etag, metadata.size)

    def bring(self, remote: RemoteFile, workspace: Path, target: Path, move_to: Callable[[int], None]) -> None:
        """Put a checked file to `target`, from what is there already on. `move_to` is told how many bytes there are.

        Raises DownloadFailed; what came in is kept unless it is wrong.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_file() and compute_digest(target, remote.digest) == remote.digest):
            unfinished = workspace / f"{compute_key(remote)}.partial"
            for other in set(workspace.glob("*.partial")) - {unfinished}:
                other.unlink(missing_ok=True)  # of a revision that is no longer wanted
            self._fill(remote, unfinished, move_to)
            check_digest(unfinished, remote)
            os.replace(unfinished, target)
        move_to(target.stat().st_size)

    def _fill(self, remote: RemoteFile, unfinished: Path, move_to: Callable[[int], None]) -> None:
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        # A session of its own: the client's shared one is closed for all when one request of one thread fails.
        with (
            httpx2.Client(
                headers=headers,
                follow_redirects=True,
                timeout=ANSWER_TIMEOUT_SECONDS,
                event_hooks={"request": [check_encrypted]},
            ) as session,
            unfinished.open("ab", buffering=0) as file,
        ):
            with explaining(remote.repository, remote.name, remote.commit):
                self._persist(remote.name, lambda: self._continue(session, remote, file, move_to), file.tell)
            os.fsync(file.fileno())

    def _continue(
        self, session: httpx2.Client, remote: RemoteFile, file: FileIO, move_to: Callable[[int], None]
    ) -> None:
        """One request for what is missing. Raises Interrupted if it does not bring all of it."""
        size = remote.size_in_bytes
        if size is not None and file.tell() > size:
            cut_to_nothing(file)
        move_to(file.tell())
        if file.tell() == size:
            return
        url = hf_hub_url(remote.repository, remote.name, revision=remote.commit, endpoint=self._endpoint)
        wanted = {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
        with session.stream("GET", url, headers=wanted) as response:
            if response.status_code == RANGE_NOT_SATISFIABLE:
                cut_to_nothing(file)
                raise Interrupted("the hub does not continue where the file ends")
            hf_raise_for_status(response)
            check_start(response, file)
            for chunk in response.iter_bytes():
                self._write(remote, file, chunk)
                move_to(file.tell())
        if size is not None and file.tell() != size:
            raise Interrupted(f"{file.tell()} of {size} bytes came")

    def _write(self, remote: RemoteFile, file: FileIO, chunk: bytes) -> None:
        if self._closing.is_set():
            raise ShuttingDown("The server is shutting down; the download goes on at its next start.")
        limit = self._max_bytes if remote.size_in_bytes is None else remote.size_in_bytes
        if file.tell() + len(chunk) > limit:
            cut_to_nothing(file)
            raise DownloadFailed(f"{remote.name} is larger than {limit} bytes, which it must not be. It is not kept.")
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]

    def _persist(self, name: str, attempt: Callable[[], Result], measure: Callable[[], int]) -> Result:
        """Try again, with longer and longer pauses, after what may pass; progress makes patience new."""
        n_failures, furthest = 0, measure()
        for _ in range(LARGEST_NUMBER_OF_ATTEMPTS):
            try:
                return attempt()
            except (Interrupted, httpx2.TransportError, HfHubHTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED_STATUSES:
                    raise
                # Where it has been before is no progress: a file that begins anew again and again must come to an end.
                n_failures = 1 if measure() > furthest else n_failures + 1
                furthest = max(furthest, measure())
                if n_failures >= LARGEST_NUMBER_OF_FAILURES:
                    give_up(name, error)
                logger.info("%s was interrupted (%s), attempt %d follows", name, summarise(error), n_failures + 1)
                pause = max(self._pause_seconds * 2 ** (n_failures - 1), find_wanted_pause(error))
            if self._closing.wait(min(pause, LONGEST_PAUSE_SECONDS)):
                raise ShuttingDown("The server is shutting down; the download goes on at its next start.")
        raise DownloadFailed(f"{name} was interrupted {LARGEST_NUMBER_OF_ATTEMPTS} times. Start it again later.")


def check_encrypted(request: httpx2.Request) -> None:
    """Asked before every request, those after a redirect included. Raises DownloadFailed for one without https."""
    if request.url.scheme != "https" and not is_loopback(request.url.host):
        raise DownloadFailed(f"The hub sends on to {request.url.host!r} without https; nothing is taken from there.")


def cut_to_nothing(file: FileIO) -> None:
    file.seek(0)
    file.truncate()


def check_start(response: httpx2.Response, file: FileIO) -> None:
    """Be where the answer begins: at the start of the file if the hub does not know ranges."""
    if response.status_code != httpx2.codes.PARTIAL_CONTENT:
        cut_to_nothing(file)
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {file.tell()}-"):
        cut_to_nothing(file)
        raise Interrupted("the hub sent another part than asked for")


def find_wanted_pause(error: Exception) -> float:
    """The seconds that a busy hub asks to wait."""
    wanted = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(wanted) if wanted.isdecimal() else 0.0


def give_up(name: str, error: Exception) -> NoReturn:
    raise DownloadFailed(
        f"{name} could not be downloaded ({summarise(error)}). Check the connection and start it again: "
        "what came in is kept."
    ) from error


def summarise(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers with status {error.response.status_code}"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def explaining(repository: str, name: str, revision: str) -> Iterator[None]:
    """Raise the client's refusals as DownloadFailed, in words that say what to do."""
    try:
        yield
    except EntryNotFoundError as error:
        raise FileMissing(f"{repository} has no file {name} at the revision {revision}; check its address.") from error
    except (HfHubHTTPError, httpx2.HTTPError, ConnectionError) as error:
        raise DownloadFailed(f"{name} cannot be downloaded: {explain_refusal(repository, revision, error)}.") from error


def explain_refusal(repository: str, revision: str, error: Exception) -> str:
    """Why the hub does not give a file. The order counts: a gated repository is also one that is not found."""
    explanations: tuple[tuple[type[Exception], str], ...] = (
        (GatedRepoError, f"the licence of {repository} has to be accepted on the hub, and that account's token be set"),
        (RepositoryNotFoundError, f"the hub has no repository {repository}, or it is private and needs a token"),
        (RevisionNotFoundError, f"{repository} has no revision {revision}"),
    )
    return next((text for class_, text in explanations if isinstance(error, class_)), summarise(error))


def compute_key(remote: RemoteFile) -> str:
    """The same for the same content of the same file, so that only that is continued."""
    return hashlib.sha256(f"{remote.repository}/{remote.name}@{remote.digest}".encode()).hexdigest()[:32]


def compute_digest(path: Path, expected: str) -> str:
    """SHA-256 of a file or, if git's digest is expected, that: SHA-1 of a header and the bytes."""
    with path.open("rb") as file:
        if GIT_DIGEST_PATTERN.fullmatch(expected) is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        digest.update(file.read())  # files in git are small
        return digest.hexdigest()


def check_digest(unfinished: Path, remote: RemoteFile) -> None:
    digest = compute_digest(unfinished, remote.digest)
    if digest != remote.digest:
        unfinished.unlink(missing_ok=True)
        raise DownloadFailed(
            f"{remote.name} arrived with the digest {digest}, expected is {remote.digest}. It is not kept; start it "
            "again."
        )


# Addresses


def refuse_address(reason: str) -> NoReturn:
    raise InvalidInput(
        f"This address cannot be used: {reason}. It must be that of a GGUF file on the model hub, like "
        "https://huggingface.co/<owner>/<repository>/resolve/main/<file>.gguf.",
        field="model_url",
    )


def split_address(url: str) -> SplitResult:
    """The parts of an address that holds nothing but what it needs."""
    # urlsplit drops line breaks and tabs in silence, so they are looked for before it sees them.
    if len(url) > LONGEST_ADDRESS or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        refuse_address("it is too long, or holds blanks, backslashes or other characters that must be encoded")
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        refuse_address("it is malformed")
    if not port_is_valid or parts.username is not None or parts.password is not None:
        refuse_address("it must not name a user, a password or port 0")
    if parts.query not in ("", "download=true") or parts.fragment:
        refuse_address("it must not carry a query or a fragment")
    return parts


def parse_hub_path(parts: SplitResult) -> HubFile:
    """Repository, revision and file of `/<owner>/<repository>/resolve|blob/<revision>/<path>`."""
    segments = [unquote(segment) for segment in parts.path.split("/")[1:]]
    if len(segments) < 5 or segments[2] not in ("resolve", "blob"):
        refuse_address("its path is not that of a file on the hub")
    repository, revision, path = "/".join(segments[:2]), segments[3], segments[4:]
    if any(segment in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", segment) for segment in path):
        refuse_address("its path leaves the repository")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        refuse_address(f"{repository!r} cannot be the name of a repository")
    if REVISION_PATTERN.fullmatch(revision) is None or ".." in revision:
        refuse_address(f"{revision!r} cannot be a revision")
    if not path[-1].endswith(".gguf"):
        refuse_address("it does not end in .gguf")
    if PART_PATTERN.search(path[-1].removesuffix(".gguf")):
        refuse_address("the file is one part of several; models must be one file")
    return HubFile(repository, "/".join(path), revision)


def check_name(name: str) -> str:
    """The name of a model, which becomes a file name."""
    if NAME_PATTERN.fullmatch(name) is None:
        refuse_address(f"{name!r} cannot be a model's name: letters, digits, '.', '_' and '-', at most 128")
    return name


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
