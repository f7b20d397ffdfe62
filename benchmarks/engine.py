"""The engine against its ceiling and a peer, on this machine, in one run: `python -m benchmarks.engine`.

Every figure is a ratio of two rates measured within the same minute, and the median of several rounds, because machines
drift. The ceiling is `benchmarks.ceiling`; the peer is the server that llama-cpp-python brings, with the same
file and load, in an environment of its own (`.venv-peer`, made by `make bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PROJECT_DIRECTORY = Path(__file__).resolve().parent.parent
MODEL = PROJECT_DIRECTORY / "models" / "all-MiniLM-L6-v2.gguf"
PEER_PYTHON = PROJECT_DIRECTORY / ".venv-peer" / "bin" / "python"
NATIVE_PATH = "/get_embedding_vector_for_string/"
OPENAI_PATH = "/v1/embeddings"
TOKEN_LEVEL_PATH = (
    "/get_token_level_embeddings_matrix_and_combined_feature_vector_for_string/?send_back_json_or_zip_file=json"
)
START_TIMEOUT_SECONDS = 120
TURNS_PER_CLIENT = 4
# Less than this model computes on two cores, so that a turn is not thought shorter than it is.
LEAST_TOKENS_PER_SECOND = 6_000
# What libgomp does unless it is told otherwise; our backend tells it to spin less.
LIBGOMP_SPINCOUNT = "300000"


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], url: str, path: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that answers at `url`, stopped at the end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        try:
            wait_until_it_answers(process, url + path)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def wait_until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"no answer at {url}")


@contextmanager
def our_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """This project's server on a fresh database."""
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(port),
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
            "LOG_DIRECTORY": directory,
            "LOG_LEVEL": "WARNING",
            "MODELS_DIRECTORY": str(MODEL.parent),
        }
        command = [sys.executable, str(PROJECT_DIRECTORY / "llama_embeddings_server.py")]
        with running(command, url, "/health", **settings) as process:
            yield url, process


@contextmanager
def bare_server() -> Iterator[str]:
    """FastAPI and our engine, with nothing else around them."""
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with running([sys.executable, "-m", "benchmarks.bare_server", str(MODEL), str(port)], url, "/health"):
        yield url


@contextmanager
def peer_server() -> Iterator[str]:
    """llama-cpp-python's own server, all cores, embeddings on."""
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--embedding", "true", "--n_ctx", "512", "--n_batch", "512", "--n_threads", str(os.cpu_count())]
    command = [str(PEER_PYTHON), "-m", "llama_cpp.server", "--model", str(MODEL), "--port", str(port), *options]
    with running([*command, "--model_alias", MODEL.stem], url, "/v1/models"):
        yield url


