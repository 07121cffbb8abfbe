"""Slots go from a running job to serving and back while everything dies that can: T1, T4 to T6, T8 and H0 to H6 on the real pool.

Every test ends with the same audit of what control recorded: no slot ever had two owners, and none is lost for ever.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks import load
from benchmarks.job import made as made_by
from cluster import client
from cluster.capacity.handover import Allocation, Handover, SlotSnapshot, doubly_owned, handovers, parse
from cluster.errors import SpringtideError
from cluster.pool import graph
from cluster.types import VersionId
from jobs.training.state.checkpoints import Checkpoints
from tests.conftest import ROOT, Running
from tests.waiting import when

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
TIDE = "jobs/seedling/tide.jsonl"
LONG = 100_000
"""Epochs that no test waits for."""
NOTICED_S = 60
"""The longest that a job may take to hear that a machine of its workers is lost."""


class Record:
    """What control recorded, kept over its deaths."""

    def __init__(self, pool: Running) -> None:
        self.pool = pool
        self.snapshots: dict[float, SlotSnapshot] = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(0.3):
            with suppress(SpringtideError, OSError):
                self.look()

    def look(self) -> None:
        since_s = max(self.snapshots, default=time.time() - 1)
        self.snapshots |= {snapshot.at_s: snapshot for snapshot in parse(client.of(self.pool.config).slots(since_s)["snapshots"])}

    def all(self) -> list[SlotSnapshot]:
        return [self.snapshots[at_s] for at_s in sorted(self.snapshots)]

    def audit(self) -> None:
        """No slot ever had two owners. Those of a machine that was lost are nobody's any more, whoever has not heard of it yet."""
        assert self.thread.is_alive(), "what control recorded was not looked at to the end"
        self.done.set()
        self.thread.join()
        snapshots = self.all()
        ends_s = [*(snapshot.at_s for snapshot in snapshots[1:]), time.time()]
        spans = list(zip(snapshots, ends_s, strict=True))

        def lately(at_s: float) -> int:
            return max(one.slots for one, end_s in spans if one.at_s <= at_s and end_s >= at_s - NOTICED_S)

        assert snapshots and doubly_owned([snapshot._replace(slots=lately(snapshot.at_s)) for snapshot in snapshots]) == []


