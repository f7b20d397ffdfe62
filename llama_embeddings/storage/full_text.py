"""The full-text index over the searchable texts: SQLite's FTS5 with BM25, and how texts and questions are put to it.

FTS5 takes a run of ideographs for one word. Texts in scripts that are written without spaces are therefore given to it
as overlapping pairs of characters, with the last character of each run once more by itself, so that a single character
is found as the beginning of a pair wherever it stands. The index holds no texts: what is removed has to be named as it
was put in, so `segment` must give tomorrow what it gave when a row was added. Change it only with a migration that
fills the index anew.

FTS5 believes what it is told to remove, and is damaged by a row that it never held. It keeps one line for each row that
it holds, in `full_text_docsize`, in the same transaction: that table is asked before a row is put in or removed.

The index can be made anew from the rows, so damage to it is no damage to the database: it is raised as
FullTextUnavailable, and `start_anew` is the remedy. An SQLite before 3.42 does not know the format in which a later
one overwrites what it removes, and takes it for damage.

Like `engine.py`, particular to SQLite. Neither begins nor ends a transaction, and decides nothing about when the index
follows the rows: that is `full_text_follower.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from llama_embeddings.errors import FullTextUnavailable
from llama_embeddings.storage.engine import (
    MAX_LIST_LENGTH,
    SQLITE_VERSION,
    Fault,
    classify_fault,
    fetch_by_ids,
    forget_tables,
)

CREATE_INDEX = """
    CREATE VIRTUAL TABLE full_text USING fts5(
        text,
        content = '',
        tokenize = 'porter unicode61 remove_diacritics 2 categories ''L* N* Co M*'''
    )
"""
# Tables of its own, in which FTS5 keeps the index.
SHADOW_TABLES = ("full_text_data", "full_text_idx", "full_text_docsize", "full_text_config")

# Instead of the id up to which the index has come: it must be made anew before anything is put in.
UNKNOWN_POSITION = -1

MAX_QUERY_TERMS = 128
# Scoring a row takes some 3 µs. Beyond so many rows, the commonest words of a question are left out, which weigh least.
MAX_SCORED_ROWS = 30_000
# So many of one that is alone are scored nonetheless.
_MAX_HITS = 4 * MAX_SCORED_ROWS
_HITS_PER_FETCH = 1_000

# Scripts without spaces between words, by code point and not by Unicode's tables: those differ between versions.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17d3"  # Burmese, Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"  # hangul, where particles stick to the words
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")

_READ_NEXT = text("SELECT id, text, collection_id FROM embeddings WHERE id > :last_row_id ORDER BY id LIMIT :limit")
_READ_PROGRESS = text("SELECT last_row_id FROM full_text_progress")
_WRITE_PROGRESS = text("UPDATE full_text_progress SET last_row_id = :last_row_id")
_INSERT = text("INSERT INTO full_text (rowid, text) VALUES (:row_id, :text)")
_REMOVE = text("INSERT INTO full_text (full_text, rowid, text) VALUES ('delete', :row_id, :text)")
_READ_SECURE_DELETE = text("SELECT v FROM full_text_config WHERE k = 'secure-delete'")
_SET_SECURE_DELETE = text("INSERT INTO full_text (full_text, rank) VALUES ('secure-delete', 1)")
_COUNT_ROWS = text("SELECT count(*) FROM (SELECT 1 FROM full_text_docsize LIMIT :limit)")
_COUNT_MATCHES = text("SELECT count(*) FROM (SELECT 1 FROM full_text WHERE full_text MATCH :query LIMIT :limit)")
_READ_MATCHES = text(
    "SELECT coalesce(group_concat(id), '') FROM"
    " (SELECT rowid AS id FROM full_text WHERE full_text MATCH :query AND rowid BETWEEN :first AND :last)"
)
_SEARCH = text(
    "SELECT id, score FROM"
    " (SELECT rowid AS id, -rank AS score FROM full_text WHERE full_text MATCH :query LIMIT :limit)"
    " ORDER BY score DESC, id"
)
# The plus has FTS5 walk through the matches, which takes 0.3 µs for each, and score those among the ids. Without it,
# FTS5 would be asked anew for each id, which takes 60 ms.
_SEARCH_AMONG = text(
    "SELECT rowid AS id, -rank AS score FROM full_text WHERE full_text MATCH :query AND rowid BETWEEN :first AND :last"
    " AND +rowid IN (SELECT value FROM json_each(:row_ids)) ORDER BY score DESC, id"
)

# int64 row ids to whether each may be returned.
Filter = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows that may be found.

    `are_among` says it of some hits; `list_all` lists all of them, sorted int64, which takes longer.
    """

    are_among: Filter
    list_all: Callable[[], np.ndarray]


