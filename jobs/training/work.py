"""The interface of what a run trains (`Work`), and one training step on one worker of a process group.

A step is `gather`, then `update`. Every worker computes the gradients of its part of the batch. An all-reduce sums the parts, so all workers
have the same gradients and make the same update.
"""

import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from jobs.training.schedule import Schedule
from jobs.training.sharding.parts import Parts
from jobs.training.sharding.sharded import Sharded

HELD_OUT = "eval_loss"
"""What every `Work` measures: its own loss on held-out data, in nats per token where it learns tokens. It decides which weights are the best."""
CLIPPED_NORM = 1.0
WORSE = 2.0
"""A model may know nothing of a new text, and be sure of it: its first loss is above any fixed bound. So a run that diverges has doubled it."""


class Trained(Protocol):
    """The parameters that a run trains, with their gradients and the optimizer's moments: whole ones (`FlatParameters`) or this worker's slices
    (`SlicedParameters`)."""

    optimizer: torch.optim.AdamW

    @property
    def untouched(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    def tensors(self, step: int) -> dict[str, torch.Tensor]: ...
    def exchange(self, messages: torch.Tensor) -> tuple[list[float], float]: ...
    def scale(self, factor: float) -> None: ...
    def clear(self) -> None: ...


class Work(Protocol):
    """What a run trains. Every worker makes its own from the run's settings. That takes long, because it reads the model."""

    schedule: Schedule
    device: torch.device
    hopeless: float
    """A loss above this means that the run has diverged; also above `WORSE` times the loss that it began with."""
    ideal_s_per_token: float
    """Seconds that a token takes one worker at its processor's peak; 0 where nobody knows."""

    @property
    def flat(self) -> Trained:
        """What the run trains."""
        ...

    @property
    def slices(self) -> Sharded | None:
        """The model, if each worker has only its slices of what is trained."""
        ...

    @property
    def parallel(self) -> Parts | None:
        """The part of the model that this process has, if a worker has several processes."""
        ...

    def form(self, rank: int, world: int) -> None:
        """Prepare for a process group, which this process has joined. All workers of it call this together, before anything else."""
        ...

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients.

        ``batch``: indices of the whole batch's examples, the same on every worker. Returns this worker's part of the loss, a tensor of shape ()
        and the number of tokens of the whole batch. The parts of all workers add up to the batch's loss.
        """
        ...

    def measure(self, rank: int, world: int) -> dict[str, float]:
        """Measurements of the model as it is now, by name, `HELD_OUT` among them. All workers of the process group call this together."""
        ...

    def save(self, target: Path) -> None:
        """Write the result's files to the folder ``target``. Only rank 0 is asked."""
        ...


@runtime_checkable
class Awaits(Protocol):
    """What a `Work` has beside, whose data may not be there when a step could begin."""

    def ready(self, rank: int) -> bool:
        """Whether this worker has the data of the next step. Called again and again, between two steps, until it is true on all workers."""
        ...


class Asked(NamedTuple):
    """What one worker asks of all at the end of a step."""

    stop: bool = False
    """It was told to stop."""
    checkpoint: bool = False
    """The last checkpoint is long ago."""


class Gathered(NamedTuple):
    """A global batch, the same on every worker."""

    loss: float
    """In nats per token where the run learns tokens."""
    tokens: int
    stops: bool
    """Whether any worker was told to stop."""
    due: bool
    """Whether a checkpoint is due."""
    norm: float
    """The length of the gradient."""


class Agreed(NamedTuple):
    """The same on every worker."""

    ready: bool
    """Whether all workers have the data of the next step."""
    stops: bool
    """Whether any worker was told to stop."""


def agree(ready: bool, told: bool, device: torch.device) -> Agreed:
    """Tell the other workers of the process group how this one is. All of them call this together.

    Raises `RuntimeError` if another worker dies meanwhile.
    """
    flags = torch.tensor([not ready, told], dtype=torch.float32, device=device)
    dist.all_reduce(flags)
    waiting, stops = flags.tolist()
    return Agreed(not waiting, stops > 0)


def gather(work: Work, batch: list[int], rank: int, world: int, asked: Callable[[], Asked] = Asked) -> Gathered:
    """Compute the gradients of one global batch, the same on every worker. All workers of the group call this together.

    What the workers ask for travels in the same all-reduce as the gradients, so all of them learn of it in the same step. ``asked``: what this
    worker asks. It is called after the gradients, which take most of a step's time, so a stop takes effect in this step and not in the next.

    Example: of three workers one was told to stop. The sum of the flags is 1 on all three, and all three stop after this step.

    Raises `RuntimeError` if another worker dies meanwhile. The parameters are unchanged then.
    """
    loss, tokens = work.gradients(batch, rank, world)
    (whole, stops, due), norm = work.flat.exchange(torch.stack([loss, *loss.new_tensor(asked())]))
    return Gathered(whole, tokens, stops > 0, due > 0, norm)


def divergence(found: Gathered, hopeless: float, began: float) -> str:
    """Why the run has to stop before this step's update; empty if it goes on. All workers find the same.

    ``hopeless``: see `Work`. ``began``: the held-out loss before the first step.

    >>> divergence(Gathered(1.0, 10, False, False, float("inf")), hopeless=20.0, began=3.0)
    'the gradient is not finite'
    >>> [divergence(Gathered(25.0, 10, False, False, 1.0), hopeless=20.0, began=began) for began in (18.0, 3.0)]
    ['', 'the loss has risen to 25.0']
    """
    if not math.isfinite(found.loss):
        return f"the loss is {found.loss}"
    if not math.isfinite(found.norm):
        return "the gradient is not finite"
    return f"the loss has risen to {found.loss:.1f}" if found.loss > max(hopeless, WORSE * began) else ""


def update(work: Work, step: int, norm: float) -> None:
    """Make the optimizer's step with the gathered gradients, and clear them. ``step`` sets the learning rate.

    ``norm``: the gradients' length. They are clipped to 1 (Pascanu et al. 2013). Example: with a norm of 4, every gradient is divided by 4.
    """
    flat = work.flat
    for group in flat.optimizer.param_groups:
        group["lr"] = work.schedule.rate(step)
    if norm > CLIPPED_NORM:
        flat.scale(CLIPPED_NORM / norm)
    try:
        flat.optimizer.step()
    except RuntimeError:  # out of memory: nobody may use parameters of which only some are updated
        traceback.print_exc()
        os._exit(1)
    flat.clear()
