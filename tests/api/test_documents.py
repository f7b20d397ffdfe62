"""Documents: every sentence with its place, replies in every shape, and work that is shared and given up."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas
import pyarrow.parquet
import pytest

from llama_embeddings.api import streaming
from llama_embeddings.errors import RequestAbandoned
from llama_embeddings.services import downloads
from tests.api.test_native_endpoints import (
    DOCUMENT,
    DOCUMENT_BYTES,
    ORIENTATIONS,
    SENTENCES,
    expected_vector,
    read_single_file,
    send_document,
)
from tests.pdf_writing import write_text_pdf
from tests.serving import RunningApplication, run_application, wait_until

CONVERT = "/convert_document_to_sentences/"
COLUMNS = ["text", "embedding", "page", "start", "end"]
STARTS = [DOCUMENT_BYTES.decode().index(sentence) for sentence in SENTENCES]
ENDS = [start + len(sentence) for start, sentence in zip(STARTS, SENTENCES, strict=True)]


async def fetch(running: RunningApplication, kind: str, data: bytes = DOCUMENT_BYTES, **query: str) -> httpx.Response:
    query = {"send_back_json_or_zip_file": kind} | query
    response = await running.client.post(DOCUMENT, files={"file": ("weather.txt", data)}, params=query)
    assert response.status_code == 200, response.text
    return response


def make_sentences(count: int) -> list[str]:
    return [f"This is sentence {number} of a rather long report." for number in range(count)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is read, rendered and sent in parts of two rows, and streamed from the first byte."""
    monkeypatch.setattr(downloads, "NUMBERS_PER_BATCH", 32)
    monkeypatch.setattr(downloads, "NUMBERS_PER_ROW_GROUP", 32)
    monkeypatch.setattr(downloads, "SENTENCES_PER_BATCH", 2)
    monkeypatch.setattr(streaming, "SMALL_REPLY_BYTES", 0)


# Replies


@pytest.mark.parametrize("json_format", ORIENTATIONS)
async def test_document_comes_in_every_orientation(json_format: str, running: RunningApplication) -> None:
    """Text and embedding come first, as they always did; pandas reads all of it back, as JSON and from the zip."""
    content = (await fetch(running, "json", json_format=json_format)).json()
    rows = ORIENTATIONS[json_format](content, "text")
    assert [row[0] for row in rows] == SENTENCES
    np.testing.assert_allclose([row[1] for row in rows], [expected_vector(text) for text in SENTENCES], atol=1e-6)
    packed = read_single_file(await fetch(running, "zip", json_format=json_format), "weather.txt.embeddings.json")
    assert json.loads(packed) == content
    frame: Any = pandas.read_json(io.BytesIO(packed), orient=json_format)  # type: ignore[call-overload]
    assert json_format == "values" or list(frame.columns) == COLUMNS
    assert frame.iloc[:, 0].tolist() == SENTENCES
    assert frame.iloc[:, 2].isna().all()
    assert (frame.iloc[:, 3].tolist(), frame.iloc[:, 4].tolist()) == (STARTS, ENDS)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("json_format", ORIENTATIONS)
