"""Search over a million embeddings through HTTP, beside its limits: `python -m benchmarks.search`.

The vectors are made, not shipped: clusters within clusters whose spectrum falls as that of sentence embeddings does
(participation ratio 69, local dimension 20; the sentences of Cranfield by all-MiniLM-L6-v2 have 68 and 19), or
directions at random (`--kind sphere`), which no index can do much about. They go into a database through the store; a
real server is started on it. Queries are stored under texts of their own, so that their embedding need not be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import numpy as np
import psutil

from benchmarks.engine import MODEL, PROJECT_DIRECTORY, find_free_port, running
from benchmarks.texts import make_texts
from embeddings_data_models import BulkEmbeddings
from llama_embeddings.commands.import_embeddings import ROWS_PER_PART, WRITER_CACHE_IN_MB
from llama_embeddings.storage.store import EmbeddingStore

N_DIMS = 384
N_QUERIES = 500
N_NEAREST = 10
N_TOPICS = 2_000
N_AREAS = 60
SPECTRUM_FALL = 1.3
OWN_SHARE = 0.65  # of a text's direction that is not its topic's
SEARCH_PATH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
EMBED_PATH = "/get_embedding_vector_for_string/"


def make_vectors(n_rows: int, kind: str, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Unit vectors in batches of ROWS_PER_PART, float32 (n, N_DIMS); the same for the same seed."""
    generator = np.random.default_rng(seed)
    spectrum = ((np.arange(N_DIMS) + 10.0) ** (-SPECTRUM_FALL / 2)).astype(np.float32)
    spectrum /= np.linalg.norm(spectrum)
    basis = np.linalg.qr(generator.standard_normal((N_DIMS, N_DIMS)))[0].astype(np.float32)
    areas = generator.standard_normal((N_AREAS, N_DIMS), dtype=np.float32) * spectrum
    topics = generator.standard_normal((N_TOPICS, N_DIMS), dtype=np.float32) * spectrum
    topics = 0.6 * areas[generator.integers(0, N_AREAS, N_TOPICS)] + 0.8 * topics
    popularity = np.arange(1, N_TOPICS + 1) ** -0.7
    for start in range(0, n_rows, ROWS_PER_PART):
        own = generator.standard_normal((min(ROWS_PER_PART, n_rows - start), N_DIMS), dtype=np.float32)
        if kind == "clusters":
            chosen = generator.choice(N_TOPICS, len(own), p=popularity / popularity.sum())
            own = (topics[chosen] * np.float32((1 - OWN_SHARE**2) ** 0.5) + OWN_SHARE * own * spectrum) @ basis
        yield own / np.linalg.norm(own, axis=1, keepdims=True)


def name_row(number: int) -> str:
    return f"row {number}"


@dataclass
class Corpus:
    """A filled database, its queries, and the texts that truly are nearest to each."""

    directory: Path
    n_rows: int
    rows_per_second: float
    truth: list[list[str]]
    queries: list[str] = field(default_factory=lambda: [name_row(number) for number in range(N_QUERIES)])


async def fill(directory: Path, n_rows: int, kind: str) -> Corpus:
    """Put rows into a new database, and find the nearest of the first N_QUERIES by brute force in passing."""
    recipe = find_recipe()
    store = await EmbeddingStore.open(
        f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
        writer_cache_in_mb=WRITER_CACHE_IN_MB,
        follows_full_text=False,
    )
    queries = next(make_vectors(n_rows, kind))[:N_QUERIES]
    best_scores = np.full((N_QUERIES, N_NEAREST), -2, np.float32)
    best_rows = np.zeros((N_QUERIES, N_NEAREST), np.int64)
    n_done, seconds = 0, 0.0
    for vectors in make_vectors(n_rows, kind):
        texts = [name_row(number) for number in range(n_done, n_done + len(vectors))]
        started = time.perf_counter()
        await store.import_embeddings(BulkEmbeddings(texts, vectors, MODEL.stem, recipe))
        seconds += time.perf_counter() - started
        scores = queries @ vectors.T
        if n_done == 0:
            np.fill_diagonal(scores, -2)  # a query does not find itself
        scores = np.concatenate((best_scores, scores), axis=1)
        numbers = np.broadcast_to(np.arange(n_done, n_done + len(vectors)), (N_QUERIES, len(vectors)))
        numbers = np.concatenate((best_rows, numbers), axis=1)
        best = np.argpartition(-scores, N_NEAREST, axis=1)[:, :N_NEAREST]
        best_scores, best_rows = (np.take_along_axis(array, best, axis=1) for array in (scores, numbers))
        n_done += len(vectors)
    await store.index_full_text()
    await store.close()
    truth = [[name_row(number) for number in row] for row in best_rows.tolist()]
    return Corpus(directory, n_rows, n_rows / seconds, truth)


def find_recipe() -> str:
    """The recipe family of the default model, from a server of its own."""
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as server:
        models = json.loads(
            urllib.request.urlopen(f"{server.url}/get_list_of_models_with_their_states/", timeout=60).read()
        )["models"]
    return str(next(model["recipe"] for model in models if model["model_name"] == MODEL.stem))


