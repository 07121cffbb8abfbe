"""The schedule of a run: the examples and the learning rate of each step. Pure.

A step is one global batch, however many workers share it. The seed alone decides the order of the examples. An epoch uses each example once.
The number of a step decides its learning rate. So workers may come and go between two steps, and the run learns the same.

>>> run = Schedule(examples=5, global_batch=2, epochs=1, seed=0, learning_rate=0.1, warmup_fraction=0)
>>> list(run.batches())
[[0, 1], [4, 3], [2]]
>>> list(run.batches(first=2))
[[2]]
"""

import math
import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

Shape = Literal["cosine", "linear", "constant", "wsd"]
"""How the learning rate goes after the warm-up."""
WSD_DECAY = 0.2
"""The part of all steps in which the rate of ``wsd`` falls (Hu et al. 2024, MiniCPM)."""


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
    shape: Shape = "cosine"
    measure_every_steps: int = 0
    """How often the run is measured besides at its start and end; 0 means never."""

    @property
    def steps(self) -> int:
        """Steps of the whole run. Example: 5 examples in batches of 2 are 3 steps per epoch, so 1.5 epochs are 5 steps."""
        return math.ceil(self.epochs * math.ceil(self.examples / self.global_batch))

    def rate(self, step: int) -> float:
        """The learning rate of a step; the first step is 0. It rises linearly, and then:

        - ``cosine`` falls along a cosine to zero (Loshchilov and Hutter 2017)
        - ``linear`` falls in a straight line to zero
        - ``constant`` stays
        - ``wsd`` stays, and falls in a straight line to zero in the last fifth (warm-up, stable, decay)

        Example: of 100 steps with a warm-up of 0.1, step 4 has half of the peak, and step 9 all of it but for the fall until then. Step 50 has
        half of the peak with ``cosine`` and ``linear``, and all of it with ``wsd``; step 90 has half of it with ``wsd``.
        """
        warmup = math.ceil(self.warmup_fraction * self.steps)
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        done = step / self.steps
        falling = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
            "wsd": min(1.0, (1 - done) / WSD_DECAY),
        }
        return self.learning_rate * rising * falling[self.shape]

    def measures_after(self, done: int) -> bool:
        """Whether the run is measured once ``done`` steps are done. The end of the run is no such time: it is measured in any case."""
        return bool(self.measure_every_steps) and done % self.measure_every_steps == 0 and done < self.steps

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
