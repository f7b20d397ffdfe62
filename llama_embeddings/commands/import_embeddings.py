"""`import FILE…`: take in texts whose embeddings were computed elsewhere, by the model named, without computing them.

A running server on the same database goes on meanwhile, and begins to find them a second after their commit.
What is there already is passed over, so the same command goes on where it was interrupted. Vectors that are not of unit
length are scaled; one that is not finite or has other dimensions than the model stops the import, which keeps what came
before.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from embeddings_data_models import DEFAULT_COLLECTION, MAX_COLLECTION_NAME_LENGTH, BulkEmbeddings, InputType
from llama_embeddings.commands.embedding_files import Part, count_rows, normalise, read_parts
from llama_embeddings.errors import InvalidInput, ReadOnlyReplica, ServiceError
from llama_embeddings.settings import Settings, load_settings
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings_server import open_catalogue, start_models

# One transaction. The index of hashes is rewritten once for each, in the order of the hashes.
ROWS_PER_PART = 50_000
WRITER_CACHE_IN_MB = 256


@dataclass(frozen=True, slots=True)
class Target:
    """What imported vectors are taken for, and where they go."""

    model_name: str
    recipe: str
    n_dims: int
    collection: str


def add_parser(subparsers: Any) -> None:
    """Describe the command."""
    parser = subparsers.add_parser("import", help="take in embeddings computed elsewhere", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".npz, .parquet or .jsonl")
    parser.add_argument("--collection", default=DEFAULT_COLLECTION, help="collection to put the texts into")
    parser.add_argument("--model", help="the model that made the embeddings; the default model if absent")
    parser.add_argument("--input-type", choices=list(InputType), help="the part whose prompt was in front of the texts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import all files and say how many rows were new."""
    collection = arguments.collection.strip()
    if not 0 < len(collection) <= MAX_COLLECTION_NAME_LENGTH:
        print(f"--collection takes 1 to {MAX_COLLECTION_NAME_LENGTH} characters.", file=sys.stderr)
        return 2
    input_type = InputType(arguments.input_type) if arguments.input_type else None
    started = time.perf_counter()
    try:
        n_rows, n_new = asyncio.run(
            import_files(load_settings(), arguments.files, arguments.model, collection, input_type)
        )
    except ServiceError as error:
        print(f"The import stopped: {error.message}", file=sys.stderr)
        return 1
    print(f"{n_rows:,} rows read, {n_new:,} of them new, in {time.perf_counter() - started:.0f} s.")
    return 0


async def import_files(
    settings: Settings, paths: list[Path], model_name: str | None, collection: str, input_type: InputType | None
) -> tuple[int, int]:
    """How many rows were read, and how many were new. Raises InvalidInput and the errors of store and models."""
    if settings.read_only_replica:
        raise ReadOnlyReplica
    async with AsyncExitStack() as stack:
        target = await describe_target(settings, model_name, collection, input_type)
        store = await EmbeddingStore.open(
            settings.database_url,
            writer_cache_in_mb=WRITER_CACHE_IN_MB,
            follows_full_text=False,
            survives_power_cuts=settings.durability == "power",
        )
        stack.push_async_callback(store.close)
        counts = [await import_file(store, path, target) for path in paths]
        print("Indexing the texts in full", file=sys.stderr)
        await store.index_full_text()
    return sum(n_rows for n_rows, _ in counts), sum(n_new for _, n_new in counts)


async def describe_target(
    settings: Settings, model_name: str | None, collection: str, input_type: InputType | None
) -> Target:
    """The recipe is that of the model as this server would use it, so the model is loaded for a moment."""
    async with AsyncExitStack() as stack:
        models = await start_models(settings, None, await open_catalogue(settings, stack), stack)
        info = await models.info(model_name)
        recipe = await models.recipe(model_name, input_type)
        return Target(models.resolve(model_name), recipe.family, info.n_dims, collection)


async def import_file(store: EmbeddingStore, path: Path, target: Target) -> tuple[int, int]:
    """Rows read and rows that were new."""
    n_rows = n_new = 0
    with tqdm(total=count_rows(path), desc=path.name, unit=" rows") as progress:
        for part in read_parts(path, ROWS_PER_PART):
            n_new += await store.import_embeddings(_make_rows(path, part, target))
            n_rows += len(part.texts)
            progress.update(len(part.texts))
    return n_rows, n_new


def _make_rows(path: Path, part: Part, target: Target) -> BulkEmbeddings:
    empty = next((place for place, text in enumerate(part.texts) if not text), None)
    if empty is not None:
        raise InvalidInput(f"{path}: the text of row {part.first_row + empty} is empty.")
    vectors = normalise(path, part, target.n_dims)
    return BulkEmbeddings(part.texts, vectors, target.model_name, target.recipe, target.collection)
