"""The training state of a run on one worker: the parameters, the optimizer's moments, and counters.

The training thread changes the tensors in place. One lock guards tensors and counters together, so whoever copies them gets both of the same
step.
"""

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

    def after(self, tokens: int, loss: float, seconds: float) -> "Counters":
        """The counters after one more step, which had so many ``tokens`` and took so many ``seconds``."""
        return Counters(self.step + 1, self.tokens + tokens, loss, self.seconds + seconds, self.before)


class State:
    """The parameters and the optimizer of a `Work`, with their counters."""

    def __init__(self, work: Work, checkpoints: Checkpoints) -> None:
        self.work, self.checkpoints = work, checkpoints
        self.counters = Counters()
        self.lock = threading.Lock()
        """Held while the state changes."""

    @property
    def step(self) -> int:
        return self.counters.step

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The parameters and AdamW's two moments themselves, not copies. Missing moments are created as zeros.

        ``step`` becomes the optimizer's step count, which corrects the bias of the moments. The keys number the parameters in their order:
        ``"0"``, ``"0.exp_avg"``, ``"0.exp_avg_sq"``, ``"1"``, … Each tensor has the shape of its parameter.
        """
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
        """A copy of the state in the host's memory. Only the training thread may call this without holding the lock."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors(self.step).items()}
        return Snapshot(self.step, self.counters._asdict(), tensors)

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
            self.counters = Counters(**newest.meta)
        print(f"going on from the checkpoint of step {self.step}", flush=True)

    def level(self, group: ProcessGroup) -> None:
        """Bring all workers of the group to the newest state. All of them call this together.

        The newest state is that of the worker with the most steps, or the newest checkpoint if that has more. That worker broadcasts its tensors
        and counters. If there is no state at all, the run begins: the workers measure the model and continue at step 0.

        Example: the workers are at steps 40, 40 and -1, and the checkpoint is of step 30: all continue at 40. A spare comes back alone at step 40,
        and other workers have written a checkpoint of step 55 meanwhile: it continues at 55.

        Raises `RuntimeError` if another worker dies meanwhile.
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
        """Broadcast the tensors of rank ``first``. A worker at the same step receives what it has already, so it needs no lock."""
        behind = self.step < counters.step
        with self.lock if behind else contextlib.nullcontext():
            try:
                for tensor in self.tensors(counters.step).values():
                    dist.broadcast(tensor, first)
            except RuntimeError:
                if behind:
                    os._exit(1)  # the tensors here are a mixture of the old state and the new one; nobody may use them
                raise
            self.counters = counters
