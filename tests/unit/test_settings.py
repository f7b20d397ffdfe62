"""Settings: where a value comes from, what is refused, and that a refusal is one line that names the setting."""

from __future__ import annotations

from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest

from llama_embeddings.errors import ConfigurationError
from llama_embeddings.settings import Settings, find_env_file, is_loopback, load_settings, setting_fields

FIELDS = {field.metadata["name"]: field for field in setting_fields()}
INTEGERS = [name for name, field in FIELDS.items() if field.type == "int"]
FLOATS = [name for name, field in FIELDS.items() if field.type == "float"]
BOOLEANS = [name for name, field in FIELDS.items() if field.type == "bool"]
PATHS = [name for name, field in FIELDS.items() if field.type == "Path"]
TEXTS = [name for name, field in FIELDS.items() if field.type == "str"]
MAY_BE_EMPTY = {
    "CL100K_TABLE_PATH",
    "CORS_ALLOWED_ORIGINS",
    "HF_TOKEN",
    "MODEL_ALIASES",
    "SECURITY_TOKEN",
    "SECURITY_TOKENS_FILE",
    "TESSDATA_PREFIX",
    "TRUSTED_PROXIES",
}
# With one of the choices each.
CHOICES = {"TRUNCATION": "right", "LOG_LEVEL": "WARNING", "LOG_FORMAT": "json", "RERANK_METHOD": "maxsim"}
# The least and the greatest value that is taken; None where there is no greatest.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "LLM_CONTEXT_SIZE_IN_TOKENS": (8, 1_048_576),
    "MAX_MODEL_SIZE_IN_GB": (0.001, None),
    "MAX_LOADED_MODELS": (1, None),
    "MAX_LOADED_MODELS_MEMORY_IN_GB": (0, None),
    "MAX_CONCURRENT_PARALLEL_INFERENCE_TASKS": (1, None),
    "MAX_QUEUED_TOKENS": (1, None),
    "INFERENCE_WORKERS": (0, 256),
    "INFERENCE_THREADS_PER_WORKER": (0, 256),
    "INFERENCE_TOKEN_BUDGET": (0, None),
    "EMBEDDING_CACHE_SIZE_IN_MB": (0, None),
    "MAX_TEXT_LENGTH_IN_CHARACTERS": (1, None),
    "MAX_TEXTS_PER_REQUEST": (1, None),
    "MAX_SIMILARITY_MATRIX_CELLS": (1, None),
    "MAX_REQUEST_SIZE_IN_MB": (0.001, None),
    "MAX_REQUEST_SIZES_IN_FLIGHT_IN_MB": (0.001, None),
    "MAX_JSON_VALUES_PER_REQUEST": (1, None),
    "MAX_REQUEST_SECONDS": (0, None),
    "RECEIVE_TIMEOUT_SECONDS": (0.1, None),
    "MAX_CONNECTIONS": (1, None),
    "MAX_REQUESTS_PER_MINUTE": (0, None),
    "MAX_WRONG_TOKENS_PER_MINUTE": (0, None),
    "SLOW_REQUEST_SECONDS": (0, None),
    "MINIMUM_STRING_LENGTH_FOR_DOCUMENT_EMBEDDING": (1, None),
    "MAX_DOCUMENT_PAGES": (1, None),
    "MAX_DOCUMENT_TEXT_IN_MB": (0.001, None),
    "DOCUMENT_TIME_LIMIT_IN_SECONDS": (1, None),
    "DOCUMENT_MEMORY_LIMIT_IN_MB": (256, None),
    "MAX_WAITING_JOBS": (1, None),
    "KEEP_FINISHED_JOBS_HOURS": (0, 87_600),
    "DB_WRITE_BATCH_SIZE": (1, 10_000),
    "MAX_RETRIES": (0, 100),
    "RETRY_DELAY_BASE_SECONDS": (0, 60),
    "JITTER_FACTOR": (0, 1),
    "RAMDISK_SIZE_IN_GB": (0.01, None),
    "LLAMA_EMBEDDING_SERVER_LISTEN_PORT": (0, 65535),
    "READY_TIMEOUT_SECONDS": (0.1, None),
}
BEYOND_BOUNDS = [(name, least - 1) for name, (least, _) in BOUNDS.items()] + [
    (name, greatest + 1) for name, (_, greatest) in BOUNDS.items() if greatest is not None
]
AT_BOUNDS = [(name, bound) for name, bounds in BOUNDS.items() for bound in bounds if bound is not None]
TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.env"
    path.touch()
    return path


