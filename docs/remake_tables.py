"""Remakes what README.md, .env and docs/openapi.json say from the code: `python docs/remake_tables.py` or `make docs`.

README's tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->`. `tests/contracts/test_docs.py` fails when a
table differs from what the functions here return.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT_DIRECTORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIRECTORY))

import similarity_measures  # noqa: E402 - the project is not installed, only put on the path
from embeddings_data_models import Base  # noqa: E402
from llama_embeddings.catalogue.entries import ENTRIES  # noqa: E402
from llama_embeddings.documents.extracted import SUPPORTED_TYPES  # noqa: E402
from llama_embeddings.settings import load_settings, setting_fields  # noqa: E402
from llama_embeddings_server import create_app  # noqa: E402

# Tags of routes that speak somebody else's dialect, in the order of README's table.
DIALECTS = ("OpenAI", "TEI", "Ollama", "Cohere and Jina", "llama.cpp's server", "Small services")
OPENAPI_FILE = PROJECT_DIRECTORY / "docs" / "openapi.json"


def render_settings_table() -> str:
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in setting_fields():
        default = f"`{field.metadata['default']}`" if str(field.metadata["default"]) else "(empty)"
        rows.append(f"| `{field.metadata['name']}` | {default} | {field.metadata['description']} |")
    return "\n".join(rows)


def render_measures_table() -> str:
    rows = ["| measure | what it is | range | more alike is | cost |", "|---|---|---|---|---|"]
    for measure in similarity_measures.MEASURES.values():
        low, high = (("∞" if bound > 0 else "−∞") if math.isinf(bound) else f"{bound:g}" for bound in measure.range)
        direction = "higher" if measure.higher_is_more_similar else "lower"
        summary = measure.summary.replace("|", r"\|")
        rows.append(f"| `{measure.name}` | {summary} | {low} to {high} | {direction} | {measure.cost} |")
    return "\n".join(rows)


def render_schema_table() -> str:
    rows = [
        f"| `{table.name}` | {', '.join(f'`{column.name}`' for column in table.columns)} |"
        for table in Base.metadata.sorted_tables
    ]
    return "\n".join(["| table | columns |", "|---|---|", *rows])


def render_catalogue_table() -> str:
    rows = ["| model | kind | dimensions | window | licence | taken from |", "|---|---|---|---|---|---|"]
    for entry in ENTRIES.values():
        known = (entry.n_dims, entry.window, entry.licence)
        n_dims, window, licence = ("" if fact is None else fact for fact in known)
        name, kind = f"`{entry.name}`", entry.kind
        rows.append(f"| {name} | {kind} | {n_dims} | {window} | {licence} | `{entry.source.repository}` |")
    return "\n".join(rows)


def describe_api() -> dict[str, Any]:
    """The OpenAPI document of a server with default settings."""
    with tempfile.NamedTemporaryFile(suffix=".env") as empty:
        return create_app(load_settings(Path(empty.name))).openapi()


def render_openapi_file() -> str:
    return json.dumps(describe_api(), indent=1, ensure_ascii=False) + "\n"


def render_routes_table() -> str:
    """Routes of other dialects; the native ones are described one by one."""
    routes: dict[str, list[str]] = {dialect: [] for dialect in DIALECTS}
    for path, operations in describe_api()["paths"].items():
        for method, operation in operations.items():
            for dialect in set(operation.get("tags", ())) & set(DIALECTS):
                routes[dialect].append(f"`{method.upper()} {path}`")
    return "\n".join(
        ["| dialect | routes |", "|---|---|", *(f"| {name} | {', '.join(found)} |" for name, found in routes.items())]
    )


def render_document_types() -> str:
    rows = [f"| {name} | `{mimetype}` |" for mimetype, name in SUPPORTED_TYPES.items()]
    return "\n".join(["| documents | type |", "|---|---|", *rows])


def render_env_file() -> str:
    lines = [
        "# Every setting with its default. An environment variable of the same name wins over this file.",
        "# Made from llama_embeddings/settings.py by docs/remake_tables.py; values may be edited, the README explains.",
    ]
    for field in setting_fields():
        lines.append("")
        lines.extend(f"# {line}" for line in textwrap.wrap(field.metadata["description"], 110))
        lines.append(f"{field.metadata['name']}={field.metadata['default']}")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "settings": render_settings_table,
    "measures": render_measures_table,
    "schema": render_schema_table,
    "catalogue": render_catalogue_table,
    "routes": render_routes_table,
    "document types": render_document_types,
}


def replace_tables(readme: str) -> str:
    """README with every table as the code has it now."""
    for name, render in TABLES.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, rest = readme.split(begin)
        readme = before + begin + render() + "\n" + end + rest.split(end)[1]
    return readme


def main() -> None:
    readme = PROJECT_DIRECTORY / "README.md"
    readme.write_text(replace_tables(readme.read_text()))
    (PROJECT_DIRECTORY / ".env").write_text(render_env_file())
    OPENAPI_FILE.write_text(render_openapi_file())


if __name__ == "__main__":
    main()
