"""`kill -9` and restart: a 200 means that the answer is found again, by cache and by search, without being computed."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.serving import RunningServer, start_server

EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
TEXTS = ["I feel extremely chilly", "Die Straße ist vereist", "今日はとても寒い", "🥶", "A recipe for tomato soup"]
SENTENCES = ["Snow fell on the hills all night.", "By noon the road was clear again."]
N_WRITERS = 8
SECONDS_BEFORE_THE_KILL = 1.5


def check_database(path: Path) -> None:
    """SQLite itself finds no fault in the file, and no row refers to one that is missing."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def ask_everything(client: httpx.Client) -> dict[str, object]:
    """All kinds of answers that are kept, by name."""
    answers: dict[str, object] = {}
    for text in TEXTS:
        answers[text] = client.post(EMBED, json={"text": text}).raise_for_status().json()
    as_json = {"send_back_json_or_zip_file": "json"}
    answers["tokens"] = client.post(TOKENS, json={"text": TEXTS[0]}, params=as_json).raise_for_status().json()
    files = {"file": ("weather.txt", " ".join(SENTENCES).encode())}
    answers["document"] = client.post(DOCUMENT, files=files, params=as_json).raise_for_status().json()
    return answers


def count_rows(path: Path) -> dict[str, int]:
    with sqlite3.connect(path) as connection:
        tables = ("embeddings", "token_level_embedding_bundles", "token_level_embeddings", "document_embeddings")
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


def test_everything_answered_survives_kill_9(tmp_path: Path) -> None:
    """Texts, token-level embeddings and a document, after the process was killed without warning."""
    with start_server(tmp_path) as server, server.client() as client:
        before = ask_everything(client)
        server.kill()
    check_database(server.database)
    rows = count_rows(server.database)
    assert rows["embeddings"] == len(TEXTS) + len(SENTENCES)
    with start_server(tmp_path) as server, server.client() as client:
        for text in (*TEXTS, *SENTENCES):
            reply = client.post(EMBED, json={"text": text})
            assert reply.headers["x-embedding-source"] in ("store", "memory"), text
        assert ask_everything(client) == before
        assert client.get("/get_all_stored_strings/").json() == {"strings": [*TEXTS, *SENTENCES]}
        assert client.get("/get_all_stored_documents/").json() == {"documents": ["weather.txt"]}
        assert count_rows(server.database) == rows, "nothing was computed and stored a second time"
        check_search(client, before)


def check_search(client: httpx.Client, answers: dict[str, object]) -> None:
    """The rebuilt index ranks all texts by their cosine with the query."""
    results = client.post(SEARCH, json={"query_text": TEXTS[0]}).raise_for_status().json()["results"]
    assert {result["search_result_text"] for result in results} == {*TEXTS[1:], *SENTENCES}
    scores = [result["similarity_to_query_text"] for result in results]
    assert scores == sorted(scores, reverse=True)
    vectors = [np.array(answers[text]["embedding"]) for text in TEXTS[:2]]  # type: ignore[index]
    found = {result["search_result_text"]: result["similarity_to_query_text"] for result in results}
    assert found[TEXTS[1]] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def write_until_it_dies(server: RunningServer, writer: int, stopping: threading.Event) -> Iterator[tuple[str, object]]:
    """Texts and their vectors as they are answered, until the server is gone."""
    with server.client() as client:
        for number in range(100_000):
            text = f"Writer {writer} says for the {number}th time that it is cold."
            try:
                reply = client.post(EMBED, json={"text": text})
            except httpx.TransportError:
                assert stopping.is_set(), "the connection broke before the server was killed"
                return
            assert reply.status_code == 200
            yield text, reply.json()["embedding"]


def test_every_text_answered_under_load_survives_kill_9(tmp_path: Path) -> None:
    """Eight writers are cut off in the middle; whatever had been answered is there, with the same numbers."""
    stopping = threading.Event()
    with start_server(tmp_path) as server, ThreadPoolExecutor(N_WRITERS) as pool:
        writers = [
            pool.submit(lambda number: list(write_until_it_dies(server, number, stopping)), number)
            for number in range(N_WRITERS)
        ]
        time.sleep(SECONDS_BEFORE_THE_KILL)
        stopping.set()
        server.kill()
        answered = dict(pair for writer in writers for pair in writer.result())
    assert len(answered) > N_WRITERS
    check_database(server.database)
    with start_server(tmp_path) as server, server.client() as client:
        stored = set(client.get("/get_all_stored_strings/").json()["strings"])
        assert set(answered) <= stored
        assert len(stored - set(answered)) <= N_WRITERS, "at most what each writer was waiting for"
        n_rows = count_rows(server.database)["embeddings"]
        for text, vector in answered.items():
            assert client.post(EMBED, json={"text": text}).json()["embedding"] == vector
        assert count_rows(server.database)["embeddings"] == n_rows
