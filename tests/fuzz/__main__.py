"""`make fuzz`, or `python -m tests.fuzz --minutes 10 --examples 20000`: prints what was tried and what came of it.

Exit code 1 if anything failed. Nothing is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

from tests.fuzz.api import ApiFigures, fuzz_api, start_fuzzed_server
from tests.fuzz.properties import PROPERTIES, try_property

EXAMPLES_PER_ROUND = 40


def run_api(minutes: float, seed: int) -> ApiFigures:
    with tempfile.TemporaryDirectory() as directory, start_fuzzed_server(Path(directory)) as server:
        return fuzz_api(server, seconds=60 * minutes, examples_per_round=EXAMPLES_PER_ROUND, first_seed=seed)


def print_api(figures: ApiFigures, minutes: float) -> None:
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(figures.statuses.items()))
    (first_bytes, first_descriptors), (last_bytes, last_descriptors) = figures.sizes[0], figures.sizes[-1]
    report(f"requests to {figures.n_operations} operations in {minutes:g} minutes", f"{figures.n_requests:,}")
    report("replies by status", statuses)
    report("longest reply", f"{figures.longest_seconds:.2f} s")
    report("resident after the first round, at the end", f"{first_bytes / 1e6:.0f} MB, {last_bytes / 1e6:.0f} MB")
    report("descriptors after the first round, at the end", f"{first_descriptors}, {last_descriptors}")
    for what, example in figures.failures.items():
        report(f"**failed: {what}**", example)


def run_properties(n_examples: int) -> bool:
    """Whether all of them hold."""
    all_hold = True
    for prop in PROPERTIES:
        try:
            outcome = try_property(prop, n_examples=n_examples)
        except Exception:  # noqa: BLE001 - whatever was found is reported, and the others tried
            all_hold = False
            report(f"**failed: {prop.name}**", traceback.format_exc()[-2000:])
        else:
            longest = 1000 * outcome.longest_seconds
            report(prop.name, f"{outcome.n_examples:,} in {outcome.seconds:.0f} s, longest {longest:.0f} ms")
    return all_hold


def report(what: str, found: str) -> None:
    print(f"| {what} | {found} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for the API")
    parser.add_argument("--examples", type=int, default=20_000, help="for each property; fewer for slow ones")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| what | found |\n|---|---|")
    figures = run_api(arguments.minutes, arguments.seed)
    print_api(figures, arguments.minutes)
    return 0 if run_properties(arguments.examples) and not figures.failures else 1


if __name__ == "__main__":
    sys.exit(main())
