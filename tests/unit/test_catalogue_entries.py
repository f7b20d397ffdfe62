"""The catalogue's records, and the addresses that become records."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from llama_embeddings.catalogue import default_model
from llama_embeddings.catalogue.conversion import QUANTISATIONS
from llama_embeddings.catalogue.downloads import Downloads, check_name
from llama_embeddings.catalogue.entries import ENTRIES, CatalogueEntry, HubConversion, HubFile, ModelKind
from llama_embeddings.catalogue.gguf_check import POOLING_NAMES
from llama_embeddings.errors import InvalidInput

WANTED = {
    "all-MiniLM-L6-v2",
    "all-MiniLM-L12-v2",
    "all-MiniLM-L6-v1",
    "nomic-embed-text-v1.5",
    "bge-m3",
    "mxbai-embed-large-v1",
    "Qwen3-Embedding-0.6B",
    "embeddinggemma-300m",
    "snowflake-arctic-embed-l-v2.0",
    "bge-reranker-v2-m3",
    "llama2_7b_chat_uncensored",
}
FACTS = Path(__file__).parents[2] / "docs" / "decisions" / "0005-catalogue-facts.md"


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path, allowed_hosts=frozenset({"huggingface.co", "127.0.0.1"}), max_bytes=1_000_000)


def test_every_wanted_model_is_known_and_the_default_comes_first() -> None:
    """The models that the catalogue must have."""
    assert set(ENTRIES) == WANTED
    assert next(iter(ENTRIES)) == default_model.MODEL_NAME


def test_records_cannot_be_changed() -> None:
    """Frozen, and the mapping with them."""
    entry = ENTRIES["bge-m3"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ENTRIES["other"] = entry  # type: ignore[index]


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_record_is_well_formed(entry: CatalogueEntry) -> None:
    """Names are file names, digests and revisions have their lengths, sizes and poolings are possible."""
    assert check_name(entry.name) == entry.name
    assert entry.pooling is None or entry.pooling in POOLING_NAMES.values()
    source = entry.source
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
    assert re.fullmatch(r"main|[0-9a-f]{40}", source.revision)
    if isinstance(source, HubFile):
        assert source.file_name.endswith(".gguf")
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.size_in_bytes is None or source.size_in_bytes > 10_000_000
    else:
        assert source.quantisation in QUANTISATIONS


def test_default_model_is_recorded_as_it_is_made() -> None:
    """One source of facts for the default model."""
    source = ENTRIES[default_model.MODEL_NAME].source
    assert isinstance(source, HubConversion)
    assert dict(source.file_digests or {}) == default_model.SHA256_DIGESTS
    assert source.revision == default_model.HUB_REVISION


def test_reranker_is_recorded_as_one() -> None:
    """Embeddings of a reranker mean nothing, so it must not be offered for them."""
    assert [entry.name for entry in ENTRIES.values() if entry.kind is ModelKind.RERANKER] == ["bge-reranker-v2-m3"]
    assert ENTRIES["bge-reranker-v2-m3"].pooling == "rank"


def test_prompts_end_where_the_text_begins() -> None:
    """A prompt without its closing blank is another prompt; Qwen3's has none."""
    prompts = [p for e in ENTRIES.values() for p in (e.query_prompt, e.document_prompt) if p]
    assert len(prompts) == 7
    assert all(prompt.endswith((" ", "Query:")) for prompt in prompts)


def test_facts_page_names_every_digest_and_revision() -> None:
    """Nothing is claimed that the page does not account for."""
    page = FACTS.read_text("utf-8")
    for entry in ENTRIES.values():
        assert f"`{entry.name}`" in page
        claims = [entry.source.repository]
        if entry.source.revision != "main":
            claims.append(entry.source.revision)
        if isinstance(entry.source, HubFile):
            claims += [claim for claim in (entry.source.file_name, entry.source.sha256) if claim]
        assert [claim for claim in claims if claim not in page] == []


# Addresses