def load_with(env_file: Path, **values: Any) -> Settings:
    """Settings from an env file with these lines."""
    env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return load_settings(env_file)


def value_of(settings: Settings, name: str) -> Any:
    return getattr(settings, FIELDS[name].name)


def assert_is_refused(env_file: Path, **values: Any) -> ConfigurationError:
    """The last of the values is refused in one line that begins with its name or holds it."""
    name = list(values)[-1]
    with pytest.raises(ConfigurationError) as refusal:
        load_with(env_file, **values)
    assert refusal.value.field == name
    assert name in refusal.value.message
    assert "\n" not in refusal.value.message
    return refusal.value


# Where a value comes from


def test_every_field_has_a_name_a_default_and_a_description() -> None:
    """Names are unique, and the default is of the field's own type."""
    assert len(FIELDS) == len(setting_fields())
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "Path": str}
    for field in FIELDS.values():
        assert isinstance(field.metadata["default"], kinds[str(field.type)])
        assert field.metadata["description"].endswith(".")


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_default_counts_where_nothing_is_said(env_file: Path, field: Field[Any]) -> None:
    """Parsed as its own text would be."""
    expected = field.metadata["default"]
    found = getattr(load_settings(env_file), field.name)
    assert found == (Path(expected) if field.type == "Path" else expected)


def test_environment_wins_over_the_file_and_the_file_over_the_default(
    env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One setting from each of the three."""
    monkeypatch.setenv("MAX_RETRIES", "3")
    settings = load_with(env_file, MAX_RETRIES=4, MAX_LOADED_MODELS=5)
    assert (settings.max_retries, settings.max_loaded_models, settings.db_write_batch_size) == (3, 5, 25)


def test_what_the_caller_gives_wins_over_everything(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a value that could not be read."""
    monkeypatch.setenv("MAX_RETRIES", "many")
    assert load_settings(env_file, max_retries=7).max_retries == 7


def test_env_file_of_the_working_directory_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the project's own."""
    monkeypatch.chdir(tmp_path)
    found = find_env_file()
    assert found is None or found.parent != tmp_path
    (tmp_path / ".env").write_text("MAX_RETRIES=6\n")
    assert find_env_file() == tmp_path / ".env"
    assert load_settings().max_retries == 6


def test_comments_and_blanks_in_the_file_do_not_count(env_file: Path) -> None:
    """As people write such files."""
    env_file.write_text("# MAX_RETRIES=1\n\n  MAX_RETRIES = 8  \nLOG_LEVEL='DEBUG'\n")
    settings = load_settings(env_file)
    assert (settings.max_retries, settings.log_level) == (8, "DEBUG")


# What is refused


def test_every_number_has_its_bounds_here() -> None:
    """A new setting must be given its rows in this file."""
    assert sorted(BOUNDS) == sorted(INTEGERS + FLOATS)
    assert len(FIELDS) == len(INTEGERS + FLOATS + BOOLEANS + PATHS + TEXTS)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["", "many", "1.5", "0x10", "1e3", "nan", "1 2"])
def test_integer_that_is_none_is_refused(env_file: Path, name: str, value: str) -> None:
    """In one line that names the setting and says what it must be."""
    assert "whole number" in assert_is_refused(env_file, **{name: value}).message


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["", "many", "1,5", "nan", "inf", "-inf", "1e999", "0x10"])
def test_number_that_is_none_is_refused(env_file: Path, name: str, value: str) -> None:
    """Not-a-number and infinity included: no size is unbounded, 0 says so where it may be."""
    assert "must be" in assert_is_refused(env_file, **{name: value}).message


@pytest.mark.parametrize(("name", "value"), BEYOND_BOUNDS)
def test_number_beyond_its_bounds_is_refused_with_the_bound(env_file: Path, name: str, value: float) -> None:
    """The message says what would be taken."""
    assert f"{BOUNDS[name][0]:g}" in assert_is_refused(env_file, **{name: value}).message


