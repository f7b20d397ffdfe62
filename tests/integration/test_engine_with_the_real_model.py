"""The engine with llama.cpp and the default model: the reference's vectors, whatever company a text has.

The golden vectors are those of the reference implementation in float32; `tests/golden/README.md` says how they were
made. Tiny models of other architectures run in child processes, because llama.cpp may end the process.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_data_models import Truncation
from llama_embeddings.errors import ModelUnusable
from llama_embeddings.inference.backend import Pooling
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.llama_backend import LlamaBackend, LlamaModel
from tests.tiny_models import ARCHITECTURES, POOLINGS, write_tiny_model

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
GOLDEN_DIRECTORY = PROJECT_DIRECTORY / "tests" / "golden"
CLS, SEP = 101, 102
# Company changes a vector by rounding alone.
MAX_COSINE_DISTANCE = 1e-3
# To float32, of a text of nothing but punctuation: 0.99903, and 0.99897 on a processor without AVX-512.
LOWEST_COSINE = 0.9985
LIMITS = BatcherLimits(
    n_workers=2,
    n_threads_per_worker=1,
    token_budget=256,
    n_threads_for_lone_text=2,
    max_texts_in_flight=256,
    max_queued_tokens=1_000_000,
)
WORDS = "the ferry leaves at noon while cold rain falls on seven quiet harbours and nobody waits for it"


def make_texts(count: int, n_words: tuple[int, int], *, seed: int) -> list[str]:
    """Random sentences of so many words, each its own."""
    source = random.Random(seed)
    return [
        " ".join([*source.choices(WORDS.split(), k=source.randint(*n_words)), str(number)]) for number in range(count)
    ]


@functools.cache
def read_golden_file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN_DIRECTORY / "all-MiniLM-L6-v2.json").read_text("utf-8"))
    return content


@functools.cache
def read_golden_texts() -> dict[str, str]:
    entries = json.loads((GOLDEN_DIRECTORY / "texts.json").read_text("utf-8"))
    return {entry["name"]: entry["text"] for entry in entries}


@pytest.fixture(scope="module")
def backend() -> LlamaBackend:
    return LlamaBackend()


def load_model(backend: LlamaBackend, path: Path, *, pooling: Pooling | None = None) -> LlamaModel:
    return backend.load(path, name=path.stem, digest="0", max_window=512, pooling=pooling)


@pytest.fixture(scope="module")
def engine(backend: LlamaBackend, models_directory: Path) -> Iterator[EmbeddingEngine]:
    """The default model behind two workers. Its batcher is used from many event loops, one after the other."""
    engine = EmbeddingEngine(load_model(backend, models_directory / "all-MiniLM-L6-v2.gguf"), LIMITS)
    yield engine
    engine.close()


async def embed(
    engine: EmbeddingEngine,
    texts: Sequence[str],
    truncation: Truncation = Truncation.REFUSE,
    *,
    wants_rows: bool = False,
) -> list[EngineResult]:
    prepared = await engine.prepare(texts, truncation)
    ready = [text for text in prepared if isinstance(text, PreparedText)]
    assert len(ready) == len(texts), prepared
    outcomes = await engine.embed(ready, wants_rows=wants_rows)
    results = [outcome for outcome in outcomes if isinstance(outcome, EngineResult)]
    assert len(results) == len(texts), outcomes
    return results


async def embed_one_by_one(engine: EmbeddingEngine, texts: Sequence[str]) -> list[EngineResult]:
    return [(await embed(engine, [text]))[0] for text in texts]


def assert_same_vectors(found: Sequence[EngineResult], expected: Sequence[EngineResult]) -> None:
    """Each is nearest to its own: same direction, same order."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert 1 - float(one.vector @ other.vector) < MAX_COSINE_DISTANCE


# Against the reference


@pytest.mark.parametrize("text", read_golden_file()["texts"], ids=lambda text: text["name"])
async def test_vector_is_that_of_the_reference(engine: EmbeddingEngine, text: dict[str, Any]) -> None:
    """Within the rounding of the quantised weights, and of unit length."""
    [result] = await embed(engine, [read_golden_texts()[text["name"]]], Truncation.RIGHT)
    assert float(result.vector @ np.array(text["vector"], np.float32)) >= LOWEST_COSINE
    assert np.linalg.norm(result.vector) == pytest.approx(1.0, abs=1e-5)
    assert (result.n_tokens, result.n_tokens_dropped) == (
        text["n_tokens"],
        text["n_tokens_before_cut"] - text["n_tokens"],
    )


@pytest.mark.parametrize("text", read_golden_file()["texts"], ids=lambda text: text["name"])
async def test_tokens_are_those_of_the_reference(engine: EmbeddingEngine, text: dict[str, Any]) -> None:
    """A text that is cut keeps the closing token."""
    [prepared] = await engine.prepare([read_golden_texts()[text["name"]]], Truncation.RIGHT)
    assert isinstance(prepared, PreparedText)
    assert prepared.parts[0].tolist() == text["token_ids"]


