"""Rows to files: the six JSON orientations against pandas itself, zip archives and file names."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any
from urllib.parse import unquote

import numpy as np
import orjson
import pandas
import pytest

from llama_embeddings.documents.export import (
    Batch,
    content_disposition,
    describe_rows,
    plan_json,
    safe_file_name,
    zip_single_file,
)
from llama_embeddings.errors import InvalidInput

ORIENTATIONS = ["records", "split", "index", "columns", "values", "table"]
TEXTS = ["The boats came home.", 'Größe "5 €"\n\ttab', "風が強くなった。", "emoji 🌬 \u2028 \\ /", ""]


def make_rows() -> list[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(7)
    vectors = generator.standard_normal((len(TEXTS), 16)).astype(np.float32)
    vectors[0, :4] = [1e-30, -3.4e38, 0.0, 1.0]
    return list(zip(TEXTS, vectors, strict=True))


def render(rows: list[tuple[str, np.ndarray]], *, label: str, json_format: str) -> bytes:
    """As a reply does."""
    vectors = np.array([vector for _, vector in rows])
    described = describe_rows([text for text, _ in rows], vectors, label=label, json_format=json_format)
    return orjson.dumps(described, option=orjson.OPT_SERIALIZE_NUMPY)


def render_by_pandas(rows: list[tuple[str, np.ndarray]], label: str, orientation: Any) -> str:
    columns = {label: [text for text, _ in rows], "embedding": [vector.tolist() for _, vector in rows]}
    return str(pandas.DataFrame(columns).to_json(orient=orientation))


def read_by_pandas(rendered: str, orientation: Any) -> pandas.DataFrame:
    return pandas.read_json(io.StringIO(rendered), orient=orientation)


def describe_structure(value: Any) -> Any:
    """The value with every list of numbers replaced by its length."""
    if isinstance(value, dict):
        return {key: describe_structure(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, float | int) for item in value) and len(value) == 16:
        return len(value)
    return [describe_structure(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("label", ["text", "token"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pandas_reads_every_orientation_back_to_the_same_float32(orientation: str, label: str) -> None:
    """Texts are equal and vectors are equal bit by bit."""
    rows = make_rows()
    frame = read_by_pandas(render(rows, label=label, json_format=orientation).decode(), orientation)
    texts, vectors = frame.iloc[:, 0].tolist(), frame.iloc[:, 1].tolist()
    assert texts == TEXTS
    for (_, expected), vector in zip(rows, vectors, strict=True):
        np.testing.assert_array_equal(np.array(vector, dtype=np.float32), expected)


@pytest.mark.parametrize("label", ["text", "token"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_structure_is_what_pandas_writes(orientation: str, label: str) -> None:
    """Keys, their order, index, texts and schema are the same; only the numbers have more digits."""
    rows = make_rows()
    ours = json.loads(render(rows, label=label, json_format=orientation))
    theirs = json.loads(render_by_pandas(rows, label, orientation))
    assert json.dumps(describe_structure(ours)) == json.dumps(describe_structure(theirs))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_no_rows_are_a_valid_file_too(orientation: str) -> None:
    """It reads back as a table without rows, and, but for the schema's types, is what pandas writes."""
    rendered = render([], label="text", json_format=orientation).decode()
    assert len(read_by_pandas(rendered, orientation)) == 0
    if orientation != "table":
        assert json.loads(rendered) == json.loads(render_by_pandas([], "text", orientation))


def test_the_empty_string_means_records() -> None:
    """As with the first version of the service, where no format was given."""
    rows = make_rows()
    assert render(rows, label="text", json_format="") == render(rows, label="text", json_format="records")


def test_records_are_the_same_at_once_and_in_parts() -> None:
    """A matrix is written at once, a document part by part."""
    rows = make_rows()
    [part] = plan_json("records", {"text": "string", "embedding": "string"}, len(rows))
    columns: dict[str, Any] = {"text": TEXTS, "embedding": [vector for _, vector in rows]}
    assert (
        render(rows, label="text", json_format="records")
        == part.opening + part.render(Batch(0, columns)) + part.closing
    )


