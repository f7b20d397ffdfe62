"""Which model files exist and where they lie, on disk or on the RAM disk.

Any GGUF in the models directory is a model by its file's stem. Names match exactly. A file is checked and its digest
taken before it is handed out for loading. Loads nothing itself and knows no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ramdisk_functions
from embeddings_data_models import FileStamp, InputType, ModelFile
from llama_embeddings.catalogue.default_model import MODEL_NAME as DEFAULT_MODEL_NAME
from llama_embeddings.catalogue.default_model import get_default_model
from llama_embeddings.catalogue.downloads import Downloads, DownloadStage, DownloadState
from llama_embeddings.catalogue.entries import ENTRIES, CatalogueEntry
from llama_embeddings.catalogue.gguf_check import GgufSummary, check_gguf
from llama_embeddings.errors import (
    DownloadFailed,
    ModelLoading,
    ModelNotFound,
    ModelUnusable,
    RamdiskFailed,
    ServiceError,
)

logger = logging.getLogger(__name__)

# Two texts, the cosine similarity of their float32 embeddings by the model's own reference implementation, and how
# far a quantised file may be from it.
KNOWN_SIMILARITIES = {DEFAULT_MODEL_NAME: ("I feel extremely chilly", "I am so cold", 0.742, 0.03)}

DOWNLOAD_RETRY_AFTER_SECONDS = 30.0
# A replaced or deleted file is noticed after this time at the latest.
SECONDS_BETWEEN_LOOKS = 1.0
# No file's: what is remembered under it is looked at again.
NO_STAMP = FileStamp(-1, -1, -1, -1, -1)


@dataclass(frozen=True, slots=True)
class RamdiskOptions:
    """Where the RAM disk is to be and how large."""

    path: Path
    size_in_gb: float


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What the catalogue knows of a model, loaded or not. `summary` is there once its file is."""

    name: str
    entry: CatalogueEntry | None
    summary: GgufSummary | None
    download: DownloadState | None


