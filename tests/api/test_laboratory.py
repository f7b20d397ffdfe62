"""The laboratory over the API: all measures at once, percentiles, matrices, tokens, and which form a reply takes."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import similarity_measures
from llama_embeddings.api.laboratory import prefers_png
from llama_embeddings.inference.fake_backend import FakeBackend
from llama_embeddings.services import similarity_scales
from tests.serving import RunningApplication, run_application

PAIR = "/compute_similarity_between_strings/"
MATRIX = "/compute_similarity_matrix/"
TOKENS = "/compare_strings_token_by_token/"
EMBED = "/get_embedding_vector_for_string/"
TEXTS = ["I feel cold", "I am so cold", "soup of the day"]
PNG = {"accept": "image/png"}


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


async def refuse(client: httpx.AsyncClient, path: str, status: int, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply


async def store(client: httpx.AsyncClient, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        await ask(client, EMBED, text=f"{number * 7919 % 1009} {'abcdefgh'[number % 8] * (number % 5 + 1)} {number}")


async def score(client: httpx.AsyncClient, text1: str, text2: str, measure: str) -> float:
    reply = await ask(client, PAIR, text1=text1, text2=text2, similarity_measure=measure)
    return float(reply["similarity_score"])


# All measures


async def test_all_gives_every_measure_as_each_gives_itself(running: RunningApplication) -> None:
    """One request, the values of sixteen, and the cosine where one number is wanted."""
    reply = await ask(running.client, PAIR, text1=TEXTS[0], text2=TEXTS[1], similarity_measure="all")
    assert reply["similarity_measure"] == "all"
    assert sorted(reply["similarity_scores"]) == sorted(similarity_measures.MEASURES)
    for name, found in reply["similarity_scores"].items():
        assert found == await score(running.client, TEXTS[0], TEXTS[1], name), name
    assert reply["similarity_score"] == reply["similarity_scores"]["cosine_similarity"]
    assert "percentile" not in reply


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("hoeffding_d", "hoeffdings_d"),
        ("approximate_distance_correlation", "distance_correlation"),
        ("jensen_shannon_dependency_measure", "jensen_shannon"),
        ("Cosine-Similarity", "cosine_similarity"),
    ],
)
async def test_other_spellings_are_accepted_and_answered_with_the_name(
    spelling: str, name: str, running: RunningApplication
) -> None:
    """Those of the original and of its successor."""
    reply = await ask(running.client, PAIR, text1="a", text2="b", similarity_measure=spelling)
    assert reply["similarity_measure"] == name


@pytest.mark.parametrize("path", [PAIR, MATRIX])
async def test_unknown_measure_is_refused_with_the_known_ones(path: str, running: RunningApplication) -> None:
    """A 400 that lists them, before anything is computed or stored."""
    texts = {"text1": "a", "text2": "b"} if path == PAIR else {"strings": ["a"]}
    error = await refuse(running.client, path, 400, similarity_measure="telepathy", **texts)
    assert error["field"] == "similarity_measure"
    assert all(name in error["detail"] for name in similarity_measures.MEASURES)
    assert (await running.client.get("/get_all_stored_strings/")).json()["strings"] == []


async def test_vectors_too_short_for_a_measure_are_the_callers_mistake(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of two dimensions has no Hoeffding's D: a 400 that says what is needed, never a 500."""
    running.add_model("tiny")
    monkeypatch.setattr(running.backend, "n_dims", 2)
    error = await refuse(
        running.client, PAIR, 400, text1="a", text2="b", similarity_measure="hoeffdings_d", model_name="tiny"
    )
    assert "needs at least 5" in error["detail"]


# Percentiles


async def test_percentile_of_a_few_stored_texts_is_null_with_the_reason(running: RunningApplication) -> None:
    """Too little is stored to say anything."""
    reply = await ask(running.client, PAIR, text1="a", text2="b", with_percentile=True)
    assert reply["percentile"] is None
    assert reply["number_of_random_pairs"] == 0
    assert reply["percentile_reason"].startswith("2 texts are stored")


async def test_percentile_is_the_share_of_random_pairs_that_are_less_similar(running: RunningApplication) -> None:
    """Identical texts stand above all, by measures that rise and by distances that fall with similarity."""
    await store(running.client, 60)
    same = {"text1": "0 a 0", "text2": "0 a 0", "with_percentile": True}
    reply = await ask(running.client, PAIR, similarity_measure="all", **same)
    assert reply["percentile_reason"] is None
    assert reply["number_of_random_pairs"] == similarity_scales.N_PAIRS
    assert set(reply["percentiles"]) == set(similarity_measures.VECTOR_MEASURES)
    assert reply["percentile"] == reply["percentiles"]["cosine_similarity"] == 100.0
    assert reply["percentiles"]["euclidean_distance"] == 100.0
    other = {"text1": "0 a 0", "text2": "7 zzzzzzzzzzzzzzzzzzzzzzzzz", "with_percentile": True}
    reply = await ask(running.client, PAIR, **other)
    assert 0.0 <= reply["percentile"] < 100.0
    assert reply == await ask(running.client, PAIR, **other)


