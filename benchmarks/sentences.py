"""Real and made sentences of several kinds, and their embeddings: what indexes are tried on.

Prose (the abstracts of Cranfield), docstrings of the packages installed here, and sentences from templates. The
embeddings are computed once and kept as a file beside a digest of their texts.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.ceiling import load, pack, tokenise
from benchmarks.cranfield import read_records
from benchmarks.engine import MODEL
from llama_embeddings.inference.backend import Context, LoadedModel
from llama_embeddings.inference.pooling import normalise, pool_rows

TOKENS_PER_PASS = 256
N_CONTEXTS = 2
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\w)")
MIN_CHARACTERS, MAX_CHARACTERS = 30, 160
GOODS = "apples barley candles copper fish flour glass honey iron lamps linen oil paper pepper rope salt silk tea wool"
PORTS = "Aalborg Bergen Cadiz Dover Esbjerg Funchal Genoa Haifa Izmir Kiel Lagos Malaga Nantes Odessa Porto Riga Split"
TEMPLATES = (
    "On day {day} the boat carried {count} crates of {goods} from {port} to {other_port}.",
    "The harbour office of {port} notes {count} barrels of {goods} for day {day}.",
    "No {goods} left {port} on day {day}, as {count} crates were held back for {other_port}.",
)


def read_prose(cranfield: Path) -> list[str]:
    """Sentences of the collection's abstracts."""
    return _choose(read_records(cranfield / "cran.all.1400"))


def read_docstrings() -> list[str]:
    """Sentences of the docstrings of what is installed in this environment, in the order of file names."""
    return _choose(_find_docstrings(Path(sysconfig.get_path("purelib"))))


def make_templated(count: int, *, seed: int = 0) -> list[str]:
    """Sentences that differ in names and numbers only."""
    generator = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        port, other_port = generator.sample(PORTS.split(), 2)
        goods, day, amount = generator.choice(GOODS.split()), generator.randrange(2000), generator.randrange(500)
        template = generator.choice(TEMPLATES)
        texts[template.format(port=port, other_port=other_port, goods=goods, day=day, count=amount)] = None
    return list(texts)


def _find_docstrings(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from (ast.get_docstring(node) or "").split("\n\n")


def _choose(paragraphs: Iterable[str]) -> list[str]:
    """Each sentence of middle length once."""
    sentences = (
        " ".join(sentence.split())
        for paragraph in paragraphs
        if ">>>" not in paragraph and "---" not in paragraph
        for sentence in SENTENCE_END.split(paragraph)
    )
    return list(dict.fromkeys(text for text in sentences if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS))


def embed(texts: Sequence[str], kept: Path) -> np.ndarray:
    """Unit vectors of the default model, float32 (n, n_dims), kept under a name of the texts' digest."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=12).hexdigest()
    path = kept / f"{digest}.npy"
    if not path.exists():
        kept.mkdir(parents=True, exist_ok=True)
        np.save(path, _compute(texts))
    vectors: np.ndarray = np.load(path)
    return vectors


def _compute(texts: Sequence[str]) -> np.ndarray:
    model = load(MODEL)
    sequences = tokenise(model, texts)
    contexts = [model.open_context() for _ in range(N_CONTEXTS)]
    batches = pack(sequences, TOKENS_PER_PASS, contexts[0].max_sequences)

    def work(number: int) -> list[np.ndarray]:
        return [_embed_batch(model, contexts[number], batch) for batch in batches[number::N_CONTEXTS]]

    with ThreadPoolExecutor(N_CONTEXTS) as pool:
        shares = list(pool.map(work, range(N_CONTEXTS)))
    in_order = [shares[number % N_CONTEXTS][number // N_CONTEXTS] for number in range(len(batches))]
    vectors = np.empty((len(texts), model.info.n_dims), np.float32)
    vectors[sorted(range(len(texts)), key=lambda place: len(sequences[place]))] = np.concatenate(in_order)
    return vectors


def _embed_batch(model: LoadedModel, context: Context, batch: Sequence[np.ndarray]) -> np.ndarray:
    rows = context.compute(batch, n_threads=1)
    return normalise(pool_rows(rows, [len(sequence) for sequence in batch], model.info.pooling))
