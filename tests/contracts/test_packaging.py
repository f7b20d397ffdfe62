"""Makefile, requirements, Dockerfile and the set-up script, as far as they can be checked without installing anything.

The Dockerfile's steps are run for real by `make test-docker`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from llama_embeddings.settings import load_settings, setting_fields
from tests.integration.dockerfile_in_chroot import Instruction, copied_paths, copy, parse_dockerfile

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
SETUP_SCRIPT = PROJECT_DIRECTORY / "setup_dockerized_app_on_fresh_machine.sh"
TOOLS = Path(sys.executable).parent


def run(
    *command: str | Path, cwd: Path = PROJECT_DIRECTORY, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; nothing of an outer `make` reaches an inner one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Linters


def test_shell_scripts_are_clean() -> None:
    """shellcheck finds nothing in any of them."""
    outcome = run(TOOLS / "shellcheck", SETUP_SCRIPT, PROJECT_DIRECTORY / ".ci" / "run")
    assert outcome.returncode == 0, outcome.stdout


def test_dockerfile_is_clean() -> None:
    """hadolint finds nothing but what the Dockerfile gives reasons for."""
    outcome = run(TOOLS / "hadolint", PROJECT_DIRECTORY / "Dockerfile")
    assert outcome.returncode == 0, outcome.stdout


# Requirements


def read_requirements(name: str) -> dict[str, str]:
    """Normalised package name to what follows it, for instance `==1.0`."""
    lines = (PROJECT_DIRECTORY / name).read_text().splitlines()
    stripped = [line.split("#")[0].strip().removesuffix("\\").strip() for line in lines]
    matches = [
        re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?([^\s;]*)(?:\s*;.*)?", line)
        for line in stripped
        if line and line[0] != "-"
    ]
    assert None not in matches, name
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in matches if match}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-clients"])
def test_every_requirement_is_pinned_as_written_by_hand(name: str) -> None:
    """The made file has one exact version of everything, and those of the .in file."""
    pinned = read_requirements(f"{name}.txt")
    assert all(re.fullmatch(r"==[\w.+!]+", version) for version in pinned.values())
    assert read_requirements(f"{name}.in").items() <= pinned.items()


def test_what_server_and_tests_share_has_one_version() -> None:
    """Installing the development requirements changes nothing that the server runs with."""
    server, development = read_requirements("requirements.txt"), read_requirements("requirements-dev.txt")
    shared = server.keys() & development.keys()
    assert shared
    assert {name: server[name] for name in shared} == {name: development[name] for name in shared}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_name_no_place(name: str) -> None:
    """No index, no path of the machine that made them; no option but the digests."""
    text = (PROJECT_DIRECTORY / name).read_text()
    assert not re.search(r"://|(^|\s)--(?!hash=sha256:)|(^|\s)/\w", text)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_has_the_digests_of_its_files(name: str) -> None:
    """Another file under the same name and version is not installed."""
    joined = (PROJECT_DIRECTORY / name).read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if re.match(r"[\w.-]+(\[.*\])?==", line)]
    assert len(lines) == len(read_requirements(name))
    assert [line.split()[0] for line in lines if not re.search(r" --hash=sha256:[0-9a-f]{64}( |$)", line)] == []


def test_findings_that_the_audit_passes_over_are_explained() -> None:
    """Each of them, for the version that is pinned: with another, it is time to look again."""
    [passed_over] = re.findall(
        r"^EXPLAINED_FINDINGS := (.*)$", (PROJECT_DIRECTORY / "Makefile").read_text(), re.MULTILINE
    )
    table = (PROJECT_DIRECTORY / "docs" / "security.md").read_text()
    explained = re.findall(r"^\| (CVE-[\d-]+) \| ([\w-]+) ([\d.]+),", table, re.MULTILINE)
    assert [finding for finding, *_ in explained] == passed_over.split()
    pinned = read_requirements("requirements.txt")
    assert all(pinned[package] == f"=={version}" for _, package, version in explained)


def test_what_findings_are_about_is_not_used() -> None:
    """As their explanations say: no module of `future` is loaded, no cache on disk is made."""
    program = (
        "import sys, llama_embeddings_server, llama_cpp; print([name for name in sys.modules if name[:6] == 'future'])"
    )
    assert run(sys.executable, "-c", program).stdout.strip() == "[]"
    paths = [*PROJECT_DIRECTORY.glob("*.py"), *(PROJECT_DIRECTORY / "llama_embeddings").rglob("*.py")]
    assert [
        path.name for path in paths if re.search(r"diskcache|LlamaDiskCache|llama_cpp\.Llama\b", path.read_text())
    ] == []


def test_nothing_is_installed_without_its_digest() -> None:
    """Make and Docker let pip refuse what has none; the peer that benchmarks compare with is nobody's server."""
    makefile = (PROJECT_DIRECTORY / "Makefile").read_text()
    installations = [line for line in makefile.splitlines() if "$(PIP_INSTALL)" in line and " -r " in line]
    assert len(installations) == 2
    assert all("--require-hashes" in line for line in installations)
    assert (
        "pip install --no-cache-dir --require-hashes --requirement requirements.txt"
        in (PROJECT_DIRECTORY / "Dockerfile").read_text()
    )


