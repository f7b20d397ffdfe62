"""Which rows a search may return: by model and recipe, collection, document and date.

Every condition is answered from an index, without reading rows, and ids leave SQLite as one string of digits: a
million in a fifth of a second, without holding up the interpreter, where fetching them row by row takes a second and a
turn of the interpreter's lock for each. Conditions are put together as sorted arrays.

Particular to SQLite in nothing but `group_concat`. Knows no index of vectors and no full text.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, exists, func, literal, not_, or_, select

from embeddings_data_models import HELD_BY_DOCUMENTS, RECIPE_RULE_SEPARATOR
from llama_embeddings.storage.engine import MAX_LIST_LENGTH, fetch_by_ids
from llama_embeddings.storage.statements import (
    HAS_HIDDEN_DOCUMENTS,
    HIDDEN_ROW_IDS,
    SHOWS_AS_TEXT,
    collections,
    document_collections,
    documents,
    embedding_collections,
    embeddings,
    has_a_version_that_is_there,
    select_sentences,
)

_NEXT_RECIPE = select(func.min(embeddings.c.recipe)).where(
    embeddings.c.model_name == bindparam("model_name"),
    embeddings.c.recipe > bindparam("after"),
    embeddings.c.recipe < bindparam("before"),
)
_COLLECTION_ID = select(collections.c.id).where(collections.c.name == bindparam("name"))
_ALL_COLLECTION_IDS = select(collections.c.id).union_all(select(literal(HELD_BY_DOCUMENTS)))


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Searchable rows of a model under families of recipes that meet every condition given.

    `filename`: standing in a document of this name, one that is in `collection` if that is given, too. `since` and
    `until`: first asked for as a text at or after, and before, this time.
    """

    model_name: str
    families: tuple[str, ...]
    collection: str | None = None
    filename: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def list_recipes(connection: Connection, model_name: str, families: tuple[str, ...]) -> list[str]:
    """The recipes that a model has rows of, of whole and of cut texts; a step in an index for each."""
    recipes: list[str] = []
    for family in families:
        # The separator's successor ends the recipes that begin with the family and a separator.
        bounds = {"model_name": model_name, "before": family + chr(ord(RECIPE_RULE_SEPARATOR) + 1)}
        found = connection.execute(_NEXT_RECIPE, bounds | {"after": family[:-1]}).scalar_one()
        while found is not None:
            if found == family or found.startswith(family + RECIPE_RULE_SEPARATOR):
                recipes.append(found)
            found = connection.execute(_NEXT_RECIPE, bounds | {"after": found}).scalar_one()
    return recipes


def find_row_ids(connection: Connection, wanted: RowFilter) -> np.ndarray:
    """Sorted unique int64 ids."""
    recipes = list_recipes(connection, wanted.model_name, wanted.families)
    if not recipes:
        return np.empty(0, np.int64)
    of_recipes = and_(embeddings.c.model_name == wanted.model_name, embeddings.c.recipe.in_(recipes))
    if wanted.filename is not None:
        found = _read_ids(connection, _select_of_documents(wanted, of_recipes))
    elif wanted.collection is not None:
        found = _find_members(connection, wanted, of_recipes)
    else:
        return _find_dated(connection, wanted, of_recipes)
    if len(found) and (wanted.since is not None or wanted.until is not None):
        found = np.intersect1d(found, _find_dated(connection, wanted, of_recipes), assume_unique=True)
    return found


def _find_members(connection: Connection, wanted: RowFilter, of_recipes: ColumnElement[bool]) -> np.ndarray:
    collection_id = connection.execute(_COLLECTION_ID, {"name": wanted.collection}).scalar_one_or_none()
    if collection_id is None:
        return np.empty(0, np.int64)
    first = select(embeddings.c.id).where(of_recipes, embeddings.c.collection_id == collection_id)
    further = (
        select(embeddings.c.id)
        .join(embedding_collections, embedding_collections.c.embedding_id == embeddings.c.id)
        .where(embedding_collections.c.collection_id == collection_id, of_recipes)
    )
    parts = [
        _read_ids(connection, first),
        _read_ids(connection, further),
        _read_ids(connection, _select_of_documents(wanted, of_recipes)),
    ]
    return _sort_unique(np.concatenate(parts))


def _select_of_documents(wanted: RowFilter, of_recipes: ColumnElement[bool]) -> Select[tuple[int]]:
    sentences = select_sentences(
        filename=wanted.filename, collection=wanted.collection, model_name=wanted.model_name
    ).subquery()
    # Other recipes of the same model may have documents, too, so the rows' own are looked at.
    return (
        select(sentences.c.embedding_id).join(embeddings, embeddings.c.id == sentences.c.embedding_id).where(of_recipes)
    )


