"""Every example of the README, run against a fresh server with the real model, prints what the README says."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import RunningServer, start_server

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8089"


def readme_examples() -> list[tuple[str, str]]:
    """Command blocks that are followed by a block of output."""
    blocks = re.findall(r"```bash\n(.*?)```\n(?:```(?:json|text)\n(.*?)```)?", README, re.DOTALL)
    return [(commands, output) for commands, output in blocks if ADDRESS in commands]


def as_pattern(expected: str) -> str:
    """A regular expression for an output in which an ellipsis stands for anything."""
    return ".*?".join(re.escape(part) for part in expected.strip().split("…"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start_server(tmp_path_factory.mktemp("readme")) as running:
        yield running


def test_there_is_an_example_of_every_kind_of_endpoint() -> None:
    """The extraction below really found the README's examples."""
    assert len(readme_examples()) >= 10
    assert all(output for _, output in readme_examples())


def test_examples_print_what_the_readme_says(server: RunningServer, tmp_path: Path) -> None:
    """In the README's order, as the examples build on each other."""
    for commands, expected in readme_examples():
        completed = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands.replace(ADDRESS, server.url)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert completed.returncode == 0, (commands, completed.stderr)
        assert re.fullmatch(as_pattern(expected), completed.stdout.strip(), re.DOTALL), (commands, completed.stdout)
