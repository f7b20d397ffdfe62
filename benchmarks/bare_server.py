"""The least a server can do for an embedding: FastAPI, our engine, and nothing else. `python -m benchmarks.bare_server`

No doors, no validation, no store, no index, no log: what it falls short of the ceiling by is what HTTP and FastAPI take
and what callers who wait for their answers leave undone, whatever a server does besides. `MODEL PORT` are its
arguments; it answers `POST /v1/embeddings` with base64, and errors with whatever Python makes of them.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from embeddings_data_models import ModelFile, Truncation
from llama_embeddings.inference.backend import LoadedModel
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.llama_backend import LlamaBackend
from llama_embeddings.inference.model_cache import EngineOptions, choose_limits, find_calibration


def open_engine(path: Path) -> EmbeddingEngine:
    """As the server does with its default settings; the calibration is the one kept beside the model."""
    model: LoadedModel = LlamaBackend().load(path, name=path.stem, digest="", max_window=512, pooling=None)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar = path.with_name(f"{path.name}.measured.json")
    file = ModelFile(path.stem, path, digest, path.stat().st_size, sidecar)
    options = EngineOptions(max_window=512, is_parallel=True, max_texts_in_flight=256, max_queued_tokens=10**6)
    return EmbeddingEngine(model, choose_limits(options, lambda: find_calibration(file, model, options)))


def make_app(path: Path) -> FastAPI:
    """One route, and the engine behind it."""
    engine = open_engine(path)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def tell_health() -> Response:
        return Response(b"{}")

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        texts = orjson.loads(await request.body())["input"]
        prepared = await engine.prepare(texts, Truncation.REFUSE)
        results = await engine.embed([text for text in prepared if isinstance(text, PreparedText)])
        data = [
            {"object": "embedding", "index": index, "embedding": base64.b64encode(result.vector).decode()}
            for index, result in enumerate(results)
            if isinstance(result, EngineResult)
        ]
        return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False
    )
