"""Embeddings of every token of a text, in their context, and the vector that sums them up.

One row per token of the model's own tokenizer, the special ones included, as the model computed it inside the whole
text, before pooling and normalisation. Kept and found again like the embeddings of texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embeddings_data_models import (
    InputType,
    NewTokenLevelBundle,
    Recipe,
    RequestStamp,
    StoredTokenLevelBundle,
    Truncation,
    compute_combined_feature_vector,
    utc_now,
)
from llama_embeddings.errors import ServiceError
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.pooling import pool_rows
from llama_embeddings.observability import TimedStore, note_engine
from llama_embeddings.services.embeddings import Source
from llama_embeddings.services.known_texts import OF_TOKENS, KnownTexts
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.single_flight import Flight, SingleFlight
from llama_embeddings.services.texts import TextLimits, check_texts, place_of
from llama_embeddings.services.token_index import TokenIndex
from llama_embeddings.storage.store import EmbeddingStore

# What a token-level recipe does instead of pooling and scaling to unit length.
TOKEN_LEVEL = "tokens"  # noqa: S105 - not a password

_Key = tuple[str, str, str, Truncation]


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """One text's token embeddings and how they came about; see StoredTokenLevelBundle."""

    bundle: StoredTokenLevelBundle
    source: Source
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def matrix(self) -> np.ndarray:
        return self.bundle.matrix

    @property
    def n_tokens(self) -> int:
        return len(self.bundle.tokens)

    @property
    def n_tokens_dropped(self) -> int:
        return self.bundle.n_tokens_dropped


_Outcome = TokenAnswer | ServiceError


