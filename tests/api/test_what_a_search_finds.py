"""What a search may find: texts from the moment they are asked for, sentences while their document is there."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import RunningApplication, run_application, wait_until
from tests.tiny_models import write_tiny_model

PROMPTED_MODEL = "nomic-embed-text-v1.5.Q8_0"
EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
STRINGS = "/get_all_stored_strings/"
DOCUMENTS = "/get_all_stored_documents/"
COLLECTIONS = "/get_list_of_collections/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"

# Enough for the first chunks to be stored while the last one is computed.
SENTENCES = [f"This is private sentence number {number} of a long report." for number in range(900)]
REPORT = " ".join(SENTENCES).encode()


@pytest.fixture(params=[False, True], ids=["without prompts", "with prompts"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """A default model that wants words of its own in front of queries, and one that does not."""
    if not request.param:
        async with run_application(tmp_path) as application:
            yield application
        return
    (tmp_path / "models").mkdir()
    write_tiny_model(tmp_path / "models" / f"{PROMPTED_MODEL}.gguf", name=PROMPTED_MODEL)
    async with run_application(tmp_path, default_model_name=PROMPTED_MODEL) as application:
        yield application


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def search(client: httpx.AsyncClient, query: str = "anything", **fields: Any) -> set[str]:
    body = {"query_text": query, "number_of_most_similar_strings_to_return": 2_000, **fields}
    return {hit["search_result_text"] for hit in (await post(client, SEARCH, body))["results"]}


async def get(client: httpx.AsyncClient, path: str, **parameters: Any) -> dict[str, Any]:
    response = await client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def count_by_collection(client: httpx.AsyncClient) -> dict[str, tuple[int, int]]:
    described = (await get(client, COLLECTIONS))["collections"]
    return {name: (n_texts, n_documents) for name, n_texts, n_documents in (row.values() for row in described)}


# --- queries ---

QUERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": (EMBED, {"text": "asked", "input_type": "query"}),
    "native, with a collection": (
        EMBED,
        {"text": "asked", "input_type": "query", "corpus_identifier_string": "default"},
    ),
    "Cohere": ("/v2/embed", {"texts": ["asked"], "input_type": "search_query"}),
    "TEI": ("/embed", {"inputs": "asked", "prompt_name": "query"}),
    "TEI root": ("/", {"inputs": ["asked"], "prompt_name": "s2p_query"}),
    "OpenAI": ("/v1/embeddings", {"input": "asked", "input_type": "query"}),
    "search": (SEARCH, {"query_text": "asked"}),
    "rerank": ("/rerank", {"query": "asked", "texts": ["of the moment"]}),
}


@pytest.mark.parametrize("kind", QUERIES)
async def test_query_is_no_result_and_counts_nowhere_until_it_is_a_text(kind: str, either: RunningApplication) -> None:
    """Whatever the dialect and the model: counts and searches agree, before and after it is asked for as a text."""
    client = either.client
    for _ in range(2):
        await post(client, *QUERIES[kind])
    assert await search(client, full_text_weight=0.5) == await search(client) == set()
    assert await search(client, corpus_identifier_string="default") == set()
    assert await count_by_collection(client) == {"default": (0, 0)}
    assert (await get(client, STRINGS, corpus_identifier_string="default"))["strings"] == []
    assert "asked" in (await get(client, STRINGS))["strings"]
    await post(client, EMBED, {"text": "asked", "corpus_identifier_string": "cats"})
    for where in ({}, {"corpus_identifier_string": "cats"}, {"full_text_weight": 0.5}):
        assert await search(client, "asked for", **where) == {"asked"}
    assert await count_by_collection(client) == {"default": (0, 0), "cats": (1, 0)}


async def test_text_that_was_a_query_has_the_date_of_the_text(running: RunningApplication) -> None:
    """`since` finds it from the moment from which it is a text, `until` does not find it before."""
    client = running.client
    await search(client, "first a query")
    await get(client, STRINGS)
    between = datetime.now(UTC).isoformat()
    assert await search(client, since=between) == set()
    await post(client, EMBED, {"text": "first a query"})
    assert await search(client, since=between) == {"first a query"}
    assert await search(client, until=between) == set()
    after = datetime.now(UTC).isoformat()
    await post(client, EMBED, {"text": "first a query", "corpus_identifier_string": "cats"})
    assert await search(client, since=after, corpus_identifier_string="cats") == set()


async def test_sentence_that_was_a_query_has_the_date_of_its_document(running: RunningApplication) -> None:
    """It became a text with the document."""
    client = running.client
    await search(client, "Snow fell on the hills all night.")
    await get(client, STRINGS)
    between = datetime.now(UTC).isoformat()
    await send(client, "a.txt", b"Snow fell on the hills all night. By noon the road was clear again.")
    assert len(await search(client, since=between)) == 2


async def test_search_does_not_wait_for_its_query_to_be_kept(running: RunningApplication) -> None:
    """A writer that is busy for long holds up nobody who only asks; the query is kept when its turn comes."""
    client = running.client
    await post(client, EMBED, {"text": "a text"})
    writer = sqlite3.connect(running.database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert await asyncio.wait_for(search(client, "a new query"), 5.0) == {"a text"}
    writer.execute("ROLLBACK")
    writer.close()
    await wait_until(lambda: "a new query" in read_texts(running.database))


def read_texts(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM embeddings ORDER BY id")]


async def test_text_asked_for_while_it_is_searched_for_is_kept_as_a_text(running: RunningApplication) -> None:
    """Both share one computation; the one who was promised that it is kept gets it kept."""
    client = running.client
    running.backend.gate.clear()
    asking = asyncio.create_task(search(client, "A text that three ask for."))
    await asyncio.sleep(0.05)
    embedding = asyncio.create_task(
        post(client, EMBED, {"text": "A text that three ask for.", "corpus_identifier_string": "cats"})
    )
    sending = asyncio.create_task(send(client, "a.txt", b"A text that three ask for.", corpus_identifier_string="dogs"))
    await asyncio.sleep(0.05)
    running.backend.gate.set()
    await asyncio.gather(asking, embedding, sending)
    for collection in ("cats", "dogs"):
        assert await search(client, corpus_identifier_string=collection) == {"A text that three ask for."}


# --- documents that come ---


async def send(client: httpx.AsyncClient, name: str, data: bytes, **query: Any) -> httpx.Response:
    response = await client.post(DOCUMENT, files={"file": (name, data)}, params=query)
    assert response.status_code in (200, 202), response.text
    return response


async def submit(running: RunningApplication, **query: Any) -> str:
    response = await send(running.client, "private.txt", REPORT, background=True, **query)
    return str(response.json()["id"])


async def wait_until_half_done(running: RunningApplication, job_id: str) -> None:
    running.backend.seconds_per_pass = 0.02
    await wait_until(lambda: running.app.state.services.jobs.get(job_id).n_sentences_done > 0, timeout_seconds=20)
    running.backend.seconds_per_pass = 0.3


async def wait_until_given_up(running: RunningApplication) -> None:
    """What was being written down when the job was cancelled is written."""
    services = running.app.state.services
    await wait_until(
        lambda: not services.documents.row_ids_being_written and not services.embeddings._flights._under_way,
        timeout_seconds=20,
    )


async def assert_nothing_shows(client: httpx.AsyncClient) -> None:
    for where in ({}, {"corpus_identifier_string": "default"}, {"corpus_identifier_string": "private"}):
        for how in ({}, {"full_text_weight": 1.0}, {"exact": True}, {"since": "2020-01-01T00:00:00Z"}):
            assert await search(client, "private sentence number 7", **where, **how) == set(), (where, how)
    assert await search(client, filename="private.txt") == set()
    assert await search(client, "sentence", late_interaction=True, number_of_most_similar_strings_to_return=9) == set()
    assert not set(SENTENCES) & set((await get(client, STRINGS))["strings"])
    assert (await get(client, DOCUMENTS))["documents"] == []
    assert all(counts == (0, 0) for counts in (await count_by_collection(client)).values())


def count_computed(running: RunningApplication) -> int:
    return sum(len(lengths) for lengths in running.backend.passes)


def count_sentences(running: RunningApplication) -> int:
    return len(set(SENTENCES) & set(read_texts(running.database)))


async def test_sentences_of_a_running_or_cancelled_job_show_nowhere(running: RunningApplication) -> None:
    """Not in another collection, not in their own; what was computed is there for the next attempt all the same."""
    job_id = await submit(running, corpus_identifier_string="private")
    await wait_until_half_done(running, job_id)
    await assert_nothing_shows(running.client)
    assert (await running.client.delete(f"/jobs/{job_id}")).json()["state"] == "cancelled"
    await wait_until_given_up(running)
    await assert_nothing_shows(running.client)
    n_stored = count_sentences(running)
    assert n_stored > 0
    n_computed = count_computed(running)
    running.backend.seconds_per_pass = 0.0
    await send(running.client, "private.txt", REPORT, corpus_identifier_string="private")
    # With those of the passes that were under way when the job was cancelled.
    assert count_computed(running) - n_computed < len(SENTENCES) - n_stored + 32
    assert await search(running.client, corpus_identifier_string="private") == set(SENTENCES)
    assert await search(running.client, corpus_identifier_string="default") == set()


async def test_leftovers_of_a_cancelled_job_are_deleted_with_the_document_s_name(running: RunningApplication) -> None:
    """In its collection; in another one there is no such document."""
    job_id = await submit(running, corpus_identifier_string="private")
    await wait_until_half_done(running, job_id)
    await running.client.delete(f"/jobs/{job_id}")
    await wait_until_given_up(running)
    n_stored = count_sentences(running)
    parameters = {"filename": "private.txt", "corpus_identifier_string": "default"}
    assert (await running.client.delete("/stored_documents/", params=parameters)).status_code == 404
    parameters["corpus_identifier_string"] = "private"
    reply = await running.client.delete("/stored_documents/", params=parameters)
    assert (reply.status_code, reply.json()) == (200, {"number_of_deleted_embeddings": n_stored})
    assert count_sentences(running) == 0
    assert (await running.client.delete("/stored_documents/", params=parameters)).status_code == 404


async def test_leftovers_go_with_the_job_that_left_them(running: RunningApplication) -> None:
    """Forgetting a cancelled job forgets what it computed; what was asked for as a text meanwhile stays."""
    job_id = await submit(running, corpus_identifier_string="private")
    await wait_until_half_done(running, job_id)
    await running.client.delete(f"/jobs/{job_id}")
    await wait_until_given_up(running)
    await post(running.client, EMBED, {"text": SENTENCES[0], "corpus_identifier_string": "cats"})
    assert await search(running.client) == {SENTENCES[0]}
    await running.client.delete(f"/jobs/{job_id}")
    assert count_sentences(running) == 1
    assert await search(running.client, corpus_identifier_string="cats") == {SENTENCES[0]}


async def test_document_deleted_while_it_is_embedded_stays_deleted(running: RunningApplication) -> None:
    """The job fails and says why; nothing of the document is left."""
    job_id = await submit(running, corpus_identifier_string="private")
    await wait_until_half_done(running, job_id)
    reply = await running.client.delete("/stored_documents/", params={"filename": "private.txt"})
    assert reply.status_code == 200
    await wait_until(lambda: running.app.state.services.jobs.get(job_id).state.is_final, timeout_seconds=20)
    job = await get(running.client, f"/jobs/{job_id}")
    assert (job["state"], job["error"]["code"]) == ("failed", "not_found")
    assert "deleted while it was being embedded" in job["error"]["detail"]
    await assert_nothing_shows(running.client)
    assert count_sentences(running) == 0


async def test_document_appears_and_disappears_as_a_whole(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small its parts are: a search beside it finds all of its sentences or none."""
    monkeypatch.setattr("llama_embeddings.storage.document_writes.SECONDS_PER_PART", 0.0005)
    monkeypatch.setattr("llama_embeddings.storage.document_writes.ROWS_PER_STEP", 20)
    client = running.client
    seen: list[int] = []
    filters = [
        {},
        {"filename": "private.txt"},
        {"corpus_identifier_string": "default"},
        {"since": "2020-01-01T00:00:00Z"},
    ]

    async def watch(number: int) -> None:
        while True:
            seen.append(len(await search(client, f"watcher {number}", **filters[number])))
            await asyncio.sleep(0)

    watchers = [asyncio.create_task(watch(number)) for number in range(len(filters))]
    await send(client, "private.txt", REPORT)
    assert [len(await search(client, "now", **where)) for where in filters] == [len(SENTENCES)] * len(filters)
    await client.delete("/stored_documents/", params={"filename": "private.txt"})
    assert [len(await search(client, "now", **where)) for where in filters] == [0] * len(filters)
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    assert set(seen) == {0, len(SENTENCES)}


