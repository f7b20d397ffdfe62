"""What every request passes through: its id, its line in the log, limits in size and time, the headers of its reply.

Pure ASGI, so that replies stream and the cost is microseconds. Query strings are never logged: they can hold tokens.
Connections on which no request has come in yet are `connections.py`'s affair.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_embeddings import observability
from llama_embeddings.api.error_responses import render_error, status_of
from llama_embeddings.api.json_bounds import SMALL_BODY_BYTES, WEIGHT_OF_CONTAINER, JsonCounter
from llama_embeddings.errors import Overloaded, ReceiveTimeout, RequestTimeout, RequestTooLarge

logger = logging.getLogger(__name__)

_PLAUSIBLE_REQUEST_ID = re.compile(rb"[\w\-.:]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# A body that comes in slower than this is cut off once its grace is used up.
MIN_BYTES_PER_SECOND = 10_000

_EVERYWHERE = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),  # addresses can hold tokens
]
_HEADERS_OF_REPLIES = [
    *_EVERYWHERE,
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
# Swagger UI sets styles on elements and draws its icons from data: addresses; scripts are files of this server alone.
_HEADERS_OF_PAGES = [
    *_EVERYWHERE,
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


def is_page(path: str) -> bool:
    return path == "/" or path.startswith("/static/")


class RequestContext:
    """Gives each request an id, logs how it ended, counts it, and puts the id and headers for safety on the reply."""

    def __init__(self, app: ASGIApp, *, meter: observability.RequestMeter, slow_request_seconds: float = 0.0) -> None:
        self._app = app
        self._meter = meter
        self._slow_request_seconds = slow_request_seconds or math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        current = _find_request_id(scope)
        notes = observability.begin_request(current)
        headers = [*(_HEADERS_OF_PAGES if is_page(scope["path"]) else _HEADERS_OF_REPLIES)]
        headers.append((b"x-request-id", current.encode("ascii")))
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        self._meter.n_under_way += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._meter.n_under_way -= 1
            seconds = time.monotonic() - started
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._meter.count(method, find_route(scope), status, seconds)
            self._log(scope, status, seconds, notes)

    def _log(self, scope: Scope, status: int, seconds: float, notes: observability.RequestNotes) -> None:
        # Quoted again: a path can hold line breaks that would look like lines of the log's own.
        method, path = scope["method"], quote(scope["path"])
        level = logging.DEBUG if path == "/health" else logging.INFO
        if logger.isEnabledFor(level):
            by = f" by {notes.caller}" if notes.caller else ""
            logger.log(level, "%s %s %d in %.1f ms%s", method, path, status, 1000 * seconds, by)
        if seconds > self._slow_request_seconds:
            logger.warning(
                "Slow: %s %s took %.3f s; waited for the engine %.3f s, computed %.3f s, store %.3f s",
                *(method, path, seconds, notes.queue_seconds, notes.compute_seconds, notes.store_seconds),
                extra={
                    "fields": {
                        "route": find_route(scope),
                        "total_seconds": seconds,
                        "queue_seconds": notes.queue_seconds,
                        "compute_seconds": notes.compute_seconds,
                        "store_seconds": notes.store_seconds,
                    }
                },
            )


def find_route(scope: Scope) -> str:
    """The template that a request's path fits, so that there are no more of them than routes; `none` if it fits none,
    or was refused before it was looked for."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "none"


def _find_request_id(scope: Scope) -> str:
    """The caller's id if it sent a plausible one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _PLAUSIBLE_REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return observability.new_request_id()


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request. `work_seconds` may be infinite."""

    max_bytes: int
    max_bytes_in_flight: int
    max_json_values: int
    receive_seconds: float
    work_seconds: float


