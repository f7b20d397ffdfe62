"""A reply's head and the beginning of its body leave together, and nothing is held back or lost by it."""

from __future__ import annotations

import asyncio

import pytest

from llama_embeddings.api.connections import MAX_JOINED_BYTES, JoiningTransport

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class RecordingTransport:
    """Notes what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def set_protocol(self, _protocol: object) -> None:
        self.calls.append("set_protocol")

    def get_write_buffer_size(self) -> int:
        return 7


@pytest.fixture
async def recorded() -> RecordingTransport:
    return RecordingTransport()


@pytest.fixture
async def joining(recorded: RecordingTransport) -> JoiningTransport:
    return JoiningTransport(recorded, asyncio.get_running_loop())  # type: ignore[arg-type]


async def test_head_and_body_are_one_write(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """Reply by reply; later parts of a body go by themselves."""
    for part in (HEAD, b"ab", b"cd", HEAD, b"ef"):
        joining.write(part)
    await asyncio.sleep(0)
    assert recorded.calls == [HEAD + b"ab", b"cd", HEAD + b"ef"]


async def test_head_alone_waits_for_no_body(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """A stream whose first part takes its time, or a reply without a body: sent in the next turn of the loop."""
    joining.write(HEAD)
    assert recorded.calls == []
    await asyncio.sleep(0)
    assert recorded.calls == [HEAD]
    joining.write(b"late")
    assert recorded.calls == [HEAD, b"late"]


async def test_two_heads_stay_in_order(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """Replies without bodies, one upon the other."""
    joining.write(HEAD)
    joining.write(HEAD)
    await asyncio.sleep(0)
    assert b"".join(call for call in recorded.calls if isinstance(call, bytes)) == HEAD + HEAD


async def test_long_body_is_not_copied(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """It follows its head at once."""
    body = b"x" * (MAX_JOINED_BYTES + 1)
    joining.write(HEAD)
    joining.write(body)
    assert recorded.calls == [HEAD, body]
    assert recorded.calls[1] is body


async def test_closing_sends_what_is_held(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """And another protocol finds nothing left to send."""
    joining.write(HEAD)
    joining.set_protocol(asyncio.Protocol())
    joining.write(HEAD)
    joining.close()
    await asyncio.sleep(0)
    assert recorded.calls == [HEAD, "set_protocol", HEAD, "close"]


async def test_aborting_forgets_what_is_held(joining: JoiningTransport, recorded: RecordingTransport) -> None:
    """Nothing is written to a connection that is gone."""
    joining.write(HEAD)
    joining.abort()
    await asyncio.sleep(0)
    assert recorded.calls == ["abort"]
    assert joining.get_write_buffer_size() == 7
