"""The RAM disk on a real tmpfs, with real mounts, copies and memory mappings.

Where the kernel does not let the tests mount (no root, a container without CAP_SYS_ADMIN), each of
them instead shows that setting up a RAM disk is refused there and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import inspect
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

import ramdisk_functions
from ramdisk_functions import (
    GIGABYTE,
    MEGABYTE,
    RAMDISK_SOURCE_NAME,
    RamdiskError,
    check_that_user_has_required_permissions_to_manage_ramdisks,
    clear_ramdisk,
    copy_models_to_ramdisk,
    find_model_on_ramdisk,
    mount_ramdisk,
    parse_mountinfo,
    ramdisk_usage,
    run_command,
    setup_ramdisk,
)

REPOSITORY = Path(ramdisk_functions.__file__).parent
PRIVILEGED = [] if os.geteuid() == 0 else ["sudo", "-n"]
EIGHT_MB = 8 / 1024  # in GB


def mount_tmpfs(place: Path, source: str, size: str = "8m") -> int:
    """Mount by mount(8), as somebody else would. Returns its exit status."""
    if PRIVILEGED and shutil.which("sudo") is None:
        return 1
    command = [*PRIVILEGED, "mount", "-t", "tmpfs", "-o", f"size={size}", source, str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def list_mount_sources(place: Path) -> list[str]:
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    return [mount.source for mount in mounts if mount.mount_point == str(place)]


def unmount_everything_at(place: Path) -> None:
    for _ in list_mount_sources(place):
        subprocess.run([*PRIVILEGED, "umount", "-l", str(place)], capture_output=True, check=False)


@functools.cache
def is_mounting_permitted(directory: Path) -> bool:
    """Find out by mounting, once: the only answer that covers every reason for a refusal."""
    place = directory / "trial"
    place.mkdir()
    try:
        return mount_tmpfs(place, "trial") == 0
    finally:
        unmount_everything_at(place)


@pytest.fixture(scope="session")
def trial_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mounting").resolve()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the RAM disk goes: a path with a space, which the kernel writes as an escape."""
    path = tmp_path.resolve() / "ram disk"
    yield path
    unmount_everything_at(path)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of 1, 2 and 5 MB, in another order of names, and a file that is no model."""
    directory = tmp_path / "models"
    directory.mkdir()
    for name, megabytes in (("b_small", 1), ("c_medium", 2), ("a_large", 5)):
        (directory / f"{name}.gguf").write_bytes(hashlib.sha256(name.encode()).digest() * (megabytes * MEGABYTE // 32))
    (directory / "notes.txt").write_text("not a model")
    return directory


def assert_that_setup_is_refused_and_leaves_nothing(place: Path) -> None:
    with pytest.raises(RamdiskError):
        setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    assert not place.exists()
    assert list_mount_sources(place) == []


def on_a_real_tmpfs(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test where mounting is permitted; elsewhere hold the refusal instead."""

    @functools.wraps(test)
    def run_or_hold_the_refusal(place: Path, trial_directory: Path, **fixtures: object) -> None:
        if is_mounting_permitted(trial_directory):
            test(place=place, **fixtures)
        else:
            assert_that_setup_is_refused_and_leaves_nothing(place)

    signature = inspect.signature(test)
    trial = inspect.Parameter("trial_directory", inspect.Parameter.KEYWORD_ONLY)
    parameters = [*signature.parameters.values(), trial]
    run_or_hold_the_refusal.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run_or_hold_the_refusal


def compute_digest(content: bytes | mmap.mmap) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def map_file(file: Path) -> Iterator[mmap.mmap]:
    """Map a file as a loaded model is: shared, read-only, the descriptor closed."""
    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with contextlib.closing(mapping):
        yield mapping


