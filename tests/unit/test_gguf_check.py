"""The check of model files: what is sound passes, what would end the engine's process does not."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.errors import ModelUnusable
from tests.tiny_models import (
    ARCHITECTURES,
    ENCODERS,
    POOLINGS,
    RANKING_ARCHITECTURES,
    describe_sentence_pieces,
    write_tiny_model,
)

PROJECT_ROOT = Path(__file__).parent.parent.parent
COMBINATIONS = [
    (architecture, pooling)
    for architecture in ARCHITECTURES
    for pooling in POOLINGS
    if pooling != "rank" or architecture in RANKING_ARCHITECTURES
]

LISTS_OF_TOKENS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
TOKENISE_EVERY_CHARACTER = """
import sys
from pathlib import Path
from llama_embeddings.inference.llama_backend import LlamaBackend

model = LlamaBackend().load(Path(sys.argv[1]), name="tiny", digest="0", max_window=512, pooling=None)
characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
for start in range(0, len(characters), 4096):
    model.tokenize("".join(characters[start : start + 4096]))
"""


def embed_in_child_process(paths: Sequence[Path]) -> list[list[float] | None]:
    """What the engine makes of each file; fails if the engine ends the process."""
    command = [sys.executable, "-m", "tests.tiny_models", *map(str, paths)]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    outcome = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert outcome.returncode == 0, f"the engine ended on {paths[len(results)].name}: {outcome.stderr[-300:]}"
    return results


def write_bytes(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small sound file."""
    path = tmp_path_factory.mktemp("sound") / "model.gguf"
    return write_tiny_model(path, "bert", "mean", n_blocks=1, context_length=16).read_bytes()


# What is sound


@pytest.mark.parametrize(("architecture", "pooling"), COMBINATIONS)
def test_sound_model_of_every_kind_passes_and_is_summed_up(path: Path, architecture: str, pooling: str) -> None:
    """The summary repeats what was written."""
    summary = check_gguf(write_tiny_model(path, architecture, pooling, name="a tiny one", context_length=96))
    assert (summary.architecture, summary.pooling, summary.name) == (architecture, pooling, "a tiny one")
    assert (summary.n_dims, summary.n_heads, summary.context_length) == (64, 4, 96)
    assert summary.n_blocks == (6 if architecture == "gemma-embedding" else 2)
    assert summary.causal is (False if architecture in ENCODERS else None)
    assert summary.has_sep is (architecture in ENCODERS)
    assert summary.add_eos is (None if architecture in ENCODERS else True)
    assert summary.size_in_bytes == path.stat().st_size


def test_sound_models_load_and_give_finite_vectors_in_the_engine(tmp_path: Path) -> None:
    """What the check lets through as sound, the engine runs: every architecture with every pooling."""
    paths = [write_tiny_model(tmp_path / f"{kind}-{pool}.gguf", kind, pool) for kind, pool in COMBINATIONS]
    for path, vector in zip(paths, embed_in_child_process(paths), strict=True):
        assert vector, f"{path.name} does not load"
        assert all(map(math.isfinite, vector)), path.name


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_file_type_is_read_from_the_tensors(path: Path, quantisation: str) -> None:
    """The commonest type counts, not what the metadata states."""
    stated = {"general.file_type": int(gguf.LlamaFileType.MOSTLY_Q6_K)}
    write_tiny_model(path, "llama", quantisation=quantisation, metadata=stated)
    assert check_gguf(path).file_type == quantisation


def test_missing_settings_are_none_in_the_summary(path: Path) -> None:
    """Nothing is made up for what a file does not say."""
    summary = check_gguf(write_tiny_model(path, "qwen3", None, metadata={"general.name": None}))
    assert (summary.pooling, summary.name, summary.licence, summary.causal) == (None, None, None, None)
    assert summary.max_seq_length is None
    assert summary.has_bos is False


def test_number_of_parameters_is_the_sum_of_all_tensors(path: Path) -> None:
    """Held against the reader of the gguf package."""
    write_tiny_model(path, "nomic-bert", quantisation="Q8_0")
    expected = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
    assert check_gguf(path).n_parameters == expected