async def test_all_golden_texts_at_once_are_those_of_the_reference(engine: EmbeddingEngine) -> None:
    """In one request, in order."""
    golden = read_golden_file()["texts"]
    results = await embed(engine, [read_golden_texts()[text["name"]] for text in golden], Truncation.RIGHT)
    for text, result in zip(golden, results, strict=True):
        assert float(result.vector @ np.array(text["vector"], np.float32)) >= LOWEST_COSINE, text["name"]


async def test_similarity_of_the_well_known_pair_is_that_of_the_reference(engine: EmbeddingEngine) -> None:
    """0.742 in float32."""
    pair = read_golden_file()["pair"]
    assert pair["texts"] == ["I feel extremely chilly", "I am so cold"]
    first, second = await embed(engine, pair["texts"])
    assert float(first.vector @ second.vector) == pytest.approx(pair["cosine"], abs=0.005)


def test_facts_of_the_model_are_those_of_its_card(engine: EmbeddingEngine) -> None:
    """384 dimensions, mean pooling, 512 positions, CLS in front and SEP behind."""
    info = engine.info
    assert (info.architecture, info.n_dims, info.window, info.pooling) == ("bert", 384, 512, Pooling.MEAN)
    assert (info.prefix_tokens, info.suffix_tokens, info.is_causal, info.warnings) == ((CLS,), (SEP,), False, ())
    assert info.n_vocabulary == 30_522


# In any company


@pytest.fixture(scope="module")
def company() -> list[str]:
    """64 texts of 1 to 150 words."""
    return [*make_texts(40, (1, 12), seed=1), *make_texts(18, (20, 60), seed=2), *make_texts(6, (100, 150), seed=3)]


@pytest.fixture(scope="module")
def alone(engine: EmbeddingEngine, company: list[str]) -> list[EngineResult]:
    return asyncio.run(embed_one_by_one(engine, company))


@pytest.mark.parametrize("batch_size", [1, 2, 8, 16, 64])
async def test_batches_of_every_size_give_what_each_text_gives_alone(
    engine: EmbeddingEngine, company: list[str], alone: list[EngineResult], batch_size: int
) -> None:
    """In order, whatever was packed with what."""
    found: list[EngineResult] = []
    for start in range(0, len(company), batch_size):
        found += await embed(engine, company[start : start + batch_size])
    assert_same_vectors(found, alone)


@pytest.mark.parametrize("n_words", [(1, 4), (100, 150)], ids=["short", "long"])
@pytest.mark.parametrize("position", [0, 4, 8], ids=["first", "middle", "last"])
async def test_text_keeps_its_vector_among_short_and_long_ones(
    engine: EmbeddingEngine, n_words: tuple[int, int], position: int
) -> None:
    """First, last or between them."""
    text = "A cold wind blows from the sea"
    neighbours = make_texts(8, n_words, seed=4)
    [expected] = await embed(engine, [text])
    found = await embed(engine, [*neighbours[:position], text, *neighbours[position:]])
    assert_same_vectors([found[position]], [expected])


async def test_concurrent_callers_get_what_they_would_get_one_by_one(
    engine: EmbeddingEngine, company: list[str], alone: list[EngineResult]
) -> None:
    """64 callers at once, one text each, shuffled."""
    order = list(range(len(company)))
    random.Random(5).shuffle(order)
    answers = await asyncio.gather(*(embed(engine, [company[place]]) for place in order))
    assert_same_vectors([answer[0] for answer in answers], [alone[place] for place in order])


def test_callers_on_eight_threads_get_what_they_would_get_one_by_one(
    engine: EmbeddingEngine, company: list[str], alone: list[EngineResult]
) -> None:
    """Each thread with a loop of its own, eight tasks on each, all lengths mixed."""
    answers: dict[int, EngineResult] = {}

    async def ask(places: Sequence[int]) -> None:
        results = await asyncio.gather(*(embed(engine, [company[place]]) for place in places))
        answers.update({place: result[0] for place, result in zip(places, results, strict=True)})

    with ThreadPoolExecutor(8) as threads:
        shares = [range(start, len(company), 8) for start in range(8)]
        list(threads.map(lambda places: asyncio.run(ask(places)), shares, timeout=60))
    assert_same_vectors([answers[place] for place in range(len(company))], alone)


async def test_same_text_many_times_in_one_request_has_one_vector(engine: EmbeddingEngine) -> None:
    """Sequences of a pass do not see each other, even if they are equal."""
    results = await embed(engine, ["The ferry leaves at noon."] * 40)
    assert_same_vectors(results, [results[0]] * 40)


# Tokens