# Makefile


def test_run_installs_and_then_becomes_the_server() -> None:
    """The last step of `make run` is the server itself, in the foreground."""
    outcome = run("make", "--dry-run", "--always-make", "run")
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.strip().splitlines()
    assert lines[-1] == "exec .venv/bin/python llama_embeddings_server.py"
    assert any("pip install" in line and line.endswith("-r requirements.txt") for line in lines)
    assert any("similarity_measures.warm_up()" in line for line in lines), "the measures are compiled before the start"


def test_test_runs_every_check_and_every_test() -> None:
    """`make test` lints, type-checks and runs pytest on everything; .ci/run adds the clients and nothing cleverer."""
    steps = run("make", "--dry-run", "--always-make", "test").stdout
    for step in ("-m ruff check .", "-m ruff format --check .", "-m mypy\n", "-m pytest"):
        assert f".venv/bin/python {step}" in steps
    ci_run = PROJECT_DIRECTORY / ".ci" / "run"
    assert os.access(ci_run, os.X_OK)
    assert ci_run.read_text().strip().endswith("make test && exec make test-clients")


def make_bare_project(tmp_path: Path, *programs: str) -> tuple[Path, str]:
    """A directory with Makefile and requirements but no environment, and a PATH with these programs only."""
    project, path = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    path.mkdir()
    for name in ("Makefile", "requirements.txt", "similarity_measures.py"):
        shutil.copy(PROJECT_DIRECTORY / name, project)
    for program in ("sh", "sed", "ls", "rm", *programs):
        found = shutil.which(program)
        assert found is not None, program
        (path / program).symlink_to(found)
    return project, str(path)


def make_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_make(project: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    make = shutil.which("make")
    assert make is not None
    return run(make, *arguments, cwd=project, environment={"PATH": path, "CXX": "", "PYTHON": ""})


def test_without_a_compiler_one_sentence_says_how_to_get_one(tmp_path: Path) -> None:
    """Nothing is downloaded before the missing compiler is named."""
    project, path = make_bare_project(tmp_path)
    outcome = run_make(project, path, "run")
    assert outcome.returncode != 0
    message = outcome.stderr.splitlines()[0]
    assert message.startswith("A C++ compiler is needed")
    assert all(word in message for word in ("apt install g++", "dnf install gcc-c++", "xcode-select --install"))
    assert not (project / ".venv").exists()


def test_no_compiler_is_needed_once_llama_cpp_is_installed(tmp_path: Path) -> None:
    """The pinned version in the environment is enough; another version is not."""
    project, path = make_bare_project(tmp_path)
    version = read_requirements("requirements.txt")["llama-cpp-python"].removeprefix("==")
    packages = project / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "llama_cpp_python-0.0.1.dist-info").mkdir(parents=True)
    assert run_make(project, path, "compiler").returncode != 0
    (packages / f"llama_cpp_python-{version}.dist-info").mkdir()
    assert run_make(project, path, "compiler").returncode == 0