def test_heads_may_be_given_for_each_block(path: Path) -> None:
    """A list with one number for each block is as good as one number."""
    write_tiny_model(path, "llama", metadata={"llama.attention.head_count": [4, 4]})
    assert check_gguf(path).n_heads == 4


def test_list_of_architectures_can_be_narrowed(path: Path) -> None:
    """A caller decides what it takes; the message names what was found."""
    write_tiny_model(path, "llama")
    with pytest.raises(ModelUnusable, match="'llama'"):
        check_gguf(path, architectures=frozenset({"bert"}))


# Damaged files


def test_file_cut_anywhere_is_refused(path: Path, sound: bytes) -> None:
    """At every length of the description and at many of the data, down to the last byte."""
    start_of_data = int(gguf.GGUFReader(write_bytes(path, sound)).data_offset)
    last_byte = find_end_of_tensors(path)
    for length in [*range(0, start_of_data, 7), *range(start_of_data, last_byte, 4_099), last_byte - 1]:
        with pytest.raises(ModelUnusable, match=r"model\.gguf"):
            check_gguf(write_bytes(path, sound[:length]))


def find_end_of_tensors(path: Path) -> int:
    return max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@pytest.mark.parametrize("architecture", ["bert", "modern-bert", "qwen3"])
def test_changed_bytes_end_in_a_refusal_or_in_a_file_the_engine_survives(tmp_path: Path, architecture: str) -> None:
    """No other exception ever, and whatever passes may fail in the engine, but not end its process."""
    source = tmp_path / "source.gguf"
    content = write_tiny_model(source, architecture, n_dims=32, context_length=32).read_bytes()
    start_of_data = int(gguf.GGUFReader(source).data_offset)
    settings = content.index(b"tokenizer.ggml.tokens")
    generator = random.Random(11)
    survivors: list[Path] = []
    for number in range(120):
        changed = bytearray(content)
        position = generator.randrange(settings if number % 2 else start_of_data)
        changed[position] ^= 1 << generator.randrange(8)
        path = write_bytes(tmp_path / f"changed{number}.gguf", changed)
        if passes(path):
            survivors.append(path)
    assert survivors
    embed_in_child_process(survivors)


def passes(path: Path) -> bool:
    try:
        check_gguf(path)
    except ModelUnusable:
        return False
    return True


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"GG", "ends inside the header"),
        (b"PK\x03\x04 not a model at all", "not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 1, 1), "version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 1, 1), "version 4"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**64 - 1, 1), "number of tensors is 18446744073709551615"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**40), "number of keys is 1099511627776"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1), "number of tensors is 0"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**63), "length of the name of a key"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 1, 1, b"k", 13), "unknown type 13"),
        (struct.pack("<4sIQQQ1sIB", b"GGUF", 3, 1, 1, 1, b"k", 7, 2), "true or false"),
        (struct.pack("<4sIQQQ1sIQ", b"GGUF", 3, 1, 1, 1, b"k", 8, 2**62), "length of the value of 'k'"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 1, 1, 1, b"k", 9, 9, 1), "unsupported type 9"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 1, 1, 1, b"k", 9, 10, 2**61), "length of the value of 'k'"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 1, 1, 1, b"k", 9, 10, 20), "ends inside the value of 'k'"),
        (struct.pack("<4sIQQQ1sIIQQ", b"GGUF", 3, 1, 1, 1, b"k", 9, 8, 1, 999), "length of a string"),
        (struct.pack("<4sIQQQ2s", b"GGUF", 3, 1, 1, 2, b"\xff\xfe"), "not UTF-8"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 0), "no name|ends inside"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 0, 1), "'k' occurs twice"),
    ],
)
def test_malformed_head_is_refused_for_the_right_reason(path: Path, content: bytes, named: str) -> None:
    """Numbers that no file can have never become an allocation or a loop."""
    with pytest.raises(ModelUnusable, match=named):
        check_gguf(write_bytes(path, content))


