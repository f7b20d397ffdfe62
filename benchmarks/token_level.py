"""Time of a 200-token text's matrix against that of its pooled embedding, by the engine in this process.

`python -m benchmarks.token_level MODEL` prints medians as JSON; the two are measured in turn, text by text.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.ceiling import load
from benchmarks.texts import make_texts
from embeddings_data_models import Truncation
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine

LIMITS = BatcherLimits(
    n_workers=2,
    n_threads_per_worker=1,
    token_budget=192,
    n_threads_for_lone_text=2,
    max_texts_in_flight=64,
    max_queued_tokens=100_000,
)


async def measure(path: Path, seed: int, count: int) -> dict[str, float]:
    """Median seconds of both kinds."""
    engine = EmbeddingEngine(load(path), LIMITS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number, text in enumerate(itertools.islice(make_texts(200, seed=seed), count)):
        prepared = await engine.prepare([text], Truncation.RIGHT)
        for wants_rows in (number % 2 == 0, number % 2 == 1):
            started = time.perf_counter()
            await engine.embed(prepared, wants_rows=wants_rows)
            seconds[wants_rows].append(time.perf_counter() - started)
    await asyncio.to_thread(engine.close)
    return {"pooled_seconds": float(np.median(seconds[False])), "rows_seconds": float(np.median(seconds[True]))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments.model, arguments.seed, arguments.count))))


if __name__ == "__main__":
    main()
