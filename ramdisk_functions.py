"""Keep model files in memory: measure, set up, fill and clear a tmpfs ("RAM disk").

    check_that_user_has_required_permissions_to_manage_ramdisks    may this process mount at all?
    setup_ramdisk            mount a tmpfs of ours, no larger than the memory allows, or reuse it
    copy_models_to_ramdisk   copy GGUF files into it, each verified by size and SHA-256
    find_model_on_ramdisk    where a model lies in it, if it does
    ramdisk_usage            how full it is
    clear_ramdisk            remove the models and unmount, without hurting models that are loaded

What is ours is told by the mount's source name, `RAMDISK_SOURCE_NAME`, as the kernel lists it in
`/proc/self/mountinfo`, and by nothing else. Every other mount or directory is refused: never
mounted over, never written to, never unmounted, never deleted from.

What it does not do: it reads no settings, asks for no password (`sudo -n` or nothing), starts no
shell, does not decide which models deserve the memory, and knows nothing of how they are loaded.
It works on Linux only. The functions block; call them from a thread when an event loop runs.
One gigabyte is 2**30 bytes here, as in mount's `size=1G`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from tqdm import tqdm

logger = logging.getLogger(__name__)

RAMDISK_SOURCE_NAME = "llama_embeddings_ramdisk"
GIGABYTE = 2**30
MEGABYTE = 2**20
DEFAULT_RESERVE_GB = 1.0
SMALLEST_SENSIBLE_BYTES = 64 * MEGABYTE  # room for the smallest models in use (25 to 46 MB) and a replacement
COMMAND_TIMEOUT_SECONDS = 30.0
UNMOUNT_ATTEMPTS = 3
PAUSE_BETWEEN_ATTEMPTS_SECONDS = 0.2
CHUNK_BYTES = 4 * MEGABYTE
MODEL_SUFFIX = ".gguf"
PARTIAL_SUFFIX = ".partial"
CAP_SYS_ADMIN = 21  # number of the capability mount(2) asks for, see linux/capability.h
MOUNTINFO = Path("/proc/self/mountinfo")


class RamdiskError(Exception):
    """A RAM disk could not be used; the message says why and what to do."""


class CommandRunner(Protocol):
    """Runs a program given as a list of arguments and returns when it has ended."""

    def __call__(self, arguments: Sequence[str], /) -> subprocess.CompletedProcess[str]: ...


CopyProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes of it copied so far, its size in bytes)."""


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo, as far as it matters here; see proc_pid_mountinfo(5)."""

    mount_id: int
    parent_id: int
    device: int
    root: str
    mount_point: str
    file_system: str
    source: str

    @property
    def is_ours(self) -> bool:
        return self.file_system == "tmpfs" and self.source == RAMDISK_SOURCE_NAME and self.root == "/"


@dataclass(frozen=True)
class RamdiskState:
    path: Path
    size_in_bytes: int
    requested_bytes: int
    was_already_mounted: bool
    was_resized: bool

    @property
    def is_smaller_than_requested(self) -> bool:
        return self.size_in_bytes < self.requested_bytes


@dataclass(frozen=True)
class RamdiskUsage:
    path: Path
    size_in_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class CopiedModel:
    file_name: str
    path: Path
    size_in_bytes: int
    sha256: str
    was_already_present: bool


@dataclass(frozen=True)
class ClearedRamdisk:
    """What `clear_ramdisk` did.

    `held_bytes` is memory the kernel gives back only when the programs that have files of the
    RAM disk mapped or open let go of them. `kept_names` are entries that are not models: while
    there are any, the RAM disk stays mounted, because unmounting would destroy them.
    """

    path: Path
    freed_bytes: int
    held_bytes: int
    removed_files: tuple[str, ...]
    kept_names: tuple[str, ...]
    unmounted: bool
    detached_while_busy: bool


# Commands and permissions


def run_command(arguments: Sequence[str], /) -> subprocess.CompletedProcess[str]:
    """Run a program without a shell, without input, and for `COMMAND_TIMEOUT_SECONDS` at most.

    The environment is reduced to the system's program directories, so that what root runs is not
    chosen by the caller's PATH, and to the C locale, so that messages can be recognised.

    Raises RamdiskError when the program is missing, cannot be started or exceeds its time.
    """
    try:
        return subprocess.run(  # noqa: S603 - a list of arguments built in this module, no shell
            list(arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_SECONDS,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError as error:
        raise RamdiskError(f"The program {arguments[0]!r} is not installed.") from error
    except subprocess.TimeoutExpired as error:
        raise RamdiskError(f"{arguments[0]!r} did not end within {COMMAND_TIMEOUT_SECONDS:g} seconds.") from error
    except OSError as error:
        raise RamdiskError(f"{arguments[0]!r} could not be run: {error}.") from error


def check_that_user_has_required_permissions_to_manage_ramdisks(run: CommandRunner = run_command) -> bool:
    """Tell whether this process may mount and unmount: as root, or through sudo without a password.

    Never prompts. A yes is not a promise: a security policy of the kernel may still refuse the
    mount itself, which `setup_ramdisk` then reports.
    """
    try:
        require_linux()
        find_command_prefix(run)
    except RamdiskError as error:
        logger.info("RAM disks cannot be managed: %s", error)
        return False
    return True


def require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise RamdiskError(f"RAM disks are only supported on Linux, this is {sys.platform!r}. Use the disk instead.")


def find_command_prefix(run: CommandRunner) -> list[str]:
    """Find what to put before mount and umount: nothing for root, `sudo -n` for others.

    Raises RamdiskError when neither would be allowed.
    """
    if os.geteuid() != 0:
        return require_sudo_without_password(run)
    if not has_capability(Path("/proc/self/status").read_text(), CAP_SYS_ADMIN):
        raise RamdiskError(
            "This process is root, but without the capability to mount (CAP_SYS_ADMIN), as in most containers. "
            "Add the capability or switch the RAM disk off."
        )
    return []


def has_capability(process_status: str, number: int) -> bool:
    """Read from the text of /proc/<pid>/status whether a capability is in effect."""
    effective = re.search(r"^CapEff:\s*([0-9a-fA-F]+)$", process_status, re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> number & 1)


def require_sudo_without_password(run: CommandRunner) -> list[str]:
    """Return the sudo prefix if mount and umount both run under it without a password.

    The programs are really started (`--version`), because `sudo -l` also lists what it would ask
    a password for. Rules that allow only certain arguments therefore count as a no.
    """
    prefix = ["sudo", "-n"]
    for program in ("mount", "umount"):
        answer = run([*prefix, program, "--version"])
        if answer.returncode != 0:
            raise RamdiskError(
                f"Managing a RAM disk needs root, or sudo for mount and umount without a password; "
                f"{describe_failure(answer)}. Allow it in sudoers, run as root, or switch the RAM disk off."
            )
    return prefix


def describe_failure(answer: subprocess.CompletedProcess[str]) -> str:
    said = " ".join((answer.stderr or answer.stdout or "").split())
    program = " ".join(str(argument) for argument in answer.args[:4])
    return f"{program!r} ended with status {answer.returncode}: {said.rstrip('.') or 'no message'}"


# What is mounted where


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of /proc/<pid>/mountinfo; lines of another form are left out.

    Fields are separated by single spaces and may themselves hold any other white space, so
    neither `split()` nor `splitlines()` would do. Format: proc_pid_mountinfo(5).
    """
    return [mount for line in text.split("\n") if (mount := parse_mountinfo_line(line)) is not None]


