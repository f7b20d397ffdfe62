"""What holds for any input, tried by hypothesis: tokens, sentences, recipes, model files, documents.

Each property is a strategy and a check. `test_fuzz.py` tries each for a moment, `make fuzz` at length.
"""

from __future__ import annotations

import faulthandler
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embeddings_data_models import Recipe, recipe_family
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.documents.extraction import extract_text
from llama_embeddings.documents.sentences import split_into_sentences
from llama_embeddings.errors import ModelUnusable, ServiceError
from llama_embeddings.inference.llama_backend import LlamaBackend, LlamaModel
from tests.office_writing import write_docx, write_epub, write_odt, write_pptx, write_xlsx
from tests.pdf_writing import write_text_pdf
from tests.serving import get_models_directory
from tests.tiny_models import write_tiny_model

# No input of this size may take longer, on a busy machine neither.
LONGEST_SECONDS = 20.0
# After this, the place where it hangs is written to stderr and the process ends.
HANGING_SECONDS = 120.0

ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=400)
# What tells tokenisers and splitters apart: marks, joiners, directions, widths, dots, breaks.
AWKWARD_PARTS = [
    *"aA1.!?…。！？।:;,'\"“”()[]-–\n\r\t \x0b\x0c\x1c\x85\xa0\u2028\u2029\u3000İßﷺ",
    *("\u0301", "\u200d", "\u200b", "\u202e", "\ufeff", "\ufffd", "\U0001f469\u200d\U0001f4bb", "\U000e0001"),
    *("[SEP]", "##ing", "</s>", "<|endoftext|>", "Dr. ", "e.g. ", "U.S. ", "...", "http://a.b/c?d "),
    *("한국어", "今日は", "हिन्दी", "ไทย"),
]
AWKWARD_TEXT = st.lists(st.sampled_from(AWKWARD_PARTS), max_size=120).map("".join)
TEXT = st.one_of(ANY_TEXT, AWKWARD_TEXT)


# Models and tokens


@functools.cache
def load_default_model() -> LlamaModel:
    path = get_models_directory() / "all-MiniLM-L6-v2.gguf"
    return LlamaBackend().load(path, name=path.stem, digest="", max_window=512, pooling=None)


@functools.cache
def load_byte_model() -> LlamaModel:
    """A decoder whose vocabulary has every byte, so that nothing of a text is lost in its tokens."""
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_model(Path(directory) / "bytes.gguf", "qwen2", "last")
        return LlamaBackend().load(path, name="bytes", digest="", max_window=512, pooling=None)


def check_word_pieces(text: str) -> None:
    """Ids are in the vocabulary; places in the text follow each other, none is cut out of a character."""
    model = load_default_model()
    tokens, spans = model.tokenize(text), model.token_spans(text)
    assert len(tokens) == len(spans) == len(model.token_texts(tokens))
    assert tokens.dtype == np.int32
    assert np.all((tokens >= 0) & (tokens < model.info.n_vocabulary))
    encoded = text.encode("utf-8")
    known = [span for span in spans if span is not None]
    for start, end in known:
        assert 0 <= start < end <= len(encoded)
        encoded[start:end].decode("utf-8")
    starts = [start for start, _ in known]
    assert starts == sorted(starts)
    assert np.array_equal(model.tokenize(text), tokens)


def check_byte_tokens(text: str) -> None:
    """What is taken apart and put together again is the same text."""
    model = load_byte_model()
    tokens = model.tokenize(text)
    assert np.all((tokens >= 0) & (tokens < model.info.n_vocabulary))
    assert model.detokenize(tokens.tolist()) == text
    spans = model.token_spans(text)
    assert len(spans) == len(tokens)
    assert b"".join(text.encode("utf-8")[start:end] for start, end in filter(None, spans)) == text.encode("utf-8")


# Sentences and documents


def check_sentences(text: str) -> None:
    """In order, each at the place that it names; no letter and no digit is lost between them."""
    try:
        document = extract_text(text.encode("utf-8"))
    except ServiceError as error:
        assert error.message  # noqa: PT017 - a refusal is an answer, too
        return
    end_before = 0
    for sentence in split_into_sentences(document, minimum_length=1):
        assert end_before <= sentence.start < sentence.end <= len(document.text)
        assert not has_word(document.text[end_before : sentence.start])
        end_before = sentence.end
    assert not has_word(document.text[end_before:])


def has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def check_document(data: bytes) -> None:
    """Text or a refusal that says why; no other exception."""
    try:
        document = extract_text(data)
    except ServiceError as error:
        assert error.message  # noqa: PT017
        return
    document.text.encode("utf-8")
    split_into_sentences(document, minimum_length=1)


@functools.cache
def make_documents() -> list[bytes]:
    lines = ["The ferry leaves at noon.", "Cold rain falls on seven quiet harbours.", "", "Nobody waits for it."]
    return [
        write_text_pdf([lines, lines]),
        "\n".join(lines * 5).encode("utf-16"),
        "\r\n".join(lines).encode("cp1252"),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(200),
        b"{\\rtf1 text}",
        b"<html><body><p>Text</p></body></html>",
        write_docx(),
        write_pptx(),
        write_xlsx(),
        write_odt(),
        write_epub(),
    ]


