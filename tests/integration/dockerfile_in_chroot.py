"""Runs the steps of the Dockerfile in a clean Debian root, then the container's command, and asks it for an embedding.

    make test-docker          (as root, on Linux, with debootstrap; some fifteen minutes)

For machines without a Docker engine. Every stage starts from the same fresh Debian 12, whose Python is the 3.11 of the
base image, and its RUN, COPY, ENV, ARG, WORKDIR and USER steps are carried out in order; the command and the health
check run as the image's user with the image's environment. Not shown: that the base image exists, layers, volumes and
networks of Docker. pip's settings of this machine are passed on. Everything is made below one temporary directory and
removed at the end; `--keep` leaves the roots.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
PACKAGES = "ca-certificates,python3.11,python3.11-venv,python3-pip"
MIRROR = "http://deb.debian.org/debian"
START_TIMEOUT_SECONDS = 300
PASSED_ENVIRONMENT = re.compile(r"(PIP_.*|SSL_CERT_.*|REQUESTS_CA_BUNDLE|.*_proxy)", re.IGNORECASE)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TEXT = "I feel extremely chilly"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: `RUN`, and all that follows it."""

    name: str
    arguments: str


@dataclass
class Stage:
    """A stage while it is carried out: its root and what its instructions have set."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """Replace `$NAME` and `${NAME}` as Docker does: by ENV first, else by ARG, else by nothing."""
        known = {**self.arguments, **self.environment}
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], ""), text)


def parse_dockerfile(text: str) -> list[Instruction]:
    """Instructions in order, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def split_options(arguments: str) -> tuple[dict[str, str], str]:
    """`--from=builder --chown=a:b X Y` as ({"from": "builder", "chown": "a:b"}, "X Y")."""
    options: dict[str, str] = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", arguments):
        options[match[1]] = match[2]
        arguments = arguments[match.end() :]
    return options, arguments


def copied_paths(instruction: Instruction) -> tuple[dict[str, str], list[str], str]:
    """Options, sources and destination of a COPY."""
    options, rest = split_options(instruction.arguments)
    *sources, destination = shlex.split(rest)
    return options, sources, destination


