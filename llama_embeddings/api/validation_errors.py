"""What pydantic says of a request that does not fit, in one sentence that people can read.

A field that takes several types gets one complaint per type. Only that of the type which came furthest is kept: of
`["a", 5]` where strings or lists of strings or of numbers are taken, that the second is no string. Repeats nothing of
what the caller sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_embeddings.errors import InvalidInput

# Named one by one; those beyond are counted.
MAX_DESCRIBED_PROBLEMS = 10
# How pydantic names the variants of a type in a place. Fields of requests are words of small letters.
_VARIANT = re.compile(r"str|int|float|bool|is-instance|(list|dict|set|tuple|nullable|constrained|function)\b.*|[A-Z].*")


@dataclass(frozen=True, slots=True)
class _Problem:
    """`path` is the place without the variants of types that were tried on the way, which `variant` has."""

    path: tuple[str | int, ...]
    variant: tuple[str, ...]
    message: str

    @property
    def progress(self) -> tuple[int, ...]:
        """Positions passed before it came to this."""
        return tuple(part for part in self.path if isinstance(part, int))

    @property
    def place(self) -> str:
        joined = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return joined.removeprefix(".")


def describe_validation(problems: Sequence[Any]) -> InvalidInput:
    """One sentence for all problems, or for the first of very many; the first one's place."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return InvalidInput(f"The body is not valid JSON: {reason} at character {first['loc'][-1]}.")
    by_field: dict[str, list[_Problem]] = {}
    for problem in map(_read, problems):
        by_field.setdefault(str(problem.path[0]), []).append(problem)
    kept = [problem for group in by_field.values() for problem in _keep_furthest(group)]
    index = next(iter(kept[0].progress), None)
    field = next((part for part in kept[0].path if isinstance(part, str)), None)
    is_whole_body = kept[0].path == (first["loc"][0],)
    sentences = [f"{problem.place}: {problem.message}" for problem in kept[:MAX_DESCRIBED_PROBLEMS]]
    if len(kept) > MAX_DESCRIBED_PROBLEMS:
        sentences.append(f"and {len(kept) - MAX_DESCRIBED_PROBLEMS} problems more")
    return InvalidInput("; ".join(sentences), field=None if is_whole_body else field, index=index)


def _read(problem: Any) -> _Problem:
    root, *parts = problem["loc"]
    variant = tuple(part for part in parts if isinstance(part, str) and _VARIANT.fullmatch(part))
    path = tuple(part for part in parts if part not in variant)
    return _Problem(path or (root,), variant, problem["msg"])


def _keep_furthest(problems: Sequence[_Problem]) -> list[_Problem]:
    """Of the variants of one field, the one whose first problem is last; all of them, in one, if none came anywhere."""
    by_variant: dict[tuple[str, ...], list[_Problem]] = {}
    for problem in problems:
        by_variant.setdefault(problem.variant, []).append(problem)
    furthest = max(by_variant.values(), key=lambda group: min(problem.progress for problem in group))
    if len(by_variant) == 1 or min(problem.progress for problem in furthest):
        return furthest[:1] if len(by_variant) > 1 else furthest
    messages = list(dict.fromkeys(group[0].message for group in by_variant.values()))
    rest = [message.removeprefix("Input should be ") for message in messages[1:]]
    return [_Problem(problems[0].path, (), " or ".join([messages[0], *rest]))]
