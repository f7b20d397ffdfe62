"""Logging, request ids, and what is counted and timed about requests.

Texts and tokens of users never reach the log: callers log lengths and hashes, and what looks like a token in an address
or a header is masked on its way out. Knows no HTTP framework and no form in which figures are published.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE_NAME = "llama2_embeddings_fastapi_service.log"
LOG_FORMAT = "%(asctime)s - %(levelname)s - %(message)s"
MAX_LOG_BYTES = 10 * 1024 * 1024
N_LOG_BACKUPS = 5
# Upper bounds of the histogram of durations, in seconds.
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def new_request_id() -> str:
    # Told apart, not kept secret: a system call for it would be 2 % of a small request.
    return f"{random.getrandbits(64):016x}"


# What a request's time went into


@dataclass(slots=True)
class RequestNotes:
    """Filled in while a request is answered, by whoever does the work. Seconds are those of its own work: what
    another request computes for both is noted there."""

    caller: str = ""
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    store_seconds: float = 0.0


_notes: ContextVar[RequestNotes | None] = ContextVar("request_notes", default=None)


def begin_request(current_id: str) -> RequestNotes:
    """From here on, this task and those that it starts work for the request of this id."""
    request_id.set(current_id)
    notes = RequestNotes()
    _notes.set(notes)
    return notes


def note_caller(name: str) -> None:
    """Whose token opened the door; empty for a token without a name."""
    notes = _notes.get()
    if notes is not None:
        notes.caller = name


def note_engine(*, queue_seconds: float, compute_seconds: float) -> None:
    """How long a text waited for the engine and how long its pass took."""
    notes = _notes.get()
    if notes is not None:
        notes.queue_seconds = max(notes.queue_seconds, queue_seconds)
        notes.compute_seconds += compute_seconds


class TimedStore:
    """`with TimedStore():` adds the time inside to the current request's time for the store."""

    __slots__ = ("_started",)

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        notes = _notes.get()
        if notes is not None:
            notes.store_seconds += time.perf_counter() - self._started


@dataclass(slots=True)
class RequestSeries:
    """Requests of one method, route and status. `counts[i]` are those of at most DURATION_BUCKETS[i] seconds that the
    bucket before does not hold; the last are those beyond."""

    counts: list[int]
    seconds: float = 0.0


class RequestMeter:
    """Counts requests. Used on the event loop only, so it needs no lock."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str, int], RequestSeries] = {}
        self.n_under_way = 0

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Callers keep `method` and `route` to a bounded set of values."""
        key = (method, route, status)
        series = self.series.get(key)
        if series is None:
            series = self.series[key] = RequestSeries([0] * (len(DURATION_BUCKETS) + 1))
        series.counts[bisect_left(DURATION_BUCKETS, seconds)] += 1
        series.seconds += seconds


# The log

# In addresses (`?token=...`) and in headers (`Authorization: Bearer ...`), wherever they are quoted.
_TOKEN = re.compile(r"(?i)(\btoken=|\bbearer\s+)[^\s&\"'<>]+")


def mask_tokens(line: str) -> str:
    """The line with `***` for what looks like a caller's token."""
    lowered = line.lower()
    # Nearly every line has neither, and looking for the pattern would take as long as the rest of the formatting.
    if "token=" not in lowered and "bearer" not in lowered:
        return line
    return _TOKEN.sub(r"\1***", line)


class OnceFormatter(logging.Formatter):
    """Formats a record the first time that any handler asks, by another formatter."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        line: str | None = record.__dict__.get("line")
        if line is None:
            line = record.__dict__["line"] = self._formatter.format(record)
        return line


class TextFormatter(logging.Formatter):
    """Lines for people, with the id of the request being answered in front of the message."""

    def __init__(self) -> None:
        super().__init__(LOG_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        current = request_id.get()
        if current is not None:
            record.message = f"[{current}] {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return mask_tokens(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, and `request_id` and `exception` if any.

    What a record was given as `extra={"fields": {...}}` stands beside them.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": mask_tokens(record.getMessage()),
        }
        current = request_id.get()
        if current is not None:
            entry["request_id"] = current
        if record.exc_info:
            entry["exception"] = mask_tokens(self.formatException(record.exc_info))
        return json.dumps(entry | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class RotatingLog(RotatingFileHandler):
    """A log file whose disk may be full: said once on stderr, instead of a traceback for each line.

    Its size is counted, not asked for: the standard library looks at the file three times for each line.
    """

    has_complained = False
    n_bytes = 0

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        self.n_bytes = stream.tell()
        return stream

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802 - the standard library's name
        self.n_bytes += len(self.format(record).encode("utf-8", "replace")) + 1
        return self.n_bytes >= self.maxBytes

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self.n_bytes == 0:  # it went into a new file
            self.shouldRollover(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        if not self.has_complained:
            self.has_complained = True
            reason = sys.exception()
            print(f"The log file cannot be written ({reason}); its lines are on stdout.", file=sys.stderr, flush=True)


def open_rotating_log(directory: Path) -> RotatingFileHandler:
    """The log file; full ones move to `old_logs/` and the sixth is forgotten."""
    old_logs = directory / "old_logs"
    old_logs.mkdir(parents=True, exist_ok=True)
    handler = RotatingLog(
        directory / LOG_FILE_NAME, maxBytes=MAX_LOG_BYTES, backupCount=N_LOG_BACKUPS, encoding="utf-8"
    )
    handler.namer = lambda name: str(old_logs / Path(name).name)
    return handler


def configure_logging(directory: Path, level: str, log_format: str = "text") -> None:
    """Log to stdout and to the rotating file; where the file cannot be written, to stdout alone, and say so."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    problem: OSError | None = None
    try:
        handlers.append(open_rotating_log(directory))
    except OSError as error:
        problem = error
    formatter = OnceFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    _quieten(("sqlalchemy", "aiosqlite", "httpx", "httpcore", "numba", "pypdf", "huggingface_hub"))
    logging.getLogger("uvicorn.access").disabled = True
    if problem is not None:
        logging.getLogger(__name__).warning("No log file in %s (%s); logging to stdout only", directory, problem)


def _quieten(names: Iterable[str]) -> None:
    for noisy in names:
        logging.getLogger(noisy).setLevel(logging.WARNING)