MARKUP_PARTS = [
    *(
        "<p>",
        "</p>",
        "<table><tr><td>",
        "</td></tr></table>",
        "<!DOCTYPE html>",
        "<![CDATA[",
        "<!--",
        "-->",
        "<script>",
    ),
    *("{\\rtf1\\ansi ", "{", "}", "\\par ", "\\u8364?", "\\'e9", "\\bin99 ", "&amp;", "&#0;", "&#x110000;", "&lol;"),
    *(
        "# ",
        "| a | b |\n|---|---|\n",
        "```\n",
        "[a](b)",
        "**a**",
        "- ",
        '"a","b"\n',
        "a;b;c\n",
        '""',
        "---\n",
        "\n",
        " ",
    ),
    *("Some words. ", "Nobody waits for it. ", "a", "1.5", "é", "今日は"),
]
MARKED_UP = st.tuples(
    st.sampled_from(
        ["", "<!DOCTYPE html><html><body>", "{\\rtf1\\ansi ", "# Title\n\n**bold** [a](b)\n\n", "a,b\n1,2\n3,4\n"]
    ),
    st.lists(st.sampled_from(MARKUP_PARTS), max_size=80).map("".join),
).map(lambda parts: "".join(parts).encode())


@st.composite
def draw_changed(draw: st.DrawFn, make_originals: Callable[[], list[bytes]]) -> bytes:
    """One of the originals with bytes changed, taken out or put in, or cut short."""
    data = bytearray(draw(st.sampled_from(make_originals())))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(data)))
        change = draw(st.binary(max_size=8))
        match draw(st.sampled_from(["write", "insert", "remove", "cut"])):
            case "write":
                data[place : place + len(change)] = change
            case "insert":
                data[place:place] = change
            case "remove":
                del data[place : place + len(change) ** 2]
            case "cut":
                del data[place:]
    return bytes(data)


# Recipes

RECIPES = st.builds(
    Recipe,
    model_digest=st.sampled_from(["0" * 64, "1" * 64]),
    pooling=st.sampled_from(["mean", "cls", "last", "tokens"]),
    prompt=st.one_of(st.sampled_from(["", "query: ", "query:", ":", "\0"]), ANY_TEXT),
    normalisation=st.sampled_from(["l2", "none"]),
)


def check_recipes(pair: tuple[Recipe, Recipe]) -> None:
    """Different recipes have different families; a cut text's recipe has its family and is another."""
    one, other = pair
    assert (one.family == other.family) == (one == other)
    cut = one.for_cut_text("right", 512)
    assert recipe_family(cut) == one.family != cut
    assert cut != one.for_cut_text("right", 256) != one.for_cut_text("left", 256)


# Model files


@functools.cache
def make_model_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        return [
            write_tiny_model(path, architecture, n_dims=32, context_length=32).read_bytes()
            for architecture in ("bert", "qwen3", "modern-bert")
        ]


@functools.cache
def find_header_length(content: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        return int(gguf.GGUFReader(file.name).data_offset)


@st.composite
def draw_model_file(draw: st.DrawFn) -> bytes:
    """A model with numbers written over places of its description, or a description out of nothing."""
    if draw(st.integers(0, 9)) == 0:
        return b"GGUF\x03\0\0\0" + draw(st.binary(max_size=300))
    original = draw(st.sampled_from(make_model_files()))
    data = bytearray(original)
    header = find_header_length(original)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, header))
        size = draw(st.sampled_from([1, 4, 8]))
        value = draw(st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)))
        data[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data[: draw(st.sampled_from([len(data), len(data), len(data), place]))])


def check_model_file(data: bytes) -> None:
    """Accepted or refused with the file's name; no other exception, no endless reading."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        path.write_bytes(data)
        try:
            check_gguf(path)
        except ModelUnusable as error:
            assert "model.gguf" in error.message  # noqa: PT017


# All of them


@dataclass(frozen=True)
class Property:
    """`strategy` draws what `check` takes; `cost` divides the number of examples."""

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    cost: int = 1


@dataclass(frozen=True)
class Outcome:
    n_examples: int
    seconds: float
    longest_seconds: float


PROPERTIES = [
    Property("word pieces of any text", TEXT, check_word_pieces),
    Property("tokens of bytes, and back", TEXT, check_byte_tokens),
    Property("sentences of any text", TEXT, check_sentences, cost=4),
    Property("documents, changed", draw_changed(make_documents), check_document, cost=4),
    Property("documents of markup", MARKED_UP, check_document, cost=4),
    Property("documents of any bytes", st.binary(max_size=2000), check_document, cost=4),
    Property("recipes", st.tuples(RECIPES, RECIPES), check_recipes),
    Property("model files, changed", draw_model_file(), check_model_file, cost=4),
]


def try_property(prop: Property, *, n_examples: int) -> Outcome:
    """Draw and check; raises what a failing example raises, with the smallest one found."""
    count, longest, started = 0, 0.0, time.monotonic()

    @settings(
        max_examples=max(1, n_examples // prop.cost),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(prop.strategy)
    def check(value: Any) -> None:
        nonlocal count, longest
        faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)
        begun = time.monotonic()
        try:
            prop.check(value)
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - begun
        count, longest = count + 1, max(longest, seconds)
        assert seconds < LONGEST_SECONDS, f"{seconds:.1f} s for one example"

    check()
    return Outcome(count, time.monotonic() - started, longest)