def test_numbers_are_the_shortest_that_give_the_same_float32() -> None:
    """0.1 as float32 is written 0.1 and not 0.10000000149011612."""
    rendered = render([("a", np.array([0.1, 0.3], np.float32))], label="text", json_format="values")
    assert rendered == b'[["a",[0.1,0.3]]]'


def test_an_unknown_orientation_is_refused_with_the_six_that_exist() -> None:
    """The message can be acted on."""
    with pytest.raises(InvalidInput) as raised:
        render([], label="text", json_format="sideways")
    assert raised.value.field == "json_format"
    assert all(orientation in raised.value.message for orientation in ORIENTATIONS)


def test_lone_surrogates_of_a_tokeniser_do_not_stop_the_export() -> None:
    """They become the replacement character; real pairs stay."""
    rows = [("a\ud83d", np.zeros(2, np.float32)), ("🌬", np.zeros(2, np.float32))]
    rendered = json.loads(render(rows, label="token", json_format="records"))
    assert [row["token"] for row in rendered] == ["a\ufffd", "🌬"]


def test_rows_of_a_matrix_that_is_not_contiguous_are_rendered() -> None:
    """Slices with steps and other types of floats are copied first."""
    matrix = np.arange(8, dtype=np.float64).reshape(2, 4)[:, ::2]
    described = describe_rows(["a"], matrix[1:], label="text", json_format="values")
    assert orjson.dumps(described) == b'[["a",[4.0,6.0]]]'


def test_a_zip_holds_one_file_and_is_the_same_every_time() -> None:
    """Names in all scripts survive, and no clock enters."""
    content = b"embedding " * 1000
    archive = zip_single_file("../Größe 風.json", content)
    assert archive == zip_single_file("../Größe 風.json", content)
    assert len(archive) < len(content) / 5
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert opened.namelist() == ["Größe 風.json"]
        assert opened.read("Größe 風.json") == content
        assert opened.testzip() is None


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("report.pdf", "report.pdf"),
        ("Größe 風 отчёт.txt", "Größe 風 отчёт.txt"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\clara\\report.pdf", "report.pdf"),
        ('say "hi"\r\nX-Evil: 1.txt', "say _hi_ X-Evil_ 1.txt"),
        ("a\x00b\x1b\u202ec.txt", "abc.txt"),
        ("", "document"),
        ("..", "document"),
        (" . ", "document"),
        ("folder/", "document"),
        (".hidden", "hidden"),
        ("broken\ud83d.txt", "broken\ufffd.txt"),
    ],
)
def test_file_names_become_harmless(name: str, safe: str) -> None:
    """No directory, control character or quote is left, and every script's letters are."""
    assert safe_file_name(name) == safe


@pytest.mark.parametrize("letter", ["a", "風", "🌬"])
def test_very_long_names_are_cut_between_characters_and_keep_their_ending(letter: str) -> None:
    """File systems count bytes, not characters."""
    shortened = safe_file_name(letter * 500 + ".json")
    assert len(shortened.encode()) <= 200
    assert shortened.endswith(letter + ".json")


@pytest.mark.parametrize(
    "name", ["report.pdf", "Größe 風 100%.zip", 'x"; filename="evil.exe', "a\r\nSet-Cookie: b=c.txt"]
)
def test_content_disposition_carries_the_real_name_and_an_ascii_one(name: str) -> None:
    """The header is ASCII on one line, and its extended part decodes to the safe name."""
    header = content_disposition(name)
    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
    assert unquote(header.partition("filename*=UTF-8''")[2]) == safe_file_name(name)


def test_the_ascii_name_keeps_what_ascii_can_say() -> None:
    """Accents go, other scripts become underscores."""
    assert 'filename="Grosse__e.txt"' in content_disposition("Grosse風_é.txt")
