"""`backup TARGET`: a compact copy of the database as it is now, while a server goes on writing to it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from llama_embeddings.errors import InvalidInput, ServiceError
from llama_embeddings.settings import Settings, load_settings
from llama_embeddings.storage.engine import find_database_file
from llama_embeddings.storage.store import EmbeddingStore


def add_parser(subparsers: Any) -> None:
    """Describe the command."""
    parser = subparsers.add_parser("backup", help="copy the database while it is in use", description=__doc__)
    parser.add_argument("target", type=Path, help="the file to write; it must not exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the copy and say where it is."""
    try:
        asyncio.run(back_up(load_settings(), arguments.target))
    except ServiceError as error:
        print(f"No backup was made: {error.message}", file=sys.stderr)
        return 1
    print(f"{arguments.target} holds everything up to now ({arguments.target.stat().st_size:,} bytes).")
    return 0


async def back_up(settings: Settings, target: Path) -> None:
    """Copy the database of the settings. Raises InvalidInput if there is none, else as EmbeddingStore.back_up."""
    path = find_database_file(settings.database_url)
    if not path.exists():
        raise InvalidInput(f"There is no database at {path}.")
    if settings.read_only_replica:
        store = await EmbeddingStore.open_replica(settings.database_url)
    else:
        store = await EmbeddingStore.open(settings.database_url, follows_full_text=False)
    try:
        await store.back_up(target)
    finally:
        await store.close()
