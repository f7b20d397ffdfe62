"""`/metrics`: what is counted, that names and labels stay few, and that the dashboard asks for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import FAKE_MODEL_NAME, RunningApplication, run_application

EMBED = "/get_embedding_vector_for_string/"
TOKEN = "a-token-for-tests-only-1234"
DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana-dashboard.json"
Labels = dict[str, str]


async def scrape(client: httpx.AsyncClient) -> dict[str, list[tuple[Labels, float]]]:
    """Samples by name, as Prometheus reads them."""
    reply = await client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(reply.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value_of(samples: dict[str, list[tuple[Labels, float]]], name: str, **labels: str) -> float:
    [value] = [value for found, value in samples[f"llama_embeddings_{name}"] if labels.items() <= found.items()]
    return value


async def test_figures_are_those_of_what_was_done(running: RunningApplication) -> None:
    """Three requests, two texts, one of them asked for twice: counted where each part counts."""
    before = await scrape(running.client)
    for text in ("first", "second", "second"):
        assert (await running.client.post(EMBED, json={"text": text})).status_code == 200
    assert (await running.client.post(EMBED, json={"text": ""})).status_code == 400
    after = await scrape(running.client)

    def change(name: str, **labels: str) -> float:
        return value_of(after, name, **labels) - value_of(before, name, **labels)

    assert value_of(after, "request_duration_seconds_count", method="POST", route=EMBED, status="200") == 3
    assert value_of(after, "request_duration_seconds_count", method="POST", route=EMBED, status="400") == 1
    assert value_of(after, "request_duration_seconds_bucket", route=EMBED, status="200", le="+Inf") == 3
    assert value_of(after, "request_duration_seconds_sum", route=EMBED, status="200") > 0
    assert value_of(after, "requests_under_way") == 1
    assert change("engine_texts_total", model=FAKE_MODEL_NAME) == 2
    assert change("engine_tokens_total", model=FAKE_MODEL_NAME) == len("first") + len("second") + 4
    assert change("engine_passes_total", model=FAKE_MODEL_NAME) == 2
    assert change("engine_compute_seconds_total", model=FAKE_MODEL_NAME) > 0
    assert change("engine_queue_seconds_total", model=FAKE_MODEL_NAME) > 0
    assert change("answers_total", source="computed") == 2
    assert change("answers_total", source="memory") == 1
    assert change("store_writes_total") == 2
    assert change("store_embeddings") == 2
    assert value_of(after, "index_vectors", model=FAKE_MODEL_NAME) == 2
    assert value_of(after, "models", state="loaded") == 1
    assert value_of(after, "memory_cache_embeddings") == 2
    assert (value_of(after, "engine_queued_texts"), value_of(after, "store_write_queue_depth")) == (0, 0)
    assert (value_of(after, "store_up"), value_of(after, "engine_failed")) == (1, 0)
    assert value_of(after, "store_size_bytes") >= 4096


async def test_labels_do_not_grow_with_what_callers_send(running: RunningApplication) -> None:
    """Any path, method and parameter: one series for what fits no route."""
    for number in range(50):
        await running.client.request(f"METHOD{number}", f"/no/such/path/{number}")
        await running.client.get(f"/v1/models/unknown-{number}")
        await running.client.get(f"/static/nothing-{number}.js")
    samples = await scrape(running.client)
    counted = samples["llama_embeddings_request_duration_seconds_count"]
    assert {labels["route"] for labels, _ in counted} <= {"none", "/v1/models/{model:path}", "/static"}
    assert {labels["method"] for labels, _ in counted} <= {"GET", "other"}
    assert len(counted) <= 6


async def test_buckets_hold_those_before_them(running: RunningApplication) -> None:
    """As Prometheus wants them: ascending, the last one all."""
    for _ in range(5):
        await running.client.get("/health")
    samples = await scrape(running.client)
    buckets = [
        value
        for labels, value in samples["llama_embeddings_request_duration_seconds_bucket"]
        if labels["route"] == "/health"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 5


async def test_figures_ask_for_the_token_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    """Names of models and how much is asked of them are not for everybody."""
    async with run_application(tmp_path, security_token=TOKEN) as running:
        assert (await running.client.get("/metrics")).status_code == 401
        assert (await running.client.get("/metrics", params={"token": TOKEN})).status_code == 200
    async with run_application(tmp_path, security_token=TOKEN, metrics_require_token=False) as running:
        assert (await running.client.get("/metrics")).status_code == 200
        assert (await running.client.get("/v1/models")).status_code == 401
        described = (await running.client.get("/openapi.json")).json()["paths"]["/metrics"]["get"]
        assert described["security"] == []


async def test_figures_are_there_while_the_database_is_not(running: RunningApplication) -> None:
    """A fault is to be seen there, not to hide there."""
    running.database.write_bytes(b"no database any more" * 1000)
    running.database.with_name(running.database.name + "-wal").write_bytes(b"nor a log" * 1000)
    samples = await scrape(running.client)
    assert value_of(samples, "engine_failed") == 0
    assert "llama_embeddings_store_up" in samples


async def test_process_figures_are_there(running: RunningApplication) -> None:
    """Memory, processor time and descriptors."""
    samples = await scrape(running.client)
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= samples.keys()


async def test_every_metric_of_the_dashboard_exists(running: RunningApplication) -> None:
    """With the labels that its queries name; and every metric of ours is on it."""
    await running.client.post(EMBED, json={"text": "so that everything has a sample"})
    samples = await scrape(running.client)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) >= 15
    asked: set[str] = set()
    for query in queries:
        names = set(re.findall(r"\b(?:llama_embeddings|process)_\w+", query))
        assert names, query
        assert names <= samples.keys(), query
        asked |= names
        for grouped in re.findall(r"by \(([\w, ]+)\)", query):
            labels = {label for name in names for found, _ in samples[name] for label in found}
            assert set(re.split(r", *", grouped)) <= labels, query
    ours = {name for name in samples if name.startswith("llama_embeddings_")}
    assert ours - asked == {"llama_embeddings_request_duration_seconds_sum"}