def _find_dated(connection: Connection, wanted: RowFilter, of_recipes: ColumnElement[bool]) -> np.ndarray:
    # Naming the collections lets each be entered at the date, as the index has the date behind them.
    statement = select(embeddings.c.id).where(of_recipes, embeddings.c.collection_id.in_(_ALL_COLLECTION_IDS))
    if wanted.since is not None:
        statement = statement.where(embeddings.c.request_time >= _without_zone(wanted.since))
    if wanted.until is not None:
        statement = statement.where(embeddings.c.request_time < _without_zone(wanted.until))
    found = _read_ids(connection, statement)
    if has_hidden_documents(connection):
        found = np.setdiff1d(found, _read_ids(connection, HIDDEN_ROW_IDS), assume_unique=True)
    return found


def has_hidden_documents(connection: Connection) -> bool:
    """Whether there are documents that do not show, so that rows have to be asked about; a step in an index."""
    return bool(connection.execute(HAS_HIDDEN_DOCUMENTS).scalar_one())


def do_show(connection: Connection, row_ids: np.ndarray) -> np.ndarray:
    """Which rows show: bool (n,)."""
    found: list[int] = []
    for start in range(0, len(row_ids), MAX_LIST_LENGTH):
        part = row_ids[start : start + MAX_LIST_LENGTH].tolist()
        found.extend(row_id for (row_id,) in fetch_by_ids(connection, "id", "embeddings", part, SHOWS_AS_TEXT))
    return np.isin(row_ids, np.array(found, np.int64))


def holds_everything(connection: Connection, model_name: str, families: tuple[str, ...], collection: str) -> bool:
    """Whether all searchable rows are in the collection, so that it need not be filtered by; some steps in indexes."""
    collection_id = connection.execute(_COLLECTION_ID, {"name": collection}).scalar_one_or_none()
    recipes = list_recipes(connection, model_name, families)
    if collection_id is None or not recipes:
        return False
    of_recipes = and_(embeddings.c.model_name == model_name, embeddings.c.recipe.in_(recipes))
    first = embeddings.c.collection_id
    elsewhere = [
        exists().where(of_recipes, first > HELD_BY_DOCUMENTS, first < collection_id),
        exists().where(of_recipes, first > collection_id),
    ]
    its_documents = select(document_collections.c.document_id).where(
        document_collections.c.collection_id == collection_id
    )
    elsewhere.append(
        exists().where(
            documents.c.model_name == model_name, documents.c.id.not_in(its_documents), has_a_version_that_is_there()
        )
    )
    return bool(connection.execute(select(not_(or_(*elsewhere)))).scalar_one())


def has_other_rows(connection: Connection, model_name: str, families: tuple[str, ...]) -> bool:
    """Whether there are rows of other models or recipes; some steps in indexes."""
    recipes = list_recipes(connection, model_name, families)
    name, recipe = embeddings.c.model_name, embeddings.c.recipe
    bounds = [None, *sorted(recipes), None]
    gaps = [
        and_(*([recipe > low] if low else []), *([recipe < high] if high else [])) for low, high in pairwise(bounds)
    ]
    others = [name < model_name, name > model_name, *(and_(name == model_name, gap) for gap in gaps)]
    return bool(connection.execute(select(or_(*(exists().where(other) for other in others)))).scalar_one())


def are_of(connection: Connection, row_ids: np.ndarray, model_name: str, families: tuple[str, ...]) -> np.ndarray:
    """Which rows are of a model and recipe families: bool (n,)."""
    recipes = list_recipes(connection, model_name, families)
    statement = select(embeddings.c.id).where(
        embeddings.c.id.in_(row_ids.tolist()), embeddings.c.model_name == model_name, embeddings.c.recipe.in_(recipes)
    )
    return np.isin(row_ids, np.fromiter(connection.execute(statement).scalars(), np.int64))


def _read_ids(connection: Connection, statement: Select[tuple[int]]) -> np.ndarray:
    [column] = statement.subquery().c
    digits: str | None = connection.execute(select(func.group_concat(column))).scalar_one()
    return _sort_unique(np.fromstring(digits, np.int64, sep=",")) if digits else np.empty(0, np.int64)


def _sort_unique(row_ids: np.ndarray) -> np.ndarray:
    # Not `np.unique`, whose hash table takes ten times as long as sorting.
    row_ids.sort()
    is_first = np.ones(len(row_ids), bool)
    np.not_equal(row_ids[1:], row_ids[:-1], out=is_first[1:])
    return row_ids[is_first]


def _without_zone(moment: datetime) -> datetime:
    """As times are stored. One without a zone is taken for UTC."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo is not None else moment
