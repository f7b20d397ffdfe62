"""Which files a list of paths means, and why others are passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_embeddings.commands.found_files import find_files

MAX_BYTES = 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("b/one.txt", "b/c/one.txt", "a.txt", ".git/config", ".profile"):
        (tmp_path / name).write_text("text")
    return tmp_path


def find(*paths: Path) -> dict[str, str | None]:
    return {found.name: found.reason for found in find_files(paths, max_bytes=MAX_BYTES)}


def test_directory_is_walked_in_the_order_of_names(folder: Path) -> None:
    """Names tell files of several directories apart; hidden directories are not entered."""
    assert list(find(folder).items()) == [
        (".profile", "hidden"),
        ("a.txt", None),
        ("b/one.txt", None),
        ("b/c/one.txt", None),
    ]


def test_what_is_named_itself_is_taken(folder: Path) -> None:
    """Hidden or a link: whoever names it means it."""
    (folder / "link").symlink_to(folder / "a.txt")
    assert find(folder / ".profile", folder / "link") == {".profile": None, "link": None}
    assert find(folder / ".git") == {"config": None}


def test_file_is_taken_once_however_often_it_is_named(folder: Path) -> None:
    """Also under a hard link; a soft link does not stand in for its target."""
    os.link(folder / "a.txt", folder / "another name.txt")
    (folder / "Link.txt").symlink_to(folder / "a.txt")
    found = find(folder, folder, folder / "a.txt")
    assert found["Link.txt"] == "a link"
    assert [name for name, reason in found.items() if reason is None] == ["a.txt", "b/one.txt", "b/c/one.txt"]


def test_reasons_say_what_is_wrong(folder: Path) -> None:
    """Absent, empty, too large, no file."""
    (folder / "large").write_bytes(bytes(MAX_BYTES + 1))
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    names = ("large", "empty", "pipe", "absent")
    reasons = find(*(folder / name for name in names))
    assert "MAX_REQUEST_SIZE_IN_MB" in str(reasons["large"])
    assert (reasons["empty"], reasons["pipe"]) == ("empty", "not a regular file")
    assert reasons["absent"] == "no such file or directory"


def test_links_in_a_circle_come_to_an_end(folder: Path) -> None:
    """Links to directories are not followed."""
    (folder / "b" / "up").symlink_to(folder)
    assert len(find(folder)) == 4