@pytest.mark.parametrize(("name", "value"), AT_BOUNDS)
def test_number_at_its_bound_is_taken(env_file: Path, name: str, value: float) -> None:
    """Bounds belong to the range."""
    assert value_of(load_with(env_file, **{name: value}), name) == value


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", ["", "maybe", "2", "truee", "None"])
def test_boolean_that_is_none_is_refused(env_file: Path, name: str, value: str) -> None:
    """A misspelt switch is never taken for off."""
    assert "True or False" in assert_is_refused(env_file, **{name: value}).message


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [(text, True) for text in ("True", "true", "1", "yes", "ON")]
    + [(text, False) for text in ("False", "FALSE", "0", "no", "off")],
)
def test_booleans_are_written_as_people_write_them(env_file: Path, name: str, value: str, expected: bool) -> None:
    """Whatever the case."""
    assert value_of(load_with(env_file, **{name: value}), name) is expected


@pytest.mark.parametrize("name", sorted(CHOICES))
@pytest.mark.parametrize("value", ["", "other", "Refuse", "info"])
def test_choice_that_is_none_is_refused_with_the_choices(env_file: Path, name: str, value: str) -> None:
    """All of them are listed."""
    message = assert_is_refused(env_file, **{name: value}).message
    assert CHOICES[name] in message


@pytest.mark.parametrize("name", sorted(set(PATHS + TEXTS) - MAY_BE_EMPTY))
@pytest.mark.parametrize("value", ["", "   "])
def test_required_text_that_is_empty_is_refused(env_file: Path, name: str, value: str) -> None:
    """An empty path would be the working directory by accident."""
    assert_is_refused(env_file, **{name: value})


@pytest.mark.parametrize("name", sorted(MAY_BE_EMPTY))
def test_optional_text_may_be_empty(env_file: Path, name: str) -> None:
    """It is off then."""
    assert value_of(load_with(env_file, **{name: ""}), name) == ""


def test_home_directory_in_a_path_is_resolved(env_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a shell would."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_with(env_file, MODELS_DIRECTORY="~/models").models_directory == tmp_path / "models"


def test_settings_do_not_change(env_file: Path) -> None:
    """They are read once."""
    with pytest.raises(AttributeError):
        load_settings(env_file).max_retries = 5  # type: ignore[misc]


# Aliases


def test_aliases_are_pairs(env_file: Path) -> None:
    """Blanks and a comma at the end do not count."""
    settings = load_with(env_file, MODEL_ALIASES=" text-embedding-3-small = all-MiniLM-L6-v2 ,short=long-name.v2,")
    assert settings.aliases() == {"text-embedding-3-small": "all-MiniLM-L6-v2", "short": "long-name.v2"}
    assert load_with(env_file, MODEL_ALIASES="").aliases() == {}


@pytest.mark.parametrize("value", ["a", "a=", "=b", "a=b=c", "a b=c", "a=b c", "a=b,,c", "a=b;c=d e"])
def test_alias_that_is_no_pair_is_refused_at_the_start(env_file: Path, value: str) -> None:
    """Not when somebody uses it."""
    assert "alias=model" in assert_is_refused(env_file, MODEL_ALIASES=value).message


# Who may reach the server


@pytest.mark.parametrize(
    ("host", "expected"),
    [(host, True) for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1")]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "")],
)
def test_loopback_addresses_are_those_of_this_machine(host: str, expected: bool) -> None:
    """A name that only might be local is not."""
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_network_address_without_a_token_is_refused(env_file: Path, host: str) -> None:
    """The message says both ways out."""
    message = assert_is_refused(env_file, LISTEN_HOST=host).message
    assert "USE_SECURITY_TOKEN=True" in message
    assert "ALLOW_UNAUTHENTICATED_NETWORK_ACCESS=True" in message


@pytest.mark.parametrize(
    ("values", "requires_token"),
    [
        ({"USE_SECURITY_TOKEN": True}, True),
        ({"SECURITY_TOKEN": TOKEN}, True),
        ({"ALLOW_UNAUTHENTICATED_NETWORK_ACCESS": True}, False),
        ({"ALLOW_UNAUTHENTICATED_NETWORK_ACCESS": True, "SECURITY_TOKEN": TOKEN}, True),
    ],
)
def test_network_address_is_taken_with_a_token_or_on_purpose(
    env_file: Path, values: dict[str, Any], requires_token: bool
) -> None:
    """Setting a token turns asking for it on."""
    settings = load_with(env_file, LISTEN_HOST="0.0.0.0", **values)
    assert settings.requires_token is requires_token


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("127.0.0.1", ["127.0.0.1/32"]),
        (" 10.0.0.0/8 , ::1,172.17.0.1/32,", ["10.0.0.0/8", "::1/128", "172.17.0.1/32"]),
    ],
)
def test_trusted_proxies_are_addresses_and_networks(env_file: Path, value: str, expected: list[str]) -> None:
    """None by default."""
    settings = load_with(env_file, TRUSTED_PROXIES=value)
    assert [str(network) for network in settings.trusted_networks()] == expected


