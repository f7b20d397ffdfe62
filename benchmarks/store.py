"""The store's figures beside their targets.

    python -m benchmarks.store [cached] [request] [import] [durability] [--rows 1000000] [--directory DIRECTORY]

`cached`: one cached text a request, 32 clients, as a share of a bare endpoint that returns the same bytes under the
same server settings; both take turns in one run. `request`: 256 cached texts in one request, less the time to encode
their JSON. `import`: rows a second by the bulk path, index of hashes included, over all rows; then full text and
filters on them, without a model. `durability`: what `DURABILITY=power` costs, on the disk of `--directory`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from itertools import count, islice
from pathlib import Path

import numpy as np
import orjson

from benchmarks.engine import NATIVE_PATH, OPENAI_PATH, PROJECT_DIRECTORY, find_free_port, running
from benchmarks.load import Client
from benchmarks.texts import make_texts
from embeddings_data_models import BulkEmbeddings, NewEmbedding, RequestStamp, compute_text_hash, utc_now
from llama_embeddings.commands.import_embeddings import ROWS_PER_PART, WRITER_CACHE_IN_MB
from llama_embeddings.storage.store import EmbeddingStore

N_CLIENTS = 32
N_TEXTS = 256
N_DIMS = 384
MODEL, FAMILY = "all-MiniLM-L6-v2", "0123456789abcdef"

# The bare endpoint: the same framework, request model, loop and server options, and nothing behind them.
BARE_SERVER = """
import sys, uvicorn
from fastapi import FastAPI
from fastapi.responses import Response
from embeddings_data_models import EmbeddingRequest
app, body = FastAPI(), open(sys.argv[2], "rb").read()

@app.post("/")
async def answer(request: EmbeddingRequest) -> Response:
    return Response(body, media_type="application/json")

@app.get("/health")
async def health() -> dict[str, str]:
    return {}

uvicorn.run(app, port=int(sys.argv[1]), log_config=None, access_log=False, server_header=False, proxy_headers=False)
"""


def measure_cached(rounds: int, seconds: float) -> None:
    """Requests a second for one cached text, of those of the bare endpoint."""
    with tempfile.TemporaryDirectory() as name:
        port, bare_port = find_free_port(), find_free_port()
        with running_server(Path(name), port):
            body = json.dumps({"text": "I feel extremely chilly"}).encode()
            reply = asyncio.run(ask_once(port, NATIVE_PATH, body))
            (Path(name) / "reply.json").write_bytes(reply)
            command = [sys.executable, "-c", BARE_SERVER, str(bare_port), str(Path(name) / "reply.json")]
            with running(command, f"http://127.0.0.1:{bare_port}", "/health"):
                rates = [
                    (
                        asyncio.run(count_answers(port, NATIVE_PATH, body, seconds)),
                        asyncio.run(count_answers(bare_port, "/", body, seconds)),
                    )
                    for _ in range(rounds)
                ]
    ratios = sorted(ours / bare for ours, bare in rates)
    print(
        f"one cached text, {N_CLIENTS} clients: {statistics.median(ours for ours, _ in rates):.0f} requests/s, of the "
        f"bare endpoint's {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); wanted 0.5"
    )


def measure_request(rounds: int) -> None:
    """Milliseconds for 256 cached texts in a request, less those for encoding their JSON."""
    texts = list(islice(make_texts(8, seed=1), N_TEXTS))
    body = json.dumps({"input": texts, "encoding_format": "float"}).encode()
    with tempfile.TemporaryDirectory() as name:
        port = find_free_port()
        with running_server(Path(name), port):
            times, reply = asyncio.run(time_requests(port, OPENAI_PATH, body, 50 * rounds))
    rows = [np.array(row["embedding"], np.float32) for row in orjson.loads(reply)["data"]]
    encoding = time_encoding(rows, 50 * rounds)
    beyond = 1000 * (statistics.median(times) - encoding)
    print(f"{N_TEXTS} cached texts a request: {beyond:.1f} ms beyond {1000 * encoding:.1f} ms of encoding; wanted 4 ms")


def running_server(directory: Path, port: int) -> AbstractContextManager[object]:
    return running(
        [sys.executable, str(PROJECT_DIRECTORY / "llama_embeddings_server.py")],
        f"http://127.0.0.1:{port}",
        "/health",
        LLAMA_EMBEDDING_SERVER_LISTEN_PORT=str(port),
        DATABASE_URL=f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
        LOG_DIRECTORY=str(directory),
        MODELS_DIRECTORY=str(PROJECT_DIRECTORY / "models"),
    )


async def ask_once(port: int, path: str, body: bytes) -> bytes:
    async with Client("127.0.0.1", port) as client:
        return await client.post(path, body)


async def count_answers(port: int, path: str, body: bytes, seconds: float) -> float:
    """Requests a second of all clients."""
    ends = time.perf_counter() + seconds

    async def ask_on() -> int:
        count = 0
        async with Client("127.0.0.1", port) as client:
            while time.perf_counter() < ends:
                await client.post(path, body)
                count += 1
        return count

    return sum(await asyncio.gather(*(ask_on() for _ in range(N_CLIENTS)))) / seconds


async def time_requests(port: int, path: str, body: bytes, count: int) -> tuple[list[float], bytes]:
    """Seconds of each request of one client, the first left out, and a reply."""
    times = []
    async with Client("127.0.0.1", port) as client:
        reply = await client.post(path, body)
        for _ in range(count):
            started = time.perf_counter()
            reply = await client.post(path, body)
            times.append(time.perf_counter() - started)
    return times, reply


def time_encoding(rows: list[np.ndarray], count: int) -> float:
    """Median seconds that the reply's JSON takes."""
    content = {"data": [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]}
    times = []
    for _ in range(count):
        started = time.perf_counter()
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def measure_import(n_rows: int) -> None:
    """Rows a second of the bulk path, then what searches ask of so many rows."""
    with tempfile.TemporaryDirectory() as name:
        store = await EmbeddingStore.open(
            f"sqlite+aiosqlite:///{name}/embeddings.sqlite",
            writer_cache_in_mb=WRITER_CACHE_IN_MB,
            follows_full_text=False,
        )
        vectors = np.random.default_rng(0).standard_normal((ROWS_PER_PART, N_DIMS), dtype=np.float32)

        wall = cpu = 0.0
        for start in range(0, n_rows, ROWS_PER_PART):
            count = min(ROWS_PER_PART, n_rows - start)
            texts = [f"{start + place} {text}" for place, text in enumerate(islice(make_texts(14, seed=start), count))]
            collection = "bulk" if start % (4 * ROWS_PER_PART) == 0 else "default"
            started, cpu_started = time.perf_counter(), time.process_time()
            await store.import_embeddings(BulkEmbeddings(texts, vectors[:count], MODEL, FAMILY, collection))
            wall, cpu = wall + time.perf_counter() - started, cpu + time.process_time() - cpu_started
        rates = f"{n_rows / wall:,.0f} rows/s, {n_rows / cpu:,.0f} per CPU second"
        print(f"import of {n_rows:,} rows: {rates}; wanted 20,000")
        started = time.perf_counter()
        await store.index_full_text()
        print(f"full text of them: {n_rows / (time.perf_counter() - started):,.0f} rows/s")
        for label, ask in {
            "ids of all rows": lambda: store.find_row_ids(MODEL, [FAMILY]),
            "ids of a collection": lambda: store.find_row_ids(MODEL, [FAMILY], collection="bulk"),
            "whether a collection holds everything": lambda: store.holds_everything(MODEL, [FAMILY], "bulk"),
            "ten hits for a rare word": lambda: store.search_text("777", model_name=MODEL, families=[FAMILY], limit=10),
            "ten hits for a sentence": lambda: store.search_text(
                next(make_texts(14, seed=0)), model_name=MODEL, families=[FAMILY], limit=10
            ),
        }.items():
            await ask()
            started = time.perf_counter()
            await ask()
            print(f"{label}: {1000 * (time.perf_counter() - started):.1f} ms")
        await store.close()