async def test_percentile_of_a_token_measure_says_why_there_is_none(running: RunningApplication) -> None:
    """Random pairs are pairs of whole texts."""
    reply = await ask(running.client, PAIR, text1="a", text2="b", similarity_measure="maxsim", with_percentile=True)
    assert reply["percentile"] is None
    assert "maxsim compares tokens" in reply["percentile_reason"]


async def test_scale_is_drawn_anew_when_the_store_has_grown_and_only_then(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter more texts make a new scale; asking again does not."""
    drawn: list[int] = []
    real = similarity_scales.draw_pairs

    def draw_pairs(n_texts: int, rng: np.random.Generator) -> Any:
        drawn.append(n_texts)
        return real(n_texts, rng)

    monkeypatch.setattr(similarity_scales, "draw_pairs", draw_pairs)
    await store(running.client, 60)
    same = {"text1": "0 a 0", "text2": "0 a 0", "with_percentile": True}
    await asyncio.gather(*(ask(running.client, PAIR, **same) for _ in range(5)))
    await ask(running.client, PAIR, similarity_measure="hsic", **same)
    assert drawn == [60]
    await store(running.client, 20, start=60)
    await ask(running.client, PAIR, **same)
    assert drawn == [60, 80]


# Matrices


@pytest.mark.parametrize("measure", ["cosine_similarity", "euclidean_distance", "hsic", "maxsim"])
async def test_matrix_has_the_scores_of_the_pairs(measure: str, running: RunningApplication) -> None:
    """Symmetric and directed measures, of vectors and of tokens; rows are the first text."""
    reply = await ask(running.client, MATRIX, strings=TEXTS, similarity_measure=measure)
    assert reply["strings"] == reply["other_strings"] == TEXTS
    assert reply["similarity_measure"] == measure
    for row, text1 in enumerate(TEXTS):
        for column, text2 in enumerate(TEXTS):
            assert reply["similarity_matrix"][row][column] == pytest.approx(
                await score(running.client, text1, text2, measure), abs=1e-12
            )


async def test_matrix_of_two_lists_has_rows_of_the_first(running: RunningApplication) -> None:
    """`other_strings` are the columns."""
    reply = await ask(running.client, MATRIX, strings=TEXTS[:1], other_strings=TEXTS[1:])
    assert np.shape(reply["similarity_matrix"]) == (1, 2)
    assert reply["other_strings"] == TEXTS[1:]
    assert reply["similarity_matrix"][0][1] == await score(running.client, TEXTS[0], TEXTS[2], "cosine_similarity")


async def test_symmetric_measures_are_computed_once_for_each_pair(
    running: RunningApplication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six comparisons for three texts, not nine; nine where the direction matters."""
    for name, expected in (("cosine_similarity", 6), ("chatterjee_xi", 9)):
        counted: list[int] = []
        measure = similarity_measures.MEASURES[name]

        def count(query: Any, candidates: Any, counted: list[int] = counted, measure: Any = measure) -> Any:
            counted.append(len(candidates))
            return measure.function(query, candidates)

        counting = type(measure)(name, count, measure.range, symmetric=measure.symmetric)
        with monkeypatch.context() as patch:
            patch.setitem(similarity_measures._MEASURES_BY_SPELLING, name, counting)
            await ask(running.client, MATRIX, strings=TEXTS, similarity_measure=name)
        assert sum(counted) == expected


@pytest.mark.parametrize(
    ("body", "status", "field", "index"),
    [
        ({"strings": []}, 422, "strings", None),
        ({"strings": ["a"], "other_strings": []}, 422, "other_strings", None),
        ({"strings": ["a", " "]}, 400, "strings", 1),
        ({"strings": ["a"], "other_strings": ["b", "c", ""]}, 400, "other_strings", 2),
        ({"strings": ["a"], "similarity_measure": "all"}, 400, "similarity_measure", None),
    ],
)
async def test_what_makes_no_matrix_is_refused_with_its_place(
    body: dict[str, Any], status: int, field: str, index: int | None, running: RunningApplication
) -> None:
    """The field and the position in it."""
    error = await refuse(running.client, MATRIX, status, **body)
    assert (error["field"], error["index"]) == (field, index)


async def test_matrices_are_bounded(tmp_path: Any) -> None:
    """Of strings and of tokens: a 413 that names the setting and the sizes."""
    async with run_application(tmp_path, max_similarity_matrix_cells=8) as running:
        error = await refuse(running.client, MATRIX, 413, strings=TEXTS)
        assert "3 x 3" in error["detail"]
        assert "MAX_SIMILARITY_MATRIX_CELLS" in error["detail"]
        error = await refuse(running.client, TOKENS, 413, text1="abc", text2="abcdef")
        assert "MAX_SIMILARITY_MATRIX_CELLS" in error["detail"]


# Tokens


async def test_token_comparison_explains_the_maxsim_score(running: RunningApplication) -> None:
    """The means of the best matches are MaxSim in both directions, and each best match is a cell of the matrix."""
    reply = await ask(running.client, TOKENS, text1="ab", text2="bcd")
    matrix = np.array(reply["token_similarity_matrix"])
    assert matrix.shape == (len(reply["tokens1"]), len(reply["tokens2"]))
    for direction, cells, expected in (("1", matrix, ("ab", "bcd")), ("2", matrix.T, ("bcd", "ab"))):
        matches = reply[f"best_matches{direction}"]
        tokens, others = reply[f"tokens{direction}"], reply["tokens2" if direction == "1" else "tokens1"]
        assert [match["token"] for match in matches] == tokens
        for match in matches:
            assert match["cosine_similarity"] == cells[match["position"]].max()
            assert match["cosine_similarity"] == cells[match["position"], match["best_match_position"]]
            assert match["best_match_token"] == others[match["best_match_position"]]
        mean = np.mean([match["cosine_similarity"] for match in matches])
        name = "maxsim_score" if direction == "1" else "maxsim_score_reversed"
        assert reply[name] == pytest.approx(mean, abs=1e-12)
        assert reply[name] == pytest.approx(await score(running.client, *expected, "maxsim"), abs=1e-12)


async def test_token_comparison_names_the_text_at_fault(running: RunningApplication) -> None:
    """As every endpoint with two texts does."""
    error = await refuse(running.client, TOKENS, 400, text1="a", text2="  ")
    assert (error["field"], error["index"]) == ("text2", None)


# Pictures


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("image/png", True),
        ("IMAGE/PNG", True),
        ("image/*", True),
        ("image/png, application/json", False),
        ("image/png, application/json;q=0.5", True),
        ("image/png;q=0.5, application/json", False),
        ("image/avif,image/webp,image/png,*/*;q=0.8", True),
        ("text/html", False),
        ("image/*, image/png;q=0", False),
        ("image/png;q=x", False),
        ("image/png;q=nan, application/json;q=inf", False),
        (";;,,image/png ; q=1.0 ", True),
    ],
)
def test_form_of_the_reply_follows_the_accept_header(accept: str, expected: bool) -> None:
    """By quality and by how exactly a range names the type; JSON where nothing says otherwise."""
    assert prefers_png(accept) is expected


