"""`python -m llama_embeddings ingest`: folders into the store, by this process or through a running server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pdf_writing import write_text_pdf
from tests.serving import make_environment, start_server

SENTENCE = "Every file of this folder has a sentence about the number {}."
TOKEN = "a-token-for-this-test"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two documents of one name in different directories, a PDF, and files that are not to be taken."""
    folder = tmp_path / "library"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "one.txt").write_text(SENTENCE.format(1))
    (folder / "deeper" / "one.txt").write_text(f"{SENTENCE.format(2)} {SENTENCE.format(3)}")
    (folder / "paper.pdf").write_bytes(write_text_pdf([[SENTENCE.format(4)]]))
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (folder / ".hidden" / "secret.txt").write_text(SENTENCE.format(5))
    (folder / "link.txt").symlink_to(folder / "one.txt")
    return folder


def ingest(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (directory / ".env").touch()
    return subprocess.run(
        [sys.executable, "-m", "llama_embeddings", "ingest", *map(str, arguments)],
        cwd=directory,
        env=make_environment(directory, {"SECURITY_TOKEN": TOKEN}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def read_outcomes(output: str) -> dict[str, list[str]]:
    """The table's lines by file: outcome, sentences, reason."""
    lines = output.split("\n\n")[0].splitlines()[1:]
    columns = [[part.strip() for part in line.split("  ") if part.strip()] for line in lines]
    return {name: rest for name, *rest in columns}


def test_folder_is_taken_in_and_the_second_time_found(tmp_path: Path, folder: Path) -> None:
    """The table says what became of every file; a damaged one makes the exit code 1 and stops nobody else."""
    first = ingest(tmp_path, folder)
    assert first.returncode == 0, first.stderr
    outcomes = read_outcomes(first.stdout)
    assert outcomes["one.txt"] == ["taken", "1"]
    assert outcomes["deeper/one.txt"] == ["taken", "2"]
    assert outcomes["paper.pdf"] == ["taken", "1"]
    assert outcomes["empty.txt"] == ["skipped", "empty"]
    assert outcomes["picture.png"][0] == "skipped"
    assert set(outcomes) <= {"one.txt", "deeper/one.txt", "paper.pdf", "empty.txt", "picture.png", "link.txt"}
    assert "3 taken, 0 stored already" in first.stdout
    assert "100%" in first.stderr, "the progress bar"
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    (folder / "two.txt").write_text(SENTENCE.format(6))
    second = ingest(tmp_path, folder)
    assert second.returncode == 1
    outcomes = read_outcomes(second.stdout)
    assert outcomes["deeper/one.txt"] == ["stored already", "2"]
    assert (outcomes["two.txt"], outcomes["broken.pdf"][0]) == (["taken", "1"], "failed")
    with start_server(tmp_path) as server, server.client() as client:
        documents = client.get("/get_all_stored_documents/").json()["documents"]
        assert sorted(documents) == ["deeper/one.txt", "one.txt", "paper.pdf", "two.txt"]


def test_dry_run_does_nothing(tmp_path: Path, folder: Path) -> None:
    """Not even the database is made."""
    completed = ingest(tmp_path, folder, "--dry-run")
    assert completed.returncode == 0, completed.stderr
    assert read_outcomes(completed.stdout)["one.txt"][0] == "taken"
    assert "dry run" in completed.stdout
    assert not (tmp_path / "embeddings.sqlite").exists()


def test_folder_goes_to_a_running_server_and_is_found_at_once(tmp_path: Path, folder: Path) -> None:
    """Over HTTP, with the server's token; without it nothing is taken."""
    home = tmp_path / "server"
    home.mkdir()
    query = {"query_text": SENTENCE.format(3), "number_of_most_similar_strings_to_return": 4}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with start_server(home, {"SECURITY_TOKEN": TOKEN}) as server, server.client(headers=headers) as client:
        completed = ingest(tmp_path, folder, "--server", server.url)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert read_outcomes(completed.stdout)["deeper/one.txt"] == ["taken", "2"]
        hits = client.post("/search_stored_embeddings_with_query_string_for_semantic_similarity/", json=query).json()
        assert {hit["search_result_text"] for hit in hits["results"]} == {SENTENCE.format(n) for n in (1, 2, 4)}
        again = ingest(tmp_path, folder, "--server", server.url)
        assert "3 stored already" in again.stdout
        refused = ingest(tmp_path, folder / "one.txt", "--server", server.url, "--token", "wrong")
        assert refused.returncode == 1
        assert "The token is wrong." in refused.stdout
