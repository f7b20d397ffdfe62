"""The embedding server: puts the parts together, starts them in order and stops them in reverse.

    python llama_embeddings_server.py

serves Swagger UI at http://127.0.0.1:8089/ . Decides nothing else: what a part does is in its own module.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import similarity_measures
from embeddings_data_models import Truncation
from llama_embeddings import observability
from llama_embeddings.api import (
    cohere,
    documents,
    health,
    jobs,
    laboratory,
    llama_cpp_server,
    metrics,
    native,
    ollama,
    openai,
    pages,
    shared_routes,
    small_services,
    tei,
)
from llama_embeddings.api import search as search_routes
from llama_embeddings.api.clients import LimitRequests, TrustProxies
from llama_embeddings.api.connections import ConnectionLimits, make_protocol, raise_descriptor_limit
from llama_embeddings.api.error_responses import install_error_handlers
from llama_embeddings.api.hot_routes import add_hot_routes
from llama_embeddings.api.middleware import Limits, LimitSizeAndTime, RequestContext
from llama_embeddings.api.replies import EXPOSED_HEADERS
from llama_embeddings.api.security import OPEN_PATHS, RequireToken, describe_security
from llama_embeddings.api.stopping import AnswerWhenStopped
from llama_embeddings.api.tokens import Tokens
from llama_embeddings.catalogue.downloads import Downloads
from llama_embeddings.catalogue.models import Catalogue, RamdiskOptions
from llama_embeddings.documents.extracted import ExtractionLimits, OcrOptions
from llama_embeddings.documents.reader import DocumentReader
from llama_embeddings.errors import ConfigurationError, ServiceError
from llama_embeddings.heat_maps import Painter
from llama_embeddings.inference.backend import Backend
from llama_embeddings.inference.model_cache import EngineOptions, ModelCache
from llama_embeddings.services.advanced_search import AdvancedSearchService
from llama_embeddings.services.container import Services
from llama_embeddings.services.contents import ContentsService
from llama_embeddings.services.documents import DocumentService
from llama_embeddings.services.downloads import DocumentDownloads
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.following import StoreFollower
from llama_embeddings.services.indexing import IndexService, TextVectors
from llama_embeddings.services.jobs import JobService
from llama_embeddings.services.known_texts import KnownTexts, load_known_texts
from llama_embeddings.services.late_interaction import LateInteractionService
from llama_embeddings.services.memory_cache import EmbeddingMemoryCache
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.readiness import ReadinessService
from llama_embeddings.services.removals import DocumentRemovals
from llama_embeddings.services.rerank import RerankMethod, RerankService
from llama_embeddings.services.search import SearchService
from llama_embeddings.services.similarity import SimilarityService
from llama_embeddings.services.similarity_scales import SimilarityScales
from llama_embeddings.services.statistics import StatisticsService
from llama_embeddings.services.texts import TextLimits
from llama_embeddings.services.token_embeddings import TokenEmbeddingService
from llama_embeddings.services.token_index import TokenIndex, TokenVectors
from llama_embeddings.services.tokenization import TokenizationService, read_token_table
from llama_embeddings.settings import MIN_TOKEN_LENGTH, Settings, load_settings
from llama_embeddings.storage.changes import Positions
from llama_embeddings.storage.engine import find_database_file, parse_database_url
from llama_embeddings.storage.server_lock import ServerLock
from llama_embeddings.storage.store import EmbeddingStore
from llama_embeddings.vectors.index import VectorIndexes
from llama_embeddings.vectors.memory import bound_heaps

logger = logging.getLogger(__name__)

VERSION = "0.1.0"
MEGABYTE = 1024 * 1024
# An engine thread that wants the interpreter's lock back must not wait the default 5 ms for it.
SWITCH_INTERVAL_SECONDS = 0.0005
# Open connections get this long to be answered, work without a connection this long to be committed.
GRACEFUL_SHUTDOWN_SECONDS = 8
# Longer than clients keep a connection for another request (5 s in Python's, 60 s in proxies), so that it is they who
# close it: a request sent while the server closes is lost.
KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048
# Objects made before the young ones are looked at, and how many such rounds before all are.
GARBAGE_COLLECTION_THRESHOLDS = (10_000, 20, 100)
DRAIN_SECONDS = 3

DESCRIPTION = """
Embeddings of strings, of every token of a string and of every sentence of a document, by local GGUF models.
Everything that was computed once is kept and found again; everything that is kept can be searched by meaning.

