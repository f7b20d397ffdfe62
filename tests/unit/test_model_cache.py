"""The model cache: each model loaded once, the least recently used goes, what is in use stays."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from embeddings_data_models import FileStamp, ModelFile, Truncation
from llama_embeddings.errors import InferenceFailed, ModelLoading, ModelUnusable, ShuttingDown
from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.calibration import Calibration
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.fake_backend import FakeBackend, FakeModel
from llama_embeddings.inference.model_cache import (
    EngineOptions,
    ModelCache,
    OtherWork,
    Unloading,
    choose_limits,
    count_cores,
    find_calibration,
)
from tests.serving import wait_until

FIXED = EngineOptions(
    max_window=64,
    is_parallel=True,
    max_texts_in_flight=256,
    max_queued_tokens=100_000,
    n_workers=1,
    n_threads_per_worker=1,
    token_budget=64,
    calibration_seconds=0.05,
)
MEASURED = replace(FIXED, n_workers=0, n_threads_per_worker=0, token_budget=0)


class SizedBackend(FakeBackend):
    """A fake backend whose models have the size of their file's name, which can be slow, and which can refuse."""

    def __init__(self) -> None:
        super().__init__(n_dims=4)
        self.loaded: list[str] = []
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.refuses = False

    def load(self, path: Path, *, name: str, digest: str, max_window: int, pooling: Pooling | None) -> FakeModel:
        self.loaded.append(name)
        self.load_gate.wait(5)
        if self.refuses:
            raise ModelUnusable("told to refuse")
        model = super().load(path, name=name, digest=digest, max_window=max_window, pooling=pooling)
        model.info = replace(model.info, size_in_bytes=100)
        return model


@pytest.fixture
def backend() -> SizedBackend:
    return SizedBackend()


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., ModelFile]:
    def make(name: str, digest: str = "0") -> ModelFile:
        return ModelFile(name, tmp_path / f"{name}.gguf", digest, 100, tmp_path / f"{name}.measured.json")

    return make


@pytest.fixture
async def open_cache(backend: SizedBackend) -> AsyncIterator[Callable[..., ModelCache]]:
    caches: list[ModelCache] = []

    def open_one(options: EngineOptions = FIXED, *, max_loaded_models: int = 2, max_memory: int = 0) -> ModelCache:
        caches.append(ModelCache(backend, options, max_loaded_models=max_loaded_models, max_memory_in_bytes=max_memory))
        return caches[-1]

    yield open_one
    backend.load_gate.set()
    for cache in caches:
        await cache.close()


async def touch(cache: ModelCache, file: ModelFile) -> EmbeddingEngine:
    """Use a model for a moment."""
    async with cache.lease(file) as engine:
        return engine


def loaded_names(cache: ModelCache) -> list[str]:
    return [engine.info.name for engine in cache.loaded()]


async def embed(engine: EmbeddingEngine, text: str = "some words") -> EngineResult:
    [prepared] = await engine.prepare([text], Truncation.REFUSE)
    assert isinstance(prepared, PreparedText)
    [outcome] = await engine.embed([prepared])
    assert isinstance(outcome, EngineResult)
    return outcome


# Loading


