"""Tiny models with random weights, which the engine loads and runs like real ones.

They let tests go through every architecture, pooling and damage without downloading anything: a file has less than a
megabyte, loads in milliseconds, and gives different finite vectors for different texts. The vectors mean nothing.

Encoders (`bert`, `nomic-bert`, `modern-bert`) get a WordPiece vocabulary of letters, digits and a few words; whatever
else a text holds becomes [UNK]. Decoders (`llama`, `qwen2`, `qwen3`, `gemma-embedding`) get a vocabulary with all
bytes, so that every text has tokens. The same arguments give the same bytes.

`python -m tests.tiny_models FILE...` lets the engine load each file and embed a text, and prints one line of JSON each:
the vector, or `null` if the engine refuses the file. A program, because the engine may end the process instead.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, TokenType

ARCHITECTURES = ("bert", "nomic-bert", "modern-bert", "llama", "qwen2", "qwen3", "gemma-embedding")
RANKING_ARCHITECTURES = frozenset({"bert", "modern-bert", "qwen3"})
ENCODERS = frozenset({"bert", "nomic-bert", "modern-bert"})
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
WORDS = ("hello", "world", "the", "a", "cat", "dog", "sat", "on", "mat", "cold", "chilly", "i", "am", "feel", "so")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
WORD_START = "\u2581"

Metadata = dict[str, Any]
Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TinyShape:
    """The sizes of a tiny model; the defaults keep every row a multiple of 32, so that Q8_0 and Q4_0 fit."""

    n_dims: int = 64
    n_blocks: int = 2
    n_heads: int = 4
    n_heads_kv: int = 2
    n_feed_forward: int = 128
    context_length: int = 512
    seed: int = 0

    @property
    def head_width(self) -> int:
        return self.n_dims // self.n_heads


def write_tiny_model(
    path: Path,
    architecture: str = "bert",
    pooling: str | None = "mean",
    *,
    name: str = "tiny",
    quantisation: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32] | None] | None = None,
    **sizes: int,
) -> Path:
    """Write a loadable GGUF to `path` and return it.

    `sizes` are the fields of `TinyShape`. `pooling=None` leaves the setting out. Entries of `metadata` and `tensors`
    replace or add to what the model would have, an entry `None` removes it: that is how tests damage models. Whole
    numbers are written as uint32, tensors in the shape of NumPy (rows first).
    """
    if pooling == "rank" and architecture not in RANKING_ARCHITECTURES:
        raise ValueError(f"The engine has no classifier for {architecture}.")
    if architecture == "gemma-embedding":
        sizes = {"n_blocks": 6} | sizes  # each sixth block sees the whole text; without one the engine aborts
    shape = TinyShape(**sizes)
    settings = {"general.name": name} | describe_settings(architecture, pooling, shape)
    settings |= describe_wordpiece() if architecture in ENCODERS else describe_decoder_vocabulary(architecture)
    settings |= metadata or {}
    weights: dict[str, Any] = make_tensors(architecture, pooling, shape, len(settings["tokenizer.ggml.tokens"] or ()))
    weights |= tensors or {}
    write_file(path, architecture, settings, weights, GGMLQuantizationType[quantisation])
    return path


# Settings


def describe_settings(architecture: str, pooling: str | None, shape: TinyShape) -> Metadata:
    settings: Metadata = {
        "context_length": shape.context_length,
        "embedding_length": shape.n_dims,
        "feed_forward_length": shape.n_feed_forward,
        "block_count": shape.n_blocks,
        "attention.head_count": shape.n_heads,
    }
    if pooling is not None:
        settings["pooling_type"] = POOLINGS[pooling]
    if pooling == "rank":
        settings["classifier.output_labels"] = ["yes", "no"] if architecture == "qwen3" else ["score"]
    if architecture in ENCODERS:
        settings |= {"attention.layer_norm_epsilon": 1e-5, "attention.causal": False}
    else:
        settings |= {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": shape.n_heads_kv}
    if architecture != "bert":
        settings["rope.freq_base"] = 10_000.0
    if architecture in ("modern-bert", "gemma-embedding"):
        settings["attention.sliding_window"] = 128
    if architecture == "llama":
        settings["rope.dimension_count"] = shape.head_width
    if architecture == "gemma-embedding":
        settings |= {"attention.key_length": shape.head_width, "attention.value_length": shape.head_width}
    return {f"{architecture}.{key}": value for key, value in settings.items()}


def describe_wordpiece() -> Metadata:
    """A lower-casing WordPiece vocabulary in the engine's spelling."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    starts = dict.fromkeys([*(WORD_START + letter for letter in LETTERS), *(WORD_START + word for word in WORDS)])
    tokens = [*special, *starts, *LETTERS]
    types = [TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * (len(tokens) - len(special))
    types[special.index("[UNK]")] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(type_) for type_ in types],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,  # where the engine looks for CLS
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }


