"""The catalogue: which files are models, what is known of them, and where they lie."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

import llama_embeddings.catalogue.models as catalogue_models
from llama_embeddings.catalogue.default_model import MODEL_NAME
from llama_embeddings.catalogue.downloads import Downloads
from llama_embeddings.catalogue.models import Catalogue, RamdiskOptions
from llama_embeddings.errors import ModelNotFound, ModelUnusable, RamdiskFailed
from tests.tiny_models import write_tiny_model


def no_downloads(directory: Path) -> Downloads:
    """Downloads that may not come from anywhere."""
    return Downloads(directory, allowed_hosts=frozenset(), max_bytes=1)


@pytest.fixture(autouse=True)
def _looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of files are noticed at once; the server looks once a second."""
    monkeypatch.setattr(catalogue_models, "SECONDS_BETWEEN_LOOKS", 0.0)


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path, no_downloads(tmp_path))


def compute_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_gguf_is_a_model_by_its_stem(catalogue: Catalogue, tmp_path: Path) -> None:
    """Sorted, dots and all; other files and directories are none."""
    for name in ("b.gguf", "a.v1.5.gguf", "notes.txt", "a.gguf.part", "a.gguf.sha256.json"):
        (tmp_path / name).touch()
    (tmp_path / "directory.gguf").mkdir()
    assert catalogue.names() == ["a.v1.5", "b"]


def test_directory_that_does_not_exist_holds_no_models(tmp_path: Path) -> None:
    """It is made when a default model is asked for, which is fetched only under its own name."""
    catalogue = Catalogue(tmp_path / "models", no_downloads(tmp_path))
    assert catalogue.names() == []
    catalogue.get_missing_default_model("another-model")
    assert (tmp_path / "models").is_dir()
    assert catalogue.names() == []


def test_default_model_that_is_there_is_left_alone(catalogue: Catalogue, tmp_path: Path) -> None:
    """Whatever the file holds: nothing is fetched over it."""
    (tmp_path / f"{MODEL_NAME}.gguf").write_bytes(b"mine")
    catalogue.get_missing_default_model(MODEL_NAME)
    assert (tmp_path / f"{MODEL_NAME}.gguf").read_bytes() == b"mine"


async def test_found_model_has_its_digest_size_and_sidecar(catalogue: Catalogue, tmp_path: Path) -> None:
    """The digest is that of the bytes."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    file = await catalogue.find("tiny")
    assert (file.name, file.path, file.size_in_bytes) == ("tiny", path, path.stat().st_size)
    assert file.digest == compute_sha256(path)
    assert file.sidecar.parent == tmp_path
    assert catalogue.created("tiny") == int(path.stat().st_mtime)


@pytest.mark.parametrize("name", ["absent", "TINY", "tiny.gguf", "", ".", "../tiny", "/etc/passwd", "tiny\0", "*"])
async def test_unknown_name_is_refused_with_the_known_ones(catalogue: Catalogue, tmp_path: Path, name: str) -> None:
    """Names match exactly and never lead out of the directory."""
    write_tiny_model(tmp_path / "tiny.gguf")
    with pytest.raises(ModelNotFound, match="tiny") as refusal:
        await catalogue.find(name)
    assert refusal.value.known == ("tiny",)


async def test_damaged_file_is_refused_and_found_again_once_it_is_whole(catalogue: Catalogue, tmp_path: Path) -> None:
    """It is checked before its digest is taken, and a refusal is not remembered."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelUnusable):
        await catalogue.find("tiny")
    assert not path.with_name("tiny.gguf.sha256.json").exists()
    write_tiny_model(path)
    assert (await catalogue.find("tiny")).digest == compute_sha256(path)


async def test_replaced_file_is_noticed(catalogue: Catalogue, tmp_path: Path) -> None:
    """The next lookup has the new digest, without a restart."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    old = await catalogue.find("tiny")
    write_tiny_model(path, seed=1)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    new = await catalogue.find("tiny")
    assert new.digest == compute_sha256(path) != old.digest


async def test_model_is_examined_once(catalogue: Catalogue, tmp_path: Path) -> None:
    """The second lookup gives the same record."""
    write_tiny_model(tmp_path / "tiny.gguf")
    assert await catalogue.find("tiny") is await catalogue.find("tiny")


async def test_removed_file_is_no_model_any_more(catalogue: Catalogue, tmp_path: Path) -> None:
    """Also if it was known before."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    await catalogue.find("tiny")
    path.unlink()
    with pytest.raises(ModelNotFound):
        await catalogue.find("tiny")


def test_age_of_a_file_that_is_gone_is_that_of_an_unknown_model(catalogue: Catalogue) -> None:
    """Not an OSError."""
    with pytest.raises(ModelNotFound, match="absent"):
        catalogue.created("absent")


# The digest beside the model


def replace_unnoticeably(path: Path, how: str) -> None:
    """Another model under the same name, of the same size and time of modification."""
    before = path.stat()
    target = path if how == "in place" else path.with_suffix(".new")
    write_tiny_model(target, seed=1)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("how", ["in place", "by renaming"])