class Job:
    """A job as a process, and its log."""

    def __init__(self, pool: Running, folder: Path, *line: str, workers: int = 2, **training: float) -> None:
        self.pool = pool
        self.log = folder / f"{time.monotonic_ns()}.log"
        overrides = {f"SPRINGTIDE_TRAINING__{key.upper()}": str(value) for key, value in training.items()}
        here = {"SPRINGTIDE_HOME": str(pool.config.home), "SPRINGTIDE_STORE": pool.config.store}
        environment = {**here, "SPRINGTIDE_TRAINING__WORKERS": str(workers), **overrides}
        environment["RAY_DEDUP_LOGS"] = "0"  # as in the pool
        self.process = subprocess.Popen(
            [sys.executable, "-m", *line],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def steps(self) -> int:
        return max((int(step) for step in re.findall(r"step=(\d+)/", self.text)), default=0)

    @property
    def name(self) -> str:
        found = re.search(r"^run (\S+)", self.text, re.MULTILINE)
        assert found, self.text
        return found[1]

    @property
    def allocation(self) -> Allocation | None:
        with suppress(SpringtideError):
            for job in client.of(self.pool.config).status()["allocation"]["jobs"]:
                if job["id"] == self.name:
                    return Allocation(job["id"], 0, job["held"], job["active"])
        return None

    def trains(self, workers: int) -> bool:
        allocation = self.allocation
        return allocation is not None and allocation.held == allocation.active == workers

    def times(self, word: str) -> int:
        return self.text.count(word)

    def goes_on(self) -> bool:
        """Whether a step is done while this looks."""
        before = self.steps
        time.sleep(1.5)
        return self.steps > before


def finetune(*line: str, epochs: int = LONG) -> list[str]:
    return ["jobs.finetune", "--data", TIDE, "--base", "seedling@1", "--name", "ebb", "--epochs", str(epochs), *line]


@contextmanager
def running(pool: Running, folder: Path, *line: str, workers: int = 2, **training: float) -> Iterator[Job]:
    """A job that trains with all its workers."""
    job = Job(pool, folder, *line, workers=workers, **training)
    try:
        when(lambda: "progress" in job.text and job.trains(workers), 300)  # a minute where others use the machine
        yield job
    finally:
        job.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(20)
        job.process.kill()


@pytest.fixture
def record(pool: Running) -> Iterator[Record]:
    record = Record(pool)
    yield record
    scaled(pool, 1)
    when(lambda: client.of(pool.config).status()["slots"]["free"] == 2, 90)  # none is lost for ever
    record.audit()


def scaled(pool: Running, replicas: int) -> None:
    fleet = pool.config.fleet.model_copy(update={"min_replicas": replicas, "max_replicas": replicas})
    graph.deploy(pool.config.model_copy(update={"fleet": fleet}))


@contextmanager
def scaling(pool: Running, replicas: int) -> Iterator[None]:
    """Serving asks for this many while the block runs, and is waited for at its end."""
    thread = threading.Thread(target=scaled, args=(pool, replicas))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def replicas(pool: Running) -> int:
    return len(client.of(pool.config).status()["replicas"])


def processes(pool: Running, name: str) -> list[psutil.Process]:
    """Of the pool, by what Ray calls them, the oldest first: process ids begin anew at some time."""
    found: list[psutil.Process] = []
    for process in pool.pool.descendants():
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def control(pool: Running) -> psutil.Process:
    """The tests of crashes, which may have gone before, leave one of their own kind."""
    return [*processes(pool, "ray::Control"), *processes(pool, "ray::CrashingControl")][0]


def works(process: psutil.Process) -> bool:
    """Whether it computes while this looks."""
    before_s = process.cpu_times().user
    time.sleep(1.5)
    return process.cpu_times().user - before_s > 0.15


def carried_out(record: Record, job: Job, kind: str) -> list[Handover]:
    record.look()
    return [done for done in handovers(record.all()) if done.job == job.name and done.kind == kind]


def test_a_planned_yield_and_the_way_back(pool: Running, tmp_path: Path, record: Record) -> None:
    """H0: the bars of a hand-over. And what H6 is on a CPU, where no accelerator's memory could stay taken: whoever left does nothing any
    more, and is who comes back."""
    with running(pool, tmp_path, *finetune()) as job:
        members = {process.pid for process in processes(pool, "ray::Worker")}
        assert len(members) == 2
        when(lambda: bool(carried_out(record, job, "grow")), 10)  # else its start and the yield are one change to the record
        with scaling(pool, 2):
            when(lambda: job.trains(1), 60)
            assert job.goes_on()
            assert sorted(works(psutil.Process(pid)) for pid in members) == [False, True]
            when(lambda: replicas(pool) == 2, 120)
        scaled(pool, 1)
        when(lambda: job.trains(2), 120)
        assert {process.pid for process in processes(pool, "ray::Worker")} == members
        [gave] = carried_out(record, job, "yield")
        when(lambda: carried_out(record, job, "grow")[-1].at_s > gave.at_s, 5)  # the allocator records it at its next turn
        took = carried_out(record, job, "grow")[-1]
        stopped, began = re.findall(r"stopped after step (\d+)", job.text), re.findall(r"from step (\d+)", job.text)
        print(f"slot free {gave.slots_free_s:.2f} s, training again {gave.training_s:.2f} s, whole again {took.training_s:.2f} s")
        print(f"kept: {re.findall(r'checkpoint .*', job.text)}")
    assert stopped == began[1:]  # no step is lost, and none done twice
    assert gave.slots_free_s is not None and gave.slots_free_s <= 3
    assert gave.training_s is not None and gave.training_s <= 8
    assert took.training_s is not None and took.training_s <= 10


def since(record: Record, began_s: float, holds: Callable[[SlotSnapshot], bool]) -> float:
    """Seconds until that was recorded."""
    record.look()
    return next(snapshot.at_s for snapshot in record.all() if snapshot.at_s > began_s and holds(snapshot)) - began_s


def test_a_burst_takes_slots_from_a_job_and_no_request_fails(pool: Running, tmp_path: Path, record: Record) -> None:
    """H1, with a second engine that sleeps. Replicas are not given back within two seconds: while a process starts on two busy cores,
    the clients have too little time to keep the engine full. How many first tokens are late is printed and has no bar: here the two cores are
    what is short; `benchmarks tide` measures it where slots are."""
    for count in (2, 1):
        scaled(pool, count)
        when(lambda count=count: replicas(pool) == count, 120)
    fleet = {"min_replicas": 1, "max_replicas": 2, "target_running": 4, "scale_up_after_s": 0.0, "scale_down_after_s": 10.0}
    graph.deploy(pool.config.model_copy(update={"fleet": pool.config.fleet.model_copy(update=fleet)}))
    with running(pool, tmp_path, *finetune()) as job:
        with load.background(f"{pool.url}/v1", "seedling", streams=12) as samples:
            began_s, first_s = time.time(), time.monotonic()
            starts_s = when(lambda: bool(client.of(pool.config).status()["starting"]) or replicas(pool) == 2, 60)
            came_s = starts_s + when(lambda: replicas(pool) == 2, 120)
            asked_s, gave_s = (
                since(record, began_s, lambda m: m.wanted > 1),
                since(record, began_s, lambda m: m.jobs[0].held == 1),
            )
            print(f"a burst: Serve asks after {asked_s:.1f} s, a slot is free after {gave_s:.1f}, ", end="")
            print(f"the replica's process is there after {starts_s:.1f} and it answers after {came_s:.1f}")
            assert came_s < 25  # without a sleeper an engine takes twice as long
            time.sleep(5)
        print(f"whole again {when(lambda: job.trains(2), 60):.1f} s after it ended")
        stopped, began = re.findall(r"stopped after step (\d+)", job.text), re.findall(r"from step (\d+)", job.text)
        assert job.times("lost") == 0 and stopped and stopped == began[1:]
    assert samples and not [sample.error for sample in samples if sample.error]
    for when_, there in (("before", False), ("after", True)):
        took_s = [sample.ttft_s for sample in samples if (sample.start_s > first_s + came_s) is there]
        late = sum(ttft_s > pool.config.fleet.target_ttft_s for ttft_s in took_s)
        print(f"{late} of {len(took_s)} first tokens late {when_} it answered, half within {statistics.median(took_s):.2f} s")


def test_a_job_that_does_not_yield_is_stopped_at_the_deadline(pool: Running, tmp_path: Path, record: Record) -> None:
    """H2: one of two never ends its step, and the other waits for it. What both have learnt is kept first."""
    with running(pool, tmp_path, "tests.unwilling", "stubborn", yield_deadline_s=5, report_s=0) as job, scaling(pool, 2):
        stopped_at_the_deadline(record, job)


def test_a_worker_that_hangs_while_serving_asks_is_stopped_at_the_deadline(pool: Running, tmp_path: Path, record: Record) -> None:
    """H2 and T5: the one that hangs does not even answer, and the other has what both have learnt."""
    with running(pool, tmp_path, *finetune(), yield_deadline_s=5, checkpoint_s=3600, report_s=0) as job:
        os.kill(processes(pool, "ray::Worker")[-1].pid, signal.SIGSTOP)
        with scaling(pool, 2):
            stopped_at_the_deadline(record, job)


def stopped_at_the_deadline(record: Record, job: Job) -> None:
    """Of 5 s."""
    when(lambda: "did not give their slots back within 5 s" in job.text, 60)
    reached, then = job.steps, len(job.text)
    when(lambda: job.trains(1), 60)
    assert job.goes_on()
    when(lambda: bool(carried_out(record, job, "yield")), 5)
    [gave] = carried_out(record, job, "yield")
    began = int(re.findall(r"from step (\d+)", job.text[then:])[0])
    print(f"slots free {gave.slots_free_s:.1f} s after the decision; it had done {reached} steps and went on from {began}")
    assert gave.slots_free_s is not None and 5 <= gave.slots_free_s <= 7
    assert began >= reached > 0


def test_a_killed_worker_costs_no_step(pool: Running, tmp_path: Path, record: Record) -> None:
    """T1"""
    with running(pool, tmp_path, *finetune(), report_s=0) as job:
        then = len(job.text)
        os.kill(processes(pool, "ray::Worker")[-1].pid, signal.SIGKILL)
        print(f"one goes on after {when(lambda: 'training with 1 workers' in job.text[then:], 30):.1f} s")
        before, _, after = job.text[then:].partition("training with 1 workers from step ")
        assert int(after.split()[0]) >= max(int(step) for step in re.findall(r"step=(\d+)/", job.text[:then] + before))
        print(f"two train again {when(lambda: 'training with 2 workers' in job.text[then:], 60):.1f} s later")
        assert job.goes_on()


def test_a_worker_that_hangs_is_found_and_replaced(pool: Running, tmp_path: Path, record: Record) -> None:
    """T5"""
    with running(pool, tmp_path, *finetune()) as job:
        os.kill(processes(pool, "ray::Worker")[-1].pid, signal.SIGSTOP)
        then = len(job.text)
        print(f"found after {when(lambda: 'no answer for' in job.text, 60):.1f} s")
        print(f"two train again {when(lambda: 'training with 2 workers' in job.text[then:], 60):.1f} s later")
        assert job.goes_on()


def test_workers_that_answer_and_do_no_step_are_found_and_replaced(pool: Running, tmp_path: Path, record: Record) -> None:
    """T5: one hangs within a step, the other within a collective."""
    with running(pool, tmp_path, "tests.unwilling", "stubborn", report_s=0, checkpoint_s=3600) as job:
        then = len(job.text)
        print(f"found after {when(lambda: 'no step was done for' in job.text[then:], 60):.1f} s")
        reached, then = job.steps, len(job.text)
        when(lambda: "from step" in job.text[then:], 60)
        assert int(re.findall(r"from step (\d+)", job.text[then:])[0]) >= reached > 0


def test_a_killed_driver_frees_its_slots_and_the_run_can_be_resumed(pool: Running, tmp_path: Path, record: Record) -> None:
    """T4"""
    with running(pool, tmp_path, *finetune(epochs=400), checkpoint_s=2) as job:
        when(lambda: job.times("checkpoint step=") >= 2, 60)
        job.process.kill()
        print(f"slots free after {when(lambda: client.of(pool.config).status()['slots']['free'] == 2, 15):.1f} s")
        reached, name = job.steps, job.name
    again = Job(pool, tmp_path, *finetune("--resume", name, epochs=400))
    assert again.process.wait(300) == 0, again.text[-2000:]
    began = int(re.findall(r"from step (\d+)", again.text)[0])
    print(f"killed at step {reached}, resumed from step {began}")
    assert 0 < began <= reached + 20
    made = made_by(again.text)
    assert pool.registry.manifest(VersionId.parse(made["version"])).lineage.metrics["eval_loss"] < 1
    assert pool.registry.store.children(f"runs/{name}") == []


def test_a_driver_that_is_asked_to_end_keeps_what_was_learnt(pool: Running, tmp_path: Path, record: Record) -> None:
    """As by `ray job stop`, or with the pool. T4 without a loss."""
    with running(pool, tmp_path, *finetune(), checkpoint_s=3600, report_s=0) as job:
        job.process.terminate()
        job.process.wait(30)
        kept = Checkpoints(pool.registry.store, job.name).newest()
    assert kept and kept.step >= job.steps > 0 and f"--resume {job.name}" in job.text


def test_a_job_without_memory_fails_in_words_and_serving_goes_on(pool: Running, tmp_path: Path, record: Record) -> None:
    """T6"""
    with load.background(f"{pool.url}/v1", "seedling", streams=2, pause_s=0.2) as samples:
        job = Job(pool, tmp_path, "tests.unwilling", "greedy")
        assert job.process.wait(180) == 1, job.text[-2000:]
    assert "error: The training failed" in job.text and "--resume unwilling-" in job.text and "alloc" in job.text
    assert samples and not [sample.error for sample in samples if sample.error]


def test_a_job_begins_with_what_there_is(pool: Running, tmp_path: Path, record: Record) -> None:
    """H5: Ray Train asks for the most, and trains nothing while serving holds a part of it."""
    job = Job(pool, tmp_path, *finetune(), workers=3)
    try:
        print(f"training with two of three {when(lambda: 'progress' in job.text, 60):.1f} s after it was begun")
        assert job.times("training with 3 workers") == 0
        when(lambda: job.trains(2), 30)
    finally:
        job.process.terminate()
        job.process.wait(30)


def test_a_killed_control_gives_no_slot_away_twice(pool: Running, tmp_path: Path, record: Record) -> None:
    """H4: in the middle of a hand-over."""
    with running(pool, tmp_path, *finetune()) as job:
        with scaling(pool, 2):
            when(lambda: not job.trains(2), 30)
            control(pool).kill()
            when(lambda: job.trains(1), 60)
            assert job.goes_on()
            when(lambda: replicas(pool) == 2, 120)
        control(pool).kill()
        scaled(pool, 1)
        print(f"whole again after {when(lambda: job.trains(2), 120):.1f} s")


def test_a_killed_replica_gives_its_slot_back(pool: Running, tmp_path: Path, record: Record) -> None:
    """H3: with serving no longer in need of it."""
    with running(pool, tmp_path, *finetune()) as job:
        with scaling(pool, 2):
            when(lambda: replicas(pool) == 2, 120)
        os.kill(processes(pool, "ray::ServeReplica:fleet")[-1].pid, signal.SIGKILL)
        scaled(pool, 1)
        print(f"whole again after {when(lambda: job.trains(2), 120):.1f} s")
        assert job.goes_on()


def test_a_storm_of_changes_costs_no_step_and_little_progress(pool: Running, tmp_path: Path, record: Record) -> None:
    """T8: serving wants two, then one, every five seconds."""
    with running(pool, tmp_path, *finetune()) as job:
        storm(pool, job)


def storm(pool: Running, job: Job) -> None:
    began_s, first = time.monotonic(), job.steps
    time.sleep(15)
    quiet = (job.steps - first) / (time.monotonic() - began_s)
    began_s, first = time.monotonic(), job.steps
    with ThreadPoolExecutor() as asking:
        asked: list[Future[None]] = []
        for wanted in (2, 1) * 4:
            asked.append(asking.submit(scaled, pool, wanted))
            time.sleep(5)
        stormy = (job.steps - first) / (time.monotonic() - began_s)
    for one in asked:
        one.result()
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+)", job.text)]
    began = [int(step) for step in re.findall(r"training with \d workers? from step (\d+)", job.text)]
    print(f"{stormy / quiet:.0%} of the quiet speed, {len(stopped)} changes of size")
    assert 0 < len(stopped) < len(asked) and began[1:] == stopped
    assert stormy > 0.3 * quiet
