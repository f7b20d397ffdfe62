"""Downloads from a model hub on this machine, with the real client, through everything that can go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from llama_embeddings.catalogue import conversion
from llama_embeddings.catalogue.downloads import WORKSHOP, Downloads, DownloadStage
from llama_embeddings.catalogue.entries import CatalogueEntry, HubConversion, HubFile, ModelKind
from llama_embeddings.catalogue.gguf_check import check_gguf
from llama_embeddings.errors import DownloadFailed, InvalidInput, Overloaded, ShuttingDown
from tests.hub_server import CHUNK_IN_BYTES, COMMIT, HostedFile, HubServer
from tests.tiny_models import LETTERS, write_tiny_model

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
REPOSITORY, FILE_NAME, NAME = "makers/tiny-GGUF", "tiny-Q8_0.gguf", "tiny"
LARGEST = 50_000_000
MakeDownloads = Callable[..., Downloads]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A loadable GGUF of about a megabyte."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_tiny_model(path, n_feed_forward=1024).read_bytes()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer().running() as hub:
        yield hub


@pytest.fixture
def file(hub: HubServer, model: bytes) -> HostedFile:
    return hub.add(REPOSITORY, FILE_NAME, model)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def make_downloads(hub: HubServer, directory: Path) -> MakeDownloads:
    def make(models_directory: Path = directory, *, max_bytes: int = LARGEST, token: str | None = None) -> Downloads:
        return Downloads(
            models_directory,
            endpoint=hub.endpoint,
            allowed_hosts=frozenset({"127.0.0.1"}),
            max_bytes=max_bytes,
            token=token,
            pause_seconds=0.001,
        )

    return make


@pytest.fixture
def downloads(make_downloads: MakeDownloads) -> Downloads:
    return make_downloads()


def describe(name: str = NAME, **facts: Any) -> CatalogueEntry:
    return CatalogueEntry(name, ModelKind.EMBEDDING, HubFile(REPOSITORY, FILE_NAME, **facts))


def list_models(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*") if path.name != WORKSHOP)


def list_partials(directory: Path) -> list[Path]:
    return sorted((directory / WORKSHOP).rglob("*.partial"))


def measure_partials(directory: Path) -> int:
    return sum(path.stat().st_size for path in list_partials(directory))


async def wait_for(condition: Callable[[], bool], *, timeout_seconds: float = 20.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.005)


# What should happen


async def test_model_is_downloaded_checked_and_named(
    downloads: Downloads, directory: Path, file: HostedFile, model: bytes
) -> None:
    """The file is the hub's byte for byte, loadable, and nothing else is left of the download."""
    path = await downloads.fetch(describe())
    assert path == directory / f"{NAME}.gguf"
    assert path.read_bytes() == model
    check_gguf(path)
    assert list_models(directory) == [path.name]
    assert not (directory / WORKSHOP / NAME).exists()
    state = downloads.states()[NAME]
    assert (state.state, state.percentage, state.n_bytes_done) == (DownloadStage.DONE, 100.0, len(model))
    assert file.n_bytes_sent == len(model)


async def test_model_that_is_there_is_not_asked_for(downloads: Downloads, directory: Path, file: HostedFile) -> None:
    """A file of the name is the model: the hub is not even asked."""
    directory.mkdir()
    (directory / f"{NAME}.gguf").write_bytes(b"whatever")
    assert await downloads.fetch(describe()) == directory / f"{NAME}.gguf"
    downloads.start(describe())
    assert (file.requests, downloads.states()) == ([], {})


async def test_branch_becomes_a_commit_and_stays_it(downloads: Downloads, file: HostedFile) -> None:
    """What is downloaded is what was looked up, even if the branch moves in between."""
    await downloads.fetch(describe(revision="main"))
    paths = [path for _, path, _ in file.requests]
    assert f"/{REPOSITORY}/resolve/main/{FILE_NAME}" in paths
    assert all(COMMIT in path for _, path, _ in file.requests[1:])