async def test_mean_of_the_token_rows_is_the_pooled_vector(engine: EmbeddingEngine, company: list[str]) -> None:
    """From the same pass; one row and one name per token, special ones included."""
    for result in await embed(engine, company[::6], wants_rows=True):
        assert result.rows is not None
        assert result.rows.shape == (result.n_tokens, 384)
        assert (result.tokens[0], result.tokens[-1]) == ("[CLS]", "[SEP]")
        assert len(result.tokens) == result.n_tokens
        mean = result.rows.astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(result.vector, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("text", ["[SEP]", "</s>", "[CLS]", "[MASK] me", "a [SEP] b", "<|endoftext|>", "[PAD][UNK]"])
async def test_names_of_special_tokens_are_read_as_characters(engine: EmbeddingEngine, text: str) -> None:
    """No caller can end a text early or mask a word by writing a token's name."""
    [prepared] = await engine.prepare([text], Truncation.REFUSE)
    assert isinstance(prepared, PreparedText)
    body = prepared.parts[0][1:-1].tolist()
    assert set(body).isdisjoint({CLS, SEP, 0, 100, 103})
    assert len(body) >= 3


async def test_long_text_is_split_without_losing_a_token(engine: EmbeddingEngine) -> None:
    """Two parts within the window; the vector lies between theirs."""
    text = read_golden_texts()["longer_than_the_window"]
    [prepared] = await engine.prepare([text], Truncation.SPLIT)
    assert isinstance(prepared, PreparedText)
    assert [len(part) for part in prepared.parts] == [512, 576 - 512 + 2]
    [result] = await embed(engine, [text], Truncation.SPLIT)
    parts = [(await engine.embed([PreparedText((part,), 0)]))[0] for part in prepared.parts]
    assert all(isinstance(part, EngineResult) for part in parts)
    assert all(float(result.vector @ part.vector) > 0.5 for part in parts if isinstance(part, EngineResult))


async def test_lone_letters_of_every_script_have_vectors(engine: EmbeddingEngine) -> None:
    """What the vocabulary lacks is the unknown token, not an error."""
    for result in await embed(engine, ["ß", "日", "ñ", "🎉", "ა", "\u0301a", "ﷺ"]):
        assert np.isfinite(result.vector).all()


# Files and architectures


def test_file_that_llama_cpp_refuses_is_an_error_with_its_name(backend: LlamaBackend, tmp_path: Path) -> None:
    """Not a crash, and not a path in the message."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"this is no model")
    with pytest.raises(ModelUnusable, match=r"'broken'") as refusal:
        load_model(backend, path)
    assert str(tmp_path) not in refusal.value.message


def test_model_that_does_not_say_how_to_pool_is_loaded_with_a_warning(backend: LlamaBackend, tmp_path: Path) -> None:
    """The mean is taken, and the setting of the caller wins over both."""
    path = write_tiny_model(tmp_path / "tiny.gguf", "bert", None)
    model = load_model(backend, path)
    assert model.info.pooling is Pooling.MEAN
    assert "does not say how to pool" in " ".join(model.info.warnings)
    model.close()
    model = load_model(backend, path, pooling=Pooling.CLS)
    assert (model.info.pooling, model.info.warnings) == (Pooling.CLS, ())
    model.close()


PROBE_TEXTS = ["hello world", "the cat sat on the mat, 42 times!", "a", "so cold " * 25, "i am so cold", "dog? dog."]


def describe_batches(path: Path) -> list[list[float]]:
    """Of one model: each probe text alone, then all together, then all together in reverse."""
    engine = EmbeddingEngine(load_model(LlamaBackend(), path), LIMITS)

    async def compute() -> list[np.ndarray]:
        single = await embed_one_by_one(engine, PROBE_TEXTS)
        together = await embed(engine, PROBE_TEXTS)
        reverse = (await embed(engine, PROBE_TEXTS[::-1]))[::-1]
        return [result.vector for result in [*single, *together, *reverse]]

    vectors = asyncio.run(compute())
    engine.close()
    return [vector.tolist() for vector in vectors]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_pooling_gives_the_same_alone_and_in_company(architecture: str, tmp_path: Path) -> None:
    """Encoders and decoders, for each way to pool; decoders keep a cache that a pass must not inherit."""
    paths = [
        write_tiny_model(tmp_path / f"{architecture}-{pooling}.gguf", architecture, pooling)
        for pooling in POOLINGS
        if pooling != "rank"
    ]
    for path, vectors in zip(paths, run_in_child_process(paths), strict=True):
        matrix = np.array(vectors).reshape(3, len(PROBE_TEXTS), -1)
        assert np.isfinite(matrix).all()
        single, together, reverse = matrix
        assert (1 - (single * together).sum(axis=1) < MAX_COSINE_DISTANCE).all(), path.name
        assert (1 - (single * reverse).sum(axis=1) < MAX_COSINE_DISTANCE).all(), path.name
        # And the texts are told apart, so that equality means something; only the opening token of a decoder sees
        # nothing of what follows it.
        n_different = 1 if path.stem == "llama-cls" else len(PROBE_TEXTS)
        assert len(np.unique(single.round(3), axis=0)) == n_different, path.name


def run_in_child_process(paths: Sequence[Path]) -> list[list[list[float]]]:
    """`describe_batches` of each file; fails if llama.cpp ends the process."""
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.integration.test_engine_with_the_real_model", *map(str, paths)],
        cwd=PROJECT_DIRECTORY,
        env=os.environ | {"GGML_NO_BACKTRACE": "1", "PYTHONPATH": str(PROJECT_DIRECTORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert outcome.returncode == 0, outcome.stderr[-500:]
    return results


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(describe_batches(Path(name))), flush=True)