class LimitSizeAndTime:
    """Refuses bodies over a bound, ends requests that come in too slowly or are worked at for too long.

    A body's bound is held by its announced length at once, else while it comes in. The time for the work ends with the
    reply's first byte: a download under way is never cut.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app = app
        self.limits = limits
        self.n_bytes_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _BoundedRequest(self, scope, receive, send)
        try:
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:
            error = request.clock.take_over_cancellation()
            if error is None:
                raise
            await render_error(Request(scope), status_of(error), error)(scope, receive, send)
        finally:
            request.clock.stop()
            self.n_bytes_in_flight -= request.n_received


class _BoundedRequest:
    """One request between its connection and the application."""

    __slots__ = ("_announced", "_counter", "_door", "_receive", "_scope", "_send", "clock", "n_received")

    def __init__(self, door: LimitSizeAndTime, scope: Scope, receive: Receive, send: Send) -> None:
        self._door = door
        self._scope = scope
        self._receive = receive
        self._send = send
        self._announced = _find_announced_length(scope)
        self._counter: JsonCounter | None = None
        self.clock = _Clock(door.limits, is_receiving=self._announced != 0)
        self.n_received = 0

    async def send(self, message: Message) -> None:
        """Pass on a part of the reply; from the first on it takes as long as it takes."""
        self.clock.note_answering()
        await self._send(message)

    async def receive(self) -> Message:
        """The next part of the body. Raises RequestTooLarge, and Overloaded if others' bodies leave no room for it."""
        if self._announced > self._door.limits.max_bytes:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            is_complete = not message.get("more_body", False)
            self._check_size(len(message["body"]))
            self._check_values(message["body"], is_complete=is_complete)
            self.clock.note_received(self.n_received, is_complete=is_complete)
        return message

    def _check_size(self, n_bytes: int) -> None:
        door, limits = self._door, self._door.limits
        self.n_received += n_bytes
        door.n_bytes_in_flight += n_bytes
        if self.n_received > limits.max_bytes:
            raise self._too_large()
        # A request that is alone is let in whatever its size, or it never would be.
        if limits.max_bytes_in_flight < door.n_bytes_in_flight != self.n_received:
            raise Overloaded(
                f"Bodies of {limits.max_bytes_in_flight} bytes in all are being worked at already "
                "(MAX_REQUEST_SIZES_IN_FLIGHT_IN_MB); try again later."
            )

    def _check_values(self, part: bytes, *, is_complete: bool) -> None:
        if self._counter is None:
            if (is_complete and self.n_received <= SMALL_BODY_BYTES) or _is_form(self._scope):
                return
            self._counter = JsonCounter()
        self._counter.feed(part)
        if self._counter.n_values > self._door.limits.max_json_values:
            raise RequestTooLarge(
                f"The request's JSON holds more than {self._door.limits.max_json_values} values "
                f"(MAX_JSON_VALUES_PER_REQUEST; a list or object counts {WEIGHT_OF_CONTAINER} times). Send it in parts."
            )

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The request's body is larger than {self._door.limits.max_bytes} bytes (MAX_REQUEST_SIZE_IN_MB). "
            "Send it in parts, or raise the setting."
        )


def _is_form(scope: Scope) -> bool:
    """Whether the body is a form with files, which are parsed into files and not into values."""
    return any(name == b"content-type" and value.startswith(b"multipart/") for name, value in scope["headers"])


def _find_announced_length(scope: Scope) -> int:
    """Bytes that a body is announced to have; 0 for none, -1 for one of unknown length."""
    length = 0
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else -1
        if name == b"transfer-encoding":
            length = -1
    return length


class _Clock:
    """Cancels the task that answers a request when it is over its time.

    One timer for the shorter of the two times, set again when it goes off early: most requests are over long before.
    """

    __slots__ = ("_deadline", "_is_expired", "_is_receiving", "_limits", "_loop", "_started", "_task", "_timer")

    def __init__(self, limits: Limits, *, is_receiving: bool) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._is_receiving = is_receiving
        self._is_expired = False
        self._started = self._loop.time()
        self._deadline = self._started + (limits.receive_seconds if is_receiving else limits.work_seconds)
        first_look = min(limits.receive_seconds, limits.work_seconds)
        self._timer = self._loop.call_at(self._started + first_look, self._look)

    def note_received(self, n_bytes: int, *, is_complete: bool) -> None:
        """So many bytes of the body are here; with the last of them the time for the work begins."""
        self._is_receiving = not is_complete
        if is_complete:
            self._deadline = self._loop.time() + self._limits.work_seconds
        else:
            self._deadline = self._started + self._limits.receive_seconds + n_bytes / MIN_BYTES_PER_SECOND

    def note_answering(self) -> None:
        """The reply has begun, and takes as long as it takes."""
        self._deadline = math.inf

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._loop.time() < self._deadline:
            if self._deadline < math.inf:
                self._timer = self._loop.call_at(self._deadline, self._look)
        elif self._task is not None:
            self._is_expired = True
            self._task.cancel()

    def take_over_cancellation(self) -> ReceiveTimeout | RequestTimeout | None:
        """What to answer if it was this clock that cancelled the task, which then is no longer cancelled; else None."""
        if not self._is_expired or self._task is None or self._task.uncancel() > 0 or self._deadline == math.inf:
            return None
        if self._is_receiving:
            return ReceiveTimeout(
                f"The body came in too slowly: there are {self._limits.receive_seconds:g} s for it "
                f"(RECEIVE_TIMEOUT_SECONDS), and one more for each {MIN_BYTES_PER_SECOND} bytes."
            )
        return RequestTimeout(
            f"The request took longer than {self._limits.work_seconds:g} s (MAX_REQUEST_SECONDS) and was given up. "
            "Send less at a time, or try again when less is going on.",
            retry_after_seconds=10.0,
        )