def test_missing_file_and_directory_are_named_without_their_place(tmp_path: Path) -> None:
    """The message has the file's name and not where it lies."""
    (tmp_path / "folder.gguf").mkdir()
    for name in ("absent.gguf", "folder.gguf"):
        with pytest.raises(ModelUnusable, match=name) as caught:
            check_gguf(tmp_path / name)
        assert str(tmp_path) not in caught.value.message


# Tensors that do not fit


def change_entry(content: bytes, name: str, *, skip: int, format_: str, value: int) -> bytearray:
    """Overwrite a number in the description of a two-dimensional tensor: `skip` bytes behind its name."""
    changed = bytearray(content)
    encoded = name.encode()
    position = content.index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded) + skip
    struct.pack_into(f"<{format_}", changed, position, value)
    return changed


@pytest.mark.parametrize(
    ("skip", "format_", "value", "named"),
    [
        (0, "I", 5, "number of dimensions .* is 5"),
        (0, "I", 0, "number of dimensions .* is 0"),
        (4, "Q", 0, "a dimension .* is 0"),
        (4, "Q", 2**63, "a dimension .* is 9223372036854775808"),
        (12, "Q", 2**61, "more elements than there can be"),
        (4, "Q", 65, r"beyond the end|overlaps|shape \(65,"),
        (20, "I", 4, "unknown type 4"),
        (20, "I", 4_000_000_000, "unknown type 4000000000"),
        (24, "Q", 2**64 - 32, "beyond the end"),
        (24, "Q", 33, "not a multiple of the alignment"),
        (24, "Q", 0, "overlaps"),
    ],
)
def test_tensor_outside_its_bounds_is_refused(
    path: Path, sound: bytes, skip: int, format_: str, value: int, named: str
) -> None:
    """Dimensions, type and offset are held against the file and against the other tensors."""
    changed = change_entry(sound, "blk.0.attn_q.weight", skip=skip, format_=format_, value=value)
    with pytest.raises(ModelUnusable, match=named):
        check_gguf(write_bytes(path, changed))


def test_row_that_does_not_fit_whole_blocks_is_refused(path: Path) -> None:
    """Rows of 48 cannot be Q8_0, which has blocks of 32."""
    content = write_tiny_model(path, "bert", n_dims=48, n_blocks=1, context_length=16).read_bytes()
    changed = change_entry(content, "blk.0.attn_q.weight", skip=20, format_="I", value=8)
    with pytest.raises(ModelUnusable, match="rows of 48 elements"):
        check_gguf(write_bytes(path, changed))


