"""Connections to the database, and what is particular to SQLite (with `filters.py` and `full_text.py`).

Four engines for one file: a writer with exactly one connection and the same for hot lookups, each on a thread of its
own, two connections for searches, and a small pool of readers on the event loop. In WAL mode readers see the last
commit and never wait for the writer. A move to another database replaces these modules and the DDL in
`migrations.py`; the statements elsewhere are neutral.

Knows no tables, and decides nothing about retries: it says what kind of fault an error is.
"""

from __future__ import annotations

import enum
import re
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Insert, Table, create_engine, event
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from llama_embeddings.errors import ConfigurationError, ServiceError, StoreBusy, StoreFull, StoreUnusable

SQLITE_VERSION = sqlite3.sqlite_version_info

N_READERS = 4
N_SEARCHERS = 2
READER_WAIT_SECONDS = 30.0

# SQLite takes 32,766 variables a statement unless it was compiled otherwise; some are left for the other conditions.
MAX_LIST_LENGTH = 32_000

# Of several rows at once; more gain nothing, as each number has a longer statement of its own.
ROWS_PER_INSERT = 50

# Marks a file as this program's, so that another program's database is never migrated: "LLEM".
APPLICATION_ID = 0x4C4C454D

# quick_check reads every page: some milliseconds up to here, many seconds for gigabytes. Larger files are
# checked as far as their header, their size and their schema.
QUICK_CHECK_LIMIT_BYTES = 32 * 1024 * 1024

# How SQLite speaks of the index of words, which is no loss: it is made anew from the texts.
_IS_ABOUT_FULL_TEXT = re.compile("fts5|vtable constructor failed: full_text", re.IGNORECASE)

# Some modules that stand in for `sqlite3` have no names for the extended codes.
_READONLY_ROLLBACK = sqlite3.SQLITE_READONLY | 3 << 8

_COMMON_PRAGMAS = (
    # Off by default in SQLite; the cascades of the deletes depend on it.
    "PRAGMA foreign_keys = ON",
    # Sorting and grouping of long listings stay in memory: a read must work when the disk is full.
    "PRAGMA temp_store = MEMORY",
    # Memory-mapped reads would turn a truncated file or a failing disk into SIGBUS, which ends the process.
    "PRAGMA mmap_size = 0",
)

# The upper levels of the unique indexes of a million rows.
WRITER_CACHE_IN_MB = 8

WRITER_PRAGMAS = (
    # First, since the next ones may meet a lock. Only bridges another process's short commit; longer locks are the
    # write queue's, which backs off with jitter.
    "PRAGMA busy_timeout = 100",
    *_COMMON_PRAGMAS,
    # Readers and the writer do not wait for each other. Persistent, so the readers need not ask for it.
    "PRAGMA journal_mode = WAL",
    # A commit is a write to the log, without fsync: it survives kill -9 of the process. Power loss may take the
    # last commits, but cannot damage the database.
    "PRAGMA synchronous = NORMAL",
    # Every 64 MiB: copying the log into the database costs two fsyncs and every page that changed, once however
    # often it did; bulk imports take a third less time than with the 4 MiB that are the default.
    "PRAGMA wal_autocheckpoint = 16000",
    # A log that a long read or a backup let grow is cut back to 96 MiB at the next checkpoint.
    "PRAGMA journal_size_limit = 100663296",
    # What is deleted is overwritten with zeros, and so is the place that a row leaves when it grows or its page is
    # split: a row that is deleted later would leave its earlier copies behind. It costs no insert anything.
    "PRAGMA secure_delete = ON",
)

READER_PRAGMAS = (
    # Readers meet a lock only while another process opens, recovers or removes the log.
    "PRAGMA busy_timeout = 5000",
    *_COMMON_PRAGMAS,
    # 4 MiB each: a reader fetches by key, the operating system's cache does the rest.
    "PRAGMA cache_size = -4096",
    "PRAGMA query_only = ON",
)


# A connection, and a number that grows with the commits of all others.
CommitMark = tuple[str, int]


