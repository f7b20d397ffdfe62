"""`python -m llama_embeddings`: a backup while a server writes, and imports of every kind of file."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.serving import make_environment, start_server

EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
N_DIMS = 384


def run_command(directory: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    (directory / ".env").touch()
    return subprocess.run(
        [sys.executable, "-m", "llama_embeddings", *map(str, arguments)],
        cwd=directory,
        env=make_environment(directory, {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_vectors(count: int, scale: float = 1.0) -> np.ndarray:
    vectors = np.random.default_rng(3).standard_normal((count, N_DIMS)).astype(np.float32)
    return scale * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_npz(path: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    np.savez(path, text=np.array(texts), embedding=vectors)


def write_parquet(path: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts), "embedding": list(vectors)}), path)


def write_jsonl(path: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    rows = [{"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


WRITERS: dict[str, Callable[[Path, Sequence[str], np.ndarray], None]] = {
    ".npz": write_npz,
    ".parquet": write_parquet,
    ".jsonl": write_jsonl,
}


def read_rows(directory: Path) -> dict[str, np.ndarray]:
    with closing(sqlite3.connect(directory / "embeddings.sqlite")) as connection:
        rows = connection.execute("SELECT text, embedding FROM embeddings").fetchall()
    return {text: np.frombuffer(vector, "<f4") for text, vector in rows}


def test_backup_of_a_serving_server_is_a_whole_database(tmp_path: Path) -> None:
    """Taken in the midst of writes, it opens, has what was answered before, and never overwrites a file."""
    (tmp_path / "copy").mkdir()
    target = tmp_path / "copy" / "embeddings.sqlite"
    is_over = threading.Event()
    with start_server(tmp_path) as server, server.client() as client:
        answered = [f"before the backup {number}" for number in range(20)]
        for text in answered:
            client.post(EMBED, json={"text": text}).raise_for_status()

        def write_on() -> None:
            with server.client() as other:
                number = 0
                while not is_over.is_set():
                    other.post(EMBED, json={"text": f"meanwhile {(number := number + 1)}"}).raise_for_status()

        writer = threading.Thread(target=write_on)
        writer.start()
        completed = run_command(tmp_path, "backup", target)
        again = run_command(tmp_path, "backup", target)
        is_over.set()
        writer.join()
    assert completed.returncode == 0, completed.stderr
    assert again.returncode == 1
    assert "exists already" in again.stderr
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with start_server(tmp_path / "copy") as server, server.client() as client:
        for text in answered:
            assert client.post(EMBED, json={"text": text}).headers["x-embedding-source"] != "computed"


def test_backup_without_a_database_makes_none(tmp_path: Path) -> None:
    """It says where it looked, and leaves no file behind."""
    completed = run_command(tmp_path, "backup", tmp_path / "copy.sqlite")
    assert completed.returncode == 1
    assert "no database" in completed.stderr
    assert list(tmp_path.glob("*.sqlite*")) == []


def test_imported_texts_are_found_like_computed_ones(tmp_path: Path) -> None:
    """All kinds of files in one go, scaled to unit length; again, nothing is new; a server answers from them."""
    vectors = make_vectors(60, scale=3.0)
    texts = [f"imported text {number} 猫" for number in range(60)]
    for place, (suffix, write) in enumerate(WRITERS.items()):
        write(tmp_path / f"part{suffix}", texts[20 * place : 20 * place + 20], vectors[20 * place : 20 * place + 20])
    files = [tmp_path / f"part{suffix}" for suffix in WRITERS]
    completed = run_command(tmp_path, "import", *files, "--collection", "imported")
    assert completed.returncode == 0, completed.stderr
    assert "60 rows read, 60 of them new" in completed.stdout
    completed = run_command(tmp_path, "import", *files, "--collection", "again")
    assert "60 rows read, 0 of them new" in completed.stdout, completed.stderr
    stored = read_rows(tmp_path)
    np.testing.assert_allclose(np.stack([stored[text] for text in texts]), vectors / 3, atol=1e-6)
    with start_server(tmp_path) as server, server.client() as client:
        assert client.post(EMBED, json={"text": texts[7]}).headers["x-embedding-source"] == "store"
        for collection in ("imported", "again"):
            query = {"corpus_identifier_string": collection}
            listed = client.get("/get_all_stored_strings/", params=query).json()["strings"]
            assert sorted(listed) == sorted(texts)
        found = client.post(SEARCH, json={"query_text": texts[7]}).raise_for_status().json()["results"]
        nearest = sorted(set(texts) - {texts[7]}, key=lambda text: -float(stored[text] @ stored[texts[7]]))
        assert [hit["search_result_text"] for hit in found] == nearest[:10]


BAD = make_vectors(3)
BAD[1, 5] = np.nan
ZERO = make_vectors(3)
ZERO[2] = 0


@pytest.mark.parametrize(
    ("name", "vectors", "message"),
    [
        ("a.npz", BAD, "row 1 is not finite"),
        ("a.parquet", ZERO, "row 2 has no direction"),
        ("a.jsonl", make_vectors(3)[:, :100], "have 100 dimensions, those of the model have 384"),
        ("a.csv", make_vectors(3), "none of the known kinds"),
    ],
)
def test_unusable_vectors_are_refused_by_row(name: str, vectors: np.ndarray, message: str, tmp_path: Path) -> None:
    """Nothing of the part is kept, and the message says what is wrong with which row."""
    path = tmp_path / name
    WRITERS.get(path.suffix, write_jsonl)(path, ["a", "b", "c"], vectors)
    completed = run_command(tmp_path, "import", path)
    assert completed.returncode == 1
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert read_rows(tmp_path) == {}


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_named(suffix: str, tmp_path: Path) -> None:
    """Cut off in the middle: one line, no traceback."""
    path = tmp_path / f"damaged{suffix}"
    WRITERS[suffix](path, [f"text {number}" for number in range(50)], make_vectors(50))
    os.truncate(path, path.stat().st_size // 2)
    completed = run_command(tmp_path, "import", path)
    assert completed.returncode == 1
    assert f"damaged{suffix} cannot be read" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_import_beside_a_serving_server_is_found_by_it(tmp_path: Path) -> None:
    """By its searches and in its store, without a restart; both keep one row."""
    write_npz(tmp_path / "rows.npz", ["beside the server"], make_vectors(1))
    with start_server(tmp_path) as server, server.client() as client:
        client.post(EMBED, json={"text": "first"}).raise_for_status()
        assert run_command(tmp_path, "import", tmp_path / "rows.npz").returncode == 0
        deadline = time.monotonic() + 20
        results: list[dict[str, object]] = []
        while not results and time.monotonic() < deadline:
            results = client.post(SEARCH, json={"query_text": "first"}).json()["results"]
        assert [result["search_result_text"] for result in results] == ["beside the server"]
        reply: httpx.Response = client.post(EMBED, json={"text": "beside the server"})
        assert reply.headers["x-embedding-source"] == "store"
    assert len(read_rows(tmp_path)) == 2