def test_two_tensors_of_one_name_are_refused(path: Path, sound: bytes) -> None:
    """The engine would take one of them."""
    with pytest.raises(ModelUnusable, match=r"'blk.0.attn_q.weight' occurs twice"):
        check_gguf(write_bytes(path, sound.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")))


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**31])
def test_alignment_that_is_no_power_of_two_is_refused(path: Path, alignment: int) -> None:
    """Offsets are rounded by it."""
    write_tiny_model(path, metadata={"general.alignment": 32})
    content = bytearray(path.read_bytes())
    position = content.index(b"general.alignment") + len("general.alignment") + 4
    struct.pack_into("<I", content, position, alignment)
    with pytest.raises(ModelUnusable, match="alignment"):
        check_gguf(write_bytes(path, content))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("token_embd.weight", None),
        ("token_embd.weight", (7, 64)),
        ("position_embd.weight", (511, 64)),
        ("token_types.weight", (3, 64)),
        ("token_embd_norm.bias", None),
        ("blk.1.attn_v.weight", None),
        ("blk.1.attn_output.weight", (64, 32)),
        ("blk.0.ffn_up.weight", (64, 64)),
        ("blk.0.ffn_down.bias", (128,)),
        ("blk.1.layer_output_norm.weight", None),
    ],
)
def test_tensor_that_contradicts_the_settings_is_named(path: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """A missing tensor of a BERT, or one of another shape than the settings imply."""
    write_tiny_model(path, "bert", tensors={name: None if shape is None else np.zeros(shape, np.float32)})
    with pytest.raises(ModelUnusable, match=name):
        check_gguf(path)


# Settings that the engine does not survive


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 513),
        ("block_count", None),
        ("block_count", "two"),
        ("block_count", True),
        ("embedding_length", 0),
        ("embedding_length", 2**32 - 1),
        ("context_length", 0),
        ("attention.head_count", 0),
        ("attention.head_count", 3),
        ("attention.head_count", [4, 0]),
        ("attention.head_count_kv", 0),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 0),
        ("pooling_type", 5),
        ("pooling_type", "mean"),
        ("expert_used_count", 2),
        ("expert_count", 2),
        ("embedding_length_out", 32),
        ("nextn_predict_layers", 1),
        ("rope.freq_base", 0.0),
        ("attention.layer_norm_epsilon", math.nan),
    ],
)
def test_impossible_setting_is_refused(path: Path, architecture: str, key: str, value: Any) -> None:
    """Most of these end the engine's process at load or at the first text; the others make wrong vectors."""
    write_tiny_model(path, architecture, metadata={f"{architecture}.{key}": value})
    with pytest.raises(ModelUnusable):
        check_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("nomic-bert", {"rope.dimension_count": 7}),
        ("nomic-bert", {"rope.dimension_count": 0}),
        ("qwen3", {"rope.dimension_count": 8}),
        ("qwen2", {"attention.key_length": 8}),
        ("modern-bert", {"attention.value_length": 8}),
        ("modern-bert", {"attention.sliding_window_pattern": 1}),
        ("modern-bert", {"attention.sliding_window_pattern": [True, True]}),
        ("gemma-embedding", {"attention.sliding_window_pattern": 7}),
        ("gemma-embedding", {"dense_2_feat_out": 0, "dense_2_feat_in": 64}),
        ("gemma-embedding", {"dense_2_feat_out": 128, "dense_3_feat_in": 64}),
        ("bert", {"pooling_type": 4}),
    ],
)
def test_setting_that_only_some_architectures_die_of_is_refused(
    path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    """Each of these was seen to end the engine's process, or to hang it, or asks for a tensor that is not there."""
    write_tiny_model(path, architecture, metadata={f"{architecture}.{key}": value for key, value in settings.items()})
    with pytest.raises(ModelUnusable):
        check_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "n_blocks", "n_dims"), [("modern-bert", 1, 64), ("gemma-embedding", 5, 64), ("llama", 2, 36)]
)
def test_sizes_the_engine_cannot_compute_with_are_refused(
    path: Path, architecture: str, n_blocks: int, n_dims: int
) -> None:
    """No full block beside the windowed ones, and heads of an odd width."""
    with pytest.raises(ModelUnusable):
        check_gguf(write_tiny_model(path, architecture, n_blocks=n_blocks, n_dims=n_dims))


def test_array_pattern_with_both_kinds_of_blocks_passes(path: Path) -> None:
    """The pattern may be written out for each block."""
    pattern = {"modern-bert.attention.sliding_window_pattern": [True, False]}
    assert check_gguf(write_tiny_model(path, "modern-bert", metadata=pattern)).n_blocks == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"general.architecture": None}, "architecture"),
        ({"general.architecture": "clip"}, "'clip'"),
        ({"split.count": 3}, "several files"),
    ],
)
def test_file_that_is_no_whole_text_model_is_refused(path: Path, settings: dict[str, Any], named: str) -> None:
    """An image encoder, or one part of a model in several files."""
    write_tiny_model(path, metadata=settings)
    with pytest.raises(ModelUnusable, match=named):
        check_gguf(path)


# Tokenizers


def list_tokens(path: Path, architecture: str) -> list[bytes]:
    reader = gguf.GGUFReader(write_tiny_model(path, architecture))
    field = reader.fields["tokenizer.ggml.tokens"]
    return [bytes(field.parts[index]) for index in field.data]


