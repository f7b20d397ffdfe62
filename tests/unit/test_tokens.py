"""Tokens that open the door, and the file of them that changes under a running server."""

from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path

import pytest

from llama_embeddings.api import tokens
from llama_embeddings.api.tokens import Tokens, read_tokens_file
from llama_embeddings.errors import ConfigurationError
from llama_embeddings.settings import MIN_TOKEN_LENGTH

OWN = "the-server-s-own-token"
FIRST = "first-token-0123456789"
SECOND = "second-token-0123456789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.txt"


@pytest.fixture
def _looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SECONDS_BETWEEN_LOOKS", 0.0)


def replace(path: Path, text: str) -> None:
    """As editors do: a new file under the old name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_names_comments_and_empty_lines(path: Path) -> None:
    """A name is optional; a token without one is called by its line."""
    path.write_text(f"# who may call\n\nreporting {FIRST}  # until May\n{SECOND}\n")
    assert read_tokens_file(path) == {"reporting": FIRST.encode(), "line-4": SECOND.encode()}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("short", "line 1"),
        (f"{FIRST}\nname too-short", "line 2"),
        (f"a b {FIRST}", "line 1"),
        (f"same {FIRST}\nsame {SECOND}", "line 2"),
    ],
)
def test_line_that_is_no_token_is_named_and_not_repeated(path: Path, text: str, reason: str) -> None:
    """The message may end in a log; what stands in the file may be a secret."""
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=reason) as refusal:
        Tokens(None, path)
    assert refusal.value.field == "SECURITY_TOKENS_FILE"
    assert not [word for word in text.split() if len(word) > 6 and word in refusal.value.message]


def test_file_that_is_not_there_or_holds_nothing_stops_the_start(path: Path) -> None:
    """A door that nobody could open is a mistake."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Tokens(None, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        Tokens(None, path)
    path.write_text("# nobody yet\n")
    with pytest.raises(ConfigurationError, match="holds no token"):
        Tokens(None, path)
    assert len(Tokens(OWN, path)) == 1


def test_holders_are_found_by_their_tokens(path: Path) -> None:
    """The server's own token has no name."""
    path.write_text(f"reporting {FIRST}\n{SECOND}\n")
    known = Tokens(OWN, path)
    assert [known.find_holder(token) for token in (OWN, FIRST, SECOND)] == ["", "reporting", "line-2"]
    for wrong in ("", "reporting", FIRST[:-1], FIRST + "x", FIRST.upper(), "\ud800", "é" * 20):
        assert known.find_holder(wrong) is None


def test_every_token_is_compared_in_constant_time_whichever_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding the first does not spare the others, and nothing but `compare_digest` looks at them."""
    path.write_text(f"{FIRST}\n{SECOND}\n")
    known = Tokens(OWN, path)
    compared: list[bytes] = []

    def compare(sent: bytes, token: bytes) -> bool:
        compared.append(token)
        return hmac.compare_digest(sent, token)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(tokens, "hmac", Watched)
    for sent in (OWN, SECOND, "wrong"):
        compared.clear()
        known.find_holder(sent)
        assert compared == [OWN.encode(), FIRST.encode(), SECOND.encode()]


@pytest.mark.usefixtures("_looked_at_each_time")
def test_changed_file_counts_at_once(path: Path) -> None:
    """Added tokens open, removed ones do not; an emptied file revokes all of its own."""
    path.write_text(f"{FIRST}\n")
    known = Tokens(OWN, path)
    replace(path, f"{SECOND}\n")
    assert known.find_holder(FIRST) is None
    assert known.find_holder(SECOND) == "line-1"
    replace(path, "")
    assert known.find_holder(SECOND) is None
    assert known.find_holder(OWN) == ""


@pytest.mark.usefixtures("_looked_at_each_time")
def test_broken_or_missing_file_changes_nothing_and_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is locked out or let in by a slip; when the file is right again, it counts."""
    path.write_text(f"{FIRST}\n")
    known = Tokens(None, path)
    for spoil in (lambda: replace(path, "oops\n"), path.unlink):
        caplog.clear()
        spoil()
        assert [known.find_holder(FIRST) for _ in range(3)] == ["line-1"] * 3
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    path.write_text(f"{SECOND}\n")
    assert known.find_holder(FIRST) is None


def test_file_is_looked_at_once_a_second_at_most(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in between pay nothing for it."""
    path.write_text(f"{FIRST}\n")
    known = Tokens(None, path)
    looks = []
    monkeypatch.setattr(tokens, "_look_at", lambda path: looks.append(path))
    for _ in range(1000):
        known.find_holder(FIRST)
    assert len(looks) <= 1


def test_tokens_of_the_file_are_as_long_as_the_setting_s_must_be() -> None:
    """One rule, in the two places that read tokens."""
    assert tokens.MIN_TOKEN_LENGTH == MIN_TOKEN_LENGTH
