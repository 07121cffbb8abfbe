"""One worker of an elastic run: an actor that holds its slots, and what it has learnt, until the driver ends it.

Workers train together in process groups. A group ends after the same step on all of them when one was told to stop, or when one of them is
gone. The next group contains the workers that stayed and those that came, and goes on from the newest state among them. A worker keeps its
model and its state in memory between two groups, so the next group follows within a fraction of a second. TorchElastic and torchft work this
way too; Ray Train ends every worker.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cluster import niceness
from cluster.metrics import CHECKPOINTS
from cluster.pool.local import LOOPBACK
from cluster.store.objects import Store
from jobs.training.checkpoints import Checkpoints, Writer
from jobs.training.process_group import ProcessGroup, Rendezvous, joined
from jobs.training.progress import Committed, ProgressPrinter
from jobs.training.state import State
from jobs.training.work import Work, gather, update

RESULT = "result"


class Loaded(NamedTuple):
    """Where a worker has loaded everything that it needs."""

    host: str
    node: str
    """Ray's id of the machine."""
    pid: int


class Reached(NamedTuple):
    """How far a worker is."""

    step: int
    stepping: bool = False
    """Whether a step is under way. False while it measures or saves the result."""
    group: int = 0
    """The newest process group in which it began to train."""
    first: int = -1
    """The step with which this group began."""
    steps: int = 0
    """Steps of the whole run."""
    loss: float = float("nan")
    """The training loss of the last step."""
    tokens: int = 0
    """Tokens since the start of the run."""
    committed: Committed = Committed()
    """The newest checkpoint that this worker has written."""


class Outcome(NamedTuple):
    """How a process group ended for one worker."""

    step: int
    first: int
    """The step with which the group began; -1 where it broke before."""
    ended: bool = False
    """Whether this worker has saved the run's result."""
    broken: str = ""
    """Why the group ended too early, where it did."""
    metrics: dict[str, float] = {}  # noqa: RUF012 (never written to)


class Orders:
    """What other threads tell the training thread, and what they wait for."""

    def __init__(self) -> None:
        self.stopped = 0
        """The newest process group that shall end."""
        self.changed = threading.Condition()
        self.trained, self.left = 0, 0
        """The newest group in which a step was done, and the newest one that is over."""

    def note(self, trained: int = 0, left: int = 0) -> None:
        with self.changed:
            self.trained, self.left = max(self.trained, trained), max(self.left, left)
            self.changed.notify_all()

    def wait(self, number: int) -> int:
        """Wait until the group has done a step or is over; returns the newest group in which a step was done."""
        with self.changed:
            self.changed.wait_for(lambda: max(self.trained, self.left) >= number)
            return self.trained


class Worker:
    """The actor. Ray calls its methods in threads of their own, so it answers while it trains."""

    def __init__(self, work: Callable[[dict[str, Any]], Work], settings: dict[str, Any], store: str, run: str) -> None:
        niceness.renice(niceness.TRAINING)
        self.make, self.settings = work, settings
        self.checkpoints = Checkpoints(Store(store), run)
        counter: Any = CHECKPOINTS.make()

        def count(committed: Committed | None) -> None:
            counter.inc(1, {"job_id": run, "outcome": "written" if committed else "failed"})

        self.writer = Writer(self.checkpoints, count)
        self.rendezvous = Rendezvous()
        self.orders = Orders()
        self.training: Training | None = None
        """In the newest process group."""

    # in threads of their own

    def load(self) -> Loaded:
        """Load everything; the first call, and the longest."""
        host = ray.util.get_node_ip_address()
        if host == LOOPBACK:  # a pool of this machine alone: nothing of it listens to others
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        self.use(self.make(self.settings))
        niceness.freeze_gc()
        return Loaded(host, ray.get_runtime_context().get_node_id(), os.getpid())

    def use(self, work: Work) -> None:
        self.state = State(work, self.checkpoints)

    def meet(self, one_machine: bool) -> str:
        """Open a rendezvous for the next process group."""
        return self.rendezvous.open(one_machine)

    def stop(self, number: int) -> None:
        """End the process group after the step under way."""
        self.orders.stopped = max(self.orders.stopped, number)

    def reached(self) -> Reached:
        """How far it is. A worker that cannot answer this is gone."""
        counters, training = self.state.counters, self.training
        steps = self.state.work.schedule.steps
        committed = self.writer.newest
        if training is None:
            return Reached(counters.step, steps=steps, committed=committed)
        group, first = training.group.number, training.first
        return Reached(counters.step, training.stepping, group, first, steps, counters.loss, counters.tokens, committed)

    def trains(self, number: int) -> int:
        """Wait until it has done a step in this group, or the group is over; returns the newest group in which it has done a step."""
        return self.orders.wait(number)

    def keep(self) -> Committed:
        """Write the present state to the store, whether the worker trains or stands still; returns the newest checkpoint."""
        with self.state.lock:
            snapshot = self.state.snapshot() if self.state.step > max(0, self.writer.newest.step) else None
        if snapshot is not None:
            self.writer.give(snapshot)
        return self.writer.flush()

    def train(self, group: ProcessGroup) -> Outcome:
        """Train in a process group until it ends."""
        self.training = training = Training(group, self.state, self.writer, self.orders, self.settings)
        work = self.state.work
        try:
            with joined(group, work.trained[0].is_cuda):
                self.state.level(group)
                if not work.trained[0].is_cuda:  # NCCL may look there again
                    self.rendezvous.close()
                return training.run()
        except RuntimeError as error:
            # A collective whose peer is gone. The state here is whole: between two steps, or before the optimizer's.
            work.optimizer.zero_grad()
            return Outcome(self.state.step, training.first, broken=f"{type(error).__name__}: {error}")
        finally:
            training.stepping = False
            self.orders.note(left=group.number)