@pytest.mark.parametrize(
    ("address", "file"),
    [
        (
            "https://huggingface.co/some-owner/some.repo/resolve/main/tiny.Q8_0.gguf",
            HubFile("some-owner/some.repo", "tiny.Q8_0.gguf", "main"),
        ),
        (
            "https://huggingface.co/o/r/blob/v1.0/folder/tiny.Q8_0.gguf?download=true",
            HubFile("o/r", "folder/tiny.Q8_0.gguf", "v1.0"),
        ),
        (
            "https://HuggingFace.co/o/r/resolve/refs%2Fpr%2F3/tiny.Q8_0.gguf",
            HubFile("o/r", "tiny.Q8_0.gguf", "refs/pr/3"),
        ),
        (
            "http://127.0.0.1:8080/o/r/resolve/main/tiny.Q8_0.gguf",
            HubFile("o/r", "tiny.Q8_0.gguf", "main", endpoint="http://127.0.0.1:8080"),
        ),
    ],
)
def test_address_becomes_a_record_named_after_the_file(downloads: Downloads, address: str, file: HubFile) -> None:
    """Both forms of the hub's addresses, with and without what its buttons add."""
    entry = downloads.parse_address(address)
    assert entry == CatalogueEntry(name="tiny.Q8_0", kind=ModelKind.EMBEDDING, source=file)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://huggingface.co/o/r/resolve/main/m.gguf", "https://"),
        ("ftp://huggingface.co/o/r/resolve/main/m.gguf", "https://"),
        ("file:///etc/passwd.gguf", "https://"),
        ("huggingface.co/o/r/resolve/main/m.gguf", "https://"),
        ("", "https://"),
        ("https://example.org/o/r/resolve/main/m.gguf", "'example.org' is not among the allowed"),
        ("https://huggingface.co.example.org/o/r/resolve/main/m.gguf", "not among the allowed"),
        ("https://169.254.169.254/o/r/resolve/main/m.gguf", "not among the allowed"),
        ("http://localhost/o/r/resolve/main/m.gguf", "not among the allowed"),
        ("https://huggingface.co@example.org/o/r/resolve/main/m.gguf", "user"),
        ("https://me:secret@huggingface.co/o/r/resolve/main/m.gguf", "user"),
        ("https://huggingface.co:8443/o/r/resolve/main/m.gguf", "port"),
        ("https://huggingface.co:0/o/r/resolve/main/m.gguf", "port"),
        ("https://huggingface.co:99999/o/r/resolve/main/m.gguf", "malformed"),
        ("https://[huggingface.co/o/r/resolve/main/m.gguf", "malformed"),
        ("https://huggingface.co/o/r/resolve/main/m.safetensors", ".gguf"),
        ("https://huggingface.co/o/r/resolve/main/m.GGUF", ".gguf"),
        ("https://huggingface.co/o/r/tree/main/m.gguf", "path"),
        ("https://huggingface.co/r/resolve/main/m.gguf", "path"),
        ("https://huggingface.co/datasets/o/r/resolve/main/m.gguf", "path"),
        ("https://huggingface.co/o/r/resolve/main/../../m.gguf", "leaves the repository"),
        ("https://huggingface.co/o/r/resolve/main/%2e%2e/m.gguf", "leaves the repository"),
        ("https://huggingface.co/o/r/resolve/main/a%2F..%2Fm.gguf", "leaves the repository"),
        ("https://huggingface.co/o/r/resolve/main//m.gguf", "leaves the repository"),
        ("https://huggingface.co/o/r/resolve/main/m%00.gguf", "leaves the repository"),
        ("https://huggingface.co/../r/resolve/main/m.gguf", "repository"),
        ("https://huggingface.co/o/r--s/resolve/main/m.gguf", "repository"),
        ("https://huggingface.co/o/r/resolve/..%2Fx/m.gguf", "revision"),
        ("https://huggingface.co/o/r/resolve/-x/m.gguf", "revision"),
        ("https://huggingface.co/o/r/resolve/main/.gguf", "name"),
        ("https://huggingface.co/o/r/resolve/main/.hidden.gguf", "name"),
        ("https://huggingface.co/o/r/resolve/main/a%20b.gguf", "name"),
        ("https://huggingface.co/o/r/resolve/main/" + "m" * 129 + ".gguf", "name"),
        ("https://huggingface.co/o/r/resolve/main/m.gguf?token=x", "query"),
        ("https://huggingface.co/o/r/resolve/main/m.gguf#x", "fragment"),
        ("https://huggingface.co/o/r/resolve/main/m\n.gguf", "characters"),
        ("https://huggingface.co\\@example.org/o/r/resolve/main/m.gguf", "characters"),
        ("https://huggingface.co/o/r/resolve/main/ü.gguf", "characters"),
        ("https://huggingface.co/o/r/resolve/main/" + "m/" * 2048 + "m.gguf", "too long"),
        ("https://huggingface.co/o/r/resolve/main/m-00001-of-00003.gguf", "one part of several"),
        ("https://huggingface.co/o/r/resolve/main/all-MiniLM-L6-v2.gguf", "of the catalogue"),
    ],
)
def test_other_addresses_are_refused_with_the_reason(downloads: Downloads, address: str, reason: str) -> None:
    """Whatever is not the address of a GGUF on an allowed host names what is wrong with it."""
    with pytest.raises(InvalidInput, match=re.escape(reason)) as refusal:
        downloads.parse_address(address)
    assert refusal.value.field == "model_url"