def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Python before 3.11 counts as no Python."""
    project, path = make_bare_project(tmp_path)
    make_program(Path(path) / "c++", "exit 0")
    make_program(Path(path) / "python3", "exit 1")
    outcome = run_make(project, path, "run")
    assert outcome.returncode != 0
    assert outcome.stderr.startswith("Python 3.11 or later is needed")


def test_a_python_without_venv_is_named_with_the_package_to_install(tmp_path: Path) -> None:
    """Debian keeps the module in a package of its own."""
    project, path = make_bare_project(tmp_path)
    make_program(Path(path) / "c++", "exit 0")
    make_program(Path(path) / "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    outcome = run_make(project, path, "run")
    assert outcome.returncode != 0
    assert outcome.stderr.startswith("python3 has no venv module")
    assert "python3-venv" in outcome.stderr


def test_a_failed_installation_is_tried_again(tmp_path: Path) -> None:
    """Only an installation that succeeded is remembered."""
    project, path = make_bare_project(tmp_path, "echo", "mkdir", "touch", "cp")
    make_program(Path(path) / "c++", "exit 0")
    install = "[ -e allowed ]"
    fake = f'case "$*" in *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;; *"pip install"*) {install};; esac'
    make_program(Path(path) / "python3", fake)
    assert run_make(project, path, "PYTHON=python3", "run").returncode != 0
    (project / "allowed").touch()
    assert run_make(project, path, "PYTHON=python3", "run").returncode == 0
    (project / "allowed").unlink()
    assert run_make(project, path, "PYTHON=python3", "run").returncode == 0


# Dockerfile


def instructions() -> list[Instruction]:
    return parse_dockerfile((PROJECT_DIRECTORY / "Dockerfile").read_text())


def copied_from_project() -> list[str]:
    copies = [copied_paths(instruction) for instruction in instructions() if instruction.name == "COPY"]
    return [source for options, sources, _ in copies if "from" not in options for source in sources]


def is_sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it or a directory above it decides."""
    parts = path.split("/")
    candidates = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    is_sent = True
    for line in (PROJECT_DIRECTORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if any(fits(candidate, pattern) for candidate in candidates):
            is_sent = line.startswith("!")
    return is_sent


def fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatchcase(path.rsplit("/", 1)[-1], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def test_everything_the_dockerfile_copies_exists_and_is_sent() -> None:
    """No COPY can fail for want of its source."""
    assert copied_from_project()
    for source in copied_from_project():
        assert (PROJECT_DIRECTORY / source).exists(), source
        assert is_sent_to_docker(source), source


def test_every_module_of_the_server_reaches_the_image() -> None:
    """A new top-level module has to be copied, too."""
    modules = {path.name for path in PROJECT_DIRECTORY.glob("*.py")}
    assert modules <= set(copied_from_project())
    assert is_sent_to_docker("llama_embeddings/api/static/swagger.js")


def test_the_step_that_makes_the_model_has_all_it_imports(tmp_path: Path) -> None:
    """The builder gets a part of the code only; that part must stand alone."""
    stages = [number for number, found in enumerate(instructions()) if found.name == "FROM"]
    for instruction in instructions()[: stages[1]]:
        if instruction.name == "COPY":
            _, sources, destination = copied_paths(instruction)
            for source in sources:
                name = Path(source).name if destination.endswith("/") else ""
                copy(PROJECT_DIRECTORY / source, tmp_path / destination / name)
    outcome = run(sys.executable, "-c", "import llama_embeddings.catalogue.default_model", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    "path",
    [
        ".venv/bin/python",
        ".git/config",
        ".env",
        "security_token",
        "models/all-MiniLM-L6-v2.gguf",
        "embeddings.sqlite",
        "embeddings.sqlite-wal",
        "llama2_embeddings_fastapi_service.log",
        "llama_embeddings/__pycache__/errors.pyc",
        "tests/conftest.py",
    ],
)
def test_nothing_private_or_large_is_sent(path: str) -> None:
    """Environment, settings, token, models, database and logs stay on the machine."""
    assert not is_sent_to_docker(path)


def image_environment() -> dict[str, str]:
    final = instructions()[max(number for number, found in enumerate(instructions()) if found.name == "FROM") :]
    pairs = [pair for found in final if found.name == "ENV" for pair in found.arguments.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def test_settings_of_the_image_are_settings_of_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each variable is known and good, callers need a token, and all that is written lies in the volumes."""
    known = {field.metadata["name"] for field in setting_fields()}
    environment = image_environment()
    assert environment.keys() - known == {"PATH", "PYTHONUNBUFFERED", "NUMBA_CACHE_DIR"}
    for name in known:
        monkeypatch.delenv(name, raising=False)
    for name in environment.keys() & known:
        monkeypatch.setenv(name, environment[name])
    empty = tmp_path / "empty.env"
    empty.touch()
    settings = load_settings(empty)
    assert settings.requires_token
    assert settings.listen_host == "0.0.0.0"
    assert settings.database_url.startswith("sqlite+aiosqlite:////data/")
    written = (settings.security_token_path, settings.log_directory, settings.models_directory)
    assert all(str(path).startswith(("/data/", "/models")) for path in written)


def test_image_runs_as_nobody_special_with_health_check_and_volumes() -> None:
    """The last stage sets a user that is not root, a health check, both volumes and an exec-form command."""
    last = {found.name: found.arguments for found in instructions()}
    assert last["USER"].split(":")[0].isdigit()
    assert last["USER"].split(":")[0] != "0"
    assert "/health" in last["HEALTHCHECK"]
    assert last["VOLUME"] == '["/data", "/models"]'
    assert last["EXPOSE"] == "8089"
    assert last["CMD"] == '["python", "llama_embeddings_server.py"]'


# The set-up script, with a `docker` that writes down how it was called

FAKE_DOCKER = """
printf '%s\\n' "$*" >> "$FAKE_DOCKER_DIRECTORY/calls"
container="$FAKE_DOCKER_DIRECTORY/container"
case "$1" in
    ps) if [ -e "$container" ]; then echo 0123456789ab; fi ;;
    run) [ ! -e "$container" ] || exit 125; touch "$container" ;;
    rm) rm "$container" ;;
    inspect) [ -e "$container" ] && echo "$FAKE_DOCKER_HEALTH" ;;
    exec) echo token-made-by-the-server ;;
    logs) echo 'what the server said' ;;
