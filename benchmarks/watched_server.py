"""The server, which also says how many tasks and threads it has: `python benchmarks/watched_server.py FILE`.

Once a second FILE gets a line `{"n_tasks", "n_threads"}` of JSON. What is seen from outside (memory,
descriptors) is not its affair.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama_embeddings_server

SECONDS_BETWEEN_LOOKS = 1.0


async def count_for_ever(path: Path) -> None:
    with path.open("a") as file:
        while True:
            counts = {
                "n_tasks": len(asyncio.all_tasks()),
                "n_threads": threading.active_count(),
            }
            print(json.dumps(counts), file=file, flush=True)
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


def watch(app: FastAPI, path: Path) -> FastAPI:
    """The application, counted from when it is ready until it is asked to stop."""
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with serve(app) as state:
            counting = asyncio.create_task(count_for_ever(path))
            yield state
            counting.cancel()

    app.router.lifespan_context = lifespan
    return app


def main() -> int:
    create_app = llama_embeddings_server.create_app
    path = Path(sys.argv[1])
    llama_embeddings_server.create_app = lambda *given, **options: watch(create_app(*given, **options), path)
    return llama_embeddings_server.main()


if __name__ == "__main__":
    sys.exit(main())
