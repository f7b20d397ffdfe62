"""Snapshots of indexes: read as they were written, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_embeddings.vectors.index import VectorIndex
from llama_embeddings.vectors.snapshots import (
    Snapshot,
    UnusableSnapshot,
    compute_digests,
    delete_leftovers,
    find_path,
    read_snapshot,
    write_snapshot,
)

KEY = ("a model/with: signs", "0123456789abcdef")
N_ROWS, N_DIMS = 300, 16


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    """Of 300 random rows with every third id."""
    vectors = np.random.default_rng(0).standard_normal((N_ROWS, N_DIMS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row_ids = np.arange(N_ROWS) * 3 + 1
    index = VectorIndex(N_DIMS)
    index.add(row_ids, vectors)
    rebuild = index.begin_rebuild()
    rebuild.train(row_ids, vectors)
    rebuild.add(row_ids, vectors)
    rebuild.calibrate()
    assert len(index.adopt(rebuild)) == 0
    frozen = index.freeze()
    assert frozen is not None
    return Snapshot(KEY, frozen, dict(zip([1, 4], compute_digests(vectors[:2]), strict=True)))


def test_snapshot_is_read_as_it_was_written(tmp_path: Path, snapshot: Snapshot) -> None:
    """With its ids, its parameters and codes that find the same."""
    directory = tmp_path / "indexes"
    write_snapshot(directory, snapshot)
    found = read_snapshot(directory, KEY)
    assert found is not None
    assert (found.key, found.witnesses, found.frozen.tuning) == (KEY, snapshot.witnesses, snapshot.frozen.tuning)
    np.testing.assert_array_equal(found.frozen.row_ids, snapshot.frozen.row_ids)
    query = np.ones(N_DIMS, np.float32) / 4
    [before], [after] = (VectorIndex.thaw(one.frozen).estimate(query[None], 5) for one in (snapshot, found))
    np.testing.assert_array_equal(before[0], after[0])
    assert len(before[0]) == 5
    assert [path.name for path in directory.iterdir()] == [find_path(directory, KEY).name], "nothing else is left"


def test_missing_snapshot_is_none(tmp_path: Path) -> None:
    """Also where the directory is missing."""
    assert read_snapshot(tmp_path / "none", KEY) is None


def test_snapshot_cut_at_any_length_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    """As a full disk or a power failure may leave it: never read, never a crash."""
    path = write_snapshot(tmp_path, snapshot)
    content = path.read_bytes()
    lengths = {*range(0, 600, 7), *range(0, len(content), len(content) // 150), len(content) - 1}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(UnusableSnapshot):
            read_snapshot(tmp_path, KEY)


def test_snapshot_with_a_changed_byte_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    """Wherever it is: in the format's name, the header, the ids, the codes or the digest."""
    path = write_snapshot(tmp_path, snapshot)
    content = path.read_bytes()
    for place in [*range(0, len(content), len(content) // 100), len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 16
        path.write_bytes(changed)
        with pytest.raises(UnusableSnapshot):
            read_snapshot(tmp_path, KEY)


def test_snapshot_of_another_index_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    """A file that was copied to another's name."""
    path = write_snapshot(tmp_path, snapshot)
    other = (KEY[0], "another recipe")
    path.rename(find_path(tmp_path, other))
    with pytest.raises(UnusableSnapshot, match="another index"):
        read_snapshot(tmp_path, other)


def test_failed_writing_keeps_the_older_snapshot(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one takes its place at the very end; nothing half-written stays."""
    path = write_snapshot(tmp_path, snapshot)
    content = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_snapshot(tmp_path, snapshot)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path, snapshot: Snapshot) -> None:
    """Snapshots of indexes that are gone and interrupted writings go; strange files stay."""
    kept = write_snapshot(tmp_path, snapshot)
    gone = write_snapshot(tmp_path, Snapshot(("gone", "gone"), snapshot.frozen, {}))
    partial = tmp_path / "0123.partial"
    partial.touch()
    strange = tmp_path / "notes.txt"
    strange.touch()
    delete_leftovers(tmp_path, {KEY})
    assert (kept.exists(), strange.exists(), gone.exists(), partial.exists()) == (True, True, False, False)
