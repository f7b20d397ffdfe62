"""Servers for tests: the real program in a process of its own, and the application in this process on a fake engine.

Nothing here reads the project's `.env` or the caller's settings: every server gets a directory of its own for its
database, its log and its secrets. Servers are stopped by their own process id. Knows nothing of what is tested.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from llama_embeddings.catalogue.default_model import get_default_model
from llama_embeddings.inference.fake_backend import FakeBackend
from llama_embeddings.observability import LOG_FILE_NAME
from llama_embeddings.settings import load_settings, setting_fields
from llama_embeddings_server import create_app
from tests.tiny_models import write_tiny_model

PROJECT_DIRECTORY = Path(__file__).resolve().parent.parent
SERVER_PROGRAM = PROJECT_DIRECTORY / "llama_embeddings_server.py"
FAKE_MODEL_NAME = "fake-model"
OUTPUT_FILE_NAME = "output.txt"
# The first start on a machine compiles the measures and calibrates the engine; neither is quick on a busy one.
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 20.0
REQUEST_TIMEOUT_SECONDS = 60.0


# The real program in a process of its own


@functools.cache
def get_models_directory() -> Path:
    """The project's models directory with the default model in it, made once per run if it is not there."""
    directory = PROJECT_DIRECTORY / "models"
    get_default_model(directory, progress=print)
    return directory


@dataclass
class RunningServer:
    """A server that answers at `url`, with all of its files in `directory`."""

    url: str
    process: subprocess.Popen[bytes]
    directory: Path

    def client(self, **options: Any) -> httpx.Client:
        """A client of this server; proxies of the environment are not for it."""
        return httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False, **options)

    @property
    def output(self) -> str:
        """What all servers of this directory wrote to stdout and stderr."""
        return (self.directory / OUTPUT_FILE_NAME).read_text()

    @property
    def log(self) -> str:
        return (self.directory / LOG_FILE_NAME).read_text()

    @property
    def database(self) -> Path:
        return self.directory / "embeddings.sqlite"

    def kill(self) -> None:
        """End it as a power failure would: `kill -9`."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_SECONDS)

    def stop(self) -> int:
        """Ask it to stop and wait; its exit code, which is the signal's once everything is finished."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextmanager
def start_server(
    directory: Path, settings: Mapping[str, str] | None = None, *, program: Sequence[str | Path] = (SERVER_PROGRAM,)
) -> Iterator[RunningServer]:
    """Start the server with these settings on a free port, wait until it answers, and stop it at the end.

    Started again on the same directory, it finds what the one before it has left there.
    """
    process = launch(directory, settings or {}, program)
    try:
        yield RunningServer(wait_until_healthy(process, directory), process, directory)
    finally:
        RunningServer("", process, directory).stop()


def launch(
    directory: Path, settings: Mapping[str, str], program: Sequence[str | Path] = (SERVER_PROGRAM,)
) -> subprocess.Popen[bytes]:
    """Start the program without waiting for it; what it writes goes to `output.txt`."""
    (directory / ".env").touch()  # found before the project's
    with (directory / OUTPUT_FILE_NAME).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, program)],
            cwd=directory,
            env=make_environment(directory, settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def run_until_it_ends(
    directory: Path, settings: Mapping[str, str], *, timeout_seconds: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Start the program where it is expected to refuse; its exit code and what it said on stdout and stderr."""
    (directory / ".env").touch()
    return subprocess.run(
        [sys.executable, str(SERVER_PROGRAM)],
        cwd=directory,
        env=make_environment(directory, settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


def make_environment(directory: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the server's settings, plus those given; the port is a free one."""
    names = {field.metadata["name"] for field in setting_fields()}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    defaults = {
        "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": "0",
        "MODELS_DIRECTORY": str(get_models_directory()),
        "DATABASE_URL": f"sqlite+aiosqlite:///{directory / 'embeddings.sqlite'}",
        "LOG_DIRECTORY": str(directory),
        "SECURITY_TOKEN_PATH": str(directory / "security_token"),
        "PYTHONPATH": str(PROJECT_DIRECTORY),
        "PYTHONUNBUFFERED": "1",
    }
    return inherited | defaults | dict(settings)


def wait_until_healthy(process: subprocess.Popen[bytes], directory: Path) -> str:
    """The address that the server says it answers on, once it does."""
    output = directory / OUTPUT_FILE_NAME
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        announced = re.search(r"will answer on (http://[^\s\"]+)", output.read_text())
        if announced is not None and answers(announced[1]):
            return announced[1]
        time.sleep(0.05)
    RunningServer("", process, directory).stop()
    raise AssertionError(f"The server did not start (exit code {process.returncode}):\n{output.read_text()}")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def load_default_api() -> dict[str, Any]:
    """The OpenAPI document of a server with default settings, which need not run."""
    return dict(json.loads((PROJECT_DIRECTORY / "docs" / "openapi.json").read_text()))


# The application in this process, on a fake engine


@dataclass
class RunningApplication:
    """The application with its services started, and a client that calls it without a network."""

    app: FastAPI
    backend: FakeBackend
    client: httpx.AsyncClient
    directory: Path

    @property
    def database(self) -> Path:
        return self.directory / "embeddings.sqlite"

    @property
    def models_directory(self) -> Path:
        return self.directory / "models"

    def add_model(self, name: str) -> None:
        """Put another model file into the models directory."""
        write_tiny_model(self.models_directory / f"{name}.gguf", name=name)


@asynccontextmanager
async def run_application(directory: Path, **overrides: Any) -> AsyncIterator[RunningApplication]:
    """Start the application with a fake engine; `overrides` are fields of Settings.

    The model file is a tiny real one, as the catalogue examines it; the fake engine does not read it.
    """
    env_file = directory / ".env"
    env_file.touch()
    (directory / "models").mkdir(exist_ok=True)
    settings = {
        "models_directory": directory / "models",
        "default_model_name": FAKE_MODEL_NAME,
        "database_url": f"sqlite+aiosqlite:///{directory / 'embeddings.sqlite'}",
        "log_directory": directory,
        "security_token_path": directory / "security_token",
        "inference_workers": 2,
        "inference_threads_per_worker": 1,
        "inference_token_budget": 256,
    }
    backend = FakeBackend()
    app = create_app(load_settings(env_file, **settings | overrides), backend=backend)
    async with httpx.AsyncClient(
        # A failure of the application is answered with a 500, as behind a real server.
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url="http://server",
        timeout=REQUEST_TIMEOUT_SECONDS,
    ) as client:
        running = RunningApplication(app, backend, client, directory)
        running.add_model(FAKE_MODEL_NAME)
        async with app.router.lifespan_context(app):
            try:
                yield running
            finally:
                backend.gate.set()  # a test that fails while it holds the engine back must not hold back its end


async def wait_until(condition: Any, *, timeout_seconds: float = 5.0) -> None:
    """Let the event loop turn until `condition()` is true; TimeoutError if it does not become so."""
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.002)