class DockerfileRun:
    """Carries out a Dockerfile below a directory."""

    def __init__(self, workspace: Path, build_arguments: dict[str, str]) -> None:
        self.workspace = workspace
        self.build_arguments = build_arguments
        self.stages: dict[str, Stage] = {}
        self.stage = Stage(workspace / "none")
        self.passed = {name: value for name, value in os.environ.items() if PASSED_ENVIRONMENT.fullmatch(name)}

    def carry_out(self, instructions: list[Instruction]) -> Stage:
        """All stages in order; the last one is returned."""
        for instruction in instructions:
            started = time.monotonic()
            print(f"== {instruction.name} {instruction.arguments[:150]}", flush=True)
            getattr(self, f"do_{instruction.name.lower()}")(instruction.arguments)
            if instruction.name in ("RUN", "COPY"):
                print(f"   {time.monotonic() - started:.0f} s", flush=True)
        return self.stage

    def do_from(self, arguments: str) -> None:
        name = arguments.split(" AS ")[1] if " AS " in arguments else "final"
        root = self.workspace / name
        run_checked("cp", "--archive", "--reflink=auto", str(self.workspace / "base"), str(root))
        self.stage = self.stages[name] = Stage(root)

    def do_arg(self, arguments: str) -> None:
        name, _, default = shlex.split(arguments)[0].partition("=")
        self.stage.arguments[name] = self.build_arguments.get(name, default)

    def do_env(self, arguments: str) -> None:
        for pair in shlex.split(arguments):
            name, _, value = pair.partition("=")
            self.stage.environment[name] = self.stage.expand(value)

    def do_workdir(self, arguments: str) -> None:
        self.stage.directory = arguments
        (self.stage.root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def do_user(self, arguments: str) -> None:
        self.stage.user = arguments

    def do_run(self, arguments: str) -> None:
        # What the shell of the step sees: ARG as well as ENV, and this machine's way to the package index.
        environment = {**self.passed, **self.stage.arguments, **self.stage.environment}
        with entered(self.stage.root):
            subprocess.run(self.in_root(["/bin/sh", "-c", arguments], environment), check=True)

    def do_copy(self, arguments: str) -> None:
        options, sources, destination = copied_paths(Instruction("COPY", arguments))
        origin = self.stages[options["from"]].root if "from" in options else PROJECT_DIRECTORY
        target = self.stage.root / os.path.join(self.stage.directory, destination).lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            into = target / path.name if destination.endswith("/") else target
            copy(path, into)
            if "chown" in options:
                inside = "/" + str(into.relative_to(self.stage.root))
                run_checked("chroot", str(self.stage.root), "chown", "--recursive", options["chown"], inside)

    def do_cmd(self, arguments: str) -> None:
        self.stage.command = json.loads(arguments)

    def do_healthcheck(self, arguments: str) -> None:
        self.stage.health_check = json.loads(split_options(arguments)[1].removeprefix("CMD "))

    def do_volume(self, arguments: str) -> None:
        for path in json.loads(arguments):
            assert (self.stage.root / path.lstrip("/")).is_dir(), f"{path} is a volume without initial content"

    def do_expose(self, arguments: str) -> None:
        assert arguments.isdigit()

    def in_root(self, command: list[str], environment: dict[str, str]) -> list[str]:
        """The command line that runs `command` in the stage's root, directory and user, with this environment only."""
        pairs = [f"{name}={value}" for name, value in environment.items()]
        enter = ["chroot", f"--userspec={self.stage.user}", str(self.stage.root)]
        directory = [
            "env",
            "-i",
            f"HOME={self.home()}",
            *pairs,
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            self.stage.directory,
        ]
        return [*enter, *directory, *command]

    def home(self) -> str:
        """The home directory that the stage's passwd file gives its user, who may be named or numbered."""
        user = self.stage.user.partition(":")[0]
        entries = [line.split(":") for line in (self.stage.root / "etc/passwd").read_text().splitlines()]
        return next(entry[5] for entry in entries if user in (entry[0], entry[2]))


def copy(source: Path, target: Path) -> None:
    """Copy as COPY does: a file to the path, a directory's content into the path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def run_checked(*command: str) -> None:
    subprocess.run(command, check=True)


def make_base(target: Path) -> None:
    """A minimal Debian 12 with Python 3.11."""
    print("== debootstrap", flush=True)
    log = target.with_suffix(".log")
    with log.open("w") as output:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(target), MIRROR]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode != 0:
            raise SystemExit(f"debootstrap failed:\n{log.read_text()[-2000:]}")


def prepare_base(root: Path) -> None:
    """Python by the name it has in the base image, and this machine's ways to the network and the package index."""
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    lines = re.findall(r"^global\.([\w-]+)='(.*)'$", pip_settings(), re.MULTILINE)
    (root / "etc/pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in lines))


@functools.cache
def pip_settings() -> str:
    """What pip is told on this machine, one setting per line."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def local_package_directories() -> list[str]:
    """Directories of packages that pip's settings name, if they do."""
    # An index lies in `simple/`, the packages that it points to beside that.
    named = {path.removesuffix("/simple") for path in re.findall(r"(?:file://|[' ])(/[^\s']+)", pip_settings())}
    return sorted(path for path in named if Path(path).is_dir() and not path.startswith(("/etc", "/usr")))


@contextlib.contextmanager
def entered(root: Path) -> Iterator[None]:
    """/proc, /dev, /dev/shm and local package directories inside the root for as long as something runs in it."""
    with contextlib.ExitStack() as stack:
        for path in ("/proc", "/dev", *local_package_directories()):
            inside = root / path.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            run_checked("mount", "--bind", path, str(inside))
            # Lazily, because a process that is just ending may still be in it.
            stack.callback(run_checked, "umount", "--lazy", str(inside))
            # Private, so that what is mounted below it does not appear in this machine's own tree.
            run_checked("mount", "--make-private", str(inside))
        shared_memory = root / "dev/shm"
        run_checked("mount", "-t", "tmpfs", "-o", "mode=1777,size=64m", "tmpfs", str(shared_memory))
        stack.callback(run_checked, "umount", "--lazy", str(shared_memory))
        yield


def remove(workspace: Path) -> None:
    """Remove everything that was made, but nothing while something of this machine is still mounted in it."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if str(workspace) in line]
    if mounted:
        raise SystemExit(f"Not removed, because something is still mounted there: {', '.join(mounted)}")
    shutil.rmtree(workspace)


def check_server(run: DockerfileRun, stage: Stage) -> None:
    """Start CMD as the image's user, wait for the health check, ask for an embedding, stop it with SIGTERM."""
    environment = {**stage.environment, "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": str(free_port())}
    with entered(stage.root):
        started = time.monotonic()
        server = subprocess.Popen(run.in_root(stage.command, environment))
        try:
            wait_until_healthy(server, run.in_root(stage.health_check, environment))
            print(f"healthy after {time.monotonic() - started:.1f} s, user {owner_of(server.pid)}", flush=True)
            check_embedding(environment["LLAMA_EMBEDDING_SERVER_LISTEN_PORT"], stage.root / "data/security_token")
        finally:
            server.terminate()
            status = server.wait(timeout=30)
        print(f"stopped by SIGTERM with status {status}")
        assert status in (0, -15), status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def owner_of(process_id: int) -> int:
    return Path(f"/proc/{process_id}").stat().st_uid


def wait_until_healthy(server: subprocess.Popen[bytes], health_check: list[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while subprocess.run(health_check, stderr=subprocess.DEVNULL).returncode != 0:
        assert server.poll() is None, f"the server ended with status {server.returncode}"
        assert time.monotonic() < deadline, "the server did not become healthy"
        time.sleep(0.5)


def check_embedding(port: str, token_path: Path) -> None:
    """Refused without the token, 384 numbers of unit length with it."""
    url = f"http://127.0.0.1:{port}/get_embedding_vector_for_string/"
    assert ask(url, token=None)[0] == 401
    status, answer = ask(url, token=token_path.read_text().strip())
    assert status == 200, answer
    squared_length = sum(value * value for value in answer["embedding"])
    assert len(answer["embedding"]) == 384, len(answer["embedding"])
    assert abs(squared_length - 1) < 1e-3, squared_length
    print(f"an embedding of {len(answer['embedding'])} numbers, squared length {squared_length:.6f}")


def ask(url: str, *, token: str | None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps({"text": TEXT}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def measure_size(root: Path) -> int:
    """Megabytes on disk."""
    output = subprocess.run(["du", "-sxm", str(root)], check=True, capture_output=True, text=True).stdout
    return int(output.split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--base", type=Path, help="a root made earlier, instead of a new one")
    parser.add_argument("--keep", action="store_true", help="leave the roots for a look")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print("This needs root and debootstrap (apt install debootstrap).", file=sys.stderr)
        return 1
    workspace = Path(tempfile.mkdtemp(prefix="dockerfile-"))
    try:
        if options.base is None:
            make_base(workspace / "base")
        else:
            run_checked("cp", "--archive", str(options.base), str(workspace / "base"))
        prepare_base(workspace / "base")
        run = DockerfileRun(workspace, dict(pair.split("=", 1) for pair in options.build_arg))
        stage = run.carry_out(parse_dockerfile((PROJECT_DIRECTORY / "Dockerfile").read_text()))
        print(f"base {measure_size(workspace / 'base')} MB, image root {measure_size(stage.root)} MB")
        check_server(run, stage)
    finally:
        if options.keep:
            print(f"Roots are in {workspace}")
        else:
            remove(workspace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
