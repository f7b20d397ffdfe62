"""The OpenAPI document is complete and true: made-up requests to every route get only what it describes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.serving import RunningServer, load_default_api, start_server

TOKEN = "a-token-for-tests-only-1234"
# Made-up names must not start real downloads, and made-up texts must not fill the queue of other tests' machines.
SETTINGS = {"SECURITY_TOKEN": TOKEN, "DOWNLOAD_MODELS_ON_DEMAND": "False", "MAX_REQUEST_SIZE_IN_MB": "1"}
CHECKS = (not_a_server_error, status_code_conformance, response_schema_conformance)
N_EXAMPLES = 15

schema = schemathesis.openapi.from_dict(load_default_api())
# Hundreds of requests to each route; made-up ones find as much here.
schema.config.phases.coverage.enabled = False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory: Path = tmp_path_factory.mktemp("openapi")
    with start_server(directory, SETTINGS) as running:
        yield running


@schema.parametrize()
@hypothesis.settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_every_route_answers_as_it_is_described(case: schemathesis.Case, server: RunningServer) -> None:
    """No 5xx, no status that is not described, no body of another shape."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    case.call_and_validate(base_url=server.url, headers=headers, checks=list(CHECKS), timeout=60)
