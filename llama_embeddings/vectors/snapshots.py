"""Snapshots of indexes as files: whole and of the right index, or not there.

A file is: eight bytes that name the format, the length of the header (uint32), the header (JSON), the sorted row ids
(int64), the codes, and a BLAKE2b digest of all that. It appears under its name only once it is complete on the disk.

Each has a random number, which its caller commits to the database at the moment at which the file is complete: only a
database with that number has the history that the snapshot is of. Reads no database itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_embeddings.vectors.index import FrozenIndex, Key
from llama_embeddings.vectors.searching import Tuning

FORMAT = b"LLEMIX02"
DIGEST_BYTES = 32
SUFFIX = ".index"
PARTIAL_SUFFIX = ".partial"


class UnusableSnapshot(Exception):
    """A file that is damaged, of another format or of another index; its message says which."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen index and its key. `witnesses`: row ids and digests of their vectors. `number`: see `draw_number`."""

    key: Key
    frozen: FrozenIndex
    witnesses: dict[int, str]
    number: str = ""


def draw_number() -> str:
    """A number that no other snapshot has, of this database or of any copy of it."""
    return secrets.token_hex(16)


def compute_digests(vectors: np.ndarray) -> list[str]:
    """A short digest of each row of float32 (n, n_dims)."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in np.ascontiguousarray(vectors, "<f4")]


def find_path(directory: Path, key: Key) -> Path:
    """Where the snapshot of a key lies; names of models may hold what file names must not."""
    return directory / f"{hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()}{SUFFIX}"


def _commit_nothing() -> None:
    """For snapshots that no database has to know of."""


def write_snapshot(directory: Path, snapshot: Snapshot, commit: Callable[[], None] = _commit_nothing) -> Path:
    """Write it beside the others, replacing an older one of its key at the very end. Raises OSError.

    `commit` is called when the file is complete and on the disk, just before it gets its name, to write the snapshot's
    number into the database. Where that fails, the older snapshot stays, whose number the database still has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = find_path(directory, snapshot.key)
    partial = path.with_suffix(PARTIAL_SUFFIX)
    header = json.dumps(_describe(snapshot)).encode()
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with partial.open("wb") as file:
            row_ids = snapshot.frozen.row_ids.astype("<i8", copy=False)
            for part in (FORMAT, np.uint32(len(header)).tobytes(), header, row_ids.data, snapshot.frozen.codes.data):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        commit()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _synchronise(directory)
    return path


def read_snapshot(directory: Path, key: Key) -> Snapshot | None:
    """The snapshot of a key; None if there is none. Raises UnusableSnapshot, and OSError."""
    path = find_path(directory, key)
    if not path.exists():
        return None
    content = np.fromfile(path, np.uint8)
    if len(content) < len(FORMAT) + 4 + DIGEST_BYTES:
        raise UnusableSnapshot("it is cut short")
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    # First of all: FAISS trusts what it is given.
    if hashlib.blake2b(body.data, digest_size=DIGEST_BYTES).digest() != digest.tobytes():
        raise UnusableSnapshot("it is damaged or cut short")
    if body[: len(FORMAT)].tobytes() != FORMAT:
        raise UnusableSnapshot("it has another format")
    return _parse(body[len(FORMAT) :], key)


def delete_leftovers(directory: Path, keys: set[Key]) -> None:
    """Delete snapshots of no such key and what an interrupted writing has left. Raises OSError."""
    wanted = {find_path(directory, key) for key in keys}
    for path in [*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*{PARTIAL_SUFFIX}")]:
        if path not in wanted:
            path.unlink(missing_ok=True)


def _describe(snapshot: Snapshot) -> dict[str, object]:
    frozen = snapshot.frozen
    return {
        "model_name": snapshot.key[0],
        "family": snapshot.key[1],
        "number": snapshot.number,
        "n_rows": len(frozen.row_ids),
        "last_row_id": int(frozen.row_ids[-1]) if len(frozen.row_ids) else 0,
        "n_trained": frozen.n_trained,
        "tuning": asdict(frozen.tuning),
        "witnesses": [[row_id, digest] for row_id, digest in snapshot.witnesses.items()],
    }


def _parse(body: np.ndarray, key: Key) -> Snapshot:
    length = int(body[:4].view(np.uint32)[0])
    header = json.loads(body[4 : 4 + length].tobytes())
    if (header["model_name"], header["family"]) != key:
        raise UnusableSnapshot("it is of another index")
    end = 4 + length + 8 * header["n_rows"]
    # Copies: the content as a whole is let go of.
    row_ids = np.frombuffer(body[4 + length : end].tobytes(), "<i8")
    frozen = FrozenIndex(body[end:], row_ids, Tuning(**header["tuning"]), header["n_trained"])
    # Earlier versions wrote no number, so that no database has theirs.
    return Snapshot(key, frozen, dict(header["witnesses"]), header.get("number", ""))


def _synchronise(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
