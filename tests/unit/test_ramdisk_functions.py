"""The RAM disk's rules without mounting anything: what is recognised, refused, and asked of the system.

The tests hold for any user: commands go to runners that record, refuse or lie, and the one place
that is taken for a mount is an ordinary directory under a mountinfo written by the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

import ramdisk_functions
from ramdisk_functions import (
    GIGABYTE,
    MEGABYTE,
    RAMDISK_SOURCE_NAME,
    UNMOUNT_ATTEMPTS,
    ClearedRamdisk,
    RamdiskError,
    build_mount_options,
    check_that_user_has_required_permissions_to_manage_ramdisks,
    choose_ramdisk_size,
    clear_ramdisk,
    copy_models_to_ramdisk,
    find_model_on_ramdisk,
    find_mount_at,
    has_capability,
    measure_control_group_headroom,
    parse_mountinfo,
    ramdisk_usage,
    require_our_ramdisk,
    require_plain_model_name,
    require_sudo_without_password,
    resolve_mount_point,
    run_command,
    setup_ramdisk,
    unmount,
    unmount_busy_ramdisk,
)

PASSWORD_NEEDED = "sudo: a password is required\n"


@dataclass
class RecordingRunner:
    """Answers commands from a function of the arguments and remembers them."""

    answer: Callable[[Sequence[str]], tuple[int, str]] = lambda _: (0, "")
    commands: list[list[str]] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str], /) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(arguments))
        status, message = self.answer(arguments)
        return subprocess.CompletedProcess(list(arguments), status, stdout="", stderr=message)


def make_refusing_runner() -> RecordingRunner:
    return RecordingRunner(lambda _: (1, PASSWORD_NEEDED))


def write_mountinfo_line(place: Path, *, source: str = RAMDISK_SOURCE_NAME, device_offset: int = 0) -> str:
    device = os.stat(place).st_dev
    escaped = str(place).replace("\\", "\\134").replace(" ", "\\040")
    numbers = f"{os.major(device)}:{os.minor(device) + device_offset}"
    return f"42 27 {numbers} / {escaped} rw,nosuid,nodev,noexec - tmpfs {source} rw,size=8192k,mode=700\n"


@pytest.fixture
def claimed_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ordinary directory with a model in it, which the mountinfo in force calls a RAM disk of ours."""
    place = tmp_path / "ram disk"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"weights")
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(write_mountinfo_line(place))
    monkeypatch.setattr(ramdisk_functions, "MOUNTINFO", mountinfo)
    return place


# Mountinfo


def test_octal_escapes_of_mount_points_and_sources_are_decoded() -> None:
    """Space, tab, newline and backslash come as \\040, \\011, \\012 and \\134."""
    line = r"42 27 0:39 / /mnt/a\040b\011c\012d\134e rw shared:7 master:1 - tmpfs my\040disk rw"
    [mount] = parse_mountinfo(line)
    assert mount.mount_point == "/mnt/a b\tc\nd\\e"
    assert mount.source == "my disk"
    assert (mount.mount_id, mount.parent_id, mount.device) == (42, 27, os.makedev(0, 39))


@pytest.mark.parametrize("optional", ["", "shared:1 ", "shared:1 master:2 propagate_from:3 "])
def test_any_number_of_optional_fields_is_skipped(optional: str) -> None:
    """The fields after the mount options vary in number and end at a lone hyphen."""
    [mount] = parse_mountinfo(f"42 27 0:39 / /mnt/x rw {optional}- tmpfs {RAMDISK_SOURCE_NAME} rw,size=8k")
    assert mount.is_ours


@pytest.mark.parametrize("path", ["/mnt/\u3000wide", "/mnt/line\u2028separator", "/mnt/-", "/mnt/form\x0cfeed"])
def test_unusual_white_space_and_hyphens_do_not_split_a_path(path: str) -> None:
    """The kernel escapes only ASCII space, tab and newline; everything else stands as it is."""
    [mount] = parse_mountinfo(f"42 27 0:39 / {path} rw - tmpfs none rw\n")
    assert mount.mount_point == path


def test_an_empty_source_and_malformed_lines_do_not_disturb_the_others() -> None:
    """A source may be empty (two spaces); a cut line is left out."""
    text = "\n42 27 0:39 / /mnt\n1 2 0:3 / /a rw - tmpfs  rw\n1 2 0:3 / /b rw -\n5 6 0:7 / /c rw - ext4 /dev/sda1 rw\n"
    assert [(mount.mount_point, mount.source) for mount in parse_mountinfo(text)] == [("/a", ""), ("/c", "/dev/sda1")]


