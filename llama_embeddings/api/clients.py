"""Who a request comes from, and how much each client may do a minute.

An address is believed from the connection alone, unless the connection is a trusted proxy's. Knows no tokens.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_embeddings.api.error_responses import render_error
from llama_embeddings.errors import Overloaded

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Clients whose buckets are remembered; who has not been heard of for longest is forgotten first.
MAX_REMEMBERED_CLIENTS = 10_000
MAX_ADDRESS_LENGTH = 100
# A provider gives a customer a /64 of IPv6 or more, so that its last half tells nobody apart.
IPV6_PREFIX = 64
# Set in the scope of requests that a trusted proxy passed on.
FROM_TRUSTED_PROXY = "llama_embeddings.from_trusted_proxy"


def parse_address(text: str) -> Address | None:
    """An address as proxies write it: with or without a port, brackets or a zone; None for what is none."""
    # Longer ones are none, and are not to be kept.
    return _parse_address(text) if len(text) <= MAX_ADDRESS_LENGTH else None


@functools.lru_cache(maxsize=MAX_REMEMBERED_CLIENTS)
def _parse_address(text: str) -> Address | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def find_client(forwarded: str, networks: Sequence[Network]) -> str | None:
    """The last address of an `X-Forwarded-For` that is not a trusted proxy's; None if there is none.

    Read from its end: each proxy appends whom it heard from, and all in front of that may be made up.
    """
    for part in reversed(forwarded.split(",")):
        address = parse_address(part)
        if address is None:
            return None
        if not is_within(address, networks):
            return str(address)
    return None


class TrustProxies:
    """Puts the client's own address and scheme into requests that come through a trusted proxy."""

    def __init__(self, app: ASGIApp, *, networks: Sequence[Network]) -> None:
        self._app = app
        self._networks = networks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_trusted(scope):
            scope[FROM_TRUSTED_PROXY] = True
            self._believe(scope)
        await self._app(scope, receive, send)

    def _is_trusted(self, scope: Scope) -> bool:
        peer = parse_address(scope["client"][0]) if scope.get("client") else None
        return peer is not None and is_within(peer, self._networks)

    def _believe(self, scope: Scope) -> None:
        forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
        client = find_client(forwarded.decode("latin-1"), self._networks)
        if client is not None:
            scope["client"] = (client, 0)
        schemes = [value for name, value in scope["headers"] if name == b"x-forwarded-proto"]
        if schemes and schemes[-1] in (b"http", b"https"):
            scope["scheme"] = schemes[-1].decode("ascii")


def name_client(scope: Scope) -> str:
    """What a client is counted under: its address, or the network that one customer has in IPv6."""
    host: str = scope["client"][0] if scope.get("client") else ""
    if ":" not in host:
        return host
    address = parse_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
    return str(address or host)


class Buckets:
    """A token bucket for each client: `per_minute` at once, then as they refill. Bounded in memory."""

    def __init__(self, per_minute: int, *, max_clients: int = MAX_REMEMBERED_CLIENTS) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / 60
        self._max_clients = max_clients
        # Client to (what was left, when).
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, client: str) -> float:
        """Take one out; 0.0 if there was one, else the seconds until there is."""
        level = self._level(client)
        if level < 1:
            return (1 - level) / self._per_second
        self._levels[client] = (level - 1, time.monotonic())
        self._levels.move_to_end(client)
        if len(self._levels) > self._max_clients:
            self._levels.popitem(last=False)
        return 0.0

    def seconds_until_one(self, client: str) -> float:
        """0.0 if there is one, without taking it."""
        level = self._level(client)
        return 0.0 if level >= 1 else (1 - level) / self._per_second

    def _level(self, client: str) -> float:
        level, then = self._levels.get(client, (self._size, 0.0))
        return min(self._size, level + (time.monotonic() - then) * self._per_second)


class LimitRequests:
    """Answers 429 to a client that asks more often than it may."""

    def __init__(self, app: ASGIApp, *, per_minute: int) -> None:
        self._app = app
        self._per_minute = per_minute
        self._buckets = Buckets(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Who watches whether the server lives asks from one address, and must not make it seem dead.
        if scope["type"] == "http" and scope["path"] != "/health":
            wait = self._buckets.take(name_client(scope))
            if wait:
                await render_error(Request(scope), 429, self._refusal(wait))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, wait: float) -> Overloaded:
        return Overloaded(
            f"More than {self._per_minute} requests a minute (MAX_REQUESTS_PER_MINUTE); "
            f"the next one is taken in {math.ceil(wait)} s.",
            retry_after_seconds=wait,
        )
