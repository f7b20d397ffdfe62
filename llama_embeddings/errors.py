"""Every way the service can fail, as a class; knows nothing of HTTP.

A class carries a stable `code` (what a program matches on) and a message that names what was
wrong and what to do (what a person reads). `api/error_responses.py` maps the classes to statuses
and to each dialect's body; a class that is not in its table falls back to its nearest parent's row.

    ServiceError
    ├── InvalidInput                 the caller's own mistake
    │   ├── ContextLengthExceeded    longer than the model's window, and truncation was refused
    │   ├── UnsupportedMeasure
    │   ├── RequestTooLarge
    │   ├── ReceiveTimeout           its body came in too slowly
    │   ├── UnsupportedDocumentType
    │   ├── UnreadableDocument       the right type, but damaged, encrypted or without text
    │   ├── ResultNotAvailable       of a job that is not done, or will never be
    │   └── RequestAbandoned         the caller went away before the answer
    ├── NotFound
    │   └── ModelNotFound
    ├── InvalidToken
    ├── Unavailable                  worth retrying later; carries `retry_after_seconds`
    │   ├── Overloaded
    │   ├── ModelLoading
    │   ├── ShuttingDown
    │   ├── RequestTimeout           worked at for too long, and given up
    │   ├── NotReady                 a part of the server is not in order; asked by `/ready` alone
    │   ├── StoreBusy
    │   ├── StoreFull
    │   ├── FullTextUnavailable      the index of words is being filled; all else goes on
    │   └── ReadOnlyReplica          what would have to be written, by a server that only reads
    ├── InferenceFailed              the engine gave no usable vector for this text
    ├── ModelUnusable                a model file that cannot or must not be loaded
    ├── DownloadFailed
    ├── RamdiskFailed
    ├── ConfigurationError           stops the start, names the setting
    └── StoreUnusable                a database that must not be touched (newer version, corrupt)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class ServiceError(Exception):
    """Root of every failure the service knows.

    `field` and `index` locate the fault in the request where that is possible: the name of the
    parameter and, for a list, the position in it.
    """

    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.index = index

    def located(self, *, field: str | None, index: int | None) -> Self:
        """The same failure, placed in one caller's request; a shared computation knows no positions."""
        # Not `copy.copy`: it makes an exception anew from its message, which not every class here can be made from.
        placed = type(self).__new__(type(self), *self.args)
        placed.__dict__.update(self.__dict__, field=field, index=index)
        return placed


class InvalidInput(ServiceError):
    code = "invalid_request_error"


class ContextLengthExceeded(InvalidInput):
    code = "context_length_exceeded"

    def __init__(self, *, n_tokens: int, limit: int) -> None:
        super().__init__(
            f"The text has {n_tokens} tokens, the model takes at most {limit}. Shorten it, or ask for truncation."
        )
        self.n_tokens = n_tokens
        self.limit = limit


class UnsupportedMeasure(InvalidInput):
    def __init__(self, measure: str, known: Sequence[str]) -> None:
        super().__init__(
            f"Unknown similarity measure {measure!r}. Known: {', '.join(known)}.", field="similarity_measure"
        )


class RequestTooLarge(InvalidInput):
    code = "request_too_large"


class ReceiveTimeout(InvalidInput):
    code = "receive_timeout"


class UnsupportedDocumentType(InvalidInput):
    code = "unsupported_document_type"


class UnreadableDocument(InvalidInput):
    code = "unreadable_document"


class ResultNotAvailable(InvalidInput):
    code = "result_not_available"


class RequestAbandoned(InvalidInput):
    code = "request_abandoned"


class NotFound(ServiceError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model_name: str, known: Sequence[str]) -> None:
        listing = ", ".join(known) if known else "none yet"
        super().__init__(f"The model {model_name!r} is not available. Known models: {listing}.", field="model_name")
        self.model_name = model_name
        self.known = tuple(known)


class InvalidToken(ServiceError):
    code = "invalid_api_key"


class Unavailable(ServiceError):
    """Nothing is wrong with the request; it may succeed after `retry_after_seconds`."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(Unavailable):
    code = "overloaded"


class ModelLoading(Unavailable):
    code = "model_loading"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class RequestTimeout(Unavailable):
    code = "request_timeout"


class NotReady(Unavailable):
    code = "not_ready"


class StoreBusy(Unavailable):
    """Another process kept the database locked beyond all retries."""

    code = "store_busy"


class StoreFull(Unavailable):
    """The database cannot be written: no room on the disk, or a read-only place."""

    code = "store_not_writable"


class FullTextUnavailable(Unavailable):
    """The index of words is being filled, or was found damaged and is made anew; the texts are unharmed."""

    code = "full_text_unavailable"


class ReadOnlyReplica(Unavailable):
    """This server never writes; the one that does would take the same request."""

    code = "read_only_replica"

    def __init__(self, message: str | None = None, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(
            message
            or "This server is a read-only replica (READ_ONLY_REPLICA): it answers searches and texts that are stored. "
            "Send this to the server that writes to the database.",
            retry_after_seconds=retry_after_seconds,
        )


class InferenceFailed(ServiceError):
    code = "inference_failed"


class ModelUnusable(ServiceError):
    code = "model_unusable"


class DownloadFailed(ServiceError):
    code = "download_failed"


class RamdiskFailed(ServiceError):
    code = "ramdisk_failed"


class ConfigurationError(ServiceError):
    code = "configuration_error"

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message, field=setting)


class StoreUnusable(ServiceError):
    code = "store_unusable"
