"""What is written to the log, where, how it is rotated, and what must never be in it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from llama_embeddings import observability
from llama_embeddings.observability import LOG_FILE_NAME, LOG_FORMAT, open_rotating_log
from tests.serving import start_server

MARKER = "Xylophonmarkierung"
TOKEN = "token-that-no-log-may-hold"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR) - \S.*")


def test_log_file_has_the_original_s_name_format_and_bounds() -> None:
    """Other programs read these files."""
    assert LOG_FILE_NAME == "llama2_embeddings_fastapi_service.log"
    assert LOG_FORMAT == "%(asctime)s - %(levelname)s - %(message)s"
    assert observability.MAX_LOG_BYTES == 10 * 1024 * 1024
    assert observability.N_LOG_BACKUPS == 5


def test_full_log_files_move_to_old_logs_and_the_sixth_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest lines stay in the file itself; beside it lies nothing but the directory."""
    monkeypatch.setattr(observability, "MAX_LOG_BYTES", 400)
    handler = open_rotating_log(tmp_path)
    try:
        for number in range(200):
            handler.emit(logging.makeLogRecord({"msg": f"line {number:04d} {'.' * 50}", "levelno": logging.INFO}))
    finally:
        handler.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_FILE_NAME, "old_logs"]
    old = sorted(path.name for path in (tmp_path / "old_logs").iterdir())
    assert old == [f"{LOG_FILE_NAME}.{number}" for number in range(1, 6)]
    files = [tmp_path / "old_logs" / name for name in reversed(old)] + [tmp_path / LOG_FILE_NAME]
    numbers = [int(line.split()[1]) for path in files for line in path.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 200))
    assert all(path.stat().st_size <= 400 for path in files)


def test_no_text_and_no_token_of_a_user_is_logged(tmp_path: Path) -> None:
    """At the finest level, through every endpoint, in answers and in errors; paths and statuses are there."""
    settings = {"SECURITY_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    with start_server(tmp_path, settings) as server, server.client(params={"token": TOKEN}) as client:
        text = f"{MARKER} is what this caller says."
        statuses = [
            client.post("/get_embedding_vector_for_string/", json={"text": text}).status_code,
            client.post(
                "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/", json={"text": text}
            ).status_code,
            client.post("/compute_similarity_between_strings/", json={"text1": text, "text2": text}).status_code,
            client.post(
                "/search_stored_embeddings_with_query_string_for_semantic_similarity/", json={"query_text": text}
            ).status_code,
            client.post(
                "/get_all_embedding_vectors_for_document/", files={"file": (f"{MARKER}.txt", text.encode())}
            ).status_code,
            client.get("/get_all_stored_strings/").status_code,
        ]
        refused = [
            client.post("/get_embedding_vector_for_string/", json={"text": text * 500}).status_code,
            client.post("/get_embedding_vector_for_string/", json={"text": text + "\0"}).status_code,
            client.post("/get_embedding_vector_for_string/", json={"texts": text}).status_code,
            client.post("/get_embedding_vector_for_string/", content=text.encode()).status_code,
            client.post("/get_embedding_vector_for_string/", json={"text": text, "model_name": MARKER}).status_code,
        ]
        server.stop()
    assert statuses == [200] * 6
    assert refused == [400, 400, 422, 422, 404]
    for written in (server.log, server.output):
        assert MARKER not in written
        assert TOKEN not in written
        assert "POST /get_embedding_vector_for_string/ 200 in" in written
        assert "POST /get_embedding_vector_for_string/ 422 in" in written


def test_lines_written_during_a_request_carry_its_id_and_slow_ones_their_parts(tmp_path: Path) -> None:
    """As JSON, one object a line: every line of a request has its id, a slow one says what took the time."""
    settings = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG", "SLOW_REQUEST_SECONDS": "0.0001"}
    with start_server(tmp_path, settings) as server, server.client() as client:
        embed = client.post(
            "/get_embedding_vector_for_string/", json={"text": f"{MARKER}, slowly"}, headers={"x-request-id": "slow-1"}
        )
        assert embed.status_code == 200
        server.stop()
    entries = [json.loads(line) for line in server.log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(entry) for entry in entries))
    during = [entry for entry in entries if entry.get("request_id") == "slow-1"]
    [slow] = [entry for entry in during if entry["message"].startswith("Slow: ")]
    [answered] = [entry for entry in during if " 200 in " in entry["message"]]
    assert answered["message"].startswith("POST /get_embedding_vector_for_string/ 200 in ")
    assert slow["route"] == "/get_embedding_vector_for_string/"
    parts = [slow[f"{part}_seconds"] for part in ("queue", "compute", "store")]
    assert all(seconds > 0 for seconds in parts)
    assert sum(parts) < slow["total_seconds"]
    assert MARKER not in server.log
    requests = [entry for entry in entries if re.match(r"(GET|POST) /", entry["message"])]
    assert all("request_id" in entry for entry in requests)


def test_log_goes_to_stdout_and_to_the_file_line_by_line(tmp_path: Path) -> None:
    """The start is told in its order; a path with line breaks in it makes no line of its own."""
    with start_server(tmp_path) as server, server.client() as client:
        client.get("/no%0A2026-01-01 00:00:00,000 - ERROR - forged")
        server.stop()
    lines = server.log.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert lines == [line for line in server.output.splitlines() if LINE.fullmatch(line)]
    started = ["Opened the database", "Found models", "passed its self-test", "Indexed", "Ready", "Stopping"]
    places = [next(i for i, line in enumerate(lines) if part in line) for part in started]
    assert places == sorted(places)
    assert not [line for line in lines if line.startswith("2026-01-01")]
