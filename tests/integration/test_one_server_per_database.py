"""Real processes on one database: the second server refuses, `kill -9` frees it, replicas and commands go on beside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.serving import PROJECT_DIRECTORY, make_environment, run_until_it_ends, start_server

EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
SENTENCE = "A sentence that the command takes in beside the server."
PATIENCE_SECONDS = 20.0


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def search(client: httpx.Client, query: str) -> set[str]:
    reply = client.post(SEARCH, json={"query_text": query}).raise_for_status()
    return {result["search_result_text"] for result in reply.json()["results"]}


def wait_until_found(client: httpx.Client, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while text not in search(client, "something else"):
        assert time.monotonic() < deadline, f"{text!r} is not found"
        time.sleep(0.05)


def test_second_server_refuses_until_the_first_was_killed(tmp_path: Path) -> None:
    """A lock that ends with its process, found through a link; the file that it was on is no hindrance."""
    first, second = make_directory(tmp_path / "first"), make_directory(tmp_path / "second")
    link = second / "link.sqlite"
    link.symlink_to(first / "embeddings.sqlite")
    settings = {"DATABASE_URL": f"sqlite+aiosqlite:///{link}"}
    with start_server(first) as server, server.client() as client:
        client.post(EMBED, json={"text": "of the first"}).raise_for_status()
        refused = run_until_it_ends(second, settings)
        assert refused.returncode == 1
        assert f"process {server.process.pid} on" in refused.stderr
        assert "READ_ONLY_REPLICA=True" in refused.stderr
        assert "Traceback" not in refused.stderr
        client.post(EMBED, json={"text": "of the first, later"}).raise_for_status()
        server.kill()
        with start_server(second, settings) as successor, successor.client() as other:
            assert search(other, "a query") == {"of the first", "of the first, later"}


def test_replica_and_command_work_beside_the_server(tmp_path: Path) -> None:
    """Each sees what the others commit; the replica goes on when the server was killed, and has lost nothing."""
    home, beside = make_directory(tmp_path / "home"), make_directory(tmp_path / "beside")
    (tmp_path / "notes.txt").write_text(SENTENCE)
    with start_server(home) as server, server.client() as client:
        client.post(EMBED, json={"text": "of the server"}).raise_for_status()
        settings = {"DATABASE_URL": f"sqlite+aiosqlite:///{server.database}", "READ_ONLY_REPLICA": "True"}
        with start_server(beside, settings) as replica, replica.client() as reader:
            assert search(reader, "a query") == {"of the server"}
            completed = subprocess.run(
                [sys.executable, "-m", "llama_embeddings", "ingest", str(tmp_path / "notes.txt")],
                cwd=home,
                env=make_environment(home, {}) | {"PYTHONPATH": str(PROJECT_DIRECTORY)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert completed.returncode == 0, completed.stderr
            wait_until_found(client, SENTENCE)
            wait_until_found(reader, SENTENCE)
            refused = reader.post(EMBED, json={"text": "new to everybody"})
            assert (refused.status_code, refused.json()["code"]) == (503, "read_only_replica")
            client.post(EMBED, json={"text": "the last before the end"}).raise_for_status()
            server.kill()
            wait_until_found(reader, "the last before the end")
            with start_server(home) as again, again.client() as successor:
                successor.post(EMBED, json={"text": "of the next server"}).raise_for_status()
                wait_until_found(reader, "of the next server")