def test_the_kernels_own_list_agrees_with_psutil() -> None:
    """Mount points and types equal what psutil reads from another file of the kernel."""
    ours = {(m.mount_point, m.file_system) for m in parse_mountinfo(Path("/proc/self/mountinfo").read_text())}
    theirs = {(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)}
    assert ours
    assert theirs <= ours


@pytest.mark.parametrize(
    ("root", "file_system", "source", "expected"),
    [
        ("/", "tmpfs", RAMDISK_SOURCE_NAME, True),
        ("/", "tmpfs", "tmpfs", False),
        ("/", "tmpfs", RAMDISK_SOURCE_NAME + "2", False),
        ("/", "ext4", RAMDISK_SOURCE_NAME, False),
        ("/part", "tmpfs", RAMDISK_SOURCE_NAME, False),
    ],
)
def test_only_a_whole_tmpfs_under_our_name_is_ours(root: str, file_system: str, source: str, expected: bool) -> None:
    """Another name, another type, or a bind mount of a part does not count."""
    [mount] = parse_mountinfo(f"42 27 0:39 {root} /mnt/x rw - {file_system} {source} rw")
    assert mount.is_ours is expected


def test_of_stacked_mounts_the_visible_one_is_found() -> None:
    """The one on top is the one that is no other's parent there, wherever it stands in the list."""
    top = "50 42 0:40 / /mnt/x rw - tmpfs other rw"
    below = f"42 27 0:39 / /mnt/x rw - tmpfs {RAMDISK_SOURCE_NAME} rw"
    for lines in ([top, below], [below, top]):
        mount = find_mount_at(Path("/mnt/x"), parse_mountinfo("\n".join(lines)))
        assert mount is not None
        assert mount.source == "other"
    assert find_mount_at(Path("/mnt"), parse_mountinfo(below)) is None


def test_a_ramdisk_hidden_under_another_mount_is_not_taken_for_what_is_visible(
    claimed_place: Path, tmp_path: Path
) -> None:
    """The kernel lists ours at the path, but the directory seen there is on another device."""
    (tmp_path / "mountinfo").write_text(write_mountinfo_line(claimed_place, device_offset=1))
    runner = RecordingRunner()
    with pytest.raises(RamdiskError, match="not a RAM disk of ours"):
        clear_ramdisk(claimed_place, run=runner)
    assert runner.commands == []
    assert (claimed_place / "model.gguf").exists()


# Permissions and commands


@pytest.mark.parametrize(
    ("effective", "expected"),
    [("000001ffffffffff", True), ("0000000000200000", True), ("00000000a80425fb", False), ("0" * 16, False)],
)
def test_the_capability_to_mount_is_bit_21_of_the_effective_set(effective: str, expected: bool) -> None:
    """a80425fb is what a container's root has by default: without CAP_SYS_ADMIN."""
    status = f"Name:\tx\nCapInh:\t000001ffffffffff\nCapEff:\t{effective}\nCapBnd:\t000001ffffffffff\n"
    assert has_capability(status, 21) is expected


def test_sudo_is_tried_without_a_prompt_for_both_programs() -> None:
    """`-n` makes sudo fail rather than ask."""
    runner = RecordingRunner()
    assert require_sudo_without_password(runner) == ["sudo", "-n"]
    assert runner.commands == [["sudo", "-n", "mount", "--version"], ["sudo", "-n", "umount", "--version"]]


@pytest.mark.parametrize("refused", ["mount", "umount"])
def test_sudo_that_asks_for_a_password_is_a_clear_error(refused: str) -> None:
    """One of the two programs refused is enough; the message says what sudo said and what to do."""
    runner = RecordingRunner(lambda command: (1, PASSWORD_NEEDED) if command[2] == refused else (0, ""))
    with pytest.raises(RamdiskError, match=r"a password is required.*Allow it in sudoers"):
        require_sudo_without_password(runner)


def test_only_root_is_trusted_without_asking_sudo() -> None:
    """With everything refused the answer is no; for root it depends on the capability alone."""
    runner = make_refusing_runner()
    allowed = check_that_user_has_required_permissions_to_manage_ramdisks(runner)
    is_root = os.geteuid() == 0
    assert allowed is (is_root and has_capability(Path("/proc/self/status").read_text(), 21))
    assert all(command[:2] == ["sudo", "-n"] for command in runner.commands)
    assert bool(runner.commands) is not is_root