async def test_model_asked_for_by_many_at_once_is_loaded_once(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Twenty first requests get the same engine."""
    cache, file = open_cache(), make_file("a")
    backend.load_gate.clear()
    tasks = [asyncio.create_task(touch(cache, file)) for _ in range(20)]
    await asyncio.sleep(0.02)
    assert cache.is_loading("a")
    backend.load_gate.set()
    engines = await asyncio.gather(*tasks)
    assert backend.loaded == ["a"]
    assert len(set(map(id, engines))) == 1
    assert not cache.is_loading("a")


async def test_first_request_that_leaves_does_not_stop_the_load_for_the_others(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The load is nobody's own."""
    cache, file = open_cache(), make_file("a")
    backend.load_gate.clear()
    first, second = (asyncio.create_task(touch(cache, file)) for _ in range(2))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.sleep(0)
    backend.load_gate.set()
    assert (await second).info.name == "a"
    assert backend.loaded == ["a"]


async def test_failed_load_is_not_remembered(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """All who waited get the error; the next request tries again and succeeds."""
    cache, file = open_cache(), make_file("a")
    backend.refuses = True
    outcomes = await asyncio.gather(*(touch(cache, file) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ModelUnusable] * 3
    assert loaded_names(cache) == []
    backend.refuses = False
    assert (await touch(cache, file)).info.name == "a"
    assert backend.loaded == ["a", "a"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_engine_that_cannot_be_made_gives_its_model_back(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """A model whose measuring fails is not left in memory."""
    cache = open_cache(MEASURED)
    backend.fail_when_more_than = 0
    with pytest.raises(InferenceFailed):
        await touch(cache, make_file("a"))
    assert (backend.n_open_models, backend.n_open_contexts) == (0, 0)


async def test_facts_of_a_model_loaded_once_need_no_model_in_memory(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Loaded for the first question, answered from memory after it was unloaded."""
    cache, file = open_cache(), make_file("a")
    known = await cache.info(file)
    assert (known.name, known.window, known.digest) == ("a", 64, "0")
    await cache.unload("a")
    assert await cache.info(file) is known
    assert backend.loaded == ["a"]


async def test_loaded_engine_answers(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """A lease is for embedding."""
    async with open_cache().lease(make_file("a")) as engine:
        assert (await embed(engine)).vector.shape == (4,)


# Room


async def test_least_recently_used_model_goes(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Of two, the one whose last use is longer ago makes room for a third, and its memory comes back."""
    cache = open_cache(max_loaded_models=2)
    for name in ("a", "b", "a", "c"):
        await touch(cache, make_file(name))
    assert loaded_names(cache) == ["a", "c"]
    assert (backend.n_open_models, backend.n_open_contexts) == (2, 2)


async def test_model_in_use_is_never_unloaded(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The older one is held and goes on answering; the newer, unused one goes."""
    cache = open_cache(max_loaded_models=2)
    async with cache.lease(make_file("a")) as engine:
        await touch(cache, make_file("b"))
        await touch(cache, make_file("c"))
        assert loaded_names(cache) == ["a", "c"]
        await embed(engine)


async def test_no_room_beside_models_in_use_is_said_and_passes(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The caller is told to come again; when the lease ends, there is room."""
    cache = open_cache(max_loaded_models=1)
    async with cache.lease(make_file("a")):
        with pytest.raises(ModelLoading, match="in use"):
            await touch(cache, make_file("b"))
    assert (await touch(cache, make_file("b"))).info.name == "b"
    assert loaded_names(cache) == ["b"]


async def test_memory_of_all_models_stays_within_its_bound(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Three models of 100 bytes never fit into 250, though ten models may be loaded."""
    cache = open_cache(max_loaded_models=10, max_memory=250)
    for name in ("a", "b", "c"):
        await touch(cache, make_file(name))
    assert loaded_names(cache) == ["b", "c"]


async def test_only_model_is_loaded_even_if_it_is_over_the_memory_bound(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """A bound that no model fits would leave a server that answers nothing."""
    cache = open_cache(max_memory=50)
    await touch(cache, make_file("a"))
    await touch(cache, make_file("b"))
    assert loaded_names(cache) == ["b"]


async def test_models_asked_for_at_once_keep_to_the_bound(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Loads that start together see each other; whoever finds no room is told to come again."""
    cache = open_cache(max_loaded_models=1)
    names = "abcdef"
    outcomes = await asyncio.gather(*(touch(cache, make_file(name)) for name in names), return_exceptions=True)
    assert all(isinstance(outcome, EmbeddingEngine | ModelLoading) for outcome in outcomes), outcomes
    assert any(isinstance(outcome, EmbeddingEngine) for outcome in outcomes)
    assert len(cache.loaded()) == 1
    assert backend.n_open_models == 1


async def test_leases_under_churn_never_get_a_closed_engine(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Six callers change between five models where two may be loaded; each embedding succeeds or is put off."""
    cache = open_cache(max_loaded_models=2)

    async def use(start: int) -> int:
        n_answers = 0
        for step in range(12):
            try:
                async with cache.lease(make_file("abcde"[(start + step) % 5])) as engine:
                    await embed(engine)
                    n_answers += 1
            except ModelLoading:
                await asyncio.sleep(0)
        return n_answers

    assert sum(await asyncio.gather(*(use(start) for start in range(6)))) > 0
    assert len(cache.loaded()) <= 2


async def test_replaced_file_is_loaded_anew(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """A new digest under the old name: the old model goes, the new one answers."""
    cache = open_cache()
    old = await touch(cache, make_file("a", "old"))
    new = await touch(cache, make_file("a", "new"))
    assert (old.info.digest, new.info.digest) == ("old", "new")
    assert (backend.loaded, backend.n_open_models) == (["a", "a"], 1)
    with pytest.raises(ShuttingDown):
        await embed(old)


async def test_file_replaced_while_in_use_waits_for_its_users(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The old model goes on for those who hold it; newcomers are told to come again."""
    cache = open_cache()
    async with cache.lease(make_file("a", "old")) as engine:
        with pytest.raises(ModelLoading, match="replaced"):
            await touch(cache, make_file("a", "new"))
        await embed(engine)
    assert (await touch(cache, make_file("a", "new"))).info.digest == "new"


async def test_file_that_changes_while_it_is_loaded_is_not_taken_for_what_it_was(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], tmp_path: Path
) -> None:
    """Its weights may be another file's than its digest, before or after the loading; the next request tries again."""
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    file = ModelFile("a", path, "old", 3, tmp_path / "a.json", stamp=FileStamp.of(path))
    cache = open_cache()
    backend.load_gate.clear()
    loading = asyncio.create_task(touch(cache, file))
    await wait_until(lambda: backend.loaded == ["a"])
    path.write_bytes(b"other")
    backend.load_gate.set()
    with pytest.raises(ModelLoading, match="replaced"):
        await loading
    path.unlink()
    with pytest.raises(ModelLoading, match="went away"):
        await touch(cache, file)
    assert (backend.loaded, backend.n_open_models, cache.loaded()) == (["a"], 0, [])


async def test_unloading_finishes_what_waits(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """A text in the queue of an engine that is closed gets its vector."""
    cache = open_cache()
    engine = await touch(cache, make_file("a"))
    backend.gate.clear()
    waiting = asyncio.create_task(embed(engine))
    await asyncio.sleep(0.01)
    unloading = asyncio.create_task(cache.unload("a"))
    await asyncio.sleep(0.01)
    backend.gate.set()
    assert await unloading is Unloading.DONE
    assert (await waiting).vector.shape == (4,)
    assert await cache.unload("a") is Unloading.NOT_LOADED


async def test_unloading_waits_for_the_users_and_they_get_what_they_ask_for(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Texts that are asked for after the wish to unload, too: the lease holds until it ends."""
    cache, file = open_cache(), make_file("a")
    async with cache.lease(file) as engine:
        unloading = asyncio.create_task(cache.unload("a"))
        await asyncio.sleep(0.01)
        assert loaded_names(cache) == []
        assert (await embed(engine)).vector.shape == (4,)
        assert engine.tokenize("ab")[0]
        assert (unloading.done(), backend.n_open_models) == (False, 1)
    assert await unloading is Unloading.DONE
    assert (backend.n_open_models, backend.n_open_contexts) == (0, 0)


async def test_request_that_comes_while_a_model_is_unloaded_waits_and_loads_it_again(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Never two copies in memory, and no error."""
    cache, file = open_cache(), make_file("a")
    async with cache.lease(file) as engine:
        unloading = asyncio.create_task(cache.unload("a"))
        await asyncio.sleep(0.01)
        newcomer = asyncio.create_task(touch(cache, file))
        await asyncio.sleep(0.01)
        assert (newcomer.done(), backend.loaded) == (False, ["a"])
    assert await unloading is Unloading.DONE
    assert await newcomer is not engine
    assert (backend.loaded, backend.n_open_models) == (["a", "a"], 1)


async def test_model_that_stays_in_use_is_freed_when_its_last_user_leaves(
    backend: SizedBackend, make_file: Callable[..., ModelFile]
) -> None:
    """Unloading says that it is still to come; until then newcomers are put off and its memory counts."""
    cache = ModelCache(backend, FIXED, max_loaded_models=1, unload_timeout_seconds=0.01)
    async with cache.lease(make_file("a")) as engine:
        assert await cache.unload("a") is Unloading.PENDING
        for name in ("a", "b"):
            with pytest.raises(ModelLoading, match="being unloaded"):
                await touch(cache, make_file(name))
        await embed(engine)
        assert backend.n_open_models == 1
    assert (await touch(cache, make_file("b"))).info.name == "b"
    assert backend.n_open_models == 1
    await cache.close()
    assert (backend.n_open_models, backend.n_open_contexts) == (0, 0)


async def test_model_unloaded_the_moment_it_is_loaded_serves_those_who_waited_for_it_first(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Also those who have not been told yet; a caller who left in that moment holds nothing back."""
    cache, file = open_cache(), make_file("a")
    backend.load_gate.clear()

    async def use() -> EngineResult:
        async with cache.lease(file) as engine:
            return await embed(engine)

    users = [asyncio.create_task(use()) for _ in range(3)]
    await wait_until(lambda: backend.loaded == ["a"])
    backend.load_gate.set()
    while not cache.loaded():
        await asyncio.sleep(0)
    users[0].cancel()
    assert await cache.unload("a") is Unloading.DONE
    assert [(await user).vector.shape for user in users[1:]] == [(4,)] * 2
    assert backend.loaded == ["a"]


async def test_closing_waits_for_no_user(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The server ends in time, and who still waits gets an answer."""
    cache = open_cache()
    async with cache.lease(make_file("a")) as engine:
        await cache.close()
        with pytest.raises(ShuttingDown):
            await embed(engine)


async def test_close_waits_for_loads_and_frees_everything(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Also a model whose load has just begun."""
    cache = open_cache(max_loaded_models=3)
    await touch(cache, make_file("a"))
    backend.load_gate.clear()
    loading = asyncio.create_task(touch(cache, make_file("b")))
    await asyncio.sleep(0.01)
    backend.load_gate.set()
    await cache.close()
    await loading
    assert (backend.n_open_models, backend.n_open_contexts) == (0, 0)


async def test_several_leases_of_one_model_count(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The model is free when the last one ends, not the first."""
    cache, file = open_cache(max_loaded_models=1), make_file("a")
    async with AsyncExitStack() as outer:
        await outer.enter_async_context(cache.lease(file))
        await touch(cache, file)
        with pytest.raises(ModelLoading):
            await touch(cache, make_file("b"))
    assert (await touch(cache, make_file("b"))).info.name == "b"


# Measuring


def measure_nothing() -> Calibration:
    raise AssertionError("nothing was to be measured")


async def test_calibration_is_kept_in_the_sidecar_and_read_again(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """The second start makes no pass before the first text."""
    file = make_file("a")
    await touch(open_cache(MEASURED), file)
    n_passes = len(backend.passes)
    kept = json.loads(file.sidecar.read_text())
    assert n_passes > 0
    await touch(open_cache(MEASURED), file)
    assert len(backend.passes) == n_passes
    assert json.loads(file.sidecar.read_text()) == kept


async def test_calibration_beside_other_programs_is_not_kept(
    backend: SizedBackend,
    open_cache: Callable[..., ModelCache],
    make_file: Callable[..., ModelFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It serves for now; the next load measures again."""
    file = make_file("a")
    with monkeypatch.context() as patched:
        patched.setattr(OtherWork, "count_busy_cores", lambda _: 0.5 * count_cores())
        await touch(open_cache(MEASURED), file)
    assert not file.sidecar.exists()
    n_passes = len(backend.passes)
    await touch(open_cache(MEASURED), file)
    assert len(backend.passes) > n_passes
    assert file.sidecar.exists()


@pytest.mark.parametrize(
    ("n_cores", "n_ours", "seconds", "busy", "own", "expected"),
    [
        (2, 2, 2.0, 4.0, 3.0, 0.5),
        (2, 2, 2.0, 3.0, 3.1, 0.0),
        (8, 2, 2.0, 10.0, 3.0, 0.0),
        (8, 2, 2.0, 16.0, 3.0, 0.5),
        (2, 2, 0.1, 0.2, 0.0, 0.0),
    ],
)
def test_other_programs_count_where_they_take_our_cores(
    n_cores: int,
    n_ours: int,
    seconds: float,
    busy: float,
    own: float,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not on the cores of a larger machine that are not ours; and a moment says nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: n_cores)
    monkeypatch.setattr("llama_embeddings.inference.model_cache.count_cores", lambda: n_ours)
    looks = iter([(10.0, 100.0, 20.0), (10.0 + seconds, 100.0 + busy, 20.0 + own)])
    monkeypatch.setattr(OtherWork, "_look", lambda _: next(looks))
    assert OtherWork().count_busy_cores() == pytest.approx(expected)


async def test_calibration_of_another_file_or_window_does_not_count(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """Each combination is measured once, and the sidecar holds them all."""
    for count, (options, digest) in enumerate(
        [(MEASURED, "0"), (MEASURED, "1"), (replace(MEASURED, max_window=32), "0")], start=1
    ):
        n_passes = len(backend.passes)
        await touch(open_cache(options), make_file("a", digest))
        assert len(backend.passes) > n_passes
        assert len(json.loads(make_file("a").sidecar.read_text())) == count


@pytest.mark.parametrize("content", ["", "not JSON", "[1, 2]", "null", '{"another key": {}}', "\udc80"])
async def test_damaged_sidecar_is_measured_over(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile], content: str
) -> None:
    """Whatever it holds, the model loads and the sidecar is good again."""
    file = make_file("a")
    file.sidecar.write_bytes(content.encode("utf-8", "surrogateescape"))
    await touch(open_cache(MEASURED), file)
    assert any(Calibration(**kept) for kept in json.loads(file.sidecar.read_text()).values() if kept)


NO_WORKERS = asdict(Calibration(0, 1, 256, 1, 0.0))
WORDS = asdict(Calibration(1, 1, 256, 1, 0.0)) | {"token_budget": "many"}
DAMAGED_ENTRIES: list[object] = [None, 3, {}, {"n_workers": 1}, {"unknown": 1}, [1, 1, 256, 2, 0.0], NO_WORKERS, WORDS]


@pytest.mark.parametrize("entry", DAMAGED_ENTRIES)
async def test_entry_of_another_shape_is_measured_over(
    open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile], entry: object
) -> None:
    """A sidecar of another version, or one that somebody edited, does not keep the model from loading."""
    file = make_file("a")
    await touch(open_cache(MEASURED), file)
    [key] = json.loads(file.sidecar.read_text())
    file.sidecar.write_text(json.dumps({key: entry}))
    await touch(open_cache(MEASURED), file)
    assert Calibration(**json.loads(file.sidecar.read_text())[key]).n_workers >= 1


async def test_sidecar_that_cannot_be_written_is_a_warning(
    open_cache: Callable[..., ModelCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model answers; the measurement is repeated at the next start."""
    sidecar = tmp_path / "absent" / "a.measured.json"
    file = ModelFile("a", tmp_path / "a.gguf", "0", 100, sidecar)
    with caplog.at_level(logging.WARNING):
        async with open_cache(MEASURED).lease(file) as engine:
            await embed(engine)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert sidecar.name in caplog.text
    assert not sidecar.exists()


def test_measured_values_are_used_where_nothing_is_fixed(make_file: Callable[..., ModelFile]) -> None:
    """Each 0 is filled in; each number stays."""
    measured = Calibration(3, 2, 192, 5, 1.0)
    assert choose_limits(MEASURED, lambda: measured) == BatcherLimits(3, 2, 192, 5, 256, 100_000)
    fixed_in_part = replace(MEASURED, token_budget=77)
    assert choose_limits(fixed_in_part, lambda: measured) == BatcherLimits(3, 2, 77, 5, 256, 100_000)


async def test_fixed_settings_skip_measuring(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """No pass at the load, no sidecar."""
    assert choose_limits(FIXED, measure_nothing) == BatcherLimits(1, 1, 64, count_cores(), 256, 100_000)
    file = make_file("a")
    await touch(open_cache(FIXED), file)
    assert backend.passes == []
    assert not file.sidecar.exists()


async def test_without_parallel_inference_every_pass_has_one_text(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """One worker with all cores, one text after the other, nothing measured."""
    options = replace(MEASURED, is_parallel=False)
    n_cores = count_cores()
    assert choose_limits(options, measure_nothing) == BatcherLimits(1, n_cores, 1, n_cores, 1, 100_000)
    async with open_cache(options).lease(make_file("a")) as engine:
        await asyncio.gather(*(embed(engine, "some words" + "!" * n) for n in range(30)))
    assert [len(lengths) for lengths in backend.passes] == [1] * 30
    assert set(backend.threads_of_passes) == {n_cores}


def test_calibration_of_a_model_is_measured_on_it(backend: SizedBackend, make_file: Callable[..., ModelFile]) -> None:
    """With the model's own contexts and vocabulary, all given back."""
    file = make_file("a")
    model = backend.load(file.path, name="a", digest="0", max_window=64, pooling=None)
    found = find_calibration(file, model, MEASURED)
    assert 1 <= found.n_workers * found.n_threads_per_worker <= count_cores()
    assert backend.n_open_contexts == 0
    assert find_calibration(file, model, MEASURED) == found


async def test_measuring_keeps_to_the_models_window(
    backend: SizedBackend, open_cache: Callable[..., ModelCache], make_file: Callable[..., ModelFile]
) -> None:
    """llama.cpp ends the process at a position that the model does not have."""
    await touch(open_cache(replace(MEASURED, max_window=9)), make_file("a"))
    assert backend.passes
    assert max(max(lengths) for lengths in backend.passes) <= 9
