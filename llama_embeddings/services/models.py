"""Which models there are, and how to get at one: names, aliases, loading, recipes, the RAM disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from embeddings_data_models import InputType, ModelDescription, ModelFile, Recipe, Truncation
from llama_embeddings.catalogue.entries import ModelKind
from llama_embeddings.catalogue.models import Catalogue, KnownModel
from llama_embeddings.errors import (
    ConfigurationError,
    InferenceFailed,
    ModelLoading,
    ModelNotFound,
    ModelUnusable,
    ServiceError,
)
from llama_embeddings.inference.backend import ModelInfo, Pooling
from llama_embeddings.inference.engine import EmbeddingEngine
from llama_embeddings.inference.model_cache import ModelCache, Unloading

logger = logging.getLogger(__name__)

PROBE_TEXT = "The server answers."
# Company in a batch may change a vector by rounding, not by more.
MIN_SELF_SIMILARITY = 0.999
_UNLOADING_MESSAGES = {
    Unloading.DONE: "The model {} is unloaded; the next request for it loads it again.",
    Unloading.PENDING: "The model {} is still in use by earlier requests. No new one gets it, and its memory is freed "
    "when the last of them ends.",
    Unloading.NOT_LOADED: "The model {} was not loaded.",
}


@dataclass(frozen=True, slots=True)
class UnloadedModel:
    """`message` says to people what was done. `is_pending`: the memory is freed when its last user is done."""

    message: str
    is_pending: bool


class ModelService:
    """Models by the names that callers use."""

    def __init__(
        self, catalogue: Catalogue, cache: ModelCache, *, default_model_name: str, aliases: Mapping[str, str]
    ) -> None:
        self._catalogue = catalogue
        self._cache = cache
        self._default_model_name = default_model_name
        self._aliases = dict(aliases)
        self._recipes: dict[tuple[str, Pooling, str], Recipe] = {}

    def names(self) -> list[str]:
        """Names of all models that can answer now, the default first."""
        names = self._catalogue.names()
        return sorted(names, key=lambda name: (name != self._default_model_name, name))

    def names_and_aliases(self) -> list[str]:
        """Names and the aliases that stand for one of them."""
        names = self.names()
        return names + sorted(alias for alias, name in self._aliases.items() if name in names)

    def check_listed(self, name: str) -> None:
        """Raise ModelNotFound for a name that is neither a present model's nor an alias."""
        if self.resolve(name) not in self.names():
            raise ModelNotFound(name, self.names())

    async def check_known(self, name: str) -> None:
        """Raise ModelNotFound for a name that is neither a model's nor an alias."""
        await self._find(self.resolve(name))

    def created(self, name: str) -> int:
        """When the model's file came to be, in seconds since 1970."""
        return self._catalogue.created(self.resolve(name))

    def resolve(self, name: str | None) -> str:
        """The model's own name for a name, an alias or nothing."""
        if name is None:
            return self._default_model_name
        return self._aliases.get(name, name)

    def prompt(self, name: str | None, input_type: InputType | None) -> str:
        """What goes in front of a text that plays this part."""
        return self._catalogue.prompt(self.resolve(name), input_type)

    async def _find(self, resolved: str) -> ModelFile:
        return await self._catalogue.find(resolved, self._cache.loaded_file(resolved))

    @asynccontextmanager
    async def lease(self, name: str | None, recipe: Recipe | None = None) -> AsyncIterator[EmbeddingEngine]:
        """Use a model's engine, loading it first if need be. Raises ModelNotFound, ModelUnusable, ModelLoading.

        With a recipe, only the model that it was made for: its file may have been replaced since.
        """
        resolved = self.resolve(name)
        file = await self._find(resolved)
        if recipe is not None and recipe.model_digest != file.digest:
            raise _describe_replacement(resolved)
        async with self._cache.lease(file, self._pooling(resolved)) as engine:
            yield engine

    def _pooling(self, resolved: str) -> Pooling | None:
        stated = self._catalogue.pooling(resolved)
        return Pooling(stated) if stated is not None else None

    async def info(self, name: str | None) -> ModelInfo:
        """Facts about a model. Raises ModelNotFound, ModelUnusable, ModelLoading."""
        resolved = self.resolve(name)
        return await self._cache.info(await self._find(resolved), self._pooling(resolved))

    def is_computing(self) -> bool:
        """Whether any engine works at this moment. From any thread."""
        return self._cache.is_computing()

    async def recipe(self, name: str | None, input_type: InputType | None = None) -> Recipe:
        """How this model's vectors of texts that play this part are made."""
        info = await self.info(name)
        prompt = self._catalogue.prompt(self.resolve(name), input_type)
        key = (info.digest, info.pooling, prompt)
        if key not in self._recipes:
            # Kept, so that its digest is computed once and not for every request.
            self._recipes[key] = Recipe(model_digest=info.digest, pooling=str(info.pooling), prompt=prompt)
        return self._recipes[key]

    async def check_current(self, name: str, family: str, input_type: InputType | None = None) -> None:
        """Raise ModelLoading if vectors are no longer made by this recipe family: the file was replaced since."""
        if (await self.recipe(name, input_type)).family != family:
            raise _describe_replacement(name)

    async def describe(self) -> list[ModelDescription]:
        """Every model with its state, the default first."""
        loaded = {engine.info.name: engine.info for engine in self._cache.loaded()}
        described = [self._describe(known, loaded.get(known.name)) for known in await self._catalogue.describe()]
        return sorted(described, key=lambda model: (not model.is_default, model.model_name))

    async def describe_one(self, name: str) -> ModelDescription:
        """A model that is there. Raises ModelNotFound, ModelUnusable, ModelLoading."""
        resolved = self.resolve(name)
        await self._find(resolved)
        return next(model for model in await self.describe() if model.model_name == resolved)

    async def digest(self, name: str) -> str:
        """SHA-256 of a model's file, in hexadecimal. Raises what `check_known` raises."""
        return (await self._find(self.resolve(name))).digest

    def _describe(self, known: KnownModel, info: ModelInfo | None) -> ModelDescription:
        entry, summary, download = known.entry, known.summary, known.download
        state: Any = "known"
        if info is not None:
            state = "loaded"
        elif self._cache.is_loading(known.name):
            state = "loading"
        elif summary is not None:
            state = "on_disk"
        elif download is not None:
            state = str(download.state)
        is_reranker = (entry is not None and entry.kind is ModelKind.RERANKER) or (
            summary is not None and summary.pooling == "rank"
        )
        recipe = Recipe(info.digest, str(info.pooling)).family if info is not None else None
        return ModelDescription(
            model_name=known.name,
            state=state,
            is_default=known.name == self._default_model_name,
            kind="reranker" if is_reranker else "embedding",
            architecture=summary.architecture if summary is not None else None,
            n_dims=summary.n_dims if summary is not None else entry.n_dims if entry is not None else None,
            window=summary.context_length if summary is not None else entry.window if entry is not None else None,
            pooling=str(info.pooling) if info is not None else summary.pooling if summary is not None else None,
            size_in_bytes=summary.size_in_bytes if summary is not None else None,
            licence=entry.licence if entry is not None else summary.licence if summary is not None else None,
            recipe=recipe,
            percentage=download.percentage if download is not None and summary is None else None,
            error=download.error if download is not None and summary is None else None,
        )

    async def load(self, name: str) -> str:
        """Load a model, or start its download; says which. Raises ModelNotFound, ModelUnusable."""
        resolved = self.resolve(name)
        if resolved not in self._catalogue.names():
            self._catalogue.start_download(resolved)
            return f"The model {resolved!r} is being downloaded; the list of models says how far it is."
        async with self.lease(resolved):
            return f"The model {resolved!r} is loaded."

    async def unload(self, name: str) -> UnloadedModel:
        """Free a model's memory after the texts that wait for it; its file stays. Raises what `check_known` raises."""
        resolved = self.resolve(name)
        if self._cache.loaded_file(resolved) is None:
            await self.check_known(resolved)
        outcome = await self._cache.unload(resolved)
        return UnloadedModel(_UNLOADING_MESSAGES[outcome].format(repr(resolved)), outcome is Unloading.PENDING)

    def add(self, url: str) -> str:
        """Start the download of a model from its address on the hub. Raises InvalidInput."""
        name = self._catalogue.add(url)
        return f"The model {name!r} is being downloaded; the list of models says how far it is."

    def engines(self) -> list[EmbeddingEngine]:
        """The engines in memory."""
        return self._cache.loaded()

    async def compute_probe(self, *, timeout_seconds: float) -> float:
        """Make a real embedding with the default model, past caches and queue; returns the seconds it took.

        Raises what the engine raises, and InferenceFailed when the deadline passes.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            # Its file, too: without it the model in memory goes on, but would not come back.
            await self._catalogue.find(self._default_model_name)
            async with asyncio.timeout(timeout_seconds), self.lease(None) as engine:
                await _embed(engine, [PROBE_TEXT], is_probe=True)
        except TimeoutError:
            raise InferenceFailed(f"The engine gave no embedding within {timeout_seconds:g} s.") from None
        return loop.time() - started

    async def check_default_model(self) -> None:
        """Load the default model and hold it against known answers.

        Raises ModelUnusable if it gives others, ConfigurationError if there is no such model.
        """
        try:
            await self._catalogue.find(self._default_model_name)
        except ModelNotFound as error:
            raise ConfigurationError(f"DEFAULT_MODEL_NAME: {error.message}", setting="DEFAULT_MODEL_NAME") from None
        async with self.lease(None) as engine:
            known = self._catalogue.known_similarity(engine.info.name)
            texts = [PROBE_TEXT, *(known[:2] if known else ())]
            alone = await _embed(engine, [PROBE_TEXT])
            together = await _embed(engine, texts)
            drift = float(alone[0] @ together[0])
            if drift < MIN_SELF_SIMILARITY:
                raise ModelUnusable(f"The model {engine.info.name!r} answers differently in a batch ({drift:.4f}).")
            if known is not None:
                _check_similarity(engine.info.name, float(together[1] @ together[2]), known[2], known[3])
        logger.info("Model %s passed its self-test", engine.info.name)

    async def clear_ramdisk(self) -> str:
        """Empty the RAM disk; loaded models go on. Returns what was done, for people."""
        return await asyncio.to_thread(self._catalogue.clear_ramdisk)


def _describe_replacement(name: str) -> ModelLoading:
    return ModelLoading(f"The file of the model {name!r} has just been replaced; try again.")


async def _embed(engine: EmbeddingEngine, texts: list[str], *, is_probe: bool = False) -> np.ndarray:
    prepared = raise_refusals(await engine.prepare(texts, Truncation.RIGHT))
    return np.stack([outcome.vector for outcome in raise_refusals(await engine.embed(prepared, is_probe=is_probe))])


_Outcome = TypeVar("_Outcome")


def raise_refusals(outcomes: Sequence[_Outcome | ServiceError]) -> list[_Outcome]:
    """The outcomes if all are good; raises the first that is an error."""
    for outcome in outcomes:
        if isinstance(outcome, ServiceError):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]


def _check_similarity(name: str, found: float, expected: float, tolerance: float) -> None:
    if abs(found - expected) > tolerance:
        raise ModelUnusable(
            f"The model {name!r} gave a similarity of {found:.4f} for a pair whose similarity is {expected:.4f}; "
            "its file is not the model it is named after. Delete it, and it is made again."
        )
