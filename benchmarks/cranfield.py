"""Retrieval quality on the Cranfield collection, through the API of a real server: nDCG@10 of each way to search.

    python -m benchmarks.cranfield DIRECTORY

DIRECTORY holds `cran.all.1400`, `cran.qry` and `cranqrel`, which are not part of this project. Texts are put into a
collection of their own, queries are sent as they are. A relevance code of 1 is the best and gets grade 4, code 4 gets
grade 1, and so does -1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.engine import MODEL, PROJECT_DIRECTORY, find_free_port, running

COLLECTION = "cranfield"
SEARCH_PATH = "/search_stored_embeddings_with_query_string_for_semantic_similarity/"
DEPTH = 10
N_CLIENTS = 8
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "words alone": {"full_text_weight": 1.0},
    "hybrid, 0.3": {"full_text_weight": 0.3},
    "hybrid, 0.5": {"full_text_weight": 0.5},
    "late interaction": {"late_interaction": True},
    "hybrid, 0.5, and late interaction": {"full_text_weight": 0.5, "late_interaction": True},
}


def read_records(path: Path) -> list[str]:
    """The `.W` part of every record, white space evened out, in the order of the file."""
    records = re.split(r"^\.I \d+\s*$", path.read_text("latin-1"), flags=re.MULTILINE)[1:]
    texts = (record.partition("\n.W\n")[2] for record in records)
    return [" ".join(re.split(r"^\.[A-Z]$", text, flags=re.MULTILINE)[0].split()) for text in texts]


def read_grades(path: Path) -> dict[int, dict[int, int]]:
    """Query number to document number to grade, both from 1."""
    grades: dict[int, dict[int, int]] = {}
    for line in path.read_text().splitlines():
        query, document, code = map(int, line.split())
        grades.setdefault(query, {})[document] = 1 if code < 0 else 5 - code
    return grades


def compute_ndcg(found: Sequence[int], grades: Mapping[int, int]) -> float:
    """Normalised discounted cumulative gain of the first DEPTH results, linear gains."""
    ideal = sorted(grades.values(), reverse=True)[:DEPTH]
    best = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(ideal, 1))
    gain = sum(grades.get(document, 0) / math.log2(rank + 1) for rank, document in enumerate(found[:DEPTH], 1))
    return gain / best if best else 0.0


def embed_all(client: httpx.Client, texts: Sequence[str]) -> None:
    """Put every text into the collection."""

    def embed(text: str) -> None:
        body = {"text": text, "corpus_identifier_string": COLLECTION, "truncation": "right"}
        client.post("/get_embedding_vector_for_string/", json=body).raise_for_status()

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        list(pool.map(embed, texts))


def measure_way(
    client: httpx.Client, queries: Sequence[str], numbers: Mapping[str, int], grades: Mapping[int, Mapping[int, int]],
    way: Mapping[str, Any],
) -> float:  # fmt: skip
    """The mean nDCG over all queries, which are numbered from 1 in the order of their file."""

    def ask(query: str) -> list[int]:
        body = {"query_text": query, "corpus_identifier_string": COLLECTION, **way}
        reply = client.post(SEARCH_PATH, json=body).raise_for_status().json()
        return [numbers[result["search_result_text"]] for result in reply["results"]]

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        found = list(pool.map(ask, queries))
    scores = [compute_ndcg(documents, grades.get(number, {})) for number, documents in enumerate(found, 1)]
    return sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--window", type=int, default=256, help="LLM_CONTEXT_SIZE_IN_TOKENS")
    arguments = parser.parse_args()
    texts = read_records(arguments.directory / "cran.all.1400")
    queries = read_records(arguments.directory / "cran.qry")
    grades = read_grades(arguments.directory / "cranqrel")
    numbers = {text: number for number, text in enumerate(texts, 1) if text}
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(port),
            "DATABASE_URL": f"sqlite+aiosqlite:///{directory}/embeddings.sqlite",
            "LLM_CONTEXT_SIZE_IN_TOKENS": str(arguments.window),
            "LOG_DIRECTORY": directory,
            "MODELS_DIRECTORY": str(MODEL.parent),
            "LOG_LEVEL": "WARNING",
        }
        command = [sys.executable, str(PROJECT_DIRECTORY / "llama_embeddings_server.py")]
        with (
            running(command, url, "/health", **(dict(os.environ) | settings)),
            httpx.Client(base_url=url, timeout=600, trust_env=False) as client,
        ):
            embed_all(client, list(numbers))
            scores = {name: measure_way(client, queries, numbers, grades, way) for name, way in WAYS.items()}
    print("| way to search | nDCG@10 |\n|---|---|")
    for name, score in scores.items():
        print(f"| {name} | {score:.4f} |")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