class RefusingRunner:
    """Lets commands through that change nothing and refuses the others as the kernel would."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def __call__(self, arguments: Sequence[str], /) -> subprocess.CompletedProcess[str]:
        if "--version" in arguments:
            return run_command(arguments)
        self.refused.append(" ".join(arguments))
        return subprocess.CompletedProcess(arguments, 32, stdout="", stderr="permission denied.")


# Set up


@on_a_real_tmpfs
def test_the_mounted_ramdisk_is_private_restricted_and_of_the_size_asked_for(place: Path) -> None:
    """Mode 0700, owned by us, nosuid, nodev, noexec, under our source name; sizes as the kernel has them."""
    state = setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    assert (state.path, state.size_in_bytes, state.was_already_mounted) == (place, 8 * MEGABYTE, False)
    assert not state.is_smaller_than_requested
    assert list_mount_sources(place) == [RAMDISK_SOURCE_NAME]
    assert (place.stat().st_mode & 0o7777, place.stat().st_uid) == (0o700, os.geteuid())
    [options] = [p.opts.split(",") for p in psutil.disk_partitions(all=True) if p.mountpoint == str(place)]
    assert {"nosuid", "nodev", "noexec", "rw"} <= set(options)
    assert shutil.disk_usage(place).total == 8 * MEGABYTE
    assert check_that_user_has_required_permissions_to_manage_ramdisks()


@on_a_real_tmpfs
def test_setting_up_twice_mounts_once_and_runs_nothing_the_second_time(place: Path, models: Path) -> None:
    """The mount and what is in it are reused."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place, file_names=["b_small.gguf"])
    runner = RefusingRunner()
    state = setup_ramdisk(place, EIGHT_MB, reserve_gb=0, run=runner)
    assert (state.was_already_mounted, state.was_resized, runner.refused) == (True, False, [])
    assert list_mount_sources(place) == [RAMDISK_SOURCE_NAME]
    assert find_model_on_ramdisk(place, "b_small.gguf") == place / "b_small.gguf"


@on_a_real_tmpfs
def test_another_size_resizes_in_place_only_while_the_contents_fit(place: Path, models: Path) -> None:
    """Growing and shrinking keep the files and the restrictions; too small is refused, naming the sizes."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place, file_names=["a_large.gguf"])
    for megabytes in (16, 6):
        state = setup_ramdisk(place, megabytes / 1024, reserve_gb=0)
        assert (state.size_in_bytes, state.was_resized) == (megabytes * MEGABYTE, True)
    with pytest.raises(RamdiskError, match=r"holds 5\.0 MB, more than the 3\.0 MB asked for"):
        setup_ramdisk(place, 3 / 1024, reserve_gb=0)
    assert ramdisk_usage(place).size_in_bytes == 6 * MEGABYTE
    assert (place / "a_large.gguf").read_bytes() == (models / "a_large.gguf").read_bytes()
    [options] = [p.opts.split(",") for p in psutil.disk_partitions(all=True) if p.mountpoint == str(place)]
    assert {"nosuid", "nodev", "noexec"} <= set(options)
    assert list_mount_sources(place) == [RAMDISK_SOURCE_NAME]


@on_a_real_tmpfs
def test_a_ramdisk_never_gets_more_than_the_memory_that_is_available(place: Path) -> None:
    """A petabyte is cut to what is free less the reserve; a reserve of everything is refused."""
    reserve_gb = psutil.virtual_memory().available / GIGABYTE / 2
    state = setup_ramdisk(place, 2**20, reserve_gb=reserve_gb)
    assert state.is_smaller_than_requested
    assert 0 < state.size_in_bytes <= psutil.virtual_memory().total - reserve_gb * GIGABYTE
    clear_ramdisk(place)
    with pytest.raises(RamdiskError, match="Not enough memory for a RAM disk"):
        setup_ramdisk(place, 1, reserve_gb=2**20)
    assert list_mount_sources(place) == []


@on_a_real_tmpfs
def test_models_already_loaded_into_memory_are_kept_when_memory_has_become_short(place: Path, models: Path) -> None:
    """With nothing left beyond the reserve, the RAM disk shrinks to what it holds: 5 MB."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place, file_names=["a_large.gguf"])
    state = setup_ramdisk(place, EIGHT_MB, reserve_gb=2**20)
    assert (state.size_in_bytes, state.was_resized) == (5 * MEGABYTE, True)
    assert find_model_on_ramdisk(place, "a_large.gguf") is not None


@on_a_real_tmpfs
def test_a_tmpfs_of_somebody_else_is_neither_used_nor_touched(place: Path, models: Path) -> None:
    """Same type, other source name: setting up, copying, looking up and clearing all keep away."""
    place.mkdir()
    assert mount_tmpfs(place, "somebody_else") == 0
    for act in (
        lambda: setup_ramdisk(place, EIGHT_MB, reserve_gb=0),
        lambda: copy_models_to_ramdisk(models, place),
        lambda: clear_ramdisk(place),
        lambda: ramdisk_usage(place),
    ):
        with pytest.raises(RamdiskError, match="not a RAM disk of ours"):
            act()
    assert find_model_on_ramdisk(place, "b_small.gguf") is None
    assert list_mount_sources(place) == ["somebody_else"]
    assert list(place.iterdir()) == []


