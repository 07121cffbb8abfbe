"""The training state of a run on one worker: the parameters, the optimizer's moments, and counters.

The training thread changes the tensors in place. One lock guards tensors and counters together, so whoever copies them gets both of the same
step.
"""

import contextlib
import os
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cluster.errors import StoreUnavailable
from jobs.training.process_group import ProcessGroup
from jobs.training.state.checkpoints import Checkpoints, Snapshot, Writer
from jobs.training.state.part_checkpoints import PartCheckpoints
from jobs.training.work import HELD_OUT, Work

KEPT = 16
"""Measurements that a driver gets to see, even if it has not looked for a while."""


class Measured(NamedTuple):
    """The model at one step of the run."""

    step: int
    metrics: dict[str, float]
    """What `Work.measure` found."""


class Counters(NamedTuple):
    """The part of the state that is not tensors."""

    step: int = -1
    """Steps that are done; -1 before the worker has a state."""
    tokens: int = 0
    """Tokens since the start of the run."""
    loss: float = float("nan")
    """The training loss of the last step, in nats per token."""
    seconds: float = 0.0
    """Time spent in steps since the start of the run."""
    before: dict[str, float] = {}  # noqa: RUF012 (never written to)
    """What `Work.measure` found before the first step."""

    measured: tuple[Measured, ...] = ()
    """The newest measurements between the first step and the last, oldest first, at most `KEPT`."""
    best: Measured | None = None
    """The measurement with the least held-out loss. The run's result has the weights of that step."""

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> "Counters":
        """From the plain JSON values of a checkpoint."""
        measured = tuple(Measured(*one) for one in meta.get("measured", ()))
        best = Measured(*meta["best"]) if meta.get("best") else None
        return cls(**{**meta, "measured": measured, "best": best})

    def after(self, tokens: int, loss: float, seconds: float) -> "Counters":
        """The counters after one more step, which had so many ``tokens`` and took so many ``seconds``."""
        return self._replace(step=self.step + 1, tokens=self.tokens + tokens, loss=loss, seconds=self.seconds + seconds)

    def with_measured(self, metrics: dict[str, float]) -> "Counters":
        """
        >>> before = Counters(step=9, best=Measured(5, {"eval_loss": 1.5}))
        >>> [before.with_measured({"eval_loss": loss}).best.step for loss in (1.7, 1.2)]
        [5, 9]
        """
        now = Measured(self.step, metrics)
        best = now if self.best is None or metrics[HELD_OUT] < self.best.metrics[HELD_OUT] else self.best
        return self._replace(measured=(*self.measured, now)[-KEPT:], best=best)


class State:
    """The parameters and the optimizer of a `Work`, with their counters.

    If a worker has several processes, each of them has this for its part of the model, and takes it over from the same part of another worker.
    """

    def __init__(self, work: Work, checkpoints: Checkpoints | PartCheckpoints) -> None:
        self.work, self.checkpoints = work, checkpoints
        self.counters = Counters()
        self.lock = threading.Lock()
        """Held while the state changes."""

    @property
    def step(self) -> int:
        return self.counters.step

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The state's tensors themselves, see `FlatParameters.tensors`."""
        return self.work.flat.tensors(step)

    def snapshot(self) -> Snapshot:
        """A copy of the state in the host's memory. Only the training thread may call this without holding the lock."""
        group = self.work.parallel.formation if self.work.parallel else ""
        return Snapshot(self.step, self.counters._asdict(), self._copies(), group)

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors(self.step).items()}

    def alone(self) -> Snapshot | None:
        """What a worker can write without the others."""
        return self.snapshot()

    def share(self, group: ProcessGroup) -> Snapshot | None:
        """What this worker writes of a checkpoint: rank 0 all of it, and the others nothing."""
        return self.snapshot() if group.rank == 0 else None

    def collect(self, group: ProcessGroup) -> None:
        """Bring what the result needs to rank 0. All workers call this together."""
        if group.rank == 0 and self.work.parallel:
            self.work.parallel.collect()

    def leave(self, writer: Writer) -> None:
        """The process group has ended or is broken. The state stays."""
        if self.work.parallel:
            self.work.parallel.leave()
        self.work.flat.clear()

    def restore(self) -> None:
        """Load the newest checkpoint of the store if it is newer than this state.

        If the store cannot be read, the worker keeps its state. Raises `StoreUnavailable` if it has none.
        """
        try:
            newest = self.checkpoints.newest(after=self.step)
        except StoreUnavailable as error:
            if self.step < 0:
                raise
            return print(f"going on from memory: {error}", flush=True)
        if newest is None:
            return
        with self.lock, torch.no_grad():
            for name, tensor in self.tensors(newest.step).items():
                tensor.copy_(newest.tensors[name])
            self.counters = Counters.read(newest.meta)
        print(f"going on from the checkpoint of step {self.step}", flush=True)

    def level(self, group: ProcessGroup) -> None:
        """Bring all workers of the group to the newest state. All of them call this together.

        The newest state is that of the worker with the most steps, or the newest checkpoint if that has more. That worker broadcasts its tensors
        and counters. If there is no state at all, the run begins: the workers measure the model and continue at step 0.

        Example: the workers are at steps 40, 40 and -1, and the checkpoint is of step 30: all continue at 40. A spare comes back alone at step 40,
        and other workers have written a checkpoint of step 55 meanwhile: it continues at 55.

        Raises `RuntimeError` if another worker dies meanwhile.
        """
        self.work.form(group.rank, group.world)
        steps = self._steps(group)
        first = steps.index(max(steps))
        if group.rank == first:
            self.restore()
        shared: list[Any] = [self.counters]
        dist.broadcast_object_list(shared, group=self._peers, group_src=first)
        counters: Counters = shared[0]
        if counters.step < 0:
            self.counters = Counters(0, before=self.work.measure(group.rank, group.world))
        elif min(steps) < counters.step:
            self._receive(counters, first)

    def _steps(self, group: ProcessGroup) -> list[int]:
        """The step of each worker. One whose processes are at different steps has no state."""
        said: list[int] = [-1] * (group.world * group.parts)
        dist.all_gather_object(said, self.step)
        workers = [{*said[first : first + group.parts]} for first in range(0, len(said), group.parts)]
        if len(workers[group.rank]) > 1:
            self.counters = Counters()
        return [steps.pop() if len(steps) == 1 else -1 for steps in workers]

    @property
    def _peers(self) -> Any:
        """The processes that have the same state; None where all of the process group have it."""
        return self.work.parallel and self.work.parallel.peers

    def _receive(self, counters: Counters, first: int) -> None:
        """Broadcast the tensors of rank ``first``. A worker at the same step receives what it has already, so it needs no lock."""
        behind = self.step < counters.step
        with self.lock if behind else contextlib.nullcontext():
            try:
                for tensor in self.tensors(counters.step).values():
                    dist.broadcast(tensor, group=self._peers, group_src=first)
            except RuntimeError:
                if behind:
                    os._exit(1)  # the tensors here are a mixture of the old state and the new one; nobody may use them
                raise
            self.counters = counters