def segment(text: str) -> str:
    """A text as FTS5 is given it: runs of unspaced scripts as pairs of characters, the rest as it is."""
    return text if text.isascii() else _UNSPACED_RUN.sub(_pair_characters, text)


def _pair_characters(run: re.Match[str]) -> str:
    characters = run[0]
    pairs = (characters[start : start + 2] for start in range(len(characters) - 1))
    return f" {' '.join((*pairs, characters[-1]))} "


def list_query_terms(query: str) -> list[str]:
    """The words of any string as FTS5 expressions, each once, at most MAX_QUERY_TERMS.

    Each word is quoted, so that nothing in it is an operator; a single character of an unspaced script asks for the
    pairs that begin with it. Pairs of a run are asked for, not the single character behind them.
    """
    terms: dict[str, None] = {}
    for word in _split_words(query):
        if len(terms) == MAX_QUERY_TERMS:
            break
        is_single = len(word) == 1 and _UNSPACED_RUN.match(word)
        terms[f'"{word}"*' if is_single else f'"{word}"'] = None
    return list(terms)


def _split_words(query: str) -> Iterator[str]:
    storable = query.encode("utf-8", "replace").decode()  # without lone surrogates
    for word in "".join(map(_blank_unless_in_a_word, storable)).split():
        position = 0
        for run in _UNSPACED_RUN.finditer(word):
            if run.start() > position:
                yield word[position : run.start()]
            characters = run[0]
            yield from (characters[start : start + 2] for start in range(max(1, len(characters) - 1)))
            position = run.end()
        if position < len(word):
            yield word[position:]


def _blank_unless_in_a_word(character: str) -> str:
    is_in_a_word = character.isalnum() or unicodedata.category(character)[0] == "M"
    return character if is_in_a_word else " "


# --- following the rows; each is a write ---


def index_next(connection: Connection, limits: Sequence[int]) -> list[int]:
    """Take in the next rows, at most so many; answers the id up to which the index has come.

    An index of which nothing is known is made anew first; UNKNOWN_POSITION: it could not be.
    """
    return [_index_next(connection, limit) for limit in limits]


def _index_next(connection: Connection, limit: int) -> int:
    last_row_id = _read_progress(connection)
    if last_row_id == UNKNOWN_POSITION:
        return _make_anew(connection)
    rows = connection.execute(_READ_NEXT, {"last_row_id": last_row_id, "limit": limit}).all()
    if not rows:
        return last_row_id
    _insert(connection, [(row_id, text) for row_id, text, collection_id in rows if collection_id is not None])
    connection.execute(_WRITE_PROGRESS, {"last_row_id": rows[-1][0]})
    return int(rows[-1][0])


def add_rows(connection: Connection, rows: Sequence[tuple[int, str]]) -> None:
    """Take in rows that have become searchable; those that the index has not come to yet are left to it."""
    last_row_id = _read_progress(connection)
    _insert(connection, [row for row in rows if row[0] <= last_row_id])


def remove_rows(connection: Connection, rows: Sequence[tuple[int, str]]) -> None:
    """Take out those of these rows that the index holds, with the texts that they were put in with."""
    if not rows or _read_progress(connection) == UNKNOWN_POSITION:
        return
    with _telling_damage():
        held = _find_held(connection, rows)
        if held:
            _overwrite_removed(connection)
        _execute(connection, _REMOVE, [row for row in rows if row[0] in held])