@on_a_real_tmpfs
def test_a_mount_on_top_of_ours_hides_it_and_is_not_cleared(place: Path, models: Path) -> None:
    """What is visible is somebody else's; ours below keeps its models."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place, file_names=["b_small.gguf"])
    assert mount_tmpfs(place, "somebody_else") == 0
    with pytest.raises(RamdiskError, match="not a RAM disk of ours"):
        clear_ramdisk(place)
    subprocess.run([*PRIVILEGED, "umount", str(place)], check=True)
    assert find_model_on_ramdisk(place, "b_small.gguf") is not None


@on_a_real_tmpfs
def test_the_options_used_through_sudo_are_understood_by_the_kernel(place: Path) -> None:
    """With a prefix, the owner is given as an option; `env` stands for sudo in front of the command."""
    place.mkdir()
    mount_ramdisk(place, MEGABYTE, [*PRIVILEGED, "env"], run_command)
    assert (place.stat().st_uid, place.stat().st_gid) == (os.getuid(), os.getgid())
    assert ramdisk_usage(place).size_in_bytes == MEGABYTE


# Copy and find


@on_a_real_tmpfs
def test_all_models_are_copied_smallest_first_and_found_again(place: Path, models: Path) -> None:
    """Only GGUF files, with the sizes and digests of their sources; progress ends at each full size."""
    setup_ramdisk(place, 16 / 1024, reserve_gb=0)
    seen: list[tuple[str, int, int]] = []
    copied = copy_models_to_ramdisk(models, place, progress=lambda *step: seen.append(step))
    assert [model.file_name for model in copied] == ["b_small.gguf", "c_medium.gguf", "a_large.gguf"]
    for model in copied:
        source = (models / model.file_name).read_bytes()
        assert model.path == find_model_on_ramdisk(place, model.file_name)
        assert (model.path.read_bytes(), model.sha256) == (source, compute_digest(source))
        assert not model.was_already_present
        assert model.path.stat().st_mode & 0o777 == 0o400
    assert sorted(os.listdir(place)) == ["a_large.gguf", "b_small.gguf", "c_medium.gguf"]
    assert [step for step in seen if step[1] == step[2]] == [
        (m.file_name, m.size_in_bytes, m.size_in_bytes) for m in copied
    ]
    assert find_model_on_ramdisk(place, "missing.gguf") is None


@on_a_real_tmpfs
def test_named_models_are_copied_in_the_order_given_and_a_missing_one_stops_before_any(
    place: Path, models: Path
) -> None:
    """Names are checked before the first byte is copied."""
    setup_ramdisk(place, 16 / 1024, reserve_gb=0)
    with pytest.raises(RamdiskError, match=r"no model file 'missing\.gguf'"):
        copy_models_to_ramdisk(models, place, file_names=["b_small.gguf", "missing.gguf"])
    assert os.listdir(place) == []
    names = ["c_medium.gguf", "b_small.gguf"]
    assert [model.file_name for model in copy_models_to_ramdisk(models, place, file_names=names)] == names


@on_a_real_tmpfs
def test_a_model_already_there_is_kept_and_a_different_one_of_equal_size_is_replaced(place: Path, models: Path) -> None:
    """The digest decides; whoever has the old file mapped goes on reading the old file."""
    setup_ramdisk(place, 16 / 1024, reserve_gb=0)
    names = ["b_small.gguf"]
    [first] = copy_models_to_ramdisk(models, place, file_names=names)
    inode = first.path.stat().st_ino
    [second] = copy_models_to_ramdisk(models, place, file_names=names)
    assert (second.was_already_present, second.sha256, second.path.stat().st_ino) == (True, first.sha256, inode)
    with map_file(first.path) as mapping:
        (models / names[0]).write_bytes(b"x" * MEGABYTE)
        [third] = copy_models_to_ramdisk(models, place, file_names=names)
        assert not third.was_already_present
        assert third.path.read_bytes() == b"x" * MEGABYTE
        assert compute_digest(mapping) == first.sha256


@on_a_real_tmpfs
def test_a_copy_damaged_on_the_way_is_noticed_and_removed(place: Path, models: Path) -> None:
    """One byte of what was written is changed before it is read back; models copied before stay."""
    setup_ramdisk(place, 16 / 1024, reserve_gb=0)

    def damage_the_large_one(name: str, done: int, size: int) -> None:
        if name == "a_large.gguf" and done == size:
            with (place / ".a_large.gguf.partial").open("r+b") as stream:
                stream.write(b"?")

    with pytest.raises(RamdiskError, match=r"copy of 'a_large\.gguf' on the RAM disk is damaged"):
        copy_models_to_ramdisk(models, place, progress=damage_the_large_one)
    assert sorted(os.listdir(place)) == ["b_small.gguf", "c_medium.gguf"]


@on_a_real_tmpfs
def test_a_source_that_grows_while_it_is_copied_is_refused(place: Path, models: Path) -> None:
    """A download still under way is not taken for a model."""
    setup_ramdisk(place, 16 / 1024, reserve_gb=0)

    def append_to_the_source(name: str, done: int, size: int) -> None:
        with (models / name).open("ab") as stream:
            stream.write(b"more")

    with pytest.raises(RamdiskError, match="changed while it was copied"):
        copy_models_to_ramdisk(models, place, file_names=["a_large.gguf"], progress=append_to_the_source)
    assert os.listdir(place) == []


@on_a_real_tmpfs
def test_a_model_without_room_is_refused_before_it_is_copied_and_the_others_stay(place: Path, models: Path) -> None:
    """1 + 2 MB fit into 6 MB, 5 more do not; the message names both sizes."""
    setup_ramdisk(place, 6 / 1024, reserve_gb=0)
    started: set[str] = set()
    with pytest.raises(RamdiskError, match=r"'a_large\.gguf'.* it has 5\.0 MB, 3\.0 MB are free"):
        copy_models_to_ramdisk(models, place, progress=lambda name, *_: started.add(name))
    assert started == {"b_small.gguf", "c_medium.gguf"}
    assert sorted(os.listdir(place)) == ["b_small.gguf", "c_medium.gguf"]


@on_a_real_tmpfs
def test_what_an_interrupted_copy_left_is_removed_by_the_next(place: Path, models: Path) -> None:
    """A partial copy is never found as a model and does not keep its memory."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_models_to_ramdisk(models, place, progress=interrupt)
    assert os.listdir(place) == []
    (place / ".a_large.gguf.partial").write_bytes(b"x" * 5 * MEGABYTE)
    assert find_model_on_ramdisk(place, "a_large.gguf") is None
    copy_models_to_ramdisk(models, place, file_names=["a_large.gguf"])
    assert os.listdir(place) == ["a_large.gguf"]