async def test_token_goes_to_the_hub_and_nowhere_else(
    make_downloads: MakeDownloads, file: HostedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CDN gets no token; without one of ours, the client's own from the environment is not sent either."""
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    await make_downloads(token="hf_ours").fetch(describe())
    tokens = {path.split("/")[3]: headers.get("authorization") for _, path, headers in file.requests}
    assert tokens == {"resolve": "Bearer hf_ours", "cdn": None}
    file.requests.clear()
    await make_downloads().fetch(describe("other"))
    assert all("authorization" not in headers for _, _, headers in file.requests)


async def test_repository_that_offers_xet_is_read_by_plain_http(
    downloads: Downloads, file: HostedFile, model: bytes
) -> None:
    """The headers that make the client's own download go through Xet change nothing here."""
    file.offers_xet = True
    assert (await downloads.fetch(describe())).read_bytes() == model


async def test_address_on_a_hub_of_its_own_is_fetched_from_there(
    hub: HubServer, directory: Path, file: HostedFile
) -> None:
    """An allowed host need not be the configured hub; its token is not for others."""
    elsewhere = Downloads(
        directory, endpoint="http://127.0.0.1:9", allowed_hosts=frozenset({"127.0.0.1"}), max_bytes=LARGEST, token="x"
    )
    entry = elsewhere.parse_address(f"{hub.endpoint}/{REPOSITORY}/resolve/main/{FILE_NAME}")
    path = await elsewhere.fetch(entry)
    assert path.name == FILE_NAME
    assert all("authorization" not in headers for _, _, headers in file.requests)


async def test_state_shows_how_far_it_has_come(downloads: Downloads, file: HostedFile, model: bytes) -> None:
    """Bytes only grow, from none to all, with the total known from the start."""
    file.seconds_per_chunk = 0.002
    downloads.start(describe())
    seen = []
    while (state := downloads.states()[NAME]).state is DownloadStage.DOWNLOADING:
        seen.append(state)
        await asyncio.sleep(0.005)
    assert state.percentage == 100.0
    assert {one.n_bytes_total for one in seen} <= {None, len(model)}
    percentages = [one.percentage for one in seen if one.percentage is not None]
    assert percentages == sorted(percentages)
    assert len({p for p in percentages if 0 < p < 100}) > 3


# Cuts


async def test_cut_connection_is_continued_where_it_ended(downloads: Downloads, file: HostedFile, model: bytes) -> None:
    """Three cuts cost three requests, and not one byte is sent twice."""
    file.cuts = [100_000, 1, 300_000]
    assert (await downloads.fetch(describe())).read_bytes() == model
    assert file.n_deliveries == 4
    assert file.n_bytes_sent == len(model)


async def test_progress_renews_patience(downloads: Downloads, file: HostedFile, model: bytes) -> None:
    """More cuts than failures are allowed in a row, each after some bytes, do not end a download."""
    file.cuts = [50_000] * 12
    assert (await downloads.fetch(describe())).read_bytes() == model
    assert file.n_bytes_sent == len(model)


async def test_hub_that_brings_nothing_is_given_up_and_continued_later(
    downloads: Downloads, directory: Path, file: HostedFile, model: bytes
) -> None:
    """A few attempts, then a clear failure; what had come in is kept for the next call."""
    file.cuts = [400_000, 0, 0, 0, 0]
    with pytest.raises(DownloadFailed, match="Check the connection and start it again"):
        await downloads.fetch(describe())
    assert list_models(directory) == []
    assert measure_partials(directory) == 400_000
    assert downloads.states()[NAME].state is DownloadStage.FAILED
    assert "Check the connection" in (downloads.states()[NAME].error or "")
    assert (await downloads.fetch(describe())).read_bytes() == model
    assert file.n_bytes_sent == len(model)


async def test_hub_that_knows_no_ranges_is_read_from_the_start(
    downloads: Downloads, file: HostedFile, model: bytes
) -> None:
    """An answer that begins at the start replaces what was there, instead of being added to it."""
    file.understands_ranges = False
    file.cuts = [300_000]
    assert (await downloads.fetch(describe())).read_bytes() == model
    assert file.n_bytes_sent == 300_000 + len(model)


async def test_hub_that_is_out_of_order_for_a_while_is_asked_again(
    downloads: Downloads, file: HostedFile, model: bytes
) -> None:
    """5xx and 429, on the question as on the delivery."""
    file.statuses = [503, 500]
    file.cuts = [100_000]
    assert (await downloads.fetch(describe())).read_bytes() == model


async def test_busy_hub_is_given_the_time_it_asks_for(downloads: Downloads, file: HostedFile) -> None:
    """`Retry-After` outweighs the shorter pause that would have been made."""
    file.statuses, file.retry_after = [429], "1"
    started = time.monotonic()
    await downloads.fetch(describe())
    assert time.monotonic() - started >= 1.0


async def test_hub_that_stays_out_of_order_is_given_up(downloads: Downloads, directory: Path, file: HostedFile) -> None:
    """After five answers with 502 the message says so."""
    file.statuses = [502] * 100
    with pytest.raises(DownloadFailed, match="status 502"):
        await downloads.fetch(describe())
    assert len(file.requests) == 5
    assert list_models(directory) == []


async def test_nobody_there_is_a_clear_failure(directory: Path) -> None:
    """A refused connection is retried and then reported."""
    lonely = Downloads(
        directory, endpoint="http://127.0.0.1:9", allowed_hosts=frozenset(), max_bytes=LARGEST, pause_seconds=0.001
    )
    with pytest.raises(DownloadFailed, match="Check the connection"):
        await lonely.fetch(describe())


# Wrong content


async def test_wrong_content_is_not_kept(downloads: Downloads, directory: Path, file: HostedFile, model: bytes) -> None:
    """Bytes that are not those of the announced digest are deleted, and the next call gets the right ones."""
    file.delivered = model[:-1] + bytes([model[-1] ^ 1])
    with pytest.raises(DownloadFailed, match="It is not kept"):
        await downloads.fetch(describe())
    assert (list_models(directory), list_partials(directory)) == ([], [])
    file.delivered = None
    assert (await downloads.fetch(describe())).read_bytes() == model


async def test_wrong_content_is_found_by_our_digest_where_the_hub_announces_none(
    downloads: Downloads, directory: Path, file: HostedFile, model: bytes
) -> None:
    """A hub without digests serves models whose digest is known, and no others."""
    file.announced_digest = "W/abc"
    with pytest.raises(DownloadFailed, match="announces no digest"):
        await downloads.fetch(describe())
    with pytest.raises(DownloadFailed, match="It is not kept"):
        await downloads.fetch(describe(sha256="0" * 64))
    assert list_models(directory) == []
    assert (await downloads.fetch(describe(sha256=sha256(model).hexdigest()))).is_file()


@pytest.mark.parametrize("facts", [{"sha256": "0" * 64}, {"size_in_bytes": 4711}])
async def test_another_file_than_expected_is_not_even_fetched(
    downloads: Downloads, directory: Path, file: HostedFile, facts: dict[str, Any]
) -> None:
    """The catalogue's digest and size are held against what the hub announces, before a byte is spent."""
    with pytest.raises(DownloadFailed, match="it is another file"):
        await downloads.fetch(describe(**facts))
    assert file.n_bytes_sent == 0
    assert list_models(directory) == []


async def test_too_large_a_model_is_not_even_fetched(
    make_downloads: MakeDownloads, file: HostedFile, model: bytes
) -> None:
    """The bound holds for what is announced."""
    with pytest.raises(DownloadFailed, match=f"has {len(model)} bytes; at most {len(model) - 1} may"):
        await make_downloads(max_bytes=len(model) - 1).fetch(describe())
    assert file.n_bytes_sent == 0


@pytest.mark.parametrize("announced_size", [200_000, None])
async def test_file_larger_than_allowed_is_stopped_on_the_way(
    make_downloads: MakeDownloads, directory: Path, file: HostedFile, announced_size: int | None
) -> None:
    """Neither a hub that announces too little nor one that announces nothing can fill the disk."""
    file.announced_size = announced_size
    file.seconds_per_chunk = 0.001
    with pytest.raises(DownloadFailed, match="is larger than 200000 bytes"):
        await make_downloads(max_bytes=200_000).fetch(describe())
    assert (list_models(directory), measure_partials(directory)) == ([], 0)


async def test_file_smaller_than_announced_is_given_up(
    downloads: Downloads, directory: Path, file: HostedFile, model: bytes
) -> None:
    """Less than announced is never taken for the whole, and not fetched over and over again either."""
    file.announced_size = len(model) + 1
    with pytest.raises(DownloadFailed, match="Check the connection"):
        await downloads.fetch(describe())
    assert list_models(directory) == []
    assert file.n_bytes_sent <= 3 * len(model)


async def test_what_is_no_gguf_is_not_kept(downloads: Downloads, directory: Path, hub: HubServer) -> None:
    """The right digest of the wrong thing: the check before loading decides."""
    hub.add(REPOSITORY, FILE_NAME, b"<html>not a model</html>" * 1000)
    with pytest.raises(DownloadFailed, match="cannot be used"):
        await downloads.fetch(describe())
    assert list_models(directory) == []
    assert not list((directory / WORKSHOP).rglob("*.gguf"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (CatalogueEntry("a", ModelKind.EMBEDDING, HubFile("makers/none", FILE_NAME)), "no repository makers/none"),
        (CatalogueEntry("a", ModelKind.EMBEDDING, HubFile(REPOSITORY, "none.gguf")), "has no file none.gguf"),
        (CatalogueEntry("a", ModelKind.EMBEDDING, HubFile(REPOSITORY, FILE_NAME, "v9")), "has no revision v9"),
    ],
)
async def test_what_is_not_there_is_named(
    downloads: Downloads, file: HostedFile, entry: CatalogueEntry, message: str
) -> None:
    """Repository, file or revision: the message says which, after one question."""
    with pytest.raises(DownloadFailed, match=message):
        await downloads.fetch(entry)


async def test_gated_model_says_what_to_do(downloads: Downloads, file: HostedFile) -> None:
    """A licence that was not accepted is no missing repository."""
    file.statuses, file.error_code = [403], "GatedRepo"
    with pytest.raises(DownloadFailed, match="has to be accepted on the hub"):
        await downloads.fetch(describe())


# Company


async def test_callers_at_the_same_time_share_one_download(
    downloads: Downloads, file: HostedFile, model: bytes
) -> None:
    """Ten callers and a start in the background: one delivery, the same path for all."""
    file.seconds_per_chunk = 0.001
    downloads.start(describe())
    paths = await asyncio.gather(*(downloads.fetch(describe()) for _ in range(10)))
    assert len(set(paths)) == 1
    assert (file.n_deliveries, file.n_bytes_sent) == (1, len(model))


async def test_caller_that_goes_away_stops_nothing(downloads: Downloads, file: HostedFile, model: bytes) -> None:
    """The download goes on for the others, and for later."""
    file.seconds_per_chunk = 0.002
    leaving, staying = (asyncio.create_task(downloads.fetch(describe())) for _ in range(2))
    await wait_for(lambda: file.n_bytes_sent > 100_000)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (await staying).read_bytes() == model
    assert file.n_deliveries == 1


async def test_two_services_on_one_directory_download_once(
    make_downloads: MakeDownloads, file: HostedFile, model: bytes
) -> None:
    """Whoever comes second waits for the lock and finds the file."""
    file.seconds_per_chunk = 0.002
    paths = await asyncio.gather(*(make_downloads().fetch(describe()) for _ in range(2)))
    assert paths[0].read_bytes() == model
    assert file.n_bytes_sent == len(model)


async def test_two_files_do_not_share_a_name(downloads: Downloads, file: HostedFile) -> None:
    """While one is on its way under a name, another is refused."""
    file.seconds_per_chunk = 0.002
    downloads.start(describe())
    with pytest.raises(InvalidInput, match="another file is being downloaded"):
        downloads.start(describe(revision=COMMIT))
    with pytest.raises(InvalidInput, match="cannot be a model's name"):
        downloads.start(describe("../outside"))
    await downloads.fetch(describe())


async def test_too_many_downloads_at_a_time_are_refused(downloads: Downloads, file: HostedFile) -> None:
    """The queue of downloads has a bound, and there is room again afterwards."""
    file.seconds_per_chunk = 0.002
    tasks = [asyncio.create_task(downloads.fetch(describe(f"tiny{number}"))) for number in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="Already downloading tiny0, tiny1, tiny2, tiny3"):
        downloads.start(describe("tiny4"))
    await asyncio.gather(*tasks)
    await downloads.fetch(describe("tiny4"))


# Ends


async def test_close_stops_at_once_and_the_next_start_continues(
    make_downloads: MakeDownloads, directory: Path, file: HostedFile, model: bytes
) -> None:
    """Callers are told, nothing looks like a model, and what came in is not asked for again."""
    file.seconds_per_chunk = 0.005
    first = make_downloads()
    caller = asyncio.create_task(first.fetch(describe()))
    await wait_for(lambda: file.n_bytes_sent > 200_000)
    started = time.monotonic()
    await first.close()
    assert time.monotonic() - started < 1.0
    with pytest.raises(ShuttingDown):
        await caller
    with pytest.raises(ShuttingDown):
        first.start(describe("other"))
    assert list_models(directory) == []
    file.seconds_per_chunk = 0.0
    assert (await make_downloads().fetch(describe())).read_bytes() == model
    assert file.n_bytes_sent < len(model) + 20 * CHUNK_IN_BYTES


async def test_close_leaves_a_thread_that_does_not_stop(downloads: Downloads, file: HostedFile) -> None:
    """A hub that sends nothing for a while cannot hold the shutdown up; its late end changes nothing."""
    file.seconds_per_chunk = 1.0
    caller = asyncio.create_task(downloads.fetch(describe()))
    await wait_for(lambda: file.n_bytes_sent > 0)
    await downloads.close(timeout_seconds=0.1)
    with pytest.raises(ShuttingDown):
        await caller


CHILD = """
import asyncio, json, sys
from pathlib import Path
from llama_embeddings.catalogue.downloads import Downloads
from llama_embeddings.catalogue.entries import CatalogueEntry, HubFile, ModelKind

endpoint, directory, name, repository, file_name = sys.argv[1:]
downloads = Downloads(Path(directory), endpoint=endpoint, allowed_hosts=frozenset(), max_bytes=50_000_000)
entry = CatalogueEntry(name, ModelKind.EMBEDDING, HubFile(repository, file_name))
print(json.dumps(str(asyncio.run(downloads.fetch(entry)))))
"""


def start_child(hub: HubServer, directory: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, hub.endpoint, str(directory), NAME, REPOSITORY, FILE_NAME]
    return subprocess.Popen(command, cwd=PROJECT_DIRECTORY, stdout=subprocess.PIPE, text=True, **options)


async def test_killed_process_leaves_no_model_and_the_next_one_continues_with_a_bar(
    hub: HubServer, directory: Path, file: HostedFile, model: bytes
) -> None:
    """`kill -9` in the middle; a new process fetches the rest, and draws its progress on the console."""
    file.seconds_per_chunk = 0.01
    with start_child(hub, directory) as child:
        await wait_for(lambda: measure_partials(directory) > len(model) // 3)
        child.kill()
        child.communicate()
    assert list_models(directory) == []
    kept, sent = measure_partials(directory), file.n_bytes_sent
    console, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    with start_child(hub, directory, stderr=end) as child:
        os.close(end)
        answer, _ = await asyncio.to_thread(child.communicate, timeout=30)
    assert Path(json.loads(answer)).read_bytes() == model
    assert file.n_bytes_sent - sent <= len(model) - kept + CHUNK_IN_BYTES
    assert b"tiny:" in (shown := os.read(console, 65_536))
    assert b"%|" in shown
    os.close(console)


# The disk


async def test_no_room_is_found_before_a_byte_is_fetched(make_downloads: MakeDownloads, file: HostedFile) -> None:
    """A file larger than the free space is refused with both numbers."""
    file.announced_size = 10**15
    with pytest.raises(DownloadFailed, match="Make room and start it again"):
        await make_downloads(max_bytes=10**16).fetch(describe())
    assert file.n_bytes_sent == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a quarter of the model; a directory where mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "downloads-test", str(place)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


async def test_disk_that_fills_up_on_the_way_gets_its_room_back(
    make_downloads: MakeDownloads, small_disk: Path, file: HostedFile
) -> None:
    """A full disk fails the download clearly, and what it took is given back. Without a mount, the bound does it."""
    file.announced_size = None
    is_full_disk = os.path.ismount(small_disk)
    with pytest.raises(DownloadFailed, match="There is no room left" if is_full_disk else "is larger than"):
        await make_downloads(small_disk, max_bytes=LARGEST if is_full_disk else 300_000).fetch(describe())
    assert (list_models(small_disk), measure_partials(small_disk)) == ([], 0)


async def test_directory_that_cannot_be_written_is_named_as_the_reason(
    make_downloads: MakeDownloads, tmp_path: Path, file: HostedFile
) -> None:
    """A models directory that is a file stands for all that cannot be written: root may write everywhere else."""
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(DownloadFailed, match="cannot be written to the models directory"):
        await make_downloads(tmp_path / "occupied").fetch(describe())


# Conversion

DIRECTORY_REPOSITORY = "makers/tiny-sentence-transformer"
SIZES = conversion.BertConfiguration(
    n_tokens_vocabulary=5 + 2 * len(LETTERS),
    n_dims=32,
    n_feed_forward=64,
    n_blocks=1,
    n_heads=2,
    context_length=64,
    n_token_types=2,
    layer_norm_eps=1e-12,
)


def host_sentence_transformer(hub: HubServer, *, without: str | None = None) -> dict[str, HostedFile]:
    """A tiny directory of the BERT family, as its makers would publish it."""
    shapes = conversion.describe_embedding_tensors(SIZES) + conversion.describe_block_tensors(SIZES, 0)
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, _, shape in shapes}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    configuration = {
        "model_type": "bert",
        "vocab_size": SIZES.n_tokens_vocabulary,
        "hidden_size": SIZES.n_dims,
        "intermediate_size": SIZES.n_feed_forward,
        "num_hidden_layers": SIZES.n_blocks,
        "num_attention_heads": SIZES.n_heads,
        "max_position_embeddings": SIZES.context_length,
        "type_vocab_size": SIZES.n_token_types,
    }
    contents = {
        "config.json": json.dumps(configuration).encode(),
        "model.safetensors": save(weights),
        "vocab.txt": ("\n".join(pieces) + "\n").encode(),
        "tokenizer_config.json": b"{}",
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    }
    return {
        name: hub.add(DIRECTORY_REPOSITORY, name, content, is_large=name == "model.safetensors")
        for name, content in contents.items()
        if name != without
    }


def describe_conversion(**facts: Any) -> CatalogueEntry:
    return CatalogueEntry("made", ModelKind.EMBEDDING, HubConversion(DIRECTORY_REPOSITORY, **facts))


async def test_directory_is_downloaded_and_converted(downloads: Downloads, directory: Path, hub: HubServer) -> None:
    """Files that are optional may be missing; all others are of one commit, and a model comes out."""
    hosted = host_sentence_transformer(hub)
    hosted["model.safetensors"].cuts = [1000]
    path = await downloads.fetch(describe_conversion())
    summary = check_gguf(path)
    assert (summary.architecture, summary.n_dims, summary.pooling, summary.licence) == (
        "bert",
        32,
        "mean",
        "apache-2.0",
    )
    assert list_models(directory) == ["made.gguf"]
    assert not (directory / WORKSHOP / "made").exists()
    total = sum(len(file.content) for file in hosted.values())
    assert sum(file.n_bytes_sent for file in hosted.values()) == total
    assert (downloads.states()["made"].n_bytes_done, downloads.states()["made"].percentage) == (total, 100.0)
    asked = [path for file in hosted.values() for _, path, _ in file.requests]
    assert sum("/main/" in path for path in asked) == 1


async def test_directory_without_a_needed_file_is_refused_by_its_name(
    downloads: Downloads, directory: Path, hub: HubServer
) -> None:
    """A repository that has its weights only in another format says so."""
    host_sentence_transformer(hub, without="model.safetensors")
    with pytest.raises(DownloadFailed, match=r"has no file model\.safetensors"):
        await downloads.fetch(describe_conversion())
    assert list_models(directory) == []


async def test_changed_small_file_is_found_by_git_s_digest(
    downloads: Downloads, directory: Path, hub: HubServer
) -> None:
    """Configuration and vocabulary are checked like weights."""
    hosted = host_sentence_transformer(hub)
    hosted["vocab.txt"].delivered = hosted["vocab.txt"].content.replace(b"a", b"b", 1)
    with pytest.raises(DownloadFailed, match=r"vocab\.txt arrived with the digest"):
        await downloads.fetch(describe_conversion())
    assert list_models(directory) == []


async def test_directory_that_cannot_be_converted_is_not_kept(
    downloads: Downloads, directory: Path, hub: HubServer
) -> None:
    """What the converter refuses is reported in its words; the files do not stay behind."""
    hosted = host_sentence_transformer(hub)
    hosted["config.json"].content = b'{"model_type": "roberta"}'
    with pytest.raises(DownloadFailed, match="'model_type' is 'roberta'"):
        await downloads.fetch(describe_conversion())
    assert list_models(directory) == []
    assert not (directory / WORKSHOP / "made" / "source").exists()


async def test_known_digest_of_a_directory_s_file_is_checked_before_it_is_fetched(
    downloads: Downloads, hub: HubServer
) -> None:
    """Weights with another digest than the catalogue's cost nothing."""
    hosted = host_sentence_transformer(hub)
    with pytest.raises(DownloadFailed, match="it is another file"):
        await downloads.fetch(describe_conversion(file_digests={"model.safetensors": "0" * 64}))
    assert hosted["model.safetensors"].n_bytes_sent == 0