class Fault(enum.Enum):
    """What an error of the database means for those who wait for it."""

    LOCKED = "locked"
    FULL = "full"
    READ_ONLY = "read-only"
    DAMAGED = "damaged"


_FAULT_BY_CODE = {
    sqlite3.SQLITE_BUSY: Fault.LOCKED,
    sqlite3.SQLITE_LOCKED: Fault.LOCKED,
    sqlite3.SQLITE_FULL: Fault.FULL,
    sqlite3.SQLITE_READONLY: Fault.READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: Fault.READ_ONLY,
    sqlite3.SQLITE_IOERR: Fault.READ_ONLY,
    sqlite3.SQLITE_PERM: Fault.READ_ONLY,
    sqlite3.SQLITE_CORRUPT: Fault.DAMAGED,
    sqlite3.SQLITE_NOTADB: Fault.DAMAGED,
}


def classify_fault(error: BaseException) -> Fault | None:
    """The kind of a database error, or None if it is about the statement and not about the database."""
    if isinstance(error, PoolTimeoutError):
        return Fault.LOCKED
    cause = error.orig if isinstance(error, DBAPIError) else error
    extended_code = getattr(cause, "sqlite_errorcode", None)
    # The low byte is the primary code; the rest tells variants apart that mean the same here.
    return None if extended_code is None else _FAULT_BY_CODE.get(extended_code & 0xFF)


def describe_fault(fault: Fault, *, retry_after_seconds: float = 1.0) -> ServiceError:
    """The error that callers of the store see for a kind of fault."""
    if fault is Fault.LOCKED:
        message = "The database is locked by another process. Try again later."
        return StoreBusy(message, retry_after_seconds=retry_after_seconds)
    if fault is Fault.DAMAGED:
        return StoreUnusable("The database file is damaged. Stop the server and restore a backup.")
    if fault is Fault.FULL:
        message = "The disk that holds the database is full. Make room; the service recovers by itself."
    else:
        message = "The database cannot be written: its file, directory or disk is read-only or failing."
    return StoreFull(message, retry_after_seconds=retry_after_seconds)


def parse_database_url(database_url: str) -> URL:
    """Check DATABASE_URL and name the async driver in it. Raises ConfigurationError."""
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise _refuse_url("is not a database URL") from None
    if url.drivername not in ("sqlite", "sqlite+aiosqlite"):
        raise _refuse_url("names another database than SQLite")
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise _refuse_url("must name a file")
    try:
        is_reachable = Path(url.database).absolute().parent.is_dir()
    except PermissionError:
        is_reachable = False
    if not is_reachable:
        raise _refuse_url("names a file in a directory that does not exist or may not be entered")
    return url.set(drivername="sqlite+aiosqlite")


def find_file(url: URL) -> Path:
    """Where the database of a checked URL lies."""
    return Path(str(url.database)).absolute()


def _refuse_url(reason: str) -> ConfigurationError:
    message = f"DATABASE_URL {reason}. Give it as sqlite+aiosqlite:///embeddings.sqlite."
    return ConfigurationError(message, setting="DATABASE_URL")


def find_database_file(database_url: str) -> Path:
    """The file that DATABASE_URL names, there or not. Raises ConfigurationError."""
    return find_file(parse_database_url(database_url))


def create_writer_engine(
    url: URL, *, cache_in_mb: int = WRITER_CACHE_IN_MB, survives_power_cuts: bool = False
) -> Engine:
    """An engine of one connection for the writer's thread; its transactions hold the write lock from their beginning.

    With BEGIN IMMEDIATE a lock of another process shows at BEGIN, where nothing has been done yet, and not in
    the middle of a transaction that would have to be thrown away.
    """
    # isolation_level None: the driver begins no transactions of its own accord.
    engine = _create_thread_engine(url, connect_args={"isolation_level": None, "check_same_thread": False})
    # Or with an fsync of the log for every commit: a power cut takes nothing that was answered.
    durability = ("PRAGMA synchronous = FULL",) if survives_power_cuts else ()
    _configure_connections(engine, (*WRITER_PRAGMAS, *durability, f"PRAGMA cache_size = -{cache_in_mb * 1024}"))
    event.listen(engine, "begin", _begin_immediate)
    return engine


