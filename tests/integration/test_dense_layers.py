"""Two dense layers after the pooling, as embeddinggemma has: llama.cpp puts them on every token, we pool afterwards.

They are linear, so the mean of their outputs is their output for the mean. That holds for pooling by mean, which is
all that such models use.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embeddings_data_models import Truncation
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult
from llama_embeddings.inference.llama_backend import LlamaBackend
from llama_embeddings.inference.pooling import normalise
from tests.tiny_models import write_tiny_model

ARCHITECTURE = "gemma-embedding"
N_DIMS, N_BETWEEN = 64, 128
TEXTS = ["hello world", "the cat sat on the mat", "cold"]
LIMITS = BatcherLimits(
    n_workers=1,
    n_threads_per_worker=1,
    token_budget=256,
    n_threads_for_lone_text=1,
    max_texts_in_flight=16,
    max_queued_tokens=10_000,
)


async def embed(path: Path) -> list[EngineResult]:
    check_gguf(path)
    model = LlamaBackend().load(path, name=path.stem, digest="", max_window=512, pooling=None)
    engine = EmbeddingEngine(model, LIMITS)
    try:
        results = await engine.embed(await engine.prepare(TEXTS, Truncation.REFUSE), wants_rows=True)  # type: ignore[arg-type]
    finally:
        engine.close()
    assert all(isinstance(result, EngineResult) for result in results)
    return results  # type: ignore[return-value]


async def test_vectors_have_gone_through_the_dense_layers(tmp_path: Path) -> None:
    """Beside the same model without them, whose means are put through them here."""
    random = np.random.default_rng(1)
    first = (random.standard_normal((N_BETWEEN, N_DIMS)) / np.sqrt(N_DIMS)).astype(np.float32)
    second = (random.standard_normal((N_DIMS, N_BETWEEN)) / np.sqrt(N_BETWEEN)).astype(np.float32)
    sizes = {"dense_2_feat_in": N_DIMS, "dense_2_feat_out": N_BETWEEN}
    sizes |= {"dense_3_feat_in": N_BETWEEN, "dense_3_feat_out": N_DIMS}
    dense = write_tiny_model(
        tmp_path / "dense.gguf",
        ARCHITECTURE,
        metadata={f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()},
        tensors={"dense_2.weight": first, "dense_3.weight": second},
    )
    plain = write_tiny_model(tmp_path / "plain.gguf", ARCHITECTURE)
    for without, found in zip(await embed(plain), await embed(dense), strict=True):
        assert without.rows is not None
        expected = normalise(without.rows.mean(axis=0, keepdims=True) @ first.T @ second.T)[0]
        assert float(expected @ found.vector) > 0.99999
        assert float(without.vector @ found.vector) < 0.9
