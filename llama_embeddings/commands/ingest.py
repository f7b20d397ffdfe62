"""`ingest PATH…`: embed files and whole directories into the store, with a progress bar and a table at the end.

Without `--server` this process opens the database and loads the model itself. That works beside a running server, whose
searches find what was added within a second. With `--server` the files go to a running server over HTTP, as jobs.

What is stored already is found by its hash and not computed again: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from llama_embeddings.commands.found_files import FoundFile, find_files
from llama_embeddings.commands.remote import RemoteServer
from llama_embeddings.errors import ServiceError, UnsupportedDocumentType
from llama_embeddings.services.document_files import DocumentFile
from llama_embeddings.services.documents import DocumentService
from llama_embeddings.services.embeddings import Source
from llama_embeddings.settings import Settings, load_settings
from llama_embeddings_server import MEGABYTE, start_services

# While one file is read, another one is computed.
FILES_AT_A_TIME = 2
EXIT_INTERRUPTED = 130

# Called with the share of a file that is stored, from 0 to 1.
ReportShare = Callable[[float], None]


class Outcome(StrEnum):
    """What became of a file."""

    TAKEN = "taken"
    STORED = "stored already"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table."""

    file: FoundFile
    outcome: Outcome
    n_sentences: int = 0
    reason: str = ""


class Taker(Protocol):
    """Whatever files can be handed to: the services in this process, or a server."""

    async def take(self, file: FoundFile, report: ReportShare) -> tuple[Source, int]:
        """Where the document came from, and its sentences. Raises ServiceError, OSError."""


class LocalTaker:
    """Hands files to the document service of this process."""

    def __init__(self, documents: DocumentService, *, model_name: str | None, collection: str) -> None:
        self._documents = documents
        self._model_name = model_name
        self._collection = collection

    async def take(self, file: FoundFile, report: ReportShare) -> tuple[Source, int]:
        with await asyncio.to_thread(DocumentFile.from_path, file.path) as opened:
            answer = await self._documents.get_or_compute(
                opened,
                filename=file.name,
                model_name=self._model_name,
                collection=self._collection,
                report=lambda n_done, n_total: report(n_done / n_total if n_total else 0.0),
            )
        return answer.source, answer.document.n_sentences


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = subparsers.add_parser("ingest", help="embed files and directories into the store", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a directory with all in it")
    parser.add_argument("--collection", default="default", help="collection to put the sentences in (%(default)s)")
    parser.add_argument("--model", help="model to embed with; DEFAULT_MODEL_NAME if absent")
    parser.add_argument("--server", help="address of a running server to send the files to")
    parser.add_argument("--token", help="the server's token; SECURITY_TOKEN if absent")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be taken and what skipped")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing failed, 1 if something did, 130 if interrupted."""
    try:
        lines = asyncio.run(ingest(arguments, load_settings()))
    except ServiceError as error:
        print(f"Cannot ingest: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was stored stays; the same command goes on from here.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(render_table(lines))
    return int(any(line.outcome is Outcome.FAILED for line in lines))


async def ingest(arguments: argparse.Namespace, settings: Settings) -> list[Line]:
    """Take everything in; a line for every file, in the order in which they were found."""
    max_bytes = int(settings.max_request_size_in_mb * MEGABYTE)
    found = await asyncio.to_thread(lambda: list(find_files(arguments.paths, max_bytes=max_bytes)))
    if arguments.dry_run:
        return [_skip(file) or Line(file, Outcome.TAKEN, reason="dry run: nothing was done") for file in found]
    async with AsyncExitStack() as stack:
        taker = await open_taker(arguments, settings, stack)
        return await take_all(taker, found)


async def open_taker(arguments: argparse.Namespace, settings: Settings, stack: AsyncExitStack) -> Taker:
    """A connection to the server that was named, or the services in this process."""
    if arguments.server:
        token = arguments.token or settings.security_token
        server = RemoteServer(
            arguments.server, token=token, model_name=arguments.model, collection=arguments.collection
        )
        return await stack.enter_async_context(server)
    services = await start_services(settings, None, stack)
    if arguments.model is not None:
        await services.models.check_known(arguments.model)
    return LocalTaker(services.documents, model_name=arguments.model, collection=arguments.collection)


async def take_all(taker: Taker, found: Sequence[FoundFile]) -> list[Line]:
    """Hand over all files, some at a time, under a progress bar of their bytes."""
    gate = asyncio.Semaphore(FILES_AT_A_TIME)
    n_bytes = sum(file.size_in_bytes for file in found if file.reason is None)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:

        async def take_one(file: FoundFile) -> Line:
            skipped = _skip(file)
            if skipped is not None:
                return skipped
            async with gate:
                return await take(taker, file, bar)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(take_one(file)) for file in found]
    return [task.result() for task in tasks]


def _skip(file: FoundFile) -> Line | None:
    return None if file.reason is None else Line(file, Outcome.SKIPPED, reason=file.reason)


async def take(taker: Taker, file: FoundFile, bar: tqdm) -> Line:
    """Hand over one file; whatever goes wrong with it is its own line."""
    n_shown = 0

    def show(share: float) -> None:
        nonlocal n_shown
        bar.update(int(share * file.size_in_bytes) - n_shown)
        n_shown = int(share * file.size_in_bytes)

    bar.set_postfix_str(file.name[-30:])
    try:
        source, n_sentences = await taker.take(file, show)
    except UnsupportedDocumentType as error:
        return Line(file, Outcome.SKIPPED, reason=error.message)
    except ServiceError as error:
        return Line(file, Outcome.FAILED, reason=error.message)
    except OSError as error:
        return Line(file, Outcome.FAILED, reason=error.strerror or type(error).__name__)
    finally:
        show(1.0)
    return Line(file, Outcome.STORED if source is Source.STORE else Outcome.TAKEN, n_sentences)


def render_table(lines: Sequence[Line]) -> str:
    """A line for every file, then how many there were of each outcome."""
    width = min(60, max((len(line.file.name) for line in lines), default=4))
    rows = [f"{'file':<{width}}  {'outcome':<14}  {'sentences':>9}  why"]
    for line in lines:
        count = str(line.n_sentences) if line.n_sentences else ""
        row = f"{line.file.name[-width:]:<{width}}  {line.outcome:<14}  {count:>9}  {line.reason}"
        rows.append(row.rstrip())
    counts = Counter(line.outcome for line in lines)
    n_sentences = sum(line.n_sentences for line in lines)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome)
    return "\n".join([*rows, "", f"{len(lines)} files: {summary}; {n_sentences} sentences"])
