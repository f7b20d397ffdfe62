"""Searching over the API: filters before the top k, words beside meaning, tokens against tokens, every measure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import similarity_measures
from embeddings_data_models import compute_text_hash
from llama_embeddings.services.search import fuse_rankings
from llama_embeddings.services.token_index import scale_rows
from tests.serving import RunningApplication, run_application

SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
ADVANCED = "/advanced_search_stored_embeddings_with_query_string_for_semantic_similarity/"
WEATHER = ("snow fell on the hills", "rain is expected on Monday", "the wind blew from the north")
FOOD = ("bread and butter", "a bowl of soup", "cheese from the hills")


@pytest.fixture
async def application(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    async with run_application(tmp_path) as running:
        for text in WEATHER:
            await embed(running, text, corpus_identifier_string="weather")
        for text in FOOD:
            await embed(running, text, corpus_identifier_string="food")
        await embed(running, "nowhere in particular")
        yield running


async def embed(running: RunningApplication, text: str, **options: Any) -> None:
    reply = await running.client.post("/get_embedding_vector_for_string/", json={"text": text, **options})
    assert reply.status_code == 200, reply.text


async def search(running: RunningApplication, path: str = SEARCH, **request: Any) -> list[dict[str, Any]]:
    reply = await running.client.post(path, json=request)
    assert reply.status_code == 200, reply.text
    results: list[dict[str, Any]] = reply.json()["results"]
    return results


def texts_of(results: list[dict[str, Any]]) -> set[str]:
    return {result["search_result_text"] for result in results}


async def test_collection_is_filtered_before_the_top_k(application: RunningApplication) -> None:
    """Two results asked of a collection of three are two, whatever is nearer in others."""
    for collection, texts in (("weather", WEATHER), ("food", FOOD)):
        found = await search(
            application,
            query_text="soup in the wind",
            corpus_identifier_string=collection,
            number_of_most_similar_strings_to_return=2,
        )
        assert len(found) == 2
        assert texts_of(found) <= set(texts)


async def test_text_in_two_collections_is_found_in_both(application: RunningApplication) -> None:
    """Embedding a known text again under another name adds it there and computes nothing."""
    n_passes = len(application.backend.passes)
    await embed(application, FOOD[0], corpus_identifier_string="weather")
    assert len(application.backend.passes) == n_passes
    found = await search(application, query_text="bread", corpus_identifier_string="weather")
    assert texts_of(found) == {*WEATHER, FOOD[0]}
    assert texts_of(await search(application, query_text="bread", corpus_identifier_string="food")) == set(FOOD)


async def test_absent_collection_is_default_for_texts_and_all_for_searches(application: RunningApplication) -> None:
    """What named no collection is in `default`; a search that names none finds everything."""
    found = await search(application, query_text="somewhere", corpus_identifier_string="default")
    assert texts_of(found) == {"nowhere in particular"}
    assert len(await search(application, query_text="somewhere")) == 7


async def test_unknown_collection_or_document_gives_no_results(application: RunningApplication) -> None:
    """A filter that nothing passes is not an error."""
    assert await search(application, query_text="snow", corpus_identifier_string="no such") == []
    assert await search(application, query_text="snow", filename="no such.txt") == []


async def test_documents_sentences_are_found_by_its_file_name(application: RunningApplication) -> None:
    """Only the sentences of that document, although others are as near."""
    document = b"Snow fell on the hills all night. The wind did not stop until morning."
    reply = await application.client.post(
        "/get_all_embedding_vectors_for_document/?send_back_json_or_zip_file=json",
        files={"file": ("night.txt", document)},
    )
    assert reply.status_code == 200
    found = await search(application, query_text="snow", filename="night.txt")
    assert texts_of(found) == {"Snow fell on the hills all night.", "The wind did not stop until morning."}


@pytest.mark.parametrize(("since", "until", "n_found"), [(-1, None, 7), (1, None, 0), (None, 1, 7), (None, -1, 0)])
async def test_dates_are_filtered(
    application: RunningApplication, since: int | None, until: int | None, n_found: int
) -> None:
    """Hours from now, as the fixture's texts were embedded just now."""
    now = datetime.now(UTC)
    bounds = {"since": since, "until": until}
    moments = {name: (now + timedelta(hours=hours)).isoformat() for name, hours in bounds.items() if hours is not None}
    assert len(await search(application, query_text="snow", **moments)) == n_found