def create_erasure_engine(url: URL) -> Engine:
    """An engine of one connection that does nothing but `empty_log`."""
    engine = _create_thread_engine(url, connect_args={"check_same_thread": False}, isolation_level="AUTOCOMMIT")
    # Waits so long between two of the writer's transactions, and for reads that are about to end.
    _configure_connections(engine, ("PRAGMA busy_timeout = 50",))
    return engine


def empty_log(engine: Engine) -> bool:
    """Copy the write-ahead log into the database and cut it to nothing. False if somebody reads an earlier state."""
    try:
        with engine.connect() as connection:
            [is_busy, _, _] = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
    except DBAPIError as error:
        if classify_fault(error) is not Fault.LOCKED:
            raise
        return False
    return not is_busy


def create_lookup_engine(url: URL, *, mode: str = "rw") -> Engine:
    """An engine of one connection for the thread of the hot lookups; each statement sees the last commit.

    `mode`: see `open_existing_file_only`.
    """
    return _create_thread_reader(url, mode, n_connections=1)


def create_search_engine(url: URL, *, mode: str = "rw") -> Engine:
    """The same for reads that may take long, for as many threads as it has connections."""
    return _create_thread_reader(url, mode, n_connections=N_SEARCHERS)


def _create_thread_reader(url: URL, mode: str, *, n_connections: int) -> Engine:
    engine = _create_thread_engine(
        url,
        n_connections=n_connections,
        connect_args={"check_same_thread": False},
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    open_existing_file_only(engine, mode=mode)
    _configure_connections(engine, READER_PRAGMAS)
    return engine


def _create_thread_engine(url: URL, *, n_connections: int = 1, **options: Any) -> Engine:
    # The driver without an event loop: the whole of a transaction is one visit to its thread.
    return create_engine(
        url.set(drivername="sqlite"),
        poolclass=QueuePool,
        pool_size=n_connections,
        max_overflow=0,
        hide_parameters=True,
        **options,
    )


def create_reader_engine(url: URL, *, mode: str = "rw") -> AsyncEngine:
    """A small pool of connections that cannot write; each statement sees the last commit."""
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=N_READERS,
        max_overflow=0,
        pool_timeout=READER_WAIT_SECONDS,
        hide_parameters=True,  # they are users' texts, and error messages end in logs
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    open_existing_file_only(engine.sync_engine, mode=mode)
    _configure_connections(engine.sync_engine, READER_PRAGMAS)
    return engine


def open_existing_file_only(engine: Engine, *, mode: str = "rw") -> None:
    """Let further connections fail where there is no file, instead of making an empty one.

    `mode`: `rw`, or `ro` for those that must not even copy the log into the database when they are the last to close.
    """

    def name_mode(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[0] = f"{Path(arguments[0]).absolute().as_uri()}?mode={mode}"
        options["uri"] = True

    event.listen(engine, "do_connect", name_mode)


def _configure_connections(engine: Engine, pragmas: tuple[str, ...]) -> None:
    def configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    event.listen(engine, "connect", configure)


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def insert_unless_present(table: Table) -> Insert:
    """An INSERT that passes over rows that break a unique constraint, and no other constraint."""
    return sqlite_insert(table).on_conflict_do_nothing()


@dataclass(frozen=True, slots=True)
class PlainInsert:
    """The same past SQLAlchemy, whose handling of parameters and rows takes longer than SQLite takes to insert them.

    A transaction of one row takes 0.13 ms instead of 0.23, and 0.5 instead of 0.7 where the processor's caches are the
    engine's.
    """

    table: str
    columns: tuple[str, ...]

    @classmethod
    def into(cls, table: Table, *columns: str) -> PlainInsert:
        """Rows of values for these columns, in this order."""
        return cls(table.name, tuple(table.c[column].name for column in columns))

    def insert_row(self, connection: Connection, row: Sequence[Any]) -> int | None:
        """The id of the new row, or None if it is there already."""
        cursor = connection.connection.cursor()
        cursor.execute(_render_insert(self, 1), row)
        return cursor.lastrowid if cursor.rowcount else None

    def insert_rows(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> int:
        """Many with each statement; how many were not there already."""
        cursor = connection.connection.cursor()
        n_inserted = 0
        for start in range(0, len(rows), ROWS_PER_INSERT):
            part = rows[start : start + ROWS_PER_INSERT]
            if len(part) == ROWS_PER_INSERT:
                cursor.execute(_render_insert(self, ROWS_PER_INSERT), [*chain.from_iterable(part)])
            else:
                cursor.executemany(_render_insert(self, 1), part)
            n_inserted += cursor.rowcount
        return n_inserted


@lru_cache(maxsize=64)
def _render_insert(insert: PlainInsert, n_rows: int) -> str:
    places = f"({', '.join('?' * len(insert.columns))})"
    target = f"{insert.table} ({', '.join(insert.columns)})"
    # The program's own words, never a caller's.
    return f"INSERT INTO {target} VALUES {', '.join([places] * n_rows)} ON CONFLICT DO NOTHING"  # noqa: S608


def fetch_by_ids(
    connection: Connection, columns: str, table: str, row_ids: Sequence[int], condition: str = "TRUE"
) -> Sequence[Any]:
    """Rows by their ids, past SQLAlchemy's lists: making one of 200 parameters takes ten times as long as the reading.

    `columns`, `table` and `condition` are the program's own words, never a caller's.
    """
    # In ascending order, neighbours are found on the same page.
    wanted = tuple(sorted(row_ids))
    places = ",".join("?" * len(wanted))
    statement = f"SELECT {columns} FROM {table} WHERE id IN ({places}) AND {condition}"  # noqa: S608 - see above
    return connection.exec_driver_sql(statement, wanted).all()


def update_by_ids(connection: Connection, table: str, column: str, value: int, row_ids: Sequence[int]) -> None:
    """Set a column of many rows to one value, past SQLAlchemy for the same reason."""
    places = ",".join("?" * len(row_ids))
    statement = f"UPDATE {table} SET {column} = ? WHERE id IN ({places})"  # noqa: S608 - see above
    connection.exec_driver_sql(statement, (value, *row_ids))


def insert_or_overwrite(table: Table) -> Insert:
    """An INSERT that overwrites the row with the same primary key."""
    insertion = sqlite_insert(table)
    others = [column.name for column in table.columns if not column.primary_key]
    return insertion.on_conflict_do_update(
        index_elements=list(table.primary_key.columns), set_={name: insertion.excluded[name] for name in others}
    )


def read_version(connection: Connection) -> int:
    """The number of the last migration applied; 0 for a new database."""
    return connection.exec_driver_sql("PRAGMA user_version").scalar_one()


def write_version(connection: Connection, version: int) -> None:
    """Record the last migration applied; part of the transaction that it is called in."""
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.exec_driver_sql(f"PRAGMA user_version = {int(version)}")


def forget_tables(connection: Connection, tables: Sequence[str]) -> None:
    """Strike tables out of the schema without touching their contents; part of the transaction that it is called in.

    For tables that cannot be dropped, since SQLite would have to read them. `tables` are the program's own words.
    """
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    try:
        for table in tables:
            connection.exec_driver_sql("DELETE FROM sqlite_master WHERE tbl_name = ?", (table,))
    finally:
        # Also has the schema read again.
        connection.exec_driver_sql("PRAGMA writable_schema = RESET")


def read_commit_mark(engine: Engine) -> CommitMark:
    """Differs from an earlier one if another connection than the engine's only one has committed in between.

    Other processes' commits are seen by the writer's connection in this way, and by no other: it makes none of them
    itself. Raises sqlite3.Error.
    """
    connection = engine.raw_connection()
    try:
        # The numbers of two connections say nothing about each other.
        serial = connection.info.setdefault("serial", secrets.token_hex(8))
        cursor = connection.cursor()
        cursor.execute("PRAGMA data_version")
        [(version,)] = cursor.fetchall()
        cursor.close()
    finally:
        connection.close()
    return serial, version


def touch(connection: Connection) -> None:
    """Write one page without changing anything: proves that the database can be written."""
    write_version(connection, read_version(connection))


async def vacuum_into(engine: AsyncEngine, target: Path) -> None:
    """Write a compact copy of the last committed state; writers go on meanwhile. `target` must not exist."""
    # A connection of its own: the readers' query_only forbids VACUUM, and the writer's would be busy for long.
    copier = create_async_engine(engine.url, isolation_level="AUTOCOMMIT", hide_parameters=True)
    try:
        async with copier.connect() as connection:
            await connection.exec_driver_sql("VACUUM INTO ?", (str(target),))
    finally:
        await copier.dispose()


def forget_snapshots(path: Path) -> None:
    """Let a copy know of no snapshot of an index: they are the original's, and go on with it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM index_snapshots")
        connection.commit()


def inspect_file(path: Path, newest_version: int) -> bool:
    """Refuse a file that must not be written to, without changing it. Answers whether its full-text index is damaged.

    Raises StoreUnusable for what is no database, a damaged one, one that another program made, and one whose
    version is above `newest_version`. A file that is absent or empty passes.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        try:
            return _inspect_in_mode("ro", path, newest_version)
        except sqlite3.OperationalError as error:
            # Killed in its very first transaction, before there was a log: only who may write can roll that back.
            if error.sqlite_errorcode != _READONLY_ROLLBACK:
                raise
            return _inspect_in_mode("rw", path, newest_version)
    except sqlite3.DatabaseError as error:
        raise _describe_inspection(error, path) from error


def _inspect_in_mode(mode: str, path: Path, newest_version: int) -> bool:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
        return _inspect(connection, path, newest_version)


def read_version_of_file(path: Path) -> int:
    """The last migration applied to a file; 0 if it is absent or empty. Raises as `inspect_file` does."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            [version] = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise _describe_inspection(error, path) from error
    return int(version)


def inspect_header(path: Path) -> None:
    """Read a database's first pages afresh, past the caches of open connections. Raises as `inspect_file` does."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            [application_id] = connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.DatabaseError as error:
        raise _describe_inspection(error, path) from error
    if application_id != APPLICATION_ID:
        raise StoreUnusable(f"{path} is a database of another program.")


def _inspect(connection: sqlite3.Connection, path: Path, newest_version: int) -> bool:
    [n_objects] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if n_objects and application_id != APPLICATION_ID:
        raise StoreUnusable(f"{path} is a database of another program. Name another file in DATABASE_URL.")
    if version > newest_version:
        raise StoreUnusable(
            f"{path} has version {version}, this program knows versions up to {newest_version}. "
            "Start the newer program, or restore a backup made before the update."
        )
    if path.stat().st_size > QUICK_CHECK_LIMIT_BYTES:
        return False
    findings = _list_damage(connection)
    for finding in findings:
        if not _IS_ABOUT_FULL_TEXT.search(finding):
            raise StoreUnusable(f"{path} is damaged ({finding}). Restore a backup, or move the file away.")
    return bool(findings)


def _list_damage(connection: sqlite3.Connection) -> list[str]:
    try:
        return _check_quickly(connection, "PRAGMA quick_check")
    except sqlite3.DatabaseError as error:
        # SQLite from 3.44 on looks into virtual tables as well, and ends the check at one that it cannot open.
        if not _IS_ABOUT_FULL_TEXT.search(str(error)):
            raise
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        checks = [_check_quickly(connection, f'PRAGMA quick_check("{table}")') for (table,) in tables]
        return [str(error), *chain.from_iterable(checks)]


def _check_quickly(connection: sqlite3.Connection, pragma: str) -> list[str]:
    return [finding for (finding,) in connection.execute(pragma) if finding != "ok"]


def _describe_inspection(error: sqlite3.DatabaseError, path: Path) -> ServiceError:
    fault = classify_fault(error)
    if fault is Fault.DAMAGED:
        return StoreUnusable(f"{path} is not a database or is damaged ({error}). Restore a backup, or move it away.")
    if fault is not None:
        return describe_fault(fault)
    return StoreUnusable(f"{path} cannot be read as a database ({error}).")