class Catalogue:
    """The models of one directory, and those that can be downloaded into it."""

    def __init__(
        self,
        models_directory: Path,
        downloads: Downloads,
        *,
        downloads_on_demand: bool = True,
        ramdisk: RamdiskOptions | None = None,
    ) -> None:
        self._directory = models_directory
        self._downloads = downloads
        self._downloads_on_demand = downloads_on_demand
        self._ramdisk = ramdisk
        self._summaries: dict[str, GgufSummary] = {}
        # When a file was last looked at, what distinguished it then, and what was found.
        self._files: dict[str, tuple[float, FileStamp, ModelFile]] = {}
        # Digests of the copies on the RAM disk, and the copies' stamps before they were taken.
        self._copies: dict[str, tuple[str, FileStamp]] = {}

    def names(self) -> list[str]:
        """Stems of the GGUF files that are there."""
        return sorted(path.stem for path in self._directory.glob("*.gguf") if path.is_file())

    def created(self, name: str) -> int:
        """When a model's file was written, in seconds since 1970."""
        stamp = FileStamp.of(self._directory / f"{name}.gguf")
        if stamp is None:
            raise ModelNotFound(name, self.names())
        return stamp.modified_ns // 1_000_000_000

    def get_missing_default_model(self, name: str) -> None:
        """Make or fetch the model that every start needs, if it is not there. Blocks. Raises DownloadFailed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if name not in self.names() and name == DEFAULT_MODEL_NAME:
            get_default_model(self._directory, progress=logger.info)

    async def find(self, name: str, loaded: ModelFile | None = None) -> ModelFile:
        """The file of a model. Raises ModelNotFound and, for a file that must not be loaded, ModelUnusable.

        `loaded` is what is in memory under this name: it goes on when its file was deleted, or while another that is
        not whole lies in its place.
        """
        known = self._files.get(name)
        if known is not None and known[1] == NO_STAMP and loaded is None:
            known = None
        if known is not None and time.monotonic() - known[0] < SECONDS_BETWEEN_LOOKS:
            return self._on_ramdisk(known[2])
        path = self._directory / f"{name}.gguf"
        # The name comes from a request: only one that a file in this very directory can have is looked for.
        stamp = FileStamp.of(path) if path.parent == self._directory and path.name == f"{name}.gguf" else None
        if stamp is None:
            if loaded is not None:
                return loaded
            raise self._explain_absence(name)
        file = known[2] if known is not None and known[1] == stamp else None
        if file is None:
            try:
                file = await asyncio.to_thread(self._examine, name, path, stamp)
            except ModelUnusable as error:
                if loaded is None:
                    raise
                logger.warning("Going on with the model in memory: %s", error.message)
                file, stamp = loaded, NO_STAMP
        self._files[name] = (time.monotonic(), stamp, file)
        return self._on_ramdisk(file)

    def _explain_absence(self, name: str) -> ServiceError:
        """What to tell those who ask for a model without a file; starts its download if that is known how."""
        entry = ENTRIES.get(name)
        if entry is None or not self._downloads_on_demand:
            return ModelNotFound(name, self.names())
        state = self._downloads.states().get(name)
        if state is not None and state.state is DownloadStage.FAILED and state.error is not None:
            return DownloadFailed(f"The model {name!r} could not be downloaded: {state.error}")
        self._downloads.start(entry)
        share = f" ({state.percentage:g} %)" if state is not None and state.percentage is not None else ""
        return ModelLoading(
            f"The model {name!r} is being downloaded{share}; try again later.",
            retry_after_seconds=DOWNLOAD_RETRY_AFTER_SECONDS,
        )

    def start_download(self, name: str) -> None:
        """Download a model of the catalogue in the background, again if it failed. Raises ModelNotFound."""
        if name not in ENTRIES:
            raise ModelNotFound(name, [*self.names(), *ENTRIES])
        self._downloads.start(ENTRIES[name])

    def add(self, url: str) -> str:
        """Download a GGUF from its address in the background; returns the model's name. Raises InvalidInput."""
        entry = self._downloads.parse_address(url)
        self._downloads.start(entry)
        return entry.name

    async def describe(self) -> list[KnownModel]:
        """Every model: those that are there, on their way, or in the catalogue."""
        states = self._downloads.states()
        present = self.names()
        names = sorted({*present, *states, *ENTRIES})
        return [
            KnownModel(
                name,
                ENTRIES.get(name),
                await self._summary(name) if name in present else None,
                states.get(name),
            )
            for name in names
        ]

    async def _summary(self, name: str) -> GgufSummary | None:
        try:
            await self.find(name)
        except ServiceError:
            return None
        return self._summaries.get(name)

    def pooling(self, name: str) -> str | None:
        """What the catalogue says instead of the model's file."""
        entry = ENTRIES.get(name)
        return entry.pooling if entry is not None else None

    def prompt(self, name: str, input_type: InputType | None) -> str:
        """What goes in front of a text that plays this part."""
        entry = ENTRIES.get(name)
        if entry is None or input_type is None:
            return ""
        return entry.query_prompt if input_type is InputType.QUERY else entry.document_prompt

    def _examine(self, name: str, path: Path, stamp: FileStamp) -> ModelFile:
        self._summaries[name] = check_gguf(path)
        sidecar = path.with_name(path.name + ".measured.json")
        file = ModelFile(name, path, _find_digest(path, stamp), stamp.size_in_bytes, sidecar, stamp)
        copy = self._find_copy(file)
        copied = FileStamp.of(copy) if copy is not None else None
        if copy is not None and copied is not None and copied.size_in_bytes == stamp.size_in_bytes:
            self._copies[name] = (_compute_digest(copy), copied)
        return file

    def _on_ramdisk(self, file: ModelFile) -> ModelFile:
        """The same model, from memory if it was copied there; a file or a copy replaced since then is another model."""
        digest, stamp = self._copies.get(file.name, (None, None))
        if digest != file.digest:
            return file
        copy = self._find_copy(file)
        if copy is None or FileStamp.of(copy) != stamp:
            return file
        return replace(file, path=copy, stamp=stamp)

    def _find_copy(self, file: ModelFile) -> Path | None:
        """What lies on the RAM disk under the file's name."""
        if self._ramdisk is None:
            return None
        try:
            return ramdisk_functions.find_model_on_ramdisk(self._ramdisk.path, file.path.name)
        except (ramdisk_functions.RamdiskError, OSError):
            return None

    def known_similarity(self, name: str) -> tuple[str, str, float, float] | None:
        """Two texts, their similarity by this model and its tolerance, where they are known."""
        return KNOWN_SIMILARITIES.get(name)

    def set_up_ramdisk(self) -> None:
        """Mount the RAM disk and copy the models; on any difficulty go on without it, with a warning. Blocks."""
        if self._ramdisk is None:
            return
        try:
            if not ramdisk_functions.check_that_user_has_required_permissions_to_manage_ramdisks():
                raise ramdisk_functions.RamdiskError("this user may not mount file systems (root or `sudo -n` needed)")
            ramdisk_functions.setup_ramdisk(self._ramdisk.path, self._ramdisk.size_in_gb)
        except ramdisk_functions.RamdiskError as error:
            logger.warning("Going on without a RAM disk, models are loaded from disk: %s", error)
            self._ramdisk = None
            return
        try:
            copied = ramdisk_functions.copy_models_to_ramdisk(self._directory, self._ramdisk.path)
            logger.info("%d models lie on the RAM disk %s", len(copied), self._ramdisk.path)
        except ramdisk_functions.RamdiskError as error:
            logger.warning("Not every model is on the RAM disk; the others are loaded from disk: %s", error)

    def clear_ramdisk(self) -> str:
        """Remove the models from memory and unmount; says what was done. Blocks."""
        if self._ramdisk is None:
            return "RAM disks are not in use, so there is nothing to clear."
        try:
            cleared = ramdisk_functions.clear_ramdisk(self._ramdisk.path)
        except ramdisk_functions.RamdiskError as error:
            raise RamdiskFailed(f"The RAM disk could not be cleared: {error}") from error
        self._ramdisk = None
        return f"The RAM disk is cleared: {cleared.freed_bytes} bytes freed. Models are loaded from disk from now on."


def _find_digest(path: Path, stamp: FileStamp) -> str:
    """SHA-256 of a file, kept beside it: reading a large model again at every start takes longer than loading it."""
    kept_at = path.with_name(path.name + ".sha256.json")
    try:
        kept = json.loads(kept_at.read_text())
        # A file may be written twice within one tick of the file system's clock, and then has the same stamp: what was
        # kept within that tick may be of the first writing. Both times are of the same clock.
        is_certain = kept_at.stat().st_mtime_ns > stamp.changed_ns
        if is_certain and kept["stamp"] == asdict(stamp):
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or not ours
    digest = _compute_digest(path)
    _keep_digest(kept_at, {"sha256": digest, "stamp": asdict(stamp)})
    return digest


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_digest(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(path)
    except OSError as error:
        logger.info("The digest cannot be kept beside the model (%s)", error.strerror)
