"""The engine: tokens, window and truncation, and what comes back for each text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from embeddings_data_models import Truncation
from llama_embeddings.errors import ContextLengthExceeded, InferenceFailed, InvalidInput, ServiceError, ShuttingDown
from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.fake_backend import CLOSING_TOKEN, OPENING_TOKEN, FakeBackend

WINDOW = 16
ROOM = WINDOW - 2  # beside the opening and the closing token
LONG_TEXT = "abcdefghijklmnopqrstuvwxyz0123456789"  # 36 tokens of the fake model
LIMITS = BatcherLimits(
    n_workers=1,
    n_threads_per_worker=1,
    token_budget=64,
    n_threads_for_lone_text=2,
    max_texts_in_flight=64,
    max_queued_tokens=1_000_000,
)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(n_dims=6)


def open_engine(backend: FakeBackend, *, window: int = WINDOW, pooling: Pooling | None = None) -> EmbeddingEngine:
    model = backend.load(Path("none.gguf"), name="fake", digest="0", max_window=window, pooling=pooling)
    return EmbeddingEngine(model, LIMITS)


@pytest.fixture
def engine(backend: FakeBackend) -> Iterator[EmbeddingEngine]:
    engine = open_engine(backend)
    yield engine
    engine.close()


def dress(text: str) -> list[int]:
    return [OPENING_TOKEN, *text.encode(), CLOSING_TOKEN]


def compute_rows(tokens: Sequence[int]) -> np.ndarray:
    """Rows of one text from a context of its own: float32 (n_tokens, n_dims)."""
    model = FakeBackend(n_dims=6).load(Path("none.gguf"), name="fake", digest="0", max_window=512, pooling=None)
    return model.open_context().compute([np.array(tokens, np.int32)], n_threads=1)


def to_unit_length(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


async def prepare_one(engine: EmbeddingEngine, text: str, truncation: Truncation = Truncation.REFUSE) -> PreparedText:
    [prepared] = await engine.prepare([text], truncation)
    assert isinstance(prepared, PreparedText)
    return prepared


def require_result(outcome: EngineResult | ServiceError) -> EngineResult:
    assert isinstance(outcome, EngineResult), outcome
    return outcome


# Window and truncation


@pytest.mark.parametrize("truncation", Truncation)
async def test_text_that_fits_is_whole_under_every_rule(engine: EmbeddingEngine, truncation: Truncation) -> None:
    """Up to the window's last place, special tokens included."""
    prepared = await prepare_one(engine, LONG_TEXT[:ROOM], truncation)
    assert [part.tolist() for part in prepared.parts] == [dress(LONG_TEXT[:ROOM])]
    assert (prepared.n_tokens, prepared.n_tokens_dropped, prepared.is_whole) == (WINDOW, 0, True)


async def test_longer_text_is_refused_with_its_length_and_the_limit(engine: EmbeddingEngine) -> None:
    """One token too many, counted with the special ones, as the limit is."""
    [refusal] = await engine.prepare([LONG_TEXT[: ROOM + 1]], Truncation.REFUSE)
    assert isinstance(refusal, ContextLengthExceeded)
    assert (refusal.n_tokens, refusal.limit) == (WINDOW + 1, WINDOW)


@pytest.mark.parametrize(
    ("truncation", "kept"), [(Truncation.RIGHT, LONG_TEXT[:ROOM]), (Truncation.LEFT, LONG_TEXT[-ROOM:])]
)
async def test_cut_text_keeps_one_end_and_both_special_tokens(
    engine: EmbeddingEngine, truncation: Truncation, kept: str
) -> None:
    """What is dropped is counted, and the closing token stays where the model expects it."""
    prepared = await prepare_one(engine, LONG_TEXT, truncation)
    assert [part.tolist() for part in prepared.parts] == [dress(kept)]
    assert (prepared.n_tokens, prepared.n_tokens_dropped) == (WINDOW, len(LONG_TEXT) - ROOM)
    assert not prepared.is_whole