Errors have the shape `{"detail", "code", "field", "index", "request_id"}`. Where the server asks for a token, send
it as `Authorization: Bearer TOKEN` or as the query parameter `token`.
"""


def create_app(settings: Settings, *, backend: Backend | None = None) -> FastAPI:
    """The application, not started yet. `backend` replaces llama.cpp, for tests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if not settings.read_only_replica:
                stack.callback(
                    ServerLock.take(find_database_file(settings.database_url), describe_self(settings)).release
                )
            services = app.state.services = await start_services(
                settings, backend, stack, writes_snapshots=not settings.read_only_replica
            )
            stack.push_async_callback(services.jobs.stop)
            if not settings.read_only_replica:
                await services.jobs.start()
                stack.push_async_callback(services.removals.stop)
                services.removals.start()
            logger.info("Ready")
            yield
            logger.info("Stopping: finishing what is under way")
        logger.info("Stopped")

    app = FastAPI(
        title="Llama embeddings",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # Nothing is reported to anybody, and asking for each request whether it should be takes time.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    guard(app, settings)
    install_error_handlers(app)
    # Routes are tried in this order, so those that are asked most come first.
    app.include_router(openai.router)
    app.include_router(native.router)
    app.include_router(documents.router)
    app.include_router(jobs.router)
    app.include_router(search_routes.router)
    app.include_router(laboratory.router)
    for dialect in (tei, ollama, cohere, shared_routes, llama_cpp_server, small_services):
        app.include_router(dialect.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(pages.router)
    pages.mount_static_files(app)
    add_hot_routes(app)
    return app


def guard(app: FastAPI, settings: Settings) -> None:
    """What every request passes through before it is answered; the last one added is passed first."""
    state = app.state
    state.version = VERSION
    state.meter = observability.RequestMeter()
    state.connection_limits = ConnectionLimits(settings.max_connections, settings.receive_timeout_seconds)
    state.process_collectors = metrics.make_process_collectors()
    limits = Limits(
        max_bytes=int(settings.max_request_size_in_mb * MEGABYTE),
        max_bytes_in_flight=int(settings.max_request_sizes_in_flight_in_mb * MEGABYTE),
        max_json_values=settings.max_json_values_per_request,
        receive_seconds=settings.receive_timeout_seconds,
        work_seconds=settings.max_request_seconds or math.inf,
    )
    app.add_middleware(LimitSizeAndTime, limits=limits)
    open_paths = OPEN_PATHS if settings.metrics_require_token else OPEN_PATHS | {"/metrics"}
    describe_security(app, open_paths)
    if settings.requires_token:
        app.add_middleware(
            RequireToken,
            tokens=open_tokens(settings),
            open_paths=open_paths,
            max_wrong_per_minute=settings.max_wrong_tokens_per_minute,
        )
    if origins := settings.allowed_origins():
        # Outside of the door, as browsers ask without a token whether they may come with one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=EXPOSED_HEADERS,
        )
    if settings.max_requests_per_minute:
        app.add_middleware(LimitRequests, per_minute=settings.max_requests_per_minute)
    if settings.trusted_networks():
        app.add_middleware(TrustProxies, networks=settings.trusted_networks())
    app.add_middleware(AnswerWhenStopped)
    app.add_middleware(RequestContext, meter=state.meter, slow_request_seconds=settings.slow_request_seconds)


def describe_self(settings: Settings) -> str:
    """What another server is told that finds the database in use."""
    port = f", port {settings.listen_port}" if settings.listen_port else ""
    return f"process {os.getpid()} on {socket.gethostname()}{port}"


async def start_services(
    settings: Settings, backend: Backend | None, stack: AsyncExitStack, *, writes_snapshots: bool = False
) -> Services:
    """Start every part in the order in which they need each other; `stack` stops them in reverse.

    Only the server of a database writes snapshots of its indexes: what works beside it leaves them alone.
    """
    store = await open_store(settings, stack)
    positions = await store.read_positions()
    catalogue = await open_catalogue(settings, stack)
    models = await start_models(settings, backend, catalogue, stack)
    known = KnownTexts()
    # Side by side: all three wait for the disk and for C code most of the time.
    try:
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(start_indexing(store, models, stack, writes_snapshots=writes_snapshots))
            group.create_task(load_known_texts(store, known))
            group.create_task(asyncio.to_thread(similarity_measures.warm_up))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    indexing = starting.result()
    return make_services(settings, store, models, indexing, known, positions, stack)


async def open_store(settings: Settings, stack: AsyncExitStack) -> EmbeddingStore:
    """The database with its write queue; of a replica, without one."""
    if settings.read_only_replica:
        store = await EmbeddingStore.open_replica(settings.database_url)
        stack.push_async_callback(store.close)
        logger.info("Opened the database for reading: another server writes to it")
        return store
    store = await EmbeddingStore.open(
        settings.database_url,
        write_batch_size=settings.db_write_batch_size,
        max_retries=settings.max_retries,
        retry_delay_base_seconds=settings.retry_delay_base_seconds,
        jitter_factor=settings.jitter_factor,
        survives_power_cuts=settings.durability == "power",
    )
    stack.push_async_callback(store.close)
    logger.info("Opened the database, its write queue runs")
    return store


async def open_catalogue(settings: Settings, stack: AsyncExitStack) -> Catalogue:
    """The models directory with the default model in it, and the RAM disk if asked for and permitted."""
    downloads = Downloads(
        settings.models_directory,
        endpoint=settings.hub_endpoint,
        allowed_hosts=frozenset(host.strip() for host in settings.model_hub_hosts.split(",")),
        max_bytes=int(settings.max_model_size_in_gb * 1024 * MEGABYTE),
        token=settings.hub_token or None,
    )
    stack.push_async_callback(downloads.close)
    ramdisk = RamdiskOptions(settings.ramdisk_path, settings.ramdisk_size_in_gb) if settings.use_ramdisk else None
    catalogue = Catalogue(
        settings.models_directory,
        downloads,
        downloads_on_demand=settings.download_models_on_demand,
        ramdisk=ramdisk,
    )
    await asyncio.to_thread(catalogue.get_missing_default_model, settings.default_model_name)
    await asyncio.to_thread(catalogue.set_up_ramdisk)
    logger.info("Found models: %s", ", ".join(catalogue.names()) or "none")
    return catalogue


async def start_models(
    settings: Settings, backend: Backend | None, catalogue: Catalogue, stack: AsyncExitStack
) -> ModelService:
    """The default model, loaded and checked against known answers."""
    cache = ModelCache(
        backend or make_llama_backend(),
        EngineOptions(
            max_window=settings.llm_context_size_in_tokens,
            is_parallel=settings.use_parallel_inference_queue,
            max_texts_in_flight=settings.max_concurrent_parallel_inference_tasks,
            max_queued_tokens=settings.max_queued_tokens,
            n_workers=settings.inference_workers,
            n_threads_per_worker=settings.inference_threads_per_worker,
            token_budget=settings.inference_token_budget,
        ),
        max_loaded_models=settings.max_loaded_models,
        max_memory_in_bytes=int(settings.max_loaded_models_memory_in_gb * 1024 * MEGABYTE),
    )
    stack.push_async_callback(cache.close)
    models = ModelService(catalogue, cache, default_model_name=settings.default_model_name, aliases=settings.aliases())
    await models.check_default_model()
    return models


async def start_indexing(
    store: EmbeddingStore, models: ModelService, stack: AsyncExitStack, *, writes_snapshots: bool
) -> IndexService:
    """The indexes over all stored vectors, with their upkeep; snapshots lie beside the database."""
    directory = store.path.with_name(f"{store.path.name}.indexes")
    indexing = IndexService(
        VectorIndexes(),
        [TextVectors(store), TokenVectors(store)],
        directory,
        is_computing=models.is_computing,
        writes_snapshots=writes_snapshots,
    )
    n_rows = await indexing.load()
    logger.info("Indexed %d stored embeddings", n_rows)
    indexing.start()
    stack.push_async_callback(indexing.close)
    return indexing


def make_llama_backend() -> Backend:
    """llama.cpp, imported only when it is used."""
    from llama_embeddings.inference.llama_backend import LlamaBackend

    return LlamaBackend()


def make_services(
    settings: Settings,
    store: EmbeddingStore,
    models: ModelService,
    indexing: IndexService,
    known: KnownTexts,
    positions: Positions,
    stack: AsyncExitStack,
) -> Services:
    """The services; at the end they finish what is under way before store and models go.

    `positions` are those of the store before `indexing` and `known` were filled from it.
    """
    limits = TextLimits(settings.max_text_length_in_characters, settings.max_texts_per_request)
    truncation = Truncation(settings.truncation)
    memory = EmbeddingMemoryCache(settings.embedding_cache_size_in_mb * MEGABYTE)
    embeddings = EmbeddingService(store, models, indexing, memory, known, limits=limits, default_truncation=truncation)
    token_index = TokenIndex(store, indexing)
    token_embeddings = TokenEmbeddingService(
        store, models, token_index, known, limits=limits, default_truncation=truncation
    )
    search = SearchService(store, models, embeddings, indexing)
    reader = make_document_reader(settings)
    document_service = DocumentService(
        store, models, embeddings, indexing, reader, keeps_files=settings.keep_document_files
    )
    keep_finished_jobs = timedelta(hours=settings.keep_finished_jobs_hours)
    removals = DocumentRemovals(
        store,
        embeddings,
        token_index,
        keep_unfinished=keep_finished_jobs,
        find_row_ids_being_written=lambda: document_service.row_ids_being_written,
    )
    painter = Painter()
    follower = StoreFollower(store, positions, embeddings, token_index, known)
    follower.start()
    stack.push_async_callback(follower.stop)
    stack.callback(reader.close)
    stack.callback(painter.close)
    for service in (embeddings, token_embeddings, document_service):
        stack.push_async_callback(service.drain, timeout_seconds=DRAIN_SECONDS)
    return Services(
        models=models,
        contents=ContentsService(store, models, embeddings, token_index, removals),
        removals=removals,
        embeddings=embeddings,
        token_embeddings=token_embeddings,
        documents=document_service,
        document_downloads=DocumentDownloads(store),
        jobs=JobService(
            store,
            models,
            document_service,
            removals,
            spool_directory=find_spool_directory(settings),
            max_waiting=settings.max_waiting_jobs,
            keep_finished=keep_finished_jobs,
        ),
        search=search,
        advanced_search=AdvancedSearchService(store, search),
        late_interaction=LateInteractionService(search, token_embeddings, token_index),
        similarity=SimilarityService(
            embeddings,
            token_embeddings,
            models,
            SimilarityScales(store),
            painter,
            max_cells=settings.max_similarity_matrix_cells,
        ),
        rerank=RerankService(
            models,
            embeddings,
            token_embeddings,
            limits=limits,
            default_truncation=truncation,
            method=RerankMethod(settings.rerank_method),
        ),
        tokenization=TokenizationService(models, limits=limits, table=open_token_table(settings)),
        limits=limits,
        default_truncation=truncation,
        max_texts_in_flight=settings.max_concurrent_parallel_inference_tasks,
        readiness=ReadinessService(store, models, timeout_seconds=settings.ready_timeout_seconds),
        statistics=StatisticsService(store, models, embeddings, indexing, memory),
    )


def open_token_table(settings: Settings) -> dict[int, bytes] | None:
    """The vocabulary that clients send ids of, where the settings name one."""
    return read_token_table(Path(settings.cl100k_table_path)) if settings.cl100k_table_path else None


def open_tokens(settings: Settings) -> Tokens:
    """The tokens that open the door. Raises ConfigurationError if a file that should hold them does not."""
    path = Path(settings.security_tokens_file).expanduser() if settings.security_tokens_file else None
    return Tokens(find_security_token(settings), path)


def make_document_reader(settings: Settings) -> DocumentReader:
    """The reader of documents with its limits; its processes start with the first document."""
    memory_limit_bytes = settings.document_memory_limit_in_mb * MEGABYTE
    return DocumentReader(
        minimum_length=settings.minimum_string_length_for_document_embedding,
        limits=ExtractionLimits(
            max_pages=settings.max_document_pages,
            max_characters=int(settings.max_document_text_in_mb * 1_000_000),
            max_unpacked_bytes=memory_limit_bytes // 2,
        ),
        time_limit_seconds=settings.document_time_limit_in_seconds,
        memory_limit_bytes=memory_limit_bytes,
        ocr=find_ocr(settings) if settings.use_ocr else None,
    )


def find_ocr(settings: Settings) -> OcrOptions:
    """How images are read. Without tesseract the server serves all the same, and refuses them."""
    command = shutil.which("tesseract")
    if command is None:
        logger.warning("USE_OCR is on, but tesseract is not installed: scans and images will be refused")
    return OcrOptions(
        command, settings.ocr_languages, settings.tessdata_prefix, settings.document_time_limit_in_seconds
    )


def find_spool_directory(settings: Settings) -> Path:
    """Where documents wait for their turn: beside the database, which knows their jobs."""
    database = Path(str(parse_database_url(settings.database_url).database))
    return database.with_name(f"{database.name}-jobs")


def find_security_token(settings: Settings) -> str | None:
    """The server's own token: the one given, the one made at an earlier start, or a new one, printed once.

    None where a file has all tokens.
    """
    if settings.security_token:
        return settings.security_token
    if not settings.use_security_token:
        return None
    path = settings.security_token_path
    if path.exists():
        return _read_secret(path)
    token = secrets.token_urlsafe(32)
    _keep_secret(path, token)
    print(f"Made a security token, kept in {path}. It is shown this once:\n\n    {token}\n", flush=True)
    return token


def _read_secret(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"SECURITY_TOKEN_PATH: {path} cannot be read ({error}).") from None
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigurationError(f"SECURITY_TOKEN_PATH: {path} holds no token; delete it, and a new one is made.")
    return token


def _keep_secret(path: Path, secret: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"The token cannot be kept in {path} ({error.strerror}); set SECURITY_TOKEN or SECURITY_TOKEN_PATH.",
            setting="SECURITY_TOKEN_PATH",
        ) from None


def bind(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything slow starts. Raises ConfigurationError if the port is taken."""
    host, port = settings.listen_host, settings.listen_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Not left to uvicorn: until then another server could bind the port, too. Clients wait in the backlog.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"LLAMA_EMBEDDING_SERVER_LISTEN_PORT: cannot listen on {host}:{port} ({error.strerror}). "
            "Stop the other program or choose another port.",
            setting="LLAMA_EMBEDDING_SERVER_LISTEN_PORT",
        ) from None
    return listener


def main() -> int:
    """Read the settings, serve until stopped. A problem with the settings is one line and exit code 1."""
    end_at_once_on_sigterm()
    try:
        settings = load_settings()
        observability.configure_logging(settings.log_directory, settings.log_level, settings.log_format)
        raise_descriptor_limit(settings.max_connections)
        app = create_app(settings)
        listener = bind(settings)
    except ServiceError as error:
        print(f"Cannot start: {error.message}", file=sys.stderr)
        return 1
    bound_heaps()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    host, port = listener.getsockname()[:2]
    logger.info("Starting; will answer on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(app, listener))
    except ServiceError as error:
        logger.error("Cannot start: %s", error.message)
        print(f"Cannot start: {error.message}", file=sys.stderr)
        return 1
    return 0


def end_at_once_on_sigterm() -> None:
    """Until there are requests to finish: a start keeps nothing but what it has committed or renamed into its place.

    Left to the system, the first process of a container would not end at all.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))


async def serve(app: FastAPI, listener: socket.socket) -> None:
    """Start everything, answer until SIGTERM or SIGINT, stop everything. Raises ServiceError if it cannot start."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            # Run here, so that a failure to start is ours to explain.
            lifespan="off",
            http=make_protocol(app.state.connection_limits),
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    async with app.router.lifespan_context(app):
        stop_being_ready_first(server, app)
        # The server raises the signal that ended it again when it is done; the parts must still be stopped then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # What was made for good is left out of garbage collections, which would stop the event loop for its sake.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_COLLECTION_THRESHOLDS)
        await server.serve(sockets=[listener])


def stop_being_ready_first(server: uvicorn.Server, app: FastAPI) -> None:
    """Let `/ready` say that the server stops from the moment it is asked to, on connections that are still served."""
    handle_exit = server.handle_exit

    def handle(sig: int, frame: FrameType | None) -> None:
        app.state.services.readiness.stop()
        handle_exit(sig, frame)

    server.handle_exit = handle  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
