"""The whole OpenAPI document against a live server: what it describes, and what it does not.

Requests are drawn by schemathesis from the document, half of them against it, and as bytes that are no JSON at all. A
reply with a status that its operation does not document, any 5xx but a documented one that asks to come again, a body
that is not what the document says, and no reply in time are failures. Knows nothing of what a correct answer is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.serving import RunningServer, get_models_directory, start_server

# The longest that any reply may take, on a busy machine.
TIMEOUT_SECONDS = 60.0
# The only ones among 5xx that say nothing against the server: come again, and a hub that cannot be reached.
HONEST_5XX = {502, 503}
# After the first round, which brings in caches, pools and compiled code.
MAX_GROWTH_BYTES = 150_000_000
MAX_MORE_DESCRIPTORS = 20
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=10), children, max_size=5),
    max_leaves=20,
)
BODIES = st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode())


@dataclass
class ApiFigures:
    """What was tried and what came of it. `sizes`: bytes resident and descriptors after each round; `failures`: the
    first example of each kind, by what it is."""

    n_operations: int = 0
    n_rounds: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    longest_seconds: float = 0.0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def n_requests(self) -> int:
        return sum(self.statuses.values())


@contextmanager
def start_fuzzed_server(directory: Path) -> Iterator[RunningServer]:
    """A server with the real model in a directory of its own, and a hub that nobody can reach."""
    models = directory / "models"
    models.mkdir()
    shutil.copy(get_models_directory() / "all-MiniLM-L6-v2.gguf", models)
    settings = {
        "MODELS_DIRECTORY": str(models),
        "HUB_ENDPOINT": "https://127.0.0.1:9",
        "MODEL_HUB_HOSTS": "127.0.0.1",
        "DOWNLOAD_MODELS_ON_DEMAND": "False",
    }
    with start_server(directory, settings) as server:
        yield server


def fuzz_api(server: RunningServer, *, seconds: float, examples_per_round: int, first_seed: int = 0) -> ApiFigures:
    """Go round all operations until the time is over, at least once."""
    figures = ApiFigures()
    operations = list_operations(server.url)
    figures.n_operations = len(operations)
    process = psutil.Process(server.process.pid)
    ends = time.monotonic() + seconds
    with open_session() as session:
        while figures.n_rounds == 0 or time.monotonic() < ends:
            for operation in operations:
                if figures.n_rounds and time.monotonic() > ends:
                    break
                Fuzzer(server.url, session, operation, figures).run(examples_per_round, first_seed + figures.n_rounds)
            figures.n_rounds += 1
            take_size(process, figures)
    check_size(figures)
    check_alive(server, figures)
    return figures


def list_operations(url: str) -> list[APIOperation]:
    """Those of the document that a server shows."""
    document = httpx.get(f"{url}/openapi.json", trust_env=False).raise_for_status().json()
    return [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]


def open_session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # proxies are not for it
    return session


class Fuzzer:
    """One operation of the document."""

    def __init__(self, url: str, session: requests.Session, operation: APIOperation, figures: ApiFigures) -> None:
        self._url = url
        self._session = session
        self._operation = operation
        self._figures = figures
        self._name = f"{operation.method.upper()} {operation.path}"
        self._documented = {int(status) for status in operation.definition.raw["responses"] if status.isdigit()}

    def run(self, n_examples: int, number: int) -> None:
        """So many requests by the document, against it, and of any bytes."""
        for mode in GenerationMode:
            with suppress(Unsatisfiable):  # there is nothing to do wrong in a request without parameters
                run_examples(self._operation.as_strategy(generation_mode=mode), self._send_case, n_examples, number)
        if self._operation.method == "post":
            run_examples(BODIES, self._send_body, n_examples, number)

    def _send_case(self, case: Case) -> None:
        try:
            response = case.call(base_url=self._url, session=self._session, timeout=TIMEOUT_SECONDS)
        except requests.RequestException as error:
            self._fail(type(error).__name__, case.as_curl_command())
            return
        self._note(response.status_code, response.elapsed, case.as_curl_command, response.content)
        try:
            case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])
        except FailureGroup as group:
            for failure in group.exceptions:
                self._fail(f"{response.status_code}, {failure.title}", f"{failure} {case.as_curl_command()}")

    def _send_body(self, body: bytes) -> None:
        headers = {"content-type": "application/json"}
        url = self._url + self._operation.path
        try:
            reply = self._session.post(url, data=body, headers=headers, timeout=TIMEOUT_SECONDS)
        except requests.RequestException as error:
            self._fail(type(error).__name__, repr(body))
            return
        self._note(reply.status_code, reply.elapsed.total_seconds(), lambda: repr(body), reply.content)

    def _note(self, status: int, seconds: float, describe: Callable[[], str], reply: bytes) -> None:
        figures = self._figures
        figures.statuses[status] += 1
        figures.longest_seconds = max(figures.longest_seconds, seconds)
        if status not in self._documented:
            self._fail(f"{status}, which is not documented", f"{describe()} -> {reply[:500]!r}")
        elif status >= 500 and status not in HONEST_5XX:
            self._fail(str(status), f"{describe()} -> {reply[:500]!r}")

    def _fail(self, what: str, details: str) -> None:
        self._figures.failures.setdefault(f"{self._name}: {what}", details[:2000])


def run_examples(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], n_examples: int, number: int) -> None:
    """Call `check` with examples, the same for the same number; it keeps what fails to itself."""

    @seed(number)
    @settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


def take_size(process: psutil.Process, figures: ApiFigures) -> None:
    """Of the server with the processes that it has started."""
    family = [process, *process.children(recursive=True)]
    resident = sum(member.memory_info().rss for member in family)
    figures.sizes.append((resident, process.num_fds()))


def check_size(figures: ApiFigures) -> None:
    """Nothing may go on growing after the first round."""
    first, last = figures.sizes[0], figures.sizes[-1]
    if last[0] > first[0] + MAX_GROWTH_BYTES:
        figures.failures["memory"] = f"{first[0]} bytes resident after the first round, {last[0]} at the end"
    if last[1] > first[1] + MAX_MORE_DESCRIPTORS:
        figures.failures["descriptors"] = f"{first[1]} after the first round, {last[1]} at the end"


def check_alive(server: RunningServer, figures: ApiFigures) -> None:
    """The same process still computes."""
    with server.client() as client:
        reply = client.post("/get_embedding_vector_for_string/", json={"text": "after all that"})
    if reply.status_code != 200 or server.process.poll() is not None:
        figures.failures["at the end"] = f"{reply.status_code}: {reply.text}"
    if "Traceback" in server.output:
        figures.failures["log"] = server.output[server.output.index("Traceback") :][:3000]
