"""The reading processes: no file takes them, or the next file, with it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_embeddings.documents.extracted import ExtractionLimits
from llama_embeddings.documents.extraction import extract_text
from llama_embeddings.documents.reader import MEGABYTE, DocumentReader
from llama_embeddings.documents.sentences import split_into_sentences
from llama_embeddings.errors import RequestTooLarge, UnreadableDocument, UnsupportedDocumentType
from tests.hostile_documents import HOSTILE_DOCUMENTS, UNPACKED_LIMIT
from tests.office_writing import DOCUMENTS

LIMITS = ExtractionLimits(max_unpacked_bytes=UNPACKED_LIMIT)
REFUSALS = (RequestTooLarge, UnreadableDocument, UnsupportedDocumentType)
GOOD = b"The boats came home early. Nobody was surprised."


@pytest.fixture
async def reader() -> AsyncIterator[DocumentReader]:
    reader = DocumentReader(minimum_length=1, limits=LIMITS, time_limit_seconds=60, memory_limit_bytes=512 * MEGABYTE)
    yield reader
    reader.close()


async def test_no_hostile_file_gives_anything_but_sentences_or_a_refusal(reader: DocumentReader) -> None:
    """And after each of them the next document is read."""
    outcomes = {}
    for name, data in HOSTILE_DOCUMENTS.items():
        try:
            text = " ".join(sentence.text for sentence in (await reader.read(data)).sentences)
            assert "root:" not in text
            outcomes[name] = "read"
        except REFUSALS as error:
            outcomes[name] = type(error).__name__
        assert len((await reader.read(GOOD)).sentences) == 2
    assert outcomes["zip bomb"] == "RequestTooLarge"
    assert outcomes["overlapping parts"] == "UnreadableDocument"
    assert outcomes["binary"] == "UnsupportedDocumentType"
    assert outcomes["one long line"] == "read"
    assert not Path("/tmp/evil.txt").exists()


async def test_sentences_come_in_chunks_and_are_the_same(reader: DocumentReader) -> None:
    """The first chunk is there before the last."""
    data = (GOOD + b" ") * 1_500
    chunks = [chunk async for chunk in reader.stream(data)]
    assert len(chunks) == 3
    assert tuple(sentence for chunk in chunks for sentence in chunk) == (await reader.read(data)).sentences


async def test_a_document_that_takes_too_long_is_given_up_and_its_process_replaced() -> None:
    """The message names the setting."""
    reader = DocumentReader(minimum_length=1, time_limit_seconds=0.01)
    with pytest.raises(UnreadableDocument, match="DOCUMENT_TIME_LIMIT_IN_SECONDS"):
        await reader.read(GOOD)
    assert reader.process_ids == []


async def test_a_document_that_needs_too_much_memory_is_refused_and_the_next_one_read() -> None:
    """The limit is the operating system's."""
    reader = DocumentReader(minimum_length=1, memory_limit_bytes=256 * MEGABYTE)
    with pytest.raises(UnreadableDocument, match="DOCUMENT_MEMORY_LIMIT_IN_MB"):
        await reader.read("\U0001f32c".encode() * 12_000_000)
    assert len((await reader.read(GOOD)).sentences) == 2
    reader.close()


async def test_a_process_that_dies_is_one_refusal_and_no_more(reader: DocumentReader) -> None:
    """A crash of a parser is the document's, not the server's."""
    reading = asyncio.create_task(reader.read(b"word " * 4_000_000))
    while not reader.process_ids:
        await asyncio.sleep(0)
    os.kill(reader.process_ids[0], signal.SIGKILL)
    with pytest.raises(UnreadableDocument):
        await reading
    assert len((await reader.read(GOOD)).sentences) == 2


async def test_a_cancelled_caller_ends_the_reading(reader: DocumentReader) -> None:
    """Nobody waits for the sentences any more."""
    reading = asyncio.create_task(reader.read(b"word " * 4_000_000))
    while not reader.process_ids:
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert reader.process_ids == []


async def test_processes_without_work_end_and_give_their_memory_back() -> None:
    """The next document starts another."""
    reader = DocumentReader(minimum_length=1, idle_seconds=0)
    await reader.read(GOOD)
    while reader.process_ids:
        await asyncio.sleep(0.001)
    assert len((await reader.read(GOOD)).sentences) == 2
    reader.close()


async def test_processes_know_no_secrets(reader: DocumentReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's environment stays with the server."""
    monkeypatch.setenv("SECURITY_TOKEN", "a-token-of-the-server")
    await reader.read(GOOD)
    environment = Path(f"/proc/{reader.process_ids[0]}/environ").read_bytes()
    assert b"a-token-of-the-server" not in environment


@settings(max_examples=60, deadline=5_000, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.one_of(st.sampled_from([data[:3_000] for data in DOCUMENTS.values()]), st.just(b"")),
    change=st.binary(max_size=60),
    place=st.integers(0, 3_000),
)
def test_any_bytes_give_sentences_with_true_offsets_or_a_refusal(start: bytes, change: bytes, place: int) -> None:
    """Damaged documents of every type and plain bytes alike."""
    data = start[:place] + change + start[place + len(change) :]
    try:
        document = extract_text(data, limits=LIMITS)
    except REFUSALS:
        return
    for sentence in split_into_sentences(document, minimum_length=1):
        covered = document.text[sentence.start : sentence.end]
        assert "".join(covered.split()) == "".join(sentence.text.split())
