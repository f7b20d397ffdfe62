"""Keeps loaded models: loads each once, however many ask at the same time, and lets the least recently used go.

A model in use is never freed: users hold a lease, and unloading waits for its end. Facts of models that were loaded
once are remembered, so that a text found in the store needs no model in memory. Does not know where model files come
from.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import platform
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from embeddings_data_models import FileStamp, ModelFile
from llama_embeddings.errors import ModelLoading
from llama_embeddings.inference.backend import Backend, LoadedModel, ModelInfo, Pooling
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.calibration import Calibration, calibrate
from llama_embeddings.inference.engine import EmbeddingEngine

logger = logging.getLogger(__name__)

# A request that computes for longer than this is not waited for: what it uses is freed when it ends.
UNLOAD_TIMEOUT_SECONDS = 10.0
# When the cache is closed, requests have had their time already: what does not end now is left to the process's end.
CLOSE_TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user may fix; 0 means: measure it."""

    max_window: int
    is_parallel: bool
    max_texts_in_flight: int
    max_queued_tokens: int
    n_workers: int = 0
    n_threads_per_worker: int = 0
    token_budget: int = 0
    calibration_seconds: float = 2.0


@dataclass(slots=True, eq=False)
class _Slot:
    """A loaded model and how many are using it."""

    engine: EmbeddingEngine
    file: ModelFile
    n_users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def digest(self) -> str:
        return self.file.digest

    def add_users(self, count: int) -> None:
        self.n_users += count
        if self.n_users:
            self.unused.clear()
        else:
            self.unused.set()


@dataclass(slots=True, eq=False)
class _Load:
    """A load under way and how many callers wait for it; they are the first users of what it loads."""

    task: asyncio.Task[_Slot]
    n_waiting: int = 0
    slot: _Slot | None = None


class Unloading(StrEnum):
    """What became of the wish to unload a model."""

    DONE = "done"
    PENDING = "pending"
    """It is used for longer than was waited. Nobody new gets it, and it is freed when its last user leaves."""
    NOT_LOADED = "not loaded"


