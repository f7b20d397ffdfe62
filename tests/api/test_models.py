"""Models over the API: their states, loading and unloading, adding one from a hub, and their words for queries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_embeddings.catalogue import models as catalogue_models
from llama_embeddings.catalogue.entries import CatalogueEntry, HubFile, ModelKind
from llama_embeddings.errors import ModelLoading
from tests.hub_server import HubServer
from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application
from tests.tiny_models import write_tiny_model

STATES = "/get_list_of_models_with_their_states/"
EMBED = "/get_embedding_vector_for_string/"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer().running() as hub:
        yield hub


async def state_of(running: RunningApplication, name: str) -> dict[str, object]:
    models = (await running.client.get(STATES)).json()["models"]
    return next(model for model in models if model["model_name"] == name)


async def test_list_tells_loaded_models_from_those_that_are_only_known(running: RunningApplication) -> None:
    """The default comes first, with its facts; the catalogue's models are there without a file."""
    models = (await running.client.get(STATES)).json()["models"]
    assert (models[0]["model_name"], models[0]["state"], models[0]["is_default"]) == (FAKE_MODEL_NAME, "loaded", True)
    assert models[0]["recipe"]
    known = {model["model_name"]: model["state"] for model in models}
    assert known["bge-m3"] == "known"


async def test_model_is_unloaded_and_loaded_again(running: RunningApplication) -> None:
    """Its file stays, and the next request loads it."""
    assert (await running.client.post("/unload_model/", json={"model_name": FAKE_MODEL_NAME})).status_code == 200
    assert (await state_of(running, FAKE_MODEL_NAME))["state"] == "on_disk"
    assert (await running.client.post(EMBED, json={"text": "hello"})).status_code == 200
    assert (await state_of(running, FAKE_MODEL_NAME))["state"] == "loaded"


async def test_recipe_of_a_replaced_file_is_not_served_by_the_new_one(running: RunningApplication) -> None:
    """A request that read the recipe before the replacement would store the new model's vectors under it."""
    models = running.app.state.services.models
    recipe = await models.recipe(None)
    async with models.lease(None, recipe) as engine:
        assert engine.info.digest == recipe.model_digest
    await models.check_current(FAKE_MODEL_NAME, recipe.family)
    with pytest.raises(ModelLoading, match="replaced"):
        async with models.lease(None, replace(recipe, model_digest="another")):
            pass
    with pytest.raises(ModelLoading, match="replaced"):
        await models.check_current(FAKE_MODEL_NAME, "another")


async def test_unknown_model_is_neither_loaded_nor_unloaded(running: RunningApplication) -> None:
    """A 404 that lists what there is."""
    for path in ("/load_model/", "/unload_model/"):
        response = await running.client.post(path, json={"model_name": "no-such-model"})
        assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
        assert FAKE_MODEL_NAME in response.json()["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a/b/resolve/main/c.gguf",
        "https://example.org/a/b/resolve/main/c.gguf",
        "https://huggingface.co/a/b/resolve/main/c.bin",
        "not an address",
    ],
)
async def test_address_that_is_not_allowed_is_refused(url: str, running: RunningApplication) -> None:
    """A caller cannot make the server fetch from anywhere."""
    response = await running.client.post("/add_new_model/", json={"model_url": url})
    assert (response.status_code, response.json()["field"]) == (400, "model_url")


async def test_model_from_a_hub_is_added_listed_and_answers(tmp_path: Path, hub: HubServer) -> None:
    """From its address to an embedding, over the API alone."""
    source = tmp_path / "source.gguf"
    write_tiny_model(source)
    hub.add("owner/tiny-GGUF", "tiny-model.gguf", source.read_bytes())
    async with run_application(tmp_path, hub_endpoint=hub.endpoint, model_hub_hosts="127.0.0.1") as running:
        address = f"{hub.endpoint}/owner/tiny-GGUF/resolve/main/tiny-model.gguf"
        response = await running.client.post("/add_new_model/", json={"model_url": address})
        assert response.status_code == 202
        async with asyncio.timeout(20):
            while (await state_of(running, "tiny-model"))["state"] != "on_disk":
                await asyncio.sleep(0.05)
        response = await running.client.post(EMBED, json={"text": "hello", "model_name": "tiny-model"})
        assert response.status_code == 200


async def test_model_of_the_catalogue_is_downloaded_when_it_is_asked_for(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is there, callers are told to come back; with downloads off it is unknown."""
    source = tmp_path / "source.gguf"
    write_tiny_model(source)
    hub.add("owner/known", "known.gguf", source.read_bytes())
    entry = CatalogueEntry(name="known", kind=ModelKind.EMBEDDING, source=HubFile("owner/known", "known.gguf"))
    monkeypatch.setattr(catalogue_models, "ENTRIES", {"known": entry})
    request = {"text": "hello", "model_name": "known"}
    (tmp_path / "off").mkdir()
    async with run_application(tmp_path / "off", hub_endpoint=hub.endpoint, download_models_on_demand=False) as running:
        assert (await running.client.post(EMBED, json=request)).status_code == 404
    async with run_application(tmp_path, hub_endpoint=hub.endpoint) as running:
        response = await running.client.post(EMBED, json=request)
        assert (response.status_code, response.json()["code"]) == (503, "model_loading")
        assert int(response.headers["retry-after"]) > 0
        async with asyncio.timeout(20):
            while (await running.client.post(EMBED, json=request)).status_code != 200:
                await asyncio.sleep(0.05)


async def test_words_for_queries_and_documents_make_other_vectors_and_the_search_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are part of the recipe: the same text has a vector for each part, and neither is passed off as another."""
    entry = CatalogueEntry(
        name=FAKE_MODEL_NAME,
        kind=ModelKind.EMBEDDING,
        source=HubFile("owner/fake", "fake.gguf"),
        query_prompt="query: ",
        document_prompt="passage: ",
    )
    monkeypatch.setattr(catalogue_models, "ENTRIES", {FAKE_MODEL_NAME: entry})
    async with run_application(tmp_path) as running:
        vectors = {}
        for part in (None, "query", "document"):
            response = await running.client.post(EMBED, json={"text": "snow", "input_type": part})
            assert response.headers["x-embedding-source"] == "computed"
            vectors[part] = np.array(response.json()["embedding"])
        prompted = await running.client.post(EMBED, json={"text": "query: snow"})
        assert np.allclose(prompted.json()["embedding"], vectors["query"], atol=1e-6)
        assert not np.allclose(vectors["query"], vectors["document"], atol=1e-3)
        await running.client.post(EMBED, json={"text": "ice on the road", "input_type": "document"})
        results = (await running.client.post(SEARCH, json={"query_text": "snow"})).json()["results"]
        assert {result["search_result_text"] for result in results} == {"ice on the road", "query: snow"}
