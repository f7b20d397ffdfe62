"""Migrations: the sum of the steps is the schema, and a file that must not be touched is not touched."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError

from embeddings_data_models import Base, compute_text_hash
from llama_embeddings.errors import ConfigurationError, StoreUnusable
from llama_embeddings.storage.engine import create_writer_engine, parse_database_url
from llama_embeddings.storage.migrations import MIGRATIONS, Migration, find_newest_version, migrate
from llama_embeddings.storage.store import EmbeddingStore


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = create_writer_engine(parse_database_url(f"sqlite+aiosqlite:///{tmp_path}/migrated.sqlite"))
    yield engine
    engine.dispose()


def run(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(statement).fetchall()
        connection.commit()
    return rows


def describe_schema(path: Path) -> dict[str, Any]:
    """Everything that SQLite knows of a schema: tables, columns, keys, indexes, and the text of each.

    Without the full-text index, a virtual table and those that it makes for itself, as no class can describe it.
    """
    schema: dict[str, Any] = {}
    for kind, name, sql in run(path, "SELECT type, name, sql FROM sqlite_master"):
        if re.fullmatch("full_text(_(data|idx|docsize|config))?", name):
            continue
        schema[f"{kind} {name}"] = "".join((sql or "").split())
        for pragma in ("table_xinfo", "foreign_key_list", "index_xinfo"):
            schema[f"{pragma} {name}"] = run(path, f"PRAGMA {pragma}('{name}')")
        # Without its first column, which counts the indexes in the order in which they were made.
        schema[f"index_list {name}"] = sorted(row[1:] for row in run(path, f"PRAGMA index_list('{name}')"))
    return schema


async def test_migrated_database_equals_a_fresh_one(writer: Engine, tmp_path: Path) -> None:
    """All steps together make what the tables' classes make."""
    migrate(writer)
    fresh = create_engine(f"sqlite:///{tmp_path}/fresh.sqlite")
    Base.metadata.create_all(fresh)
    fresh.dispose()
    assert describe_schema(tmp_path / "migrated.sqlite") == describe_schema(tmp_path / "fresh.sqlite")


def test_steps_are_numbered_from_one_without_gaps() -> None:
    """The version says how many steps were taken."""
    assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


async def test_migrating_twice_changes_nothing(writer: Engine, tmp_path: Path) -> None:
    """Steps that were taken are not taken again."""
    migrate(writer)
    before = describe_schema(tmp_path / "migrated.sqlite")
    assert migrate(writer) == find_newest_version()
    assert describe_schema(tmp_path / "migrated.sqlite") == before


async def test_only_the_missing_steps_are_taken(writer: Engine, tmp_path: Path) -> None:
    """A later step is applied on top of what an older program left, with its rows."""
    migrate(writer)
    run(tmp_path / "migrated.sqlite", "INSERT INTO documents VALUES (1, 'a', 'b', 'c', 'd', NULL, NULL, NULL, NULL)")
    next_version = find_newest_version() + 1
    later = Migration(next_version, "a column", ("ALTER TABLE documents ADD COLUMN colour TEXT DEFAULT 'red'",))
    assert migrate(writer, (*MIGRATIONS, later)) == next_version
    assert run(tmp_path / "migrated.sqlite", "SELECT id, colour FROM documents") == [(1, "red")]


async def test_failed_step_leaves_the_version_before_it(writer: Engine, tmp_path: Path) -> None:
    """What the failed step had done already is undone; the step before it stays."""
    next_version = find_newest_version() + 1
    failing = Migration(next_version, "fails half way", ("CREATE TABLE half_way (id INTEGER)", "CREATE NONSENSE"))
    with pytest.raises(OperationalError):
        migrate(writer, (*MIGRATIONS, failing))
    assert run(tmp_path / "migrated.sqlite", "PRAGMA user_version") == [(find_newest_version(),)]
    assert "table half_way" not in describe_schema(tmp_path / "migrated.sqlite")


