"""One worker of an elastic run: a Ray actor that keeps its model and its training state until the driver ends it. With
`jobs.training.sharding.parts` it is several actors, which do everything together.

Workers train together in process groups. If the driver tells one worker to stop, its group ends after the same step on all workers. If a worker
dies, its group breaks. The next group has the workers that stayed and those that came, and goes on from the newest state among them. A worker
keeps its model and its state in memory between two groups, so the next group starts within a fraction of a second. torchft works this way too
(https://github.com/pytorch/torchft). TorchElastic and Ray Train start every worker's process again.

Example: workers a and b train, and c has loaded. The driver tells a to stop. a and b both end after step 40. The driver forms a group of a, b
and c; c receives the state of step 40, and all three go on with step 41.
"""

import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from cluster import niceness
from cluster.address import LOOPBACK
from cluster.metrics import CHECKPOINTS
from cluster.store.objects import Store
from jobs.training.process_group import ProcessGroup, Rendezvous, joined
from jobs.training.progress import Committed, ProgressPrinter
from jobs.training.state.checkpoints import Writer
from jobs.training.state.sliced_state import SlicedState, state_of
from jobs.training.state.state import Counters, Measured, State
from jobs.training.work import HELD_OUT, Asked, Awaits, Work, agree, divergence, gather, update

RESULT = "result"
WAIT_S = 0.1
"""How often workers that wait for data look for it."""


class Loaded(NamedTuple):
    """A worker's answer when it has loaded everything that it needs."""

    host: str
    """The machine's IP address."""
    node: str
    """Ray's id of that machine."""
    pid: int


class Reached(NamedTuple):
    """How far a worker is."""

    step: int
    """Steps that it has done, or taken over from another worker; -1 before it has a state."""
    stepping: bool = False
    """Whether a step is under way. False while the worker measures, saves the result, or waits for data."""
    group: int = 0
    """The newest process group in which the worker began to train."""
    first: int = -1
    """The step at which this group began; -1 until that is known."""
    steps: int = 0
    """Steps of the whole run."""
    loss: float = float("nan")
    """The training loss of the last step."""
    tokens: int = 0
    """Tokens since the start of the run."""
    committed: Committed = Committed()
    """The newest checkpoint that this worker has written to the store."""
    ideal_s_per_token: float = 0.0
    """See `Work`."""
    memory_mb: float = 0.0
    """The most memory that the worker has taken: of its GPU, or of the machine."""
    measured: tuple[Measured, ...] = ()
    """See `Counters`."""


class Outcome(NamedTuple):
    """How a process group ended for one worker."""

    step: int
    """Steps that the worker has done by now."""
    first: int
    """The step at which the group began; -1 if it broke before its first step."""
    ended: bool = False
    """Whether this worker has saved the run's result."""
    broken: str = ""
    """Why the group broke; empty if it did not."""
    diverged: str = ""
    """Why the run cannot go on from here; empty if it can."""
    metrics: dict[str, float] = {}  # noqa: RUF012 (never written to)
    """What the run measured, by name; losses in nats per token."""
    measured: tuple[Measured, ...] = ()
    """See `Counters`."""


class Diverged(Exception):
    """The loss or the gradient shows that the weights are spoilt, or would be. The words say how."""


class Orders:
    """Carries orders from the actor's other threads to the training thread, and its progress back to them."""

    def __init__(self) -> None:
        self.stopped = 0
        """The newest process group that was told to stop."""
        self.changed = threading.Condition()
        self.trained, self.left = 0, 0
        """The newest group in which the worker completed a step, and the newest one that is over for it."""

    def note(self, trained: int = 0, left: int = 0) -> None:
        """Record progress, and wake whoever waits for it. Numbers only grow."""
        with self.changed:
            self.trained, self.left = max(self.trained, trained), max(self.left, left)
            self.changed.notify_all()

    def wait(self, number: int) -> int:
        """Wait until the worker has completed a step in the group, or the group is over. Returns the newest group with a completed step."""
        with self.changed:
            self.changed.wait_for(lambda: max(self.trained, self.left) >= number)
            return self.trained


def ignore(counters: Counters) -> None: ...