def test_mount_options_name_size_and_restrictions() -> None:
    """Through sudo the owner is named too, because mode 0700 under root would lock the user out."""
    assert build_mount_options(4096, through_sudo=False, remount=False) == "size=4096,mode=0700,nosuid,nodev,noexec"
    through_sudo = build_mount_options(4096, through_sudo=True, remount=True)
    assert through_sudo == f"remount,size=4096,mode=0700,nosuid,nodev,noexec,uid={os.getuid()},gid={os.getgid()}"


def test_arguments_reach_the_program_literally() -> None:
    """No shell expands, splits or runs anything in them."""
    answer = run_command(["printf", "%s|", "a b", "$(id)", "; exit 3", "*"])
    assert (answer.returncode, answer.stdout) == (0, "a b|$(id)|; exit 3|*|")


def test_commands_get_the_systems_path_and_no_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What root runs is not chosen by the caller's PATH."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    names = {line.partition("=")[0] for line in run_command(["env"]).stdout.splitlines()}
    assert names == {"PATH", "LC_ALL"}


def test_a_missing_program_is_a_clear_error() -> None:
    """As on a machine without sudo."""
    with pytest.raises(RamdiskError, match="'no-such-program' is not installed"):
        run_command(["no-such-program"])


def test_a_command_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has a time limit."""
    monkeypatch.setattr(ramdisk_functions, "COMMAND_TIMEOUT_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(RamdiskError, match=r"did not end within 0\.1 seconds"):
        run_command(["sleep", "20"])
    assert time.monotonic() - started < 5


# Sizes


@pytest.mark.parametrize(
    ("requested", "available", "used", "expected"),
    [
        (2 * GIGABYTE, 8 * GIGABYTE, 0, 2 * GIGABYTE),
        (2 * GIGABYTE, 2 * GIGABYTE, 0, GIGABYTE),
        (MEGABYTE, GIGABYTE + MEGABYTE, 0, MEGABYTE),
        (2 * GIGABYTE, GIGABYTE // 2, 300 * MEGABYTE, 300 * MEGABYTE),
        (2 * GIGABYTE, 0, 8192, 8192),
        (2 * GIGABYTE, 2 * GIGABYTE + 5000, 0, GIGABYTE + 4096),
        (1, 8 * GIGABYTE, 0, 4096),
    ],
)
def test_size_is_what_was_asked_for_or_what_memory_less_a_reserve_of_1_gb_allows(
    requested: int, available: int, used: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole pages; memory the RAM disk already holds counts as allowed."""
    monkeypatch.setattr("mmap.PAGESIZE", 4096)
    size = choose_ramdisk_size(requested, available_bytes=available, reserve_bytes=GIGABYTE, used_bytes=used)
    assert size == expected


@pytest.mark.parametrize("available", [0, GIGABYTE, GIGABYTE + 63 * MEGABYTE])
def test_less_than_is_sensible_is_refused_naming_the_sizes(available: int) -> None:
    """A size of 0 would mean "no limit" to tmpfs, so there must be an error instead."""
    with pytest.raises(RamdiskError, match=r"1,024\.0 MB of them are reserved.*2,048\.0 MB were asked for"):
        choose_ramdisk_size(2 * GIGABYTE, available_bytes=available, reserve_bytes=GIGABYTE)


@pytest.mark.parametrize("size_gb", [0, -1, float("nan"), float("inf")])
def test_a_size_that_is_no_size_is_refused(size_gb: float, tmp_path: Path) -> None:
    """Nothing is run and nothing is made."""
    runner = RecordingRunner()
    with pytest.raises(RamdiskError, match="size_gb must be a positive number"):
        setup_ramdisk(tmp_path / "ramdisk", size_gb, run=runner)
    assert runner.commands == []
    assert not (tmp_path / "ramdisk").exists()


