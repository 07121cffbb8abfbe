"""What a step of a run is, whatever the number of workers: pure.

A step is one global batch, however it is spread. The order of the examples follows from the seed alone, each comes once an epoch, and the
learning rate follows from the number of the step. So workers may come and go between any two steps, and what is learnt stays the same.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """The steps of a run. Everything about a step follows from this and its number."""

    examples: int
    global_batch: int
    epochs: float
    seed: int
    learning_rate: float
    """The peak of the schedule."""
    warmup_fraction: float

    @property
    def steps(self) -> int:
        return math.ceil(self.epochs * math.ceil(self.examples / self.global_batch))

    def rate(self, step: int) -> float:
        """The learning rate of the ``step``-th step from 0: linear warm-up, then a cosine down to nothing."""
        warmup = math.ceil(self.warmup_fraction * self.steps)
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self, first: int = 0) -> Iterator[list[int]]:
        """Each step's examples from the ``first`` step on, each example once an epoch; the last batch of an epoch may be smaller."""
        per_epoch = math.ceil(self.examples / self.global_batch)
        order: list[int] = []
        for step in range(first, self.steps):
            epoch, place = divmod(step, per_epoch)
            if not order or place == 0:
                order = shuffled(self.examples, self.seed, epoch)
            yield order[place * self.global_batch : (place + 1) * self.global_batch]


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: the same on every worker and in every process."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 (an order, no secret)
    return order


def share_out(batch: Sequence[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """One worker's part of a batch, in portions of at most ``micro_batch`` examples."""
    mine = batch[rank::world]
    return [list(mine[at : at + micro_batch]) for at in range(0, len(mine), micro_batch)]
