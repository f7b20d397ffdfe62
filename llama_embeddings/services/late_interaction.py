"""Orders search hits by late interaction: every token of the query against every token of a text.

The hits come from the search by vectors and from an index over token embeddings, which finds texts that hold a token
close to one of the query's even where the texts as a whole are far apart. Their MaxSim is then computed exactly, from
token embeddings that are kept and found again like all others. The index holds the texts whose tokens are stored: those
asked for at the token-level endpoint, and those that an earlier late interaction compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embeddings_data_models import InputType, RequestStamp, StoredTokenLevelBundle, Truncation
from llama_embeddings.services.search import SearchHit, SearchOptions, SearchScope, SearchService
from llama_embeddings.services.token_embeddings import TokenEmbeddingService
from llama_embeddings.services.token_index import TokenIndex, scale_rows

CANDIDATES_PER_HIT = 4
MIN_CANDIDATES = 40
MAX_CANDIDATES = 400


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """A token of the query and the token of the text that is nearest to it, with their cosine."""

    query_token: str
    text_token: str
    similarity: float


@dataclass(frozen=True, slots=True)
class LateInteractionHit:
    """A stored text with its MaxSim: the mean of its matches' similarities."""

    hit: SearchHit
    maxsim: float
    matches: tuple[TokenMatch, ...]


class LateInteractionService:
    """Queries in, stored texts out, ordered by MaxSim."""

    def __init__(self, search: SearchService, token_embeddings: TokenEmbeddingService, token_index: TokenIndex) -> None:
        self._search = search
        self._token_embeddings = token_embeddings
        self._token_index = token_index

    async def search(
        self,
        query_text: str,
        options: SearchOptions,
        *,
        truncation: Truncation | None = None,
        stamp: RequestStamp | None = None,
    ) -> list[LateInteractionHit]:
        """The texts with the highest MaxSim among the candidates, best first."""
        scope = await self._search.open_scope(query_text, options, truncation=truncation, stamp=stamp)
        n_candidates = min(max(CANDIDATES_PER_HIT * options.count, MIN_CANDIDATES), max(MAX_CANDIDATES, options.count))
        hits, asked = await asyncio.gather(
            self._search.search_scope(scope, n_candidates), self._get_query_tokens(scope, stamp)
        )
        near = await self._find_by_tokens(scope, asked, {hit.text for hit in hits})
        scored = await self.score(asked, [*hits, *near], model_name=options.model_name, stamp=stamp)
        return sorted(scored, key=lambda found: -found.maxsim)[: options.count]

    async def _get_query_tokens(self, scope: SearchScope, stamp: RequestStamp | None) -> StoredTokenLevelBundle:
        [answer] = await self._token_embeddings.get_or_compute_all(
            [scope.query_text],
            model_name=scope.options.model_name,
            input_type=InputType.QUERY,
            truncation=Truncation.RIGHT,
            stamp=stamp,
            must_keep=False,
        )
        return answer.bundle

    async def _find_by_tokens(
        self, scope: SearchScope, asked: StoredTokenLevelBundle, known: set[str]
    ) -> list[SearchHit]:
        """Texts that hold a token close to one of the query's, and that the search by vectors did not find."""
        family = await self._token_embeddings.find_family(scope.options.model_name, InputType.DOCUMENT)
        hashes = await self._token_index.find_texts(
            scope.model_name, family, scale_rows(asked.matrix), n_texts=MIN_CANDIDATES
        )
        return [hit for hit in await self._search.find_hits(scope, hashes) if hit.text not in known]

    async def score(
        self,
        asked: StoredTokenLevelBundle,
        hits: Sequence[SearchHit],
        *,
        model_name: str | None = None,
        stamp: RequestStamp | None = None,
    ) -> list[LateInteractionHit]:
        """The MaxSim of each hit with the query's tokens, in the order of the hits."""
        if not hits:
            return []
        answers = await self._token_embeddings.get_or_compute_all(
            [hit.text for hit in hits],
            model_name=model_name,
            input_type=InputType.DOCUMENT,
            truncation=Truncation.RIGHT,
            stamp=stamp,
            must_keep=False,
        )
        return await asyncio.to_thread(_score_all, asked, hits, [answer.bundle for answer in answers])


def _score_all(
    asked: StoredTokenLevelBundle, hits: Sequence[SearchHit], bundles: Sequence[StoredTokenLevelBundle]
) -> list[LateInteractionHit]:
    query = scale_rows(asked.matrix)
    return [_score(query, asked.tokens, hit, bundle) for hit, bundle in zip(hits, bundles, strict=True)]


def _score(
    query: np.ndarray, query_tokens: Sequence[str], hit: SearchHit, bundle: StoredTokenLevelBundle
) -> LateInteractionHit:
    cosines = query @ scale_rows(bundle.matrix).T
    nearest = cosines.argmax(axis=1)
    best = cosines[np.arange(len(query)), nearest]
    matches = tuple(
        TokenMatch(token, bundle.tokens[place], float(cosine))
        for token, place, cosine in zip(query_tokens, nearest, best, strict=True)
    )
    return LateInteractionHit(hit, float(np.clip(best.mean(), -1.0, 1.0)), matches)