class Worker:
    """The actor. Ray calls its methods in several threads, so it answers while it trains."""

    def __init__(
        self, work: Callable[[dict[str, Any]], Work], settings: dict[str, Any], store: str, run: str, part: int = 0
    ) -> None:
        """``work(settings)`` makes what the run trains. ``store``: the store's URL, where the worker writes checkpoints of the ``run``. ``part``:
        this process's place, if the worker has several; the settings get it too."""
        niceness.renice(niceness.TRAINING)
        self.make, self.settings = work, {**settings, "part": part}
        self.store, self.run = Store(store), run
        self.rendezvous = Rendezvous()
        self.orders = Orders()
        self.report = ignore
        """Called on all workers together when a checkpoint is due."""
        self.training: Training | None = None
        """The training loop in the newest process group; None before the first group."""

    # called by the driver, in several threads

    def load(self) -> Loaded:
        """Load the model and everything else. The driver calls this first, and it takes the longest."""
        host = ray.util.get_node_ip_address()
        if host == LOOPBACK:  # a pool on one machine: nothing of it listens on the network
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        self.use(self.make(self.settings))
        niceness.freeze_gc()
        return Loaded(host, ray.get_runtime_context().get_node_id(), os.getpid())

    def use(self, work: Work) -> None:
        """Train ``work`` from the next process group on."""
        self.state = state_of(work, self.store, self.run)
        counter: Any = CHECKPOINTS.make()

        def count(committed: Committed | None) -> None:
            counter.inc(1, {"job_id": self.run, "outcome": "written" if committed else "failed"})

        self.writer = Writer(self.state.checkpoints, count)

    def meet(self, one_machine: bool) -> str:
        """Open a rendezvous for the next process group, of which this worker is rank 0. Returns its URL."""
        return self.rendezvous.open(one_machine)

    def stop(self, number: int) -> None:
        """Make the process group end after the current step, on all of its workers."""
        self.orders.stopped = max(self.orders.stopped, number)

    def reached(self) -> Reached:
        """How far the worker is. The driver takes a worker that does not answer this for dead or hung."""
        counters, training = self.state.counters, self.training
        steps = self.state.work.schedule.steps
        committed = self.writer.newest
        if training is None:
            return Reached(counters.step, steps=steps, committed=committed)
        group, first = training.group.number, training.first
        cost = self.state.work.ideal_s_per_token, peak_memory_mb()
        done = counters.step, training.stepping, group, first, steps, counters.loss, counters.tokens
        return Reached(*done, committed, *cost, counters.measured)

    def trains(self, number: int) -> int:
        """Wait until the worker has completed a step in this group, or the group is over. Returns the newest group with a completed step."""
        return self.orders.wait(number)

    def keep(self) -> Committed:
        """Write the current state to the store, also while the worker trains. Returns the newest checkpoint."""
        with self.state.lock:
            snapshot = self.state.alone() if self.state.step > max(0, self.writer.newest.step) else None
        if snapshot is not None:
            self.writer.give(snapshot)
        return self.writer.flush()

    def train(self, group: ProcessGroup) -> Outcome:
        """Train in a process group until it ends or breaks."""
        self.training = training = Training(group, self.state, self.writer, self.orders, self.settings, self.report)
        work = self.state.work
        try:
            with joined(group, work.device.type == "cuda"):
                self.state.level(group)
                if work.device.type != "cuda":  # NCCL may need the rendezvous later too
                    self.rendezvous.close()
                return training.run()
        except Diverged as error:
            return Outcome(self.state.step, training.first, diverged=str(error))
        except RuntimeError as error:
            # A collective fails when another worker dies. The state here is whole: collectives run between steps, or before the update.
            return Outcome(self.state.step, training.first, broken=f"{type(error).__name__}: {error}")
        finally:
            training.stepping = False
            self.state.leave(self.writer)
            self.orders.note(left=group.number)