def _overwrite_removed(connection: Connection) -> None:
    """Have FTS5 take words out of its pages at once, where it can, and not when they are merged."""
    if SQLITE_VERSION >= (3, 42) and connection.execute(_READ_SECURE_DELETE).scalar_one_or_none() != 1:
        connection.execute(_SET_SECURE_DELETE)


def _read_progress(connection: Connection) -> int:
    return int(connection.execute(_READ_PROGRESS).scalar_one())


def _insert(connection: Connection, rows: Sequence[tuple[int, str]]) -> None:
    if rows:
        with _telling_damage():
            held = _find_held(connection, rows)
            _execute(connection, _INSERT, [row for row in rows if row[0] not in held])


def _execute(connection: Connection, statement: TextClause, rows: Sequence[tuple[int, str]]) -> None:
    if rows:
        connection.execute(statement, [{"row_id": row_id, "text": segment(text)} for row_id, text in rows])
        # FTS5 writes what it has gathered at the next savepoint. Damage that it meets shows here, and not at another
        # statement or the commit, where nobody would know what it is about.
        with connection.begin_nested():
            pass


def _find_held(connection: Connection, rows: Sequence[tuple[int, str]]) -> set[int]:
    """Ids of those of these rows that are in the index."""
    row_ids = [row_id for row_id, _ in rows]
    parts = (row_ids[start : start + MAX_LIST_LENGTH] for start in range(0, len(row_ids), MAX_LIST_LENGTH))
    return {row_id for part in parts for (row_id,) in fetch_by_ids(connection, "id", "full_text_docsize", part)}


# --- damage ---


@contextmanager
def _telling_damage() -> Iterator[None]:
    """For statements that touch the index alone: an error that is about its contents becomes FullTextUnavailable."""
    try:
        yield
    except (DBAPIError, MemoryError) as error:
        if not _is_damage(error):
            raise
        raise FullTextUnavailable("The full-text index was damaged, and is made anew. Try again later.") from error


def _is_damage(error: DBAPIError | MemoryError) -> bool:
    """Tables that contradict each other, are missing or are of an unknown version; the statements are right."""
    if isinstance(error, MemoryError):
        return True  # of a page of nonsense, FTS5 takes a number for the length of a list
    return classify_fault(error) in (None, Fault.DAMAGED) and "fts5: syntax error" not in str(error.orig)


def start_anew(connection: Connection, requests: Sequence[None]) -> list[int]:
    """Empty the index, whatever state it is in; the rows are to come in again. Answers as `index_next` does."""
    return [_make_anew(connection) for _ in requests]


def _make_anew(connection: Connection) -> int:
    position = 0 if _is_done(connection, _replace) or _is_done(connection, _replace_by_force) else UNKNOWN_POSITION
    connection.execute(_WRITE_PROGRESS, {"last_row_id": position})
    return position


def _is_done(connection: Connection, replace: Callable[[Connection], None]) -> bool:
    try:
        with connection.begin_nested():
            replace(connection)
    except (DBAPIError, MemoryError) as error:
        if not _is_damage(error):
            raise
        return False
    return True


def _replace(connection: Connection) -> None:
    connection.exec_driver_sql("DROP TABLE IF EXISTS full_text")
    connection.exec_driver_sql(CREATE_INDEX)


def _replace_by_force(connection: Connection) -> None:
    """For an index that FTS5 does not even open, and so does not drop."""
    forget_tables(connection, ["full_text"])
    for table in SHADOW_TABLES:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")
    connection.exec_driver_sql(CREATE_INDEX)


# --- searching ---


def search(connection: Connection, query: str, *, limit: int, wanted: Wanted | None) -> list[tuple[int, float]]:
    """Row ids and BM25 scores of the rows with any word of the query, best first. Raises FullTextUnavailable.

    Only rows that are `wanted` count, for the `limit` as well as for what is left out of a question with too many
    hits. No word in the query: nothing is found.
    """
    terms = list_query_terms(query)
    if not terms or limit <= 0:
        return []
    row_ids = None
    if _count(connection, _COUNT_ROWS, {}) > MAX_SCORED_ROWS:
        if wanted is None:
            terms = _choose_terms(connection, terms)
        else:
            terms, row_ids = _choose_terms_among(connection, terms, wanted)
    if not terms:
        return []
    found: list[tuple[int, float]] = []
    hits_per_fetch = min(limit, _HITS_PER_FETCH) if wanted is None else _HITS_PER_FETCH
    for hits in _fetch_hits(connection, " OR ".join(terms), row_ids, hits_per_fetch):
        found.extend(_filter_hits(hits, wanted))
        if len(found) >= limit:
            break
    return found[:limit]


