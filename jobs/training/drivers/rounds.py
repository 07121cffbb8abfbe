"""A run of a `Work` on Ray Train: a chain of rounds. A round is one ``TorchTrainer.fit`` with as many workers as the grant allows.

Ray Train starts the processes, forms the process group, and starts all of them again where one dies. The steps, the checkpoints and the result
are those of an elastic run, because the workers run the same loop (`jobs.training.drivers.worker`). So a run may change its trainer when it is
resumed.

Ray Train can resize a run itself (``num_workers=(1, 4)``). It gives no notice then, so all steps since the newest checkpoint are lost; it knows
no priorities, and never gives up its last worker. So a round has a fixed size, and the grant decides. When the grant changes, the round ends
after the step under way, its state is kept, and the next round begins with the new size.

Example: two workers train and the grant falls to one. Rank 0 hears of it within `TELL_S`, and both workers end after step 40. The slots are
free when Ray Train has noticed. The next round starts one process, which reads the checkpoint of step 40.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig, Result, TrainingFailedError, WorkerGroupError

from cluster.capacity.arbiter import Job
from cluster.config import Config
from cluster.errors import JobFailed
from jobs.training.drivers import ray_train
from jobs.training.drivers.driver import ENDED_S, ENDING_S, Ended, Listener, Reporter
from jobs.training.drivers.elasticity import DIVERGED, MOST_FAILURES, Began
from jobs.training.drivers.handles import slots_of
from jobs.training.drivers.heartbeat import Heartbeats
from jobs.training.drivers.relay import ANSWER_S, Board
from jobs.training.drivers.worker import Outcome, Reached, Worker
from jobs.training.process_group import ProcessGroup
from jobs.training.state.state import Counters
from jobs.training.work import Work

TURN_S = 0.25
TELL_S = 0.2
"""Rank 0 tells the driver this often how far it is, and hears whether it has to stop."""
GROW_S = 60
"""A round trains at least so long before it ends for the sake of a larger one, because all processes start again. Ray Train's own elastic
groups look as rarely."""


def ends(held: int, granted: int, trained_s: float) -> bool:
    """Whether a round has to end: at once for fewer slots, and after `GROW_S` for more.

    ``held``, ``granted``: slots. ``trained_s``: since when the round trains.

    >>> ends(2, 2, 600.0), ends(2, 1, 0.0), ends(2, 3, 59.0), ends(2, 3, 60.0)
    (False, True, False, True)
    """
    return granted < held or (granted > held and trained_s >= GROW_S)


# the driver's side


def fit(
    config: Config,
    work: Callable[[dict[str, Any]], Work],
    settings: dict[str, Any],
    name: str,
    priority: int,
    listener: Listener,
    check: Callable[[], None] = lambda: None,
    parts: int = 1,
) -> Ended:
    """Train ``work(settings)`` to its end on Ray Train. Arguments, result and errors are those of `jobs.training.drivers.driver.fit`."""
    rounds = Rounds(config, work, settings, name, priority, listener, check, parts)
    try:
        return rounds.train()
    except JobFailed as error:
        error.do = error.do or f"Fix what the log says, then continue from the newest checkpoint with --resume {name}."
        raise
    except BaseException:  # cancelled, or the pool ends, or Ray is away
        words = "the newest state is kept" if rounds.leave_off(ENDING_S) else "the newest checkpoint is kept"
        print(f"{words}: --resume {name}", flush=True)
        time.sleep(ENDED_S)
        raise
    finally:
        rounds.heartbeats.end()


class Round:
    """One ``TorchTrainer.fit``, in a thread."""

    def __init__(self, trainer: Any, board: Any, held: int) -> None:
        """``board``: the actor that its workers tell. ``held``: slots."""
        self.board, self.held = board, held
        self.result: Result | None = None
        self.error: Exception | None = None
        self.reached = Reached(-1)
        self.began_s = math.inf
        """When the newest process group began to train."""
        self.thread = threading.Thread(target=self._run, args=(trainer,), name="ray-train", daemon=True)
        self.thread.start()

    def _run(self, trainer: Any) -> None:
        try:
            self.result = trainer.fit()
        except Exception as error:  # noqa: BLE001 (the thread that waits for the round raises it)
            self.error = error

    @property
    def outcome(self) -> Outcome | None:
        """Rank 0's; None where the round failed, or was stopped before it trained."""
        returned: Any = self.result.return_value if self.result else None
        return returned

    def look(self) -> Reached:
        """How far rank 0 is, as far as it has told."""
        with contextlib.suppress(RayError):  # the board's machine is lost, and the round's end with it
            told: Any = ray.get(self.board.look.remote(), timeout=ANSWER_S)
            self.reached = told or self.reached
        return self.reached

    def stop(self, within_s: float) -> None:
        """Make the workers stop after the step under way. After ``within_s`` rank 0 ends its process, whatever it does."""
        self.board.stop.remote(within_s)


