"""A slot as a fixed part of a processor, so that slots are what runs out, as accelerators do, and not the machine's two cores.

Linux's own CPU bandwidth control (cgroup v1 ``cpu.cfs_quota_us``, v2 ``cpu.max``), one group per slot; it needs root.

All slots are parts of the machine's last core, so no two compute at the same moment. On a virtual machine a core may do less while its neighbour
works, which accelerators do not.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

PERIOD_US = 20_000
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


class Shares:
    """Groups of this benchmark. Without the right to make them nothing is held down, and ``works`` says so."""

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.root = V1 if (V1 / "cpu.cfs_quota_us").exists() else V2
        self.groups: dict[int, Path] = {}
        self.allowed = os.sched_getaffinity(0)
        self.works = self._try()

    def hold(self, pids: Iterable[int]) -> None:
        """Give each process, together with those it started, its part of a core, unless it has it already."""
        for pid in set(pids) - self.groups.keys() if self.works else ():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has ended meanwhile
                process = psutil.Process(pid)
                self.groups[pid] = self._make(f"springtide-{os.getpid()}-{pid}")
                for one in (process, *process.children(recursive=True)):
                    (self.groups[pid] / "cgroup.procs").write_text(str(one.pid))
                    run_on(one, {max(self.allowed)})

    def close(self) -> None:
        for group in self.groups.values():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                for pid in (group / "cgroup.procs").read_text().split():
                    (self.root / "cgroup.procs").write_text(pid)
                    run_on(psutil.Process(int(pid)), self.allowed)
                group.rmdir()
        self.groups.clear()

    def _try(self) -> bool:
        try:
            self._make(f"springtide-{os.getpid()}-try").rmdir()
        except OSError:
            return False
        return True

    def _make(self, name: str) -> Path:
        group, quota_us = self.root / name, int(self.cores * PERIOD_US)
        group.mkdir()
        if self.root == V1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        return group


def run_on(process: psutil.Process, cores: set[int]) -> None:
    """Keep the process to these cores, with the threads that it has and those that they start."""
    for thread in process.threads():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(thread.id, cores)