async def test_reply_in_parts_is_the_reply_as_a_whole(
    json_format: str, running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a part ends makes no difference to the bytes."""
    data = " ".join(make_sentences(7)).encode()
    parts = await fetch(running, "json", data, json_format=json_format)
    zipped = read_single_file(await fetch(running, "zip", data, json_format=json_format))
    monkeypatch.undo()
    whole = await fetch(running, "json", data, json_format=json_format)
    assert "content-length" in whole.headers
    assert "content-length" not in parts.headers
    assert parts.content == whole.content == zipped


async def test_pages_are_whole_numbers_where_the_format_has_pages(running: RunningApplication) -> None:
    """In a table, too, whose schema says so."""
    data = write_text_pdf([[SENTENCES[0]], [SENTENCES[1]], [SENTENCES[2]]])
    content = (await fetch(running, "json", data, json_format="table")).json()
    assert {"name": "page", "type": "integer"} in content["schema"]["fields"]
    assert [row["page"] for row in content["data"]] == [1, 2, 3]


@pytest.mark.usefixtures("small_batches")
async def test_npz_is_read_by_numpy_without_pickle(running: RunningApplication) -> None:
    """Five arrays of one length; a page of 0 means that there are none."""
    texts = [*make_sentences(5), "Größe und 風 stehen auch da."]
    response = await fetch(running, "npz", " ".join(texts).encode())
    assert response.headers["content-disposition"].startswith('attachment; filename="weather.txt.embeddings.npz"')
    arrays = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert list(arrays) == COLUMNS
    assert arrays["text"].tolist() == texts
    assert arrays["embedding"].dtype == np.float32
    np.testing.assert_allclose(arrays["embedding"], [expected_vector(text) for text in texts], atol=1e-6)
    assert arrays["page"].tolist() == [0] * len(texts)
    assert arrays["end"].tolist() == [start + len(text) for start, text in zip(arrays["start"], texts, strict=True)]


@pytest.mark.usefixtures("small_batches")
async def test_parquet_is_read_by_pandas_and_has_the_same_vectors(running: RunningApplication) -> None:
    """One row group for each part; the vectors are lists of float32."""
    texts = make_sentences(5)
    data = " ".join(texts).encode()
    response = await fetch(running, "parquet", data)
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert pyarrow.parquet.ParquetFile(io.BytesIO(response.content)).num_row_groups == 3
    frame = pandas.read_parquet(io.BytesIO(response.content))
    assert list(frame.columns) == COLUMNS
    assert frame["text"].tolist() == texts
    arrays = np.load(io.BytesIO((await fetch(running, "npz", data)).content))
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), arrays["embedding"])
    assert frame["page"].isna().all()
    assert frame["start"].tolist() == arrays["start"].tolist()


@pytest.mark.parametrize("kind", ["zip", "npz", "parquet"])
async def test_name_of_the_download_cannot_break_the_header(kind: str, running: RunningApplication) -> None:
    """Quotes, line breaks, directories and other scripts: one header line of ASCII."""
    name = '../größe "風"; filename=evil.txt'
    response = await running.client.post(
        DOCUMENT, files={"file": (name, DOCUMENT_BYTES)}, params={"send_back_json_or_zip_file": kind}
    )
    header = response.headers["content-disposition"]
    assert header.isascii()
    assert header.count('"') == 2
    assert header.count('filename="') == 1
    assert header.endswith(f".embeddings.{kind}")


@pytest.mark.usefixtures("small_batches")
async def test_failure_in_the_middle_of_a_reply_does_not_look_like_success(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence that is forgotten while the reply is under way breaks the connection off."""
    data = " ".join(make_sentences(5)).encode()
    await fetch(running, "json", data)
    store = running.app.state.services.document_downloads._store
    read, n_reads = store.read_sentences, 0

    async def read_until_it_is_deleted(*arguments: Any) -> Any:
        nonlocal n_reads
        n_reads += 1
        if n_reads == 3:
            await store.delete_text(make_sentences(5)[4])
        return await read(*arguments)

    monkeypatch.setattr(store, "read_sentences", read_until_it_is_deleted)
    messages = await call_without_client(running, data)
    assert messages[0]["status"] == 200
    assert messages[-1].get("more_body"), "the reply was never ended"


async def call_without_client(running: RunningApplication, data: bytes) -> list[dict[str, Any]]:
    """The messages that the application sends for a document, as a server sees them."""
    request = httpx.Request(
        "POST", f"http://server{DOCUMENT}?send_back_json_or_zip_file=json", files={"file": ("weather.txt", data)}
    )
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": DOCUMENT,
        "raw_path": DOCUMENT.encode(),
        "query_string": request.url.query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": None,
        "server": ("server", 80),
        "root_path": "",
    }
    body = [{"type": "http.request", "body": request.read(), "more_body": False}]
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    async def send(message: Any) -> None:
        messages.append(message)

    with pytest.raises(RuntimeError, match="response already started"):
        await running.app(scope, receive, send)
    return messages


# Sentences alone


async def test_document_is_converted_to_sentences_without_embedding_them(running: RunningApplication) -> None:
    """Each with its page and its place; nothing is computed or kept."""
    n_passes = len(running.backend.passes)
    pages = write_text_pdf([[SENTENCES[0]], [SENTENCES[1]]])
    reply = (await running.client.post(CONVERT, files={"file": ("a.pdf", pages)})).json()
    assert list(reply) == ["filename", "mimetype", "total_number_of_sentences", "sentences"]
    assert (reply["filename"], reply["mimetype"], reply["total_number_of_sentences"]) == ("a.pdf", "application/pdf", 2)
    assert [list(sentence) for sentence in reply["sentences"]] == [["text", "page", "start", "end"]] * 2
    assert [(sentence["text"], sentence["page"]) for sentence in reply["sentences"]] == [
        (SENTENCES[0], 1),
        (SENTENCES[1], 2),
    ]
    assert len(running.backend.passes) == n_passes
    assert (await running.client.get("/get_all_stored_strings/")).json() == {"strings": []}


