"""A backend for tests of everything around the engine: instant, deterministic, no model file needed.

Token ids are UTF-8 bytes plus two special tokens. Every row depends on its token and on all tokens of
its text, as in a real model, and never on its neighbours in the batch. It is chosen only by passing it to
`create_app`; no setting names it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_embeddings.errors import InferenceFailed
from llama_embeddings.inference.backend import ModelInfo, PairFrame, Pooling

OPENING_TOKEN = 256
CLOSING_TOKEN = 257
N_VOCABULARY = 258


class FakeContext:
    """Computes rows from a fixed random table."""

    max_sequences = 64

    def __init__(self, backend: FakeBackend, info: ModelInfo) -> None:
        self._backend = backend
        self._info = info
        self.max_tokens = max(info.window, 512)
        self._table = np.random.default_rng(7).standard_normal((N_VOCABULARY, info.n_dims)).astype(np.float32)

    def compute(self, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
        """See Context.compute; fails where the backend was told to."""
        self._backend.note_pass(sequences, n_threads)
        parts = []
        for sequence in sequences:
            rows = self._table[sequence]
            places = np.arange(1, len(sequence) + 1, dtype=np.float32)[:, None]
            whole = (rows * places).mean(axis=0)
            parts.append(rows + np.float32(0.1) * whole)
        if self._info.pooling is Pooling.RANK:
            return np.stack([part.mean(axis=0)[:1] for part in parts])
        return np.concatenate(parts)

    def close(self) -> None:
        self._backend.n_open_contexts -= 1


class FakeModel:
    """A byte-level model of a given size."""

    def __init__(self, backend: FakeBackend, info: ModelInfo) -> None:
        self._backend = backend
        self.info = info

    def tokenize(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def token_texts(self, tokens: np.ndarray) -> list[str]:
        names = {OPENING_TOKEN: "[CLS]", CLOSING_TOKEN: "[SEP]"}
        return [names.get(int(token)) or bytes([int(token)]).decode("latin-1") for token in tokens]

    def token_spans(self, text: str) -> list[tuple[int, int] | None]:
        return [(place, place + 1) for place in range(len(text.encode("utf-8")))]

    def frame_query(self, query: str) -> PairFrame:
        head = np.array([OPENING_TOKEN, *self.tokenize(query), CLOSING_TOKEN], dtype=np.int32)
        return PairFrame(head, np.array([CLOSING_TOKEN], dtype=np.int32))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < OPENING_TOKEN).decode("utf-8", "replace")

    def open_context(self) -> FakeContext:
        self._backend.n_open_contexts += 1
        return FakeContext(self._backend, self.info)

    def close(self) -> None:
        self._backend.n_open_models -= 1


class FakeBackend:
    """Loads nothing; counts passes and fails or dawdles on demand."""

    def __init__(self, *, n_dims: int = 16, seconds_per_pass: float = 0.0) -> None:
        self.n_dims = n_dims
        self.seconds_per_pass = seconds_per_pass
        self.n_open_contexts = 0
        self.n_open_models = 0
        self.passes: list[list[int]] = []
        self.threads_of_passes: list[int] = []
        self.fail_when_more_than: int | None = None
        self.failing_token: int | None = None
        self.gate = threading.Event()
        self.gate.set()

    def load(self, path: Path, *, name: str, digest: str, max_window: int, pooling: Pooling | None) -> FakeModel:
        self.n_open_models += 1
        info = ModelInfo(
            name=name,
            architecture="fake",
            n_dims=self.n_dims,
            window=min(512, max_window),
            trained_window=512,
            pooling=pooling or Pooling.MEAN,
            is_causal=False,
            prefix_tokens=(OPENING_TOKEN,),
            suffix_tokens=(CLOSING_TOKEN,),
            n_vocabulary=N_VOCABULARY,
            digest=digest,
            size_in_bytes=0,
        )
        return FakeModel(self, info)

    def note_pass(self, sequences: Sequence[np.ndarray], n_threads: int) -> None:
        """Keep what was asked, wait where told to, fail where told to."""
        self.gate.wait()
        if self.seconds_per_pass:
            time.sleep(self.seconds_per_pass)
        self.passes.append([len(sequence) for sequence in sequences])
        self.threads_of_passes.append(n_threads)
        if self.fail_when_more_than is not None and len(sequences) > self.fail_when_more_than:
            raise InferenceFailed("told to fail")
        if self.failing_token is not None and any((sequence == self.failing_token).any() for sequence in sequences):
            raise InferenceFailed("told to fail")
