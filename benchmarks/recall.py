"""Recall of the compressed index on real sentences: `python -m benchmarks.recall CRANFIELD [--kept DIRECTORY]`.

What a service meets, and queries like the stored rows do not show: prose asked among docstrings, a filter that leaves
what is far away, one topic left of several, texts of another kind than those the lists were trained on. The truth is
the exact scan; a result with the score of the last true one counts as found. No server: the index alone is asked, and
rows are read from memory. CRANFIELD is the directory of that collection, see `benchmarks.cranfield`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.sentences import embed, make_templated, read_docstrings, read_prose
from llama_embeddings.vectors.index import Step, VectorIndex

DEPTHS = (10, 100)
N_QUERIES = 200
N_DOCSTRINGS = 60_000
N_TEMPLATED = 20_000
ROWS_PER_ADD = 1_024


@dataclass
class Corpus:
    """Rows with ids from 0, unit vectors float32 (n, n_dims), and whether each is there now."""

    vectors: np.ndarray
    is_there: np.ndarray

    def read(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row_ids = row_ids[self.is_there[row_ids]]
        return row_ids, self.vectors[row_ids]


def fill(index: VectorIndex, corpus: Corpus, row_ids: np.ndarray) -> None:
    """Add rows as they come to a service, and do the upkeep that is due."""
    for start in range(0, len(row_ids), ROWS_PER_ADD):
        part = row_ids[start : start + ROWS_PER_ADD]
        corpus.is_there[part] = True
        index.add(part, corpus.vectors[part])
        keep_up(index, corpus)


def keep_up(index: VectorIndex, corpus: Corpus) -> None:
    while (step := index.next_step()) not in (None, Step.SAVE):
        if step is Step.MERGE:
            index.merge_some(ROWS_PER_ADD)
            continue
        rebuild = index.begin_rebuild()
        rebuild.train(*corpus.read(rebuild.sample_ids))
        rebuild.add(*corpus.read(rebuild.row_ids))
        rebuild.calibrate()
        index.adopt(rebuild)
        print(f"compressed {len(index):,} rows: {index.tuning}", flush=True)


@dataclass
class Figures:
    recalls: list[float]
    seconds: list[float]
    n_compared: list[int]


def ask(index: VectorIndex, corpus: Corpus, query: np.ndarray, depth: int, allowed: np.ndarray | None) -> np.ndarray:
    """Ids of what a search finds; the number of rows compared stands in the last place."""
    search = index.search(query, depth, allowed=allowed)
    n_compared = 0
    while len(search.wanted_ids):
        n_compared += len(search.wanted_ids)
        search.take(*corpus.read(search.wanted_ids))
    return np.append(search.best()[0], n_compared)


def measure(
    index: VectorIndex,
    corpus: Corpus,
    queries: np.ndarray,
    depth: int,
    choose_allowed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Figures:
    """Recall, time and rows compared of each query; a filter is made of the scores of all rows that are there."""
    there = np.flatnonzero(corpus.is_there)
    figures = Figures([], [], [])
    for query in queries:
        scores = corpus.vectors[there] @ query
        allowed = None if choose_allowed is None else there[choose_allowed(scores)]
        pool = scores if allowed is None else corpus.vectors[allowed] @ query
        least = np.sort(pool)[-depth] - 1e-6
        started = time.perf_counter()
        *found, n_compared = ask(index, corpus, query, depth, allowed).tolist()
        figures.seconds.append(time.perf_counter() - started)
        figures.recalls.append(float((corpus.vectors[found] @ query >= least).sum()) / depth)
        figures.n_compared.append(n_compared)
    return figures


def report(
    what: str,
    index: VectorIndex,
    corpus: Corpus,
    queries: np.ndarray,
    choose_allowed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    for depth in DEPTHS:
        found = measure(index, corpus, queries, depth, choose_allowed)
        print(
            f"| {what} | {depth} | {np.mean(found.recalls):.3f} | {np.min(found.recalls):.2f} "
            f"| {1000 * np.median(found.seconds):.2f} ms | {np.mean(found.n_compared):.0f} |",
            flush=True,
        )


def take_farthest_half(scores: np.ndarray) -> np.ndarray:
    return np.flatnonzero(scores <= np.median(scores))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cranfield", type=Path)
    parser.add_argument("--kept", type=Path, default=Path("benchmarks.embeddings"), help="where embeddings are kept")
    arguments = parser.parse_args()
    docstrings = read_docstrings()
    random.Random(0).shuffle(docstrings)
    parts = [docstrings[start : start + N_TEMPLATED] for start in range(0, N_DOCSTRINGS, N_TEMPLATED)]
    documents = np.concatenate([embed(part, arguments.kept) for part in parts])
    prose = embed(read_prose(arguments.cranfield), arguments.kept)
    templated = embed(make_templated(N_TEMPLATED), arguments.kept)
    print("| what | k | recall@k | worst query | p50, index alone | rows compared |\n|---|---|---|---|---|---|")
    generator = np.random.default_rng(0)
    far = prose[generator.permutation(len(prose))[:N_QUERIES]]

    # Docstrings alone.
    corpus = Corpus(documents, np.zeros(len(documents), bool))
    index = VectorIndex(documents.shape[1])
    fill(index, corpus, np.arange(len(documents)))
    report("docstrings among docstrings", index, corpus, documents[generator.permutation(len(documents))[:N_QUERIES]])
    report("prose among docstrings", index, corpus, far)
    near = documents[generator.permutation(len(documents))[:N_QUERIES]]
    report("docstrings, the farthest half", index, corpus, near, take_farthest_half)
    report("prose, the farthest half", index, corpus, far, take_farthest_half)

    # All kinds, then one topic left.
    everything = np.concatenate((documents, templated, prose))
    corpus = Corpus(everything, np.zeros(len(everything), bool))
    index = VectorIndex(everything.shape[1])
    fill(index, corpus, generator.permutation(len(everything)))
    report("all kinds among all kinds", index, corpus, everything[generator.permutation(len(everything))[:N_QUERIES]])
    report("prose among all kinds", index, corpus, far)
    gone = np.concatenate((np.arange(len(documents)), np.arange(len(everything) - len(prose), len(everything))))
    corpus.is_there[gone] = False
    index.remove(gone)
    report("after all but one topic was deleted", index, corpus, templated[:N_QUERIES])
    report("prose, after all but one topic was deleted", index, corpus, far)

    # Another kind after the training.
    for name, first, second in (
        ("templated after docstrings", documents[:24_000], templated),
        ("docstrings after templated", templated, documents[:24_000]),
    ):
        together = np.concatenate((first, second))
        corpus = Corpus(together, np.zeros(len(together), bool))
        index = VectorIndex(together.shape[1])
        fill(index, corpus, np.arange(len(together)))
        report(name, index, corpus, second[generator.permutation(len(second))[:N_QUERIES]])
        report(f"prose, {name}", index, corpus, far)


if __name__ == "__main__":
    main()