@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3"])
@pytest.mark.parametrize("duplicate", [b"c", b"c\0more"])
def test_token_that_occurs_twice_is_refused(path: Path, architecture: str, duplicate: bytes) -> None:
    """The engine compares up to the first zero byte and ends the process over two that are equal."""
    tokens = list_tokens(path, architecture)
    tokens[-1] = duplicate
    write_tiny_model(path, architecture, metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(ModelUnusable, match="a token twice"):
        check_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "settings", "named"),
    [
        ("bert", {"tokens": None}, "no vocabulary"),
        ("bert", {"tokens": [1, 2, 3]}, "not an array of the expected type"),
        ("bert", {"model": None}, "its tokenizer is None"),
        ("bert", {"model": "no_vocab"}, "'no_vocab'"),
        ("bert", {"token_type": [1, 1, 1]}, "3 entries in 'token_type'"),
        ("bert", {"scores": [0.0]}, "1 entries in 'scores'"),
        ("bert", {"cls_token_id": 9_999}, "cls_token_id"),
        ("bert", {"seperator_token_id": None}, "seperator token"),
        ("bert", {"token_type_count": 0}, "token_type_count"),
        ("llama", {"bos_token_id": 330}, "bos_token_id"),
        ("llama", {"eos_token_id": 2**32 - 1}, "eos_token_id"),
        ("llama", {"model": "bert"}, "marked as a byte"),
        ("qwen3", {"merges": None}, "merges"),
        ("qwen3", {"padding_token_id": 265}, "padding_token_id"),
        ("qwen3", {"add_eos_token": 1}, "neither true nor false"),
    ],
)
def test_tokenizer_that_contradicts_itself_is_refused(
    path: Path, architecture: str, settings: dict[str, Any], named: str
) -> None:
    """Lists shorter than the vocabulary are read beyond their end, ids outside it name nothing."""
    if settings.get("tokens", ...) is None:
        write_without_vocabulary(path)
    else:
        changes = {f"tokenizer.ggml.{key}": value for key, value in settings.items()}
        write_tiny_model(path, architecture, metadata=changes)
    with pytest.raises(ModelUnusable, match=named):
        check_gguf(path)


def write_without_bytes(path: Path, missing: Collection[int], architecture: str = "llama") -> Path:
    """A sentence-piece vocabulary in which some bytes have no token."""
    vocabulary = describe_sentence_pieces()
    dropped = {f"<0x{byte:02X}>" for byte in missing}
    kept = [index for index, token in enumerate(vocabulary["tokenizer.ggml.tokens"]) if token not in dropped]
    lists = {key: [vocabulary[key][index] for index in kept] for key in LISTS_OF_TOKENS}
    return write_tiny_model(path, architecture, metadata=lists)


@pytest.mark.parametrize("architecture", ["llama", "gemma-embedding"])
@pytest.mark.parametrize("missing", [range(256), range(0x80, 256), range(0, 256, 2), [0xC3], [0x00], [0xF4]])
def test_sentence_pieces_without_a_byte_of_text_are_refused(
    path: Path, architecture: str, missing: Collection[int]
) -> None:
    """The engine ends the process over the first letter outside the vocabulary that has the byte."""
    with pytest.raises(ModelUnusable, match=r"no token, '<0x[0-9A-F]{2}>' among them"):
        check_gguf(write_without_bytes(path, missing, architecture))


def test_bytes_that_no_text_holds_need_no_token(path: Path) -> None:
    """The space is another letter in this tokenizer, and UTF-8 has no use for thirteen bytes."""
    check_gguf(write_without_bytes(path, [0x20, 0xC0, 0xC1, *range(0xF5, 256)]))
    assert all_characters_are_tokenised(path)


def all_characters_are_tokenised(path: Path) -> bool:
    """Whether a process lives that makes tokens of every character there is."""
    outcome = subprocess.run(
        [sys.executable, "-c", TOKENISE_EVERY_CHARACTER, path],
        cwd=PROJECT_ROOT,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        timeout=120,
    )
    return outcome.returncode == 0


@pytest.mark.parametrize("missing", [range(256), [0xC3]])
def test_sentence_pieces_without_a_byte_end_the_engine(path: Path, missing: Collection[int]) -> None:
    """If this no longer holds, the refusal is not needed any more."""
    assert not all_characters_are_tokenised(write_without_bytes(path, missing))


def write_without_vocabulary(path: Path) -> None:
    """The key of the vocabulary gets another name of the same length."""
    content = write_tiny_model(path, "bert").read_bytes()
    path.write_bytes(content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.absent"))
