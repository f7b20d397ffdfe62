"""A server whose models lie on a RAM disk: mounted at the start, cleared on request, answering all the while.

Where this user may not mount, the same server must go on without one and say so: the other half of the promise.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ramdisk_functions
from tests.serving import get_models_directory, start_server

EMBED = "/get_embedding_vector_for_string/"


@pytest.fixture
def ramdisk_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "ramdisk"
    yield path
    if path.is_dir():
        # It is cleared already, or never was one.
        with contextlib.suppress(ramdisk_functions.RamdiskError):
            ramdisk_functions.clear_ramdisk(path)


def test_models_are_loaded_from_the_ramdisk_and_survive_its_clearing(tmp_path: Path, ramdisk_path: Path) -> None:
    """New texts are computed before and after, and the message says what was done."""
    may_mount = ramdisk_functions.check_that_user_has_required_permissions_to_manage_ramdisks()
    settings = {"USE_RAMDISK": "True", "RAMDISK_PATH": str(ramdisk_path), "RAMDISK_SIZE_IN_GB": "0.2"}
    with start_server(tmp_path, settings) as server, server.client() as client:
        assert client.post(EMBED, json={"text": "before"}).status_code == 200
        is_mounted = "models lie on the RAM disk" in server.log
        assert is_mounted or "Going on without a RAM disk" in server.log
        assert is_mounted <= may_mount
        message = client.post("/clear_ramdisk/").json()["message"]
        assert ("is cleared" if is_mounted else "not in use") in message
        assert client.post(EMBED, json={"text": "after"}).status_code == 200
        assert "not in use" in client.post("/clear_ramdisk/").json()["message"]


def test_file_replaced_on_disk_is_not_loaded_from_its_old_copy(tmp_path: Path, ramdisk_path: Path) -> None:
    """As large as before, but of another digest: the recipe is the new file's, so the weights must be, too."""
    models = tmp_path / "models"
    models.mkdir()
    model = Path(shutil.copy(get_models_directory() / "all-MiniLM-L6-v2.gguf", models / "mine.gguf"))
    settings = {
        "USE_RAMDISK": "True",
        "RAMDISK_PATH": str(ramdisk_path),
        "RAMDISK_SIZE_IN_GB": "0.2",
        "MODELS_DIRECTORY": str(models),
        "DEFAULT_MODEL_NAME": "mine",
    }
    with start_server(tmp_path, settings) as server, server.client() as client:
        before = client.post(EMBED, json={"text": "a text"}).json()["embedding"]
        content = bytearray(model.read_bytes())
        content[-20_000:] = bytes(byte ^ 1 for byte in content[-20_000:])
        model.write_bytes(content)
        client.post("/unload_model/", json={"model_name": "mine"}).raise_for_status()
        deadline = time.monotonic() + 15
        while (reply := client.post(EMBED, json={"text": "a text"})).status_code == 503 or (
            reply.json()["embedding"] == before
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.post("/clear_ramdisk/").raise_for_status()