@pytest.mark.parametrize(
    ("path", "body"), [(MATRIX, {"strings": TEXTS}), (TOKENS, {"text1": TEXTS[0], "text2": TEXTS[1]})]
)
async def test_picture_is_a_png(path: str, body: dict[str, Any], running: RunningApplication) -> None:
    """With `Accept: image/png`; errors stay JSON."""
    response = await running.client.post(path, json=body, headers=PNG)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as picture:
        picture.load()
        assert min(picture.size) > 100
    response = await running.client.post(path, json={**body, "model_name": "none"}, headers=PNG)
    assert response.status_code == 404
    assert response.json()["code"] == "model_not_found"


async def test_pictures_asked_for_at_once_are_all_drawn(running: RunningApplication) -> None:
    """One after the other, without a mistake; each is what it is alone."""
    bodies = [{"strings": TEXTS[: count + 1]} for count in range(3)] * 3
    drawn = await asyncio.gather(*(running.client.post(MATRIX, json=body, headers=PNG) for body in bodies))
    assert [response.status_code for response in drawn] == [200] * 9
    assert len({response.content for response in drawn}) == 3


async def test_swagger_shows_both_forms(running: RunningApplication) -> None:
    """Whoever reads the description learns of the picture."""
    description = (await running.client.get("/openapi.json")).json()
    for path in (MATRIX, TOKENS):
        content = description["paths"][path]["post"]["responses"]["200"]["content"]
        assert list(content) == ["application/json", "image/png"]


def test_fake_engine_has_dimensions_enough_for_every_measure() -> None:
    """What the tests above rest on."""
    assert FakeBackend().n_dims >= max(measure.minimum_dimensions for measure in similarity_measures.MEASURES.values())
