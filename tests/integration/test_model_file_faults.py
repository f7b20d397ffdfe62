"""A model's file deleted, replaced or damaged under a running server, with the real engine.

What is in memory goes on; what comes in its place is another model with a recipe of its own, and no vector of the one
is ever taken for the other's.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from llama_embeddings.inference.llama_backend import LlamaBackend
from tests.serving import RunningServer, get_models_directory, start_server
from tests.tiny_models import write_tiny_model

EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
UNLOAD = "/unload_model/"
# Not the default model's own name: of that one, known answers are asked for at the start.
NAME = "mine"
TEXT = "The ferry leaves at noon."
LONGEST_WAIT_SECONDS = 15.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the default model in a directory of its own, under another name."""
    directory = tmp_path / "models"
    directory.mkdir()
    return Path(shutil.copy(get_models_directory() / "all-MiniLM-L6-v2.gguf", directory / f"{NAME}.gguf"))


@pytest.fixture
def settings(model: Path) -> dict[str, str]:
    return {"MODELS_DIRECTORY": str(model.parent), "DEFAULT_MODEL_NAME": NAME, "DOWNLOAD_MODELS_ON_DEMAND": "False"}


@pytest.fixture
def server(tmp_path: Path, settings: dict[str, str]) -> Iterator[RunningServer]:
    with start_server(tmp_path, settings) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def embed(client: httpx.Client, text: str = TEXT) -> list[float]:
    vector: list[float] = client.post(EMBED, json={"text": text}).raise_for_status().json()["embedding"]
    return vector


def ask_until(client: httpx.Client, condition: Callable[[httpx.Response], bool]) -> httpx.Response:
    """Ask for new texts until a reply is as wanted; until then every reply is a 200 or a 503."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    number = 0
    while not condition(reply := client.post(EMBED, json={"text": f"Question {number}"})):
        assert reply.status_code in (200, 503), reply.text
        assert time.monotonic() < deadline, reply.text
        number += 1
        time.sleep(0.05)
    return reply


def read_recipes(server: RunningServer) -> dict[str, list[int]]:
    """How many numbers the vectors of each recipe have."""
    with sqlite3.connect(server.database) as connection:
        rows = connection.execute("SELECT recipe, length(embedding) / 4 FROM embeddings").fetchall()
    return {recipe: sorted({n_dims for other, n_dims in rows if other == recipe}) for recipe, _ in rows}


def outlast_the_look(client: httpx.Client) -> None:
    """New texts for longer than the server goes without looking at its files: all are answered."""
    deadline = time.monotonic() + 2.5
    number = 0
    while time.monotonic() < deadline:
        embed(client, f"Text {number} after the file has changed")
        number += 1


def test_deleted_file_ends_with_the_model_in_memory(server: RunningServer, client: httpx.Client, model: Path) -> None:
    """New texts are computed until the model is unloaded; `/ready` says at once that it would not come back."""
    before = embed(client)
    model.unlink()
    outlast_the_look(client)
    ready = client.get("/ready")
    assert (ready.status_code, ready.json()["code"]) == (503, "model_not_found")
    assert client.post(UNLOAD, json={"model_name": NAME}).status_code == 200
    reply = client.post(EMBED, json={"text": TEXT})
    assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")
    assert client.get("/health").status_code == 200
    shutil.copy(get_models_directory() / "all-MiniLM-L6-v2.gguf", model)
    ask_until(client, lambda reply: reply.status_code == 200)
    assert embed(client) == before


def test_file_cut_short_or_written_over_does_not_touch_the_model_in_memory(
    server: RunningServer, client: httpx.Client, model: Path
) -> None:
    """In place, as `cp` does it: a mapped file would end the process or change its weights."""
    before = embed(client)
    content = model.read_bytes()
    for damage in (content[:1000], b"\0" * len(content), content[: len(content) // 2]):
        with model.open("r+b") as file:
            file.truncate(len(damage))
            file.write(damage)
        outlast_the_look(client)
        assert client.get("/ready").json()["code"] == "model_unusable"
    assert "Going on with the model in memory" in server.log
    model.write_bytes(content)
    ask_until(client, lambda reply: reply.status_code == 200)
    assert embed(client) == before
    assert len(read_recipes(server)) == 1


def test_model_damaged_on_disk_is_named_once_it_is_no_longer_in_memory(client: httpx.Client, model: Path) -> None:
    """A clear message, and the server lives."""
    embed(client)
    model.write_bytes(model.read_bytes()[:-1000])
    assert client.post(UNLOAD, json={"model_name": NAME}).status_code == 200
    reply = ask_until(client, lambda reply: reply.status_code == 500)
    assert reply.json()["code"] == "model_unusable"
    assert "mine.gguf" in reply.json()["detail"]
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("how", ["in place", "by renaming"])
def test_replaced_file_has_a_recipe_of_its_own(
    how: str, server: RunningServer, client: httpx.Client, model: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    """Under requests: no vector of the new model is stored or found as one of the old, nor after a restart."""
    before = embed(client)
    new = write_tiny_model(tmp_path / "new.gguf")
    if how == "in place":
        model.write_bytes(new.read_bytes())
    else:
        new.replace(model)
    ask_until(client, lambda reply: reply.status_code == 200 and len(reply.json()["embedding"]) != len(before))
    after = embed(client)
    assert len(after) == 64
    found = client.post(SEARCH, json={"query_text": TEXT}).raise_for_status().json()["results"]
    assert all(result["search_result_text"] != TEXT for result in found)
    assert sorted(n_dims for [n_dims] in read_recipes(server).values()) == [64, 384]
    server.stop()
    with start_server(tmp_path, settings) as restarted, restarted.client() as other:
        assert embed(other) == after
        restarted.stop()
        assert sorted(n_dims for [n_dims] in read_recipes(restarted).values()) == [64, 384]


def test_file_replaced_under_a_stopped_server_keeps_no_vector_of_the_older_one(
    server: RunningServer, client: httpx.Client, model: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    """By one of the same size and time of modification, whose last weights are others."""
    before = embed(client)
    server.stop()
    status = model.stat()
    content = bytearray(model.read_bytes())
    content[-200_000:] = bytes(byte ^ 1 for byte in content[-200_000:])
    model.write_bytes(content)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    with start_server(tmp_path, settings) as restarted, restarted.client() as other:
        assert embed(other) != before
        restarted.stop()
        assert len(read_recipes(restarted)) == 2


@pytest.mark.parametrize(("mode", "is_mapped"), [(0o644, False), (0o600, False), (0o400, True), (0o444, True)])
def test_only_a_file_that_nobody_may_write_to_is_mapped(tmp_path: Path, mode: int, is_mapped: bool) -> None:
    """Copies on the RAM disk are such files; mapped, they need no memory a second time."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    path.chmod(mode)
    loaded = LlamaBackend().load(path, name="tiny", digest="", max_window=64, pooling=None)
    try:
        assert (str(path) in Path("/proc/self/maps").read_text()) == is_mapped
    finally:
        loaded.close()
