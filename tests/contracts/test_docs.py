"""README, .env and the code say the same thing."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from llama_embeddings import errors
from llama_embeddings.api.error_responses import status_of
from llama_embeddings.settings import load_settings, setting_fields
from llama_embeddings_server import create_app

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
README = (PROJECT_DIRECTORY / "README.md").read_text()


def load_remake_tables() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "remake_tables", PROJECT_DIRECTORY / "docs" / "remake_tables.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_readme_tables_are_what_the_code_says() -> None:
    """`make docs` would change nothing."""
    assert load_remake_tables().replace_tables(README) == README


def test_openapi_snapshot_is_what_the_code_says() -> None:
    """A change of the API is seen in `docs/openapi.json`; `make docs` remakes it."""
    assert (PROJECT_DIRECTORY / "docs" / "openapi.json").read_text() == load_remake_tables().render_openapi_file()


def test_env_file_lists_every_setting_with_its_default() -> None:
    """The shipped .env is the rendered one."""
    assert (PROJECT_DIRECTORY / ".env").read_text() == load_remake_tables().render_env_file()


def test_env_file_parses_to_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting with the shipped .env is the same as starting with none."""
    for field in setting_fields():
        monkeypatch.delenv(field.metadata["name"], raising=False)
    empty = tmp_path / "empty.env"
    empty.touch()
    assert load_settings(PROJECT_DIRECTORY / ".env") == load_settings(empty)


def test_readme_names_every_route() -> None:
    """A route nobody can read about does not exist."""
    app = create_app(load_settings())
    paths = [path for path in app.openapi()["paths"] if path not in ("/health", "/ready")]
    assert paths
    missing = [path for path in paths if path.replace(":path", "") not in README]
    assert missing == []


def test_every_route_describes_itself_and_its_errors() -> None:
    """Swagger shows a description and every status that a route can answer with."""
    for path, operations in create_app(load_settings()).openapi()["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            if path != "/health":
                assert "401" in operation["responses"], path


def test_clients_that_are_documented_are_those_that_are_tried() -> None:
    """Names and versions in docs/clients.md are those of the requirements and of package.json."""
    documented = re.findall(
        r"^\| `([\w-]+)`( for Node)? \| ([\d.]+) \|",
        (PROJECT_DIRECTORY / "docs" / "clients.md").read_text(),
        re.MULTILINE,
    )
    names = ("requirements.in", "requirements-dev.in", "requirements-clients.in")
    pinned = "\n".join((PROJECT_DIRECTORY / name).read_text() for name in names).splitlines()
    package = (PROJECT_DIRECTORY / "tests" / "clients" / "package.json").read_text()
    assert len(documented) == 13
    for name, is_node, version in documented:
        assert (f'"{name}": "{version}"' in package) if is_node else (f"{name}=={version}" in pinned), name


def readme_error_rows() -> list[tuple[int, list[str]]]:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", README, re.MULTILINE)
    return [(int(status), re.findall(r"`(\w+)`", codes)) for status, codes in rows]


def all_errors(root: type[errors.ServiceError] = errors.ServiceError) -> list[type[errors.ServiceError]]:
    return [root, *(found for child in root.__subclasses__() for found in all_errors(child))]


def test_readme_error_table_states_the_status_of_every_code_it_names() -> None:
    """Codes and statuses in README are those of the code."""
    status_of_code = {error.code: set() for error in all_errors()}
    for error in all_errors():
        status_of_code[error.code].add(status_of(error.__new__(error)))
    for status, codes in readme_error_rows():
        for code in codes:
            is_validation = code == "invalid_request_error" and status == 422
            assert status in status_of_code[code] or is_validation, (status, code)


RELIABILITY = (PROJECT_DIRECTORY / "docs" / "reliability.md").read_text()


def test_what_reliability_names_exists() -> None:
    """Every test, module and make target that is said to remake a figure can be run."""
    commands = re.findall(r"`((?:python -m|make) [^`]+)`", RELIABILITY)
    assert len(commands) > 8
    paths = [part for part in re.findall(r"[\w./]+", RELIABILITY) if part.startswith(("tests/", "benchmarks/"))]
    modules = [part for command in commands for part in re.findall(r"^python -m ((?:tests|benchmarks)[\w.]*)", command)]
    paths += [f"{module.replace('.', '/')}" for module in modules]
    missing = [path for path in paths if not any((PROJECT_DIRECTORY / f"{path}{end}").exists() for end in ("", ".py"))]
    assert missing == []
    targets = set(re.findall(r"^([\w-]+):", (PROJECT_DIRECTORY / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= targets