class ModelCache:
    """At most `max_loaded_models` engines, most recently used last.

    An engine that is let go is first taken out of `_slots`, so that nobody new gets it, then waits in `_leaving` for
    its last user, and is closed. It counts as memory in use until then.
    """

    def __init__(
        self,
        backend: Backend,
        options: EngineOptions,
        *,
        max_loaded_models: int,
        max_memory_in_bytes: int = 0,
        unload_timeout_seconds: float = UNLOAD_TIMEOUT_SECONDS,
    ) -> None:
        self._backend = backend
        self._options = options
        self._max_loaded_models = max_loaded_models
        self._max_memory_in_bytes = max_memory_in_bytes
        self._unload_timeout_seconds = unload_timeout_seconds
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._leaving: dict[_Slot, asyncio.Task[None]] = {}
        self._loads: dict[tuple[str, str], _Load] = {}
        # One load at a time: each must see the room that the others take, and measures alone.
        self._load_lock = asyncio.Lock()
        self._known_infos: dict[tuple[str, str], ModelInfo] = {}
        self._is_closing = False

    @asynccontextmanager
    async def lease(self, file: ModelFile, pooling: Pooling | None = None) -> AsyncIterator[EmbeddingEngine]:
        """Use a model, loading it if it is not in memory. Raises ModelUnusable, ModelLoading."""
        slot = self._slots.get(file.name)
        if slot is not None and slot.digest == file.digest and not slot.engine.has_failed:
            slot.add_users(1)
        else:
            slot = await self._wait_for_load(file, pooling)
        if self._slots.get(file.name) is slot:
            self._slots.move_to_end(file.name)
        try:
            yield slot.engine
        finally:
            slot.add_users(-1)

    async def info(self, file: ModelFile, pooling: Pooling | None = None) -> ModelInfo:
        """Facts about a model; loads it only if it was never loaded before."""
        known = self._known_infos.get((file.name, file.digest))
        if known is None:
            async with self.lease(file, pooling) as engine:
                known = engine.info
        return known

    def loaded(self) -> list[EmbeddingEngine]:
        """The engines in memory, least recently used first."""
        return [slot.engine for slot in self._slots.values()]

    def is_computing(self) -> bool:
        """Whether any engine works at this moment. From any thread: the slots are copied in one go."""
        return any(slot.engine.batcher.is_computing for slot in [*self._slots.values(), *self._leaving])

    def loaded_file(self, name: str) -> ModelFile | None:
        """The file that a model in memory was loaded from; it may be gone."""
        slot = self._slots.get(name)
        return slot.file if slot is not None else None

    def is_loading(self, name: str) -> bool:
        return any(key[0] == name for key in self._loads)

    async def _wait_for_load(self, file: ModelFile, pooling: Pooling | None) -> _Slot:
        """The slot of a file that is being loaded, with this caller among its users."""
        load = self._start_load(file, pooling)
        load.n_waiting += 1
        try:
            # A caller that goes away must not stop the load for the others.
            return await asyncio.shield(load.task)
        except BaseException:  # above all: cancelled; who waits for a load counts as a user of what it loads
            load.n_waiting -= 1
            if load.slot is not None:
                load.slot.add_users(-1)
            raise

    def _start_load(self, file: ModelFile, pooling: Pooling | None) -> _Load:
        key = (file.name, file.digest)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(asyncio.create_task(self._load(file, pooling), name=f"load {file.name}"))
        return load

    async def _load(self, file: ModelFile, pooling: Pooling | None) -> _Slot:
        load = self._loads[(file.name, file.digest)]
        try:
            await self._wait_for_leaving(file.name)
            async with self._load_lock:
                slot = await self._load_now(file, pooling)
                # In one step, so that nobody finds the model unused, or a load that has already handed out its slot.
                slot.add_users(load.n_waiting)
                load.slot = self._slots[file.name] = slot
            return slot
        finally:
            del self._loads[(file.name, file.digest)]

    async def _wait_for_leaving(self, name: str | None = None) -> None:
        """Wait until the leaving engines of a name, or one of all, are freed. Raises ModelLoading if it takes long."""
        leaving = [task for slot, task in self._leaving.items() if name in (None, slot.file.name)]
        if not leaving:
            return
        how = asyncio.ALL_COMPLETED if name is not None else asyncio.FIRST_COMPLETED
        _, left = await asyncio.wait(leaving, timeout=self._unload_timeout_seconds, return_when=how)
        if len(left) == len(leaving) or (name is not None and left):
            raise ModelLoading("A model is being unloaded, and is still in use; try again in a moment.")

    async def _load_now(self, file: ModelFile, pooling: Pooling | None) -> _Slot:
        await self._unload_stale(file)
        await self._make_room(file.size_in_bytes)
        engine = await asyncio.to_thread(self._open_engine, file, pooling)
        for warning in engine.info.warnings:
            logger.warning("Model %s: %s", file.name, warning)
        self._known_infos[(file.name, file.digest)] = engine.info
        return _Slot(engine, file)

    async def _unload_stale(self, file: ModelFile) -> None:
        """Free the engine of a file that was replaced, or one whose worker has ended."""
        slot = self._slots.get(file.name)
        if slot is not None:
            if slot.n_users:
                raise ModelLoading(f"The model {file.name!r} is being replaced; try again in a moment.")
            await self._let_go(slot)

    async def _make_room(self, size_in_bytes: int) -> None:
        while self._is_over_limit(size_in_bytes):
            unused = next((slot for slot in self._slots.values() if not slot.n_users), None)
            if unused is not None:
                logger.info("Unloading %s to make room", unused.file.name)
                await self._let_go(unused)
            elif self._leaving:
                await self._wait_for_leaving()
            else:
                raise ModelLoading("All loaded models are in use and no other may be loaded; try again in a moment.")

    def _is_over_limit(self, size_in_bytes: int) -> bool:
        slots = [*self._slots.values(), *self._leaving]
        if not slots:
            return False
        in_use = sum(slot.engine.info.size_in_bytes for slot in slots)
        is_over_memory = bool(self._max_memory_in_bytes) and in_use + size_in_bytes > self._max_memory_in_bytes
        return len(slots) >= self._max_loaded_models or is_over_memory

    async def unload(self, name: str) -> Unloading:
        """Free a model, after the texts that wait for it, and after all of its users, for a bounded time."""
        if name in self._slots:
            self._let_go(self._slots[name])
        leaving = [task for slot, task in self._leaving.items() if slot.file.name == name]
        if not leaving:
            return Unloading.NOT_LOADED
        _, left = await asyncio.wait(leaving, timeout=self._unload_timeout_seconds)
        return Unloading.PENDING if left else Unloading.DONE

    def _let_go(self, slot: _Slot) -> asyncio.Task[None]:
        """Hand the engine out to nobody any more, and close it once its last user has left; the task that does so."""
        del self._slots[slot.file.name]
        task = self._leaving[slot] = asyncio.create_task(self._close_unused(slot), name=f"unload {slot.file.name}")
        task.add_done_callback(lambda _: self._leaving.pop(slot, None))
        return task

    async def _close_unused(self, slot: _Slot) -> None:
        if slot.n_users:
            await slot.unused.wait()
        if self._is_closing:
            await asyncio.to_thread(slot.engine.close, timeout_seconds=CLOSE_TIMEOUT_SECONDS)
        else:
            await asyncio.to_thread(slot.engine.close)

    async def close(self) -> None:
        """Wait for loads under way, then free everything that is not in use; the rest goes with the process.

        Texts that still wait are answered with ShuttingDown.
        """
        self._is_closing = True
        await asyncio.gather(*(load.task for load in self._loads.values()), return_exceptions=True)
        for slot in list(self._slots.values()):
            self._let_go(slot)
        for slot in self._leaving:
            # Not waited for: closing frees nothing that is in use, as an engine's memory outlives the calls into it.
            slot.unused.set()
        await asyncio.gather(*self._leaving.values())

    def _open_engine(self, file: ModelFile, pooling: Pooling | None) -> EmbeddingEngine:
        options = self._options
        check_unchanged(file)
        model = self._backend.load(
            file.path, name=file.name, digest=file.digest, max_window=options.max_window, pooling=pooling
        )
        try:
            check_unchanged(file)
            return EmbeddingEngine(model, choose_limits(options, lambda: find_calibration(file, model, options)))
        except BaseException:
            model.close()
            raise