@on_a_real_tmpfs
def test_two_copies_at_once_are_refused(place: Path, models: Path) -> None:
    """They would take each other's room; the lock goes with its holder."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(RamdiskError, match=r"A copy .* is under way"):
            copy_models_to_ramdisk(models, place)
    finally:
        os.close(descriptor)
    assert len(copy_models_to_ramdisk(models, place)) == 3


# Clear


@on_a_real_tmpfs
def test_clearing_an_idle_ramdisk_frees_all_and_leaves_an_empty_directory(place: Path, models: Path) -> None:
    """Files gone, mount gone; clearing again is an error that touches nothing; setting up works again."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place)
    cleared = clear_ramdisk(place)
    assert cleared.removed_files == ("a_large.gguf", "b_small.gguf", "c_medium.gguf")
    assert (cleared.freed_bytes, cleared.held_bytes) == (8 * MEGABYTE, 0)
    assert (cleared.unmounted, cleared.detached_while_busy) == (True, False)
    assert list_mount_sources(place) == []
    assert list(place.iterdir()) == []
    with pytest.raises(RamdiskError, match="No RAM disk is mounted"):
        clear_ramdisk(place)
    assert not setup_ramdisk(place, EIGHT_MB, reserve_gb=0).was_already_mounted


@on_a_real_tmpfs
def test_a_ramdisk_that_is_copied_to_is_not_cleared(place: Path, models: Path) -> None:
    """The copy goes on to its end; then it can be cleared."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    refusals: list[str] = []

    def clear_meanwhile(*_: object) -> None:
        with pytest.raises(RamdiskError, match=r"A copy .* is under way") as refusal:
            clear_ramdisk(place)
        refusals.append(str(refusal.value))

    assert len(copy_models_to_ramdisk(models, place, progress=clear_meanwhile)) == 3
    assert refusals
    assert clear_ramdisk(place).unmounted


@on_a_real_tmpfs
def test_a_loaded_model_goes_on_unharmed_after_clearing_and_its_memory_follows(place: Path, models: Path) -> None:
    """The mapping reads every byte as before; the others' memory is free at once, its own when it is let go.

    A descriptor on another file of the detached tmpfs serves to look at its fill level.
    """
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place)
    descriptor = os.open(place / "b_small.gguf", os.O_RDONLY)
    try:
        with map_file(place / "a_large.gguf") as mapping:
            cleared = clear_ramdisk(place)
            assert (cleared.unmounted, cleared.detached_while_busy) == (True, True)
            assert (cleared.freed_bytes, cleared.held_bytes) == (2 * MEGABYTE, 6 * MEGABYTE)
            assert list_mount_sources(place) == []
            assert list(place.iterdir()) == []
            assert compute_digest(mapping) == compute_digest((models / "a_large.gguf").read_bytes())
            assert count_used_bytes(descriptor) == 6 * MEGABYTE
        assert count_used_bytes(descriptor) == MEGABYTE
    finally:
        os.close(descriptor)


def count_used_bytes(descriptor: int) -> int:
    figures = os.fstatvfs(descriptor)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


@on_a_real_tmpfs
def test_a_new_ramdisk_at_the_same_place_does_not_disturb_a_model_loaded_from_the_old(
    place: Path, models: Path
) -> None:
    """The old tmpfs lives on out of sight while the path serves the new one."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    [model] = copy_models_to_ramdisk(models, place, file_names=["b_small.gguf"])
    with map_file(model.path) as mapping:
        clear_ramdisk(place)
        assert not setup_ramdisk(place, EIGHT_MB, reserve_gb=0).was_already_mounted
        (models / "b_small.gguf").write_bytes(b"new" * MEGABYTE)
        copy_models_to_ramdisk(models, place, file_names=["b_small.gguf"])
        assert compute_digest(mapping) == model.sha256
    assert clear_ramdisk(place).detached_while_busy is False


