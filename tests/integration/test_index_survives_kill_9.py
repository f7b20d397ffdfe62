"""`kill -9` and restart with an index large enough to be compressed: from its snapshot, with all that came later."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import httpx
import numpy as np

from embeddings_data_models import NewEmbedding, RequestStamp, compute_text_hash, utc_now
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.vectors.index import FLAT_LIMIT
from tests.serving import RunningServer, start_server

EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
MODEL = "all-MiniLM-L6-v2"
N_ROWS = FLAT_LIMIT + 1_000
LATER = ["I feel extremely chilly", "I am so cold", "A recipe for tomato soup"]


def find_recipe(server: RunningServer) -> str:
    """The family of the default model's vectors, as its first row has it."""
    with server.client() as client:
        client.post(EMBED, json={"text": "the first"}).raise_for_status()
    with sqlite3.connect(server.database) as connection:
        [recipe] = connection.execute("SELECT recipe FROM embeddings").fetchone()
    return str(recipe)


async def fill(database: Path, recipe: str) -> None:
    """Rows with vectors made up, so that nothing has to be computed."""
    vectors = np.random.default_rng(0).standard_normal((N_ROWS, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = await EmbeddingStore.open(f"sqlite+aiosqlite:///{database}")
    await store.add_embeddings(
        [
            NewEmbedding(
                f"row {i}", compute_text_hash(f"row {i}"), MODEL, recipe, vector, 3, 0, RequestStamp(), utc_now()
            )
            for i, vector in enumerate(vectors)
        ]
    )
    await store.close()


def search(client: httpx.Client, query: str, count: int) -> list[str]:
    body = {"query_text": query, "number_of_most_similar_strings_to_return": count}
    results = client.post(SEARCH, json=body).raise_for_status().json()["results"]
    return [result["search_result_text"] for result in results]


def test_compressed_index_is_found_again_after_kill_9(tmp_path: Path) -> None:
    """Three starts: made from the database, killed; from its snapshot, killed; from a damaged snapshot."""
    with start_server(tmp_path) as server:
        recipe = find_recipe(server)
    asyncio.run(fill(server.database, recipe))
    with start_server(tmp_path) as server, server.client() as client:
        assert f"Indexed {N_ROWS + 1} rows of {MODEL} from the database" in server.log
        for text in LATER:
            client.post(EMBED, json={"text": text}).raise_for_status()
        expected = search(client, LATER[0], 2)
        assert expected[0] == LATER[1]
        near_a_row = search(client, "row 7", 5)
        server.kill()
    [snapshot] = (tmp_path / "embeddings.sqlite.indexes").glob("*.index")
    with start_server(tmp_path) as server, server.client() as client:
        assert f"Indexed {N_ROWS + 1 + len(LATER)} rows of {MODEL} from its snapshot" in server.log
        assert search(client, LATER[0], 2) == expected
        assert search(client, "row 7", 5) == near_a_row
        server.kill()
    content = snapshot.read_bytes()
    snapshot.write_bytes(content[: len(content) // 3])
    with start_server(tmp_path) as server, server.client() as client:
        assert "is damaged or cut short; made anew" in server.log
        assert search(client, LATER[0], 2) == expected
