"""The machine and the account as users have them: names, folders and limits."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import machine
from cluster.control import clock
from cluster.errors import BadRequest
from cluster.machine import Memory, limits, memory, temporary_folder
from tests.conftest import ROOT

GIB = 1 << 30


# the account


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 12345"), OSError("No username set in the environment")])
def test_a_user_without_a_name_has_a_number(error: Exception, monkeypatch: Any) -> None:
    def unknown() -> str:
        raise error

    monkeypatch.setattr(machine.getpass, "getuser", unknown)
    assert machine.user() == f"uid-{os.getuid()}"


@pytest.mark.parametrize("path", ["~nobody-is-called-so/x", "~nobody-is-called-so.jsonl"])
def test_a_home_that_is_not_there_is_a_message_and_no_traceback(path: str) -> None:
    with pytest.raises(BadRequest, match="knows no home for it"):
        machine.expanded(path)


def test_home_counts_where_a_library_could_write_to_it(tmp_path: Path) -> None:
    assert machine.has_home({"HOME": str(tmp_path)})
    for home in ("", "relative", str(tmp_path / "nowhere"), "/proc/self"):
        assert not machine.has_home({"HOME": home}), home
    assert not machine.has_home({})


# temporary files


@pytest.mark.parametrize(
    "folder",
    ["/tmp/" + "x" * 40, "/tmp/a b", "/tmp/50%", "/tmp/#1", "/tmp/木", "relative", "", '/tmp/"a"', "/tmp/a\nb"],
)
def test_a_folder_that_is_long_or_odd_is_passed_over(folder: str) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        assert temporary_folder({name: folder}, machine.SOCKET_FOLDER_BYTES, usable=lambda _: True) == "/tmp"


def test_a_folder_that_cannot_be_written_to_is_passed_over() -> None:
    assert temporary_folder({"TMPDIR": "/scratch"}, 18, usable=lambda folder: folder != "/scratch") == "/tmp"
    assert temporary_folder({"TMPDIR": "/scratch"}, 18, usable=lambda folder: folder == "/var/tmp") == "/var/tmp"
    assert temporary_folder({"TMPDIR": "/scratch"}, 18, usable=lambda _: False) is None


def test_a_large_disk_that_the_user_names_is_used_where_only_sockets_would_not_fit() -> None:
    """A job's files may be gigabytes."""
    named = {"TMPDIR": "/data/scratch/ann/tmp"}
    assert temporary_folder(named, usable=lambda _: True) == "/data/scratch/ann/tmp"
    assert temporary_folder(named, machine.SOCKET_FOLDER_BYTES, usable=lambda _: True) == "/tmp"


# open files


def test_a_low_limit_of_the_shell_is_raised_and_a_hard_one_is_told() -> None:
    code = "from cluster import machine; machine.raise_open_files(); import resource as r; print(machine.open_files(), *r.getrlimit(7))"

    def low(soft: int, hard: int) -> list[int]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=True
        )
        return [int(word) for word in done.stdout.split()]

    assert resource.RLIMIT_NOFILE == 7
    assert low(256, 2048) == [2048, 2048, 2048]
    assert low(256, 256) == [256, 256, 256]
    assert machine.connections(machine.LEAST_FILES) >= 256


# memory


def told(files: dict[str, str]) -> Any:
    return lambda path: files.get(str(path), "")


def test_the_limit_of_a_container_counts_with_what_its_cache_would_give_back() -> None:
    group = "/sys/fs/cgroup/user.slice/run-1.scope"
    files = {
        f"{group}/memory.max": f"{4 * GIB}\n",
        f"{group}/memory.current": f"{3 * GIB}\n",
        f"{group}/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
    }
    assert list(limits("0::/user.slice/run-1.scope\n", told(files))) == [Memory(4 * GIB, 3 * GIB)]


def test_the_limit_of_a_group_above_counts_too() -> None:
    files = {
        "/sys/fs/cgroup/a/b/memory.max": "max",
        "/sys/fs/cgroup/a/b/memory.current": "5",
        "/sys/fs/cgroup/a/memory.max": "100",
        "/sys/fs/cgroup/a/memory.current": "30",
    }
    assert list(limits("0::/a/b", told(files))) == [Memory(100, 70)]


def test_a_container_that_does_not_see_its_own_group_finds_the_limit_at_its_root() -> None:
    files = {"/sys/fs/cgroup/memory.max": "100", "/sys/fs/cgroup/memory.current": "120"}
    assert list(limits("0::/docker/0123/of/the/host", told(files))) == [Memory(100, 0)]


def test_the_first_version_of_control_groups_is_read_too() -> None:
    group = "/sys/fs/cgroup/memory/docker/1"
    files = {
        f"{group}/memory.limit_in_bytes": "100",
        f"{group}/memory.usage_in_bytes": "60",
        f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 20\n",
    }
    assert list(limits("3:cpuset:/docker/1\n4:cpu,memory:/docker/1\n0::/\n", told(files))) == [Memory(100, 60)]


@pytest.fixture
def container() -> Iterator[Path]:
    """A real control group of 1.5 GiB below this process's own, where this machine lets us make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            parent = machine.CONTROL_GROUPS / controllers / path.lstrip("/")
            group = parent / f"springtide-test-{os.getpid()}"
            with contextlib.suppress(OSError):
                group.mkdir()
                try:
                    (group / (machine.VERSION_1 if controllers else machine.VERSION_2).limit).write_text(str(3 * GIB // 2))
                    yield group
                    return
                finally:
                    group.rmdir()
    pytest.skip("needs a control group that it may divide")


def test_a_real_containers_limit_counts_and_doctor_says_so(container: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SPRINGTIDE_HOME": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor"],
        cwd=ROOT,
        env=environment,
        preexec_fn=lambda: (container / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        text=True,
    )
    words = " ".join((done.stdout + done.stderr).split())
    assert "of 1.5 GiB free; one engine needs 3 GiB. Close other programs, or raise the container's limit." in words
    assert done.returncode == 1 and "Traceback" not in words


def test_without_control_groups_the_machine_counts() -> None:
    assert list(limits("", told({}))) == []
    found, whole = memory(), psutil.virtual_memory()
    assert 0 < found.available_bytes <= found.total_bytes <= whole.total


# clocks


def test_a_process_is_the_same_whatever_the_machines_clock_is_set_to() -> None:
    """`springtide down` said "Nothing was running" after the clock was set: a process's time of day follows it."""
    name, before = Path("/proc/self/comm").read_text(), machine.start_ticks(os.getpid())
    try:
        Path("/proc/self/comm").write_text("x) 1 2 (y")
        assert machine.start_ticks(os.getpid()) == before > 0, "the command's name comes before it in that file"
    finally:
        Path("/proc/self/comm").write_text(name)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        machine.start_ticks(2**22 + 1)


def test_controls_clock_does_not_jump_with_the_machines(monkeypatch: Any) -> None:
    before_s = clock.now_s()
    assert abs(before_s - time.time()) < 5
    monkeypatch.setattr(time, "time", lambda: before_s + 3600)
    assert 0 <= clock.now_s() - before_s < 5


@pytest.mark.parametrize("module", ["actor", "aliases", "allocation", "cold_starts", "publishing"])
def test_what_decides_by_time_does_so_by_a_clock_that_does_not_jump(module: str) -> None:
    """A clock set ahead took every job's slots, and rolled back every rollout that was under way."""
    assert "time.time()" not in (ROOT / "cluster" / "control" / f"{module}.py").read_text()