def _fetch_hits(
    connection: Connection, query: str, row_ids: np.ndarray | None, hits_per_fetch: int
) -> Iterator[Sequence[Sequence[object]]]:
    statement, parameters = _SEARCH, {"query": query, "limit": _MAX_HITS}
    if row_ids is not None:
        statement, parameters = _SEARCH_AMONG, {"query": query, "row_ids": str(row_ids.tolist()), **_span(row_ids)}
    with _telling_damage(), connection.execute(statement, parameters) as result:
        yield from result.partitions(hits_per_fetch)


def _span(row_ids: np.ndarray) -> dict[str, Any]:
    return {"first": int(row_ids[0]), "last": int(row_ids[-1])}


def _filter_hits(hits: Sequence[Sequence[object]], wanted: Wanted | None) -> list[tuple[int, float]]:
    pairs = [(row_id, score) for row_id, score in hits]
    if wanted is None:
        return pairs  # type: ignore[return-value]
    are_wanted = wanted.are_among(np.array([row_id for row_id, _ in pairs], np.int64))
    return [pair for pair, is_kept in zip(pairs, are_wanted.tolist(), strict=True) if is_kept]  # type: ignore[misc]


def _choose_terms(connection: Connection, terms: Sequence[str]) -> list[str]:
    """The rarest terms whose rows together are few enough to be scored; at least one."""
    counts = _count_matches(connection, terms, MAX_SCORED_ROWS)
    chosen: list[str] = []
    n_rows = 0
    for term, count in counts.items():
        n_rows += count
        if chosen and n_rows > MAX_SCORED_ROWS:
            break
        chosen.append(term)
    return chosen


def _choose_terms_among(
    connection: Connection, terms: Sequence[str], wanted: Wanted
) -> tuple[list[str], np.ndarray | None]:
    """The same where only the rows that are wanted count, and those that are to be scored, sorted.

    None: so few rows have any of the terms that all can be scored before the others are left out.
    """
    counts = _count_matches(connection, terms, _MAX_HITS)
    if sum(counts.values()) <= _MAX_HITS:
        return list(counts), None
    all_wanted = wanted.list_all()
    if len(all_wanted) == 0:
        return [], None
    if len(all_wanted) <= MAX_SCORED_ROWS:
        return list(counts), all_wanted
    chosen: list[str] = []
    row_ids = np.empty(0, np.int64)
    for term in counts:
        found = np.intersect1d(_read_matches(connection, term, all_wanted), all_wanted, assume_unique=True)
        if chosen and len(row_ids) + len(found) > MAX_SCORED_ROWS:
            break
        if len(found):
            chosen.append(term)
            row_ids = np.union1d(row_ids, found)
    return chosen, row_ids[:_MAX_HITS]


def _read_matches(connection: Connection, term: str, wanted: np.ndarray) -> np.ndarray:
    """Ids of the rows with a term between the first and the last that is wanted: as one string, as in `filters.py`."""
    with _telling_damage():
        digits: str = connection.execute(_READ_MATCHES, {"query": term, **_span(wanted)}).scalar_one()
    return np.fromstring(digits, np.int64, sep=",")


def _count_matches(connection: Connection, terms: Sequence[str], limit: int) -> dict[str, int]:
    """How many rows have a term, as far as it matters, for each that any has; the rarest first."""
    counts = {term: _count(connection, _COUNT_MATCHES, {"query": term}, limit) for term in terms}
    return {term: counts[term] for term in sorted((term for term in terms if counts[term]), key=counts.__getitem__)}


def _count(
    connection: Connection, statement: TextClause, parameters: dict[str, Any], limit: int = MAX_SCORED_ROWS
) -> int:
    with _telling_damage():
        return int(connection.execute(statement, {**parameters, "limit": limit + 1}).scalar_one())
