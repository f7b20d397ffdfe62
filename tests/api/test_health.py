"""Alive and ready are two questions."""

from __future__ import annotations

import asyncio

from tests.serving import FAKE_MODEL_NAME, RunningApplication


async def test_health_answers_while_the_engine_is_held_up(running: RunningApplication) -> None:
    """It asks nothing of the engine."""
    running.backend.gate.clear()
    waiting = asyncio.create_task(
        running.client.post("/get_embedding_vector_for_string/", json={"text": "held up in the engine"})
    )
    await asyncio.sleep(0.05)
    response = await asyncio.wait_for(running.client.get("/health"), timeout=2.0)
    assert (response.status_code, response.json()) == (200, {"status": "alive"})
    assert not waiting.done()
    running.backend.gate.set()
    assert (await waiting).status_code == 200


async def test_readiness_is_a_real_embedding_each_time(running: RunningApplication) -> None:
    """Past memory and store: every answer costs one pass of the engine, and nothing is stored."""
    n_passes = len(running.backend.passes)
    for number in range(1, 3):
        response = await running.client.get("/ready")
        assert response.status_code == 200
        assert list(response.json()) == ["status", "model_name", "embedding_seconds"]
        assert (response.json()["status"], response.json()["model_name"]) == ("ready", FAKE_MODEL_NAME)
        assert response.json()["embedding_seconds"] > 0
        assert len(running.backend.passes) == n_passes + number
    assert (await running.client.get("/get_all_stored_strings/")).json() == {"strings": []}


async def test_failing_engine_is_alive_but_not_ready(running: RunningApplication) -> None:
    """A server that could only answer from its store is taken out of service by /ready alone."""
    running.backend.fail_when_more_than = 0
    ready = await running.client.get("/ready")
    assert ready.status_code >= 500
    assert ready.json()["code"] == "inference_failed"
    assert (await running.client.get("/health")).status_code == 200
    running.backend.fail_when_more_than = None
    assert (await running.client.get("/ready")).status_code == 200
