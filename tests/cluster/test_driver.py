"""The elastic driver on a small Ray of its own, with real workers that are killed and stopped. The grants come from an actor that the test tells."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.capacity.allocator import Grant, Heartbeat
from cluster.config import Config, parse
from cluster.control.client import ACTOR, NAMESPACE
from cluster.errors import JobFailed
from cluster.store.objects import Store
from jobs.training.drivers import grants as granting
from jobs.training.drivers.driver import Ended, fit
from jobs.training.progress import Committed, Progress
from jobs.training.state.checkpoints import Checkpoints
from tests.waiting import when
from tests.workers import Small


class Grants:
    """Stands where control stands: grants what it is told."""

    def __init__(self) -> None:
        self.slots, self.reason = 0, ""
        self.last = (0, 0)

    def give(self, slots: int, reason: str = "") -> None:
        self.slots, self.reason = slots, reason

    def heartbeat(self, beat: Heartbeat) -> Grant:
        self.last = beat.held, beat.active
        return Grant(self.slots, self.reason)

    def holds(self) -> tuple[int, int]:
        return self.last

    def leave(self, job: str, driver: str) -> None:
        self.last = 0, 0


class Paced(Small):
    """Ten milliseconds a step, so that a run is not over before something happens to it."""

    def gradients(self, batch: list[int], rank: int, world: int) -> Any:
        time.sleep(0.01)
        return super().gradients(batch, rank, world)


class Cancelled(Exception):
    """As a signal would end the driver."""


class Fit:
    """A run in a thread, and what it says."""

    def __init__(self, config: Config, name: str, epochs: float, fit: Callable[..., Ended] = fit) -> None:
        self.notes: list[str] = []
        self.seen: list[Progress] = []
        self.kept: list[Committed] = []
        self.ended: Ended | None = None
        self.error: BaseException | None = None

        self.cancelled = False

        def run() -> None:
            try:
                self.ended = fit(config, Paced, {"epochs": epochs}, name, 0, self)
            except (Cancelled, JobFailed) as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def watch(self, progress: Progress) -> None:
        self.seen.append(progress)
        if self.cancelled:
            raise Cancelled

    def note(self, words: str, waiting: str) -> None:
        self.notes.append(words)
        if self.cancelled:
            raise Cancelled

    def checkpoint(self, committed: Committed) -> None:
        self.kept.append(committed)

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def began(self) -> list[tuple[int, int]]:
        """(workers, step) of each process group."""
        words = [note.split() for note in self.notes if note.startswith("training with")]
        return [(int(said[2]), int(said[-1])) for said in words]


@pytest.fixture(scope="module")
def grants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    ray.init("local", num_cpus=2, resources={"slot": 3}, include_dashboard=False, log_to_driver=False, namespace=NAMESPACE)
    yield ray.remote(Grants).options(name=ACTOR, num_cpus=0, max_concurrency=4).remote()
    ray.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    training = {"workers": 3, "yield_deadline_s": 10, "checkpoint_s": 3600, "report_s": 3600}
    return parse({"home": str(tmp_path), "training": training})


@pytest.fixture
def start(grants: Any, config: Config) -> Iterator[Callable[[str, float], Fit]]:
    """Starts runs, and ends them before their Ray ends: a run that is left would look for another one."""
    runs: list[Fit] = []

    def begin(name: str, epochs: float) -> Fit:
        runs.append(Fit(config, name, epochs))
        return runs[-1]

    yield begin
    for run in runs:
        run.cancelled = True
        run.thread.join(60)
        assert not run.thread.is_alive()


def slots_free() -> int:
    return int(ray.available_resources().get("slot", 0))


def workers() -> list[psutil.Process]:
    """The oldest first."""
    found = [p for p in psutil.Process().children(recursive=True) for line in [" ".join(p.cmdline())] if "ray::Worker" in line]
    return sorted(found, key=lambda process: process.create_time())


def test_a_run_follows_its_grant_and_outlives_its_workers(grants: Any, config: Config, start: Any) -> None:
    def holds(held: int, active: int) -> Callable[[], bool]:
        return lambda: ray.get(grants.holds.remote()) == (held, active)

    def grown() -> Callable[[], bool]:
        """Whether three train again, in a process group that begins from now on."""
        groups = len(run.began())
        return lambda: len(run.began()) > groups and run.began()[-1][0] == 3

    ray.get(grants.give.remote(0, "serving has all"))
    run: Fit = start("small-1", 100_000)
    when(lambda: "waiting for slots: serving has all" in run.notes, 30)
    ray.get(grants.give.remote(2))
    when(holds(2, 2), 120)
    ray.get(grants.give.remote(3))
    when(holds(3, 3), 60)
    when(lambda: bool(run.seen) and run.seen[-1].workers == 3, 10)
    last = run.seen[-1]
    assert 0 < last.step < last.steps and last.loss > 0 and last.tokens > 0 and last.tokens_per_s > 0 and last.eta_s > 0

    again = grown()
    os.kill(workers()[-1].pid, signal.SIGKILL)  # replaced
    when(again, 90)
    assert [note for note in run.notes if "workers lost" in note] and len(workers()) == 3

    asked_s = time.monotonic()
    ray.get(grants.give.remote(1))  # yields, and the two that leave stay as spares
    when(lambda: slots_free() == 2, 10)
    print(f"slots free after {time.monotonic() - asked_s:.1f} s")
    when(holds(1, 1), 10)
    assert len(workers()) == 3

    ray.get(grants.give.remote(0, "serving has all"))  # the state is kept, and comes back
    when(holds(0, 0), 20)
    kept = Checkpoints(Store(config.store), "small-1").newest()
    assert kept is not None and slots_free() == 3
    assert run.kept[-1].step == kept.step and run.kept[-1].size_bytes > 0, "its record says where it can go on"
    again = grown()
    ray.get(grants.give.remote(3))
    when(again, 30)
    assert len(workers()) == 3 and run.began()[-1][1] >= kept.step

    again = grown()
    os.kill(workers()[0].pid, signal.SIGSTOP)  # hangs, is found, and is replaced
    when(again, 150)
    assert any("no answer for 30 s" in note for note in run.notes)
    steps = [step for _, step in run.began()]
    assert steps == sorted(steps), f"no step was lost: {run.began()}"
    assert run.error is None and run.ended is None

    run.cancelled = True  # the state is kept, and nothing is left
    run.thread.join(30)
    kept = Checkpoints(Store(config.store), "small-1").newest()
    assert isinstance(run.error, Cancelled) and kept is not None and kept.step >= run.seen[-1].step
    assert run.kept[-1].step == kept.step and sorted(set(run.kept)) == run.kept
    when(lambda: slots_free() == 3 and not workers(), 10)


def test_a_short_run_ends_and_reports_its_last_step(grants: Any, config: Config, start: Any) -> None:
    ray.get(grants.give.remote(3))
    run: Fit = start("small-2", 4)
    run.thread.join(120)
    assert run.error is None and run.ended is not None
    assert run.ended.metrics["steps_lost"] == 0 and run.seen[-1].step == run.seen[-1].steps == 20
    assert Store(config.store).get("runs/small-2/result/model.pt")


def test_a_job_without_control_fails_in_words(grants: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to wait for ever and say nothing."""
    monkeypatch.setattr(granting, "NO_CONTROL_S", 4)
    monkeypatch.setattr(granting, "SILENT_S", 2)
    ray.kill(grants)
    run: Fit = start("small-3", 4)
    run.thread.join(60)
    assert isinstance(run.error, JobFailed) and "Control has not answered for 4 s" in str(run.error)
    assert "springtide up" in str(run.error)
    assert any(note.startswith("control has not answered for 2 s") for note in run.notes)
