"""Connections, as far as they can be abused before or after a request: silent, endless, too many, never reading.

The HTTP parser is uvicorn's; here are only the limits that it has no settings for. What happens between a request's
first line and its reply is `middleware.py`'s affair.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

# A request's first line, headers and trailers together; the usual bound elsewhere is 8 to 64 kB.
MAX_HEAD_BYTES = 65_536
# What chunks may be framed with, for each byte in them: six for chunks of one byte.
MAX_FRAMING_PER_BYTE = 8
# Who takes less of its reply is cut off.
MIN_SENT_BYTES_PER_SECOND = 1_000
SECONDS_BETWEEN_WARNINGS = 10.0
HEAD_BEGINNING = b"HTTP/1."
# A longer beginning of a body is sent by itself: to copy it would cost more than it saves.
MAX_JOINED_BYTES = 65_536
RESET_AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, for no time
# Files that are open beside connections: database, models, libraries, log.
DESCRIPTORS_BESIDE_CONNECTIONS = 200


@dataclass(slots=True)
class ConnectionLimits:
    """Bounds of all connections, and what came of them. `seconds` are for a head to come in, and for any sending."""

    max_connections: int
    seconds: float
    n_refused: int = 0
    n_cut: int = 0
    last_warning: float = float("-inf")

    def warn(self, message: str, *arguments: object) -> None:
        """Log, but not once for each connection of a flood."""
        now = time.monotonic()
        if now - self.last_warning >= SECONDS_BETWEEN_WARNINGS:
            self.last_warning = now
            logger.warning(message, *arguments)


class JoiningTransport:
    """A transport that sends a reply's head together with the beginning of its body.

    Written one after the other, as uvicorn does, they are two system calls, two packets, and two awakenings of the
    client. A head waits no longer than the present turn of the event loop.
    """

    __slots__ = ("_head", "_loop", "_sending", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._sending: asyncio.Handle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, or hold what looks like a head until more comes or the turn is over."""
        if self._sending is None and data.startswith(HEAD_BEGINNING):
            self._head = data
            self._sending = self._loop.call_soon(self._send_head)
        elif self._sending is not None and len(data) <= MAX_JOINED_BYTES:
            self._transport.write(self._take_head() + data)
        else:
            self._send_head()
            self._transport.write(data)

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        return head

    def _send_head(self) -> None:
        if head := self._take_head():
            self._transport.write(head)

    def close(self) -> None:
        """Send what is held, then close."""
        self._send_head()
        self._transport.close()

    def abort(self) -> None:
        """Forget what is held, and close at once."""
        self._take_head()
        self._transport.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Send what is held before another protocol takes over."""
        self._send_head()
        self._transport.set_protocol(protocol)


class BoundedConnection(HttpToolsProtocol):
    """One connection. `limits` is set by `make_protocol`."""

    limits: ConnectionLimits
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _is_in_head = False
    _is_new = False
    # Of the present request, without what came together with its first byte.
    _n_bytes = 0
    _n_body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoiningTransport(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > self.limits.max_connections:
            self.limits.n_refused += 1
            self.limits.warn("More than %d connections: closing new ones", self.limits.max_connections)
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        self._is_new = False
        super().data_received(data)
        if not self._is_new:
            self._n_bytes += len(data)
            if self._n_bytes > MAX_HEAD_BYTES + self._n_body_bytes * (1 + MAX_FRAMING_PER_BYTE):
                self._cut("its request has more bytes of headers than of anything else")
        # Bytes that begin no request, or belong to a body that nobody waits for, keep no connection open for long.
        if self._head_timer is None and (self._is_in_head or self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_new = True
        self._n_bytes = self._n_body_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._n_body_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.seconds, self._cut, "no request came in in time")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits until the rest of the reply is taken, which must not be for ever.
        if self.transport.get_write_buffer_size() and self._send_timer is None:
            self._watch_sending()

    def _watch_sending(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self.limits.seconds, self._look_at_sending, waiting)

    def _look_at_sending(self, waiting_before: int) -> None:
        sent = waiting_before - self.transport.get_write_buffer_size()
        if sent < self.limits.seconds * MIN_SENT_BYTES_PER_SECOND:
            # Or the system would keep what is on its way, and the connection, for minutes more.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
            self._cut("it takes nothing of its reply")
        else:
            self._watch_sending()

    def _forget_sending(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _cut(self, reason: str) -> None:
        self.limits.n_cut += 1
        self.limits.warn("Cut off %s: %s", self.client[0] if self.client else "a client", reason)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._forget_sending()
        super().connection_lost(exc)
        self._forget_sending()


def make_protocol(limits: ConnectionLimits) -> type[BoundedConnection]:
    """What uvicorn makes one of for each connection."""
    members: dict[str, Any] = {"limits": limits}
    return type("BoundedConnection", (BoundedConnection,), members)


def raise_descriptor_limit(max_connections: int) -> None:
    """Let this process open as many files as its connections need, as far as the system permits; warn if it does not.

    Does nothing where processes have no such limit (Windows).
    """
    try:
        import resource
    except ImportError:
        return
    wanted = max_connections + DESCRIPTORS_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        logger.warning(
            "The system permits %d open files, MAX_CONNECTIONS=%d would need %d; raise the limit (ulimit -Hn)",
            possible,
            max_connections,
            wanted,
        )