async def test_newer_database_is_refused_with_both_versions(tmp_path: Path) -> None:
    """The message says which version is there, which is known, and what to do; the file stays as it is."""
    path = tmp_path / "newer.sqlite"
    await (await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")).close()
    run(path, "PRAGMA user_version = 999")
    before = path.read_bytes()
    with pytest.raises(StoreUnusable, match=rf"version 999.*up to {find_newest_version()}.*newer program"):
        await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")
    assert path.read_bytes() == before


async def test_full_text_index_with_wrong_totals_is_filled_anew(tmp_path: Path) -> None:
    """Rows were removed from it that it never held: version 5 finds every text by its words, and forgets it."""
    path = tmp_path / "embeddings.sqlite"
    url = f"sqlite+aiosqlite:///{path}"
    writer = create_writer_engine(parse_database_url(url))
    assert migrate(writer, MIGRATIONS[:4]) == 4
    writer.dispose()
    columns = "(id, text, text_hash, model_name, recipe, embedding, n_tokens, n_tokens_dropped, collection_id)"
    for row_id in range(1, 6):
        hash_ = compute_text_hash(f"wing {row_id}")
        run(
            path,
            f"INSERT INTO embeddings {columns} VALUES ({row_id}, 'wing {row_id}', '{hash_}', 'm', 'r', '', 1, 0, 1)",
        )
        run(path, f"INSERT INTO full_text (rowid, text) VALUES ({row_id}, 'wing {row_id}')")
    for row_id in range(6, 11):
        run(path, f"INSERT INTO full_text (full_text, rowid, text) VALUES ('delete', {row_id}, 'wing {row_id}')")
    run(path, "UPDATE full_text_progress SET last_row_id = 5")
    store = await EmbeddingStore.open(url)
    found = await store.search_text("wing", model_name="m", families=["r"], limit=10)
    assert {row_id for row_id, _ in found} == {1, 2, 3, 4, 5}
    assert len((await store.delete_text("wing 1")).rows) == 1
    assert len(await store.search_text("wing", model_name="m", families=["r"], limit=10)) == 4
    await store.close()
    run(path, "INSERT INTO full_text (full_text) VALUES ('integrity-check')")


def make_text_file(path: Path) -> None:
    path.write_text("Dear diary, this is not a database. " * 100)


def make_other_programs_database(path: Path) -> None:
    run(path, "CREATE TABLE customers (id INTEGER)")
    run(path, "PRAGMA user_version = 1")


def make_truncated_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "PRAGMA application_id = 1280066893; CREATE TABLE t (a); "
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500) "
            "INSERT INTO t SELECT randomblob(1000) FROM n;"
        )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_overwritten_database(path: Path) -> None:
    make_truncated_database(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA application_id = 1280066893; CREATE TABLE t (a UNIQUE); CREATE TABLE u (a);")
        connection.executemany("INSERT INTO t VALUES (?)", [(f"row {i}" * 50,) for i in range(500)])
        connection.commit()
    data = bytearray(path.read_bytes())
    data[8 * 4096 : 10 * 4096] = b"\xff" * (2 * 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_text_file, "not a database"),
        (make_other_programs_database, "another program"),
        (make_truncated_database, "damaged"),
        (make_overwritten_database, "damaged"),
    ],
)
async def test_unusable_file_is_refused_and_left_untouched(tmp_path: Path, make: Any, message: str) -> None:
    """What is no database of ours is named as such, and not one of its bytes changes."""
    path = tmp_path / "unusable.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreUnusable, match=message):
        await EmbeddingStore.open(f"sqlite+aiosqlite:///{path}")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "not a url",
        "postgresql+asyncpg://localhost/embeddings",
        "sqlite+aiosqlite://",
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:////no/such/directory/embeddings.sqlite",
    ],
)
async def test_url_that_names_no_usable_file_names_its_setting(url: str) -> None:
    """A wrong DATABASE_URL stops the start and says which setting is wrong."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        await EmbeddingStore.open(url)
    assert caught.value.field == "DATABASE_URL"
