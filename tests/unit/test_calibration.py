"""Calibration: what it tries, how it chooses, and that it gives back what it opened."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from llama_embeddings.errors import InferenceFailed, ModelUnusable
from llama_embeddings.inference.calibration import (
    BUDGET_ORDER,
    TOKENS_PER_TEXT,
    Layout,
    calibrate,
    candidate_layouts,
)

N_VOCABULARY = 50


class TimedMachine:
    """Contexts whose passes take as long as a formula says, in seconds of tokens and threads."""

    def __init__(
        self, seconds_per_token: float, *, speedup_of_threads: float = 1.0, fixed_seconds: float = 0.0
    ) -> None:
        self.seconds_per_token = seconds_per_token
        self.speedup_of_threads = speedup_of_threads
        self.fixed_seconds = fixed_seconds
        self.n_open = 0
        self.most_open = 0
        self.tokens: list[np.ndarray] = []
        self.fails = False
        self.n_contexts_at_most = 64

    def open_context(self) -> TimedContext:
        if self.n_open == self.n_contexts_at_most:
            raise ModelUnusable("no memory for another")
        self.n_open += 1
        self.most_open = max(self.most_open, self.n_open)
        return TimedContext(self)


class TimedContext:
    max_tokens = 512
    max_sequences = 64

    def __init__(self, machine: TimedMachine) -> None:
        self._machine = machine

    def compute(self, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
        machine = self._machine
        if machine.fails:
            raise InferenceFailed("told to fail")
        machine.tokens.extend(sequences)
        n_tokens = sum(map(len, sequences))
        speedup = machine.speedup_of_threads if n_threads > 1 else 1.0
        time.sleep(machine.fixed_seconds + n_tokens * machine.seconds_per_token / speedup)
        return np.ones((n_tokens, 2), np.float32)

    def close(self) -> None:
        self._machine.n_open -= 1


def test_layouts_halve_the_contexts_and_use_all_cores() -> None:
    """From side by side to one context with everything."""
    assert candidate_layouts(1) == [Layout(1, 1)]
    assert candidate_layouts(2) == [Layout(2, 1), Layout(1, 2)]
    assert candidate_layouts(8) == [Layout(8, 1), Layout(4, 2), Layout(2, 4), Layout(1, 8)]
    assert candidate_layouts(6) == [Layout(6, 1), Layout(3, 2), Layout(1, 6)]


@pytest.mark.parametrize("n_cores", range(1, 65))
def test_no_layout_takes_more_threads_than_there_are_cores(n_cores: int) -> None:
    """Whatever the machine has."""
    for layout in candidate_layouts(n_cores):
        assert layout.n_workers >= 1
        assert layout.n_threads >= 1
        assert layout.n_workers * layout.n_threads <= n_cores


def test_contexts_side_by_side_are_chosen_where_threads_do_not_help() -> None:
    """Two contexts do twice the work of one here, and a second thread only gets in the way."""
    machine = TimedMachine(3e-5, speedup_of_threads=0.25)
    found = calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=2, seconds=2.0)
    assert (found.n_workers, found.n_threads_per_worker, found.n_threads_for_lone_text) == (2, 1, 1)
    # Two contexts at 30 microseconds a token can do 66,667 a second at most.
    assert 0 < found.tokens_per_second < 66_667


def test_one_context_with_all_threads_is_chosen_where_it_is_faster() -> None:
    """Twenty times as fast on both threads beats two side by side, and serves the lone text."""
    machine = TimedMachine(1e-4, speedup_of_threads=20.0)
    found = calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=2, seconds=2.0)
    assert (found.n_workers, found.n_threads_per_worker, found.n_threads_for_lone_text) == (1, 2, 2)


def test_large_passes_are_chosen_where_each_costs_a_fixed_time() -> None:
    """If only the number of passes counts, the largest budget wins."""
    machine = TimedMachine(0.0, fixed_seconds=0.02)
    found = calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=1, seconds=5.0)
    assert found.token_budget == max(BUDGET_ORDER)


def test_calibration_keeps_to_its_time_and_still_chooses() -> None:
    """With no time at all the likeliest layout and budget are taken, with what they reached."""
    machine = TimedMachine(1e-5)
    found = calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=2, seconds=0.0)
    assert (found.n_workers, found.n_threads_per_worker, found.token_budget) == (2, 1, BUDGET_ORDER[0])
    assert found.tokens_per_second > 0


def test_calibration_uses_tokens_that_the_model_has_and_gives_its_contexts_back() -> None:
    """One context per core while it runs, none afterwards."""
    machine = TimedMachine(0.0)
    calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=2, seconds=0.2)
    assert (machine.most_open, machine.n_open) == (2, 0)
    assert all(len(tokens) == TOKENS_PER_TEXT for tokens in machine.tokens)
    assert all((tokens >= 0).all() and (tokens < N_VOCABULARY).all() for tokens in machine.tokens)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_calibration_that_fails_gives_its_contexts_back() -> None:
    """The failure reaches whoever loads the model."""
    machine = TimedMachine(0.0)
    machine.fails = True
    with pytest.raises(InferenceFailed):
        calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=2, seconds=0.2)
    assert machine.n_open == 0


def test_context_that_cannot_be_opened_gives_the_others_back() -> None:
    """The model is freed next, and no context may outlive it."""
    machine = TimedMachine(0.0)
    machine.n_contexts_at_most = 2
    with pytest.raises(ModelUnusable):
        calibrate(machine.open_context, n_vocabulary=N_VOCABULARY, n_cores=3, seconds=0.2)
    assert machine.n_open == 0