@pytest.mark.parametrize("value", ["proxy", "*", "10.0.0.1/8", "10.0.0.0/40", "127.0.0.1;::1"])
def test_proxy_that_is_no_address_is_refused_at_the_start(env_file: Path, value: str) -> None:
    """A name could be anybody's, and a host's bits in a network are a slip of the pen."""
    assert_is_refused(env_file, TRUSTED_PROXIES=value)


@pytest.mark.parametrize(
    "value", ["http://hub.example", "ftp://hub.example", "hub.example", "https://", "//hub.example"]
)
def test_hub_is_only_asked_over_https(env_file: Path, value: str) -> None:
    """What is downloaded is run as a model; this machine's own addresses are for tests and caches."""
    assert "https://" in assert_is_refused(env_file, HF_ENDPOINT=value).message
    assert load_with(env_file, HF_ENDPOINT="http://127.0.0.1:8080").hub_endpoint == "http://127.0.0.1:8080"
    assert load_with(env_file, HF_ENDPOINT="https://mirror.example/hub").hub_endpoint == "https://mirror.example/hub"


def test_tokens_file_turns_asking_for_tokens_on(env_file: Path) -> None:
    """Whether it can be read is found out when it is read."""
    assert load_with(env_file, LISTEN_HOST="0.0.0.0", SECURITY_TOKENS_FILE="tokens.txt").requires_token


def test_no_token_is_asked_for_on_this_machine_by_default(env_file: Path) -> None:
    """And none is built in."""
    settings = load_settings(env_file)
    assert (settings.requires_token, settings.security_token) == (False, "")


def test_short_token_is_refused_without_being_repeated(env_file: Path) -> None:
    """Messages reach logs; secrets do not."""
    assert "tooshort" not in assert_is_refused(env_file, SECURITY_TOKEN="tooshort").message
    assert load_with(env_file, SECURITY_TOKEN=TOKEN).security_token == TOKEN


def test_settings_given_in_code_are_checked_like_those_read(env_file: Path) -> None:
    """Overrides are no way around the rules."""
    with pytest.raises(ConfigurationError, match="LISTEN_HOST"):
        load_settings(env_file, listen_host="0.0.0.0")


@pytest.mark.parametrize("value", ["eng deu", "--help", "eng+", "../eng", "eng,deu"])
def test_languages_of_scans_are_names_with_plus_between_them(env_file: Path, value: str) -> None:
    """They become an argument of tesseract's."""
    assert "eng+deu" in assert_is_refused(env_file, OCR_LANGUAGES=value).message
    assert load_with(env_file, OCR_LANGUAGES="chi_sim+script/Latin").ocr_languages == "chi_sim+script/Latin"


@pytest.mark.parametrize("value", ["app.example", "https://app.example/path", "ftp://app.example", "https://a b"])
def test_origin_that_is_none_is_refused(env_file: Path, value: str) -> None:
    """A page's address or a bare host would never match what browsers send."""
    assert "CORS_ALLOWED_ORIGINS" in assert_is_refused(env_file, CORS_ALLOWED_ORIGINS=value).message


def test_origins_are_a_list(env_file: Path) -> None:
    """None by default."""
    assert load_with(env_file).allowed_origins() == []
    found = load_with(env_file, CORS_ALLOWED_ORIGINS=" https://a.example:8443 , http://b.example,*,")
    assert found.allowed_origins() == ["https://a.example:8443", "http://b.example", "*"]
