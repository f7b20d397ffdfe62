"""Conversion of a sentence-transformers directory of the BERT family to one GGUF file.

The source is what such a directory holds: `config.json`, `model.safetensors`, `vocab.txt`, `tokenizer_config.json`,
`1_Pooling/config.json`, and, where present, `sentence_bert_config.json` and `modules.json`. Everything that would make
the engine compute something else than the original (another architecture, pooling, activation, a dense layer behind
the pooling, a tokenizer with other rules) is refused with `ModelUnusable`, which names the file and what is wrong.

Tensors are read, converted and written one at a time, so the memory needed is that of the largest one. The same source
gives the same bytes every time. Downloads nothing, and does not load the result: that is `gguf_check` and `inference`.

As a command: `python -m llama_embeddings.catalogue.conversion SOURCE TARGET --quantisation Q8_0`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType, PoolingType, TokenType
from safetensors import SafetensorError, safe_open

from llama_embeddings.errors import ModelUnusable

logger = logging.getLogger(__name__)

# Kept in F16 where the others are quantised.
SENSITIVE_MATRICES = (".attn_v.weight", ".attn_output.weight")

QUANTISATIONS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
MAX_SEQ_LENGTH_KEY = "llama_embeddings.max_seq_length"

# The engine computes the tanh form of GELU whatever the original names; the vectors differ in the fourth decimal.
ACTIVATIONS = frozenset({"gelu", "gelu_new", "gelu_pytorch_tanh"})
MODULES_WITHOUT_WEIGHTS_OF_THEIR_OWN = frozenset({"Transformer", "Pooling", "Normalize"})
WORD_START = "\u2581"
DEFAULT_SPECIAL_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}


@dataclass(frozen=True)
class BertConfiguration:
    """The sizes of a BERT model, from its `config.json`."""

    n_tokens_vocabulary: int
    n_dims: int
    n_feed_forward: int
    n_blocks: int
    n_heads: int
    context_length: int
    n_token_types: int
    layer_norm_eps: float


@dataclass(frozen=True)
class Vocabulary:
    """The WordPiece vocabulary in the engine's spelling, and the normalisation that comes before it."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    special_ids: dict[str, int]
    lower_case: bool
    strip_accents: bool


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: its name here and there, its shape (rows first), and the type it is written in."""

    source_name: str
    target_name: str
    shape: tuple[int, ...]
    quantisation: GGMLQuantizationType

    @property
    def size_in_bytes(self) -> int:
        block_size, type_size = gguf.GGML_QUANT_SIZES[self.quantisation]
        return int(np.prod(self.shape)) // block_size * type_size


def convert_sentence_transformers_to_gguf(
    source_directory: Path, target: Path, *, quantisation: str, model_name: str, licence: str | None = None
) -> None:
    """Write `target` from a sentence-transformers directory; it appears under its name only when it is complete.

    `quantisation` is a key of `QUANTISATIONS` and applies to the matrices; vectors, norms, and the position and
    token-type embeddings stay float32. `licence` is read from the model card (`README.md`) if not given.
    Raises `ModelUnusable` if the source is incomplete, inconsistent, or not of a kind the engine computes faithfully.
    """
    if quantisation not in QUANTISATIONS:
        raise ModelUnusable(f"Unknown quantisation {quantisation!r}. Known: {', '.join(QUANTISATIONS)}.")
    configuration = read_bert_configuration(source_directory)
    check_modules(source_directory)
    vocabulary = read_vocabulary(source_directory, configuration.n_tokens_vocabulary)
    with open_safetensors(source_directory / "model.safetensors") as weights, new_gguf_file(target) as writer:
        plan = plan_tensors(configuration, prefix=find_prefix(weights), quantisation=QUANTISATIONS[quantisation][0])
        check_tensors(weights, plan)
        writer.add_name(model_name)
        licence = licence or read_licence(source_directory)
        if licence:
            writer.add_license(licence)
        write_model_metadata(writer, configuration, QUANTISATIONS[quantisation][1])
        write_source_metadata(writer, source_directory)
        write_vocabulary(writer, vocabulary)
        write_tensors(writer, weights, plan)
    logger.info("Converted %s to %s, %d bytes", model_name, quantisation, target.stat().st_size)


# Reading the source


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelUnusable` if the file is missing or holds anything else."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise ModelUnusable(f"{path.name} does not hold a JSON object.")
    return content


def read_json_value(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelUnusable(f"{path.name} is missing from the model directory {path.parent.name!r}.") from None
    except ValueError as error:
        raise ModelUnusable(f"{path.name} is not valid JSON: {error}.") from error


def read_positive_integer(content: dict[str, Any], key: str, file_name: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelUnusable(f"{file_name}: {key!r} must be a positive integer, it is {value!r}.")
    return value


def read_bert_configuration(source_directory: Path) -> BertConfiguration:
    """Read and check `config.json`. Raises `ModelUnusable` for anything that is not a plain BERT encoder."""
    content = read_json(source_directory / "config.json")
    refuse_other_architectures(content)
    sizes = {
        name: read_positive_integer(content, key, "config.json")
        for name, key in (
            ("n_tokens_vocabulary", "vocab_size"),
            ("n_dims", "hidden_size"),
            ("n_feed_forward", "intermediate_size"),
            ("n_blocks", "num_hidden_layers"),
            ("n_heads", "num_attention_heads"),
            ("context_length", "max_position_embeddings"),
            ("n_token_types", "type_vocab_size"),
        )
    }
    if sizes["n_dims"] % sizes["n_heads"]:
        raise ModelUnusable("config.json: 'hidden_size' is not a multiple of 'num_attention_heads'.")
    return BertConfiguration(**sizes, layer_norm_eps=float(content.get("layer_norm_eps", 1e-12)))


def refuse_other_architectures(content: dict[str, Any]) -> None:
    expectations: tuple[tuple[str, frozenset[Any], Any], ...] = (
        ("model_type", frozenset({"bert"}), None),
        ("hidden_act", ACTIVATIONS, "gelu"),
        ("position_embedding_type", frozenset({"absolute"}), "absolute"),
        ("is_decoder", frozenset({False}), False),
    )
    for key, accepted, default in expectations:
        value = content.get(key, default)
        if value not in accepted:
            known = ", ".join(sorted(map(repr, accepted)))
            raise ModelUnusable(f"config.json: {key!r} is {value!r}; this converter knows {known}.")


def check_modules(source_directory: Path) -> None:
    """Refuse modules behind the transformer that compute something (a dense layer, for example)."""
    path = source_directory / "modules.json"
    if not path.exists():
        return
    modules = read_json_value(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelUnusable("modules.json does not hold a list of modules.")
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in MODULES_WITHOUT_WEIGHTS_OF_THEIR_OWN:
            raise ModelUnusable(f"modules.json: a GGUF of the BERT family cannot express the module {kind!r}.")


def read_pooling(source_directory: Path) -> PoolingType:
    """Which pooling `1_Pooling/config.json` asks for: mean or cls, alone."""
    content = read_json(source_directory / "1_Pooling" / "config.json")
    modes = sorted(key.removeprefix("pooling_mode_") for key, on in content.items() if "_mode_" in key and on is True)
    if isinstance(content.get("pooling_mode"), str):
        modes = [content["pooling_mode"]]
    poolings = {"mean_tokens": PoolingType.MEAN, "cls_token": PoolingType.CLS}
    poolings |= {"mean": PoolingType.MEAN, "cls": PoolingType.CLS}
    if len(modes) != 1 or modes[0] not in poolings:
        found = ", ".join(modes) or "none"
        raise ModelUnusable(f"1_Pooling/config.json: the pooling must be mean or cls, alone; it is {found}.")
    return poolings[modes[0]]


def read_licence(source_directory: Path) -> str | None:
    """The `license:` entry in the head of the model card, if there is one."""
    path = source_directory / "README.md"
    if not path.exists():
        return None
    head = re.match(r"---\n(.*?)\n---", path.read_text("utf-8", errors="replace"), re.DOTALL)
    entry = re.search(r"^license:\s*([\w.\-]+)\s*$", head.group(1), re.MULTILINE) if head else None
    return entry.group(1) if entry else None


# The vocabulary


def read_vocabulary(source_directory: Path, n_tokens_vocabulary: int) -> Vocabulary:
    """Read `vocab.txt` and the tokenizer's rules. Raises `ModelUnusable` if the engine cannot follow them."""
    rules = read_json(source_directory / "tokenizer_config.json")
    if rules.get("tokenize_chinese_chars", True) is not True:
        raise ModelUnusable("tokenizer_config.json: the engine always splits Chinese characters, this model does not.")
    pieces = read_pieces(source_directory / "vocab.txt", n_tokens_vocabulary)
    special_ids = find_special_ids(pieces, rules)
    lower_case = bool(rules.get("do_lower_case", True))
    strip_accents = rules.get("strip_accents")
    return Vocabulary(
        tokens=tuple(spell_for_engine(piece) for piece in pieces),
        token_types=tuple(choose_token_type(index, piece, special_ids) for index, piece in enumerate(pieces)),
        special_ids=special_ids,
        lower_case=lower_case or lowers_case_before_tokenising(source_directory),
        strip_accents=lower_case if strip_accents is None else bool(strip_accents),
    )


