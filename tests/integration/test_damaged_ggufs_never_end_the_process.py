"""Model files damaged at random: whatever the check lets through may fail in the engine, but not end its process.

llama.cpp ends the process where an assertion fails, and no `except` sees it. Files that pass the check are therefore
loaded, calibrated and asked for a vector in a child process, which says what it is about to load, so that a crash
names its culprit. The damage is the same in each run. What each refusal says is the concern of the check's own tests.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from embeddings_data_models import Truncation
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.errors import ModelUnusable, ServiceError
from llama_embeddings.inference.batcher import BatcherLimits
from llama_embeddings.inference.calibration import calibrate
from llama_embeddings.inference.engine import EmbeddingEngine, EngineResult, PreparedText
from llama_embeddings.inference.llama_backend import LlamaBackend, LlamaModel
from tests.tiny_models import ARCHITECTURES, write_tiny_model

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
SHAPE: dict[str, Any] = {"n_dims": 32, "n_feed_forward": 64, "context_length": 64}
# Wide enough for blocks of 256 numbers.
WIDE_SHAPE: dict[str, Any] = {"n_dims": 256, "n_feed_forward": 256, "n_heads": 2, "n_blocks": 1, "context_length": 64}
RETYPED = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_norm.weight", "token_embd_norm.weight")
TEXT = "the cat sat on the mat, 42 times! So cold."
LIMITS = BatcherLimits(
    n_workers=1,
    n_threads_per_worker=1,
    token_budget=192,
    n_threads_for_lone_text=1,
    max_texts_in_flight=16,
    max_queued_tokens=100_000,
)
MODELS = [(architecture, "mean") for architecture in ARCHITECTURES] + [
    ("bert", "rank"),
    ("modern-bert", "rank"),
    ("qwen3", "rank"),
]
ODD_NUMBERS = (0, 1, 2, 3, 5, 7, 8, 16, 33, 48, 255, 513, 65_535, 2**20, 2**29 + 64, 2**31 - 1, 2**31, 2**32 - 1)
HUGE_NUMBERS = (0, 2**16, 2**31, 2**32, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD_FLOATS = (0.0, -1.0, 1e-38, 1e-30, 1e38, -1e38, float("inf"), float("nan"))
N_PER_KIND = 4
MAX_CRASHES_LISTED = 4


# Places in a file


@dataclass(frozen=True)
class Anatomy:
    """Where things lie in a sound file, as offsets in bytes."""

    content: bytes
    numbers: tuple[int, ...]
    """Settings of four bytes that are whole numbers."""
    floats: tuple[int, ...]
    array_lengths: tuple[int, ...]
    array_elements: tuple[int, ...]
    """Numbers of four bytes in arrays, a few of each."""
    strings: tuple[tuple[int, int], ...]
    """Offsets and lengths of texts, in arrays or not."""
    tensors: tuple[int, ...]
    """Of each tensor the number of its dimensions; they, the type (4 bytes) and the offset (8 bytes) follow."""
    start_of_data: int


def dissect(path: Path) -> Anatomy:
    reader = gguf.GGUFReader(path)
    numbers, floats, lengths, elements = [list[int]() for _ in range(4)]
    strings: list[tuple[int, int]] = []
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        starts = np.cumsum([field.offset, *(part.nbytes for part in field.parts)])
        kind = field.types[-1]
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            lengths.append(int(starts[4]))  # behind the key's length and name, the type and the elements' type
        elif kind == gguf.GGUFValueType.UINT32:
            numbers.append(int(starts[field.data[0]]))
        elif kind == gguf.GGUFValueType.FLOAT32:
            floats.append(int(starts[field.data[0]]))
        if kind == gguf.GGUFValueType.STRING:
            strings += [(int(starts[index]), len(field.parts[index])) for index in field.data]
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            elements += [int(starts[index]) for index in field.data[:8]]
    tensors = [tensor.field.offset + 8 + len(tensor.name.encode()) for tensor in reader.tensors]
    return Anatomy(
        path.read_bytes(),
        numbers=tuple(numbers),
        floats=tuple(floats),
        array_lengths=tuple(lengths),
        array_elements=tuple(elements),
        strings=tuple(strings),
        tensors=tuple(tensors),
        start_of_data=int(reader.data_offset),
    )


# Kinds of damage


def cut(whole: Anatomy, source: random.Random) -> bytearray:
    """Anywhere, and often in the part that describes the rest."""
    end = source.choice((whole.start_of_data, len(whole.content)))
    return bytearray(whole.content[: source.randrange(end)])


def flip_in_head(whole: Anatomy, source: random.Random) -> bytearray:
    """One to three bits before the data."""
    return flip(whole, source, 0, whole.start_of_data, source.randint(1, 3))


def flip_in_settings(whole: Anatomy, source: random.Random) -> bytearray:
    """Before the vocabulary, which takes most of the head."""
    return flip(whole, source, 0, whole.content.index(b"tokenizer.ggml.tokens"), 1)


def flip_in_tensor_entries(whole: Anatomy, source: random.Random) -> bytearray:
    return flip(whole, source, whole.tensors[0], whole.start_of_data, 1)


def flip_in_data(whole: Anatomy, source: random.Random) -> bytearray:
    """One, some or many: weights become huge, infinite or no numbers."""
    return flip(whole, source, whole.start_of_data, len(whole.content), source.choice((1, 30, 2_000)))


def flip(whole: Anatomy, source: random.Random, start: int, end: int, count: int) -> bytearray:
    damaged = bytearray(whole.content)
    for _ in range(count):
        damaged[source.randrange(start, end)] ^= 1 << source.randrange(8)
    return damaged


def swap_numbers(whole: Anatomy, source: random.Random) -> bytearray:
    """Of two settings."""
    one, other = source.sample(whole.numbers, 2)
    damaged = bytearray(whole.content)
    damaged[one : one + 4], damaged[other : other + 4] = damaged[other : other + 4], damaged[one : one + 4]
    return damaged


def put_odd_number(whole: Anatomy, source: random.Random) -> bytearray:
    return put(whole, source.choice(whole.numbers), "I", source.choice(ODD_NUMBERS))


def put_odd_float(whole: Anatomy, source: random.Random) -> bytearray:
    return put(whole, source.choice(whole.floats), "f", source.choice(ODD_FLOATS))


def put_huge_count(whole: Anatomy, source: random.Random) -> bytearray:
    """Of tensors, of keys, of elements, or of bytes in a text."""
    starts_of_strings = [start - 8 for start, _ in whole.strings]
    place = source.choice((8, 16, source.choice(whole.array_lengths), source.choice(starts_of_strings)))
    return put(whole, place, "Q", source.choice(HUGE_NUMBERS))


def put_odd_element(whole: Anatomy, source: random.Random) -> bytearray:
    """Into the types or scores of tokens."""
    return put(whole, source.choice(whole.array_elements), "I", source.choice(ODD_NUMBERS))


def put_noise_into_text(whole: Anatomy, source: random.Random) -> bytearray:
    """Bytes that are no UTF-8, in any text."""
    start, length = source.choice([place for place in whole.strings if place[1]])
    damaged = bytearray(whole.content)
    damaged[start : start + length] = bytes(source.choices((0x00, 0x0A, 0x80, 0xC3, 0xE2, 0xFF), k=length))
    return damaged


def put_tensor_type(whole: Anatomy, source: random.Random) -> bytearray:
    """Another type of numbers, which most often needs fewer bytes, so that the tensor still fits."""
    start = find_dimensions(whole, source)
    return put(whole, start[-1], "I", source.choice([int(type_) for type_ in gguf.GGMLQuantizationType]))


def put_dimension(whole: Anatomy, source: random.Random) -> bytearray:
    """Smaller than it was or huge."""
    place = source.choice(find_dimensions(whole, source)[:-1])
    return put(whole, place, "Q", source.choice((*range(5), 16, 31, 32, 33, *HUGE_NUMBERS)))


def find_dimensions(whole: Anatomy, source: random.Random) -> list[int]:
    """Places of one tensor's dimensions, and the place of its type behind them."""
    start = source.choice(whole.tensors)
    (count,) = struct.unpack_from("<I", whole.content, start)
    return [start + 4 + 8 * number for number in range(count + 1)]


