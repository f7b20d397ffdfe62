"""Half an hour of mixed load at saturation: `python -m benchmarks.soak --minutes 30`, or `make soak`.

More clients than the engine can serve send, each as fast as it is answered: fresh and known texts, batches of all
sizes, token-level embeddings, searches with and without filters, similarities, documents, the other dialects, broken
requests, and requests whose client leaves before the answer. The texts are short, so that 200,000 different ones fit.

Fails (exit code 1) at any unexpected status, a resident size that grows by more than a tenth after the warm-up,
descriptors, threads or tasks that grow, latencies that grow by half and by a tenth of a second, a damaged database, or
an index that has not the rows of the database. Prints a table for `benchmarks/LOG.md`. How fast the server is, others
measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from benchmarks.engine import MODEL, PROJECT_DIRECTORY, find_free_port, running
from benchmarks.load import Client
from benchmarks.texts import make_texts

N_CLIENTS = 12
TOKENS_PER_TEXT = 12
WANTED_TEXTS_PER_MINUTE = 200_000 / 30
# Of the whole time; what is measured after it is held against what follows.
WARM_UP_SHARE = 0.2
MAX_GROWTH = 1.1
MAX_MORE_DESCRIPTORS, MAX_MORE_THREADS, MAX_MORE_TASKS = 20, 6, 20
# Both have to be exceeded: a few milliseconds more are a lot of a few milliseconds, and a neighbour's doing.
MAX_SLOWER, MAX_SECONDS_MORE = 1.5, 0.1
# What looks at all rows, or counts them, takes longer the more there are.
GROWING_KINDS = {"filtered search", "listing"}
# Fewer replies of a kind say nothing about its latency.
MIN_REPLIES = 30
N_KNOWN_TEXTS = 2_000
SECONDS_BETWEEN_SAMPLES = 2.0
LEAVING_AFTER_SECONDS = 0.02
SECONDS_BETWEEN_LEAVINGS = 2.0
BOUNDARY = "----------------soak"

# Texts but for those that were only asked with, or stand in documents that were given up, and tokens.
COUNT_FINDABLE_ROWS = """
SELECT (SELECT count(*) FROM token_level_embeddings) + (
    SELECT count(*) FROM embeddings WHERE collection_id > 0 OR collection_id = 0 AND EXISTS (
        SELECT 1 FROM document_sentences
        JOIN document_embeddings ON document_embeddings.id = document_sentences.document_embedding_id
        WHERE document_sentences.embedding_id = embeddings.id AND document_embeddings.state = 1
    )
)
"""

NATIVE = "/get_embedding_vector_for_string/"
OPENAI = "/v1/embeddings"
TOKENS = "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"
SEARCH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
SIMILARITY = "/compute_similarity_between_strings/"
DOCUMENT = "/get_all_embedding_vectors_for_document/?send_back_json_or_zip_file=json"


@dataclass
class Request:
    """What is sent and the statuses that may come of it."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = "application/json"
    expected: tuple[int, ...] = (200,)

    @classmethod
    def of_json(cls, path: str, *, expected: tuple[int, ...] = (200,), **fields: Any) -> Request:
        return cls("POST", path, json.dumps(fields).encode(), expected=expected)


