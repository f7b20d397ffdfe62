"""What every client library has to get from the server; knows the libraries only as functions from texts to vectors.

Imports nothing of the project: the heavy libraries are run in an environment of their own, where it is not installed.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

MODEL = "all-MiniLM-L6-v2"
ALIAS = "text-embedding-3-small"
UNKNOWN_MODEL = "no-such-model"
TOKEN = "a-token-for-client-tests-1234"
WRONG_TOKEN = "another-token-than-the-right-one"
TEXTS = ("I feel extremely chilly", "雪が降っている 🌨️ — naïve café, Žluťoučký kůň", "Снег идёт", "a")
OVER_LONG = "snow " * 600
# What clients hand on of a float32: some round to as many digits as JSON has, none loses more.
TOLERANCE = 1e-6

Embed = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Library:
    """A client library. `connect(url, token, model)` gives functions for one text and for several.

    `cuts` tells that texts longer than the window are cut at the right, as the library asks, not refused. `model` is
    None for a dialect in which requests name none.
    """

    name: str
    connect: Callable[[str, str, str], tuple[Callable[[str], Any], Embed]]
    cuts: bool = False
    model: str | None = MODEL


def get_native_vector(url: str, text: str, **fields: Any) -> np.ndarray:
    """The native endpoint's answer, asked for without any client library."""
    request = urllib.request.Request(
        f"{url}/get_embedding_vector_for_string/",
        json.dumps({"text": text, **fields}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return np.array(json.load(response)["embedding"], dtype=np.float32)


def check_same(found: Any, expected: np.ndarray) -> None:
    vector = np.array(found, dtype=np.float32)
    assert vector.shape == expected.shape
    np.testing.assert_allclose(vector, expected, atol=TOLERANCE)


def check_vectors(library: Library, url: str) -> None:
    """One text, several, in any script, are the native endpoint's vectors, in order."""
    one, many = library.connect(url, TOKEN, library.model or MODEL)
    expected = [get_native_vector(url, text) for text in TEXTS]
    for text, vector in zip(TEXTS, expected, strict=True):
        check_same(one(text), vector)
    found = many(list(TEXTS))
    assert len(found) == len(TEXTS)
    for got, vector in zip(found, expected, strict=True):
        check_same(got, vector)


def check_over_long(library: Library, url: str) -> None:
    """Cut where the library asks for it, else refused with the number of tokens; never cut silently."""
    one, _ = library.connect(url, TOKEN, library.model or MODEL)
    if library.cuts:
        check_same(one(OVER_LONG), get_native_vector(url, OVER_LONG, truncation="right"))
        return
    with pytest.raises(Exception, match="602 tokens"):
        one(OVER_LONG)


def check_wrong_model(library: Library, url: str) -> None:
    """The library raises; its message names the model."""
    if library.model is None:
        return
    one, _ = library.connect(url, TOKEN, UNKNOWN_MODEL)
    with pytest.raises(Exception, match=UNKNOWN_MODEL):
        one(TEXTS[0])


def check_wrong_token(library: Library, url: str) -> None:
    """The library raises; the right token is not known from it."""

    def ask() -> None:
        one, _ = library.connect(url, WRONG_TOKEN, library.model or MODEL)
        one(TEXTS[0])

    with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own class
        ask()
    assert TOKEN not in str(caught.value)


CHECKS = (check_vectors, check_over_long, check_wrong_model, check_wrong_token)
