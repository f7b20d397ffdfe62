"""Who may call, who may not, and on which addresses the server refuses to listen."""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_embeddings.errors import ConfigurationError
from llama_embeddings.settings import Settings, load_settings
from llama_embeddings_server import bind
from tests.serving import RunningApplication, run_application, run_until_it_ends, start_server

TOKEN = "a-token-for-tests-only-1234"
OPEN_PATHS = {"/", "/health", "/openapi.json"}
EMBED = "/get_embedding_vector_for_string/"


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[RunningApplication]:
    """The application with a token."""
    async with run_application(tmp_path, security_token=TOKEN) as application:
        yield application


def walk_routes(routes: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route, also of included routers; mounts under /static hold files only."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from walk_routes(included.routes)
        else:
            methods = getattr(route, "methods", None) or {"GET"}
            yield from ((method, route.path) for method in methods - {"HEAD"})


def make_settings(directory: Path, **overrides: Any) -> Settings:
    env_file = directory / ".env"
    env_file.touch()
    return load_settings(env_file, **overrides)


def make_path(template: str) -> str:
    return template.replace("{model:path}", "fake-model")


# In this process


async def test_every_route_but_the_open_ones_asks_for_the_token(guarded: RunningApplication) -> None:
    """Without a token: 401 with WWW-Authenticate, before anything else about the request is looked at."""
    routes = set(walk_routes(guarded.app.routes))
    described = (await guarded.client.get("/openapi.json")).json()["paths"]
    assert set(described) <= {path.replace(":path", "") for _, path in routes}
    guarded_routes = {
        (method, path)
        for method, path in routes
        if (path not in OPEN_PATHS or method != "GET") and "/static" not in path
    }
    assert ("POST", "/") in guarded_routes
    assert len(guarded_routes) >= 17
    for method, path in guarded_routes:
        response = await guarded.client.request(method, make_path(path))
        assert response.status_code == 401, (method, path)
        assert response.headers["www-authenticate"] == "Bearer"
        assert "asks for a token" in response.text


async def test_open_paths_answer_without_a_token(guarded: RunningApplication) -> None:
    """Health, and the page that lets people enter their token."""
    for path in (*OPEN_PATHS, "/static/swagger.js", "/static/swagger-ui/swagger-ui-bundle.js"):
        assert (await guarded.client.get(path)).status_code == 200, path


@pytest.mark.parametrize(
    "sent",
    [
        {"headers": {"Authorization": f"Bearer {TOKEN}"}},
        {"headers": {"Authorization": f"bearer {TOKEN}"}},
        {"params": {"token": TOKEN}},
    ],
)
async def test_right_token_is_taken_as_bearer_and_as_query_parameter(
    sent: dict[str, Any], guarded: RunningApplication
) -> None:
    """Both ways, on every kind of method."""
    assert (await guarded.client.post(EMBED, json={"text": "let me in"}, **sent)).status_code == 200
    assert (await guarded.client.get("/get_all_stored_strings/", **sent)).json() == {"strings": ["let me in"]}


@pytest.mark.parametrize(
    "sent",
    [
        {"headers": {"Authorization": "Bearer wrong"}},
        {"headers": {"Authorization": f"Bearer {TOKEN}x"}},
        {"headers": {"Authorization": f"Bearer {TOKEN[:-1]}"}},
        {"headers": {"Authorization": f"Basic {TOKEN}"}},
        {"headers": {"Authorization": TOKEN}},
        {"headers": {"Authorization": b"Bearer \xff\xfe"}},
        {"headers": {"Authorization": "Bearer "}},
        {"params": {"token": ""}},
        {"params": {"token": "wrong"}},
        {"params": {"token": "wr\ud800ng".encode("utf-8", "surrogatepass")}},
        {"params": {"security_token": TOKEN}},
    ],
)
async def test_anything_else_is_refused(sent: dict[str, Any], guarded: RunningApplication) -> None:
    """With 401, and nothing is computed or stored."""
    response = await guarded.client.post(EMBED, json={"text": "let me in"}, **sent)
    assert response.status_code == 401
    assert TOKEN not in response.text
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert (await guarded.client.get("/get_all_stored_strings/", headers=right)).json() == {"strings": []}


async def test_token_is_never_logged(guarded: RunningApplication, caplog: pytest.LogCaptureFixture) -> None:
    """Neither from the query nor from the header, right or wrong."""
    caplog.set_level(logging.DEBUG)
    await guarded.client.post(EMBED, json={"text": "hello"}, params={"token": TOKEN})
    await guarded.client.post(EMBED, json={"text": "hello"}, params={"token": "wrong-token"})
    await guarded.client.get("/ready", headers={"Authorization": f"Bearer {TOKEN}"})
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any(EMBED in message for message in ours)
    assert not [message for message in ours if TOKEN in message or "wrong-token" in message]


# The real program


async def test_made_token_is_kept_secret_and_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made at the first start, printed once, in a file that only its owner reads; the second start prints nothing."""
    async with run_application(tmp_path, use_security_token=True) as running:
        path = tmp_path / "security_token"
        token = path.read_text().strip()
        assert len(token) >= 32
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert capsys.readouterr().out.count(token) == 1
        headers = {"Authorization": f"Bearer {token}"}
        assert (await running.client.get("/ready", headers=headers)).status_code == 200
    async with run_application(tmp_path, use_security_token=True) as running:
        assert token not in capsys.readouterr().out
        assert (await running.client.get("/ready", headers=headers)).status_code == 200
        assert (await running.client.get("/ready")).status_code == 401


def test_open_address_without_a_token_stops_the_start(tmp_path: Path) -> None:
    """One line that names the setting and the two ways out."""
    ended = run_until_it_ends(tmp_path, {"LISTEN_HOST": "0.0.0.0"})
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert "LISTEN_HOST" in line
    assert "USE_SECURITY_TOKEN" in line
    assert "ALLOW_UNAUTHENTICATED_NETWORK_ACCESS" in line
    assert not (tmp_path / "embeddings.sqlite").exists()


@pytest.mark.parametrize(
    ("settings", "status_without_token"),
    [({"ALLOW_UNAUTHENTICATED_NETWORK_ACCESS": "True"}, 200), ({"SECURITY_TOKEN": TOKEN}, 401)],
)
def test_open_address_is_served_with_a_token_or_with_permission(
    settings: dict[str, str], status_without_token: int, tmp_path: Path
) -> None:
    """On all addresses, and through them asked like on this one."""
    with start_server(tmp_path, {"LISTEN_HOST": "0.0.0.0", **settings}) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == status_without_token
        assert httpx.get(f"{url}/ready", params={"token": TOKEN}, trust_env=False).status_code == 200
        assert TOKEN not in server.output


def test_tokens_of_a_file_can_be_changed_while_the_server_runs(tmp_path: Path) -> None:
    """Added and revoked within seconds; on an address of the network no other token is needed, and none is made."""
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(f"first {TOKEN}\n")
    settings = {"LISTEN_HOST": "0.0.0.0", "SECURITY_TOKENS_FILE": str(tokens)}
    added = "another-token-for-tests-5678"
    with start_server(tmp_path, settings) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")

        def ask(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code

        assert [ask(TOKEN), ask(added)] == [200, 401]
        tokens.write_text(f"second {added}\n")
        deadline = time.monotonic() + 10
        while [ask(TOKEN), ask(added)] != [401, 200]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert TOKEN not in server.output
        assert added not in server.output
        assert "GET /v1/models 200" in server.output
        assert " by first\n" in server.output
    assert not (tmp_path / "security_token").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECURITY_TOKENS_FILE", "/no/such/file"),
        ("TRUSTED_PROXIES", "proxy.example"),
        ("HF_ENDPOINT", "http://hub.example"),
        ("LLAMA_EMBEDDING_SERVER_LISTEN_PORT", "eighty"),
        ("DEFAULT_MODEL_NAME", "no-such-model"),
        ("DATABASE_URL", "nonsense"),
        ("SECURITY_TOKEN_PATH", "/proc/no/such/place"),
    ],
)
def test_bad_setting_stops_the_start_with_one_line_that_names_it(name: str, value: str, tmp_path: Path) -> None:
    """Exit code 1, no traceback, whether the fault shows while reading the settings or while using them."""
    needed = {"USE_SECURITY_TOKEN": "True"} if name == "SECURITY_TOKEN_PATH" else {}
    ended = run_until_it_ends(tmp_path, {name: value, **needed})
    assert ended.returncode == 1, ended.stdout[-2000:]
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert name in ended.stderr
    assert "Traceback" not in ended.stdout


def test_port_in_use_stops_the_start_with_one_line(tmp_path: Path) -> None:
    """Before a model is loaded."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        ended = run_until_it_ends(tmp_path, {"LLAMA_EMBEDDING_SERVER_LISTEN_PORT": port})
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert "LLAMA_EMBEDDING_SERVER_LISTEN_PORT" in line
    assert port in line
    assert not (tmp_path / "embeddings.sqlite").exists()


def test_port_is_taken_from_the_moment_it_is_bound(tmp_path: Path) -> None:
    """A second server gives way while the first one still loads its model, not only once it answers."""
    first = bind(make_settings(tmp_path, listen_port=0))
    with first, pytest.raises(ConfigurationError, match="LLAMA_EMBEDDING_SERVER_LISTEN_PORT"):
        bind(make_settings(tmp_path, listen_port=first.getsockname()[1])).close()
