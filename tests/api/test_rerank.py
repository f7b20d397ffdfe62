"""Reranking by what the model can do: its own scores, the cosine, or MaxSim; bounds, order and cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import similarity_measures
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application

WINDOW = 32
RERANKER = "bge-reranker-v2-m3"  # the catalogue says that its pooling is `rank`
TOKEN_ROWS = (
    "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"
)
QUERY, DOCUMENTS = "cold", ["hot and dry", "colder", "cold", "colder"]


async def post(running: RunningApplication, path: str, body: Any, status: int = 200) -> Any:
    response = await running.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def rank(running: RunningApplication, **fields: Any) -> dict[int, float]:
    """Scores by place in the request, in the order of the reply."""
    found = await post(running, "/rerank", {"query": QUERY, "texts": DOCUMENTS, **fields})
    return {row["index"]: row["score"] for row in found}


@pytest.mark.parametrize("method", ["cosine", "maxsim"])
async def test_embedding_model_ranks_by_the_chosen_method(method: str, tmp_path: Path) -> None:
    """Raw scores are the measure; others are (1 + x) / 2; equals keep the request's order."""
    async with run_application(tmp_path, rerank_method=method) as running:
        raw = await rank(running, raw_scores=True)
        for index, document in enumerate(DOCUMENTS):
            assert raw[index] == pytest.approx(await compute_expected(running, method, document), abs=1e-5)
        scaled = await rank(running)
        assert list(scaled) == list(raw)
        assert [scaled[index] for index in scaled] == pytest.approx([(1 + raw[index]) / 2 for index in raw])
        assert next(iter(scaled)) == 2
        assert list(scaled).index(1) + 1 == list(scaled).index(3)
        n_passes = len(running.backend.passes)
        await rank(running)
        assert len(running.backend.passes) == n_passes  # found again, not computed again


async def compute_expected(running: RunningApplication, method: str, document: str) -> float:
    measure = "cosine_similarity" if method == "cosine" else "maxsim"
    if method == "cosine":
        body = {"text1": QUERY, "text2": document, "similarity_measure": measure}
        return float((await post(running, "/compute_similarity_between_strings/", body))["similarity_score"])
    rows = []
    for text in (QUERY, document):
        bundle = (await post(running, TOKEN_ROWS, {"text": text}))["token_level_embedding_bundle"]
        rows.append(np.array([row["embedding"] for row in bundle], dtype=np.float32))
    return similarity_measures.maxsim(*rows)


async def test_reranker_gives_its_own_scores(tmp_path: Path) -> None:
    """Through a sigmoid, or raw; the query stands before each document; nothing of it is stored."""
    async with run_application(tmp_path) as running:
        running.add_model(RERANKER)
        asked = {"query": QUERY, "documents": DOCUMENTS, "model": RERANKER}
        raw = (await post(running, "/v2/rerank", asked | {"raw_scores": True}))["results"]
        scaled = (await post(running, "/v2/rerank", asked))["results"]
        assert [row["index"] for row in raw] == [row["index"] for row in scaled]
        sigmoid = [1 / (1 + np.exp(-row["relevance_score"])) for row in raw]
        assert [row["relevance_score"] for row in scaled] == pytest.approx(sigmoid)
        lengths = sorted(length for lengths in running.backend.passes[-4:] for length in lengths)[-4:]
        assert lengths[-1] == 1 + len(QUERY) + 1 + len(DOCUMENTS[0]) + 1
        assert (await running.client.get("/get_all_stored_strings/")).json() == {"strings": []}
        refused = await post(running, "/v1/embeddings", {"input": "a", "model": RERANKER}, 400)
        assert "reranker" in refused["error"]["message"]


async def test_pair_beyond_the_window_loses_tokens_of_the_document(tmp_path: Path) -> None:
    """By the rule asked for; a query that leaves no room is refused by name."""
    async with run_application(
        tmp_path, llm_context_size_in_tokens=WINDOW, default_model_name=FAKE_MODEL_NAME
    ) as running:
        running.add_model(RERANKER)
        long = "abcdefghijklmnopqrstuvwxyz"
        room = WINDOW - 3 - len(QUERY)

        async def score(**fields: Any) -> float:
            body = {"query": QUERY, "documents": [long], "model": RERANKER, "raw_scores": True, **fields}
            return float((await post(running, "/rerank", body))["results"][0]["relevance_score"])

        assert await score() == pytest.approx(await score(documents=[long[:room]]))
        assert await score(max_tokens_per_doc=5) == pytest.approx(await score(documents=[long[:5]]))
        refused = await post(running, "/v2/rerank", {"query": "q" * WINDOW, "documents": ["a"], "model": RERANKER}, 400)
        assert refused["param"] == "query"


async def test_tei_refuses_what_is_too_long_unless_told_to_cut(tmp_path: Path) -> None:
    """By the setting TRUNCATION; the text is named by its place."""
    async with run_application(tmp_path, llm_context_size_in_tokens=WINDOW) as running:
        body = {"query": QUERY, "texts": ["a", "x" * 40]}
        refused = await post(running, "/rerank", body, 400)
        assert "42 tokens" in refused["error"]
        response = await running.client.post("/rerank", json=body | {"truncate": True})
        assert response.status_code == 200
        assert response.headers["x-tokens-dropped"] == "10"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_cohere_and_jina_get_one_reply_that_serves_both(path: str, running: RunningApplication) -> None:
    """Documents as strings or objects, returned if asked for, the best `top_n`; usage and units."""
    documents = ["hot", {"text": "cold"}, "warm"]
    body = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    reply = await post(running, path, body)
    assert set(reply) == {"id", "object", "model", "results", "usage", "meta"}
    assert len(reply["results"]) == 2
    assert reply["results"][0] == {"index": 1, "relevance_score": pytest.approx(1.0), "document": {"text": "cold"}}
    assert reply["meta"]["billed_units"] == {"search_units": 1}
    assert reply["usage"]["total_tokens"] == sum(len(text) + 2 for text in (QUERY, "hot", "cold", "warm"))
    for refused in ({"documents": []}, {"query": " "}, {"documents": ["a", ""]}):
        await post(running, path, body | refused, 400)
    await post(running, path, body | {"top_n": 0}, 422)
