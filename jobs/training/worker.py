"""One worker of an elastic run: a process that holds its slots, and what it has learnt, until it is told to leave.

Members train together in formations. A formation ends when one of its members was told to stop, after the same step on all of them, or
when one of them is gone. The next one, of those who are left and those who have come, goes on from whoever has done the most steps. What
stays in memory need not be read again, so a formation follows the one before within a fraction of a second (TorchElastic and torchft go on
in this way too; Ray Train ends every worker).
"""

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
import torch
import torch.distributed as dist

from cluster import niceness
from cluster.errors import StoreUnavailable
from cluster.metrics import CHECKPOINTS
from cluster.pool.local import LOOPBACK
from cluster.store.objects import Store
from jobs.training.checkpoints import Checkpoints, Snapshot, Writer
from jobs.training.progress import ProgressPrinter
from jobs.training.schedule import Schedule

PATIENCE_S = 600
"""How long a member waits for the others within a step. Who is gone is noticed at once, and who hangs by the driver."""
RESULT = "result"


class Work(Protocol):
    """What a run trains. Made on each member from the run's settings; slow, because it reads the model."""

    schedule: Schedule
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.AdamW

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this member's part to the gradients. Its part of the loss, and the tokens of the whole batch."""
        ...

    def measure(self, rank: int, world: int) -> dict[str, float]:
        """How good the model is now. All members call it together."""
        ...

    def save(self, target: Path) -> None:
        """The result's files."""
        ...


class Where(NamedTuple):
    host: str
    node: str
    pid: int


class ProcessGroup(NamedTuple):
    """Who trains together, as one member sees it."""

    number: int
    rank: int
    world: int
    meeting: str
    """Where they find each other: a file where all are on one machine, else an address of the first one's machine."""


class State(NamedTuple):
    """Where a run is, beside the tensors."""

    step: int = -1
    """Steps that are done; -1 before anything is known."""
    tokens: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    """Spent in steps."""
    before: dict[str, float] = {}  # noqa: RUF012 (never written to)
    """What was measured before the first step."""

    def after(self, tokens: int, loss: float, seconds: float) -> "State":
        """One step on."""
        return State(self.step + 1, self.tokens + tokens, loss, self.seconds + seconds, self.before)


class Reached(NamedTuple):
    """How far a worker is."""

    step: int
    stepping: bool = False
    """Whether a step is under way: not while it measures, or saves the result."""
    group: int = 0
    """The process group that it is in, or was in last."""
    first: int = -1
    """The step that this process group began with."""
    steps: int = 0
    """Steps of the whole run."""
    loss: float = float("nan")
    """The training loss of the last step."""
    tokens: int = 0
    """Tokens since the start of the run."""


class Outcome(NamedTuple):
    """How a formation ended for one member."""

    step: int
    first: int
    """The step that it began with."""
    ended: bool = False
    """Whether this member has saved the run's result."""
    broken: str = ""
    """Why it ended too early, where it did."""
    metrics: dict[str, float] = {}  # noqa: RUF012 (never written to)


