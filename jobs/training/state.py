"""The state of a run on one worker: tensors in place, counters, and one lock, so that a reader finds both of one moment."""

import contextlib
import os
import threading
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cluster.errors import StoreUnavailable
from jobs.training.checkpoints import Checkpoints, Snapshot
from jobs.training.process_group import ProcessGroup
from jobs.training.work import Work


class Counters(NamedTuple):
    """The state apart from the tensors."""

    step: int = -1
    """Steps that are done; -1 before the worker knows any state."""
    tokens: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    """Spent in steps."""
    before: dict[str, float] = {}  # noqa: RUF012 (never written to)
    """What was measured before the first step."""

    def after(self, tokens: int, loss: float, seconds: float) -> "Counters":
        """One step later."""
        return Counters(self.step + 1, self.tokens + tokens, loss, self.seconds + seconds, self.before)


class State:
    """``work``'s parameters and optimizer, with their counters."""

    def __init__(self, work: Work, checkpoints: Checkpoints) -> None:
        self.work, self.checkpoints = work, checkpoints
        self.counters = Counters()
        self.lock = threading.Lock()
        """Held while the state changes."""

    @property
    def step(self) -> int:
        return self.counters.step

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The parameters and AdamW's moments, in place. Moments that do not exist yet are made."""
        named: dict[str, torch.Tensor] = {}
        for number, parameter in enumerate(self.work.trained):
            moments = self.work.optimizer.state[parameter]
            if not moments:
                moments |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.tensor(float(step))
            named |= {f"{number}": parameter.data, f"{number}.exp_avg": moments["exp_avg"]}
            named[f"{number}.exp_avg_sq"] = moments["exp_avg_sq"]
        return named

    def snapshot(self) -> Snapshot:
        """A copy on the host. The caller holds the lock, or is the thread that trains."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors(self.step).items()}
        return Snapshot(self.step, self.counters._asdict(), tensors)

    def restore(self) -> None:
        """Take over the newest checkpoint, where it is newer than this state."""
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
            self.counters = Counters(**newest.meta)
        print(f"going on from the checkpoint of step {self.step}", flush=True)

    def level(self, group: ProcessGroup) -> None:
        """Bring all workers of the group to the newest state: that of the worker with the most steps, or the newest checkpoint if that is newer.

        Example: workers at steps 40, 40 and -1 and a checkpoint of step 30 all continue at 40. A spare at step 40 that comes back alone to a
        checkpoint of step 55, which others wrote meanwhile, continues at 55.
        """
        steps: list[int] = [-1] * group.world
        dist.all_gather_object(steps, self.step)
        first = steps.index(max(steps))
        if group.rank == first:
            self.restore()
        shared: list[Any] = [self.counters]
        dist.broadcast_object_list(shared, first)
        counters: Counters = shared[0]
        if counters.step < 0:
            self.counters = Counters(0, before=self.work.measure(group.rank, group.world))
        elif min(steps) < counters.step:
            self._receive(counters, first)

    def _receive(self, counters: Counters, first: int) -> None:
        """Make everybody's tensors those of rank ``first``. A worker at the same step gets what it has, so it need not lock out its readers."""
        behind = self.step < counters.step
        with self.lock if behind else contextlib.nullcontext():
            try:
                for tensor in self.tensors(counters.step).values():
                    dist.broadcast(tensor, first)
            except RuntimeError:
                if behind:
                    os._exit(1)  # the tensors here are neither of the old state nor of the new one, and must count as neither
                raise
            self.counters = counters
