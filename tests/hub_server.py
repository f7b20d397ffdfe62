"""A model hub on this machine: files of repositories over HTTP, and whatever can go wrong on the way.

It speaks what `huggingface_hub` asks for to download a file: `HEAD` and `GET /{repository}/resolve/{revision}/{file}`
with the commit, the digest and the size in headers; a redirect of large files to a second server, as the real hub has
its CDN; ranges; error codes. Files in git come directly and with git's digest, as the hub does it with small ones.

A `HostedFile` carries its own faults and counts what was sent of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK_IN_BYTES = 16_384


@dataclass
class HostedFile:
    """One file, its faults, and what was asked of it.

    `cuts` and `statuses` hold for the next answers, one each: after how many bytes of it the connection ends, and the
    status it has instead of its content. `delivered` comes in place of `content`, with the headers of `content`.
    """

    content: bytes
    is_large: bool = True
    announced_size: int | None = -1  # -1: the true one; None: none
    announced_digest: str | None = None
    delivered: bytes | None = None
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    error_code: str | None = None
    retry_after: str | None = None
    seconds_per_chunk: float = 0.0
    understands_ranges: bool = True
    offers_xet: bool = False
    n_bytes_sent: int = 0
    n_deliveries: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        if self.announced_digest is not None:
            return self.announced_digest
        if self.is_large:
            return sha256(self.content).hexdigest()
        return sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class HubServer:
    """Repositories at one commit each, reachable as `main` and by the commit."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], HostedFile] = {}
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler()) for _ in ("hub", "cdn")]
        for server in self._servers:
            server.daemon_threads = True
            server.block_on_close = False
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def add(self, repository: str, name: str, content: bytes, *, is_large: bool = True) -> HostedFile:
        file = self.files[repository, name] = HostedFile(content, is_large=is_large)
        return file

    def _make_handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 `self` is the handler's below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            for server in self._servers:
                server.shutdown()
                server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = [unquote(part) for part in urlsplit(request.path).path.split("/")[1:]]
        if len(parts) < 5 or parts[2] not in ("resolve", "cdn"):
            return refuse(request, 404)
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if not any(known == repository for known, _ in self.files):
            return refuse(request, 404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return refuse(request, 404, "RevisionNotFound")
        file = self.files.get((repository, name))
        if file is None:
            return refuse(request, 404, "EntryNotFound")
        file.requests.append((request.command, request.path, dict(request.headers)))
        if file.statuses:
            return refuse(request, file.statuses.pop(0), file.error_code, file.retry_after)
        if parts[2] == "cdn":
            return deliver(request, file)
        return self._resolve(request, file, f"{self.cdn}/{repository}/cdn/{revision}/{name}")

    def _resolve(self, request: BaseHTTPRequestHandler, file: HostedFile, cdn_address: str) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.digest}"'}
        if not file.is_large:
            return deliver(request, file, headers)
        headers |= {"X-Linked-ETag": f'"{file.digest}"', "Location": cdn_address, "Content-Length": "0"}
        if file.announced_size is not None:
            size = len(file.content) if file.announced_size == -1 else file.announced_size
            headers["X-Linked-Size"] = str(size)
        if file.offers_xet:
            token_address = f"{self.endpoint}/api/models/any/xet-read-token/{COMMIT}"
            headers |= {"X-Xet-Hash": "0" * 64, "Link": f'<{token_address}>; rel="xet-auth"'}
        return send_head(request, 302, headers)


def send_head(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()


def refuse(
    request: BaseHTTPRequestHandler, status: int, error_code: str | None = None, retry_after: str | None = None
) -> None:
    headers = {"Content-Length": "0", "X-Error-Code": error_code, "Retry-After": retry_after}
    send_head(request, status, {name: value for name, value in headers.items() if value is not None})


def deliver(request: BaseHTTPRequestHandler, file: HostedFile, headers: dict[str, str] | None = None) -> None:
    """The content or the range asked for, down to the next cut."""
    content = file.content if file.delivered is None else file.delivered
    start = find_start(request) if file.understands_ranges else 0
    if start >= len(content) > 0:
        return refuse(request, 416)
    head = (headers or {}) | {"Accept-Ranges": "bytes", "Content-Length": str(len(content) - start)}
    if start:
        head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    send_head(request, 206 if start else 200, head)
    if request.command == "GET":
        file.n_deliveries += 1
        send_body(request, file, content[start:])
    return None


def find_start(request: BaseHTTPRequestHandler) -> int:
    wanted = request.headers.get("Range", "")
    return int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0


def send_body(request: BaseHTTPRequestHandler, file: HostedFile, body: bytes) -> None:
    cut = file.cuts.pop(0) if file.cuts else len(body)
    with suppress(ConnectionError):  # the other side may go away, or be killed
        for start in range(0, min(cut, len(body)), CHUNK_IN_BYTES):
            chunk = body[start : min(start + CHUNK_IN_BYTES, cut)]
            request.wfile.write(chunk)
            file.n_bytes_sent += len(chunk)
            time.sleep(file.seconds_per_chunk)
    if cut < len(body):
        request.close_connection = True