class Source:
    """Draws requests of all kinds for one client, with texts that nobody else sends."""

    def __init__(self, seed: int, known: deque[str]) -> None:
        self._random = random.Random(seed)
        self._texts = make_texts(TOKENS_PER_TEXT, seed=seed)
        self._known = known
        self._kinds: dict[Callable[[], Request], int] = {
            self.one_text: 20,
            self.known_text: 15,
            self.batch: 30,
            self.known_batch: 5,
            self.tokens: 3,
            self.search: 5,
            self.filtered_search: 4,
            self.similarity: 4,
            self.document: 3,
            self.tei: 4,
            self.ollama: 4,
            self.rerank: 2,
            self.broken: 5,
            self.listing: 1,
        }

    def draw(self) -> tuple[str, Request]:
        [kind] = self._random.choices(list(self._kinds), list(self._kinds.values()))
        return kind.__name__.replace("_", " "), kind()

    def fresh(self, count: int = 1) -> list[str]:
        texts = list(islice(self._texts, count))
        self._known.extend(texts[:2])
        return texts

    def known(self) -> str:
        return self._random.choice(self._known) if self._known else self.fresh()[0]

    def one_text(self) -> Request:
        return Request.of_json(NATIVE, text=self.fresh()[0])

    def known_text(self) -> Request:
        return Request.of_json(NATIVE, text=self.known())

    def batch(self) -> Request:
        count = self._random.choice([1, 2, 3, 5, 8, 16, 32, 64])
        return Request.of_json(OPENAI, input=self.fresh(count), model=MODEL.stem, encoding_format="base64")

    def known_batch(self) -> Request:
        texts = [self.known() for _ in range(self._random.randint(1, 32))]
        return Request.of_json(OPENAI, input=texts, model=MODEL.stem, encoding_format="float")

    def tokens(self) -> Request:
        return Request.of_json(TOKENS, text=self.fresh()[0])

    def search(self) -> Request:
        return Request.of_json(SEARCH, query_text=self.known(), number_of_most_similar_strings_to_return=10)

    def filtered_search(self) -> Request:
        narrowing = self._random.choice(
            [{"filename": "a.txt"}, {"corpus_identifier_string": "default"}, {"full_text_weight": 0.5}, {"exact": True}]
        )
        return Request.of_json(SEARCH, query_text=self.known(), **narrowing)

    def similarity(self) -> Request:
        measure = self._random.choice(["cosine_similarity", "spearman_rho", "hoeffdings_d", "hsic"])
        return Request.of_json(SIMILARITY, text1=self.fresh()[0], text2=self.known(), similarity_measure=measure)

    def document(self) -> Request:
        text = ". ".join(self.fresh(self._random.randint(3, 40))).encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'.encode()
        body = head + text + f"\r\n--{BOUNDARY}--\r\n".encode()
        return Request("POST", DOCUMENT, body, f"multipart/form-data; boundary={BOUNDARY}")

    def tei(self) -> Request:
        return Request.of_json("/embed", inputs=self.fresh(self._random.randint(1, 16)))

    def ollama(self) -> Request:
        return Request.of_json("/api/embed", model=MODEL.stem, input=self.fresh(self._random.randint(1, 16)))

    def rerank(self) -> Request:
        documents = [self.known() for _ in range(8)]
        return Request.of_json("/v2/rerank", model=MODEL.stem, query=self.known(), documents=documents)

    def broken(self) -> Request:
        return self._random.choice(
            [
                Request("POST", NATIVE, b'{"text": ', expected=(422,)),
                Request("POST", OPENAI, b"\xff\xfe", expected=(400, 422)),
                Request.of_json(NATIVE, text="", expected=(400, 422)),
                Request.of_json(NATIVE, text="cold " * 2000, expected=(400,)),
                Request.of_json(NATIVE, text="x", model_name="no-such-model", expected=(404,)),
                Request.of_json(SIMILARITY, text1="a", text2="b", similarity_measure="none", expected=(400,)),
                Request("GET", "/no/such/path", expected=(404,)),
            ]
        )

    def listing(self) -> Request:
        path = self._random.choice(["/ready", "/health", "/metrics", "/v1/models", "/get_all_stored_strings/?limit=50"])
        return Request("GET", path)