esac
"""


def set_up(directory: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script; its outcome and the calls of docker."""
    make_program(directory / "docker", FAKE_DOCKER)
    (directory / "calls").unlink(missing_ok=True)
    defaults = {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "FAKE_DOCKER_DIRECTORY": str(directory),
        "FAKE_DOCKER_HEALTH": "healthy",
        "SECURITY_TOKEN": "",
        "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": "",
    }
    outcome = run(SETUP_SCRIPT, *arguments, environment={**defaults, **environment})
    calls = directory / "calls"
    return outcome, calls.read_text().splitlines() if calls.exists() else []


def names_of(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


def test_first_set_up_builds_runs_and_prints_address_and_token(tmp_path: Path) -> None:
    """Built for this machine, restarted with it, its data in named volumes."""
    outcome, calls = set_up(tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert names_of(calls) == ["info", "build", "ps", "run", "inspect", "exec"]
    assert calls[1] == "build --tag llama-embeddings --build-arg LLAMA_CMAKE_ARGS=-DGGML_NATIVE=ON ."
    for option in (
        "--restart unless-stopped",
        "--publish 0.0.0.0:8089:8089",
        "--volume llama_data:/data",
        "--volume llama_models:/models",
    ):
        assert option in calls[3]
    assert re.search(r"http://[\d.]+:8089/\nToken: token-made-by-the-server\n$", outcome.stdout)


def test_second_set_up_replaces_the_container_and_touches_no_volume(tmp_path: Path) -> None:
    """The new image is built before the old container stops; volumes are only named in `run`."""
    set_up(tmp_path)
    outcome, calls = set_up(tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert names_of(calls) == ["info", "build", "ps", "stop", "rm", "run", "inspect", "exec"]
    assert calls[3:5] == ["stop llama-embeddings", "rm llama-embeddings"]
    assert not [call for call in calls if call.startswith("volume")]


def test_port_address_and_token_can_be_chosen(tmp_path: Path) -> None:
    """The token reaches docker by its name only, so that no list of processes shows it."""
    token = "chosen-by-the-operator"
    outcome, calls = set_up(tmp_path, "9000", "127.0.0.1", SECURITY_TOKEN=token)
    assert outcome.returncode == 0, outcome.stderr
    started = next(call for call in calls if call.startswith("run "))
    assert "--publish 127.0.0.1:9000:8089" in started
    assert "--env SECURITY_TOKEN " in started
    assert not [call for call in calls if token in call]
    assert outcome.stdout.endswith(f"http://127.0.0.1:9000/\nToken: {token}\n")


@pytest.mark.parametrize("health", ["unhealthy", "starting"])
def test_a_server_that_does_not_get_healthy_shows_its_log_and_fails(tmp_path: Path, health: str) -> None:
    """Waiting is bounded, and the reason is on the screen."""
    outcome, calls = set_up(tmp_path, FAKE_DOCKER_HEALTH=health, HEALTHY_TIMEOUT_SECONDS="1")
    assert outcome.returncode == 1
    assert names_of(calls)[-1] == "logs"
    assert "what the server said" in outcome.stderr
    assert "Token" not in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["99999"], {}, "The port must be a number from 1 to 65535"),
        (["80; rm"], {}, "The port must be a number from 1 to 65535"),
        ([], {"SECURITY_TOKEN": "short"}, "SECURITY_TOKEN must have at least 16 characters"),
    ],
)
def test_bad_choices_are_refused_before_docker_is_called(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    """Nothing is built or replaced for a port or token that cannot work."""
    outcome, calls = set_up(tmp_path, *arguments, **environment)
    assert outcome.returncode == 1
    assert message in outcome.stderr
    assert calls == []


def test_docker_is_installed_where_it_is_missing(tmp_path: Path) -> None:
    """On Debian and Ubuntu by the distribution's package; then everything goes its way."""
    for program in ("bash", "sh", "cat", "touch", "rm", "dirname", "hostname", "awk", "sleep", "env", "chmod", "cp"):
        found = shutil.which(program)
        assert found is not None, program
        (tmp_path / program).symlink_to(found)
    make_program(tmp_path / "id", "echo 0")
    make_program(tmp_path / "systemctl", "exit 0")
    make_program(
        tmp_path / "apt-get",
        'echo "$*" >> "$FAKE_DOCKER_DIRECTORY/apt"\n'
        'case "$*" in *docker.io) cp "$FAKE_DOCKER_DIRECTORY/later" "$FAKE_DOCKER_DIRECTORY/docker";; esac',
    )
    make_program(tmp_path / "later", FAKE_DOCKER)
    environment = {
        "PATH": str(tmp_path),
        "FAKE_DOCKER_DIRECTORY": str(tmp_path),
        "FAKE_DOCKER_HEALTH": "healthy",
        "SECURITY_TOKEN": "",
    }
    outcome = run(SETUP_SCRIPT, environment=environment)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "apt").read_text().splitlines() == ["update", "install --yes docker.io"]
    assert "Token: token-made-by-the-server" in outcome.stdout


def test_every_folder_of_tests_is_run_by_make_test() -> None:
    """The Makefile names them, as it runs those that start servers beside the others."""
    folders = {str(path.parent.relative_to(PROJECT_DIRECTORY)) for path in PROJECT_DIRECTORY.glob("tests/*/test_*.py")}
    named = re.findall(r"^TESTS_WITH(?:OUT)?_SERVERS := (.*)$", (PROJECT_DIRECTORY / "Makefile").read_text(), re.M)
    assert folders <= set(" ".join(named).split())