def lowers_case_before_tokenising(source_directory: Path) -> bool:
    path = source_directory / "sentence_bert_config.json"
    return path.exists() and bool(read_json(path).get("do_lower_case", False))


def read_pieces(path: Path, n_tokens_vocabulary: int) -> list[str]:
    """The pieces in order of their ids, filled up to the rows of the embedding matrix."""
    try:
        # Only the line feed ends a line: pieces may be other characters that `splitlines` takes for line ends.
        pieces = path.read_text("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ModelUnusable(f"{path.name} is missing from the model directory {path.parent.name!r}.") from None
    except UnicodeDecodeError as error:
        raise ModelUnusable(f"{path.name} is not UTF-8: {error}.") from error
    pieces = [piece.rstrip("\r") for piece in pieces]
    if len(pieces) > n_tokens_vocabulary:
        raise ModelUnusable(f"vocab.txt has {len(pieces)} pieces, config.json allows {n_tokens_vocabulary}.")
    pieces += [f"[filling{index}]" for index in range(len(pieces), n_tokens_vocabulary)]
    if len({spell_for_engine(piece) for piece in pieces}) != len(pieces):
        raise ModelUnusable("vocab.txt holds a piece twice.")
    return pieces


def spell_for_engine(piece: str) -> str:
    """WordPiece marks continuations (`##ing`); the engine marks beginnings. Bracketed pieces stay as they are."""
    if is_bracketed(piece):
        return piece
    return piece[2:] if piece.startswith("##") and len(piece) > 2 else WORD_START + piece


def is_bracketed(piece: str) -> bool:
    return len(piece) > 2 and piece.startswith("[") and piece.endswith("]")


def find_special_ids(pieces: list[str], rules: dict[str, Any]) -> dict[str, int]:
    """The ids of CLS, SEP, UNK and PAD, which must exist, and of MASK, which may."""
    ids_by_piece = {piece: index for index, piece in enumerate(pieces)}
    special_ids: dict[str, int] = {}
    for role, default in DEFAULT_SPECIAL_TOKENS.items():
        entry = rules.get(f"{role}_token") or default
        piece = entry.get("content", default) if isinstance(entry, dict) else entry
        if piece in ids_by_piece:
            special_ids[role] = ids_by_piece[piece]
        elif role != "mask":
            raise ModelUnusable(f"vocab.txt lacks the piece {piece!r}, which the tokenizer needs as {role.upper()}.")
    return special_ids


def choose_token_type(index: int, piece: str, special_ids: dict[str, int]) -> int:
    if index == special_ids["unk"]:
        return TokenType.UNKNOWN
    if index in special_ids.values():
        return TokenType.CONTROL
    if is_bracketed(piece):
        return TokenType.UNUSED
    return TokenType.NORMAL


# The tensors


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Memory-map the weights. Raises `ModelUnusable` if the file is missing or damaged."""
    if not path.is_file():
        raise ModelUnusable(f"{path.name} is missing from the model directory {path.parent.name!r}.")
    try:
        with safe_open(path, framework="numpy") as weights:
            yield weights
    except SafetensorError as error:
        raise ModelUnusable(f"{path.name} is damaged: {error}.") from error


def find_prefix(weights: Any) -> str:
    """Models saved with a head have their encoder under `bert.`, bare encoders under nothing."""
    return "bert." if "bert.embeddings.word_embeddings.weight" in weights.keys() else ""  # noqa: SIM118 not a dict


def plan_tensors(
    configuration: BertConfiguration, *, prefix: str, quantisation: GGMLQuantizationType
) -> list[TensorPlan]:
    """Every tensor the engine needs, in the order of the file."""
    shapes = describe_embedding_tensors(configuration)
    for block in range(configuration.n_blocks):
        shapes += describe_block_tensors(configuration, block)
    return [
        TensorPlan(prefix + source, target, shape, choose_tensor_type(target, shape, quantisation))
        for source, target, shape in shapes
    ]


def describe_embedding_tensors(configuration: BertConfiguration) -> list[tuple[str, str, tuple[int, ...]]]:
    n_dims = configuration.n_dims
    return [
        ("embeddings.word_embeddings.weight", "token_embd.weight", (configuration.n_tokens_vocabulary, n_dims)),
        ("embeddings.position_embeddings.weight", "position_embd.weight", (configuration.context_length, n_dims)),
        ("embeddings.token_type_embeddings.weight", "token_types.weight", (configuration.n_token_types, n_dims)),
        ("embeddings.LayerNorm.weight", "token_embd_norm.weight", (n_dims,)),
        ("embeddings.LayerNorm.bias", "token_embd_norm.bias", (n_dims,)),
    ]


def describe_block_tensors(configuration: BertConfiguration, block: int) -> list[tuple[str, str, tuple[int, ...]]]:
    n_dims, n_feed_forward = configuration.n_dims, configuration.n_feed_forward
    layers: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("attention.self.query", "attn_q", (n_dims, n_dims)),
        ("attention.self.key", "attn_k", (n_dims, n_dims)),
        ("attention.self.value", "attn_v", (n_dims, n_dims)),
        ("attention.output.dense", "attn_output", (n_dims, n_dims)),
        ("attention.output.LayerNorm", "attn_output_norm", (n_dims,)),
        ("intermediate.dense", "ffn_up", (n_feed_forward, n_dims)),
        ("output.dense", "ffn_down", (n_dims, n_feed_forward)),
        ("output.LayerNorm", "layer_output_norm", (n_dims,)),
    )
    described: list[tuple[str, str, tuple[int, ...]]] = []
    for source, target, shape in layers:
        described.append((f"encoder.layer.{block}.{source}.weight", f"blk.{block}.{target}.weight", shape))
        described.append((f"encoder.layer.{block}.{source}.bias", f"blk.{block}.{target}.bias", shape[:1]))
    return described


def choose_tensor_type(name: str, shape: tuple[int, ...], quantisation: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors and the two small tables stay float32; a matrix whose rows do not fit whole blocks becomes F16.

    So do the attention's value and output matrices where the others are quantised: it costs 1 % of the speed and 6 %
    of the size, and halves the distance of the vectors from the float32 reference (docs/decisions/0004).
    """
    if len(shape) == 1 or name in ("position_embd.weight", "token_types.weight"):
        return GGMLQuantizationType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[quantisation]
    is_sensitive = block_size > 1 and name.endswith(SENSITIVE_MATRICES)
    return GGMLQuantizationType.F16 if is_sensitive or shape[-1] % block_size else quantisation


def check_tensors(weights: Any, plan: Sequence[TensorPlan]) -> None:
    """Hold names, shapes and types of the weights against the plan before anything is written."""
    present = set(weights.keys())
    missing = [tensor.source_name for tensor in plan if tensor.source_name not in present]
    if missing:
        raise ModelUnusable(f"model.safetensors lacks {len(missing)} tensor(s), the first is {missing[0]!r}.")
    for tensor in plan:
        stored = weights.get_slice(tensor.source_name)
        if tuple(stored.get_shape()) != tensor.shape:
            raise ModelUnusable(
                f"model.safetensors: {tensor.source_name!r} has the shape {tuple(stored.get_shape())}, "
                f"config.json implies {tensor.shape}."
            )
        if stored.get_dtype() not in ("F32", "F16"):
            raise ModelUnusable(
                f"model.safetensors: {tensor.source_name!r} is stored as {stored.get_dtype()}; "
                "this converter reads F32 and F16."
            )


def read_tensor(weights: Any, tensor: TensorPlan) -> npt.NDArray[Any]:
    """One tensor in the type it is written in. Raises `ModelUnusable` for values that are not finite."""
    values: npt.NDArray[Any] = weights.get_tensor(tensor.source_name).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ModelUnusable(f"model.safetensors: {tensor.source_name!r} holds values that are not finite.")
    return gguf.quants.quantize(values, tensor.quantisation)


# Writing the target


@contextmanager
def new_gguf_file(target: Path) -> Iterator[gguf.GGUFWriter]:
    """Open a writer whose file gets its name only after everything is on the disk; otherwise nothing stays."""
    unfinished = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    writer = gguf.GGUFWriter(unfinished, "bert")
    try:
        yield writer
        writer.close()
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def write_model_metadata(writer: gguf.GGUFWriter, configuration: BertConfiguration, file_type: LlamaFileType) -> None:
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(configuration.context_length)
    writer.add_embedding_length(configuration.n_dims)
    writer.add_feed_forward_length(configuration.n_feed_forward)
    writer.add_block_count(configuration.n_blocks)
    writer.add_head_count(configuration.n_heads)
    writer.add_layer_norm_eps(configuration.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(configuration.n_token_types)


def write_source_metadata(writer: gguf.GGUFWriter, source_directory: Path) -> None:
    """Pooling, and for information the length the model was trained on, which is not its window."""
    writer.add_pooling_type(read_pooling(source_directory))
    path = source_directory / "sentence_bert_config.json"
    if path.exists() and (content := read_json(path)).get("max_seq_length") is not None:
        writer.add_uint32(MAX_SEQ_LENGTH_KEY, read_positive_integer(content, "max_seq_length", path.name))


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    ids = vocabulary.special_ids
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.token_types))
    writer.add_token_scores([0.0] * len(vocabulary.tokens))
    # The engine takes the token in front from BOS, the one behind from SEP; CLS by its own name is for other readers.
    writer.add_bos_token_id(ids["cls"])
    writer.add_unk_token_id(ids["unk"])
    writer.add_sep_token_id(ids["sep"])
    writer.add_pad_token_id(ids["pad"])
    writer.add_uint32("tokenizer.ggml.cls_token_id", ids["cls"])
    if "mask" in ids:
        writer.add_mask_token_id(ids["mask"])
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", vocabulary.lower_case)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", vocabulary.strip_accents)


def write_tensors(writer: gguf.GGUFWriter, weights: Any, plan: Sequence[TensorPlan]) -> None:
    """Write the directory of tensors, then one tensor after the other."""
    for tensor in plan:
        writer.add_tensor_info(
            tensor.target_name, tensor.shape, np.dtype(np.float32), tensor.size_in_bytes, tensor.quantisation
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        writer.write_tensor_data(read_tensor(weights, tensor))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if the source cannot be converted or the target not written."""
    parser = argparse.ArgumentParser(description="Convert a sentence-transformers directory (BERT family) to GGUF.")
    parser.add_argument("source", type=Path, help="directory with config.json, model.safetensors, vocab.txt, ...")
    parser.add_argument("target", type=Path, help="GGUF file to write")
    parser.add_argument("--quantisation", choices=list(QUANTISATIONS), default="Q8_0")
    parser.add_argument("--model-name", help="general.name of the result; the name of the source directory if absent")
    options = parser.parse_args(arguments)
    name = options.model_name or options.source.resolve().name
    try:
        convert_sentence_transformers_to_gguf(
            options.source, options.target, quantisation=options.quantisation, model_name=name
        )
    except (ModelUnusable, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