@on_a_real_tmpfs
def test_clearing_keeps_what_is_not_a_model_and_stays_mounted_for_it(place: Path, models: Path) -> None:
    """Unmounting would destroy the file, so only the models go."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place, file_names=["b_small.gguf"])
    (place / "notes.txt").write_text("mine")
    (place / "folder.gguf").mkdir()
    cleared = clear_ramdisk(place)
    assert (cleared.unmounted, cleared.kept_names) == (False, ("folder.gguf", "notes.txt"))
    assert (cleared.removed_files, cleared.freed_bytes) == (("b_small.gguf",), MEGABYTE)
    assert list_mount_sources(place) == [RAMDISK_SOURCE_NAME]
    assert (place / "notes.txt").read_text() == "mine"


@on_a_real_tmpfs
def test_a_refused_unmount_leaves_mount_and_models_as_they_were(place: Path, models: Path) -> None:
    """The files are still there, in the same mount, after one refusal and no second attempt."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place)
    before = sorted((file.name, file.stat().st_ino) for file in place.iterdir())
    runner = RefusingRunner()
    with pytest.raises(RamdiskError, match=r"could not be unmounted.*permission denied"):
        clear_ramdisk(place, run=runner)
    assert runner.refused == [" ".join([*PRIVILEGED, "umount", str(place)])]
    assert sorted((file.name, file.stat().st_ino) for file in place.iterdir()) == before
    assert list_mount_sources(place) == [RAMDISK_SOURCE_NAME]


@on_a_real_tmpfs
def test_a_refused_resize_leaves_the_ramdisk_as_it_was(place: Path, models: Path) -> None:
    """The old size stays in force."""
    setup_ramdisk(place, EIGHT_MB, reserve_gb=0)
    copy_models_to_ramdisk(models, place)
    with pytest.raises(RamdiskError, match="permission denied"):
        setup_ramdisk(place, 16 / 1024, reserve_gb=0, run=RefusingRunner())
    assert ramdisk_usage(place).size_in_bytes == 8 * MEGABYTE
    assert len(os.listdir(place)) == 3


# Without the permission


TRY_WITHOUT_PERMISSION = """
import sys
from pathlib import Path
from ramdisk_functions import *
assert not check_that_user_has_required_permissions_to_manage_ramdisks()
try:
    setup_ramdisk(Path(sys.argv[1]), 8 / 1024, reserve_gb=0)
except RamdiskError as error:
    print(error)
"""


@on_a_real_tmpfs
def test_root_without_the_capability_to_mount_is_told_so(place: Path) -> None:
    """As in a container: the check says no, the set-up refuses, and no directory is left."""
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    command = [*PRIVILEGED, *drop, sys.executable, "-c", TRY_WITHOUT_PERMISSION, str(place)]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "CAP_SYS_ADMIN" in answer.stdout
    assert not place.exists()
