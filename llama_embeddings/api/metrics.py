"""`GET /metrics`: figures for Prometheus, gathered when it asks from what the parts count anyway.

Labels come from bounded sets: route templates, methods, statuses, names of models, states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from llama_embeddings.api.connections import ConnectionLimits
from llama_embeddings.api.dependencies import CurrentServices
from llama_embeddings.api.error_responses import describe_statuses
from llama_embeddings.observability import DURATION_BUCKETS, RequestMeter
from llama_embeddings.services.statistics import EngineStatistics, ServerStatistics

PREFIX = "llama_embeddings"

router = APIRouter(tags=["Health"])


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **describe_statuses(401)}
)
async def metrics(request: Request, services: CurrentServices) -> Response:
    """Figures in the text format of Prometheus. Asks for the token unless METRICS_REQUIRE_TOKEN is off."""
    statistics = await services.statistics.collect()
    state = request.app.state
    registry = CollectorRegistry()
    registry.register(_Fixed(list(describe_server(statistics, state.meter, state.connection_limits, state.version))))
    for collector in state.process_collectors:
        registry.register(collector)
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


def make_process_collectors() -> list[Collector]:
    """Memory, processor time, descriptors, garbage collections: what the client library reads by itself."""
    registry = CollectorRegistry()
    return [ProcessCollector(registry=registry), PlatformCollector(registry=registry), GCCollector(registry=registry)]


class _Fixed(Collector):
    """Metrics that are there already."""

    def __init__(self, found: Sequence[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        return self._found


class _Counted(NamedTuple):
    """One metric: what it is called, what it says, and its value for one engine."""

    name: str
    help: str
    field: str


ENGINE_COUNTERS = (
    _Counted("engine_passes", "Passes over the model.", "n_passes"),
    _Counted("engine_texts", "Texts computed.", "n_texts"),
    _Counted("engine_tokens", "Tokens computed.", "n_tokens"),
    _Counted("engine_failed_texts", "Texts that the engine gave no usable vector for.", "n_failed_texts"),
    _Counted("engine_skipped_texts", "Texts not computed because nobody waited any more.", "n_skipped_texts"),
    _Counted("engine_queue_seconds", "Time that computed texts waited, summed over texts.", "queue_seconds"),
    _Counted("engine_compute_seconds", "Time that passes took, summed over passes and workers.", "compute_seconds"),
)
ENGINE_GAUGES = (
    _Counted("engine_queued_texts", "Texts that wait for the engine.", "n_queued_texts"),
    _Counted("engine_queued_tokens", "Tokens that wait for the engine.", "n_queued_tokens"),
    _Counted("engine_tokens_per_second", "Speed over the last passes.", "tokens_per_second"),
    _Counted("engine_failed", "1 if a worker has ended and the model is to be loaded again.", "has_failed"),
)
STORE_COUNTERS = (
    _Counted("store_writes", "Writes committed.", "n_writes_committed"),
    _Counted("store_failed_writes", "Writes that were answered with an error.", "n_writes_failed"),
    _Counted("store_transactions", "Transactions, each of one or many writes.", "n_write_transactions"),
    _Counted("store_lock_retries", "Attempts repeated because the database was locked.", "n_lock_retries"),
)
STORE_GAUGES = (
    _Counted("store_embeddings", "Embeddings kept.", "n_embeddings"),
    _Counted("store_token_level_bundles", "Token-level matrices kept.", "n_token_level_bundles"),
    _Counted("store_documents", "Documents kept.", "n_documents"),
    _Counted("store_write_queue_depth", "Writes that wait for their turn.", "write_queue_depth"),
)


def describe_server(
    statistics: ServerStatistics, meter: RequestMeter, connections: ConnectionLimits, version: str
) -> Iterator[Metric]:
    """Every metric that is ours."""
    yield _label(
        GaugeMetricFamily, "build_info", "Always 1; the label is the program's version.", "version", {version: 1}
    )
    yield from _describe_requests(meter)
    yield _count("connections_refused", "Connections beyond MAX_CONNECTIONS.", connections.n_refused)
    yield _count("connections_cut", "Connections that sent or took too little in time.", connections.n_cut)
    yield from _describe_engines(statistics.engines)
    yield _label(
        GaugeMetricFamily, "models", "Models by what can be done with them.", "state", statistics.n_models_by_state
    )
    yield _label(
        CounterMetricFamily, "answers", "Embeddings answered, by where from.", "source", statistics.n_answers_by_source
    )
    yield _gauge(
        "memory_cache_embeddings", "Embeddings in the memory in front of the store.", statistics.n_cached_embeddings
    )
    yield _gauge("memory_cache_bytes", "Size of that memory.", statistics.n_cached_bytes)
    yield _label(
        GaugeMetricFamily, "index_vectors", "Vectors that can be searched.", "model", statistics.n_indexed_by_model
    )
    yield from _describe_store(statistics)


def _describe_requests(meter: RequestMeter) -> Iterator[Metric]:
    labels = ["method", "route", "status"]
    histogram = HistogramMetricFamily(
        f"{PREFIX}_request_duration_seconds", "Requests by the time until the end of their reply.", labels=labels
    )
    for (method, route, status), series in meter.series.items():
        histogram.add_metric([method, route, str(status)], _accumulate(series.counts), series.seconds)
    yield histogram
    yield _gauge("requests_under_way", "Requests being answered, this one included.", meter.n_under_way)


def _accumulate(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: each holds those before it, too."""
    names = [*map(str, DURATION_BUCKETS), "+Inf"]
    return [(name, sum(counts[: place + 1])) for place, name in enumerate(names)]


def _describe_engines(engines: Sequence[EngineStatistics]) -> Iterator[Metric]:
    for family, described in ((CounterMetricFamily, ENGINE_COUNTERS), (GaugeMetricFamily, ENGINE_GAUGES)):
        for counted in described:
            values = {engine.model_name: float(getattr(engine, counted.field)) for engine in engines}
            yield _label(family, counted.name, counted.help, "model", values)


def _describe_store(statistics: ServerStatistics) -> Iterator[Metric]:
    store = statistics.store
    yield _gauge("store_up", "1 if the database can be read.", store is not None)
    yield _gauge("store_size_bytes", "Size of the database with its log.", statistics.n_store_bytes)
    if store is not None:
        for counted in STORE_COUNTERS:
            yield _count(counted.name, counted.help, getattr(store, counted.field))
        for counted in STORE_GAUGES:
            yield _gauge(counted.name, counted.help, getattr(store, counted.field))


def _count(name: str, description: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", description, value=value)


def _gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", description, value=value)


def _label(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    description: str,
    label: str,
    values: dict[str, int] | dict[str, float],
) -> Metric:
    found = family(f"{PREFIX}_{name}", description, labels=[label])
    for key, value in values.items():
        found.add_metric([key], value)
    return found
