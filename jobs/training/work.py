"""The interface of what a run trains (`Work`), and one training step on one worker of a process group.

A step is `gather`, then `update`. Every worker computes the gradients of its part of the batch. An all-reduce sums the parts, so all workers
have the same gradients and make the same update.
"""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from jobs.training.schedule import Schedule


class Work(Protocol):
    """What a run trains. Every worker makes its own from the run's settings. That takes long, because it reads the model."""

    schedule: Schedule
    trained: list[torch.nn.Parameter]
    """The parameters that the run trains, in the same order on every worker."""
    optimizer: torch.optim.AdamW
    """The optimizer of exactly these parameters."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients of `trained`.

        ``batch``: indices of the whole batch's examples, the same on every worker. Returns this worker's part of the loss, a tensor of shape ()
        in nats per token, and the number of tokens of the whole batch. The parts of all workers add up to the batch's loss.
        """
        ...

    def measure(self, rank: int, world: int) -> dict[str, float]:
        """Measurements of the model as it is now, by name. All workers of the process group call this together."""
        ...

    def save(self, target: Path) -> None:
        """Write the result's files to the folder ``target``."""
        ...


def gather(
    work: Work, batch: list[int], rank: int, world: int, told: Callable[[], bool] = lambda: False
) -> tuple[float, int, bool]:
    """Compute the gradients of one global batch, the same on every worker. All workers of the group call this together.

    Returns the batch's loss in nats per token, its number of tokens, and whether any worker was told to stop. The stop flags travel in the same
    all-reduce as the gradients, so all workers learn of a stop in the same step. ``told``: whether this worker was told. It is called after the
    gradients, which take most of a step's time, so a stop takes effect in this step and not in the next.

    Example: of three workers one was told to stop. The sum of the flags is 1 on all three, and all three stop after this step.

    Raises `RuntimeError` if another worker dies meanwhile. The parameters are unchanged then.
    """
    loss, tokens = work.gradients(batch, rank, world)
    gradients = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in work.trained]
    flat = torch.cat([*gradients, torch.stack([loss, loss.new_tensor(float(told()))]).to(gradients[0])])
    dist.all_reduce(flat)
    *gradients, rest = flat.split([*(p.numel() for p in work.trained), 2])
    for parameter, gradient in zip(work.trained, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    return rest[0].item(), tokens, rest[1].item() > 0


def update(work: Work, step: int) -> None:
    """Make the optimizer's step with the gathered gradients, and clear them. ``step`` sets the learning rate.

    The gradients are clipped to a norm of 1 (Pascanu et al. 2013). Example: with a norm of 4, every gradient is divided by 4.
    """
    for group in work.optimizer.param_groups:
        group["lr"] = work.schedule.rate(step)
    torch.nn.utils.clip_grad_norm_(work.trained, 1.0)
    try:
        work.optimizer.step()
    except RuntimeError:  # out of memory: nobody may use parameters of which only some are updated
        traceback.print_exc()
        os._exit(1)
    work.optimizer.zero_grad()