@dataclass
class Server:
    url: str
    process: Popen[bytes]
    seconds_to_ready: float

    @property
    def resident_gb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e9)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=120)


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """The server on the database in a directory."""
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(port),
        "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
        "LOG_DIRECTORY": str(directory),
        "MODELS_DIRECTORY": str(MODEL.parent),
    }
    started = time.perf_counter()
    with running(
        [sys.executable, str(PROJECT_DIRECTORY / "llama_embeddings_server.py")], url, "/ready", **settings
    ) as (process):
        yield Server(url, process, time.perf_counter() - started)


def ask(connection: http.client.HTTPConnection, path: str, **body: object) -> dict[str, list[dict[str, object]]]:
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content[:500]!r}")
    reply: dict[str, list[dict[str, object]]] = json.loads(content)
    return reply


def search(connection: http.client.HTTPConnection, query: str) -> list[str]:
    reply = ask(connection, SEARCH_PATH, query_text=query, number_of_most_similar_strings_to_return=N_NEAREST)
    return [str(result["search_result_text"]) for result in reply["results"]]


def time_searches(server: Server, queries: list[str], *, until: Callable[[], bool] = lambda: False) -> list[float]:
    """Seconds of each search, one after the other."""
    connection = server.connect()
    seconds = []
    for query in queries:
        if until():
            break
        started = time.perf_counter()
        search(connection, query)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure_recall(server: Server, corpus: Corpus) -> float:
    connection = server.connect()
    n_found = sum(
        len(set(search(connection, query)) & set(nearest))
        for query, nearest in zip(corpus.queries, corpus.truth, strict=True)
    )
    return n_found / (N_NEAREST * len(corpus.queries))


def measure_under_adds(
    server: Server, corpus: Corpus, seconds: float, *, n_adding: int, n_searching: int
) -> list[float]:
    """Seconds of each search while clients let new texts be embedded, one a request."""
    stopped = threading.Event()

    def add(number: int) -> int:
        connection = server.connect()
        n_added = 0
        for n_added, text in enumerate(make_texts(35, seed=time.time_ns() + number)):  # noqa: B007
            if stopped.is_set():
                break
            ask(connection, EMBED_PATH, text=text)
        return n_added

    with ThreadPoolExecutor(n_adding + n_searching) as pool:
        adding = [pool.submit(add, number) for number in range(n_adding)]
        searching = [
            pool.submit(time_searches, server, corpus.queries * 100, until=stopped.is_set) for _ in range(n_searching)
        ]
        time.sleep(seconds)
        stopped.set()
        n_added = sum(one.result() for one in adding)
        print(f"{n_added / seconds:.0f} texts/s added by {n_adding} clients", file=sys.stderr)
        return [second for one in searching for second in one.result()]


def report(what: str, limit: str, value: str) -> None:
    print(f"| {what} | {limit} | {value} |", flush=True)


def report_latency(what: str, limits: str, seconds: list[float]) -> None:
    p50, p99 = (1000 * np.quantile(seconds, share) for share in (0.5, 0.99))
    report(what, limits, f"p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(seconds)} searches)")


def measure(corpus: Corpus, seconds: float) -> None:
    """All figures of a corpus, as rows of a table."""
    print("| what | limit | measured |\n|---|---|---|")
    report(f"import of {corpus.n_rows:,} vectors", "20,000 rows/s", f"{corpus.rows_per_second:,.0f} rows/s")
    with serving(corpus.directory) as server:
        report("from start to ready, no snapshot", "60 s", f"{server.seconds_to_ready:.1f} s")
    with serving(corpus.directory) as server:
        report("from start to ready, with a snapshot", "10 s", f"{server.seconds_to_ready:.1f} s")
        report("recall@10", "0.97", f"{measure_recall(server, corpus):.4f}")
        report_latency("search, one client", "p50 5 ms, p99 15 ms", time_searches(server, corpus.queries * 3))
        report("resident", "3 GB", f"{server.resident_gb:.2f} GB")
        for n_adding, n_searching in ((16, 1), (1, 16)):
            found = measure_under_adds(server, corpus, seconds, n_adding=n_adding, n_searching=n_searching)
            report_latency(f"search by {n_searching} while {n_adding} add", "p99 50 ms", found)
        report("resident at the end", "3 GB", f"{server.resident_gb:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("clusters", "sphere"), default="clusters")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--directory", type=Path, help="keep the database here, and use the one that is here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        measure(open_corpus(directory, arguments.rows, arguments.kind), arguments.seconds)


def open_corpus(directory: Path, n_rows: int, kind: str) -> Corpus:
    """The corpus that is in a directory, made if there is none."""
    notes = directory / "corpus.json"
    if notes.exists():
        known = json.loads(notes.read_text())
        return Corpus(directory, known["n_rows"], known["rows_per_second"], known["truth"])
    corpus = asyncio.run(fill(directory, n_rows, kind))
    notes.write_text(json.dumps({"n_rows": n_rows, "rows_per_second": corpus.rows_per_second, "truth": corpus.truth}))
    return corpus


if __name__ == "__main__":
    main()
