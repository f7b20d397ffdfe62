"""The index over token embeddings: which texts hold a token close to a given one.

Of the same kind as the index over texts, under families of its own. A row of it is one token: its id is made of the
bundle's row id and the token's place, so that nothing has to be kept for it beside the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embeddings_data_models import StoredTokenLevelBundle, recipe_family
from llama_embeddings.services.indexing import IndexService
from llama_embeddings.storage.changes import CommittedBundle
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.storage.writes import RemovedBundle
from llama_embeddings.vectors.index import Key

PREFIX = "tokens/"
PLACES_PER_BUNDLE = 1 << 20
"""More than any window has tokens."""
BUNDLES_PER_READ = 512
TOKENS_PER_QUERY_TOKEN = 32


class TokenVectors:
    """Where IndexService finds token embeddings, scaled to unit length. See VectorSource."""

    prefix = PREFIX

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self.find_snapshot_number = store.find_snapshot_number
        self.put_snapshot_number = store.put_snapshot_number

    async def read_last_id(self) -> int:
        """The last possible id of a token of the last bundle there ever was."""
        return (await self._store.find_last_bundle_id_ever() + 1) * PLACES_PER_BUNDLE - 1

    async def keys(self) -> list[Key]:
        """Every model and token-level recipe family with rows."""
        groups = await self._store.token_bundle_groups()
        return sorted({(model_name, PREFIX + recipe_family(recipe)) for model_name, recipe in groups})

    async def read_row_ids(self, model_name: str, family: str) -> np.ndarray:
        """Ids of all tokens: int64 (n,), ascending."""
        sizes = [
            size
            for name, recipe in await self._store.token_bundle_groups()
            if (name, PREFIX + recipe_family(recipe)) == (model_name, family)
            for size in await self._store.read_bundle_sizes(name, recipe)
        ]
        return np.concatenate([np.empty(0, np.int64), *(make_ids(*size) for size in sorted(sizes))])

    async def read_vectors(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 (m,) and unit vectors float32 (m, n_dims) of those tokens whose bundles are there."""
        bundle_ids = np.unique(row_ids // PLACES_PER_BUNDLE)
        ids, vectors = [np.empty(0, np.int64)], []
        for start in range(0, len(bundle_ids), BUNDLES_PER_READ):
            part: list[int] = bundle_ids[start : start + BUNDLES_PER_READ].tolist()
            for bundle_id, matrix in await self._store.read_bundle_matrices(part):
                wanted = row_ids[row_ids // PLACES_PER_BUNDLE == bundle_id]
                wanted = wanted[wanted % PLACES_PER_BUNDLE < len(matrix)]
                ids.append(wanted)
                vectors.append(scale_rows(matrix[wanted % PLACES_PER_BUNDLE]))
        return np.concatenate(ids), np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)


class TokenIndex:
    """Adds, removes and finds texts by their tokens."""

    def __init__(self, store: EmbeddingStore, index: IndexService) -> None:
        self._store = store
        self._index = index

    def add(self, model_name: str, recipe: str, bundle: StoredTokenLevelBundle | CommittedBundle) -> None:
        """Let a committed bundle be found by its tokens."""
        family = PREFIX + recipe_family(recipe)
        ids = make_ids(bundle.row_id, len(bundle.matrix))
        self._index.add(model_name, family, ids, scale_rows(bundle.matrix))

    async def remove(self, removed: Sequence[RemovedBundle]) -> None:
        """Let deleted bundles not be found any more."""
        rows = [
            (model_name, PREFIX + recipe, row_id)
            for model_name, recipe, bundle_id, n_tokens in removed
            for row_id in make_ids(bundle_id, n_tokens).tolist()
        ]
        await self._index.remove(rows)

    async def find_texts(self, model_name: str, family: str, query: np.ndarray, *, n_texts: int) -> list[str]:
        """Hashes of up to `n_texts` texts with tokens near those of a query, float32 (n, n_dims) unit rows, best first.

        A text's score is the sum of its best cosine for each token of the query, as far as the index's nearest show it.
        """
        scores: dict[int, float] = {}
        for ids, cosines in await self._index.find_candidates(
            model_name, PREFIX + family, query, TOKENS_PER_QUERY_TOKEN
        ):
            best: dict[int, float] = {}
            for bundle_id, cosine in zip((ids // PLACES_PER_BUNDLE).tolist(), cosines.tolist(), strict=True):
                best.setdefault(bundle_id, cosine)
            for bundle_id, cosine in best.items():
                scores[bundle_id] = scores.get(bundle_id, 0.0) + cosine
        nearest = sorted(scores, key=lambda bundle_id: -scores[bundle_id])[:n_texts]
        hashes = await self._store.find_hashes_of_bundles(nearest)
        return list(dict.fromkeys(hashes[bundle_id] for bundle_id in nearest if bundle_id in hashes))


def make_ids(bundle_id: int, n_tokens: int) -> np.ndarray:
    """Ids of a bundle's tokens, int64 (n_tokens,)."""
    return np.arange(n_tokens, dtype=np.int64) + bundle_id * PLACES_PER_BUNDLE


def scale_rows(matrix: np.ndarray) -> np.ndarray:
    """Rows of float32 (n, d) scaled to unit length; rows of zeros stay."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    scaled: np.ndarray = matrix / np.where(norms > 0.0, norms, np.float32(1.0))
    return scaled
