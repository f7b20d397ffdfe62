"""A strict look at a GGUF file before the engine gets it.

The engine trusts its input: a failed assertion there ends the whole process, and no `except` sees it. So every length,
count, type and offset of the file is held against its bounds here, together with the settings that an embedding model
needs. Nothing is allocated by a number that the file states. What passes is consistent; that its vectors are any good
is what the self-test after loading shows.

Layout of the format: header (magic, version, number of tensors, number of keys), keys with values, descriptions of
tensors, padding up to the alignment, data of the tensors. Everything is little-endian.

Reads only, one memory-mapped pass, weights untouched. Does not load models.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from llama_embeddings.errors import ModelUnusable

EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma",
        "gemma-embedding",
        "gemma2",
        "gemma3",
        "granite",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama",
        "llama-embed",
        "mistral3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "olmo2",
        "phi2",
        "phi3",
        "qwen2",
        "qwen2moe",
        "qwen3",
        "qwen3moe",
        "smollm3",
    }
)
TOKENIZERS = frozenset({"bert", "gpt2", "llama", "t5"})
POOLING_NAMES = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
# What the engine assumes for tokens that the file does not name, by tokenizer.
ASSUMED_TOKEN_IDS: Mapping[str, Mapping[str, int]] = {
    "bert": {"bos": 101, "unknown": 100, "seperator": 102},
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {},
    "t5": {"eos": 1, "unknown": 2},
}
TOKENIZERS_WITH_BYTES = frozenset({"llama", "t5"})
# In these the engine spells a letter that is no token by its bytes, and ends the process over one without a token.
TOKENIZERS_THAT_NEED_BYTES = frozenset({"llama"})
# All that UTF-8 is made of, but the space: the engine writes another letter for it.
BYTES_OF_TEXT = bytes({*range(0xC0), *range(0xC2, 0xF5)} - {0x20})
# Architectures whose positions are a table or a slope, not a rotation of the heads.
ARCHITECTURES_WITHOUT_ROTATION = frozenset({"bert", "jina-bert-v2"})
# Architectures in which the engine rotates whole heads, or takes their width from the dimensions, whatever is stated.
ARCHITECTURES_WITH_WHOLE_ROTATION = frozenset({"qwen2", "qwen2moe", "qwen3", "qwen3moe"})
ARCHITECTURES_WITH_DERIVED_HEADS = frozenset(
    {"bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe"}
    | {"phi2", "phi3", "qwen2", "qwen2moe"}
)
# Encoders that mix blocks seeing everything with blocks seeing a window: every how many blocks one sees everything,
# and how many blocks there must be so that both kinds occur. The engine aborts if one kind is missing.
WINDOW_PATTERNS = {"modern-bert": 3, "gemma-embedding": 6}
ARCHITECTURES_BEGINNING_WITH_A_FULL_BLOCK = frozenset({"modern-bert"})

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_NUMBER_OF_KEYS = 65_536
LARGEST_NUMBER_OF_TENSORS = 65_536
LARGEST_NUMBER_OF_BLOCKS = 512  # the engine's own limit
LARGEST_NAME_OF_A_TENSOR = 63  # bytes; the engine's field has 64 with the closing zero
LARGEST_NAME_OF_A_KEY = 65_535
LARGEST_NUMBER = 2**31 - 1  # sizes are signed 32 bit numbers in the engine
LARGEST_TENSOR = 2**62  # elements
LARGEST_ALIGNMENT = 65_536
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOLEAN = 8, 9, 7
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
INT32, FLOAT32 = 5, 6
BYTE_TOKEN = 6
LARGEST_NUMBER_OF_EXPERTS = 512


@dataclass(frozen=True)
class GgufSummary:
    """What a checked file says of itself; `None` where it says nothing."""

    architecture: str
    name: str | None
    licence: str | None
    n_dims: int
    n_blocks: int
    n_heads: int
    context_length: int
    pooling: str | None
    """One of "none", "mean", "cls", "last", "rank"."""
    causal: bool | None
    file_type: str
    """Name of the commonest quantisation, such as "Q8_0"."""
    tokenizer: str
    n_tokens_vocabulary: int
    lower_case: bool | None
    strip_accents: bool | None
    """What a WordPiece tokenizer is told to do to the text; the engine assumes true for both where it is `None`."""
    has_bos: bool
    has_eos: bool
    has_cls: bool
    has_sep: bool
    add_bos: bool | None
    add_eos: bool | None
    add_sep: bool | None
    max_seq_length: int | None
    """Tokens the model was trained on, where our own conversion noted it; not the window."""
    n_parameters: int
    size_in_bytes: int


@dataclass(frozen=True)
class ArrayValue:
    """Where an array lies; its elements stay in the file until somebody needs them."""

    element_type: int
    n_elements: int
    offset: int


Value = bool | int | float | str | ArrayValue
Metadata = dict[str, Value]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as described: the length of a row first, the offset from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_in_bytes(self) -> int:
        block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type)]
        return self.n_elements // block_size * type_size


class Fault(Exception):
    """What is wrong with the file; becomes `ModelUnusable` with the file's name in front."""