@dataclass
class Samples:
    """What was seen, with the time of each. `replies`: by kind, (end, seconds)."""

    replies: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    unexpected: Counter[str] = field(default_factory=Counter)
    n_left: int = 0
    resident: list[tuple[float, int]] = field(default_factory=list)
    descriptors: list[tuple[float, int]] = field(default_factory=list)
    processor_seconds: list[tuple[float, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


async def send_until(ends: float, url: str, seed: int, known: deque[str], samples: Samples) -> None:
    """One client, on one connection, which it opens again when it was closed."""
    source = Source(seed, known)
    parts = urlsplit(url)
    while time.monotonic() < ends:
        try:
            async with Client(parts.hostname or "", parts.port or 0) as client:
                while time.monotonic() < ends:
                    await send_one(client, *source.draw(), samples)
        except OSError as error:
            samples.unexpected[f"connection: {type(error).__name__}"] += 1
            await asyncio.sleep(0.1)


async def send_one(client: Client, kind: str, request: Request, samples: Samples) -> None:
    sent = time.monotonic()
    status, body = await client.exchange(request.method, request.path, request.body, request.content_type)
    if status not in request.expected:
        samples.unexpected[f"{kind}: {status} {body[:200]!r}"] += 1
    samples.replies[kind].append((time.monotonic(), time.monotonic() - sent))


async def leave_until(ends: float, url: str, seed: int, samples: Samples) -> None:
    """A client that asks for much and goes before the answer, a few times a second."""
    source = Source(seed, deque(maxlen=1))
    parts = urlsplit(url)
    while time.monotonic() < ends:
        async with Client(parts.hostname or "", parts.port or 0) as client:
            request = source.batch() if source.draw()[0] != "document" else source.document()
            client.send(request.method, request.path, request.body, request.content_type)
            await asyncio.sleep(LEAVING_AFTER_SECONDS)
        samples.n_left += 1
        await asyncio.sleep(SECONDS_BETWEEN_LEAVINGS)


async def watch_until(ends: float, process: psutil.Process, samples: Samples) -> None:
    """Sizes from outside: the server with the processes that it has started."""
    while (now := time.monotonic()) < ends:
        family = [process, *process.children(recursive=True)]
        samples.resident.append((now, sum(read_resident(member) for member in family)))
        samples.descriptors.append((now, process.num_fds()))
        times = process.cpu_times()
        samples.processor_seconds.append((now, times.user + times.system))
        await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)


def read_resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


async def load(url: str, process: psutil.Process, seconds: float, seed: int) -> Samples:
    samples = Samples()
    ends = samples.started + seconds
    known: deque[str] = deque(maxlen=N_KNOWN_TEXTS)
    await asyncio.gather(
        *(send_until(ends, url, 1000 * seed + number, known, samples) for number in range(N_CLIENTS)),
        leave_until(ends, url, 1000 * seed + 999, samples),
        watch_until(ends, process, samples),
    )
    return samples


@contextmanager
def serve(directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(port),
        "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
        "LOG_DIRECTORY": str(directory),
        "MODELS_DIRECTORY": str(MODEL.parent),
    }
    program = [sys.executable, str(PROJECT_DIRECTORY / "benchmarks" / "watched_server.py"), str(directory / "counts")]
    with running(program, url, "/ready", **settings) as process:
        yield url, psutil.Process(process.pid)


# What came of it


@dataclass
class Report:
    """Rows of a table, and whether each is as it should be."""

    failed: bool = False

    def add(self, what: str, wanted: str, found: str, is_good: bool = True) -> None:
        self.failed |= not is_good
        print(f"| {what} | {wanted} | {found if is_good else f'**{found}**'} |", flush=True)


def compare(values: list[tuple[float, float]], samples: Samples, seconds: float) -> tuple[float, float]:
    """The median of a fifth after the warm-up and that of the last fifth."""
    first = [value for at, value in values if 0.2 <= (at - samples.started) / seconds < 0.4]
    last = [value for at, value in values if (at - samples.started) / seconds >= 0.8]
    return (float(np.median(first)), float(np.median(last))) if first and last else (0.0, 0.0)


def report_sizes(report: Report, samples: Samples, directory: Path, seconds: float) -> None:
    before, after = compare(samples.resident, samples, seconds)
    found = f"{before / 2**20:.0f} MiB to {after / 2**20:.0f} MiB, {after / before:.2f}"
    report.add("resident, server and its processes", f"{MAX_GROWTH} at most", found, after <= MAX_GROWTH * before)
    counts = [json.loads(line) for line in (directory / "counts").read_text().splitlines()]
    at = np.linspace(samples.started, samples.started + seconds, len(counts)).tolist()
    for what, values, bound in (
        ("descriptors", samples.descriptors, MAX_MORE_DESCRIPTORS),
        ("threads", [(when, count["n_threads"]) for when, count in zip(at, counts, strict=True)], MAX_MORE_THREADS),
        ("tasks", [(when, count["n_tasks"]) for when, count in zip(at, counts, strict=True)], MAX_MORE_TASKS),
    ):
        before, after = compare(values, samples, seconds)
        report.add(what, f"{bound} more at most", f"{before:.0f} to {after:.0f}", after <= before + bound)


def report_work(report: Report, samples: Samples, seconds: float) -> None:
    """The server's own processor time for a reply, which neighbours on the machine change little."""
    found = []
    for begin, end in ((0.2, 0.4), (0.8, 1.0)):
        first, last = (samples.started + share * seconds for share in (begin, end))
        spent = [value for at, value in samples.processor_seconds if first <= at < last]
        n_replies = sum(first <= at < last for replies in samples.replies.values() for at, _ in replies)
        found.append((spent[-1] - spent[0]) / max(1, n_replies))
    before, after = found
    values = f"{1000 * before:.0f} ms to {1000 * after:.0f} ms"
    report.add("processor time of a reply", f"{MAX_SLOWER} times at most", values, after <= MAX_SLOWER * before)


def report_latencies(report: Report, samples: Samples, seconds: float) -> None:
    for kind, replies in sorted(samples.replies.items()):
        before, after = compare(replies, samples, seconds)
        if len(replies) < MIN_REPLIES or not before:
            report.add(f"{kind}: replies, median", "", f"{len(replies):,}, too few to compare")
            continue
        found = f"{len(replies):,}; {1000 * before:.0f} ms to {1000 * after:.0f} ms"
        wanted = "grows with the rows" if kind in GROWING_KINDS else f"{MAX_SLOWER} times at most"
        is_flat = after <= max(MAX_SLOWER * before, before + MAX_SECONDS_MORE)
        report.add(f"{kind}: replies, median", wanted, found, is_flat or kind in GROWING_KINDS)


def report_rows(report: Report, directory: Path, n_indexed: int, minutes: float) -> None:
    with closing(sqlite3.connect(directory / "embeddings.sqlite")) as connection:
        problems = [line for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
        problems += [str(row) for row in connection.execute("PRAGMA foreign_key_check")]
        [(n_rows,)] = connection.execute("SELECT count(*) FROM embeddings")
        [(n_findable,)] = connection.execute(COUNT_FINDABLE_ROWS)
    wanted = WANTED_TEXTS_PER_MINUTE * minutes
    report.add("different texts", f"{wanted:,.0f}", f"{n_rows:,}", n_rows >= wanted)
    report.add("faults in the database", "0", f"{len(problems)}", not problems)
    is_same = n_indexed == n_findable
    report.add("vectors in the indexes, rows that can be found", "the same", f"{n_indexed:,}, {n_findable:,}", is_same)


def read_index_size(url: str) -> int:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    return int(sum(float(value) for value in re.findall(r"^llama_embeddings_index_vectors\{.*?\} (\S+)$", text, re.M)))


def wait_for_quiet(url: str) -> int:
    """The size of the index once it has stopped changing: what clients left behind is still being finished."""
    size = -1
    while (found := read_index_size(url)) != size:
        size = found
        time.sleep(3.0)
    return size


def soak(minutes: float, seed: int) -> bool:
    """Whether all was as it should be."""
    seconds = 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serve(directory) as (url, process):
            samples = asyncio.run(load(url, process, seconds, seed))
            n_indexed = wait_for_quiet(url)
        report = Report()
        print(f"| {minutes:g} minutes, {N_CLIENTS} clients | wanted | found |\n|---|---|---|")
        n_replies = sum(map(len, samples.replies.values()))
        n_unexpected = sum(samples.unexpected.values())
        report.add("replies", "", f"{n_replies:,}")
        report.add("requests whose client left", "", f"{samples.n_left:,}")
        report.add("unexpected replies, broken connections", "0", f"{n_unexpected:,}", n_unexpected == 0)
        report_rows(report, directory, n_indexed, minutes)
        report_sizes(report, samples, directory, seconds)
        report_work(report, samples, seconds)
        report_latencies(report, samples, seconds)
        for what, count in samples.unexpected.most_common(20):
            print(f"{count} x {what}", file=sys.stderr)
    return not report.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    return 0 if soak(arguments.minutes, arguments.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