async def test_query_alone_is_no_result_of_later_searches(application: RunningApplication) -> None:
    """A query is kept, but found only once somebody embeds it as a text."""
    await search(application, query_text="a bowl of snow")
    assert "a bowl of snow" not in texts_of(await search(application, query_text="soup"))
    await embed(application, "a bowl of snow")
    assert "a bowl of snow" in texts_of(await search(application, query_text="soup"))


@pytest.mark.parametrize("options", [{}, {"full_text_weight": 0.5}, {"late_interaction": True}])
async def test_query_itself_is_left_out_and_the_number_is_kept(
    application: RunningApplication, options: Mapping[str, Any]
) -> None:
    """A stored text as the query: the number asked for, without it."""
    count = {"number_of_most_similar_strings_to_return": 3}
    found = await search(application, query_text=WEATHER[0], **count, **({"full_text_weight": 0.0} | dict(options)))
    assert WEATHER[0] not in texts_of(found)
    if not options.get("full_text_weight"):
        assert len(found) == 3


async def test_exact_search_gives_what_the_index_gives(application: RunningApplication) -> None:
    """The index is exact while it is small; scanning the rows gives the same."""
    query = {"query_text": "hills of bread"}
    scanned = await search(application, **query, exact=True)
    for indexed, exact in zip(await search(application, **query), scanned, strict=True):
        assert indexed["search_result_text"] == exact["search_result_text"]
        assert indexed["similarity_to_query_text"] == pytest.approx(exact["similarity_to_query_text"], abs=1e-6)


async def test_words_alone_rank_by_words(application: RunningApplication) -> None:
    """Weight 1: only texts that share a word with the query, with their cosines."""
    found = await search(application, query_text="hills", full_text_weight=1.0)
    assert texts_of(found) == {"snow fell on the hills", "cheese from the hills"}
    assert all(-1.0 <= result["similarity_to_query_text"] <= 1.0 for result in found)
    assert all(result["fused_score"] > 0.0 for result in found)


async def test_hybrid_search_keeps_filters_and_puts_texts_of_both_rankings_first(
    application: RunningApplication,
) -> None:
    """Of a collection, the one text with the query's rare word leads when words count enough."""
    found = await search(application, query_text="Monday", full_text_weight=0.9, corpus_identifier_string="weather")
    assert found[0]["search_result_text"] == "rain is expected on Monday"
    assert texts_of(found) == set(WEATHER)


async def test_plain_results_carry_nothing_that_was_not_asked_for(application: RunningApplication) -> None:
    """The original's clients see the two fields they know."""
    [first, *_] = await search(application, query_text="snow")
    assert set(first) == {"search_result_text", "similarity_to_query_text"}


async def test_late_interaction_orders_by_maxsim_and_says_which_tokens_matched(
    application: RunningApplication,
) -> None:
    """One match for each token of the query; their mean is the score."""
    found = await search(application, query_text="soup", late_interaction=True, with_matched_tokens=True)
    scores = [result["maxsim"] for result in found]
    assert scores == sorted(scores, reverse=True)
    for result in found:
        matches = result["matched_tokens"]
        assert [match["query_token"] for match in matches] == ["[CLS]", *"soup", "[SEP]"]
        assert sum(match["similarity"] for match in matches) / len(matches) == pytest.approx(result["maxsim"], abs=1e-5)


async def test_late_interaction_score_is_the_maxsim_measure(application: RunningApplication) -> None:
    """The same number as `compute_similarity_between_strings` gives for query and result."""
    [best, *_] = await search(application, query_text="soup", late_interaction=True)
    body = {"text1": "soup", "text2": best["search_result_text"], "similarity_measure": "maxsim"}
    reply = await application.client.post("/compute_similarity_between_strings/", json=body)
    assert reply.json()["similarity_score"] == pytest.approx(best["maxsim"], abs=1e-5)


