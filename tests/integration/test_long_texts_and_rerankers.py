"""Texts as long as a model's window, rerankers, and pooling held against llama.cpp's own.

Tiny models with random weights, each in a child process, because llama.cpp may end the process. What the vectors
mean is not tested here, nor are real models.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_data_models import Truncation
from llama_embeddings.errors import ContextLengthExceeded, InferenceFailed, InvalidInput, ModelUnusable
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.llama_backend import LlamaBackend, LlamaModel
from tests.tiny_models import POOLINGS, write_tiny_model

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
WINDOW = 8_192
LONG_SHAPE: dict[str, Any] = {
    "context_length": WINDOW,
    "n_dims": 32,
    "n_feed_forward": 32,
    "n_heads": 1,
    "n_heads_kv": 1,
    "n_blocks": 1,
}
# One token each in every vocabulary of the tiny models; a qwen3 reads digits one by one.
FILLER, FIRST, LAST = "4", "1", "7"
TEXTS = (
    "hello cat, 42!",
    "the cat sat on the mat",
    "i am so cold",
    "a",
    "dog? dog.",
    "so chilly " * 30,
    "the world is cold",
    "1 2 3 4 5",
)
LIMITS = BatcherLimits(
    n_workers=1,
    n_threads_per_worker=1,
    token_budget=192,
    n_threads_for_lone_text=2,
    max_texts_in_flight=64,
    max_queued_tokens=1_000_000,
)


def load_model(path: Path, *, max_window: int = 512) -> LlamaModel:
    return LlamaBackend().load(path, name=path.stem, digest="0", max_window=max_window, pooling=None)


def ask_child_process(question: str, path: Path) -> Any:
    """What the function of that name finds out of the model; fails if llama.cpp ends the process."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.integration.test_long_texts_and_rerankers", question, str(path)],
        cwd=PROJECT_DIRECTORY,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-800:]
    return json.loads(process.stdout)


# Long texts


def write_text(engine: EmbeddingEngine, n_tokens: int) -> str:
    """A text of so many tokens, the special ones included, whose first and last are like no other."""
    n_special = engine.info.window - engine.info.room_for_text
    text = " ".join([FIRST, *[FILLER] * (n_tokens - n_special - 2), LAST])
    if engine.count_tokens(text) != n_tokens:  # where blanks are tokens of their own
        text = text.replace(" ", "")
    assert engine.count_tokens(text) == n_tokens
    return text


async def compute(engine: EmbeddingEngine, text: str, truncation: Truncation) -> dict[str, Any]:
    """The facts of the result, and those of the refusal where there is one."""
    [prepared] = await engine.prepare([text], truncation)
    if isinstance(prepared, InvalidInput):
        return {"refusal": type(prepared).__name__, "message": prepared.message}
    [result] = await engine.embed([prepared], wants_rows=True)
    assert isinstance(result, EngineResult), result
    assert result.rows is not None
    return {
        "shapes": [result.rows.shape, result.vector.shape, [len(result.tokens)]],
        "finite": bool(np.isfinite(result.rows).all() and np.isfinite(result.vector).all()),
        "n_tokens": result.n_tokens,
        "n_tokens_dropped": result.n_tokens_dropped,
        "part_lengths": [len(part) for part in prepared.parts],
        "begins": FIRST in "".join(result.tokens),
        "ends": LAST in "".join(result.tokens),
    }


def compute_at_the_window(path: Path, max_window: int) -> dict[str, Any]:
    """A text that fills the window, and one of a token more under each rule of truncation."""
    engine = EmbeddingEngine(load_model(path, max_window=max_window), LIMITS)
    info = engine.info

    async def compute_all() -> dict[str, Any]:
        longer = write_text(engine, info.window + 1)
        found = {rule.value: await compute(engine, longer, rule) for rule in Truncation}
        return found | {"whole": await compute(engine, write_text(engine, info.window), Truncation.REFUSE)}

    found = asyncio.run(compute_all())
    engine.close()
    return found | {"windows": [info.window, info.trained_window], "n_special": info.window - info.room_for_text}


def assert_window(found: Mapping[str, Any], window: int, trained_window: int) -> None:
    """Of that many tokens: one more is refused, cut or split as asked for, and the counts say so."""
    assert found["windows"] == [window, trained_window]
    n_special = found["n_special"]
    n_split = window + 1 + n_special
    assert found["refuse"]["refusal"] == ContextLengthExceeded.__name__
    assert str(window + 1) in found["refuse"]["message"].replace(",", "")
    assert_result(found["whole"], (window, 0), [window], ends=(True, True))
    assert_result(found["right"], (window, 1), [window], ends=(True, False))
    assert_result(found["left"], (window, 1), [window], ends=(False, True))
    assert_result(found["split"], (n_split, 0), [window, 1 + n_special], ends=(True, True))


