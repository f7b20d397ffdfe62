"""Whom a request is put down to, and how often each may ask."""

from __future__ import annotations

import ipaddress
import tracemalloc

import pytest

from llama_embeddings.api import clients
from llama_embeddings.api.clients import Buckets, find_client, name_client, parse_address

PROXIES = [ipaddress.ip_network(network) for network in ("127.0.0.1/32", "10.0.0.0/8", "fd00::/8")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("203.0.113.9", "203.0.113.9"),
        (" 203.0.113.9:4711 ", "203.0.113.9"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("unknown", "None"),
        ("", "None"),
        ("203.0.113.999", "None"),
    ],
)
def test_addresses_are_read_as_proxies_write_them(text: str, expected: str) -> None:
    """With ports, brackets and zones, or not at all."""
    assert str(parse_address(text)) == expected


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("198.51.100.1, 203.0.113.9", "203.0.113.9"),
        ("198.51.100.1, 203.0.113.9, 10.1.2.3, fd00::5", "203.0.113.9"),
        ("1.2.3.4,nonsense,10.1.2.3", None),
        ("10.1.2.3", None),
        ("", None),
    ],
)
def test_client_is_the_last_address_that_no_trusted_proxy_has(forwarded: str, expected: str | None) -> None:
    """What stands in front of it may be made up by the client."""
    assert find_client(forwarded, PROXIES) == expected


@pytest.mark.parametrize(
    ("host", "name"),
    [("203.0.113.9", "203.0.113.9"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("::1", "::/64"), ("", "")],
)
def test_client_of_ipv6_is_its_network(host: str, name: str) -> None:
    """Whoever has one address of a /64 has them all."""
    assert name_client({"client": (host, 1) if host else None}) == name


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes as the test says: its only element is the time."""
    now = [1000.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(clients, "time", Clock)
    return now


def test_bucket_gives_its_fill_at_once_and_then_as_it_refills(clock: list[float]) -> None:
    """Six a minute: six, then one each ten seconds, never more than six saved up."""
    buckets = Buckets(6)
    assert [buckets.take("a") for _ in range(6)] == [0.0] * 6
    assert buckets.take("a") == pytest.approx(10)
    clock[0] += 4
    assert buckets.take("a") == pytest.approx(6)
    clock[0] += 6
    assert [buckets.take("a"), buckets.take("a")] == [0.0, pytest.approx(10)]
    clock[0] += 3600
    assert [buckets.take("a") for _ in range(7)] == [0.0] * 6 + [pytest.approx(10)]


@pytest.mark.usefixtures("clock")
def test_each_client_has_a_bucket_of_its_own_and_a_look_takes_nothing() -> None:
    """One that asks too much takes nothing from the others."""
    buckets = Buckets(1)
    assert [buckets.take("a"), buckets.take("b")] == [0.0, 0.0]
    assert buckets.take("a") > 0
    assert [buckets.seconds_until_one("c") for _ in range(3)] == [0.0] * 3
    assert buckets.seconds_until_one("a") > 0


def test_table_of_clients_is_bounded() -> None:
    """200,000 addresses leave ten thousand, the latest; a few megabytes."""
    buckets = Buckets(60)
    tracemalloc.start()
    for number in range(200_000):
        buckets.take(f"10.{number >> 16}.{(number >> 8) & 255}.{number & 255}")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(buckets) == clients.MAX_REMEMBERED_CLIENTS
    assert used < 8_000_000
