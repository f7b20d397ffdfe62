"""Swagger UI at the root, with every file served from here: it works on a machine without internet."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

STATIC_DIRECTORY = Path(__file__).resolve().parent / "static"

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])  # Ollama's clients ask for the head to see who is there
async def swagger() -> FileResponse:
    """The page to try every endpoint on."""
    return FileResponse(STATIC_DIRECTORY / "swagger.html", media_type="text/html; charset=utf-8")


def mount_static_files(app: FastAPI) -> None:
    """Serve the page's scripts: ours, and Swagger UI's from the package that carries them."""
    package = find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    app.mount("/static/swagger-ui", StaticFiles(directory=Path(package.origin).parent / "static"))
    app.mount("/static", StaticFiles(directory=STATIC_DIRECTORY))
