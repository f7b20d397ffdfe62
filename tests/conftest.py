"""Fixtures that tests of several folders share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.serving import RunningApplication, get_models_directory, run_application


@pytest.fixture(scope="session")
def models_directory() -> Path:
    """A directory with the real default model in it."""
    return get_models_directory()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """The application with default settings on a fake engine, fresh for each test."""
    async with run_application(tmp_path) as application:
        yield application