def assert_result(
    result: Mapping[str, Any], counts: tuple[int, int], part_lengths: list[int], *, ends: tuple[bool, bool]
) -> None:
    n_dims = LONG_SHAPE["n_dims"]
    assert result["shapes"] == [[counts[0], n_dims], [n_dims], [counts[0]]]
    assert result["finite"]
    assert (result["n_tokens"], result["n_tokens_dropped"]) == counts
    assert result["part_lengths"] == part_lengths
    assert (result["begins"], result["ends"]) == ends


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "qwen3"])
def test_text_that_fills_a_long_window_is_computed_and_a_token_more_is_not(architecture: str, tmp_path: Path) -> None:
    """8,192 tokens in one pass; the 8,193rd is refused, dropped from the right or left, or computed apart."""
    path = write_tiny_model(tmp_path / "long.gguf", architecture, **LONG_SHAPE)
    assert_window(ask_child_process("compute_at_8192", path), WINDOW, WINDOW)


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
def test_window_that_was_set_smaller_than_the_models_is_respected(architecture: str, tmp_path: Path) -> None:
    """LLM_CONTEXT_SIZE_IN_TOKENS of 1,024 for a model of 8,192."""
    path = write_tiny_model(tmp_path / "long.gguf", architecture, **LONG_SHAPE)
    assert_window(ask_child_process("compute_at_1024", path), 1_024, WINDOW)


def test_window_that_was_set_larger_than_the_models_is_the_models(tmp_path: Path) -> None:
    """8,192 asked of a model with 40 positions, in a context of 512 tokens."""
    path = write_tiny_model(tmp_path / "short.gguf", "bert", **LONG_SHAPE | {"context_length": 40})
    assert_window(ask_child_process("compute_at_8192", path), 40, 40)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_window_without_room_for_a_text_is_refused_and_ends_nothing(window: int, tmp_path: Path) -> None:
    """Special tokens alone take two of a bert's positions; a vector of the text is a vector of a token at least."""
    path = write_tiny_model(tmp_path / "narrow.gguf", "bert", context_length=window)
    outcomes = ask_child_process("compute_in_narrow_window", path)
    expected = "EngineResult" if window == 3 else "refused"
    assert outcomes["right"] == outcomes["left"] == outcomes["split"] == expected
    assert outcomes["refuse"] == "refused"


def compute_in_narrow_window(path: Path) -> dict[str, str]:
    """What becomes of five tokens under each rule, whether the model or the text is refused."""

    async def compute_all(engine: EmbeddingEngine) -> dict[str, str]:
        return {rule.value: await name_outcome(engine, rule) for rule in Truncation}

    try:
        engine = EmbeddingEngine(load_model(path), LIMITS)
    except ModelUnusable:
        return {rule.value: "refused" for rule in Truncation}
    outcomes = asyncio.run(compute_all(engine))
    engine.close()
    return outcomes


async def name_outcome(engine: EmbeddingEngine, rule: Truncation) -> str:
    [prepared] = await engine.prepare(["the cat sat on mat"], rule)
    if isinstance(prepared, InvalidInput):
        return "refused"
    [result] = await engine.embed([prepared])
    return type(result).__name__


# Rerankers


@pytest.mark.parametrize("architecture", ["bert", "modern-bert", "qwen3"])
def test_reranker_gives_each_text_the_score_it_has_alone(architecture: str, tmp_path: Path) -> None:
    """One finite number per sequence, which is llama.cpp's own for a context with a single sequence."""
    path = write_tiny_model(tmp_path / "reranker.gguf", architecture, "rank")
    found = ask_child_process("compute_scores", path)
    reference, alone, together, reverse = (
        np.array(found[key]) for key in ("reference", "alone", "together", "reverse")
    )
    assert found["pooling"] == "rank"
    assert alone.shape == together.shape == (len(TEXTS), 1)
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(alone[:, 0], reference, atol=1e-4)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    np.testing.assert_allclose(reverse[::-1], alone, atol=1e-3)
    # And the texts are told apart, so that equality means something.
    assert len(np.unique(alone.round(3))) > len(TEXTS) // 2


@pytest.mark.parametrize("architecture", ["bert", "modern-bert", "qwen3"])
def test_reranker_refuses_to_embed_and_to_take_more_texts_than_it_has_places(architecture: str, tmp_path: Path) -> None:
    """The first is the caller's mistake, the second would be the batcher's."""
    path = write_tiny_model(tmp_path / "reranker.gguf", architecture, "rank")
    assert ask_child_process("ask_reranker_for_too_much", path) == [InvalidInput.__name__, InferenceFailed.__name__]


def dress(model: LlamaModel, text: str) -> np.ndarray:
    """Token ids int32 (n,), the special ones included."""
    return np.concatenate(
        (model.info.prefix_tokens, model.tokenize(text), model.info.suffix_tokens), dtype=np.int32, casting="unsafe"
    )


def compute_scores(path: Path) -> dict[str, Any]:
    model = load_model(path)
    sequences = [dress(model, text) for text in TEXTS]
    context = model.open_context()
    found = {
        "pooling": model.info.pooling.value,
        "alone": [context.compute([sequence], n_threads=1)[0].tolist() for sequence in sequences],
        "together": context.compute(sequences, n_threads=1).tolist(),
        "reverse": context.compute(sequences[::-1], n_threads=1).tolist(),
        "reference": [compute_with_llama(path, sequence, "rank", n_values=1)[0] for sequence in sequences],
    }
    context.close()
    model.close()
    return found


