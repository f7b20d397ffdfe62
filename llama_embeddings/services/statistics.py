"""What the parts count, gathered when somebody asks: nothing is counted here, and nothing is asked for in between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llama_embeddings.errors import ServiceError
from llama_embeddings.inference.engine import EmbeddingEngine
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.services.memory_cache import EmbeddingMemoryCache
from llama_embeddings.services.models import ModelService
from llama_embeddings.storage.store import EmbeddingStore, StoreStatistics


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Of one loaded model, counted since it was loaded. Seconds are summed over texts or passes."""

    model_name: str
    n_queued_texts: int
    n_queued_tokens: int
    n_passes: int
    n_texts: int
    n_tokens: int
    n_failed_texts: int
    n_skipped_texts: int
    queue_seconds: float
    compute_seconds: float
    tokens_per_second: float
    has_failed: bool


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """`store` is None while the database cannot be read."""

    engines: tuple[EngineStatistics, ...]
    n_models_by_state: dict[str, int]
    n_answers_by_source: dict[str, int]
    n_cached_embeddings: int
    n_cached_bytes: int
    n_indexed_by_model: dict[str, int]
    store: StoreStatistics | None
    n_store_bytes: int


class StatisticsService:
    """Figures of all parts."""

    def __init__(
        self,
        store: EmbeddingStore,
        models: ModelService,
        embeddings: EmbeddingService,
        index: IndexService,
        memory: EmbeddingMemoryCache,
    ) -> None:
        self._store = store
        self._models = models
        self._embeddings = embeddings
        self._index = index
        self._memory = memory

    async def collect(self) -> ServerStatistics:
        """The figures of this moment. Does not fail because a part does."""
        described = await self._models.describe()
        n_indexed: Counter[str] = Counter()
        for (model_name, _), size in self._index.sizes().items():
            n_indexed[model_name] += size
        return ServerStatistics(
            engines=tuple(_describe(engine) for engine in self._models.engines()),
            n_models_by_state=dict(Counter(str(model.state) for model in described)),
            n_answers_by_source={str(source): count for source, count in self._embeddings.n_answers.items()},
            n_cached_embeddings=len(self._memory),
            n_cached_bytes=self._memory.n_bytes,
            n_indexed_by_model=dict(n_indexed),
            store=await self._read_store(),
            n_store_bytes=self._store.size_in_bytes(),
        )

    async def _read_store(self) -> StoreStatistics | None:
        try:
            return await self._store.statistics()
        except ServiceError:
            return None


def _describe(engine: EmbeddingEngine) -> EngineStatistics:
    batcher, counters = engine.batcher, engine.batcher.counters
    return EngineStatistics(
        model_name=engine.info.name,
        n_queued_texts=batcher.n_queued_texts,
        n_queued_tokens=batcher.n_queued_tokens,
        n_passes=counters.n_passes,
        n_texts=counters.n_texts,
        n_tokens=counters.n_tokens,
        n_failed_texts=counters.n_failed_texts,
        n_skipped_texts=counters.n_skipped_texts,
        queue_seconds=counters.queue_seconds,
        compute_seconds=counters.compute_seconds,
        tokens_per_second=batcher.tokens_per_second,
        has_failed=engine.has_failed,
    )