async def test_split_text_loses_nothing_and_every_part_is_dressed(engine: EmbeddingEngine) -> None:
    """36 tokens make parts of 14, 14 and 8, each between special tokens of its own."""
    prepared = await prepare_one(engine, LONG_TEXT, Truncation.SPLIT)
    assert [part.tolist() for part in prepared.parts] == [
        dress(LONG_TEXT[:14]),
        dress(LONG_TEXT[14:28]),
        dress(LONG_TEXT[28:]),
    ]
    assert (prepared.n_tokens, prepared.n_tokens_dropped, prepared.is_whole) == (36 + 6, 0, False)


@pytest.mark.parametrize("truncation", Truncation)
async def test_text_without_tokens_is_refused_under_every_rule(engine: EmbeddingEngine, truncation: Truncation) -> None:
    """The special tokens alone are nobody's text."""
    [refusal] = await engine.prepare([""], truncation)
    assert type(refusal) is InvalidInput


async def test_refused_text_does_not_refuse_its_neighbours(engine: EmbeddingEngine) -> None:
    """One outcome per text, in order."""
    outcomes = await engine.prepare(["one", LONG_TEXT, "", "two"], Truncation.REFUSE)
    assert [type(outcome) for outcome in outcomes] == [PreparedText, ContextLengthExceeded, InvalidInput, PreparedText]


async def test_very_long_text_is_tokenised_off_the_event_loop_with_the_same_result(engine: EmbeddingEngine) -> None:
    """A text of 30,000 characters takes the other way, and is split the same."""
    text = LONG_TEXT * 834
    prepared = await prepare_one(engine, text, Truncation.SPLIT)
    body = [token for part in prepared.parts for token in part[1:-1].tolist()]
    assert bytes(body).decode() == text
    assert all(part[0] == OPENING_TOKEN and part[-1] == CLOSING_TOKEN for part in prepared.parts)


def test_tokens_are_counted_and_named_with_the_special_ones(engine: EmbeddingEngine) -> None:
    """Counting does not stop at the window."""
    assert engine.count_tokens(LONG_TEXT) == len(LONG_TEXT) + 2
    assert engine.tokenize("ab") == ([OPENING_TOKEN, 97, 98, CLOSING_TOKEN], ["[CLS]", "a", "b", "[SEP]"])


# Results


async def test_vector_is_the_pooled_rows_at_unit_length(engine: EmbeddingEngine) -> None:
    """Against the rows of a context of its own, pooled in float64."""
    [outcome] = await engine.embed([await prepare_one(engine, "some words")])
    result = require_result(outcome)
    np.testing.assert_allclose(result.vector, to_unit_length(compute_rows(dress("some words")).mean(axis=0)), atol=1e-6)
    assert result.vector.dtype == np.float32
    assert (result.n_tokens, result.n_tokens_dropped) == (12, 0)
    assert result.rows is None
    assert result.tokens == ()


@pytest.mark.parametrize(("pooling", "position"), [(Pooling.CLS, 0), (Pooling.LAST, -1)])
async def test_pooling_of_the_model_is_the_one_used(backend: FakeBackend, pooling: Pooling, position: int) -> None:
    """The opening token's row, or the closing one's."""
    engine = open_engine(backend, pooling=pooling)
    [outcome] = await engine.embed([await prepare_one(engine, "some words")])
    expected = to_unit_length(compute_rows(dress("some words"))[position])
    np.testing.assert_allclose(require_result(outcome).vector, expected, atol=1e-6)
    await asyncio.to_thread(engine.close)


async def test_split_text_is_the_token_weighted_mean_of_its_parts(engine: EmbeddingEngine) -> None:
    """Each part pooled alone, weighted 16 : 16 : 10, added up and scaled by hand."""
    [outcome] = await engine.embed([await prepare_one(engine, LONG_TEXT, Truncation.SPLIT)])
    pooled = [
        compute_rows(dress(part)).mean(axis=0).astype(np.float64)
        for part in (LONG_TEXT[:14], LONG_TEXT[14:28], LONG_TEXT[28:])
    ]
    expected = to_unit_length((16 * pooled[0] + 16 * pooled[1] + 10 * pooled[2]) / 42)
    result = require_result(outcome)
    np.testing.assert_allclose(result.vector, expected, atol=1e-6)
    assert (result.n_tokens, result.n_tokens_dropped) == (42, 0)


