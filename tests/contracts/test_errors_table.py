"""Every failure has a status and a place in the tree, and a caller's mistake is never the server's."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence

import pytest

from llama_embeddings import errors
from llama_embeddings.api import dialects
from llama_embeddings.api.dialects import Dialect
from llama_embeddings.api.error_responses import DESCRIPTIONS, STATUS_OF_ERROR, status_of
from llama_embeddings.errors import ServiceError

DEFINED = [found for found in vars(errors).values() if inspect.isclass(found) and found.__module__ == errors.__name__]
CLASSES = [found for found in DEFINED if issubclass(found, ServiceError)]
DIALECTS = [found for found in vars(dialects).values() if isinstance(found, Dialect)]
MISTAKES_OF_CALLERS = (errors.InvalidInput, errors.NotFound, errors.InvalidToken)


def make(error: type[ServiceError]) -> ServiceError:
    """One of each, with the arguments that its class asks for."""
    arguments = {
        errors.ContextLengthExceeded: lambda: errors.ContextLengthExceeded(n_tokens=9, limit=8),
        errors.UnsupportedMeasure: lambda: errors.UnsupportedMeasure("cosin", ["cosine_similarity"]),
        errors.ModelNotFound: lambda: errors.ModelNotFound("absent", ["present"]),
    }
    return arguments.get(error, lambda: error("something was wrong; do this"))()


def read_tree() -> dict[str, list[str]]:
    """The tree of the module docstring: each class with its ancestors in it, nearest first."""
    ancestors: list[str] = []
    tree: dict[str, list[str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r" {4}([ │├└─]*)(\w+)", line)
        if drawn is not None:
            depth = len(drawn[1]) // 4
            ancestors = [drawn[2], *ancestors[len(ancestors) - depth :]]
            tree[drawn[2]] = ancestors[1:]
    return tree


def name_ancestors(error: type[ServiceError]) -> Sequence[str]:
    return [found.__name__ for found in error.__mro__[1:] if issubclass(found, ServiceError)]


def test_tree_of_the_docstring_is_the_tree_of_the_classes() -> None:
    """Every class where it belongs, and none that is gone."""
    assert read_tree() == {found.__name__: list(name_ancestors(found)) for found in CLASSES}


def test_all_classes_have_one_root() -> None:
    """A handler for ServiceError sees them all."""
    assert CLASSES == DEFINED


@pytest.mark.parametrize("error", CLASSES)
def test_every_class_has_a_status_that_is_described(error: type[ServiceError]) -> None:
    """Swagger says what it means."""
    assert status_of(make(error)) in DESCRIPTIONS


@pytest.mark.parametrize("error", CLASSES)
def test_callers_mistakes_are_4xx_and_no_others_but_overload(error: type[ServiceError]) -> None:
    """Clients retry a 5xx; what only the caller can put right is never one."""
    status = status_of(make(error))
    is_told_apart = issubclass(error, MISTAKES_OF_CALLERS) or error is errors.Overloaded
    assert (400 <= status < 500) is is_told_apart


@pytest.mark.parametrize("error", [found for found in CLASSES if issubclass(found, errors.Unavailable)])
def test_what_may_succeed_later_says_when(error: type[errors.Unavailable]) -> None:
    """429 or 503, with a time that is positive."""
    made = error("later", retry_after_seconds=2.5)
    assert status_of(made) in (429, 503)
    assert made.retry_after_seconds == 2.5
    assert error("later").retry_after_seconds > 0


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("error", CLASSES)
def test_every_class_has_a_body_in_every_dialect(error: type[ServiceError], dialect: Dialect) -> None:
    """Of the shape that the OpenAPI document shows, and with the message."""
    made = make(error).located(field="text", index=2)
    body = dialect.body(status_of(made), made, made.code)
    dialect.model.model_validate(body)
    assert set(body) == set(dialect.model.model_fields)
    assert made.message.split(".")[0] in json.dumps(body) or isinstance(made, errors.ModelNotFound)


def test_status_is_that_of_the_nearest_class_in_the_table() -> None:
    """A class without a row takes its parent's, not the root's."""
    assert errors.ContextLengthExceeded not in STATUS_OF_ERROR
    assert status_of(make(errors.ContextLengthExceeded)) == STATUS_OF_ERROR[errors.InvalidInput]
    assert status_of(make(errors.UnreadableDocument)) == 422
    assert status_of(make(errors.StoreFull)) == STATUS_OF_ERROR[errors.Unavailable]


@pytest.mark.parametrize("error", CLASSES)
def test_every_class_has_a_code_for_programs_and_a_message_for_people(error: type[ServiceError]) -> None:
    """Codes are words of small letters; the message is one line."""
    made = make(error)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", made.code)
    assert made.message
    assert "\n" not in made.message
    assert str(made) == made.message


@pytest.mark.parametrize("error", CLASSES)
def test_error_placed_in_a_request_is_the_same_failure(error: type[ServiceError]) -> None:
    """Class, code, message and what it carries stay; the original is not touched, as others share it."""
    made = make(error)
    before = dict(vars(made))
    placed = made.located(field="input", index=3)
    assert (type(placed), placed.code, placed.message) == (type(made), made.code, made.message)
    assert vars(placed) == before | {"field": "input", "index": 3}
    assert vars(made) == before
