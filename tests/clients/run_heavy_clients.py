"""Starts servers and lets the heavy clients talk to them: `python -m tests.clients.run_heavy_clients`.

The server runs in this environment, the Python clients in CLIENTS_PYTHON's, the Node client in NODE_DIRECTORY. All of
them must be there; `make test-clients` sees to it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.checks import ALIAS, MODEL, TEXTS, TOKEN, WRONG_TOKEN, check_same, get_native_vector
from tests.serving import start_server

DIRECTORY = Path(__file__).resolve().parent
SETTINGS = {"SECURITY_TOKEN": TOKEN, "MODEL_ALIASES": f"{ALIAS}={MODEL}"}
# tiktoken's name for its table cl100k_base: the SHA-1 of the address that it comes from.
CL100K_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
NO_CALLS_HOME = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
}
PYTEST_OPTIONS = ("-q", "--noconftest", "-c", str(DIRECTORY / "pytest.ini"), "-p", "no:cacheprovider")


def main() -> int:
    """The exit code of the Python clients' tests; an assertion fails where the Node client gets something else."""
    python, node = Path(os.environ["CLIENTS_PYTHON"]), Path(os.environ["NODE_DIRECTORY"])
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as with_table:
        cl100k = find_cl100k_table(python)
        table = {"CL100K_TABLE_PATH": str(cl100k)}
        with start_server(Path(plain), SETTINGS) as first, start_server(Path(with_table), SETTINGS | table) as second:
            check_node_client(first.url, node)
            variables = NO_CALLS_HOME | {
                "SERVER_URL": first.url,
                "SERVER_WITH_TABLE_URL": second.url,
                "TIKTOKEN_CACHE_DIR": str(cl100k.parent),
                "PYTHONPATH": str(DIRECTORY),
            }
            command = [python, "-m", "pytest", *PYTEST_OPTIONS, *sys.argv[1:], DIRECTORY / "heavy_clients.py"]
            return subprocess.run(command, env=os.environ | variables, timeout=600, check=False).returncode


def find_cl100k_table(python: Path) -> Path:
    """The table as one of the clients' packages carries it, so that nothing is downloaded."""
    packages = python.parent.parent / "lib"
    [found] = packages.glob(f"python3.*/site-packages/litellm/litellm_core_utils/tokenizers/{CL100K_NAME}")
    return found


def check_node_client(url: str, node: Path) -> None:
    """The Node client asks for base64 and reads it as floats; its errors carry status, code and request id."""
    program = shutil.copy(DIRECTORY / "openai_node_client.mjs", node)
    command = ["node", program, url, TOKEN, WRONG_TOKEN, MODEL, *TEXTS]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True).stdout)
    expected = [get_native_vector(url, text) for text in TEXTS]
    check_same(found["one"], expected[0])
    check_same(found["floats"], expected[0])
    for got, vector in zip(found["many"], expected, strict=True):
        check_same(got, vector)
    assert found["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert {MODEL, ALIAS} <= set(found["models"])
    for name, status, part in (
        ("overLong", 400, "602 tokens"),
        ("wrongModel", 404, "no-such-model"),
        ("wrongToken", 401, "token"),
    ):
        assert found[name]["status"] == status
        assert part in found[name]["message"]
        assert found[name]["requestId"]
    print("openai for Node: as expected")


if __name__ == "__main__":
    sys.exit(main())