def put(whole: Anatomy, place: int, format_: str, value: float) -> bytearray:
    damaged = bytearray(whole.content)
    struct.pack_into(f"<{format_}", damaged, place, value)
    return damaged


KINDS: tuple[Callable[[Anatomy, random.Random], bytearray], ...] = (
    cut,
    flip_in_head,
    flip_in_settings,
    flip_in_tensor_entries,
    flip_in_data,
    swap_numbers,
    put_odd_number,
    put_odd_float,
    put_huge_count,
    put_odd_element,
    put_noise_into_text,
    put_tensor_type,
    put_dimension,
)


# The tests


@pytest.mark.parametrize(("architecture", "pooling"), MODELS)
def test_damaged_model_is_refused_or_fails_without_ending_the_process(
    architecture: str, pooling: str, tmp_path: Path
) -> None:
    """52 files of each model; what passes the check answers with a vector or with one of our errors."""
    whole = dissect(write_tiny_model(tmp_path / "sound.gguf", architecture, pooling, **SHAPE))
    survivors = [path for path in write_damaged(whole, tmp_path, f"{architecture} {pooling}") if passes(path)]
    assert 0 < len(survivors) < N_PER_KIND * len(KINDS)
    assert_no_process_ended(survivors)


def assert_no_process_ended(survivors: Sequence[Path]) -> None:
    outcomes = run_in_child_processes(survivors)
    unexpected = {name: outcome for name, outcome in outcomes.items() if outcome.startswith(("ended", "unexpected"))}
    assert not unexpected
    assert len(outcomes) == len(survivors)