def describe_decoder_vocabulary(architecture: str) -> Metadata:
    return describe_byte_pairs() if architecture.startswith("qwen") else describe_sentence_pieces()


def describe_sentence_pieces() -> Metadata:
    """All bytes, letters and a few words; BOS in front, EOS behind."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(dict.fromkeys([WORD_START, *LETTERS, *(WORD_START + word for word in WORDS), *WORDS]))
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * len(byte_tokens) + [TokenType.NORMAL] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *byte_tokens, *pieces],
        "tokenizer.ggml.token_type": [int(type_) for type_ in types],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }


def describe_byte_pairs() -> Metadata:
    """All bytes in the printable spelling of byte-level BPE, and a few merges; EOS behind, no BOS."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    merges = ["h e", "l l", "he ll", "hell o", "t h", "th e", "a t", "c at"]
    tokens = [spelling[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * (len(tokens) - 1) + [int(TokenType.CONTROL)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.padding_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }


# Tensors


class RandomTensors:
    """Collects tensors: matrices that keep the scale of what goes through them, norms around one."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.tensors: Tensors = {}

    def add_matrix(self, name: str, n_out: int, n_in: int, *, bias: bool = False) -> None:
        values = self.generator.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        self.tensors[f"{name}.weight"] = values.astype(np.float32)
        if bias:
            self.add_bias(name, n_out)

    def add_table(self, name: str, n_rows: int, n_dims: int) -> None:
        self.tensors[f"{name}.weight"] = self.generator.standard_normal((n_rows, n_dims)).astype(np.float32)

    def add_norm(self, name: str, n_dims: int, *, bias: bool = False) -> None:
        self.tensors[f"{name}.weight"] = (1 + 0.1 * self.generator.standard_normal(n_dims)).astype(np.float32)
        if bias:
            self.add_bias(name, n_dims)

    def add_bias(self, name: str, n_dims: int) -> None:
        self.tensors[f"{name}.bias"] = (0.1 * self.generator.standard_normal(n_dims)).astype(np.float32)


def make_tensors(architecture: str, pooling: str | None, shape: TinyShape, n_tokens: int) -> Tensors:
    """All tensors by their names in the file, float32 (rows first)."""
    random = RandomTensors(shape.seed)
    random.add_table("token_embd", n_tokens, shape.n_dims)
    if architecture in ("bert", "nomic-bert"):
        add_post_norm_encoder(random, architecture, shape)
    elif architecture == "modern-bert":
        add_modern_bert(random, shape)
    else:
        add_decoder(random, architecture, shape)
    if pooling == "rank":
        add_classifier(random, architecture, shape.n_dims)
    return random.tensors


def add_post_norm_encoder(random: RandomTensors, architecture: str, shape: TinyShape) -> None:
    n_dims, is_bert = shape.n_dims, architecture == "bert"
    random.add_table("token_types", 2, n_dims)
    if is_bert:
        random.add_table("position_embd", shape.context_length, n_dims)
    random.add_norm("token_embd_norm", n_dims, bias=True)
    for block in (f"blk.{index}" for index in range(shape.n_blocks)):
        if is_bert:
            for part in ("attn_q", "attn_k", "attn_v"):
                random.add_matrix(f"{block}.{part}", n_dims, n_dims, bias=True)
        else:
            random.add_matrix(f"{block}.attn_qkv", 3 * n_dims, n_dims)
            random.add_matrix(f"{block}.ffn_gate", shape.n_feed_forward, n_dims)
        random.add_matrix(f"{block}.attn_output", n_dims, n_dims, bias=is_bert)
        random.add_norm(f"{block}.attn_output_norm", n_dims, bias=True)
        random.add_matrix(f"{block}.ffn_up", shape.n_feed_forward, n_dims, bias=is_bert)
        random.add_matrix(f"{block}.ffn_down", n_dims, shape.n_feed_forward, bias=is_bert)
        random.add_norm(f"{block}.layer_output_norm", n_dims, bias=True)


def add_modern_bert(random: RandomTensors, shape: TinyShape) -> None:
    n_dims = shape.n_dims
    random.add_norm("token_embd_norm", n_dims)
    for index in range(shape.n_blocks):
        block = f"blk.{index}"
        if index > 0:  # the first block takes the normed embeddings as they are
            random.add_norm(f"{block}.attn_norm", n_dims)
        random.add_matrix(f"{block}.attn_qkv", 3 * n_dims, n_dims)
        random.add_matrix(f"{block}.attn_output", n_dims, n_dims)
        random.add_norm(f"{block}.ffn_norm", n_dims)
        random.add_matrix(f"{block}.ffn_up", 2 * shape.n_feed_forward, n_dims)
        random.add_matrix(f"{block}.ffn_down", n_dims, shape.n_feed_forward)
    random.add_norm("output_norm", n_dims)


def add_decoder(random: RandomTensors, architecture: str, shape: TinyShape) -> None:
    n_dims, n_dims_kv = shape.n_dims, shape.n_heads_kv * shape.head_width
    for block in (f"blk.{index}" for index in range(shape.n_blocks)):
        random.add_norm(f"{block}.attn_norm", n_dims)
        random.add_matrix(f"{block}.attn_q", n_dims, n_dims, bias=architecture == "qwen2")
        random.add_matrix(f"{block}.attn_k", n_dims_kv, n_dims, bias=architecture == "qwen2")
        random.add_matrix(f"{block}.attn_v", n_dims_kv, n_dims, bias=architecture == "qwen2")
        random.add_matrix(f"{block}.attn_output", n_dims, n_dims)
        if architecture in ("qwen3", "gemma-embedding"):
            random.add_norm(f"{block}.attn_q_norm", shape.head_width)
            random.add_norm(f"{block}.attn_k_norm", shape.head_width)
        random.add_norm(f"{block}.ffn_norm", n_dims)
        if architecture == "gemma-embedding":
            random.add_norm(f"{block}.post_attention_norm", n_dims)
            random.add_norm(f"{block}.post_ffw_norm", n_dims)
        random.add_matrix(f"{block}.ffn_gate", shape.n_feed_forward, n_dims)
        random.add_matrix(f"{block}.ffn_up", shape.n_feed_forward, n_dims)
        random.add_matrix(f"{block}.ffn_down", n_dims, shape.n_feed_forward)
    random.add_norm("output_norm", n_dims)


def add_classifier(random: RandomTensors, architecture: str, n_dims: int) -> None:
    """What rank pooling multiplies the pooled vector with: one score, or yes and no for a Qwen3."""
    if architecture in ENCODERS:
        random.add_matrix("cls", n_dims, n_dims, bias=architecture == "bert")
    random.add_matrix("cls.output", 2 if architecture == "qwen3" else 1, n_dims, bias=architecture == "bert")


# The file


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[np.float32] | None],
    quantisation: GGMLQuantizationType,
) -> None:
    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            add_setting(writer, key, value)
    for name, values in tensors.items():
        if values is not None:
            stored = quantise(name, values, quantisation)
            writer.add_tensor(name, stored, raw_dtype=quantisation if stored.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_setting(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def quantise(name: str, values: npt.NDArray[np.float32], quantisation: GGMLQuantizationType) -> npt.NDArray[Any]:
    """Vectors, and the tables that the engine adds up, stay float32."""
    block_size, _ = gguf.GGML_QUANT_SIZES[quantisation]
    if values.ndim == 1 or name.startswith(("position_embd", "token_types")) or values.shape[-1] % block_size:
        return values
    return gguf.quants.quantize(values, quantisation)


# The engine


def compute_tiny_vector(path: Path, text: str) -> list[float] | None:
    """What the engine's own pooling makes of the text (the rows one after the other for pooling "none")."""
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(os.fspath(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        return None
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_seq_max, parameters.kv_unified, parameters.embeddings = 64, True, True
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    content, ids = text.encode(), (llama_cpp.llama_token * 512)()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    n_tokens = llama_cpp.llama_tokenize(vocabulary, content, len(content), ids, 512, True, False)
    if not context or n_tokens <= 0 or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, n_tokens)):
        return None
    pooling = llama_cpp.llama_pooling_type(context)
    n_dims = llama_cpp.llama_model_n_embd(model)
    if pooling == POOLINGS["none"]:
        return list(llama_cpp.llama_get_embeddings(context)[: n_tokens * n_dims])
    n_values = llama_cpp.llama_model_n_cls_out(model) if pooling == POOLINGS["rank"] else n_dims
    return list(llama_cpp.llama_get_embeddings_seq(context, 0)[:n_values])


def main() -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    for name in sys.argv[1:]:
        print(json.dumps(compute_tiny_vector(Path(name), "hello cat, 42!")), flush=True)


if __name__ == "__main__":
    main()