async def measure_durability(directory: Path, rounds: int, seconds: float) -> None:
    """Rows a second and the median time of a write, one row each, by how many writers wait at a time."""
    for n_writers in (1, 16, 64):
        for _ in range(rounds):
            for survives_power_cuts in (False, True):
                rate, median = await time_writes(directory, n_writers, seconds, survives_power_cuts)
                setting = "power" if survives_power_cuts else "process"
                print(f"DURABILITY={setting}, {n_writers} writers: {rate:,.0f} rows/s, {1000 * median:.2f} ms a write")


async def time_writes(
    directory: Path, n_writers: int, seconds: float, survives_power_cuts: bool
) -> tuple[float, float]:
    """Rows a second, and the median seconds from a write to its answer."""
    vector = np.ones(N_DIMS, np.float32)
    times: list[float] = []
    with tempfile.TemporaryDirectory(dir=directory) as name:
        store = await EmbeddingStore.open(
            f"sqlite+aiosqlite:///{name}/embeddings.sqlite",
            follows_full_text=False,
            survives_power_cuts=survives_power_cuts,
        )
        ends = time.perf_counter() + seconds

        async def write_on(writer: int) -> None:
            for number in count():
                text = f"row {number} of {writer}"
                row = NewEmbedding(
                    text, compute_text_hash(text), MODEL, FAMILY, vector, 8, 0, RequestStamp(), utc_now()
                )
                started = time.perf_counter()
                if started >= ends:
                    return
                await store.add_embeddings([row])
                times.append(time.perf_counter() - started)

        await asyncio.gather(*(write_on(writer) for writer in range(n_writers)))
        await store.close()
    return len(times) / seconds, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["cached", "request", "import"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    if "cached" in arguments.stages:
        measure_cached(arguments.rounds, arguments.seconds)
    if "request" in arguments.stages:
        measure_request(arguments.rounds)
    if "durability" in arguments.stages:
        asyncio.run(measure_durability(arguments.directory, arguments.rounds, arguments.seconds))
    if "import" in arguments.stages:
        asyncio.run(measure_import(arguments.rows))


if __name__ == "__main__":
    main()