def check_unchanged(file: ModelFile) -> None:
    """Raise ModelLoading if a file is no longer the one whose digest was taken: what was loaded may be another."""
    if file.stamp is None:
        return
    found = FileStamp.of(file.path)
    if found is None:
        raise ModelLoading(f"The file of the model {file.name!r} went away while it was loaded; try again.")
    if found != file.stamp:
        raise ModelLoading(f"The model {file.name!r} is being replaced; try again in a moment.")


def choose_limits(options: EngineOptions, measure: Any) -> BatcherLimits:
    """What the user fixed, completed by measurements; one text after the other if parallel inference is off."""
    n_cores = count_cores()
    if not options.is_parallel:
        return BatcherLimits(1, n_cores, 1, n_cores, 1, options.max_queued_tokens)
    is_fixed = options.n_workers and options.n_threads_per_worker and options.token_budget
    measured: Calibration = Calibration(1, 1, 256, n_cores, 0.0) if is_fixed else measure()
    return BatcherLimits(
        n_workers=options.n_workers or measured.n_workers,
        n_threads_per_worker=options.n_threads_per_worker or measured.n_threads_per_worker,
        token_budget=options.token_budget or measured.token_budget,
        n_threads_for_lone_text=measured.n_threads_for_lone_text,
        max_texts_in_flight=options.max_texts_in_flight,
        max_queued_tokens=options.max_queued_tokens,
    )


def count_cores() -> int:
    """Cores this process may use: its affinity, further limited by a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(allowed, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return allowed  # no control groups, or no quota ("max")


# Of our cores, what others may have while a calibration is measured that is to be kept.
MAX_DISTURBED_SHARE = 0.2
# The system counts in hundredths of a second: less than this says nothing.
MIN_WATCHED_SECONDS = 0.5


def find_calibration(file: ModelFile, model: LoadedModel, options: EngineOptions) -> Calibration:
    """The calibration kept beside the model for this file and this machine, or a new one, kept from now on."""
    key = f"{file.digest} {_describe_processor()} {count_cores()} cores, window {model.info.window}"
    kept = _read_sidecar(file.sidecar)
    known = _parse_calibration(kept.get(key))
    if known is not None:
        return known
    others = OtherWork()
    measured = calibrate(
        model.open_context,
        n_vocabulary=model.info.n_vocabulary,
        n_cores=count_cores(),
        seconds=options.calibration_seconds,
        window=model.info.window,
    )
    logger.info("Calibrated %s: %s", file.name, measured)
    n_busy = others.count_busy_cores()
    if n_busy > MAX_DISTURBED_SHARE * count_cores():
        # Threads that wait for each other lose most beside others, and would be thought slow for good.
        logger.info("Other programs kept %.1f of our cores busy meanwhile: measured again at the next load", n_busy)
    else:
        _write_sidecar(file.sidecar, {**kept, key: asdict(measured)})
    return measured


class OtherWork:
    """How many of the cores that this process may use others kept busy since this was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started = self._look()

    def _look(self) -> tuple[float, float, float]:
        """Time now, of all cores at work, and of this process, in seconds."""
        times, own = psutil.cpu_times(), self._process.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests are counted a second time, as part of what their hosts run.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return time.monotonic(), sum(times) - idle - guests, own.user + own.system

    def count_busy_cores(self) -> float:
        """Those of a larger machine that are not ours to use are not counted. 0 if that was only a moment ago."""
        seconds, busy, own = (now - before for now, before in zip(self._look(), self._started, strict=True))
        n_spare = (os.cpu_count() or 1) - count_cores()
        return max(0.0, (busy - own) / seconds - n_spare) if seconds >= MIN_WATCHED_SECONDS else 0.0


def _parse_calibration(entry: Any) -> Calibration | None:
    """None for what is not a calibration: absent, of another version, or edited by hand."""
    try:
        found = Calibration(**entry)
    except TypeError:
        return None
    counts = (found.n_workers, found.n_threads_per_worker, found.token_budget, found.n_threads_for_lone_text)
    return found if all(isinstance(count, int) and count > 0 for count in counts) else None


def _describe_processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_sidecar(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)
    except OSError as error:
        logger.warning("Measurements of %s cannot be kept (%s); they are repeated at the next start", path.name, error)
