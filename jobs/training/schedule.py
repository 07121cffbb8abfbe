"""What each step of a run does, whatever the number of workers: pure.

A step is one global batch, however many workers share it. The seed alone gives the order of the examples, an epoch uses each example once,
and the number of a step gives its learning rate. So workers may come and go between any two steps, and the run learns the same.

>>> run = Schedule(examples=5, global_batch=2, epochs=1, seed=0, learning_rate=0.1, warmup_fraction=0)
>>> list(run.batches())
[[0, 1], [4, 3], [2]]
>>> list(run.batches(first=2)), share_out([0, 1, 4, 3], rank=1, world=2, micro_batch=1)
([[2]], [[1], [3]])
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Schedule(NamedTuple):
    """The steps of a run. A step follows from this and its number."""

    examples: int
    global_batch: int
    epochs: float
    seed: int
    learning_rate: float
    """The peak."""
    warmup_fraction: float

    @property
    def steps(self) -> int:
        return math.ceil(self.epochs * math.ceil(self.examples / self.global_batch))

    def rate(self, step: int) -> float:
        """The learning rate of the ``step``-th step from 0: a linear warm-up, then a cosine down to zero."""
        warmup = math.ceil(self.warmup_fraction * self.steps)
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self, first: int = 0) -> Iterator[list[int]]:
        """The examples of each step from the ``first`` step on. An epoch uses each example once, so its last batch may be smaller."""
        per_epoch = math.ceil(self.examples / self.global_batch)
        order: list[int] = []
        for step in range(first, self.steps):
            epoch, at = divmod(step, per_epoch)
            if not order or at == 0:  # a run that is resumed begins in the middle of an epoch
                order = shuffled(self.examples, self.seed, epoch)
            yield order[at * self.global_batch : (at + 1) * self.global_batch]


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: the same on every worker and in every process."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 (an order, no secret)
    return order


def share_out(batch: Sequence[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """One worker's part of a batch, in portions of at most ``micro_batch`` examples."""
    mine = batch[rank::world]
    return [list(mine[at : at + micro_batch]) for at in range(0, len(mine), micro_batch)]
