"""What a run trains (`Work`), and one step of it on one worker of a process group."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from jobs.training.schedule import Schedule


class Work(Protocol):
    """What a run trains. Every worker makes it from the run's settings. That takes long, because it reads the model."""

    schedule: Schedule
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.AdamW

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part to the gradients. Returns its part of the loss, and the tokens of the whole batch."""
        ...

    def measure(self, rank: int, world: int) -> dict[str, float]:
        """How good the model is now. All workers of the process group call it together."""
        ...

    def save(self, target: Path) -> None:
        """Write the result's files."""
        ...


def gather(
    work: Work, batch: list[int], rank: int, world: int, told: Callable[[], bool] = lambda: False
) -> tuple[float, int, bool]:
    """Compute the gradients of one global batch, the same on every worker. Returns its loss, its tokens, and whether any worker was told to stop.

    ``told`` is asked after the gradients, which take most of the time: so the group stops at the end of this step, and not of the next.
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
    """The optimizer's step, with the gradients that were gathered."""
    for group in work.optimizer.param_groups:
        group["lr"] = work.schedule.rate(step)
    torch.nn.utils.clip_grad_norm_(work.trained, 1.0)
    try:
        work.optimizer.step()
    except RuntimeError:  # out of memory: a half-done update must count neither as a step nor as none
        traceback.print_exc()
        os._exit(1)
    work.optimizer.zero_grad()
