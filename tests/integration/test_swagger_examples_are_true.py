"""What Swagger shows as examples is what the real model answers."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from embeddings_data_models import (
    CHILLY,
    COLD,
    BestMatch,
    ModelDescription,
    SearchResult,
    SentenceOfDocument,
    SentencesResponse,
    SimilarityMatrixResponse,
    SimilarityResponse,
    TokenComparisonResponse,
    TokenEmbedding,
    TokenLevelEmbeddingsResponse,
)
from tests.serving import start_server

TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"


def example(model: type, field: str) -> object:
    return model.model_fields[field].examples[0]  # type: ignore[attr-defined]


def check_sentences(client: httpx.Client) -> None:
    """A sentence without embedding, as its model shows it."""
    text = example(SentenceOfDocument, "text")
    files = {"file": (example(SentencesResponse, "filename"), str(text).encode())}
    reply = client.post("/convert_document_to_sentences/", files=files).json()  # type: ignore[arg-type]
    for field in ("filename", "mimetype", "total_number_of_sentences"):
        assert reply[field] == example(SentencesResponse, field), field
    assert reply["sentences"] == [
        {field: example(SentenceOfDocument, field) for field in SentenceOfDocument.model_fields}
    ]


def test_examples_are_what_the_default_model_answers(tmp_path: Path) -> None:
    """To the digits shown; processors may differ in the fourth, those of one token in the second."""
    with start_server(tmp_path) as server, server.client() as client:
        texts = {"text1": "I feel extremely chilly", "text2": "I am so cold"}
        similarity = client.post("/compute_similarity_between_strings/", json=texts).json()
        assert similarity["embedding1"][:3] == pytest.approx(CHILLY, abs=2e-3)
        assert similarity["embedding2"][:3] == pytest.approx(COLD, abs=2e-3)
        assert similarity["similarity_score"] == pytest.approx(
            example(SimilarityResponse, "similarity_score"), abs=5e-3
        )
        tokens = client.post(TOKENS, json={"text": texts["text1"]}).json()
        shown = next(
            row for row in tokens["token_level_embedding_bundle"] if row["token"] == example(TokenEmbedding, "token")
        )
        # Not of unit length, and of one token: without AVX-512 they differ by up to 0.018.
        assert shown["embedding"][:3] == pytest.approx(example(TokenEmbedding, "embedding"), abs=3e-2)
        assert tokens["combined_feature_vector"][:4] == pytest.approx(
            example(TokenLevelEmbeddingsResponse, "combined_feature_vector"), abs=1e-2
        )
        search = client.post(
            "/search_stored_embeddings_with_query_string_for_semantic_similarity/", json={"query_text": "winter"}
        ).json()
        assert search["results"][0]["search_result_text"] == example(SearchResult, "search_result_text")
        assert search["results"][0]["similarity_to_query_text"] == pytest.approx(
            example(SearchResult, "similarity_to_query_text"), abs=1e-2
        )
        check_sentences(client)
        [described] = [
            model
            for model in client.get("/get_list_of_models_with_their_states/").json()["models"]
            if model["is_default"]
        ]
        for field in ("model_name", "state", "n_dims", "window", "pooling", "size_in_bytes", "licence", "recipe"):
            assert described[field] == example(ModelDescription, field), field


def test_examples_of_the_laboratory_are_what_the_default_model_answers(tmp_path: Path) -> None:
    """The matrix, the tokens and the best match shown in Swagger."""
    with start_server(tmp_path) as server, server.client() as client:
        texts = {"text1": "I feel extremely chilly", "text2": "I am so cold"}
        matrix = client.post("/compute_similarity_matrix/", json={"strings": list(texts.values())}).json()
        shown = example(SimilarityMatrixResponse, "similarity_matrix")
        np.testing.assert_allclose(matrix["similarity_matrix"], shown, atol=5e-3)
        tokens = client.post("/compare_strings_token_by_token/", json=texts).json()
        for field in ("tokens1", "tokens2"):
            assert tokens[field] == example(TokenComparisonResponse, field)
        for field in ("maxsim_score", "maxsim_score_reversed"):
            assert tokens[field] == pytest.approx(example(TokenComparisonResponse, field), abs=1e-2)
        match = tokens["best_matches1"][4]
        assert match.pop("cosine_similarity") == pytest.approx(example(BestMatch, "cosine_similarity"), abs=1e-2)
        assert match == {field: example(BestMatch, field) for field in match}