def write_control_group(group: Path, limit: str, current: int, inactive_file: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def test_the_tightest_control_group_above_us_counts(tmp_path: Path) -> None:
    """Limit 1000 less 400 in use, of which 100 is cache that can go: 700; the parent leaves 650."""
    membership, hierarchy = tmp_path / "cgroup", tmp_path / "hierarchy"
    membership.write_text("1:name=systemd:/x\n0::/system.slice/server.service\n")
    write_control_group(hierarchy / "system.slice/server.service", "1000", 400, 100)
    assert measure_control_group_headroom(membership, hierarchy) == 700
    write_control_group(hierarchy / "system.slice", "2000", 1350, 0)
    assert measure_control_group_headroom(membership, hierarchy) == 650
    write_control_group(hierarchy / "system.slice", "2000", 2100, 0)
    assert measure_control_group_headroom(membership, hierarchy) == 0


def test_without_limits_the_control_group_has_no_say(tmp_path: Path) -> None:
    """`max`, no unified hierarchy, and no file at all mean None, not 0."""
    membership, hierarchy = tmp_path / "cgroup", tmp_path / "hierarchy"
    assert measure_control_group_headroom(membership, hierarchy) is None
    membership.write_text("4:memory:/docker/abc\n")
    assert measure_control_group_headroom(membership, hierarchy) is None
    membership.write_text("0::/\n")
    write_control_group(hierarchy, "max", 400, 100)
    assert measure_control_group_headroom(membership, hierarchy) is None


# Places


def test_links_in_the_parents_are_resolved_and_a_link_as_the_place_is_refused(tmp_path: Path) -> None:
    """A link in the last place could point elsewhere at the next look."""
    (tmp_path / "real").mkdir()
    (tmp_path / "parent_link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "link").symlink_to(tmp_path)
    assert resolve_mount_point(tmp_path / "parent_link" / "disk") == tmp_path.resolve() / "real" / "disk"
    with pytest.raises(RamdiskError, match="symbolic link"):
        resolve_mount_point(tmp_path / "parent_link" / "link")


@pytest.mark.parametrize("path", ["/", "", ".", "/mnt/..", "a/../.."])
def test_a_path_without_a_name_of_its_own_is_refused(path: str) -> None:
    """The root, the working directory and `..` are no places for a RAM disk."""
    with pytest.raises(RamdiskError, match="no place for a RAM disk"):
        setup_ramdisk(path, 1.0, run=RecordingRunner())


def test_places_in_use_are_refused_and_left_alone(tmp_path: Path) -> None:
    """A directory with something in it, a file, a link, and a place whose parent is missing."""
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "model.gguf").write_bytes(b"weights")
    file.write_bytes(b"text")
    link.symlink_to(full)
    for place in (full, file, link, tmp_path / "missing" / "disk"):
        runner = RecordingRunner()
        with pytest.raises(RamdiskError):
            setup_ramdisk(place, 0.001, reserve_gb=0, run=runner)
        assert [command for command in runner.commands if "--version" not in command] == []
    assert (full / "model.gguf").read_bytes() == b"weights"
    assert file.read_bytes() == b"text"
    assert not (tmp_path / "missing").exists()


def test_an_ordinary_directory_is_never_cleared_copied_to_or_searched(tmp_path: Path) -> None:
    """What is not a mount of ours is left as it is, whatever it contains."""
    place, models = tmp_path / "place", tmp_path / "models"
    for directory in (place, models):
        directory.mkdir()
        (directory / f"{directory.name}.gguf").write_bytes(b"weights")
    runner = RecordingRunner()
    with pytest.raises(RamdiskError, match="No RAM disk is mounted"):
        clear_ramdisk(place, run=runner)
    with pytest.raises(RamdiskError, match="No RAM disk is mounted"):
        copy_models_to_ramdisk(models, place)
    with pytest.raises(RamdiskError, match="No RAM disk is mounted"):
        ramdisk_usage(place)
    assert find_model_on_ramdisk(place, "place.gguf") is None
    assert runner.commands == []
    assert [file.name for file in place.iterdir()] == ["place.gguf"]


@pytest.mark.parametrize("name", ["../a.gguf", "/etc/a.gguf", "a.txt", "", ".a.gguf", "a.gguf/", "a\0.gguf"])
def test_a_name_that_could_leave_the_ramdisk_is_refused(name: str) -> None:
    """Only plain names of GGUF files are looked up or copied."""
    with pytest.raises(RamdiskError, match="is not the plain name"):
        require_plain_model_name(name)


# Refusals and lies


def test_refused_setup_leaves_nothing_behind(tmp_path: Path) -> None:
    """The directory made for the mount is removed again; the error says what the system said."""
    with pytest.raises(RamdiskError, match=r"a password is required|CAP_SYS_ADMIN"):
        setup_ramdisk(tmp_path / "ramdisk", 0.001, reserve_gb=0, run=make_refusing_runner())
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_only_claims_success_is_an_error(tmp_path: Path) -> None:
    """The kernel's list decides, not the exit status."""
    with pytest.raises(RamdiskError, match=r"No RAM disk is mounted|CAP_SYS_ADMIN"):
        setup_ramdisk(tmp_path / "ramdisk", 0.001, reserve_gb=0, run=RecordingRunner())
    assert list(tmp_path.iterdir()) == []


def test_refused_clearing_deletes_nothing(claimed_place: Path) -> None:
    """Files go only after the system has shown that it lets us unmount."""
    with pytest.raises(RamdiskError, match=r"a password is required|CAP_SYS_ADMIN"):
        clear_ramdisk(claimed_place, run=make_refusing_runner())
    assert (claimed_place / "model.gguf").read_bytes() == b"weights"


def test_an_unmount_that_only_claims_success_is_an_error(claimed_place: Path) -> None:
    """The kernel's list still has it."""
    with pytest.raises(RamdiskError, match="still mounted"):
        unmount(claimed_place, [], RecordingRunner())
    assert (claimed_place / "model.gguf").exists()


@pytest.mark.parametrize(
    "message", ["umount: {}: target is busy.", "umount: can't unmount {}: Device or resource busy"]
)
def test_busy_is_told_from_refused(message: str, tmp_path: Path) -> None:
    """Both spellings of busy mean "later"; the words inside the path do not."""
    place = tmp_path / "target is busy"
    assert not unmount(place, [], RecordingRunner(lambda _: (32, message.format(place))))
    refused = RecordingRunner(lambda _: (32, f"umount: {place}: must be superuser to unmount."))
    with pytest.raises(RamdiskError, match="must be superuser"):
        unmount(place, [], refused)


def clear_busy(place: Path, runner: RecordingRunner) -> ClearedRamdisk:
    return unmount_busy_ramdisk(place, 0, ("model.gguf",), ["sudo", "-n"], runner)


def test_a_busy_ramdisk_is_tried_a_bounded_number_of_times_then_detached(tmp_path: Path) -> None:
    """The first attempt is made before the files go; two more follow, then one lazy one."""
    runner = RecordingRunner(lambda command: (0, "") if "-l" in command else (32, "target is busy"))
    cleared = clear_busy(tmp_path, runner)
    plain = ["sudo", "-n", "umount", str(tmp_path)]
    assert runner.commands == [plain] * (UNMOUNT_ATTEMPTS - 1) + [["sudo", "-n", "umount", "-l", str(tmp_path)]]
    assert cleared.unmounted
    assert cleared.detached_while_busy


def test_a_ramdisk_that_stops_being_busy_is_unmounted_for_good(tmp_path: Path) -> None:
    """Then nothing is held back and nothing is detached."""
    answers = iter([(32, "target is busy"), (0, "")])
    cleared = clear_busy(tmp_path, RecordingRunner(lambda _: next(answers)))
    assert cleared.unmounted
    assert not cleared.detached_while_busy
    assert cleared.held_bytes == 0


def test_a_ramdisk_that_stays_busy_even_for_the_lazy_way_is_an_error(tmp_path: Path) -> None:
    """No endless loop."""
    runner = RecordingRunner(lambda _: (32, "target is busy"))
    with pytest.raises(RamdiskError, match="could not be detached"):
        clear_busy(tmp_path, runner)
    assert len(runner.commands) == UNMOUNT_ATTEMPTS


# Other systems


def test_other_systems_are_told_that_ramdisks_need_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public function says so, and nothing is run."""
    monkeypatch.setattr(sys, "platform", "darwin")
    runner = RecordingRunner()
    calls: list[Callable[[], object]] = [
        lambda: setup_ramdisk(tmp_path / "disk", 1.0, run=runner),
        lambda: copy_models_to_ramdisk(tmp_path, tmp_path),
        lambda: clear_ramdisk(tmp_path, run=runner),
        lambda: find_model_on_ramdisk(tmp_path, "model.gguf"),
        lambda: ramdisk_usage(tmp_path),
        lambda: require_our_ramdisk(tmp_path),
    ]
    for call in calls:
        with pytest.raises(RamdiskError, match="only supported on Linux"):
            call()
    assert not check_that_user_has_required_permissions_to_manage_ramdisks(runner)
    assert runner.commands == []
