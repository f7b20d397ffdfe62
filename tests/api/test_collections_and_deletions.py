"""Collections and forgetting over the API: at once, after a restart, and while something is under way."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_embeddings.storage import erasure
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application, wait_until

EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SIMILARITY = "/compute_similarity_between_strings/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
STRINGS = "/get_all_stored_strings/"
DOCUMENTS = "/get_all_stored_documents/"
COLLECTIONS = "/get_list_of_collections/"

SENTENCES = ["Snow fell on the hills all night.", "By noon the road was clear again."]
DOCUMENT_BYTES = " ".join(SENTENCES).encode()


async def embed(client: httpx.AsyncClient, text: str, **fields: Any) -> httpx.Response:
    response = await client.post(EMBED, json={"text": text, **fields})
    assert response.status_code == 200, response.text
    return response


async def send_document(client: httpx.AsyncClient, name: str, **query: str) -> None:
    response = await client.post(DOCUMENT, files={"file": (name, DOCUMENT_BYTES)}, params=query)
    assert response.status_code == 200, response.text


async def list_all(client: httpx.AsyncClient, path: str, **parameters: Any) -> list[Any]:
    response = await client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    [items] = response.json().values()
    return items


async def search(client: httpx.AsyncClient, query: str, **fields: Any) -> set[str]:
    response = await client.post(SEARCH, json={"query_text": query, **fields})
    assert response.status_code == 200, response.text
    return {hit["search_result_text"] for hit in response.json()["results"]}


async def delete_text(client: httpx.AsyncClient, text: str) -> httpx.Response:
    return await client.request("DELETE", "/stored_strings/", json={"text": text})


async def delete_document(client: httpx.AsyncClient, filename: str, **query: str) -> httpx.Response:
    return await client.delete("/stored_documents/", params={"filename": filename, **query})


def count_rows(running: RunningApplication) -> int:
    with sqlite3.connect(running.database) as connection:
        return connection.execute("SELECT count(*) FROM embeddings").fetchone()[0]


# --- collections ---


async def test_texts_and_documents_go_into_the_collection_that_is_named(running: RunningApplication) -> None:
    """Spaces around a name are no part of it; who names none means the default one."""
    client = running.client
    await embed(client, "for everybody")
    await embed(client, "about cats", corpus_identifier_string="  cats ")
    await send_document(client, "winter.txt", corpus_identifier_string="winter")
    body = {"text1": "one", "text2": "two", "corpus_identifier_string": "pairs"}
    assert (await client.post(SIMILARITY, json=body)).status_code == 200
    assert await list_all(client, STRINGS, corpus_identifier_string="default") == ["for everybody"]
    assert await list_all(client, STRINGS, corpus_identifier_string="cats") == ["about cats"]
    assert await list_all(client, STRINGS, corpus_identifier_string="winter") == SENTENCES
    assert await list_all(client, STRINGS, corpus_identifier_string="pairs") == ["one", "two"]
    assert await list_all(client, STRINGS, corpus_identifier_string="no such") == []
    assert await list_all(client, DOCUMENTS, corpus_identifier_string="winter") == ["winter.txt"]
    assert await list_all(client, DOCUMENTS, corpus_identifier_string="cats") == []
    assert [tuple(row.values()) for row in await list_all(client, COLLECTIONS)] == [
        ("default", 1, 0),
        ("cats", 1, 0),
        ("winter", 2, 1),
        ("pairs", 2, 0),
    ]


async def test_known_text_joins_another_collection_with_one_write_and_no_computing(tmp_path: Path) -> None:
    """From memory and from the store alike; asked for there again, nothing is written."""
    for size in (0, 32):
        directory = tmp_path / str(size)
        directory.mkdir()
        async with run_application(directory, embedding_cache_size_in_mb=size) as running:
            await embed(running.client, "a known text")
            store = running.app.state.services.contents._store
            n_passes, n_writes = len(running.backend.passes), (await store.statistics()).n_writes_committed
            for _ in range(3):
                reply = await embed(running.client, "a known text", corpus_identifier_string="cats")
                assert reply.headers["x-embedding-source"] == ("memory" if size else "store")
            await embed(running.client, "a known text")
            assert len(running.backend.passes) == n_passes
            assert (await store.statistics()).n_writes_committed == n_writes + 1
            for collection in ("default", "cats"):
                assert await list_all(running.client, STRINGS, corpus_identifier_string=collection) == ["a known text"]
            assert count_rows(running) == 1


async def test_two_who_ask_for_a_new_text_at_once_both_get_it_into_their_collection(
    running: RunningApplication,
) -> None:
    """They share the computing, and so does a search with the same words."""
    running.backend.gate.clear()
    asking = [
        asyncio.create_task(search(running.client, "shared")),
        asyncio.create_task(embed(running.client, "shared", corpus_identifier_string="cats")),
        asyncio.create_task(embed(running.client, "shared")),
    ]
    await wait_until(lambda: running.app.state.services.embeddings._flights._flights)
    running.backend.gate.set()
    await asyncio.gather(*asking)
    for collection in ("default", "cats"):
        assert await list_all(running.client, STRINGS, corpus_identifier_string=collection) == ["shared"]
    assert await search(running.client, "another query") == {"shared"}


async def test_same_file_in_two_collections_is_embedded_once(running: RunningApplication) -> None:
    """And is in both."""
    await send_document(running.client, "a.txt", corpus_identifier_string="cats")
    n_passes = len(running.backend.passes)
    await send_document(running.client, "a.txt", corpus_identifier_string="dogs")
    assert len(running.backend.passes) == n_passes
    for collection in ("cats", "dogs"):
        assert await list_all(running.client, STRINGS, corpus_identifier_string=collection) == SENTENCES
        assert await list_all(running.client, DOCUMENTS, corpus_identifier_string=collection) == ["a.txt"]


async def test_query_is_found_after_it_was_embedded_as_a_text_and_after_a_restart(tmp_path: Path) -> None:
    """Before that, the restarted server does not find it either."""
    async with run_application(tmp_path) as running:
        await search(running.client, "only a query")
        await search(running.client, "a query first")
    async with run_application(tmp_path) as running:
        assert await search(running.client, "something") == set()
        reply = await embed(running.client, "a query first")
        assert reply.headers["x-embedding-source"] == "store"
        assert await search(running.client, "something") == {"a query first"}
    async with run_application(tmp_path) as running:
        assert await search(running.client, "something") == {"a query first"}


@pytest.mark.parametrize("name", ["", "   ", "x" * 256, 7, "\ud800"])
async def test_name_that_is_none_is_refused(name: Any, running: RunningApplication) -> None:
    """Empty, too long, no string, or no Unicode: the caller's mistake, named."""
    body = b'{"text": "a", "corpus_identifier_string": ' + (b'"\\ud800"' if name == "\ud800" else _as_json(name)) + b"}"
    response = await running.client.post(EMBED, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["field"] == "corpus_identifier_string"
    assert count_rows(running) == 0


def _as_json(value: Any) -> bytes:
    return f'"{value}"'.encode() if isinstance(value, str) else str(value).encode()


async def test_longest_name_and_any_script_are_taken(running: RunningApplication) -> None:
    """255 characters, quotes and separators included."""
    for name in ("x" * 255, "猫 'and' \"dogs\", 1,2;--", "a/b\\c"):
        await embed(running.client, "a text", corpus_identifier_string=name)
        assert await list_all(running.client, STRINGS, corpus_identifier_string=name) == ["a text"]


# --- forgetting ---


async def test_deleted_text_is_gone_at_once_and_after_a_restart(tmp_path: Path) -> None:
    """From listing, search and memory; asked for again it is computed again."""
    async with run_application(tmp_path) as running:
        client = running.client
        for text in ("remember me", "forget me"):
            await embed(client, text)
            await client.post(TOKENS, json={"text": text})
        response = await delete_text(client, "forget me")
        assert (response.status_code, response.json()) == (200, {"number_of_deleted_embeddings": 1})
        assert await list_all(client, STRINGS) == ["remember me"]
        assert await search(client, "anything") == {"remember me"}
        response = await delete_text(client, "forget me")
        assert (response.status_code, response.json()["code"], response.json()["field"]) == (404, "not_found", "text")
    async with run_application(tmp_path) as running:
        assert await search(running.client, "anything") == {"remember me"}
        assert (await embed(running.client, "forget me")).headers["x-embedding-source"] == "computed"
        assert await search(running.client, "anything") == {"remember me", "forget me"}


async def test_deletion_says_when_its_bytes_are_not_overwritten_yet(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of another process holds the log; nothing is found any more, and a deletion after it says nothing."""
    monkeypatch.setattr(erasure, "WAIT_SECONDS", 0.2)
    await embed(running.client, "the first needle")
    await send_document(running.client, "weather.txt")
    with closing(sqlite3.connect(running.database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM embeddings").fetchone()
        reply = await delete_text(running.client, "the first needle")
        assert reply.json() == {"number_of_deleted_embeddings": 1, "erasure": "pending"}
        reply = await delete_document(running.client, "weather.txt")
        assert reply.json() == {"number_of_deleted_embeddings": 2, "erasure": "pending"}
        assert await list_all(running.client, STRINGS) == []
    await embed(running.client, "the second needle")
    reply = await delete_text(running.client, "the second needle")
    assert reply.json() == {"number_of_deleted_embeddings": 1}
    data = b"".join(path.read_bytes() for path in running.database.parent.rglob("*.sqlite*") if path.is_file())
    for text in ("the first needle", "the second needle", SENTENCES[0]):
        assert text.encode() not in data


async def test_deleted_document_takes_the_embeddings_of_its_tokens(running: RunningApplication) -> None:
    """Also out of the index of tokens; they are computed anew for whoever asks."""
    await send_document(running.client, "weather.txt")
    reply = await running.client.post(TOKENS, json={"text": SENTENCES[0]})
    assert reply.status_code == 200, reply.text
    assert (await delete_document(running.client, "weather.txt")).status_code == 200
    with closing(sqlite3.connect(running.database)) as connection:
        for table in ("token_level_embedding_bundles", "token_level_embeddings"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


async def test_deleted_queries_harm_neither_search_nor_deletion(tmp_path: Path) -> None:
    """More queries come and go than there are texts; searches by words find the texts, after a restart as well."""
    texts = {f"text {i} about wings" for i in range(5)}
    async with run_application(tmp_path) as running:
        for text in texts:
            await embed(running.client, text)
        for i in range(8):
            assert await search(running.client, f"query {i} about wings", full_text_weight=0.5) == texts
            response = await delete_text(running.client, f"query {i} about wings")
            assert response.status_code == 200, response.text
    async with run_application(tmp_path) as running:
        assert await search(running.client, "wings", full_text_weight=1.0) == texts
        assert (await delete_text(running.client, "wings")).status_code == 200
        assert (await delete_text(running.client, "text 0 about wings")).status_code == 200
        assert await search(running.client, "wings", full_text_weight=1.0) == texts - {"text 0 about wings"}


async def test_deleted_document_takes_its_sentences_but_not_what_was_embedded_by_itself(tmp_path: Path) -> None:
    """Also after a restart, whichever of the two came first."""
    async with run_application(tmp_path) as running:
        client = running.client
        await embed(client, SENTENCES[0])
        await send_document(client, "a.txt", corpus_identifier_string="winter")
        response = await delete_document(client, "a.txt", model_name=FAKE_MODEL_NAME)
        assert (response.status_code, response.json()) == (200, {"number_of_deleted_embeddings": 1})
        assert await search(client, "anything") == {SENTENCES[0]}
        assert await list_all(client, DOCUMENTS) == []
        assert await list_all(client, STRINGS, corpus_identifier_string="winter") == []
        response = await delete_document(client, "a.txt")
        assert (response.status_code, response.json()["field"]) == (404, "filename")
        await send_document(client, "a.txt")
        await embed(client, SENTENCES[1])
        assert (await delete_document(client, "a.txt")).json() == {"number_of_deleted_embeddings": 0}
    async with run_application(tmp_path) as running:
        assert await search(running.client, "anything") == set(SENTENCES)


async def test_document_leaves_the_collection_that_is_named(running: RunningApplication) -> None:
    """It stays in the other one, and goes with that."""
    for collection in ("cats", "dogs"):
        await send_document(running.client, "a.txt", corpus_identifier_string=collection)
    reply = await delete_document(running.client, "a.txt", corpus_identifier_string="cats")
    assert reply.json() == {"number_of_deleted_embeddings": 0}
    assert await list_all(running.client, STRINGS, corpus_identifier_string="cats") == []
    assert await list_all(running.client, STRINGS, corpus_identifier_string="dogs") == SENTENCES
    reply = await delete_document(running.client, "a.txt", corpus_identifier_string="dogs")
    assert reply.json() == {"number_of_deleted_embeddings": 2}


async def test_text_deleted_while_it_is_put_away_leaves_nothing_behind(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion comes between the commit and the index: neither memory nor index keep what has no row."""
    embeddings = running.app.state.services.embeddings
    store = embeddings._store
    add, may_go_on, is_there = store.add_embeddings, asyncio.Event(), asyncio.Event()

    async def add_and_wait(rows: Any) -> list[int]:
        row_ids: list[int] = await add(rows)
        is_there.set()
        await may_go_on.wait()
        return row_ids

    monkeypatch.setattr(store, "add_embeddings", add_and_wait)
    asking = asyncio.create_task(embed(running.client, "in between"))
    await is_there.wait()
    assert (await delete_text(running.client, "in between")).status_code == 200
    monkeypatch.setattr(store, "add_embeddings", add)
    late = asyncio.create_task(embed(running.client, "in between"))
    assert (await late).headers["x-embedding-source"] == "computed", "not the one whose row is gone"
    assert (await delete_text(running.client, "in between")).status_code == 200
    may_go_on.set()
    await asking
    assert count_rows(running) == len(embeddings._memory) == 0
    assert set(embeddings._indexing._indexes.sizes().values()) <= {0}


async def test_adding_and_deleting_at_random_leaves_memory_index_and_rows_in_step(running: RunningApplication) -> None:
    """Many at once, over the same few texts: afterwards a search finds exactly the rows that there are."""

    async def disturb(number: int) -> None:
        for turn in range(15):
            text = f"text {(number * 7 + turn * 3) % 5}"
            if (number + turn) % 3 == 0:
                assert (await delete_text(running.client, text)).status_code in (200, 404)
            elif (number + turn) % 3 == 1:
                await embed(running.client, text, corpus_identifier_string=f"collection {turn % 2}")
            else:
                await search(running.client, text)

    await asyncio.gather(*(disturb(number) for number in range(12)))
    with sqlite3.connect(running.database) as connection:
        rows = connection.execute("SELECT id, text FROM embeddings WHERE collection_id IS NOT NULL").fetchall()
        known = {row_id for (row_id,) in connection.execute("SELECT id FROM embeddings")}
    embeddings = running.app.state.services.embeddings
    assert {entry.row_id for entry in embeddings._memory._entries.values()} <= known
    assert await search(running.client, "a query of its own") == {text for _, text in rows}
    assert sum(embeddings._indexing._indexes.sizes().values()) == len(rows)
