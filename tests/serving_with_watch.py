"""Runs the real server with a watch on its event loop; `python -m` is not needed: `serving_with_watch.py FILE`.

A task asks to be woken every few milliseconds and notes how late it was. At the end the latest wake-ups go to FILE as
JSON: `{"max_seconds", "worst": [[seconds, seconds waited for a core, seconds since the start], …], "n_samples"}`.
Measuring inside the server leaves out the client, which shares the cores; what the loop's thread waited for a core,
which the kernel keeps count of, tells a busy machine from a program that holds up its own loop.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import llama_embeddings_server

PAUSE_SECONDS = 0.005
N_WORST = 20


def read_seconds_waited_for_a_core() -> float:
    """How long this thread has been ready to run without running (proc_pid_schedstat(5), second field)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0  # not Linux, or a kernel that does not count


async def watch_event_loop(delays: list[tuple[float, float, float]]) -> None:
    """Append (seconds too late, seconds waited for a core, seconds since the start) for every wake-up."""
    # The last step of the start, before any request is taken, is one garbage collection of all there is.
    while not gc.get_freeze_count():
        await asyncio.sleep(PAUSE_SECONDS)
    started = time.perf_counter()
    while True:
        before, waited_before = time.perf_counter(), read_seconds_waited_for_a_core()
        await asyncio.sleep(PAUSE_SECONDS)
        now = time.perf_counter()
        waited = read_seconds_waited_for_a_core() - waited_before
        delays.append((now - before - PAUSE_SECONDS, waited, now - started))


def watch(app: FastAPI, path: Path) -> FastAPI:
    """The application, watched from the moment it serves until it is asked to stop."""
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        delays: list[tuple[float, float, float]] = []
        async with serve(app) as state:
            watcher = asyncio.create_task(watch_event_loop(delays))
            yield state
            watcher.cancel()
        worst = heapq.nlargest(N_WORST, delays)
        path.write_text(json.dumps({"max_seconds": worst[0][0], "worst": worst, "n_samples": len(delays)}))

    app.router.lifespan_context = lifespan
    return app


def main() -> int:
    create_app = llama_embeddings_server.create_app
    path = Path(sys.argv[1])
    llama_embeddings_server.create_app = lambda *arguments, **options: watch(create_app(*arguments, **options), path)
    return llama_embeddings_server.main()


if __name__ == "__main__":
    sys.exit(main())