class Worker:
    """The actor. Its methods run in threads of their own, so it answers while it trains."""

    def __init__(self, work: Callable[[dict[str, Any]], Work], settings: dict[str, Any], store: str, run: str) -> None:
        niceness.renice(niceness.TRAINING)
        self.make, self.settings = work, settings
        self.checkpoints = Checkpoints(Store(store), run)
        counter: Any = CHECKPOINTS.make()
        self.writer = Writer(self.checkpoints, lambda outcome: counter.inc(1, {"job_id": run, "outcome": outcome}))
        self.checkpoint_s: float = settings["checkpoint_s"]
        self.stopped = 0
        """The last formation that shall end."""
        self.state = State()
        self.whole = threading.Lock()
        """Held while the state changes: whoever has it finds tensors and step of one moment."""
        self.first = -1
        """The step that the last formation began with."""
        self.stepped, self.trained, self.left = threading.Condition(), 0, 0
        """The last formation in which a step was done, and the last one that is over."""
        self.stepping = False
        self.group = 0
        """The process group that it is in, or was in last."""
        self.met: Path | None = None
        """Where the last formation met that this member called."""

    def prepare(self) -> Where:
        """Load everything; the first call, and the longest."""
        host = ray.util.get_node_ip_address()
        if host == LOOPBACK:  # a pool of this machine alone: nothing of it listens to others
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        self.work = self.make(self.settings)
        niceness.freeze_gc()
        return Where(host, ray.get_runtime_context().get_node_id(), os.getpid())

    def meeting(self, alone: bool) -> str:
        """A place where the next formation can meet; ``alone`` where all are on this machine, which then needs no port."""
        self._forget_meeting()
        if alone:
            self.met = Path(tempfile.mkdtemp(prefix="meeting-"))
            return (self.met / "file").as_uri()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def stop(self, number: int) -> None:
        """End the formation after the step that is under way."""
        self.stopped = max(self.stopped, number)

    def reached(self) -> Reached:
        """How far it is. A worker that cannot answer this is gone."""
        state = self.state
        return Reached(state.step, self.stepping, self.group, self.first, self.work.schedule.steps, state.loss, state.tokens)

    def trains(self, number: int) -> int:
        """Wait until it has done a step in this formation, or that is over. The last one in which it has done a step."""
        with self.stepped:
            self.stepped.wait_for(lambda: max(self.trained, self.left) >= number)
            return self.trained

    def keep(self) -> int:
        """See to it that the state is kept in the store, as it is now, whether it trains or stands still; the newest step that is kept."""
        with self.whole:
            snapshot = self._snapshot() if self.state.step > max(0, self.writer.written) else None
        if snapshot is not None:
            self.writer.give(snapshot)
        return self.writer.settle()

    def learn(self, formation: ProcessGroup) -> Outcome:
        """Train in a formation until it ends."""
        self.first = self.state.step
        try:
            with together(formation, self.work.trained[0].is_cuda):
                self._level(formation)
                self.first = self.state.step
                if formation.rank == 0:
                    print(f"training with {formation.world} workers from step {self.first}", flush=True)
                else:
                    print(f"training as worker {formation.rank + 1} of {formation.world}", flush=True)
                self.group, self.stepping = formation.number, True
                ended = self._train(formation)
                self.stepping = False
                return self._finish(formation) if ended else self._pause(formation)
        except RuntimeError as error:
            # A collective whose peer is gone. What this member has is whole: between two steps, or before the optimizer's.
            self.work.optimizer.zero_grad()
            self.stepping = False
            return Outcome(self.state.step, self.first, broken=f"{type(error).__name__}: {error}")
        finally:
            self._note(left=formation.number)

    def _note(self, trained: int = 0, left: int = 0) -> None:
        with self.stepped:
            self.trained, self.left = max(self.trained, trained), max(self.left, left)
            self.stepped.notify_all()

    def _level(self, formation: ProcessGroup) -> None:
        """Everybody takes over the state of who has done the most steps, or the newest checkpoint where that is further: who trains again
        after a while knows nothing of what others did meanwhile."""
        steps: list[int] = [-1] * formation.world
        dist.all_gather_object(steps, self.state.step)
        if not self.work.trained[0].is_cuda:  # NCCL may look there again
            self._forget_meeting()
        first = steps.index(max(steps))
        if formation.rank == first:
            self._restore()
        shared: list[Any] = [self.state]
        dist.broadcast_object_list(shared, first)
        if shared[0].step < 0:
            self.state = State(0, before=self.work.measure(formation.rank, formation.world))
        elif min(steps) < shared[0].step:
            self._take_over(shared[0], first)

    def _forget_meeting(self) -> None:
        """Only when everybody has met, and not when some may still be leaving: PyTorch's `FileStore` looks at its end whether the file is there,
        and where it vanishes just then it waits for it, as long as for another member."""
        if self.met:
            shutil.rmtree(self.met, ignore_errors=True)
            self.met = None

    def _take_over(self, state: State, first: int) -> None:
        """Everybody's tensors become those of the ``first``. Who has done as many steps gets what it has, and may be asked for it meanwhile."""
        behind = self.state.step < state.step
        with self.whole if behind else contextlib.nullcontext():
            try:
                for tensor in self._tensors(state.step).values():
                    dist.broadcast(tensor, first)
            except RuntimeError:
                if behind:
                    os._exit(1)  # what is in memory here is neither the one state nor the other, and must never count as either
                raise
            self.state = state

    def _train(self, formation: ProcessGroup) -> bool:
        """Steps until the run's end, or until somebody was told to stop. Whether it is the end."""
        progress = ProgressPrinter(
            self.settings["stage"], formation.rank, self.state.step, self.state.tokens, self.settings["report_s"]
        )
        saved_s = time.monotonic()
        for batch in self.work.schedule.batches(self.state.step):
            began_s = time.monotonic()
            loss, tokens, stops = gather(
                self.work, batch, formation.rank, formation.world, lambda: self.stopped >= formation.number
            )
            with self.whole:
                update(self.work, self.state.step)
                self.state = self.state.after(tokens, loss, time.monotonic() - began_s)
            self._note(trained=formation.number)
            progress(self.state.step, self.work.schedule.steps, loss, self.state.tokens)
            if self.state.step == self.work.schedule.steps:
                break
            if stops:
                return False
            if formation.rank == 0 and time.monotonic() - saved_s > self.checkpoint_s:
                self.writer.give(self._snapshot())
                saved_s = time.monotonic()
        return True

    def _pause(self, formation: ProcessGroup) -> Outcome:
        if formation.rank == 0:
            print(f"stopped after step {self.state.step}", flush=True)
            self.writer.give(self._snapshot())
        return Outcome(self.state.step, self.first)

    def _finish(self, formation: ProcessGroup) -> Outcome:
        if formation.rank == 0:
            self.writer.give(self._snapshot())  # whoever is ended from here on has the last step to go on from
        metrics = self.work.measure(formation.rank, formation.world)
        if formation.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                self.work.save(Path(folder))
                for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                    self.checkpoints.store.upload(f"{self.checkpoints.root}/{RESULT}/{file.relative_to(folder)}", file)
        before = {f"{key}_before": value for key, value in self.state.before.items()}
        facts = {"train_loss": self.state.loss, "tokens": float(self.state.tokens), "seconds": self.state.seconds}
        return Outcome(self.state.step, self.first, ended=formation.rank == 0, metrics={**before, **metrics, **facts})

    # the state as tensors

    def _tensors(self, step: int) -> dict[str, torch.Tensor]:
        """What a run's state consists of, in place. AdamW's moments are made where there are none yet."""
        named: dict[str, torch.Tensor] = {}
        for number, parameter in enumerate(self.work.trained):
            moments = self.work.optimizer.state[parameter]
            if not moments:
                moments |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.tensor(float(step))
            named |= {f"{number}": parameter.data, f"{number}.exp_avg": moments["exp_avg"]}
            named[f"{number}.exp_avg_sq"] = moments["exp_avg_sq"]
        return named

    def _snapshot(self) -> Snapshot:
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._tensors(self.state.step).items()
        }
        return Snapshot(self.state.step, self.state._asdict(), tensors)

    def _restore(self) -> None:
        """The newest checkpoint, where it is further than this member."""
        try:
            newest = self.checkpoints.newest(after=self.state.step)
        except StoreUnavailable as error:
            if self.state.step < 0:
                raise
            return print(f"going on from memory: {error}", flush=True)
        if newest is None:
            return
        with self.whole, torch.no_grad():
            for name, tensor in self._tensors(newest.step).items():
                tensor.copy_(newest.tensors[name])
            self.state = State(**newest.meta)
        print(f"going on from the checkpoint of step {self.state.step}", flush=True)


