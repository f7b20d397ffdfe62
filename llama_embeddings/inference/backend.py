"""The seam between the engine and what computes: three small protocols and the facts about a model.

`llama_backend` is the real implementation, `fake_backend` the fast one for tests. Nothing here knows
queues, texts in flight or asyncio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np


class Pooling(StrEnum):
    """How one vector is made of a text's token embeddings."""

    NONE = "none"
    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    RANK = "rank"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine and the callers have to know about a loaded model.

    `window` counts all tokens of a text, the special ones included. `prefix_tokens` and `suffix_tokens`
    are the special tokens that the model's tokenizer puts around every text. `is_causal` models
    are decoders: they keep a cache between tokens of one pass.
    """

    name: str
    architecture: str
    n_dims: int
    window: int
    trained_window: int
    pooling: Pooling
    is_causal: bool
    prefix_tokens: tuple[int, ...]
    suffix_tokens: tuple[int, ...]
    n_vocabulary: int
    digest: str
    size_in_bytes: int
    warnings: tuple[str, ...] = ()
    scores_are_probabilities: bool = False
    """Whether a reranker's score lies in [0, 1] as the model gives it, so that no sigmoid is due."""

    @property
    def room_for_text(self) -> int:
        """Tokens of a text that fit beside the special ones."""
        return self.window - len(self.prefix_tokens) - len(self.suffix_tokens)


@dataclass(frozen=True, slots=True)
class PairFrame:
    """Token ids, int32 (n,), before and after a document whose answer to one query is scored.

    `lead` and `trail` are what stands between them and the document's own characters, to be tokenised with it.
    """

    head: np.ndarray
    tail: np.ndarray
    lead: str = ""
    trail: str = ""


class Context(Protocol):
    """One place to compute in. It belongs to one thread at a time."""

    max_tokens: int
    max_sequences: int

    def compute(self, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
        """Run int32 (n_i,) token ids, each sequence for itself, in one pass.

        Returns float32 (sum of n_i, n_dims), one row per token in order; for a model with pooling RANK
        float32 (number of sequences, n_outputs). The array is a view that the next call overwrites.
        Raises InferenceFailed.
        """
        ...

    def close(self) -> None: ...


class LoadedModel(Protocol):
    """A model in memory: its facts, its tokenizer, and contexts to compute in. Tokenising is thread-safe."""

    info: ModelInfo

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids of a text without the special tokens around it, int32 (n,)."""
        ...

    def token_texts(self, tokens: np.ndarray) -> list[str]:
        """What each token stands for, as readable text."""
        ...

    def token_spans(self, text: str) -> list[tuple[int, int] | None]:
        """Where each token of `tokenize(text)` stands, in bytes of UTF-8; None where that cannot be told."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids of the vocabulary, special tokens left out."""
        ...

    def frame_query(self, query: str) -> PairFrame:
        """What a reranker reads around a document to score it against `query`."""
        ...

    def open_context(self) -> Context: ...

    def close(self) -> None:
        """Free the model as soon as no call and no context uses it; calls that come later raise ModelLoading."""
        ...


class Backend(Protocol):
    """Loads model files."""

    def load(self, path: Path, *, name: str, digest: str, max_window: int, pooling: Pooling | None) -> LoadedModel:
        """Load a GGUF. `pooling` overrides what the file says. Raises ModelUnusable."""
        ...
