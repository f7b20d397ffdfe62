"""Who may import whom: the table below, held against the imports of every module.

A new module has to be given a row. Imports are read from the source by `ast`, wherever in a module they stand, so that
one inside a function counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
PACKAGE = "llama_embeddings"
COMPOSITION_ROOT = "llama_embeddings_server"
EVERYBODY_BELOW = {"embeddings_data_models", f"{PACKAGE}.errors", f"{PACKAGE}.observability"}
FOUNDATIONS = {f"{PACKAGE}.{name}" for name in ("inference", "catalogue", "storage", "vectors", "documents")}

# Unit to the units it may import. A unit is a module, or a package with all that is in it.
ALLOWED: dict[str, set[str]] = {
    "embeddings_data_models": set(),
    "similarity_measures": set(),
    "ramdisk_functions": set(),
    f"{PACKAGE}.errors": set(),
    f"{PACKAGE}.settings": {f"{PACKAGE}.errors"},
    f"{PACKAGE}.observability": {f"{PACKAGE}.errors"},
    f"{PACKAGE}.inference": EVERYBODY_BELOW,
    f"{PACKAGE}.catalogue": EVERYBODY_BELOW | {"ramdisk_functions"},
    f"{PACKAGE}.storage": EVERYBODY_BELOW,
    f"{PACKAGE}.vectors": EVERYBODY_BELOW,
    f"{PACKAGE}.documents": EVERYBODY_BELOW,
    f"{PACKAGE}.services": FOUNDATIONS | EVERYBODY_BELOW | {"similarity_measures"},
    f"{PACKAGE}.api": {f"{PACKAGE}.services"} | EVERYBODY_BELOW,
}
ALLOWED[COMPOSITION_ROOT] = set(ALLOWED)
# The commands compose parts as the server does, by its functions.
ALLOWED[f"{PACKAGE}.commands"] = set(ALLOWED)
ALLOWED[f"{PACKAGE}.__main__"] = {f"{PACKAGE}.commands"}
# Libraries with one importer each.
SOLE_IMPORTERS = {
    "llama_cpp": f"{PACKAGE}.inference.llama_backend",
    "faiss": f"{PACKAGE}.vectors.index",
    "decouple": f"{PACKAGE}.settings",
}
# Interpreters of HTTP and SQL, and the folders beyond which they must not be seen.
CONFINED_LIBRARIES = {
    "fastapi": {f"{PACKAGE}.api", COMPOSITION_ROOT},
    "starlette": {f"{PACKAGE}.api", COMPOSITION_ROOT},
    "uvicorn": {COMPOSITION_ROOT},
    "sqlalchemy": {f"{PACKAGE}.storage", "embeddings_data_models"},
    "aiosqlite": {f"{PACKAGE}.storage"},
}
ENVIRONMENT_READER = f"{PACKAGE}.settings"
# Sets variables that libraries read when they are loaded, and reads none.
ENVIRONMENT_PRESETTER = f"{PACKAGE}.inference.llama_backend"
# What a child process is started with is made in these, from the parent's environment.
PACKAGE_INITIALISERS = {PACKAGE}


def find_modules() -> dict[str, ast.Module]:
    """Every module of the program by its dotted name, parsed."""
    paths = [*PROJECT_DIRECTORY.glob("*.py"), *(PROJECT_DIRECTORY / PACKAGE).rglob("*.py")]
    return {name_module(path): ast.parse(path.read_text("utf-8"), str(path)) for path in paths}


def name_module(path: Path) -> str:
    parts = path.relative_to(PROJECT_DIRECTORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(module: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, the imported names included: `a.b` and `a.b.c` for `from a.b import c`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_unit(name: str) -> str | None:
    """The row of the table that a dotted name falls into."""
    return next((unit for unit in ALLOWED if name == unit or name.startswith(f"{unit}.")), None)


MODULES = find_modules()
NAMES = sorted(MODULES)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in {module.split(".")[0] for module in MODULES}


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    """Nothing of the program is outside the table, and the table names nothing that is gone."""
    assert [name for name in NAMES if find_unit(name) is None and name not in PACKAGE_INITIALISERS] == []
    assert {find_unit(name) for name in NAMES} - {None} == set(ALLOWED)


@pytest.mark.parametrize("name", NAMES)
def test_module_imports_only_what_its_row_allows(name: str) -> None:
    """Its own unit and those of the table; the top of the package holds nothing to import."""
    unit = find_unit(name)
    allowed = ALLOWED[unit] | {unit} if unit is not None else set()
    imported = {found for found in find_imports(MODULES[name]) if is_ours(found) and found != PACKAGE}
    assert {found for found in imported if find_unit(found) not in allowed} == set()


def test_nobody_but_the_commands_imports_the_composition_root() -> None:
    """It is where the parts meet, not a part."""
    importers = [name for name in NAMES if COMPOSITION_ROOT in set(find_imports(MODULES[name]))]
    assert {find_unit(name) for name in importers} <= {f"{PACKAGE}.commands"}


def test_packages_hold_nothing_but_their_docstring() -> None:
    """No re-exports: a name has one place."""
    for path in (PROJECT_DIRECTORY / PACKAGE).rglob("__init__.py"):
        body = ast.parse(path.read_text("utf-8")).body
        assert len(body) <= 1
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_library_has_one_importer(library: str) -> None:
    """Whatever it brings with it, thread pools and aborts included, is dealt with in one place."""
    importers = [name for name in NAMES if library in {found.split(".")[0] for found in find_imports(MODULES[name])}]
    assert importers == [SOLE_IMPORTERS[library]]


@pytest.mark.parametrize("library", CONFINED_LIBRARIES)
def test_http_and_sql_stay_in_their_places(library: str) -> None:
    """Services see neither."""
    importers = [name for name in NAMES if library in {found.split(".")[0] for found in find_imports(MODULES[name])}]
    assert {find_unit(name) for name in importers} <= CONFINED_LIBRARIES[library]


def test_engine_library_is_not_loaded_before_a_backend_is_made() -> None:
    """What libgomp reads when it is loaded can still be set, and tests on the fake engine never load it."""
    for node in MODULES[SOLE_IMPORTERS["llama_cpp"]].body:
        assert "llama_cpp" not in set(find_imports(ast.Module([node], []))) or not isinstance(
            node, ast.Import | ast.ImportFrom
        )


def find_uses_of_the_environment(module: ast.Module) -> Iterator[ast.AST]:
    """Every mention of `os.environ`, `os.getenv` and their kin, and every import of them from `os`."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(module):
        is_attribute = isinstance(node, ast.Attribute) and node.attr in names
        if is_attribute or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}):
            yield node


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (ENVIRONMENT_READER, ENVIRONMENT_PRESETTER)])
def test_environment_is_read_by_the_settings_alone(name: str) -> None:
    """Everybody else is told by arguments."""
    assert [ast.unparse(node) for node in find_uses_of_the_environment(MODULES[name])] == []


def test_engine_presets_variables_and_reads_none() -> None:
    """Only `os.environ.setdefault`: what the user has set wins."""
    module = MODULES[ENVIRONMENT_PRESETTER]
    presets = [
        node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and node.attr == "setdefault" and isinstance(node.value, ast.Attribute)
    ]
    assert [node for node in find_uses_of_the_environment(module) if node not in presets] == []


def test_every_imported_library_is_a_requirement() -> None:
    """What the program imports is in requirements.in, or in Python, or comes with what is."""
    text = (PROJECT_DIRECTORY / "requirements.in").read_text().lower().replace("-", "_")
    comes_with = {
        "starlette": "fastapi",
        "llama_cpp": "llama_cpp_python",
        "magic": "python_magic",
        "faiss": "faiss_cpu",
    }
    comes_with |= {"decouple": "python_decouple"}
    imported = {found.split(".")[0] for name in NAMES for found in find_imports(MODULES[name])}
    libraries = {found for found in imported if found not in sys.stdlib_module_names and not is_ours(found)}
    assert sorted(library for library in libraries if comes_with.get(library, library).lower() not in text) == []
