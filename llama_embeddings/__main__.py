"""`python -m llama_embeddings COMMAND`: work on the store without, or beside, a running server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llama_embeddings.commands import backup, import_embeddings, ingest

# Each has `add_parser(subparsers)`, which sets `run`: a function of the parsed arguments that returns the exit code.
COMMANDS = (backup, import_embeddings, ingest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m llama_embeddings", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    code: int = parsed.run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
