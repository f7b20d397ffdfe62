"""Logging and request ids. Texts and tokens of users never reach it: callers log lengths and hashes."""

from __future__ import annotations

import logging
import random
import sys
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE_NAME = "llama2_embeddings_fastapi_service.log"
LOG_FORMAT = "%(asctime)s - %(levelname)s - %(message)s"
MAX_LOG_BYTES = 10 * 1024 * 1024
N_LOG_BACKUPS = 5

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def new_request_id() -> str:
    # Told apart, not kept secret: a system call for it would be 2 % of a small request.
    return f"{random.getrandbits(64):016x}"


class _RequestIdFilter(logging.Filter):
    """Puts the id of the request being answered in front of the message."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        if current is not None and not getattr(record, "has_request_id", False):
            record.msg = f"[{current}] {record.msg}"
            record.has_request_id = True
        return True


def open_rotating_log(directory: Path) -> RotatingFileHandler:
    """The log file; full ones move to `old_logs/` and the sixth is forgotten."""
    old_logs = directory / "old_logs"
    old_logs.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        directory / LOG_FILE_NAME, maxBytes=MAX_LOG_BYTES, backupCount=N_LOG_BACKUPS, encoding="utf-8"
    )
    handler.namer = lambda name: str(old_logs / Path(name).name)
    return handler


def configure_logging(directory: Path, level: str) -> None:
    """Log to stdout and to the rotating file; where the file cannot be written, to stdout alone, and say so."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    problem: OSError | None = None
    try:
        handlers.append(open_rotating_log(directory))
    except OSError as error:
        problem = error
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        handler.addFilter(_RequestIdFilter())
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for noisy in ("sqlalchemy", "aiosqlite", "httpx", "httpcore", "numba", "pypdf", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True
    if problem is not None:
        logging.getLogger(__name__).warning("No log file in %s (%s); logging to stdout only", directory, problem)
