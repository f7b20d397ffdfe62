"""Document files: the same bytes from memory, a path or somebody else's open file, as often as they are asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha3_256
from pathlib import Path

import pytest

from llama_embeddings.services.document_files import BYTES_PER_READ, DocumentFile

DATA = bytes(range(256)) * (BYTES_PER_READ // 100)


def make_from_path(directory: Path) -> DocumentFile:
    (directory / "file").write_bytes(DATA)
    return DocumentFile.from_path(directory / "file")


def make_from_upload(directory: Path) -> DocumentFile:
    with tempfile.SpooledTemporaryFile(max_size=100) as upload:
        upload.write(DATA)
        return DocumentFile.from_open_file(upload)  # type: ignore[arg-type]


MAKERS: dict[str, Callable[[Path], DocumentFile]] = {
    "bytes": lambda directory: DocumentFile.from_bytes(DATA),
    "path": make_from_path,
    "upload": make_from_upload,
}


@pytest.fixture(params=MAKERS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DocumentFile]:
    with MAKERS[request.param](tmp_path) as made:
        yield made


def test_all_ways_give_the_same_bytes_again_and_again(file: DocumentFile, tmp_path: Path) -> None:
    """Read, in pieces, hashed and copied; also after the one who brought the file has closed it."""
    assert file.size_in_bytes == len(DATA)
    for _ in range(2):
        assert file.read() == DATA
        assert b"".join(file.iterate()) == DATA
    assert file.compute_hash() == sha3_256(DATA).hexdigest()
    file.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert not (tmp_path / "copy.partial").exists()


def test_duplicate_outlives_its_original(file: DocumentFile) -> None:
    """Whoever began the work may leave."""
    with file.duplicate() as duplicate:
        file.close()
        assert duplicate.read() == DATA


def test_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """No file of that name, and no half one."""
    with DocumentFile.from_bytes(DATA) as file, pytest.raises(OSError, match="directory"):
        file.copy_to(tmp_path / "absent" / "copy")
    assert list(tmp_path.iterdir()) == []


def test_absent_path_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The caller says what it means."""
    with pytest.raises(FileNotFoundError):
        DocumentFile.from_path(tmp_path / "absent")
