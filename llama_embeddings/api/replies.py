"""What replies of several dialects share: JSON from arrays, headers that say how an answer came about, other encodings.

Vectors are rendered from the float32 that is stored; no encoding here knows of a request or of a dialect's fields.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from fastapi.responses import Response

from llama_embeddings.errors import InvalidInput
from llama_embeddings.services.downloads import Download
from llama_embeddings.services.embeddings import EmbeddingAnswer, Source
from llama_embeddings.services.rerank import Ranking
from llama_embeddings.services.token_embeddings import TokenAnswer

# What scripts of web pages may read of a reply, where CORS lets them in.
EXPOSED_HEADERS = (
    "x-request-id",
    "x-tokens-used",
    "x-tokens-dropped",
    "x-cache-hits",
    "x-embedding-source",
    "x-queue-seconds",
    "x-compute-seconds",
    "retry-after",
)


def render_json(content: Any, headers: dict[str, str] | None = None) -> Response:
    """JSON with float32 arrays written as they are, in the shortest digits that give the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json", headers=headers)


def render_download(download: Download, headers: dict[str, str] | None = None) -> Response:
    return Response(download.content, media_type=download.media_type, headers={**download.headers, **(headers or {})})


def describe_answers(answers: Sequence[EmbeddingAnswer] | Sequence[TokenAnswer]) -> dict[str, str]:
    """Headers: tokens used and dropped, where the answers came from, time in the queue and in the engine."""
    n_used = n_dropped = n_computed = 0
    queue_seconds = compute_seconds = 0.0
    sources = set()
    for answer in answers:
        n_used += answer.n_tokens
        n_dropped += answer.n_tokens_dropped
        n_computed += answer.source is Source.COMPUTED
        queue_seconds = max(queue_seconds, answer.queue_seconds)
        compute_seconds += answer.compute_seconds
        sources.add(answer.source)
    return {
        "x-tokens-used": str(n_used),
        "x-tokens-dropped": str(n_dropped),
        "x-cache-hits": str(len(answers) - n_computed),
        "x-embedding-source": ",".join(sorted(sources)),
        "x-queue-seconds": f"{queue_seconds:.6f}",
        "x-compute-seconds": f"{compute_seconds:.6f}",
    }


def describe_ranking(ranking: Ranking) -> dict[str, str]:
    """Headers: tokens used and dropped, embeddings found instead of computed, time in the queue and in the engine."""
    return {
        "x-tokens-used": str(ranking.n_tokens),
        "x-tokens-dropped": str(ranking.n_tokens_dropped),
        "x-cache-hits": str(ranking.n_cache_hits),
        "x-queue-seconds": f"{ranking.queue_seconds:.6f}",
        "x-compute-seconds": f"{ranking.compute_seconds:.6f}",
    }


def count_tokens(answers: Sequence[EmbeddingAnswer]) -> int:
    """Tokens that the model read for these answers, now or when they were computed."""
    return sum(answer.n_tokens for answer in answers)


def shorten(vector: np.ndarray, n_dims: int | None, field: str = "dimensions") -> np.ndarray:
    """The first `n_dims` of float32 (n_dims,), scaled to unit length again. Raises InvalidInput if it has fewer."""
    if n_dims is None or n_dims == len(vector):
        return vector
    if n_dims > len(vector):
        raise InvalidInput(f"The model has {len(vector)} dimensions, {n_dims} were asked for.", field=field)
    kept = vector[:n_dims]
    norm = np.linalg.norm(kept)
    return kept / norm if norm else kept


def encode_base64(vector: np.ndarray) -> str:
    """Little-endian float32 bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")


def quantise_int8(vector: np.ndarray) -> np.ndarray:
    """Int8 (n_dims,): the vector times 127 over its largest magnitude, rounded to the nearest.

    Each vector has a scale of its own, which the cosine does not see: compare these by cosine, not by dot product.
    """
    largest = float(np.abs(vector).max())
    return np.rint(vector * (127.0 / largest if largest else 0.0)).astype(np.int8)


def quantise_uint8(vector: np.ndarray) -> np.ndarray:
    """Uint8 (n_dims,): int8 plus 128, so that 128 stands for zero."""
    return (quantise_int8(vector).astype(np.int16) + 128).astype(np.uint8)


def pack_bits(vector: np.ndarray) -> np.ndarray:
    """Uint8 (n_dims / 8,), rounded up: one bit per dimension, set where it is positive, the first one the highest."""
    return np.packbits(vector > 0)


def pack_signed_bits(vector: np.ndarray) -> np.ndarray:
    """Int8 (n_dims / 8,): the same bytes minus 128."""
    return (pack_bits(vector).astype(np.int16) - 128).astype(np.int8)


ENCODINGS: dict[str, Callable[[np.ndarray], Any]] = {
    "float": np.ascontiguousarray,
    "int8": quantise_int8,
    "uint8": quantise_uint8,
    "binary": pack_signed_bits,
    "ubinary": pack_bits,
    "base64": encode_base64,
}