def run_module(module: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """A benchmark in a process of its own; its JSON."""
    completed = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=PROJECT_DIRECTORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if completed.returncode:
        raise RuntimeError(f"benchmarks.{module} failed: {completed.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


@contextmanager
def busy_core() -> Iterator[None]:
    """One other process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Rounds:
    """Collects ratios over the rounds."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {}
        self.rates: dict[str, list[float]] = {}

    def note(self, name: str, rate: float, against: float) -> None:
        self.ratios.setdefault(name, []).append(rate / against)
        self.rates.setdefault(name, []).append(rate)

    def report(self, name: str, wanted: str, unit: str) -> str:
        ratios, rates = self.ratios[name], self.rates[name]
        low, high = min(ratios), max(ratios)
        return (
            f"| {name} | {wanted} | {np.median(ratios):.2f} ({low:.2f} to {high:.2f}) | {np.median(rates):.4g} {unit} |"
        )


def load(url: str, path: str, *, clients: int, texts: int, tokens: int, seconds: float, seed: int) -> dict[str, Any]:
    return run_module(
        "load", url, path, "--clients", clients, "--texts", texts, "--tokens", tokens, "--seconds", seconds,
        "--seed", seed,
    )  # fmt: skip


class Ceiling:
    """The ceiling before and after each measurement: a machine that slows down meanwhile slows one of them, too."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self._tokens = tokens
        self._seconds = seconds
        self._before = self._measure()

    def _measure(self) -> float:
        ceiling = run_module(
            "ceiling", MODEL, "--tokens", self._tokens, "--seconds", self._seconds, "--seed", int(time.time())
        )
        print("ceiling", ceiling, file=sys.stderr, flush=True)
        return float(ceiling["texts_per_second"])

    def enclose(self) -> float:
        """Texts per second, the mean of the measurement before and of one now, which is the next one's before."""
        before, self._before = self._before, self._measure()
        return (before + self._before) / 2


# The two loads: how many clients, and how many texts a request.
LOADS = {"4 clients, 32 texts": (4, 32), "16 clients, 1 text": (16, 1)}


def measure_throughput(rounds: Rounds, n_rounds: int, seconds: float, lengths: list[int]) -> None:
    """Both loads against the ceiling, at each length of text."""
    with our_server() as (url, _):
        for tokens in lengths:
            ceiling = Ceiling(tokens, seconds)
            for _ in range(n_rounds):
                for name, (clients, texts) in LOADS.items():
                    # Several answers of each client, or the edges of the measured time decide.
                    enough = TURNS_PER_CLIENT * clients * texts * tokens / LEAST_TOKENS_PER_SECOND
                    rate = load(
                        url, OPENAI_PATH, clients=clients, texts=texts, tokens=tokens, seconds=max(seconds, enough),
                        seed=int(time.time()) + clients,
                    )["texts_per_second"]  # fmt: skip
                    rounds.note(f"{name}, {tokens} tokens", rate, ceiling.enclose())
                    print(tokens, name, f"{rate:.1f}", file=sys.stderr, flush=True)


def measure_few(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """What the engine alone gives with as many texts in flight as 16 clients send."""
    for tokens in (35, 8):
        ceiling = Ceiling(tokens, seconds)
        for _ in range(n_rounds):
            few = run_module(
                "ceiling", MODEL, "--in-flight", 16, "--tokens", tokens, "--seconds", seconds, "--seed",
                int(time.time()),
            )["texts_per_second"]  # fmt: skip
            rounds.note(f"engine alone, 16 texts in flight, {tokens} tokens", few, ceiling.enclose())


def measure_bare(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """Both loads of short texts on a server that does the least a server can: what HTTP leaves of the ceiling."""
    with bare_server() as url:
        ceiling = Ceiling(8, seconds)
        for _ in range(n_rounds):
            for name, (clients, texts) in LOADS.items():
                rate = load(
                    url, OPENAI_PATH, clients=clients, texts=texts, tokens=8, seconds=seconds,
                    seed=int(time.time()) + clients,
                )["texts_per_second"]  # fmt: skip
                rounds.note(f"bare server, {name}, 8 tokens", rate, ceiling.enclose())


def measure_lone(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """One client, one text: what is on top of the engine's own time."""
    with our_server() as (url, _):
        for _ in range(n_rounds):
            seed = int(time.time())
            alone = run_module("ceiling", MODEL, "--lone", "--seed", seed)["seconds"]
            p50 = load(url, NATIVE_PATH, clients=1, texts=1, tokens=35, seconds=seconds, seed=seed + 1)["p50_seconds"]
            rounds.note("1 client, 1 text: (p50 - 2 ms) / engine", 1000 * (p50 - 0.002), 1000 * alone)
            print(f"lone p50 {p50 * 1000:.2f} ms, engine {alone * 1000:.2f} ms", file=sys.stderr, flush=True)


def measure_peer(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """The same loads on the peer."""
    with our_server() as (url, _), peer_server() as peer_url:
        for _ in range(n_rounds):
            for name, clients, texts in (("peer, 4 clients, 32 texts", 4, 32), ("peer, 16 clients, 1 text", 16, 1)):
                seed = int(time.time())
                ours, theirs = (
                    load(
                        server, OPENAI_PATH, clients=clients, texts=texts, tokens=35,
                        seconds=max(seconds, 8.0) if server == peer_url else seconds, seed=seed + offset,
                    )["texts_per_second"]
                    for offset, server in enumerate((url, peer_url))
                )  # fmt: skip
                rounds.note(name, ours, theirs)
                print(name, f"{ours:.1f} {theirs:.1f}", file=sys.stderr, flush=True)


def measure_disturbed(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """One other process on one core; against a context of two spinning threads under the same disturbance."""
    with our_server() as (url, _), busy_core():
        for _ in range(n_rounds):
            seed = int(time.time())
            spinning = run_module(
                "ceiling", MODEL, "--spinning", "--seconds", seconds, "--seed", seed, GOMP_SPINCOUNT=LIBGOMP_SPINCOUNT
            )
            rate = load(url, OPENAI_PATH, clients=4, texts=32, tokens=35, seconds=seconds, seed=seed + 1)
            rounds.note("one core kept busy by another process", rate["texts_per_second"], spinning["texts_per_second"])
            print("busy", rate["texts_per_second"], spinning, file=sys.stderr, flush=True)


def measure_health(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """Latency of GET /health while the engine is saturated, against 20 ms."""
    with our_server() as (url, _):
        for _ in range(n_rounds):
            arguments = [
                "--clients",
                "4",
                "--texts",
                "32",
                "--seconds",
                str(seconds + 1),
                "--seed",
                str(time.time_ns()),
            ]
            saturating = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load", url, OPENAI_PATH, *arguments],
                cwd=PROJECT_DIRECTORY,
                stdout=subprocess.DEVNULL,
            )
            time.sleep(1)
            p99 = run_module("load", url, "/health", "--health", "--seconds", seconds - 1)["p99_seconds"]
            saturating.wait()
            rounds.note("GET /health p99 / 20 ms", 1000 * p99, 20)


def measure_token_level(rounds: Rounds, n_rounds: int, seconds: float) -> None:
    """The matrix of a 200-token text against its pooled embedding: by the engine alone, and through HTTP as JSON."""
    with our_server() as (url, _):
        for _ in range(n_rounds):
            seed = int(time.time())
            alone = run_module("token_level", MODEL, "--seed", seed)
            rounds.note("token-level / pooled, engine", 1000 * alone["rows_seconds"], 1000 * alone["pooled_seconds"])
            pooled, rows = (
                load(url, path, clients=1, texts=1, tokens=200, seconds=seconds, seed=seed + offset)["p50_seconds"]
                for offset, path in enumerate((NATIVE_PATH, TOKEN_LEVEL_PATH))
            )
            rounds.note("token-level / pooled, through HTTP", 1000 * rows, 1000 * pooled)


def measure_memory(rounds: Rounds, _n_rounds: int, _seconds: float) -> None:
    """Resident size after 100,000 distinct texts against that after 5,000; one round, as it takes minutes."""
    with our_server() as (url, process):
        sizes = []
        for n_texts in (5_000, 95_000):
            n_left = n_texts
            while n_left > 0:
                result = load(
                    url,
                    OPENAI_PATH,
                    clients=4,
                    texts=32,
                    tokens=8,
                    seconds=max(4.0, min(20.0, n_left / 500)),
                    seed=time.time_ns(),
                )
                n_left -= int(result["n_texts"])
            sizes.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            print(f"resident {sizes[-1]:.0f} MiB", file=sys.stderr, flush=True)
        rounds.note("resident size, 100,000 / 5,000 texts", sizes[1], sizes[0])


STAGES: dict[str, Callable[[Rounds, int, float], None]] = {
    "throughput": lambda rounds, n, seconds: measure_throughput(rounds, n, seconds, [35, 8, 200]),
    "few": measure_few,
    "bare": measure_bare,
    "lone": measure_lone,
    "peer": measure_peer,
    "disturbed": measure_disturbed,
    "health": measure_health,
    "token_level": measure_token_level,
    "memory": measure_memory,
}
WANTED = {
    "bare server": ("what a server can reach", "texts/s"),
    "engine alone": ("the limit of 16 clients", "texts/s"),
    "4 clients, 32 texts": ("at least 0.92", "texts/s"),
    "16 clients, 1 text": ("at least 0.85", "texts/s"),
    "1 client": ("at most 1.2", "ms"),
    "peer": ("at least 2.2", "texts/s"),
    "one core": ("at least 2", "texts/s"),
    "GET /health": ("at most 1", "ms"),
    "token-level": ("at most 1.2", "ms"),
    "resident": ("at most 1.1", "MiB"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="*", default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    arguments = parser.parse_args()
    rounds = Rounds()
    for stage in arguments.stages:
        STAGES[stage](rounds, arguments.rounds, arguments.seconds)
    print("| what | wanted | ratio, median (range) | rate, median |\n|---|---|---|---|")
    for name in rounds.ratios:
        wanted, unit = next(value for prefix, value in WANTED.items() if name.startswith(prefix))
        print(rounds.report(name, wanted, unit))


if __name__ == "__main__":
    main()