def gather(
    work: Work, batch: list[int], rank: int, world: int, told: Callable[[], bool] = lambda: False
) -> tuple[float, int, bool]:
    """The gradients of one global batch, the same on every member. Its loss and tokens, and whether anybody was ``told`` to stop: asked after
    the gradients, which take the time, so that it is this step's end that all stop at, and not the next one's."""
    loss, tokens = work.gradients(batch, rank, world)
    gradients = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in work.trained]
    flat = torch.cat([*gradients, torch.stack([loss, loss.new_tensor(float(told()))]).to(gradients[0])])
    dist.all_reduce(flat)
    *gradients, rest = flat.split([*(p.numel() for p in work.trained), 2])
    for parameter, gradient in zip(work.trained, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return rest[0].item(), tokens, rest[1].item() > 0


def update(work: Work, step: int) -> None:
    """The optimizer's step, with the gradients that were gathered."""
    for group in work.optimizer.param_groups:
        group["lr"] = work.schedule.rate(step)
    torch.nn.utils.clip_grad_norm_(work.trained, 1.0)
    try:
        work.optimizer.step()
    except RuntimeError:  # out of memory: half of it may be done, and must never count as a step, nor as none
        traceback.print_exc()
        os._exit(1)
    work.optimizer.zero_grad()


@contextlib.contextmanager
def together(formation: ProcessGroup, cuda: bool) -> Any:
    """A process group for one formation."""
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=formation.meeting,
        rank=formation.rank,
        world_size=formation.world,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