class Rounds:
    """The driver of a run: it waits for a grant, starts a round, watches it, and begins again."""

    def __init__(
        self,
        config: Config,
        work: Callable[[dict[str, Any]], Work],
        settings: dict[str, Any],
        name: str,
        priority: int,
        listener: Listener,
        check: Callable[[], None],
        parts: int,
    ) -> None:
        training = config.training
        own = {"checkpoint_s": training.checkpoint_s, "report_s": training.report_s, "parts": parts}
        place = {"work": work, "store": config.store, "run": name}
        self.settings = {"stage": name.rpartition("-")[0], **settings, **own, **place}
        self.config, self.name, self.tell, self.check = config, name, Reporter(listener), check
        self.parts, self.slots_per_worker = parts, slots_of(training.slots_per_worker, parts)
        least, most = training.min_workers * self.slots_per_worker, training.workers * self.slots_per_worker
        job = Job(name, priority, time.time(), least, most, self.slots_per_worker)
        self.heartbeats = Heartbeats(job, listener.note)
        self.round: Round | None = None
        self.reached = Reached(-1)
        """How far rank 0 was when the driver looked last, in any round."""
        self.lost, self.failures = 0, 0
        """Steps that were done twice, and rounds that failed since a step was done."""

    def train(self) -> Ended:
        """Begin rounds until one of them ends the run. Raises `JobFailed`."""
        while True:
            done = self._watched(self._begun(self._granted()))
            if (outcome := done.outcome) and outcome.ended:
                self.tell.finished(outcome, done.held // self.slots_per_worker)
                return Ended(self.name, {**outcome.metrics, "steps_lost": float(self.lost)})
            self._check(done)

    def _granted(self) -> int:
        """Wait for a grant. Returns slots."""
        while not (slots := self._wanted()):
            self.check()
            time.sleep(TURN_S)
        return slots

    def _wanted(self) -> int:
        wanted = self.heartbeats.wanted(self.heartbeats.holds[0])
        return wanted - wanted % self.slots_per_worker

    def _begun(self, slots: int) -> Round:
        self.heartbeats.holds, self.heartbeats.requested = (slots, 0), slots
        board: Any = ray.remote(Board).options(num_cpus=0).remote(self.reached.group)
        trainer = ray_train.trainer(
            self.config,
            train,
            {**self.settings, "board": board},
            self.name,
            slots // self.slots_per_worker * self.parts,
            self.slots_per_worker // self.parts,
            FailureConfig(MOST_FAILURES, controller_failure_limit=0),
        )
        self.round = Round(trainer, board, slots)
        return self.round

    def _watched(self, round: Round) -> Round:
        """Watch a round to its end. Then the run holds what it may take into the next one."""
        while round.thread.is_alive():
            time.sleep(TURN_S)
            self.check()
            self._look(round)
            wanted, now_s = self._wanted(), time.monotonic()
            if ends(round.held, wanted, now_s - round.began_s):
                round.stop(self.config.training.yield_deadline_s if wanted < round.held else math.inf)
        self._look(round)
        self.heartbeats.holds, self.heartbeats.requested = (min(round.held, self._wanted()), 0), 0
        return round

    def _look(self, round: Round) -> None:
        before, now, workers = self.reached, round.look(), round.held // self.slots_per_worker
        if now.first < 0:
            return
        if now.group != before.group:
            round.began_s = time.monotonic()
            self.lost += max(0, before.step - now.first)
            self.tell.began(Began(workers, now.first))
        if now.step > now.first:
            self.failures = 0
        self.reached = now
        self.tell.committed(now.committed)
        self.tell.progress(now, workers, time.monotonic())
        self.heartbeats.holds = round.held, round.held if now.step > now.first else 0

    def _check(self, round: Round) -> None:
        """Whether another round may begin after this one. Raises `JobFailed` if not."""
        if round.outcome and round.outcome.diverged:
            raise JobFailed(f"The training has diverged: at step {round.outcome.step + 1} {round.outcome.diverged}.", DIVERGED)
        if round.error is None:
            return
        if not isinstance(round.error, TrainingFailedError):
            raise JobFailed(f"Ray Train could not begin: {round.error}.") from round.error
        self.failures += 1
        words = f"at step {max(0, self.reached.step)}: {reason(round.error)}"
        if self.failures > MOST_FAILURES or (isinstance(round.error, WorkerGroupError) and round.reached.first < 0):
            raise JobFailed(f"The training failed {words}") from round.error
        self.tell.say(f"the training failed {words}; it begins again from the newest checkpoint", "")

    def leave_off(self, within_s: float) -> bool:
        """Stop after the current step, unless that takes too long. Returns whether its state was written to the store."""
        if self.round is None:
            return False
        with contextlib.suppress(RayError):
            self.round.stop(within_s)
            self.round.thread.join(within_s)
            self._look(self.round)
        outcome = self.round.outcome
        return outcome is not None and self.reached.committed.step >= outcome.step


def reason(error: TrainingFailedError) -> str:
    """The first worker's error where a worker failed, in one line; Ray Train's own words otherwise."""
    causes: list[Exception] = [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else []
    return f"{causes[0] if causes else error}".strip().splitlines()[-1]


# the workers' side


def train(settings: dict[str, Any]) -> Outcome | None:
    """Train on one worker of Ray Train, which has joined the process group. Returns None where the round was stopped before.

    Raises `RuntimeError` if another worker dies. Ray Train starts all of them again then.
    """
    context = ray.train.get_context()
    rank, world, board = context.get_world_rank(), context.get_world_size(), settings["board"]
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())  # Ray Train shows a worker the GPUs of all workers on its machine
    number = agreed(ray.get(board.begin.remote()) if rank == 0 else 0)
    if not number:
        return None
    parts: int = settings["parts"]
    worker = Worker(settings["work"], settings, settings["store"], settings["run"], rank % parts)
    worker.report = report
    worker.load()
    with following(board, worker, number) if rank == 0 else contextlib.nullcontext():
        outcome = worker.train(ProcessGroup(number, rank // parts, world // parts, "", rank % parts, parts))
        worker.writer.flush()
    if outcome.broken:
        raise RuntimeError(outcome.broken)
    return outcome


def agreed(number: int) -> int:
    """Rank 0's number, on all workers."""
    shared: list[Any] = [number]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def report(counters: Counters) -> None:
    """Show Ray Train's dashboard how far the run is. All workers call this together."""
    ray.train.report({"step": counters.step, "train_loss": counters.loss, "tokens": counters.tokens})


@contextlib.contextmanager
def following(board: Any, worker: Worker, number: int) -> Iterator[None]:
    """Tell the board how far rank 0 is, and do what the driver orders, while the block runs and once at its end."""
    done = threading.Event()

    def tell() -> None:
        left_s: Any = ray.get(board.tell.remote(worker.reached()))
        if left_s is not None:
            worker.stop(number)
        if left_s is not None and left_s < 0 and not done.is_set():
            print("the step under way takes longer than the job may take to give its slots back", flush=True)
            os._exit(1)

    def follow() -> None:
        while not done.wait(TELL_S):
            with contextlib.suppress(RayError):  # the driver has ended, and Ray ends this process soon
                tell()

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(RayError):
            tell()