def parse_mountinfo_line(line: str) -> Mount | None:
    fields = line.split(" ")
    if "-" not in fields[6:]:
        return None
    separator = fields.index("-", 6)  # optional fields, any number of them, end here
    if len(fields) < separator + 3:
        return None
    major, _, minor = fields[2].partition(":")
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=os.makedev(int(major), int(minor)),
        root=decode_octal_escapes(fields[3]),
        mount_point=decode_octal_escapes(fields[4]),
        file_system=decode_octal_escapes(fields[separator + 1]),
        source=decode_octal_escapes(fields[separator + 2]),
    )


def decode_octal_escapes(field: str) -> str:
    r"""Undo the kernel's escapes: space is written \040, tab \011, newline \012, backslash \134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def find_mount_at(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """Find what is mounted exactly at `path`; of several stacked mounts, the visible one."""
    here = [mount for mount in mounts if mount.mount_point == str(path)]
    covered = {mount.parent_id for mount in here}
    visible = [mount for mount in here if mount.mount_id not in covered]
    return visible[-1] if visible else None


def read_mount_at(path: Path) -> Mount | None:
    return find_mount_at(path, parse_mountinfo(MOUNTINFO.read_text(errors="surrogateescape")))


def resolve_mount_point(path: Path | str) -> Path:
    """Return the absolute path with symbolic links in its parents resolved.

    Raises RamdiskError when the last part is itself a symbolic link, `..` or missing: the place
    could then be another one at the next look.
    """
    given = Path(path)
    if given.name in ("", ".."):
        raise RamdiskError(f"{str(given)!r} is no place for a RAM disk. Name a directory of its own.")
    try:
        resolved = given.parent.resolve() / given.name
        is_link = resolved.is_symlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's answer to a loop of links
        raise RamdiskError(f"The path {str(given)!r} cannot be resolved: {error}.") from error
    if is_link:
        raise RamdiskError(f"{str(resolved)!r} is a symbolic link. Name the directory it points to.")
    return resolved


def require_our_ramdisk(path: Path | str) -> Path:
    """Return the resolved path if the RAM disk visible there is ours.

    The device is compared as well, because a mount over a parent directory hides ours while the
    kernel still lists it.

    Raises RamdiskError when something else, or nothing, is mounted there.
    """
    require_linux()
    place = resolve_mount_point(path)
    mount = read_mount_at(place)
    if mount is None:
        raise RamdiskError(f"No RAM disk is mounted at {str(place)!r}; it was left as it is.")
    if not mount.is_ours or read_device(place) != mount.device:
        raise RamdiskError(f"What is mounted at {str(place)!r} is not a RAM disk of ours; it was left as it is.")
    return place


def read_device(path: Path) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_dev
    except OSError:
        return None


def ramdisk_usage(path: Path | str) -> RamdiskUsage:
    """Measure our RAM disk at `path`, in bytes. Raises RamdiskError when there is none of ours."""
    return measure_usage(require_our_ramdisk(path))


def measure_usage(place: Path) -> RamdiskUsage:
    try:
        figures = os.statvfs(place)
    except OSError as error:
        raise RamdiskError(f"The RAM disk at {str(place)!r} cannot be read: {error}.") from error
    return RamdiskUsage(
        path=place,
        size_in_bytes=figures.f_blocks * figures.f_frsize,
        used_bytes=(figures.f_blocks - figures.f_bfree) * figures.f_frsize,
        free_bytes=figures.f_bavail * figures.f_frsize,
    )


# How much memory there is


def measure_available_memory() -> int:
    """Measure how many bytes can be taken without swapping, within the limits of our control group.

    psutil reports the machine; in a container the group's limit is what kills the process.
    """
    available = int(psutil.virtual_memory().available)
    headroom = measure_control_group_headroom()
    return available if headroom is None else min(available, headroom)


def measure_control_group_headroom(
    membership: Path = Path("/proc/self/cgroup"), hierarchy: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Measure the bytes left under the tightest memory limit above us; None when there is none.

    Only the unified hierarchy (version 2) is read: version 1 counts as no limit.
    """
    try:
        groups = [line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")]
    except OSError:
        return None
    if not groups:
        return None
    leaf = hierarchy / groups[0].lstrip("/")
    candidates = [group for group in (leaf, *leaf.parents) if group.is_relative_to(hierarchy)]
    rooms = [room for group in candidates if (room := read_group_headroom(group)) is not None]
    return min(rooms, default=None)


def read_group_headroom(group: Path) -> int | None:
    """Read one group's limit less what it cannot give back: file cache not in use does not count."""
    try:
        limit = (group / "memory.max").read_text().strip()
        current = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text()
    except OSError:
        return None
    if limit == "max":
        return None
    reclaimable = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
    return max(int(limit) - current + (int(reclaimable[1]) if reclaimable else 0), 0)


def choose_ramdisk_size(requested_bytes: int, *, available_bytes: int, reserve_bytes: int, used_bytes: int = 0) -> int:
    """Choose a size in bytes, a whole number of pages: what was asked for, or what memory allows.

    `used_bytes` is what a RAM disk that is already there holds: that memory is taken already, so
    keeping it is always allowed.

    Raises RamdiskError when less than the request and less than `SMALLEST_SENSIBLE_BYTES` is
    left for a new or empty one. The result is never 0, which tmpfs would take for "no limit".
    """
    allowed = max(available_bytes - reserve_bytes, 0) + used_bytes
    smallest = used_bytes or max(min(requested_bytes, SMALLEST_SENSIBLE_BYTES), mmap.PAGESIZE)
    if allowed < smallest:
        raise RamdiskError(
            f"Not enough memory for a RAM disk: {format_size(available_bytes)} are available, "
            f"{format_size(reserve_bytes)} of them are reserved for the server, "
            f"{format_size(requested_bytes)} were asked for. Free memory or switch the RAM disk off."
        )
    pages = min(requested_bytes, allowed) // mmap.PAGESIZE
    return max(pages, 1) * mmap.PAGESIZE


def format_size(size_in_bytes: int) -> str:
    return f"{size_in_bytes / MEGABYTE:,.1f} MB"


def convert_gigabytes(value_gb: float, name: str, *, may_be_zero: bool = False) -> int:
    if not math.isfinite(value_gb) or value_gb < 0 or (value_gb == 0 and not may_be_zero):
        raise RamdiskError(f"{name} must be a positive number of gigabytes, not {value_gb!r}.")
    return int(value_gb * GIGABYTE)


# Set up


def setup_ramdisk(
    path: Path | str,
    size_gb: float,
    *,
    reserve_gb: float = DEFAULT_RESERVE_GB,
    run: CommandRunner = run_command,
) -> RamdiskState:
    """Mount a RAM disk of ours at `path`, or reuse the one that is there.

    The size is `size_gb`, or what available memory less `reserve_gb` allows if that is smaller. A
    RAM disk of ours is resized in place when its size differs. The directory is made if its
    parent exists, and removed again if the mount fails.

    Raises RamdiskError when the memory does not suffice, the permission is missing, what is in
    our RAM disk would not fit into the new size, or the place is in use: another mount, a
    directory with something in it, or one of another user.
    """
    require_linux()
    requested = convert_gigabytes(size_gb, "size_gb")
    reserve = convert_gigabytes(reserve_gb, "reserve_gb", may_be_zero=True)
    place = resolve_mount_point(path)
    if read_mount_at(place) is not None:
        return reuse_ramdisk(require_our_ramdisk(place), requested, reserve, run)
    size = choose_ramdisk_size(requested, available_bytes=measure_available_memory(), reserve_bytes=reserve)
    prefix = find_command_prefix(run)
    was_made = prepare_mount_point(place)
    try:
        mount_ramdisk(place, size, prefix, run)
    except RamdiskError:
        if was_made and read_mount_at(place) is None:
            with contextlib.suppress(OSError):  # somebody else has put something in it
                place.rmdir()
        raise
    logger.info("RAM disk of %s mounted at %s", format_size(size), place)
    return RamdiskState(place, size, requested, was_already_mounted=False, was_resized=False)


def reuse_ramdisk(place: Path, requested: int, reserve: int, run: CommandRunner) -> RamdiskState:
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise RamdiskError(f"The RAM disk at {str(place)!r} belongs to another user. Choose another path.")
    usage = measure_usage(place)
    if requested < usage.used_bytes:
        raise RamdiskError(
            f"The RAM disk at {str(place)!r} holds {format_size(usage.used_bytes)}, more than the "
            f"{format_size(requested)} asked for. Clear it first or ask for more."
        )
    size = choose_ramdisk_size(
        requested,
        available_bytes=measure_available_memory(),
        reserve_bytes=reserve,
        used_bytes=usage.used_bytes,
    )
    if size != usage.size_in_bytes:
        mount_ramdisk(place, size, find_command_prefix(run), run, remount=True)
        logger.info("RAM disk at %s resized to %s", place, format_size(size))
    return RamdiskState(place, size, requested, was_already_mounted=True, was_resized=size != usage.size_in_bytes)


def prepare_mount_point(place: Path) -> bool:
    """Make the directory, or check that the one there is empty and nobody else's.

    Returns whether it was made. Raises RamdiskError when it cannot be made or used.
    """
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        check_existing_directory(place)
        return False
    except OSError as error:
        raise RamdiskError(
            f"The directory {str(place)!r} cannot be made: {error.strerror}. Make it yourself or choose another path."
        ) from error
    return True


def check_existing_directory(place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        raise RamdiskError(f"{str(place)!r} is not a directory. Choose another path for the RAM disk.")
    if place.stat().st_uid not in (0, os.geteuid()):
        raise RamdiskError(f"The directory {str(place)!r} belongs to another user. Choose another path.")
    try:
        is_empty = not os.listdir(place)
    except PermissionError as error:
        raise RamdiskError(f"The directory {str(place)!r} cannot be read. Choose another path.") from error
    if not is_empty:
        raise RamdiskError(f"The directory {str(place)!r} is not empty; a RAM disk would hide what is in it.")


def mount_ramdisk(
    place: Path, size_in_bytes: int, prefix: Sequence[str], run: CommandRunner, *, remount: bool = False
) -> None:
    """Mount or resize, then look whether the kernel agrees. Raises RamdiskError when it does not."""
    options = build_mount_options(size_in_bytes, through_sudo=bool(prefix), remount=remount)
    answer = run([*prefix, "mount", "-t", "tmpfs", "-o", options, RAMDISK_SOURCE_NAME, str(place)])
    if answer.returncode != 0:
        raise RamdiskError(f"The RAM disk could not be mounted at {str(place)!r}; {describe_failure(answer)}.")
    if measure_usage(require_our_ramdisk(place)).size_in_bytes != size_in_bytes:
        raise RamdiskError(f"The RAM disk at {str(place)!r} does not have the size of {format_size(size_in_bytes)}.")


def build_mount_options(size_in_bytes: int, *, through_sudo: bool, remount: bool) -> str:
    options = [f"size={size_in_bytes}", "mode=0700", "nosuid", "nodev", "noexec"]
    if through_sudo:  # otherwise root would own it, and mode 0700 would lock us out
        options += [f"uid={os.getuid()}", f"gid={os.getgid()}"]
    return ",".join(["remount", *options] if remount else options)


# Copy and find


def copy_models_to_ramdisk(
    models_directory: Path | str,
    ramdisk_path: Path | str,
    *,
    file_names: Sequence[str] | None = None,
    progress: CopyProgress | None = None,
) -> list[CopiedModel]:
    """Copy GGUF files into our RAM disk: the named ones in that order, or all, smallest first.

    A file appears under its name only when complete and verified, by one rename; a model that is
    loaded from an older file of that name keeps its file. Files already there with the same size
    and SHA-256 are not copied again. Without `progress`, a bar is drawn if there is a terminal.

    Raises RamdiskError when a file is missing, does not fit (before it is copied), changes
    meanwhile, arrives damaged, or when another copy is under way. What was copied before stays.
    """
    place = require_our_ramdisk(ramdisk_path)
    sources = list_models(Path(models_directory), file_names)
    total = sum(size for _, size in sources)
    bar_is_off = None if progress is None else True  # None: off unless there is a terminal
    copied: list[CopiedModel] = []
    with hold_copy_lock(place), tqdm(total=total, unit="B", unit_scale=True, disable=bar_is_off) as bar:
        remove_partial_copies(place)
        for source, size in sources:
            before = sum(model.size_in_bytes for model in copied)

            def report(name: str, done: int, of: int, before: int = before) -> None:
                bar.update(before + done - bar.n)
                if progress is not None:
                    progress(name, done, of)

            copied.append(copy_model(source, size, place, report))
    return copied


def list_models(directory: Path, file_names: Sequence[str] | None) -> list[tuple[Path, int]]:
    """List (file, size in bytes). Raises RamdiskError for a name that is none or has no file."""
    if file_names is not None:
        return [measure_model(directory / require_plain_model_name(name)) for name in file_names]
    try:
        names = [name for name in os.listdir(directory) if is_model_name(name)]
    except OSError as error:
        raise RamdiskError(f"The models directory cannot be read: {error}.") from error
    found = [measure_model(directory / name) for name in names if (directory / name).is_file()]
    return sorted(found, key=lambda item: (item[1], item[0].name))


def measure_model(file: Path) -> tuple[Path, int]:
    if not file.is_file():
        raise RamdiskError(f"There is no model file {file.name!r} in {str(file.parent)!r}.")
    return file, file.stat().st_size


def is_model_name(name: str) -> bool:
    return name.lower().endswith(MODEL_SUFFIX) and not name.startswith(".")


def require_plain_model_name(name: str) -> str:
    if "/" in name or "\0" in name or not is_model_name(name):
        raise RamdiskError(f"{name!r} is not the plain name of a {MODEL_SUFFIX} file.")
    return name


@contextlib.contextmanager
def hold_copy_lock(place: Path) -> Iterator[None]:
    """Let one copy at a time fill the RAM disk; the kernel drops the lock when a process dies."""
    import fcntl  # does not exist on Windows, where this module must still be importable

    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise RamdiskError(f"The RAM disk at {str(place)!r} cannot be opened: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RamdiskError(f"A copy to the RAM disk at {str(place)!r} is under way. Wait for it.") from error
        yield
    finally:
        os.close(descriptor)


def name_partial_copy(name: str) -> str:
    return f".{name}{PARTIAL_SUFFIX}"


def is_partial_copy(name: str) -> bool:
    return name.startswith(".") and name.lower().endswith(MODEL_SUFFIX + PARTIAL_SUFFIX)


def remove_partial_copies(place: Path) -> None:
    """Remove what an interrupted copy left; the caller holds the lock, so none is in progress."""
    models, _ = list_entries(place)
    remove_files(place, [name for name in models if is_partial_copy(name)])


def copy_model(source: Path, size: int, place: Path, report: CopyProgress) -> CopiedModel:
    target = place / source.name
    try:
        present = find_same_file(source, size, target)
        if present is not None:
            report(source.name, size, size)
            return CopiedModel(source.name, target, size, present, was_already_present=True)
        require_room(source.name, size, place)
        digest = copy_verified(source, size, target, report)
    except OSError as error:
        raise RamdiskError(f"Copying {source.name!r} to the RAM disk failed: {error}.") from error
    logger.info("Copied %s (%s) to the RAM disk", source.name, format_size(size))
    return CopiedModel(source.name, target, size, digest, was_already_present=False)


def find_same_file(source: Path, size: int, target: Path) -> str | None:
    """Return the SHA-256 both files share, or None when `target` is missing or differs."""
    if target.is_symlink() or not target.is_file() or target.stat().st_size != size:
        return None
    digest = compute_sha256(target)
    return digest if compute_sha256(source) == digest else None


def compute_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_room(name: str, size: int, place: Path) -> None:
    """Raise RamdiskError, naming the sizes, when a file of `size` bytes does not fit now."""
    free = ramdisk_usage(place).free_bytes  # looks again whether it is still ours: it may have been cleared meanwhile
    available = measure_available_memory()
    if math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE > min(free, available):
        raise RamdiskError(
            f"No room for {name!r} on the RAM disk: it has {format_size(size)}, {format_size(free)} are free there "
            f"and {format_size(available)} of memory are available. Models copied before stay usable."
        )


def copy_verified(source: Path, size: int, target: Path, report: CopyProgress) -> str:
    """Copy under a temporary name, compare what was read back, rename. Returns the SHA-256."""
    partial = target.with_name(name_partial_copy(target.name))
    try:
        digest = copy_and_digest(source, size, partial, report)
        if partial.stat().st_size != size or compute_sha256(partial) != digest:
            raise RamdiskError(f"The copy of {source.name!r} on the RAM disk is damaged; it was removed. Try again.")
        partial.chmod(0o400)  # a file that programs map must never be written in place
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def copy_and_digest(source: Path, size: int, partial: Path, report: CopyProgress) -> str:
    """Copy at most `size` bytes and return the SHA-256 of what was read from `source`."""
    digest = hashlib.sha256()
    done = 0
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as writer, source.open("rb") as reader:
        while done <= size and (chunk := reader.read(CHUNK_BYTES)):
            digest.update(chunk)
            writer.write(chunk)
            done += len(chunk)
            report(source.name, done, size)
    if done != size:
        raise RamdiskError(f"The model file {source.name!r} changed while it was copied. Try again.")
    return digest.hexdigest()


def find_model_on_ramdisk(ramdisk_path: Path | str, file_name: str) -> Path | None:
    """Return where a complete copy of the model lies on our RAM disk, or None.

    None also when nothing of ours is mounted there or it is not readable. Raises RamdiskError for
    a name that is not a plain file name, and on other systems than Linux.
    """
    require_linux()
    require_plain_model_name(file_name)
    try:
        file = require_our_ramdisk(ramdisk_path) / file_name
        is_usable = not file.is_symlink() and file.is_file() and os.access(file, os.R_OK)
    except (RamdiskError, PermissionError):
        return None
    return file if is_usable else None


# Clear


def clear_ramdisk(path: Path | str, *, run: CommandRunner = run_command) -> ClearedRamdisk:
    """Remove the models from our RAM disk and unmount it.

    Entries that are neither models nor partial copies are kept, and so is the mount then: only the
    models are removed. Otherwise nothing is deleted before it has shown that we may unmount:

    1. Unmount. If nothing uses the RAM disk, its memory is free and that was all.
    2. If the kernel says "busy", a model is mapped or open. Remove the file names: under Linux a
       mapping keeps its file alive, so loaded models go on unharmed, and the others' memory is
       free. Files are never shortened, which would kill their readers (SIGBUS).
    3. Try to unmount again, `UNMOUNT_ATTEMPTS` times in all, then detach (`umount -l`): the path
       is free, the mappings stay valid, and the kernel returns their memory with the last of them.

    Raises RamdiskError when it is not ours or is being copied to (nothing is touched), or unmounting is refused.
    """
    place = require_our_ramdisk(path)
    # Not for longer: who holds it keeps the RAM disk busy. A copy that begins right now fails cleanly.
    with hold_copy_lock(place):
        pass
    usage = measure_usage(place)
    models, others = list_entries(place)
    if others:
        remove_files(place, models)
        left = measure_usage(place).used_bytes
        logger.warning("The RAM disk at %s stays mounted: it holds %d entries that are not models", place, len(others))
        return ClearedRamdisk(place, max(usage.used_bytes - left, 0), left, models, others, False, False)
    prefix = find_command_prefix(run)
    if unmount(place, prefix, run):
        return ClearedRamdisk(place, usage.used_bytes, 0, models, (), True, False)
    remove_files(place, models)
    return unmount_busy_ramdisk(place, usage.used_bytes, models, prefix, run)


def unmount_busy_ramdisk(
    place: Path, used_bytes: int, removed: tuple[str, ...], prefix: Sequence[str], run: CommandRunner
) -> ClearedRamdisk:
    for _ in range(UNMOUNT_ATTEMPTS - 1):
        time.sleep(PAUSE_BETWEEN_ATTEMPTS_SECONDS)
        if unmount(place, prefix, run):
            return ClearedRamdisk(place, used_bytes, 0, removed, (), True, False)
    held = measure_usage(place).used_bytes
    if not unmount(place, prefix, run, lazily=True):
        raise RamdiskError(f"The RAM disk at {str(place)!r} could not be detached. Its models were removed.")
    logger.info("RAM disk at %s detached while in use; %s are freed when it is let go", place, format_size(held))
    return ClearedRamdisk(place, max(used_bytes - held, 0), held, removed, (), True, True)


def list_entries(place: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the names on the RAM disk: models and partial copies, and everything else."""
    models: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                is_model = is_model_name(entry.name) or is_partial_copy(entry.name)
                (models if is_model and entry.is_file(follow_symlinks=False) else others).append(entry.name)
    except OSError as error:
        raise RamdiskError(f"The RAM disk at {str(place)!r} cannot be read: {error.strerror}.") from error
    return tuple(sorted(models)), tuple(sorted(others))


def remove_files(place: Path, names: Sequence[str]) -> None:
    """Remove files through an open directory that was checked, so that no other can slip in."""
    mount = read_mount_at(place)
    try:
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if mount is None or not mount.is_ours or os.fstat(directory).st_dev != mount.device:
                raise RamdiskError(f"The RAM disk at {str(place)!r} was replaced meanwhile; nothing was removed.")
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a copy that gave up removes its own file
                    os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise RamdiskError(f"Models on the RAM disk at {str(place)!r} cannot be removed: {error}.") from error


def unmount(place: Path, prefix: Sequence[str], run: CommandRunner, *, lazily: bool = False) -> bool:
    """Unmount once. False when the RAM disk is busy; RamdiskError when it is refused."""
    answer = run([*prefix, "umount", *(["-l"] if lazily else []), str(place)])
    if answer.returncode == 0:
        if (mount := read_mount_at(place)) is not None and mount.is_ours:
            raise RamdiskError(f"umount reported success, but the RAM disk at {str(place)!r} is still mounted.")
        return True
    said = answer.stderr.replace(str(place), "")  # the path itself may contain the words
    if "target is busy" in said or "resource busy" in said:
        return False
    raise RamdiskError(f"The RAM disk at {str(place)!r} could not be unmounted; {describe_failure(answer)}.")
