"""The only reader of the environment: one field per setting, each with its default and its meaning.

A value comes from an environment variable, else from the `.env` file, else from the default here. `.env` lists every
setting with its default; README's table is made from the same fields, and a test compares the three.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from decouple import Config, RepositoryEmpty, RepositoryEnv

from llama_embeddings.errors import ConfigurationError

MIN_TOKEN_LENGTH = 16

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PROJECT_DIRECTORY = Path(__file__).resolve().parent.parent


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    try:
        return known[text.strip().lower()]
    except KeyError:
        raise ValueError("must be True or False") from None


def _number(
    kind: type[int] | type[float], minimum: float, maximum: float = float("inf")
) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text.strip())
        except ValueError:
            raise ValueError("must be a whole number" if kind is int else "must be a number") from None
        if math.isinf(value):
            raise ValueError("must be a finite number")
        if not minimum <= value <= maximum:
            bound = f"at least {minimum:g}" if maximum == float("inf") else f"from {minimum:g} to {maximum:g}"
            raise ValueError(f"must be {bound}")
        return value

    return parse


def _text(text: str) -> str:
    return text.strip()


def _required_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _languages(text: str) -> str:
    if not re.fullmatch(r"\w+(?:/\w+)?(?:\+\w+(?:/\w+)?)*", text.strip(), re.ASCII):
        raise ValueError("must hold tesseract's names of languages with + between them, such as eng+deu")
    return text.strip()


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.strip() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text.strip()

    return parse


def _path(text: str) -> Path:
    return Path(_required_text(text)).expanduser()


def _setting(name: str, default: Any, parse: Callable[[str], Any], description: str) -> Any:
    return dataclasses.field(metadata={"name": name, "default": default, "parse": parse, "description": description})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, parsed and checked. Made by `load_settings`."""

    default_model_name: str = _setting(
        "DEFAULT_MODEL_NAME", "all-MiniLM-L6-v2", _required_text, "Model used when a request names none."
    )
    llm_context_size_in_tokens: int = _setting(
        "LLM_CONTEXT_SIZE_IN_TOKENS",
        512,
        _number(int, 8, 1_048_576),
        "Longest text in tokens; caps each model's own window. Larger windows take more memory.",
    )
    truncation: str = _setting(
        "TRUNCATION",
        "refuse",
        _choice("refuse", "right", "left", "split"),
        "What happens to a longer text: refused with an error, cut at its right or left end, or split into parts "
        "that are averaged. Requests can choose for themselves.",
    )
    models_directory: Path = _setting(
        "MODELS_DIRECTORY", "models", _path, "Where the GGUF files lie; each is a model by its file's stem."
    )
    model_aliases: str = _setting(
        "MODEL_ALIASES", "", _text, "Other names for models: `alias=model` pairs, separated by commas."
    )
    download_models_on_demand: bool = _setting(
        "DOWNLOAD_MODELS_ON_DEMAND", True, _boolean, "Fetch a model of the catalogue when it is first asked for."
    )
    hub_endpoint: str = _setting(
        "HF_ENDPOINT", "https://huggingface.co", _required_text, "Address of the model hub, or of a mirror of it."
    )
    hub_token: str = _setting("HF_TOKEN", "", _text, "Your token for the model hub, for models that ask for one.")
    model_hub_hosts: str = _setting(
        "MODEL_HUB_HOSTS",
        "huggingface.co",
        _required_text,
        "Hosts that `/add_new_model/` may take models from, separated by commas.",
    )
    max_model_size_in_gb: float = _setting(
        "MAX_MODEL_SIZE_IN_GB", 20, _number(float, 0.001), "Largest model file that is downloaded."
    )
    max_loaded_models: int = _setting(
        "MAX_LOADED_MODELS", 3, _number(int, 1), "Models in memory at a time; the least recently used leaves first."
    )
    max_loaded_models_memory_in_gb: float = _setting(
        "MAX_LOADED_MODELS_MEMORY_IN_GB", 0, _number(float, 0), "Memory for loaded models in all; 0 for no bound."
    )
    use_parallel_inference_queue: bool = _setting(
        "USE_PARALLEL_INFERENCE_QUEUE", True, _boolean, "Compute many texts together; off means one by one."
    )
    max_concurrent_parallel_inference_tasks: int = _setting(
        "MAX_CONCURRENT_PARALLEL_INFERENCE_TASKS", 256, _number(int, 1), "Texts being computed at the same time."
    )
    max_queued_tokens: int = _setting(
        "MAX_QUEUED_TOKENS",
        500_000,
        _number(int, 1),
        "Tokens that may wait for a model; beyond that, callers get 429 with the time to wait.",
    )
    inference_workers: int = _setting(
        "INFERENCE_WORKERS", 0, _number(int, 0, 256), "Contexts that compute side by side; 0 to measure what is best."
    )
    inference_threads_per_worker: int = _setting(
        "INFERENCE_THREADS_PER_WORKER", 0, _number(int, 0, 256), "Threads of each context; 0 to measure what is best."
    )
    inference_token_budget: int = _setting(
        "INFERENCE_TOKEN_BUDGET", 0, _number(int, 0), "Tokens packed into one pass; 0 to measure what is best."
    )
    embedding_cache_size_in_mb: int = _setting(
        "EMBEDDING_CACHE_SIZE_IN_MB", 16, _number(int, 0), "Memory for recently used embeddings, in front of SQLite."
    )
    max_text_length_in_characters: int = _setting(
        "MAX_TEXT_LENGTH_IN_CHARACTERS", 1_000_000, _number(int, 1), "Longest text accepted at all."
    )
    max_texts_per_request: int = _setting(
        "MAX_TEXTS_PER_REQUEST", 2048, _number(int, 1), "Most texts accepted in one request."
    )
    max_similarity_matrix_cells: int = _setting(
        "MAX_SIMILARITY_MATRIX_CELLS",
        100_000,
        _number(int, 1),
        "Most cells of a similarity matrix, of strings or of tokens, in one request.",
    )
    max_request_size_in_mb: float = _setting(
        "MAX_REQUEST_SIZE_IN_MB", 64, _number(float, 0.001), "Largest request body, documents included."
    )
    rerank_method: str = _setting(
        "RERANK_METHOD",
        "cosine",
        _choice("cosine", "maxsim"),
        "How an embedding model reranks: by the cosine of the texts' vectors, or by MaxSim over their tokens' vectors, "
        "which keeps a row per token. Models that are rerankers give their own scores.",
    )
    cl100k_table_path: str = _setting(
        "CL100K_TABLE_PATH",
        "",
        _text,
        "File `cl100k_base.tiktoken`, by which token ids that OpenAI's clients send are read as text. Without it, only "
        "the model's own ids are taken.",
    )
    cors_allowed_origins: str = _setting(
        "CORS_ALLOWED_ORIGINS",
        "",
        _text,
        "Origins whose web pages may call the server, as `https://host:port` separated by commas, or `*` for all; "
        "none by default.",
    )
    max_request_sizes_in_flight_in_mb: float = _setting(
        "MAX_REQUEST_SIZES_IN_FLIGHT_IN_MB",
        200,
        _number(float, 0.001),
        "Bodies of all requests that are being answered, together; beyond that, callers get 429. Never less than the "
        "largest single one.",
    )
    max_json_values_per_request: int = _setting(
        "MAX_JSON_VALUES_PER_REQUEST",
        500_000,
        _number(int, 1),
        "Values in a request's JSON, where a list or object counts 20 times: they take far more memory than bytes.",
    )
    max_request_seconds: float = _setting(
        "MAX_REQUEST_SECONDS",
        600,
        _number(float, 0),
        "Longest time from a request's last byte to the reply's first; then the work is given up with 503. 0 for none.",
    )
    receive_timeout_seconds: float = _setting(
        "RECEIVE_TIMEOUT_SECONDS",
        20,
        _number(float, 0.1),
        "Time for a request's headers, and for its body; each 10 kB that come in give a body another second. Also the "
        "time after which a client that takes none of its reply is cut off.",
    )
    max_connections: int = _setting(
        "MAX_CONNECTIONS", 2000, _number(int, 1), "Open connections; further ones are closed at once."
    )
    max_requests_per_minute: int = _setting(
        "MAX_REQUESTS_PER_MINUTE",
        0,
        _number(int, 0),
        "Requests of one client (an address; of IPv6 its /64 network) a minute, evenly or in one burst; beyond that, "
        "429. 0 for no bound.",
    )
    minimum_string_length_for_document_embedding: int = _setting(
        "MINIMUM_STRING_LENGTH_FOR_DOCUMENT_EMBEDDING",
        15,
        _number(int, 1),
        "Sentences of a document that are shorter (in characters) are left out.",
    )
    max_document_pages: int = _setting(
        "MAX_DOCUMENT_PAGES", 5_000, _number(int, 1), "Most pages or slides accepted in a document."
    )
    max_document_text_in_mb: float = _setting(
        "MAX_DOCUMENT_TEXT_IN_MB",
        64,
        _number(float, 0.001),
        "Longest text accepted in a document, in millions of characters.",
    )
    document_time_limit_in_seconds: float = _setting(
        "DOCUMENT_TIME_LIMIT_IN_SECONDS", 300, _number(float, 1), "Longest time that a document is read for."
    )
    document_memory_limit_in_mb: int = _setting(
        "DOCUMENT_MEMORY_LIMIT_IN_MB",
        1024,
        _number(int, 256),
        "Memory of each process that reads documents; archives may unpack to half of it.",
    )
    use_ocr: bool = _setting(
        "USE_OCR", False, _boolean, "Read scanned PDFs and images with `tesseract`, where it is installed."
    )
    ocr_languages: str = _setting(
        "OCR_LANGUAGES", "eng", _languages, "Languages of scans, as tesseract names them: `eng`, or `eng+deu` for both."
    )
    tessdata_prefix: str = _setting(
        "TESSDATA_PREFIX", "", _text, "Directory with tesseract's languages, where it is not the one built into it."
    )
    keep_document_files: bool = _setting(
        "KEEP_DOCUMENT_FILES", True, _boolean, "Keep the bytes of submitted documents in the database."
    )
    max_waiting_jobs: int = _setting(
        "MAX_WAITING_JOBS", 100, _number(int, 1), "Documents submitted with `background=true` that may wait their turn."
    )
    keep_finished_jobs_hours: float = _setting(
        "KEEP_FINISHED_JOBS_HOURS", 24, _number(float, 0, 87_600), "How long a finished job can be asked for."
    )
    database_url: str = _setting(
        "DATABASE_URL", "sqlite+aiosqlite:///embeddings.sqlite", _required_text, "Where everything is remembered."
    )
    durability: str = _setting(
        "DURABILITY",
        "process",
        _choice("process", "power"),
        "What an answer survives: `process`, the end of the process, `kill -9` included; `power`, a power cut as well, "
        "at the price of a wait for the disk with every group of writes.",
    )
    read_only_replica: bool = _setting(
        "READ_ONLY_REPLICA",
        False,
        _boolean,
        "Serve searches and stored texts of a database that another server writes to, and write nothing.",
    )
    db_write_batch_size: int = _setting(
        "DB_WRITE_BATCH_SIZE", 25, _number(int, 1, 10_000), "Writes grouped into one transaction at most."
    )
    max_retries: int = _setting(
        "MAX_RETRIES", 10, _number(int, 0, 100), "How often a write is tried again while the database is locked."
    )
    retry_delay_base_seconds: float = _setting(
        "RETRY_DELAY_BASE_SECONDS", 1, _number(float, 0, 60), "Longest pause between the first tries."
    )
    jitter_factor: float = _setting(
        "JITTER_FACTOR",
        0.1,
        _number(float, 0, 1),
        "Share of each pause that is random, so that writers do not march in step.",
    )
    use_ramdisk: bool = _setting("USE_RAMDISK", False, _boolean, "Copy models to a RAM disk and load them from there.")
    ramdisk_path: Path = _setting("RAMDISK_PATH", "/mnt/llama_embeddings_ramdisk", _path, "Where it is mounted.")
    ramdisk_size_in_gb: float = _setting(
        "RAMDISK_SIZE_IN_GB", 1, _number(float, 0.01), "Its size; less is taken when less memory is available."
    )
    listen_host: str = _setting("LISTEN_HOST", "127.0.0.1", _required_text, "Address to listen on.")
    listen_port: int = _setting(
        "LLAMA_EMBEDDING_SERVER_LISTEN_PORT", 8089, _number(int, 0, 65535), "Port to listen on; 0 for any free one."
    )
    use_security_token: bool = _setting(
        "USE_SECURITY_TOKEN",
        False,
        _boolean,
        "Ask callers for a token. With no SECURITY_TOKEN one is made at the first start and printed once.",
    )
    security_token: str = _setting(
        "SECURITY_TOKEN", "", _text, "The token, at least 16 characters. Setting it turns USE_SECURITY_TOKEN on."
    )
    security_tokens_file: str = _setting(
        "SECURITY_TOKENS_FILE",
        "",
        _text,
        "File with further tokens, one a line, each with a name in front if you like; read again when it changes. "
        "Naming it turns USE_SECURITY_TOKEN on.",
    )
    max_wrong_tokens_per_minute: int = _setting(
        "MAX_WRONG_TOKENS_PER_MINUTE",
        30,
        _number(int, 0),
        "Wrong tokens that one public address may try a minute before it is refused with 429. 0 for no bound.",
    )
    trusted_proxies: str = _setting(
        "TRUSTED_PROXIES",
        "",
        _text,
        "Addresses and networks of reverse proxies, separated by commas, whose `X-Forwarded-For`, "
        "`X-Forwarded-Proto` and `client_ip` are believed.",
    )
    security_token_path: Path = _setting(
        "SECURITY_TOKEN_PATH", "security_token", _path, "File that keeps a token made by the server (mode 0600)."
    )
    allow_unauthenticated_network_access: bool = _setting(
        "ALLOW_UNAUTHENTICATED_NETWORK_ACCESS",
        False,
        _boolean,
        "Listen on an address other than this machine's own without asking for a token.",
    )
    metrics_require_token: bool = _setting(
        "METRICS_REQUIRE_TOKEN", True, _boolean, "Ask for the token at `/metrics`, too, where one is asked for."
    )
    ready_timeout_seconds: float = _setting(
        "READY_TIMEOUT_SECONDS", 10, _number(float, 0.1), "Deadline of the embedding that `/ready` makes."
    )
    log_directory: Path = _setting("LOG_DIRECTORY", ".", _path, "Where the log file and `old_logs/` lie.")
    log_level: str = _setting("LOG_LEVEL", "INFO", _choice("DEBUG", "INFO", "WARNING", "ERROR"), "How much is logged.")
    log_format: str = _setting(
        "LOG_FORMAT", "text", _choice("text", "json"), "Lines for people, or one JSON object a line."
    )
    slow_request_seconds: float = _setting(
        "SLOW_REQUEST_SECONDS",
        10,
        _number(float, 0),
        "Requests that take longer are logged with what took the time. 0 for never.",
    )

    def __post_init__(self) -> None:
        if self.security_token and len(self.security_token) < MIN_TOKEN_LENGTH:
            raise ConfigurationError(
                f"SECURITY_TOKEN must have at least {MIN_TOKEN_LENGTH} characters.", setting="SECURITY_TOKEN"
            )
        if not (self.requires_token or self.allow_unauthenticated_network_access or is_loopback(self.listen_host)):
            raise ConfigurationError(
                f"LISTEN_HOST={self.listen_host} can be reached from the network, but no token is asked for. Set "
                "USE_SECURITY_TOKEN=True, or ALLOW_UNAUTHENTICATED_NETWORK_ACCESS=True if that is what you want.",
                setting="LISTEN_HOST",
            )
        self._check_hub_endpoint()
        self.aliases()
        self.allowed_origins()
        self.trusted_networks()

    def _check_hub_endpoint(self) -> None:
        parts = urlsplit(self.hub_endpoint)
        is_local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if not parts.hostname or (parts.scheme != "https" and not is_local):
            raise ConfigurationError("HF_ENDPOINT must begin with https://.", setting="HF_ENDPOINT")

    @property
    def requires_token(self) -> bool:
        return self.use_security_token or bool(self.security_token) or bool(self.security_tokens_file)

    def trusted_networks(self) -> tuple[Network, ...]:
        """TRUSTED_PROXIES as networks. Raises ConfigurationError for what is neither an address nor a network."""
        places = [place.strip() for place in self.trusted_proxies.split(",") if place.strip()]
        try:
            return tuple(ipaddress.ip_network(place) for place in places)
        except ValueError as error:
            raise ConfigurationError(
                f"TRUSTED_PROXIES must hold addresses or networks such as 10.0.0.0/8: {error}.",
                setting="TRUSTED_PROXIES",
            ) from None

    def aliases(self) -> dict[str, str]:
        """MODEL_ALIASES as a mapping. Raises ConfigurationError for a pair that is not one."""
        pairs = [pair.strip() for pair in self.model_aliases.split(",") if pair.strip()]
        for pair in pairs:
            if not re.fullmatch(r"[^=\s]+\s*=\s*[^=\s]+", pair):
                raise ConfigurationError(
                    f"MODEL_ALIASES must hold alias=model pairs, not {pair!r}.", setting="MODEL_ALIASES"
                )
        return {alias.strip(): model.strip() for alias, model in (pair.split("=") for pair in pairs)}

    def allowed_origins(self) -> list[str]:
        """CORS_ALLOWED_ORIGINS as a list. Raises ConfigurationError for an entry that is no origin."""
        origins = [origin.strip() for origin in self.cors_allowed_origins.split(",") if origin.strip()]
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigurationError(
                    f"CORS_ALLOWED_ORIGINS must hold origins such as https://host:port, not {origin!r}.",
                    setting="CORS_ALLOWED_ORIGINS",
                )
        return origins


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def setting_fields() -> tuple[dataclasses.Field[Any], ...]:
    """All settings, in the order of the tables."""
    return dataclasses.fields(Settings)


def load_settings(env_file: Path | None = None, **overrides: Any) -> Settings:
    """Read every setting. `overrides` (by field name, already parsed) win over everything.

    Raises ConfigurationError with one line that names the setting and what is wrong with it.
    """
    path = env_file or find_env_file()
    source = Config(RepositoryEnv(str(path)) if path else RepositoryEmpty())
    values = {field.name: _read(source, field) for field in setting_fields() if field.name not in overrides}
    return Settings(**values, **overrides)


def find_env_file() -> Path | None:
    """`.env` of the working directory, else of the project."""
    candidates = (Path.cwd() / ".env", PROJECT_DIRECTORY / ".env")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read(source: Config, field: dataclasses.Field[Any]) -> Any:
    name = field.metadata["name"]
    raw = source.get(name, default=str(field.metadata["default"]))
    try:
        return field.metadata["parse"](raw)
    except ValueError as error:
        raise ConfigurationError(f"{name} {error}, not {raw!r}.", setting=name) from None
