"""Where the program looks at the wall clock, which may jump. What waits or runs out uses the monotonic one."""

from __future__ import annotations

import ast
from pathlib import Path

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
READINGS = {"utc_now", "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
# Each writes down when something happened. Only `services/jobs.py` and `services/removals.py` compare as well: finished
# jobs and documents that were given up are forgotten after a time, so that a clock set back keeps them for longer.
READERS = {
    "embeddings_data_models.py",
    "llama_embeddings/api/small_services.py",
    "llama_embeddings/services/documents.py",
    "llama_embeddings/services/embeddings.py",
    "llama_embeddings/services/jobs.py",
    "llama_embeddings/services/removals.py",
    "llama_embeddings/services/token_embeddings.py",
    "llama_embeddings/storage/writes.py",
}


def reads_wall_clock(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(ast.unparse(function) in READINGS for function in calls)


def test_wall_clock_is_read_only_where_a_moment_is_written_down() -> None:
    """A new reader has to be given a place in the list, and a thought: what if the clock goes back meanwhile?"""
    programs = [*PROJECT_DIRECTORY.glob("*.py"), *(PROJECT_DIRECTORY / "llama_embeddings").rglob("*.py")]
    found = {str(path.relative_to(PROJECT_DIRECTORY)) for path in programs if reads_wall_clock(path)}
    assert found == READERS
