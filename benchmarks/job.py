"""A training job beside a benchmark: its process, its log, and what the log says."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.config import Config
from cluster.errors import JobFailed

DATA = Path(__file__).parents[1] / "jobs/seedling/facts.jsonl"
EXAMPLES = re.compile(r"(\d+) examples to train on")
LOSS = re.compile(r"step=(\d+)/\d+ loss=([\d.]+)")
SIZE = re.compile(r"training with (\d+) workers from step (\d+)")
STEP = re.compile(r"step=(\d+)/|from step (\d+)|stopped after step (\d+)")
WORKER = re.compile(r"\((?:Worker|RayTrainWorker) pid=(\d+)\)")


class Job:
    """``process``: its driver."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def step(self) -> int:
        return max(steps(self.text), default=0)

    @property
    def examples(self) -> int:
        """How many it trains on, once an epoch."""
        return int(EXAMPLES.findall(self.text)[0])

    @property
    def workers(self) -> set[int]:
        """The processes that have trained."""
        return {int(pid) for line in self.text.splitlines() if "training " in line for pid in WORKER.findall(line)}

    @property
    def cpu_s(self) -> float:
        """Processor seconds of those that train now."""
        total = 0.0
        for pid in self.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    def wait_until(self, done: Callable[[], bool], timeout_s: float = 180) -> None:
        """Raises `JobFailed` with the end of the log where that does not come."""
        deadline_s = time.monotonic() + timeout_s
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise JobFailed(f"The training did not come as far as it should have: {self.text[-600:]}")
            time.sleep(0.1)


@contextlib.contextmanager
def training(config: Config, *line: str) -> Iterator[Job]:
    """``python -m LINE`` under ``config``, ended with the block."""
    with tempfile.TemporaryDirectory() as folder:
        resolved, log = Path(folder) / "config.json", Path(folder) / "job.log"
        resolved.write_text(json.dumps(config.dump()))
        environment = {**os.environ, "SPRINGTIDE_CONFIG": str(resolved), "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}
        output = log.open("wb")
        process = subprocess.Popen([sys.executable, "-m", *line], env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Job(process, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def made(log: str) -> dict[str, Any]:
    """What a job said came out of it: the object of its last ``result {…}`` line."""
    lines = [line.removeprefix("result ") for line in log.splitlines() if line.startswith("result {")]
    return json.loads(lines[-1])


def steps(log: str) -> list[int]:
    """Every step that the log names, in order."""
    return [int(next(filter(None, found))) for found in STEP.findall(log)]


def lost(log: str) -> int:
    """Steps that were done and had to be done again.

    >>> lost("step=5/9 stopped after step 6 training with 2 workers from step 6 step=8/9 training with 1 workers from step 7")
    1
    """
    return sum(max(0, before - after) for before, after in itertools.pairwise(steps(log)))


def losses(log: str) -> dict[int, float]:
    """Step → loss."""
    return {int(step): float(loss) for step, loss in LOSS.findall(log)}


def sizes(log: str) -> list[tuple[int, int]]:
    """(step, workers), where each formation began."""
    return [(int(step), int(workers)) for workers, step in SIZE.findall(log)]