@pytest.mark.parametrize("is_running", [True, False])
async def test_file_replaced_by_one_of_the_same_size_and_time_is_another_model(
    tmp_path: Path, how: str, is_running: bool
) -> None:
    """While the server runs, and while it does not: neither the digest in memory nor the one beside it is believed."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    catalogue = Catalogue(tmp_path, no_downloads(tmp_path))
    old = await catalogue.find("tiny")
    replace_unnoticeably(path, how)
    new = await (catalogue if is_running else Catalogue(tmp_path, no_downloads(tmp_path))).find("tiny")
    assert new.digest == compute_sha256(path) != old.digest
    assert new.stamp != old.stamp


async def test_files_kept_beside_another_model_are_not_believed(tmp_path: Path) -> None:
    """Copied with it, or from it, times and all."""
    write_tiny_model(tmp_path / "tiny.gguf")
    await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")
    other = tmp_path / "other"
    other.mkdir()
    path = write_tiny_model(other / "tiny.gguf", seed=1)
    os.utime(path, ns=(0, (tmp_path / "tiny.gguf").stat().st_mtime_ns))
    shutil.copy2(tmp_path / "tiny.gguf.sha256.json", other)
    assert (await Catalogue(other, no_downloads(other)).find("tiny")).digest == compute_sha256(path)


async def test_digest_kept_within_the_tick_of_the_last_change_is_made_anew(tmp_path: Path) -> None:
    """What was written after it, in that tick, has the same stamp."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    digest = (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest
    kept_at = tmp_path / "tiny.gguf.sha256.json"
    kept_at.write_text(json.dumps(json.loads(kept_at.read_text()) | {"sha256": "f" * 64}))
    os.utime(kept_at, ns=(0, path.stat().st_ctime_ns))
    assert (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest == digest


async def test_digest_kept_beside_the_file_is_believed_while_its_stamp_fits(tmp_path: Path) -> None:
    """A large model is read once, not at every start."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    digest = (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest
    kept_at = tmp_path / "tiny.gguf.sha256.json"
    kept = json.loads(kept_at.read_text())
    assert kept["sha256"] == digest
    kept_at.write_text(json.dumps(kept | {"sha256": "f" * 64}))
    assert (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest == "f" * 64
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest == digest


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[]", b"null", b"{}", b'{"sha256": "0"}', b"\xff\xfe"])
async def test_damaged_digest_file_is_made_again(tmp_path: Path, content: bytes) -> None:
    """Whatever it holds, the digest is that of the bytes."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    kept_at = tmp_path / "tiny.gguf.sha256.json"
    kept_at.write_bytes(content)
    assert (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest == compute_sha256(path)
    assert json.loads(kept_at.read_text())["sha256"] == compute_sha256(path)


async def test_digest_that_cannot_be_kept_is_no_obstacle(tmp_path: Path) -> None:
    """The model is found all the same, and no partial file is left; a directory stands in the way here."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf.sha256.json").mkdir()
    assert (await Catalogue(tmp_path, no_downloads(tmp_path)).find("tiny")).digest == compute_sha256(path)


# The RAM disk


async def test_without_a_ramdisk_there_is_nothing_to_set_up_or_clear(catalogue: Catalogue, tmp_path: Path) -> None:
    """And models come from the disk."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    catalogue.set_up_ramdisk()
    assert (await catalogue.find("tiny")).path == path
    assert "not in use" in catalogue.clear_ramdisk()


async def test_ramdisk_that_cannot_be_set_up_is_a_warning_and_models_come_from_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory with somebody's files in it is never mounted over, with permission or without."""
    models, occupied = tmp_path / "models", tmp_path / "occupied"
    models.mkdir()
    occupied.mkdir()
    (occupied / "letters.txt").write_text("mine")
    path = write_tiny_model(models / "tiny.gguf")
    catalogue = Catalogue(models, no_downloads(models), ramdisk=RamdiskOptions(occupied, 0.01))
    with caplog.at_level(logging.WARNING):
        catalogue.set_up_ramdisk()
    assert "without a RAM disk" in caplog.text
    assert (await catalogue.find("tiny")).path == path
    assert (occupied / "letters.txt").read_text() == "mine"
    assert "not in use" in catalogue.clear_ramdisk()


async def test_directory_that_is_no_ramdisk_of_ours_is_not_read_from(tmp_path: Path) -> None:
    """A file of the same name and size elsewhere is not the model."""
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    models.mkdir()
    elsewhere.mkdir()
    path = write_tiny_model(models / "tiny.gguf")
    (elsewhere / "tiny.gguf").write_bytes(path.read_bytes())
    catalogue = Catalogue(models, no_downloads(models), ramdisk=RamdiskOptions(elsewhere, 0.01))
    assert (await catalogue.find("tiny")).path == path


def test_clearing_what_is_no_ramdisk_of_ours_is_refused(tmp_path: Path) -> None:
    """Nothing is deleted in a directory that only has the name."""
    (tmp_path / "tiny.gguf").write_bytes(b"mine")
    with pytest.raises(RamdiskFailed, match="could not be cleared"):
        Catalogue(tmp_path, no_downloads(tmp_path), ramdisk=RamdiskOptions(tmp_path, 0.01)).clear_ramdisk()
    assert (tmp_path / "tiny.gguf").read_bytes() == b"mine"


# Known answers


def test_default_model_has_a_known_answer_and_others_have_none(catalogue: Catalogue) -> None:
    """What the self-test holds a loaded model against."""
    assert catalogue.known_similarity("another-model") is None
    known = catalogue.known_similarity(MODEL_NAME)
    assert known == catalogue_models.KNOWN_SIMILARITIES[MODEL_NAME]