@pytest.mark.usefixtures("small_batches")
async def test_sentences_are_those_that_are_embedded(running: RunningApplication) -> None:
    """The same texts at the same places, also where the reply is sent in parts."""
    data = " ".join(make_sentences(7)).encode()
    converted = (await running.client.post(CONVERT, files={"file": ("a.txt", data)})).json()
    embedded = await send_document(running.client, data)
    assert converted["sentences"] == [{name: row[name] for name in row if name != "embedding"} for row in embedded]


# What is computed, and when


async def test_reply_says_whether_it_was_computed(running: RunningApplication) -> None:
    """The same bytes again come from the store; under another name or model they are another document."""
    assert (await fetch(running, "json")).headers["x-embedding-source"] == "computed"
    n_passes = len(running.backend.passes)
    assert (await fetch(running, "zip")).headers["x-embedding-source"] == "store"
    await send_document(running.client, DOCUMENT_BYTES, "another name.txt")
    assert len(running.backend.passes) == n_passes, "the sentences are known under any name"
    assert (await running.client.get("/get_all_stored_documents/")).json() == {
        "documents": ["weather.txt", "another name.txt"]
    }
    running.add_model("other")
    assert (await fetch(running, "json", model_name="other")).headers["x-embedding-source"] == "computed"
    assert len(running.backend.passes) > n_passes


async def test_document_of_many_chunks_keeps_its_order_and_computes_each_sentence_once(
    running: RunningApplication,
) -> None:
    """More sentences than are computed together, every one of them twice."""
    texts = make_sentences(700) * 2
    rows = await send_document(running.client, " ".join(texts).encode())
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose(rows[1399]["embedding"], expected_vector(texts[1399]), atol=1e-6)
    with sqlite3.connect(running.database) as connection:
        assert connection.execute("SELECT count(*) FROM embeddings").fetchone() == (700,)
        assert connection.execute("SELECT count(*) FROM document_sentences").fetchone() == (1400,)


@pytest.mark.parametrize("keeps_files", [True, False])
async def test_large_upload_is_kept_byte_by_byte_if_files_are_kept(tmp_path: Path, keeps_files: bool) -> None:
    """Larger than what is held in memory while it comes in."""
    data = " ".join(make_sentences(10)).encode() + b"\n" * 1024 * 1024
    async with run_application(tmp_path, keep_document_files=keeps_files) as running:
        await fetch(running, "npz", data)
        with sqlite3.connect(running.database) as connection:
            [(kept,)] = connection.execute("SELECT file_data FROM document_embeddings").fetchall()
        assert kept == (data if keeps_files else None)


async def test_error_of_the_engine_is_the_error_of_the_document(tmp_path: Path) -> None:
    """A full queue is a 429 with the time to wait, as for a single text."""
    async with run_application(tmp_path, max_queued_tokens=50) as running:
        running.backend.gate.clear()
        texts = make_sentences(1000)
        waiting = asyncio.create_task(
            running.client.post(DOCUMENT, files={"file": ("weather.txt", " ".join(texts).encode())})
        )
        response = await waiting
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1


class LeavingRequest:
    """What a handler sees of a client that goes away when it is told to."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.has_left.wait()
        return {"type": "http.disconnect"}


async def test_work_ends_when_its_client_goes_away() -> None:
    """The work is cancelled, and the handler's answer is an error that nobody sees."""
    request, was_cancelled = LeavingRequest(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    running = asyncio.create_task(streaming.run_while_connected(request, work()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    request.has_left.set()
    with pytest.raises(RequestAbandoned):
        await running
    assert was_cancelled.is_set()


async def test_work_on_a_document_goes_on_for_those_who_still_wait(running: RunningApplication) -> None:
    """The one who asked first goes away; the other gets the whole document."""
    running.backend.gate.clear()
    documents = running.app.state.services.documents
    first, second = (asyncio.create_task(fetch(running, "json")) for _ in range(2))
    await wait_until(lambda: any(flight.n_waiters == 2 for flight in documents._flights._flights.values()))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    running.backend.gate.set()
    assert [row["text"] for row in (await second).json()] == SENTENCES
