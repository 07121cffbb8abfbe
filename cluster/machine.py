"""The machine and the account as they are: a name, folders and limits that differ from user to user. `springtide doctor` says what it found.

Each answer is a pure function of what the system says, and the function that asks the system is beside it.
"""

import getpass
import os
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from cluster.errors import BadRequest

# the account


def user() -> str:
    """Who runs this process. A container's user may have no name.

    Example: ``docker run --user 12345`` gives ``uid-12345``.
    """
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no variable names it, and passwd has no entry (`KeyError` before Python 3.13)
        return f"uid-{os.getuid()}"


def expanded(path: str | Path) -> Path:
    """``~`` and ``~name`` replaced. Raises `BadRequest` where this machine knows no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadRequest(
            f"{str(path)[:200]} cannot be expanded: this machine knows no home for it.", "Write the whole path, or set HOME."
        ) from error


def files_in(folder: Path) -> list[Path]:
    """All files in a folder but hidden ones, in the order of their paths. Raises `BadRequest` where it has none."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not inside:
        raise BadRequest(f"The folder {folder} has no files.", "Put files into it, or name others.")
    return inside


def has_home(environment: Mapping[str, str]) -> bool:
    """Whether ``HOME`` is a folder that this user may write to. Libraries keep caches there, and fail where they cannot."""
    home = environment.get("HOME", "")
    return os.path.isabs(home) and is_writable(home)


def is_writable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


# processes


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since the machine's boot. A clock that is set does not change it, as it changes the time of day.

    Raises `FileNotFoundError` or `ProcessLookupError` where there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(stat.rpartition(")")[2].split()[19])  # the field "starttime" of proc(5); a command's name may hold ")" itself


# temporary files

SOCKET_FOLDER_BYTES = 18
"""The longest folder for sockets. The path of a Unix socket has 107 bytes at most. Ray adds 89 below ours, for example
``/tide-x1y2z3w4/ray/session_2026-11-29_01-11-33_123456_4194304/sockets/dash_TaskEventsHead``. HAProxy has 97, and Serve adds 77."""
TMPDIR_BYTES = 60
"""The longest `TMPDIR` under which Python's and vLLM's own sockets have room: they add 37 and 33."""
PLAIN = re.compile(r"/[\w./-]*", re.ASCII)
"""A path that nobody misreads. In HAProxy's configuration a space ends a word and ``#`` begins a comment; PyTorch takes ``%20`` in a URL for
three letters."""
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 (looked at after the variables; what is made there has a random name)


def temporary_folder(
    environment: Mapping[str, str], longest_bytes: int = TMPDIR_BYTES, usable: Callable[[str], bool] = is_writable
) -> str | None:
    """A place for temporary files: `RAY_TMPDIR`, `TMPDIR`, or the first usual folder, whose path is short and plain. None: nowhere.

    >>> temporary_folder({"TMPDIR": "/scratch"}, 18, usable=lambda _: True)
    '/scratch'
    >>> temporary_folder({"TMPDIR": "/home/ann/my files"}, 18, usable=lambda _: True)
    '/tmp'
    """
    named = [environment.get("RAY_TMPDIR", ""), environment.get("TMPDIR", "")]
    return next((one for one in [*named, *TEMPORARY] if _is_plain(one, longest_bytes) and usable(one)), None)


def _is_plain(folder: str, longest_bytes: int) -> bool:
    return len(os.fsencode(folder)) <= longest_bytes and PLAIN.fullmatch(folder) is not None


# open files

LEAST_FILES = 1024
"""Fewer open files than this do not carry a pool: Ray's processes keep connections to each other, and HAProxy takes two for each client."""
FILES = 65536
"""As many as a pool asks for, where the hard limit allows it."""
OTHER_FILES = 200
"""Of HAProxy's files, those that are no client's."""
CLIENT_FILES = 2.5
"""Of one client: a connection on either side, and in one of four cases a pipe between them. HAProxy does not start with fewer."""


def open_files() -> int:
    """How many files one process of the pool may have open: the hard limit counts, because `raise_open_files` raises the other."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)


def raise_open_files() -> None:
    """Raise this process's limit as far as it may, and of those that it starts. A shell's own, often 1,024 or 256, is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < (most := open_files()):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connections(files: int) -> int:
    """The clients that HAProxy may have at once.

    >>> connections(65536), connections(1024)
    (4096, 329)
    """
    return min(4096, max(1, int((files - OTHER_FILES) / CLIENT_FILES)))


# memory

CONTROL_GROUPS = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """What the processes here may use: of the machine, or of a container on it."""

    total_bytes: int
    available_bytes: int


class _Names(NamedTuple):
    """Files of a control group, and what its statistics call the cache of files, which makes room when it is asked to."""

    limit: str
    used: str
    cache: str


VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def memory() -> Memory:
    machine = psutil.virtual_memory()
    groups = _read(Path("/proc/self/cgroup"))
    return within(Memory(machine.total, machine.available), limits(groups, _read))


def within(machine: Memory, limits: Iterator[Memory]) -> Memory:
    """The least of the machine's and of each limit's.

    >>> within(Memory(64, 40), iter([Memory(8, 3), Memory(16, 12)]))
    Memory(total_bytes=8, available_bytes=3)
    """
    total, available = zip(machine, *limits, strict=True)
    return Memory(min(total), min(available))


def limits(groups: str, read: Callable[[Path], str]) -> Iterator[Memory]:
    """The limits of the process's control groups, from the content of ``/proc/self/cgroup``. ``read`` returns "" where there is no file.

    Each group on the way up may have one. A container may not see its own group, but then the limit is at the root that it sees.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(CONTROL_GROUPS, path, VERSION_2, read)
        elif "memory" in controllers.split(","):
            yield from _limits(CONTROL_GROUPS / "memory", path, VERSION_1, read)


def _limits(root: Path, path: str, names: _Names, read: Callable[[Path], str]) -> Iterator[Memory]:
    group = root / path.lstrip("/")
    while group.is_relative_to(root):
        limit, used = read(group / names.limit).strip(), read(group / names.used).strip()
        if limit.isdecimal() and used.isdecimal():  # "max" stands for none
            statistics = dict(line.split(maxsplit=1) for line in read(group / "memory.stat").splitlines())
            cached = int(statistics.get(names.cache, 0))
            yield Memory(int(limit), max(0, int(limit) - int(used) + cached))
        group = group.parent


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