# --- listings ---


async def test_collections_are_listed_by_pages_and_deleted_once_empty(running: RunningApplication) -> None:
    """Every collection once, in order; one that holds something, the default and an unknown one are not deleted."""
    client = running.client
    for number in range(5):
        await post(client, EMBED, {"text": "a", "corpus_identifier_string": f"c{number}"})
    names, cursor = [], 0
    while cursor is not None:
        page = await get(client, COLLECTIONS, limit=4, cursor=cursor)
        names += [row["corpus_identifier_string"] for row in page["collections"]]
        cursor = page.get("next_cursor")
    assert names == ["default", "c0", "c1", "c2", "c3", "c4"]

    async def delete(name: str) -> tuple[int, str]:
        reply = await client.delete("/stored_collections/", params={"corpus_identifier_string": name})
        return reply.status_code, reply.text

    for name, status, reason in (("c1", 400, "not empty"), ("default", 400, "cannot"), ("c9", 404, "no collection")):
        found, text = await delete(name)
        assert (found, reason in text) == (status, True), text
    await client.request("DELETE", "/stored_strings/", json={"text": "a"})
    assert (await delete("c4"))[0] == 200
    await post(client, EMBED, {"text": "b", "corpus_identifier_string": "new"})
    assert await count_by_collection(client) == {
        name: (int(name == "new"), 0) for name in ("default", "c0", "c1", "c2", "c3", "new")
    }
    assert await search(client, corpus_identifier_string="c4") == set()