@pytest.mark.parametrize("metric", ["hoeffding_d", "cosine_similarity", "euclidean_distance", "spearman_rho"])
async def test_advanced_search_orders_by_the_measure_asked_for(application: RunningApplication, metric: str) -> None:
    """Every measure of vectors is there; distances put the smallest first."""
    reply = await application.client.post(
        ADVANCED,
        json={"query_text": "snow", "result_sorting_metric": metric, "similarity_filter_percentage": 1.0},
    )
    assert reply.status_code == 200, reply.text
    content = reply.json()
    measure = similarity_measures.resolve_measure(metric)
    assert content["result_sorting_metric"] == measure.name
    assert content["number_of_candidates"] == 7
    scores = [result["similarity_to_query_text"][measure.name] for result in content["results"]]
    assert scores == sorted(scores, reverse=measure.higher_is_more_similar)
    assert set(content["results"][0]["similarity_to_query_text"]) == set(similarity_measures.VECTOR_MEASURES)


async def test_advanced_search_compares_no_more_than_the_share_asked_for(application: RunningApplication) -> None:
    """A seventh of seven texts is one candidate; the number of results wanted is the least."""
    request = {"query_text": "snow", "similarity_filter_percentage": 0.02}
    reply = await application.client.post(ADVANCED, json=request | {"number_of_most_similar_strings_to_return": 2})
    assert reply.json()["number_of_candidates"] == 2
    assert len(reply.json()["results"]) == 2


async def test_advanced_search_refuses_unknown_measures_and_those_of_tokens(application: RunningApplication) -> None:
    """The answer lists what can be asked for."""
    for metric in ("no_such", "maxsim"):
        reply = await application.client.post(ADVANCED, json={"query_text": "x", "result_sorting_metric": metric})
        assert reply.status_code == 400
        assert "hoeffdings_d" in reply.json()["detail"]


@pytest.mark.parametrize(
    "request_part",
    [
        {"full_text_weight": 1.5},
        {"full_text_weight": -0.1},
        {"since": "yesterday"},
        {"corpus_identifier_string": ""},
        {"number_of_most_similar_strings_to_return": 0},
    ],
)
async def test_bad_search_options_are_refused(application: RunningApplication, request_part: dict[str, Any]) -> None:
    """A 422 that names the field."""
    reply = await application.client.post(SEARCH, json={"query_text": "snow", **request_part})
    assert reply.status_code == 422
    assert next(iter(request_part)) in reply.text


def test_reciprocal_rank_fusion_by_hand() -> None:
    """Row 2 is second and first, row 1 first only: 0.5/62 + 0.5/61 against 0.5/61."""
    fused = fuse_rankings([(0.5, {1: 0.9, 2: 0.8}), (0.5, {2: 7.0, 3: 5.0})])
    assert list(fused) == [2, 1, 3]
    assert fused[2] == pytest.approx(0.5 / 62 + 0.5 / 61)
    assert fused[1] == pytest.approx(0.5 / 61)


def test_ranking_of_weight_zero_brings_nothing_in() -> None:
    """Words alone: what only meaning found is left out."""
    assert list(fuse_rankings([(0.0, {1: 0.9}), (1.0, {3: 5.0})])) == [3]


async def test_text_is_found_by_its_tokens_and_forgotten_with_them(application: RunningApplication) -> None:
    """The index of tokens finds the text that shares them, and forgets one that is deleted."""
    service = application.app.state.services.late_interaction
    tokens = application.app.state.services.token_embeddings
    await tokens.get_or_compute_all([*WEATHER, *FOOD])
    bundle = await tokens.get_or_compute("soup")
    family = await tokens.find_family(None)
    rows = scale_rows(bundle.matrix)
    hashes = await service._token_index.find_texts("fake-model", family, rows, n_texts=3)
    assert compute_text_hash("soup") in hashes
    await application.client.request("DELETE", "/stored_strings/", json={"text": FOOD[0]})
    left = await service._token_index.find_texts("fake-model", family, rows, n_texts=20)
    assert set(left) == {compute_text_hash(text) for text in (*WEATHER, *FOOD[1:], "soup")}


async def test_tokens_are_found_after_a_restart(tmp_path: Path) -> None:
    """Their index is made anew from the stored bundles."""
    async with run_application(tmp_path) as running:
        await running.app.state.services.token_embeddings.get_or_compute_all(["a bowl of soup", "snow"])
    async with run_application(tmp_path) as running:
        services = running.app.state.services
        bundle = (await services.token_embeddings.get_or_compute("a bowl of soup")).bundle
        family = await services.token_embeddings.find_family(None)
        index = services.late_interaction._token_index
        [nearest, _] = await index.find_texts("fake-model", family, scale_rows(bundle.matrix), n_texts=2)
        assert nearest == compute_text_hash("a bowl of soup")