class TokenEmbeddingService:
    """The one way to token embeddings."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        index: TokenIndex,
        known: KnownTexts,
        *,
        limits: TextLimits,
        default_truncation: Truncation,
    ) -> None:
        self._store = store
        self._index = index
        self._known = known
        self._models = models
        self._limits = limits
        self._default_truncation = default_truncation
        self._flights: SingleFlight[_Key, _Outcome] = SingleFlight()

    async def get_or_compute(
        self,
        text: str,
        *,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
    ) -> TokenAnswer:
        """The token embeddings of a text. Raises what EmbeddingService.get_or_compute raises for one text."""
        [answer] = await self.get_or_compute_all([text], model_name=model_name, truncation=truncation, stamp=stamp)
        return answer

    async def get_or_compute_all(
        self,
        texts: Sequence[str],
        *,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        input_type: InputType | None = None,
        stamp: RequestStamp | None = None,
        field: str = "text",
        must_keep: bool = True,
    ) -> list[TokenAnswer]:
        """The token embeddings of all texts, in order; what is not stored is computed together.

        A replica computes them only for callers who need not have them kept.

        Raises the first text's error with its index, after the others have been computed and kept.
        """
        hashes = check_texts(texts, self._limits, field=field)
        chosen = truncation or self._default_truncation
        name = self._models.resolve(model_name)
        recipe = await self._make_recipe(model_name, input_type)
        keys = [(text_hash, name, recipe.family, chosen) for text_hash in hashes]
        wanted = dict(zip(keys, texts, strict=True))

        async def fly(flight: Flight[_Key, _Outcome]) -> dict[_Key, _Outcome]:
            mine = {key: wanted[key] for key in flight.keys}
            return await self._find_or_compute(mine, recipe, stamp or RequestStamp(), flight, must_keep=must_keep)

        outcomes = await self._flights.run(list(wanted), fly)
        answers = []
        for index, key in enumerate(keys):
            outcome = outcomes[key]
            if isinstance(outcome, ServiceError):
                place_name, place = place_of(field, index, len(texts))
                raise outcome.located(field=place_name, index=place)
            answers.append(outcome)
        return answers

    async def find_family(self, model_name: str | None, input_type: InputType | None = None) -> str:
        """What the recipes of comparable token embeddings have in common."""
        return (await self._make_recipe(model_name, input_type)).family

    async def _make_recipe(self, model_name: str | None, input_type: InputType | None) -> Recipe:
        pooled = await self._models.recipe(model_name, input_type)
        return Recipe(pooled.model_digest, TOKEN_LEVEL, pooled.prompt, normalisation="none")

    async def _find_or_compute(
        self,
        texts: dict[_Key, str],
        recipe: Recipe,
        stamp: RequestStamp,
        flight: Flight[_Key, _Outcome],
        *,
        must_keep: bool,
    ) -> dict[_Key, _Outcome]:
        outcomes: dict[_Key, _Outcome] = {}
        for key in texts:
            found = await self._find(key, key[2])
            if found is not None:
                outcomes[key] = found
        missing = {key: text for key, text in texts.items() if key not in outcomes}
        if missing:
            if must_keep:
                self._store.require_writer()
            async with self._models.lease(next(iter(missing))[1], recipe) as engine:
                outcomes |= await self._compute(engine, missing, recipe, stamp, flight)
        return outcomes

    async def _find(self, key: _Key, family: str) -> TokenAnswer | None:
        if not self._known.may_hold(key[0], OF_TOKENS):
            return None
        with TimedStore():
            bundle = await self._store.find_token_level_bundle(key[0], key[1], family)
        return TokenAnswer(bundle, Source.STORE) if bundle is not None else None

    async def _compute(
        self,
        engine: EmbeddingEngine,
        texts: dict[_Key, str],
        recipe: Recipe,
        stamp: RequestStamp,
        flight: Flight[_Key, _Outcome],
    ) -> dict[_Key, _Outcome]:
        outcomes: dict[_Key, _Outcome] = {}
        ready: dict[_Key, PreparedText] = {}
        truncation = next(iter(texts))[3]
        cut_family = recipe.for_cut_text(truncation, engine.info.window)
        prompted = [recipe.prompt + text for text in texts.values()]
        for key, prepared in zip(texts, await engine.prepare(prompted, truncation), strict=True):
            if isinstance(prepared, ServiceError):
                outcomes[key] = prepared
                continue
            found = None if prepared.is_whole else await self._find(key, cut_family)
            if found is None:
                ready[key] = prepared
            else:
                outcomes[key] = found
        results = dict(zip(ready, await engine.embed(list(ready.values()), wants_rows=True), strict=True))
        flight.make_final()
        kept = [
            self._keep(texts[key], key, recipe.family if ready[key].is_whole else cut_family, result, stamp)
            for key, result in results.items()
        ]
        return outcomes | dict(zip(results, await asyncio.gather(*kept), strict=True))

    async def _keep(
        self, text: str, key: _Key, family: str, result: EngineResult | ServiceError, stamp: RequestStamp
    ) -> _Outcome:
        """Commit one bundle and index it; a replica only hands it on."""
        if isinstance(result, ServiceError):
            return result
        bundle = _make_bundle(text, key[0], key[1], family, result, stamp)
        row_id = 0
        if not self._store.is_replica:
            with TimedStore():
                row_id = await self._store.add_token_level_bundle(bundle)
        stored = StoredTokenLevelBundle(
            row_id, key[0], bundle.tokens, bundle.matrix, bundle.feature_vector, bundle.n_tokens_dropped
        )
        if not self._store.is_replica:
            self._known.add([key[0]], OF_TOKENS)
            self._index.add(key[1], family, stored)
        note_engine(queue_seconds=result.queue_seconds, compute_seconds=result.compute_seconds)
        return TokenAnswer(stored, Source.COMPUTED, result.queue_seconds, result.compute_seconds)

    async def pool(self, answers: Sequence[TokenAnswer], model_name: str | None) -> list[np.ndarray]:
        """One vector per answer as the model pools, float32 (n_dims,), not scaled to unit length."""
        pooling = (await self._models.info(model_name)).pooling
        return [pool_rows(answer.matrix, [len(answer.matrix)], pooling)[0] for answer in answers]

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait until everything under way is committed; what takes longer is given up, unless it is being committed."""
        await self._flights.drain(timeout_seconds=timeout_seconds)


def _make_bundle(
    text: str, text_hash: str, name: str, recipe: str, result: EngineResult, stamp: RequestStamp
) -> NewTokenLevelBundle:
    assert result.rows is not None
    return NewTokenLevelBundle(
        text=text,
        text_hash=text_hash,
        model_name=name,
        recipe=recipe,
        tokens=result.tokens,
        matrix=result.rows,
        feature_vector=compute_combined_feature_vector(result.rows),
        n_tokens_dropped=result.n_tokens_dropped,
        stamp=stamp,
        response_time=utc_now(),
    )
