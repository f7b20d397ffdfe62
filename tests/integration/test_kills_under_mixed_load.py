"""`kill -9` at random moments, again and again on one database, while it is written, read, searched and deleted from.

`KILLS=100 python -m pytest tests/integration/test_kills_under_mixed_load.py` makes it a hundred; a handful otherwise.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving import RunningServer, start_server

N_KILLS = int(os.environ.get("KILLS", "4"))
EMBED = "/get_embedding_vector_for_string/"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DOCUMENT = "/get_all_embedding_vectors_for_document/"
AS_JSON = {"send_back_json_or_zip_file": "json"}
SETTING_UP = 99  # in place of a client's number
COLLECTIONS = ("default", "cats", "dogs")


@dataclass
class Ledger:
    """What the server has answered, over all of its lives."""

    vectors: dict[str, list[float]] = field(default_factory=dict)
    collections: dict[str, str] = field(default_factory=dict)
    documents: dict[str, list[str]] = field(default_factory=dict)
    bundles: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)


class Load:
    """Clients that do all kinds of things at once until the server is gone."""

    def __init__(self, server: RunningServer, ledger: Ledger, round_number: int) -> None:
        self._server = server
        self._ledger = ledger
        self._round = round_number
        self._is_ending = threading.Event()

    def run_until_killed(self, seconds: float) -> None:
        """Load the server, kill it after so long, and wait for the clients to notice."""
        actions = (self.embed, self.embed, self.delete, self.send_documents, self.embed_tokens, self.search)
        with ThreadPoolExecutor(len(actions)) as pool:
            clients = [pool.submit(self._repeat, action, number) for number, action in enumerate(actions)]
            self._is_ending.wait(seconds)
            self._is_ending.set()
            self._server.kill()
            for client in clients:
                client.result()

    def _repeat(self, action: Any, number: int) -> None:
        with self._server.client() as client:
            try:
                for step in action(client, number):
                    assert step is None
            except httpx.TransportError:
                assert self._is_ending.is_set(), "the connection broke before the server was killed"

    def _names(self, number: int) -> Iterator[str]:
        yield from (f"In life {self._round} client {number} says for the {turn}th time: cold." for turn in range(10**6))

    def embed(self, client: httpx.Client, number: int) -> Iterator[None]:
        for turn, text in enumerate(self._names(number)):
            collection = COLLECTIONS[turn % 3]
            body = {"text": text, "corpus_identifier_string": collection}
            vector = client.post(EMBED, json=body).raise_for_status().json()["embedding"]
            self._ledger.vectors[text], self._ledger.collections[text] = vector, collection
            yield

    def delete(self, client: httpx.Client, number: int) -> Iterator[None]:
        for text in self._names(number):
            client.post(EMBED, json={"text": text}).raise_for_status()
            client.request("DELETE", "/stored_strings/", json={"text": text}).raise_for_status()
            self._ledger.deleted.add(text)
            yield

    def send_documents(self, client: httpx.Client, number: int) -> Iterator[None]:
        for turn, text in enumerate(self._names(number)):
            data = f"{text} And then it snowed {turn} times in life {self._round}. It was a long winter."
            name = f"{self._round}-{number}-{turn}.txt"
            reply = client.post(DOCUMENT, files={"file": (name, data.encode())}, params=AS_JSON).raise_for_status()
            self._ledger.documents[name] = [row["text"] for row in reply.json()]
            yield

    def embed_tokens(self, client: httpx.Client, number: int) -> Iterator[None]:
        for text in self._names(number):
            client.post(TOKENS, json={"text": text}, params=AS_JSON).raise_for_status()
            self._ledger.bundles.add(text)
            yield

    def search(self, client: httpx.Client, number: int) -> Iterator[None]:
        for text in self._names(number):
            client.post(SEARCH, json={"query_text": text}).raise_for_status()
            yield


def check_file(path: Path, ledger: Ledger) -> None:
    """Sound, nothing twice, and every answer there, bit by bit; what was deleted is gone."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = connection.execute("SELECT text, embedding, collection_id FROM embeddings").fetchall()
        names = dict(connection.execute("SELECT id, name FROM collections"))
        bundles = {text for (text,) in connection.execute("SELECT input_text FROM token_level_embedding_bundles")}
        documents = dict(connection.execute("SELECT filename, count(*) FROM documents GROUP BY filename"))
        connection.execute("INSERT INTO full_text (full_text) VALUES ('integrity-check')")
    stored = {text: (vector, collection_id) for text, vector, collection_id in rows}
    assert len(stored) == len(rows)
    for text, vector in ledger.vectors.items():
        np.testing.assert_array_equal(np.frombuffer(stored[text][0], "<f4"), np.array(vector, np.float32))
        assert names[stored[text][1]] == ledger.collections[text]
    assert not ledger.deleted & stored.keys()
    assert ledger.bundles <= bundles
    assert {name: documents.get(name) for name in ledger.documents} == dict.fromkeys(ledger.documents, 1)


def check_search(client: httpx.Client, ledger: Ledger) -> None:
    """The restarted server finds every answered text and sentence, and nothing that was deleted."""
    body = {"query_text": "a question of its own", "number_of_most_similar_strings_to_return": 10_000}
    hits = client.post(SEARCH, json=body).raise_for_status().json()["results"]
    found = [hit["search_result_text"] for hit in hits]
    assert len(found) == len(set(found))
    if len(found) < 10_000:
        assert ledger.vectors.keys() <= set(found)
        assert {text for texts in ledger.documents.values() for text in texts} <= set(found)
    assert not ledger.deleted & set(found)
    for text in random.Random(7).sample(sorted(ledger.vectors), min(5, len(ledger.vectors))):
        assert client.post(EMBED, json={"text": text}).headers["x-embedding-source"] == "store"


@pytest.mark.timeout(60 * max(5, N_KILLS))
def test_everything_answered_survives_kills_at_random_moments(tmp_path: Path) -> None:
    """Whatever was answered is there and found, once; whatever was deleted is gone; the file is sound."""
    moments = random.Random(N_KILLS)
    ledger = Ledger()
    for round_number in range(N_KILLS):
        with start_server(tmp_path) as server:
            load = Load(server, ledger, round_number)
            with server.client() as client:
                check_search(client, ledger)
                # The process that reads documents takes a while to start, and the kill would come before.
                next(load.send_documents(client, SETTING_UP))
            load.run_until_killed(moments.uniform(0.05, 1.5))
        check_file(tmp_path / "embeddings.sqlite", ledger)
    assert min(len(ledger.vectors), len(ledger.deleted), len(ledger.documents), len(ledger.bundles)) > 0
    print(
        f"{N_KILLS} kills: {len(ledger.vectors)} texts, {len(ledger.documents)} documents, "
        f"{len(ledger.bundles)} token-level matrices answered, {len(ledger.deleted)} texts deleted"
    )