class BoundedReader:
    """Reads numbers and strings one after the other and never beyond the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.size = len(content)
        self.position = 0

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`; the position before. Raises `Fault` if the file ends earlier."""
        start = self.position
        if n_bytes > self.size - start:
            raise Fault(f"the file ends inside {what} (at byte {start})")
        self.position = start + n_bytes
        return start

    def read_number(self, format_: str, what: str) -> int | float:
        start = self.skip(struct.calcsize(f"<{format_}"), what)
        number: int | float = struct.unpack_from(f"<{format_}", self.content, start)[0]
        return number

    def read_count(self, format_: str, what: str, *, largest: int, smallest: int = 0) -> int:
        count = int(self.read_number(format_, what))
        if not smallest <= count <= largest:
            raise Fault(f"{what} is {count}, outside {smallest} to {largest}")
        return count

    def read_bytes(self, what: str, *, largest: int | None = None) -> bytes:
        n_bytes = self.read_count("Q", f"the length of {what}", largest=self.size if largest is None else largest)
        start = self.skip(n_bytes, what)
        return self.content[start : self.position]

    def read_text(self, what: str, *, largest: int | None = None) -> str:
        try:
            return self.read_bytes(what, largest=largest).decode("utf-8")
        except UnicodeDecodeError:
            raise Fault(f"{what} is not UTF-8") from None


