"""Embeddings of every token of a text, in their context, and the vector that sums them up.

One row per token of the model's own tokenizer, the special ones included, as the model computed it inside the whole
text, before pooling and normalisation. Kept and found again like the embeddings of texts.
"""

from __future__ import annotations

from embeddings_data_models import (
    NewTokenLevelBundle,
    Recipe,
    RequestStamp,
    StoredTokenLevelBundle,
    Truncation,
    compute_combined_feature_vector,
    utc_now,
)
from llama_embeddings.errors import InvalidInput
from llama_embeddings.inference.engine import EngineResult
from llama_embeddings.services.models import ModelService, raise_refusals
from llama_embeddings.services.single_flight import Flight, SingleFlight
from llama_embeddings.services.texts import TextLimits, check_texts
from llama_embeddings.storage.store import EmbeddingStore

# What a token-level recipe does instead of pooling and scaling to unit length.
TOKEN_LEVEL = "tokens"  # noqa: S105 - not a password

_Key = tuple[str, str, str, Truncation]


class TokenEmbeddingService:
    """The one way to token embeddings."""

    def __init__(
        self, store: EmbeddingStore, models: ModelService, *, limits: TextLimits, default_truncation: Truncation
    ) -> None:
        self._store = store
        self._models = models
        self._limits = limits
        self._default_truncation = default_truncation
        self._flights: SingleFlight[_Key, StoredTokenLevelBundle] = SingleFlight()

    async def get_or_compute(
        self,
        text: str,
        *,
        model_name: str | None = None,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
    ) -> StoredTokenLevelBundle:
        """The token embeddings of a text. Raises what EmbeddingService.get_or_compute raises for one text."""
        [text_hash] = check_texts([text], self._limits)
        chosen = truncation or self._default_truncation
        name = self._models.resolve(model_name)
        pooled = await self._models.recipe(model_name)
        recipe = Recipe(pooled.model_digest, TOKEN_LEVEL, pooled.prompt, normalisation="none")
        key = (text_hash, name, recipe.family, chosen)

        async def fly(flight: Flight[_Key, StoredTokenLevelBundle]) -> dict[_Key, StoredTokenLevelBundle]:
            return {key: await self._find_or_compute(text, key, recipe, stamp or RequestStamp(), flight)}

        try:
            return (await self._flights.run([key], fly))[key]
        except InvalidInput as error:
            raise error.located(field="text", index=None) from None

    async def _find_or_compute(
        self, text: str, key: _Key, recipe: Recipe, stamp: RequestStamp, flight: Flight[_Key, StoredTokenLevelBundle]
    ) -> StoredTokenLevelBundle:
        text_hash, name, family, truncation = key
        found = await self._store.find_token_level_bundle(text_hash, name, family)
        if found is not None:
            return found
        async with self._models.lease(name) as engine:
            [prepared] = raise_refusals(await engine.prepare([text], truncation))
            if not prepared.is_whole:
                family = recipe.for_cut_text(truncation, engine.info.window)
                found = await self._store.find_token_level_bundle(text_hash, name, family)
                if found is not None:
                    return found
            [result] = raise_refusals(await engine.embed([prepared], wants_rows=True))
        bundle = _make_bundle(text, text_hash, name, family, result, stamp)
        flight.make_final()
        row_id = await self._store.add_token_level_bundle(bundle)
        return StoredTokenLevelBundle(
            row_id, text_hash, bundle.tokens, bundle.matrix, bundle.feature_vector, bundle.n_tokens_dropped
        )

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