async def test_cut_text_has_the_vector_of_what_was_kept(engine: EmbeddingEngine) -> None:
    """And says how much was dropped."""
    [outcome] = await engine.embed([await prepare_one(engine, LONG_TEXT, Truncation.RIGHT)])
    result = require_result(outcome)
    expected = to_unit_length(compute_rows(dress(LONG_TEXT[:ROOM])).mean(axis=0))
    np.testing.assert_allclose(result.vector, expected, atol=1e-6)
    assert (result.n_tokens, result.n_tokens_dropped) == (WINDOW, 36 - ROOM)


async def test_results_are_in_order_with_whole_and_split_texts_mixed(engine: EmbeddingEngine) -> None:
    """Parts go back to the text they came from."""
    texts = ["first", LONG_TEXT, "third", LONG_TEXT[::-1], "fifth"]
    prepared = [await prepare_one(engine, text, Truncation.SPLIT) for text in texts]
    together = [require_result(outcome).vector for outcome in await engine.embed(prepared)]
    for text, vector in zip(prepared, together, strict=True):
        [alone] = await engine.embed([text])
        np.testing.assert_allclose(vector, require_result(alone).vector, atol=1e-6)


async def test_rows_come_with_their_tokens_for_those_who_ask(engine: EmbeddingEngine) -> None:
    """One row and one name per token, the special ones included."""
    [outcome] = await engine.embed([await prepare_one(engine, "abc")], wants_rows=True)
    result = require_result(outcome)
    assert result.tokens == ("[CLS]", "a", "b", "c", "[SEP]")
    assert result.rows is not None
    np.testing.assert_allclose(result.rows, compute_rows(dress("abc")), atol=1e-6)


async def test_rows_of_a_split_text_are_those_of_its_parts_in_order(engine: EmbeddingEngine) -> None:
    """42 rows for 36 tokens and three pairs of special ones."""
    [outcome] = await engine.embed([await prepare_one(engine, LONG_TEXT, Truncation.SPLIT)], wants_rows=True)
    result = require_result(outcome)
    parts = [compute_rows(dress(part)) for part in (LONG_TEXT[:14], LONG_TEXT[14:28], LONG_TEXT[28:])]
    assert result.rows is not None
    np.testing.assert_allclose(result.rows, np.concatenate(parts), atol=1e-6)
    assert len(result.tokens) == 42
    assert [place for place, token in enumerate(result.tokens) if token == "[SEP]"] == [15, 31, 41]


async def test_nothing_to_embed_is_nothing(engine: EmbeddingEngine) -> None:
    """No texts, no pass."""
    assert await engine.prepare([], Truncation.REFUSE) == []
    assert await engine.embed([]) == []


async def test_reranker_is_refused_as_the_callers_mistake(backend: FakeBackend) -> None:
    """It names the model and the field, and nothing is computed."""
    engine = open_engine(backend, pooling=Pooling.RANK)
    prepared = await prepare_one(engine, "some words")
    with pytest.raises(InvalidInput, match="'fake' is a reranker") as refusal:
        await engine.embed([prepared])
    assert refusal.value.field == "model_name"
    assert backend.passes == []
    await asyncio.to_thread(engine.close)


async def test_text_that_fails_has_its_own_error(engine: EmbeddingEngine, backend: FakeBackend) -> None:
    """A split text fails as a whole if one part does; its neighbours do not."""
    backend.failing_token = ord("!")
    texts = ["fine", LONG_TEXT + "!", "fine too"]
    prepared = [await prepare_one(engine, text, Truncation.SPLIT) for text in texts]
    outcomes = await engine.embed(prepared)
    assert [type(outcome) for outcome in outcomes] == [EngineResult, InferenceFailed, EngineResult]


async def test_closed_engine_gives_everything_back_and_answers_no_more(backend: FakeBackend) -> None:
    """Contexts first, then the model."""
    engine = open_engine(backend)
    prepared = await prepare_one(engine, "some words")
    await asyncio.to_thread(engine.close)
    assert (backend.n_open_contexts, backend.n_open_models) == (0, 0)
    with pytest.raises(ShuttingDown):
        await engine.embed([prepared])