def ask_reranker_for_too_much(path: Path) -> list[str]:
    model = load_model(path)
    tokens = dress(model, TEXTS[0])
    context = model.open_context()
    engine = EmbeddingEngine(model, LIMITS)
    found = [
        name_error(lambda: asyncio.run(engine.embed([PreparedText((tokens,), 0)]))),
        name_error(lambda: context.compute([tokens] * (context.max_sequences + 1), n_threads=1)),
    ]
    context.close()
    engine.close()
    return found


def name_error(action: Callable[[], object]) -> str:
    try:
        action()
    except (InvalidInput, InferenceFailed) as error:
        return type(error).__name__
    return "no error"


# Pooling


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "none"])
@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
def test_pooling_that_the_file_asks_for_is_that_of_llama_cpp(architecture: str, pooling: str, tmp_path: Path) -> None:
    """The same direction as from a context that pools by itself; the same token rows where none is asked for."""
    path = write_tiny_model(tmp_path / f"{pooling}.gguf", architecture, pooling)
    for entry in ask_child_process("compare_pooling", path):
        found, expected = np.array(entry["found"]), np.array(entry["expected"])
        assert found.shape == expected.shape
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, scale_to_unit_length(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "pooling", "settings", "warned_of"),
    [
        ("bert", None, {}, "how to pool"),
        ("qwen3", "last", {"tokenizer.ggml.add_eos_token": False}, "closing token (EOS)"),
        ("qwen3", "cls", {}, "opening token (BOS)"),
        ("qwen3", "last", {}, None),
        ("bert", "cls", {}, None),
        ("llama", "mean", {"tokenizer.ggml.add_eos_token": False}, None),
    ],
)
def test_what_pooling_misses_is_warned_of(
    architecture: str, pooling: str | None, settings: dict[str, Any], warned_of: str | None, tmp_path: Path
) -> None:
    """The vectors would be others than the model's own, and nobody would know why."""
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture, pooling, metadata=settings)
    model = load_model(path)
    try:
        assert len(model.info.warnings) == (warned_of is not None)
        assert all(str(warned_of) in warning for warning in model.info.warnings)
    finally:
        model.close()


def scale_to_unit_length(vectors: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return scaled


def compare_pooling(path: Path) -> list[dict[str, Any]]:
    """The engine's vector of each text, each alone, beside llama.cpp's; the rows for pooling `none`."""
    model = load_model(path)
    sequences = [dress(model, text) for text in TEXTS]
    engine = EmbeddingEngine(model, LIMITS)
    pooling = engine.info.pooling.value
    assert pooling == path.stem
    results = [
        asyncio.run(engine.embed([PreparedText((sequence,), 0)], wants_rows=pooling == "none"))[0]
        for sequence in sequences
    ]
    entries = []
    for sequence, result in zip(sequences, results, strict=True):
        assert isinstance(result, EngineResult)
        n_values = engine.info.n_dims * (len(sequence) if pooling == "none" else 1)
        expected = np.array(compute_with_llama(path, sequence, pooling, n_values=n_values))
        if pooling == "none":
            assert result.rows is not None
            expected = expected.reshape(result.rows.shape)
            entries.append({"found": scale_to_unit_length(result.rows).tolist(), "expected": expected.tolist()})
            # Without a pooling of its own, the vector is the mean of the rows.
            expected = expected.mean(axis=0)
        entries.append({"found": result.vector.tolist(), "expected": expected.tolist()})
    engine.close()
    return entries


def compute_with_llama(path: Path, tokens: np.ndarray, pooling: str, *, n_values: int) -> list[float]:
    """The first numbers of what llama.cpp gives for one sequence in a context that pools as told."""
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    assert model
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_seq_max = parameters.n_threads = parameters.n_threads_batch = 1
    parameters.embeddings, parameters.pooling_type = True, POOLINGS[pooling]
    context = llama_cpp.llama_init_from_model(model, parameters)
    assert context
    ids = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
    batch: Any = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    address: Any = (
        llama_cpp.llama_get_embeddings(context) if pooling == "none" else llama_cpp.llama_get_embeddings_seq(context, 0)
    )
    values = list(address[:n_values])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return values


QUESTIONS: Mapping[str, Callable[[Path], Any]] = {
    "compute_at_8192": lambda path: compute_at_the_window(path, 8_192),
    "compute_at_1024": lambda path: compute_at_the_window(path, 1_024),
    "compute_in_narrow_window": compute_in_narrow_window,
    "compute_scores": compute_scores,
    "ask_reranker_for_too_much": ask_reranker_for_too_much,
    "compare_pooling": compare_pooling,
}


if __name__ == "__main__":
    print(json.dumps(QUESTIONS[sys.argv[1]](Path(sys.argv[2]))), flush=True)