@pytest.mark.parametrize("path", [STRINGS, DOCUMENTS])
async def test_strings_and_documents_are_listed_by_pages(path: str, running: RunningApplication) -> None:
    """Every one once, in order, though others are deleted on the way."""
    for number in range(7):
        await send(running.client, f"{number}.txt", f"Sentence number {number}.".encode())
    found: list[str] = []
    cursor = 0
    while cursor is not None:
        page = await get(running.client, path, limit=3, cursor=cursor)
        found += page[path.split("_")[-1].strip("/")]
        cursor = page.get("next_cursor")
        await running.client.delete("/stored_documents/", params={"filename": "0.txt"})
    assert [text.rstrip(".")[-1] if path == STRINGS else text[0] for text in found] == list("0123456")


async def test_jobs_are_listed_by_pages(running: RunningApplication) -> None:
    """Oldest first, each once, though one is forgotten between two pages; a made-up cursor is refused."""
    client = running.client
    ids = [(await send(client, f"{n}.txt", b"A sentence.", background=True)).json()["id"] for n in range(5)]
    await wait_until(lambda: all(running.app.state.services.jobs.get(job_id).state.is_final for job_id in ids))
    page = await get(client, "/jobs", limit=2)
    assert [job["id"] for job in page["jobs"]] == ids[:2]
    await client.delete(f"/jobs/{ids[1]}")
    page = await get(client, "/jobs", limit=2, cursor=page["next_cursor"])
    assert [job["id"] for job in page["jobs"]] == ids[2:4]
    page = await get(client, "/jobs", limit=2, cursor=page["next_cursor"])
    assert ([job["id"] for job in page["jobs"]], page.get("next_cursor")) == (ids[4:], None)
    for cursor in ("nonsense", "2024-01-01", "0001-01-01T00:00:00+14:00/x"):
        reply = await client.get("/jobs", params={"cursor": cursor})
        assert (reply.status_code, reply.json().get("field")) in ((400, "cursor"), (200, None)), reply.text
