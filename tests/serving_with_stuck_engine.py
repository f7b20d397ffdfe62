"""Runs the real server with an engine whose calls do not return once a text has more than 100 tokens."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import numpy as np

import llama_embeddings_server
from llama_embeddings.inference.llama_backend import LlamaContext

N_TOKENS_THAT_STICK = 100
compute = LlamaContext.compute


def get_stuck(context: LlamaContext, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
    """In a call to C, which no exception and no signal of Python's reaches."""
    if max(map(len, sequences)) > N_TOKENS_THAT_STICK:
        ctypes.CDLL(None).sleep(600)
    return compute(context, sequences, n_threads=n_threads)


if __name__ == "__main__":
    LlamaContext.compute = get_stuck  # type: ignore[method-assign]
    sys.exit(llama_embeddings_server.main())