class Training:
    """The training loop of one worker in one process group."""

    def __init__(self, group: ProcessGroup, state: State, writer: Writer, orders: Orders, settings: dict[str, Any]) -> None:
        self.group, self.state, self.writer, self.orders = group, state, writer, orders
        self.stage: str = settings["stage"]
        self.checkpoint_s: float = settings["checkpoint_s"]
        self.report_s: float = settings["report_s"]
        self.first = -1
        """The step with which the group began; -1 until all workers are level."""
        self.stepping = False

    def run(self) -> Outcome:
        """Train to the run's end, or until a worker is told to stop."""
        self.first, self.stepping = self.state.step, True
        if self.group.rank == 0:
            print(f"training with {self.group.world} workers from step {self.first}", flush=True)
        else:
            print(f"training as worker {self.group.rank + 1} of {self.group.world}", flush=True)
        at_the_end = self._steps()
        self.stepping = False
        if at_the_end:
            return self._finish()
        if self.group.rank == 0:
            print(f"stopped after step {self.state.step}", flush=True)
            self.writer.give(self.state.snapshot())
        return Outcome(self.state.step, self.first)

    def _steps(self) -> bool:
        """Do steps; returns whether the last one was the run's last."""
        group, state, schedule = self.group, self.state, self.state.work.schedule
        progress = ProgressPrinter(self.stage, group.rank, state.step, state.counters.tokens, self.report_s)
        saved_s = time.monotonic()
        for batch in schedule.batches(state.step):
            began_s = time.monotonic()
            loss, tokens, stops = gather(state.work, batch, group.rank, group.world, self._told)
            with state.lock:
                update(state.work, state.step)
                state.counters = state.counters.after(tokens, loss, time.monotonic() - began_s)
            self.orders.note(trained=group.number)
            progress(state.step, schedule.steps, loss, state.counters.tokens)
            if state.step == schedule.steps:
                break
            if stops:
                return False
            if group.rank == 0 and time.monotonic() - saved_s > self.checkpoint_s:
                self.writer.give(state.snapshot())
                saved_s = time.monotonic()
        return True

    def _told(self) -> bool:
        return self.orders.stopped >= self.group.number

    def _finish(self) -> Outcome:
        """Measure on all workers, and save the result on the first."""
        state, first = self.state, self.group.rank == 0
        if first:
            self.writer.give(state.snapshot())  # a run that is ended from here on can go on from its last step
        metrics = state.work.measure(self.group.rank, self.group.world)
        if first:
            self._save()
        before = {f"{key}_before": value for key, value in state.counters.before.items()}
        facts = {"train_loss": state.counters.loss, "tokens": float(state.counters.tokens), "seconds": state.counters.seconds}
        return Outcome(state.step, self.first, ended=first, metrics={**before, **metrics, **facts})

    def _save(self) -> None:
        checkpoints = self.state.checkpoints
        with tempfile.TemporaryDirectory() as folder:
            self.state.work.save(Path(folder))
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                checkpoints.store.upload(f"{checkpoints.root}/{RESULT}/{file.relative_to(folder)}", file)