def check_gguf(path: Path, *, architectures: frozenset[str] = EMBEDDING_ARCHITECTURES) -> GgufSummary:
    """Check the file from its first byte to its last and sum it up.

    Raises `ModelUnusable`, with the name of the file and what is wrong, for anything the engine could stumble over:
    a damaged or truncated file, settings that contradict each other or the tensors, and architectures other than
    `architectures`.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return check_content(content, architectures)
    except Fault as fault:
        raise ModelUnusable(f"The model file {path.name!r} cannot be used: {fault}.") from fault
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelUnusable(f"The model file {path.name!r} cannot be read: {reason}.") from error
    except ValueError as error:  # a file without bytes cannot be mapped
        raise ModelUnusable(f"The model file {path.name!r} cannot be used: it is empty.") from error


def check_content(content: mmap.mmap, architectures: frozenset[str]) -> GgufSummary:
    reader = BoundedReader(content)
    n_tensors, n_keys = read_header(reader)
    metadata = read_metadata(reader, n_keys)
    alignment = read_alignment(metadata)
    tensors = read_tensor_entries(reader, n_tensors, alignment)
    check_data_section(reader, tensors, alignment)
    sizes = check_architecture(metadata, reader, architectures)
    check_tokenizer(metadata, reader)
    check_shapes(metadata, tensors, sizes)
    return summarise(metadata, tensors, sizes, reader.size)


# Header and metadata


def read_header(reader: BoundedReader) -> tuple[int, int]:
    """Numbers of tensors and keys."""
    start = reader.skip(len(MAGIC), "the header")
    if reader.content[start : reader.position] != MAGIC:
        raise Fault("it is not a GGUF file (its first bytes are others)")
    version = int(reader.read_number("I", "the header"))
    if version & 0xFFFF == 0:
        raise Fault("it is a big-endian file, which this machine's engine does not read")
    if version not in VERSIONS:
        raise Fault(f"it has version {version} of the format, known are {', '.join(map(str, VERSIONS))}")
    n_tensors = reader.read_count("Q", "the number of tensors", largest=LARGEST_NUMBER_OF_TENSORS, smallest=1)
    n_keys = reader.read_count("Q", "the number of keys", largest=LARGEST_NUMBER_OF_KEYS, smallest=1)
    return n_tensors, n_keys


def read_metadata(reader: BoundedReader, n_keys: int) -> Metadata:
    metadata: Metadata = {}
    for _ in range(n_keys):
        key = reader.read_text("the name of a key", largest=LARGEST_NAME_OF_A_KEY)
        if not key:
            raise Fault("a key has no name")
        if key in metadata:
            raise Fault(f"the key {key!r} occurs twice")
        value_type = int(reader.read_number("I", f"the type of {key!r}"))
        metadata[key] = read_value(reader, value_type, f"the value of {key!r}")
    return metadata


def read_value(reader: BoundedReader, value_type: int, what: str) -> Value:
    if value_type == STRING:
        return reader.read_text(what)
    if value_type == ARRAY:
        return read_array(reader, what)
    if value_type not in SCALAR_FORMATS:
        raise Fault(f"{what} has the unknown type {value_type}")
    number = reader.read_number(SCALAR_FORMATS[value_type], what)
    if value_type != BOOLEAN:
        return number
    if number not in (0, 1):
        raise Fault(f"{what} is {number}, where true or false was expected")
    return bool(number)


def read_array(reader: BoundedReader, what: str) -> ArrayValue:
    """Step over an array, element by element where their lengths differ."""
    element_type = int(reader.read_number("I", what))
    n_elements = reader.read_count("Q", f"the length of {what}", largest=reader.size)
    offset = reader.position
    if element_type == STRING:
        for _ in range(n_elements):
            reader.skip(reader.read_count("Q", f"the length of a string in {what}", largest=reader.size), what)
    elif element_type in SCALAR_FORMATS:
        reader.skip(n_elements * struct.calcsize(f"<{SCALAR_FORMATS[element_type]}"), what)
    else:
        raise Fault(f"{what} is an array of the unknown or unsupported type {element_type}")
    return ArrayValue(element_type, n_elements, offset)


def list_strings(reader: BoundedReader, array: ArrayValue) -> Iterator[bytes]:
    """The elements of an array of strings, which `read_array` has found to lie inside the file."""
    position = array.offset
    for _ in range(array.n_elements):
        (n_bytes,) = struct.unpack_from("<Q", reader.content, position)
        position += 8 + n_bytes
        yield reader.content[position - n_bytes : position]


def list_numbers(reader: BoundedReader, array: ArrayValue) -> tuple[int | float, ...]:
    return struct.unpack_from(f"<{array.n_elements}{SCALAR_FORMATS[array.element_type]}", reader.content, array.offset)


def get_integer(
    metadata: Metadata, key: str, *, smallest: int = 1, largest: int = LARGEST_NUMBER, default: int | None = None
) -> int:
    """A setting that must be a whole number in its bounds; it may be absent only if there is a default."""
    value = metadata.get(key, default)
    if value is None:
        raise Fault(f"the setting {key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise Fault(f"the setting {key!r} is not a whole number")
    if not smallest <= value <= largest:
        raise Fault(f"the setting {key!r} is {value}, outside {smallest} to {largest}")
    return value


def get_text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise Fault(f"the setting {key!r} is not a text")
    return value


def get_flag(metadata: Metadata, key: str) -> bool | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise Fault(f"the setting {key!r} is neither true nor false")
    return value


def read_alignment(metadata: Metadata) -> int:
    alignment = get_integer(metadata, "general.alignment", largest=LARGEST_ALIGNMENT, default=DEFAULT_ALIGNMENT)
    if alignment & (alignment - 1):
        raise Fault(f"the alignment {alignment} is not a power of two")
    return alignment


# Tensors


def read_tensor_entries(reader: BoundedReader, n_tensors: int, alignment: int) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for _ in range(n_tensors):
        tensor = read_tensor_entry(reader, alignment)
        if tensor.name in tensors:
            raise Fault(f"the tensor {tensor.name!r} occurs twice")
        tensors[tensor.name] = tensor
    return tensors


def read_tensor_entry(reader: BoundedReader, alignment: int) -> TensorEntry:
    name = reader.read_text("the name of a tensor", largest=LARGEST_NAME_OF_A_TENSOR)
    what = f"the tensor {name!r}"
    n_dimensions = reader.read_count("I", f"the number of dimensions of {what}", largest=4, smallest=1)
    shape = tuple(
        reader.read_count("Q", f"a dimension of {what}", largest=LARGEST_TENSOR, smallest=1)
        for _ in range(n_dimensions)
    )
    tensor_type = int(reader.read_number("I", f"the type of {what}"))
    offset = int(reader.read_number("Q", f"the offset of {what}"))
    check_tensor_type(what, tensor_type, shape)
    if offset % alignment:
        raise Fault(f"{what} begins at {offset}, which is not a multiple of the alignment {alignment}")
    return TensorEntry(name, shape, tensor_type, offset)


# Types that llama.cpp keeps for itself: it ends the process when weights have them.
UNUSABLE_TYPES = frozenset(
    getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)


def check_tensor_type(what: str, tensor_type: int, shape: tuple[int, ...]) -> None:
    try:
        known_type = gguf.GGMLQuantizationType(tensor_type)
        block_size, _ = gguf.GGML_QUANT_SIZES[known_type]
    except ValueError:
        raise Fault(f"{what} has the unknown type {tensor_type}") from None
    if known_type in UNUSABLE_TYPES:
        raise Fault(f"{what} has the type {known_type.name}, which weights cannot have")
    # Norms and biases are added to float32 results; llama.cpp ends the process for any other type. A reranker's head
    # for a single score is a matrix of one row, and multiplied.
    is_vector = math.prod(shape) == max(shape) and not (len(shape) > 1 and "'cls.output.weight'" in what)
    if is_vector and known_type is not gguf.GGMLQuantizationType.F32:
        raise Fault(f"{what} is a vector of type {known_type.name}; vectors must be F32")
    if math.prod(shape) > LARGEST_TENSOR:
        raise Fault(f"{what} has more elements than there can be")
    if shape[0] % block_size:
        raise Fault(f"{what} has rows of {shape[0]} elements, which its type stores in blocks of {block_size}")


def check_data_section(reader: BoundedReader, tensors: Mapping[str, TensorEntry], alignment: int) -> None:
    """Every tensor lies inside the file, and no two share a byte."""
    start = -(-reader.position // alignment) * alignment
    end_of_previous = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end_of_previous:
            raise Fault(f"the tensor {tensor.name!r} overlaps the one before it")
        end_of_previous = tensor.offset + tensor.size_in_bytes
        if start + end_of_previous > reader.size:
            missing = start + end_of_previous - reader.size
            raise Fault(f"the tensor {tensor.name!r} reaches {missing} bytes beyond the end; the file is truncated")


# Settings of the architecture


@dataclass(frozen=True)
class Sizes:
    """The sizes that the settings of the architecture state."""

    architecture: str
    n_dims: int
    n_blocks: int
    n_heads: int
    context_length: int


def check_architecture(metadata: Metadata, reader: BoundedReader, architectures: frozenset[str]) -> Sizes:
    architecture = get_text(metadata, "general.architecture")
    if not architecture:
        raise Fault("it does not name its architecture")
    if architecture not in architectures:
        raise Fault(f"its architecture {architecture!r} is not one that embeds texts here")
    if get_integer(metadata, "split.count", smallest=0, default=1) > 1:
        raise Fault("it is one part of a model in several files; merge them into one")
    sizes = Sizes(
        architecture,
        n_dims=get_integer(metadata, f"{architecture}.embedding_length"),
        n_blocks=get_integer(metadata, f"{architecture}.block_count", largest=LARGEST_NUMBER_OF_BLOCKS),
        n_heads=max(list_head_counts(metadata, reader, f"{architecture}.attention.head_count")),
        context_length=get_integer(metadata, f"{architecture}.context_length"),
    )
    check_numbers(metadata, architecture)
    check_heads(metadata, reader, sizes)
    check_window_pattern(metadata, reader, sizes)
    check_experts(metadata, architecture)
    check_output_width(metadata, sizes)
    get_pooling(metadata, architecture)
    return sizes


def check_numbers(metadata: Metadata, architecture: str) -> None:
    """Numbers of the architecture are finite, and an epsilon or a rotation base is above zero."""
    for key, value in metadata.items():
        if not key.startswith(f"{architecture}.") or not isinstance(value, float):
            continue
        if not math.isfinite(value):
            raise Fault(f"the setting {key!r} is {value}")
        if value <= 0 and re.search(r"epsilon$|freq_base", key):
            raise Fault(f"the setting {key!r} is {value}, it must be above zero")


def list_head_counts(metadata: Metadata, reader: BoundedReader, key: str) -> list[int]:
    """Heads of attention: one number, or one for each block."""
    value = metadata.get(key)
    if not isinstance(value, ArrayValue):
        return [get_integer(metadata, key, largest=65_536)]
    if value.element_type in (STRING, BOOLEAN) or not 1 <= value.n_elements <= LARGEST_NUMBER_OF_BLOCKS:
        raise Fault(f"the setting {key!r} is not a list of one number for each block")
    counts = [int(count) for count in list_numbers(reader, value)]
    if min(counts) < 1 or max(counts) > 65_536:
        raise Fault(f"the setting {key!r} holds a number outside 1 to 65536")
    return counts


def check_heads(metadata: Metadata, reader: BoundedReader, sizes: Sizes) -> None:
    """Heads divide the width, unless the file gives them a width of their own, and share keys evenly."""
    prefix = f"{sizes.architecture}.attention"
    head_width = find_head_width(metadata, sizes)
    check_rotation(metadata, sizes, head_width)
    if f"{prefix}.head_count_kv" in metadata:
        shared = list_head_counts(metadata, reader, f"{prefix}.head_count_kv")
        if any(sizes.n_heads % count for count in shared):
            raise Fault(f"{sizes.n_heads} heads cannot share {max(shared)} key/value heads evenly")


def find_head_width(metadata: Metadata, sizes: Sizes) -> int:
    derived = sizes.n_dims // sizes.n_heads
    stated = get_integer(metadata, f"{sizes.architecture}.attention.key_length", default=max(derived, 1))
    value_width = get_integer(metadata, f"{sizes.architecture}.attention.value_length", default=max(derived, 1))
    if f"{sizes.architecture}.attention.key_length" not in metadata and sizes.n_dims % sizes.n_heads:
        raise Fault(f"{sizes.n_dims} dimensions cannot be divided among {sizes.n_heads} heads")
    if sizes.architecture in ARCHITECTURES_WITH_DERIVED_HEADS and not stated == value_width == derived:
        raise Fault(f"heads of {stated} and {value_width}, where {sizes.architecture!r} implies {derived}")
    return stated


def check_rotation(metadata: Metadata, sizes: Sizes, head_width: int) -> None:
    """The rotated part of a head is even, because dimensions are rotated in pairs, and fits into the head."""
    if sizes.architecture in ARCHITECTURES_WITHOUT_ROTATION:
        return
    rotated = get_integer(metadata, f"{sizes.architecture}.rope.dimension_count", default=head_width)
    if rotated % 2 or rotated > head_width:
        raise Fault(f"{rotated} dimensions cannot be rotated in pairs inside heads of {head_width}")
    if sizes.architecture in ARCHITECTURES_WITH_WHOLE_ROTATION and rotated != head_width:
        raise Fault(f"{rotated} dimensions are rotated, where {sizes.architecture!r} rotates heads of {head_width}")


def check_window_pattern(metadata: Metadata, reader: BoundedReader, sizes: Sizes) -> None:
    if sizes.architecture not in WINDOW_PATTERNS:
        return
    key = f"{sizes.architecture}.attention.sliding_window_pattern"
    pattern = metadata.get(key)
    if isinstance(pattern, ArrayValue):
        kinds = set(list_numbers(reader, pattern)[: sizes.n_blocks]) if pattern.element_type != STRING else set()
        complete = pattern.n_elements >= sizes.n_blocks and len(kinds) == 2
    else:
        period = get_integer(metadata, key, smallest=0, default=WINDOW_PATTERNS[sizes.architecture])
        starts_full = sizes.architecture in ARCHITECTURES_BEGINNING_WITH_A_FULL_BLOCK
        complete = period >= 2 and sizes.n_blocks >= (2 if starts_full else period)
    if not complete:
        raise Fault(f"among its {sizes.n_blocks} blocks there are not both full and windowed ones")


def check_experts(metadata: Metadata, architecture: str) -> None:
    n_experts = get_integer(
        metadata, f"{architecture}.expert_count", smallest=0, largest=LARGEST_NUMBER_OF_EXPERTS, default=0
    )
    n_used = get_integer(metadata, f"{architecture}.expert_used_count", smallest=0, default=0)
    if n_used > n_experts or (n_experts and not n_used):
        raise Fault(f"it uses {n_used} of {n_experts} experts")


def check_output_width(metadata: Metadata, sizes: Sizes) -> None:
    """Vectors leave the model as wide as they are inside; dense layers behind it fit together."""
    prefix = f"{sizes.architecture}."
    widths = [get_integer(metadata, f"{prefix}embedding_length_out", default=sizes.n_dims)]
    if f"{prefix}dense_2_feat_out" in metadata or f"{prefix}dense_3_feat_in" in metadata:
        widths.append(get_integer(metadata, f"{prefix}dense_2_feat_in", default=sizes.n_dims))
        widths.append(get_integer(metadata, f"{prefix}dense_3_feat_out", default=sizes.n_dims))
        between = get_integer(metadata, f"{prefix}dense_2_feat_out")
        if between != get_integer(metadata, f"{prefix}dense_3_feat_in"):
            raise Fault("its two dense layers do not fit together")
    if set(widths) != {sizes.n_dims}:
        raise Fault(f"its vectors are wider or narrower than its {sizes.n_dims} dimensions")
    if get_integer(metadata, f"{prefix}nextn_predict_layers", smallest=0, default=0) != 0:
        raise Fault("it has blocks that predict several tokens, which do not embed")


def get_pooling(metadata: Metadata, architecture: str) -> str | None:
    key = f"{architecture}.pooling_type"
    return POOLING_NAMES[get_integer(metadata, key, smallest=0, largest=4)] if key in metadata else None


# Tokenizer


def check_tokenizer(metadata: Metadata, reader: BoundedReader) -> None:
    tokenizer = get_text(metadata, "tokenizer.ggml.model")
    if tokenizer not in TOKENIZERS:
        raise Fault(f"its tokenizer is {tokenizer!r}, known are {', '.join(sorted(TOKENIZERS))}")
    tokens = get_array(metadata, "tokenizer.ggml.tokens", STRING)
    if tokens is None or not tokens.n_elements:
        raise Fault("it has no vocabulary")
    check_tokens_differ(reader, tokens)
    # The engine reads as many types and scores as there are tokens, whatever the lengths of these lists.
    for key, element_type in (("token_type", INT32), ("scores", FLOAT32)):
        array = get_array(metadata, f"tokenizer.ggml.{key}", element_type)
        if array is not None and array.n_elements != tokens.n_elements:
            raise Fault(f"it has {tokens.n_elements} tokens, but {array.n_elements} entries in {key!r}")
    if tokenizer == "gpt2" and get_array(metadata, "tokenizer.ggml.merges", STRING) is None:
        raise Fault("its tokenizer 'gpt2' needs the list of merges, which is missing")
    check_byte_tokens(metadata, reader, tokenizer, tokens)
    if tokenizer in TOKENIZERS_THAT_NEED_BYTES:
        check_every_byte_is_a_token(reader, tokens)
    check_token_ids(metadata, tokenizer, tokens.n_elements)


def check_tokens_differ(reader: BoundedReader, tokens: ArrayValue) -> None:
    """The engine ends a token at its first zero byte, and gives empty ones names of its own."""
    seen = [token.partition(b"\0")[0] for token in list_strings(reader, tokens)]
    named = [token for token in seen if token]
    if len(set(named)) != len(named):
        raise Fault("its vocabulary holds a token twice")


def check_byte_tokens(metadata: Metadata, reader: BoundedReader, tokenizer: str, tokens: ArrayValue) -> None:
    """Tokens that stand for one byte are spelled `<0x0A>`, and only some tokenizers may have them."""
    types = get_array(metadata, "tokenizer.ggml.token_type", INT32)
    if types is None:
        return
    for type_, token in zip(list_numbers(reader, types), list_strings(reader, tokens), strict=True):
        if type_ == BYTE_TOKEN and (
            tokenizer not in TOKENIZERS_WITH_BYTES or not re.fullmatch(rb"<0x[0-9A-Fa-f]{2}>", token)
        ):
            raise Fault(f"its tokenizer {tokenizer!r} has a token marked as a byte that cannot be one")


def check_every_byte_is_a_token(reader: BoundedReader, tokens: ArrayValue) -> None:
    """The engine looks for `<0xC3>`, in capitals and of any type, and then for a token that is the byte itself."""
    known = {token.partition(b"\0")[0] for token in list_strings(reader, tokens)}
    missing = [byte for byte in BYTES_OF_TEXT if known.isdisjoint((f"<0x{byte:02X}>".encode(), bytes([byte])))]
    if missing:
        raise Fault(
            f"its tokenizer spells unknown letters by their bytes, but {len(missing)} bytes have no token, "
            f"'<0x{missing[0]:02X}>' among them"
        )


def get_array(metadata: Metadata, key: str, element_type: int) -> ArrayValue | None:
    value = metadata.get(key)
    if value is not None and not (isinstance(value, ArrayValue) and value.element_type == element_type):
        raise Fault(f"the setting {key!r} is not an array of the expected type")
    return value


def check_token_ids(metadata: Metadata, tokenizer: str, n_tokens: int) -> None:
    """Ids of special tokens, stated or assumed by the engine, lie in the vocabulary."""
    for key in metadata:
        if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key):
            get_integer(metadata, key, smallest=0, largest=n_tokens - 1)
    for role, assumed in ASSUMED_TOKEN_IDS[tokenizer].items():
        if f"tokenizer.ggml.{role}_token_id" not in metadata and assumed >= n_tokens:
            raise Fault(f"it has {n_tokens} tokens and does not name its {role} token")


# Tensors against settings


def count_tokens(metadata: Metadata) -> int:
    tokens = get_array(metadata, "tokenizer.ggml.tokens", STRING)
    return tokens.n_elements if tokens else 0


def check_shapes(metadata: Metadata, tensors: Mapping[str, TensorEntry], sizes: Sizes) -> None:
    expect_shape(tensors, "token_embd.weight", (sizes.n_dims, count_tokens(metadata)))
    if sizes.architecture == "bert":
        check_shapes_of_bert(metadata, tensors, sizes)
    if get_pooling(metadata, sizes.architecture) == "rank" and not tensors.keys() & {"cls.weight", "cls.output.weight"}:
        raise Fault("it asks for rank pooling, but has no classifier ('cls.output.weight')")


def expect_shape(
    tensors: Mapping[str, TensorEntry], name: str, shape: tuple[int, ...], *, optional: bool = False
) -> None:
    tensor = tensors.get(name)
    if tensor is None and optional:
        return
    if tensor is None:
        raise Fault(f"the tensor {name!r} is missing")
    if tensor.shape != shape:
        raise Fault(f"the tensor {name!r} has the shape {tensor.shape}, the settings imply {shape}")


def check_shapes_of_bert(metadata: Metadata, tensors: Mapping[str, TensorEntry], sizes: Sizes) -> None:
    n_dims = sizes.n_dims
    n_feed_forward = get_integer(metadata, "bert.feed_forward_length")
    n_token_types = get_integer(metadata, "tokenizer.ggml.token_type_count")
    expect_shape(tensors, "position_embd.weight", (n_dims, sizes.context_length))
    expect_shape(tensors, "token_types.weight", (n_dims, n_token_types), optional=True)
    for name in ("token_embd_norm.weight", "token_embd_norm.bias"):
        expect_shape(tensors, name, (n_dims,))
    for block in range(sizes.n_blocks):
        for name, shape in list_block_shapes_of_bert(tensors, block, n_dims, n_feed_forward):
            expect_shape(tensors, f"blk.{block}.{name}.weight", shape)
            expect_shape(tensors, f"blk.{block}.{name}.bias", shape[-1:], optional=not name.endswith("_norm"))


def list_block_shapes_of_bert(
    tensors: Mapping[str, TensorEntry], block: int, n_dims: int, n_feed_forward: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Layers of one block, whose query, key and value may lie in one matrix or in three."""
    if f"blk.{block}.attn_qkv.weight" in tensors:
        attention: list[tuple[str, tuple[int, ...]]] = [("attn_qkv", (n_dims, 3 * n_dims))]
    else:
        attention = [(name, (n_dims, n_dims)) for name in ("attn_q", "attn_k", "attn_v")]
    return [
        *attention,
        ("attn_output", (n_dims, n_dims)),
        ("attn_output_norm", (n_dims,)),
        ("ffn_up", (n_dims, n_feed_forward)),
        ("ffn_down", (n_feed_forward, n_dims)),
        ("layer_output_norm", (n_dims,)),
    ]


