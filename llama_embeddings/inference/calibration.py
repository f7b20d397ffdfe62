"""Finds out how a model computes fastest on this machine: contexts, threads and tokens per pass.

Attention over a packed pass grows with the square of its tokens, so that small passes win for small models, and
large ones lose less to overheads; contexts of one thread side by side beat one context of many threads for
small models, not for all. Neither is known before it is measured, and measuring takes a second or two.
Does not decide when to measure or where to keep the result; `model_cache` does that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llama_embeddings.inference.backend import Context
from llama_embeddings.inference.tiles import TILE

logger = logging.getLogger(__name__)

# Two fill one of attention's tiles, as the batcher puts texts together: see `tiles`.
TOKENS_PER_TEXT = TILE // 2
# Measured in this order, as long as there is time: the likeliest first.
BUDGET_ORDER = (192, 128, 256, 384, 512)
# A budget, or a number of threads, must beat the best so far by this factor, so that noise does not decide.
MIN_GAIN = 1.03
# So much for a layout of fewer contexts with more threads: threads that wait for each other lose most of their speed
# as soon as another process wants a core, which a quiet measurement does not show.
MIN_GAIN_OF_SHARED_CONTEXT = 1.15
# A measurement that was disturbed is too slow, never too fast, so the best of these counts.
N_MEASUREMENTS = 2

_Candidate = TypeVar("_Candidate")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fastest way found. `tokens_per_second` is what it reached, 0 if nothing was measured."""

    n_workers: int
    n_threads_per_worker: int
    token_budget: int
    n_threads_for_lone_text: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Layout:
    """So many contexts side by side, each computing on so many threads."""

    n_workers: int
    n_threads: int


def candidate_layouts(n_cores: int) -> list[Layout]:
    """From one thread per context to all threads on one, halving the contexts at each step."""
    layouts = [Layout(n_cores, 1)]
    n_workers = n_cores // 2
    while n_workers >= 1:
        layouts.append(Layout(n_workers, n_cores // n_workers))
        n_workers //= 2
    return layouts


def calibrate(
    open_context: Callable[[], Context],
    *,
    n_vocabulary: int,
    n_cores: int,
    seconds: float,
    window: int = TOKENS_PER_TEXT,
) -> Calibration:
    """Measure layouts, then budgets, then threads for a lone text, for about `seconds` in all.

    No text is longer than `window`: llama.cpp ends the process at a position that a model does not have.
    """
    deadline = time.monotonic() + seconds
    contexts: list[Context] = []
    try:
        for _ in range(n_cores):
            contexts.append(open_context())  # noqa: PERF401 those opened are closed if another cannot be
        return _calibrate_on(_PassTimer(contexts, n_vocabulary, min(window, TOKENS_PER_TEXT)), n_cores, deadline)
    finally:
        for context in contexts:
            context.close()


def _calibrate_on(measure: _PassTimer, n_cores: int, deadline: float) -> Calibration:
    first_budget = BUDGET_ORDER[0]
    measure.tokens_per_second(Layout(n_cores, 1), first_budget)  # warms up memory and caches
    layouts = candidate_layouts(n_cores)
    rates = {layouts[0]: measure.tokens_per_second(layouts[0], first_budget)}
    for layout in layouts[1:]:
        if time.monotonic() < deadline:
            rates[layout] = measure.tokens_per_second(layout, first_budget)
    layout = _choose(rates, MIN_GAIN_OF_SHARED_CONTEXT)
    budgets = {first_budget: rates[layout]}
    for budget in BUDGET_ORDER[1:]:
        if time.monotonic() < deadline and budget <= measure.contexts[0].max_tokens:
            budgets[budget] = measure.tokens_per_second(layout, budget)
    budget = _choose(budgets)
    n_threads = _choose({n: 1.0 / measure.lone_text_seconds(n) for n in sorted({1, n_cores})})
    return Calibration(layout.n_workers, layout.n_threads, budget, n_threads, round(budgets[budget], 1))


def _choose(rates: dict[_Candidate, float], min_gain: float = MIN_GAIN) -> _Candidate:
    """The first candidate, unless a later one is clearly faster than all before."""
    candidates = iter(rates)
    best = next(candidates)
    for candidate in candidates:
        if rates[candidate] > min_gain * rates[best]:
            best = candidate
    return best


class _PassTimer:
    """Runs passes of random tokens and takes the time."""

    def __init__(self, contexts: Sequence[Context], n_vocabulary: int, n_tokens_per_text: int) -> None:
        self.contexts = contexts
        self._n_tokens_per_text = n_tokens_per_text
        self._random = np.random.default_rng(0)
        self._n_vocabulary = n_vocabulary

    def _texts(self, n_tokens: int) -> list[np.ndarray]:
        length = self._n_tokens_per_text
        count = min(max(1, n_tokens // length), self.contexts[0].max_sequences)
        return [self._random.integers(0, self._n_vocabulary, length, dtype=np.int32) for _ in range(count)]

    def tokens_per_second(self, layout: Layout, budget: int) -> float:
        """The best of a few measurements."""
        return max(self._measure_once(layout, budget) for _ in range(N_MEASUREMENTS))

    def _measure_once(self, layout: Layout, budget: int, *, n_passes: int = 2) -> float:
        texts = self._texts(budget)
        contexts = self.contexts[: layout.n_workers]

        def run(context: Context) -> None:
            for _ in range(n_passes):
                context.compute(texts, n_threads=layout.n_threads)

        threads = [threading.Thread(target=run, args=(context,)) for context in contexts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        n_tokens = len(contexts) * n_passes * sum(map(len, texts))
        return n_tokens / (time.perf_counter() - started)

    def lone_text_seconds(self, n_threads: int, *, n_passes: int = 5) -> float:
        texts = self._texts(TOKENS_PER_TEXT)
        seconds = []
        for _ in range(n_passes):
            started = time.perf_counter()
            self.contexts[0].compute(texts, n_threads=n_threads)
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds))