@pytest.mark.parametrize(("architecture", "pooling"), [("bert", "mean"), ("qwen3", "last")])
def test_tensors_of_every_type_are_refused_or_computed_with(architecture: str, pooling: str, tmp_path: Path) -> None:
    """The engine computes with some types of numbers in matrices, with fewer in tables, and with one in norms."""
    whole = dissect(write_tiny_model(tmp_path / "sound.gguf", architecture, pooling, **WIDE_SHAPE))
    types = [int(type_) for type_ in gguf.GGMLQuantizationType]
    survivors = [path for type_ in types for path in write_with_type(whole, tmp_path, type_) if passes(path)]
    assert_no_process_ended(survivors)


def write_with_type(whole: Anatomy, directory: Path, type_: int) -> Iterator[Path]:
    """A file for each of a few tensors that has the type instead of its own; the others lie where they then belong."""
    for start in whole.tensors:
        name = whole.content[whole.content.rindex(b"\0", 0, start) + 1 : start].decode()
        if name in RETYPED:
            path = directory / f"{name}-{type_}.gguf"
            path.write_bytes(change_type(whole, start, type_))
            yield path


def change_type(whole: Anatomy, changed: int, type_: int) -> bytes:
    """The engine wants each tensor right behind the one before."""
    head, data = bytearray(whole.content[: whole.start_of_data]), bytearray()
    for start in whole.tensors:
        (n_dimensions,) = struct.unpack_from("<I", head, start)
        *shape, own_type, offset = struct.unpack_from(f"<{n_dimensions}QIQ", head, start + 4)
        new_type = type_ if start == changed else own_type
        struct.pack_into("<IQ", head, start + 4 + 8 * n_dimensions, new_type, len(data))
        block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(new_type)]
        n_bytes = -(-math.prod(shape) // block_size) * type_size
        numbers = whole.content[whole.start_of_data + offset :][:n_bytes]
        data += numbers.ljust(-(-n_bytes // 32) * 32, b"\0")
    return bytes(head + data)


def write_damaged(whole: Anatomy, directory: Path, seed: str) -> Iterator[Path]:
    for kind in KINDS:
        for number in range(N_PER_KIND):
            path = directory / f"{kind.__name__}-{number}.gguf"
            path.write_bytes(kind(whole, random.Random(f"{seed} {path.name}")))
            yield path


def passes(path: Path) -> bool:
    try:
        check_gguf(path)
    except ModelUnusable:
        path.unlink()
        return False
    return True


def run_in_child_processes(paths: Sequence[Path]) -> dict[str, str]:
    """What became of each file, by its name. Where one ends its process, another goes on behind it."""
    outcomes: dict[str, str] = {}
    for _ in range(MAX_CRASHES_LISTED):
        left = [path for path in paths if path.name not in outcomes]
        process = subprocess.run(
            [sys.executable, "-m", "tests.integration.test_damaged_ggufs_never_end_the_process", *map(str, left)],
            cwd=PROJECT_DIRECTORY,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = [line.partition("\t") for line in process.stdout.splitlines()]
        outcomes |= {name: outcome for name, _, outcome in lines}
        if process.returncode == 0:
            break
        culprit = lines[-1][0] if lines else "before the first file"
        outcomes[culprit] = f"ended with {process.returncode}: {process.stderr[-160:].strip()}"
    return outcomes


# In the child process


def try_model(backend: LlamaBackend, path: Path) -> str:
    """ "embedded", or the name of our error."""
    try:
        model = backend.load(path, name=path.stem, digest="0", max_window=512, pooling=None)
        calibrate_briefly(model)
        engine = EmbeddingEngine(model, LIMITS)
        try:
            return asyncio.run(embed(engine))
        finally:
            engine.close()
    except ServiceError as error:
        return type(error).__name__
    except Exception as error:  # noqa: BLE001 the parent names it with its file
        return f"unexpected {type(error).__name__}: {error}"


def calibrate_briefly(model: LlamaModel) -> None:
    info = model.info
    calibrate(model.open_context, n_vocabulary=info.n_vocabulary, n_cores=1, seconds=0.0, window=info.window)


async def embed(engine: EmbeddingEngine) -> str:
    [prepared] = await engine.prepare([TEXT], Truncation.RIGHT)
    if not isinstance(prepared, PreparedText):
        return type(prepared).__name__
    [result] = await engine.embed([prepared])
    if not isinstance(result, EngineResult):
        return type(result).__name__
    return "embedded" if np.isfinite(result.vector).all() else "unexpected vector that is not finite"


def main() -> None:
    backend = LlamaBackend()
    for path in map(Path, sys.argv[1:]):
        print(path.name, end="\t", flush=True)
        print(" ".join(try_model(backend, path).split()), flush=True)


if __name__ == "__main__":
    main()
