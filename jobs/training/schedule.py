"""The schedule of a run: the examples and the learning rate of each step. Pure.

A step is one global batch, however many workers share it. The seed alone decides the order of the examples. An epoch uses each example once.
The number of a step decides its learning rate. So workers may come and go between two steps, and the run learns the same.

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
    """What determines every step of a run, together with the step's number."""

    examples: int
    """The number of training examples."""
    global_batch: int
    """Examples per step, over all workers."""
    epochs: float
    seed: int
    learning_rate: float
    """The peak, which the warm-up leads to."""
    warmup_fraction: float
    """The part of all steps, 0 to 1, in which the learning rate rises."""

    @property
    def steps(self) -> int:
        """Steps of the whole run. Example: 5 examples in batches of 2 are 3 steps per epoch, so 1.5 epochs are 5 steps."""
        return math.ceil(self.epochs * math.ceil(self.examples / self.global_batch))

    def rate(self, step: int) -> float:
        """The learning rate of a step; the first step is 0. It rises linearly, then falls along a cosine to zero (Loshchilov and Hutter 2017).

        Example: of 100 steps with a warm-up of 0.1, step 4 has about half of the peak, step 9 about all of it, and step 50 half of it.
        """
        warmup = math.ceil(self.warmup_fraction * self.steps)
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self, first: int = 0) -> Iterator[list[int]]:
        """Yield the indices of each step's examples, from the step ``first`` on. The last batch of an epoch may be smaller than the others."""
        per_epoch = math.ceil(self.examples / self.global_batch)
        order: list[int] = []
        for step in range(first, self.steps):
            epoch, at = divmod(step, per_epoch)
            if not order or at == 0:  # a resumed run may begin in the middle of an epoch
                order = shuffled(self.examples, self.seed, epoch)
            yield order[at * self.global_batch : (at + 1) * self.global_batch]


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The indices below ``count`` in the order of an epoch, the same in every process."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 (an order, no secret)
    return order


def share_out(batch: Sequence[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """One worker's part of a batch, in micro-batches of at most ``micro_batch`` examples.

    Example: of the batch [0, 1, 4, 3, 2], rank 0 of 2 has [0, 4, 2]; in micro-batches of 2 that is [[0, 4], [2]].
    """
    mine = batch[rank::world]
    return [list(mine[at : at + micro_batch]) for at in range(0, len(mine), micro_batch)]