class Training:
    """The training loop of one worker in one process group."""

    def __init__(
        self,
        group: ProcessGroup,
        state: State | SlicedState,
        writer: Writer,
        orders: Orders,
        settings: dict[str, Any],
        report: Callable[[Counters], object],
    ) -> None:
        self.group, self.state, self.writer, self.orders, self.report = group, state, writer, orders, report
        self.stage: str = settings["stage"]
        self.checkpoint_s: float = settings["checkpoint_s"]
        self.report_s: float = settings["report_s"]
        self.first = -1
        """The step at which the group began; -1 until all workers have the same state."""
        self.stepping = False
        self.saved_s = time.monotonic()
        """When the newest checkpoint began, or the group."""

    def run(self) -> Outcome:
        """Train until the run ends, or until the driver stops a worker of the group."""
        self.first, self.stepping = self.state.step, True
        if self.group.leads:
            print(f"training with {self.group.world} workers from step {self.first}", flush=True)
        elif self.group.part == 0:
            print(f"training as worker {self.group.rank + 1} of {self.group.world}", flush=True)
        completed = self._steps()
        self.stepping = False
        if completed:
            return self._finish()
        if self.group.leads:
            print(f"stopped after step {self.state.step}", flush=True)
        self._checkpoint()
        return Outcome(self.state.step, self.first)

    def _steps(self) -> bool:
        """Do step after step. True after the run's last step; False if the group was stopped before it."""
        group, state, schedule = self.group, self.state, self.state.work.schedule
        progress = ProgressPrinter(self.stage, group.rank or group.part, state.step, state.counters.tokens, self.report_s)
        for batch in schedule.batches(state.step):
            if not self._wait():
                return False
            began_s = time.monotonic()
            found = gather(state.work, batch, group.rank, group.world, self._asked)
            if why := divergence(found, state.work.hopeless, state.counters.before.get(HELD_OUT, 0.0)):
                raise Diverged(why)
            with state.lock:
                update(state.work, state.step, found.norm)
                state.counters = state.counters.after(found.tokens, found.loss, time.monotonic() - began_s)
            self.orders.note(trained=group.number)
            progress(state.step, schedule.steps, found.loss, state.counters.tokens)
            if state.step == schedule.steps:
                break
            if schedule.measures_after(state.step):
                self._measure()
            if found.stops:
                return False
            if found.due:
                self._checkpoint()
        return True

    def _wait(self) -> bool:
        """Wait until all workers have the data of the next step. False if any worker was told to stop: nobody waits for data then."""
        work = self.state.work
        if not isinstance(work, Awaits):
            return True
        while not (now := agree(work.ready(self.group.rank), self._told(), work.device)).ready and not now.stops:
            self.stepping = False  # it may take longer than any step
            time.sleep(WAIT_S)
        self.stepping = not now.stops
        return not now.stops

    def _asked(self) -> Asked:
        due = self.group.leads and time.monotonic() - self.saved_s > self.checkpoint_s
        return Asked(self._told(), due)

    def _told(self) -> bool:
        return self.orders.stopped >= self.group.number

    def _checkpoint(self) -> None:
        if part := self.state.share(self.group):
            self.writer.give(part)
        self.saved_s = time.monotonic()
        self.report(self.state.counters)

    def _measure(self) -> None:
        """Measure the model on all workers. If it is the best so far, rank 0 saves it as the result."""
        state = self.state
        self.stepping = False  # it may take longer than any step
        metrics = state.work.measure(self.group.rank, self.group.world)
        with state.lock:
            state.counters = state.counters.with_measured(metrics)
        best = state.counters.best == Measured(state.step, metrics)
        if self.group.leads:
            told = " ".join(f"{name}={value:.4f}" for name, value in metrics.items())
            print(f"measured step={state.step} {told}{' best' if best else ''}", flush=True)
        if best:
            self._save()
        self.stepping = True

    def _finish(self) -> Outcome:
        """Measure the model on all workers, and save the result on rank 0, unless weights before had a smaller loss."""
        state, first = self.state, self.group.leads
        self._checkpoint()  # a run that is killed from here on can resume after its last step
        metrics = state.work.measure(self.group.rank, self.group.world)
        best = state.counters.best
        if best is not None and best.metrics[HELD_OUT] <= metrics[HELD_OUT]:
            metrics = {**best.metrics, "best_step": float(best.step)}
        else:
            self._save()
        before = {f"{key}_before": value for key, value in state.counters.before.items()}
        facts = {"train_loss": state.counters.loss, "tokens": float(state.counters.tokens), "seconds": state.counters.seconds}
        return Outcome(
            state.step, self.first, ended=first, metrics={**before, **metrics, **facts}, measured=state.counters.measured
        )

    def _save(self) -> None:
        """Upload the result's files to the run's folder in the store, on rank 0. All workers call this together. Raises `StoreUnavailable`."""
        self.state.collect(self.group)
        if not self.group.leads:
            return
        checkpoints = self.state.checkpoints
        with tempfile.TemporaryDirectory() as folder:
            self.state.work.save(Path(folder))
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                checkpoints.store.upload(f"{checkpoints.root}/{RESULT}/{file.relative_to(folder)}", file)


def peak_memory_mb() -> float:
    """The most memory that this process has taken so far: of its GPU if it has one, of the machine otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
