"""What rerankers read and what tokens say of their places, with real tokenizers: the default model's and tiny ones'.

The engine may end the process on a model it cannot run, so that rerankers are asked in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_data_models import Truncation
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.engine import EmbeddingEngine, PairScore
from tests.serving import PROJECT_DIRECTORY, get_models_directory
from tests.tiny_models import write_tiny_model

TEXTS = ["I am so cold", "naïve café", "雪が降る", "Žluťoučký kůň 🌨", "  two  spaces "]
QUERY, DOCUMENTS = "the cat", ["the dog sat on the mat", "hello world " * 100, "cold"]


def open_model(path: Path) -> Any:
    from llama_embeddings.inference.llama_backend import LlamaBackend

    return LlamaBackend().load(path, name=path.stem, digest="", max_window=128, pooling=None)


def test_places_of_tokens_cover_the_words_of_the_text() -> None:
    """In bytes, in order, whatever the script; blanks are between them."""
    model = open_model(get_models_directory() / "all-MiniLM-L6-v2.gguf")
    for text in TEXTS:
        encoded = text.encode()
        spans = model.token_spans(text)
        assert len(spans) == len(model.tokenize(text))
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
        covered = b"".join(encoded[start:stop] for start, stop in spans).decode()
        assert covered == "".join(text.split())
    model.close()


def test_own_token_ids_are_told_from_others() -> None:
    """The ids of "hello world" in cl100k_base are words of this vocabulary, too, and are not taken for them."""
    model = open_model(get_models_directory() / "all-MiniLM-L6-v2.gguf")
    engine = EmbeddingEngine(model, BatcherLimits(1, 1, 128, 1, 64, 10_000))
    ids, _ = engine.tokenize("I am so cold")
    assert engine.read_own_ids(ids) == "i am so cold"
    for foreign in ([15339, 1917], ids[1:-1], [*ids, 102], [-1], [999_999]):
        assert engine.read_own_ids(foreign) is None
    engine.close()


@pytest.mark.parametrize("architecture", ["bert", "modern-bert", "qwen3"])
def test_reranker_scores_the_query_with_each_document(architecture: str, tmp_path: Path) -> None:
    """The score is that of the two in one sequence; a long document is cut, and its tokens counted."""
    path = write_tiny_model(tmp_path / "reranker.gguf", architecture, "rank")
    found = ask_child_process(path)
    np.testing.assert_allclose(found["scores"], found["by_hand"], atol=1e-3)
    assert found["dropped"][0] == found["dropped"][2] == 0
    assert found["dropped"][1] > 0
    assert found["is_probability"] is (architecture == "qwen3")
    if found["is_probability"]:
        assert all(0 <= score <= 1 for score in found["scores"])


def test_template_s_slots_are_filled_and_what_people_send_is_no_special_token(tmp_path: Path) -> None:
    """White space beside a slot goes with what fills it."""
    path = write_tiny_model(tmp_path / "reranker.gguf", "qwen3", "rank")
    found = ask_child_process(path)
    assert found["template_text"] == "Judge.\nQ: the cat\nD: hello\nA:"


def ask_child_process(path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(path)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_DIRECTORY)}
    finished = subprocess.run(
        command, cwd=PROJECT_DIRECTORY, env=environment, stdout=subprocess.PIPE, timeout=120, check=True
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def describe_reranker(path: Path) -> dict[str, Any]:
    import asyncio

    model = open_model(path)
    engine = EmbeddingEngine(model, BatcherLimits(1, 1, 128, 1, 64, 100_000))
    frame = model.frame_query(QUERY)
    filled = model._fill_template("Judge.\nQ: {query}\nD: {document}\nA:", QUERY)
    body = model.tokenize(filled.lead + "hello" + filled.trail)
    pairs = asyncio.run(engine.score_pairs(QUERY, DOCUMENTS, Truncation.RIGHT))
    assert all(isinstance(pair, PairScore) for pair in pairs)
    context = model.open_context()
    by_hand = []
    for document in DOCUMENTS:
        tokens = model.tokenize(document)[: model.info.window - len(frame.head) - len(frame.tail)]
        sequence = np.concatenate((frame.head, tokens, frame.tail)).astype(np.int32)
        by_hand.append(float(context.compute([sequence], n_threads=1)[0, 0]))
    context.close()
    engine.close()
    model = open_model(path)
    template_text = "".join(model.token_texts(np.concatenate((filled.head, body, filled.tail))))
    model.close()
    return {
        "scores": [pair.score for pair in pairs],
        "dropped": [pair.n_tokens_dropped for pair in pairs],
        "by_hand": by_hand,
        "is_probability": model.info.scores_are_probabilities,
        "template_text": template_text,
    }


if __name__ == "__main__":
    print(json.dumps(describe_reranker(Path(sys.argv[1]))), flush=True)