# Summary


def summarise(metadata: Metadata, tensors: Mapping[str, TensorEntry], sizes: Sizes, size_in_bytes: int) -> GgufSummary:
    architecture = sizes.architecture
    max_seq_length = metadata.get("llama_embeddings.max_seq_length")
    return GgufSummary(
        architecture=architecture,
        name=get_text(metadata, "general.name"),
        licence=get_text(metadata, "general.license"),
        n_dims=sizes.n_dims,
        n_blocks=sizes.n_blocks,
        n_heads=sizes.n_heads,
        context_length=sizes.context_length,
        pooling=get_pooling(metadata, architecture),
        causal=get_flag(metadata, f"{architecture}.attention.causal"),
        file_type=name_file_type(tensors),
        tokenizer=str(metadata["tokenizer.ggml.model"]),
        n_tokens_vocabulary=count_tokens(metadata),
        lower_case=get_flag(metadata, "tokenizer.ggml.normalizer.lowercase"),
        strip_accents=get_flag(metadata, "tokenizer.ggml.normalizer.strip_accents"),
        has_bos="tokenizer.ggml.bos_token_id" in metadata,
        has_eos="tokenizer.ggml.eos_token_id" in metadata,
        has_cls="tokenizer.ggml.cls_token_id" in metadata,
        has_sep="tokenizer.ggml.seperator_token_id" in metadata,
        add_bos=get_flag(metadata, "tokenizer.ggml.add_bos_token"),
        add_eos=get_flag(metadata, "tokenizer.ggml.add_eos_token"),
        add_sep=get_flag(metadata, "tokenizer.ggml.add_sep_token"),
        max_seq_length=max_seq_length if isinstance(max_seq_length, int) else None,
        n_parameters=sum(tensor.n_elements for tensor in tensors.values()),
        size_in_bytes=size_in_bytes,
    )


def name_file_type(tensors: Mapping[str, TensorEntry]) -> str:
    """The type that holds most of the parameters: what the file states of itself is often absent or wrong."""
    elements: dict[int, int] = {}
    for tensor in tensors.values():
        elements[tensor.type] = elements.get(tensor.type, 0) + tensor.n_elements
    return gguf.GGMLQuantizationType(max(elements, key=lambda type_: elements[type_])).name
