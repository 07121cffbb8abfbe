"""How far a run is: `Progress` for programs in the driver's process, and one line of text for people.

Speed is measured from the start of the current process group, because it depends on the number of workers:

>>> meter = Meter(group=2, step=50, tokens=8000, began_s=0.0)
>>> meter.progress(step=60, steps=100, loss=1.5, tokens=9000, workers=2, now_s=10.0, ideal_s_per_token=0.005)
Progress(step=60, steps=100, loss=1.5, tokens=9000, tokens_per_s=100.0, eta_s=40.0, workers=2, mfu=0.25, memory_mb=0.0)
"""

import time
from collections.abc import Callable
from typing import NamedTuple

ESTIMATED_STEPS = 5, 10
"""After so many steps of a process group it says how long the run will take, by those between. The first ones are slower than the others."""


class Progress(NamedTuple):
    """A run between two steps. `jobs.training.drivers.driver.fit` passes it to ``watch`` at most once a second."""

    step: int
    """Steps that are done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """The training loss of the last step, in nats per token; NaN before the first step."""
    tokens: int
    """Tokens since the start of the run."""
    tokens_per_s: float
    eta_s: float
    """Seconds until the run's last step, at the current speed."""
    workers: int
    """Workers in the current process group."""
    mfu: float = 0.0
    """The part of the processors' peak that the model uses, see `jobs.training.step.flops`; 0 where nobody knows."""
    memory_mb: float = 0.0
    """The most memory that a worker has taken: of its GPU, or of the machine."""


class Committed(NamedTuple):
    """A checkpoint that is in the store."""

    step: int = -1
    """Steps that are done in it; -1 if there is no checkpoint."""
    seconds: float = 0.0
    """How long it took to write."""
    size_bytes: int = 0
    """The size of its tensors."""


class Meter(NamedTuple):
    """The point from which the speed is measured: the step, the tokens and the time at which a process group began."""

    group: int
    step: int
    tokens: int
    began_s: float

    def progress(
        self,
        step: int,
        steps: int,
        loss: float,
        tokens: int,
        workers: int,
        now_s: float,
        ideal_s_per_token: float = 0.0,
        memory_mb: float = 0.0,
    ) -> Progress:
        elapsed_s = max(now_s - self.began_s, 1e-9)
        eta_s = elapsed_s / max(1, step - self.step) * (steps - step)
        tokens_per_s = (tokens - self.tokens) / elapsed_s
        mfu = tokens_per_s * ideal_s_per_token / max(1, workers)
        return Progress(step, steps, loss, tokens, tokens_per_s, eta_s, workers, mfu, memory_mb)


class ProgressPrinter:
    """Prints ``progress stage=… step=12/100 …`` on rank 0: at most one line per ``every_s`` seconds, but always the first step and the last.

    It also says once how long the run will take, see `left`. Before the first step nobody knows: how much of a processor's peak a run gets depends on
    the model, and on what else the machine does.
    """

    def __init__(
        self,
        stage: str,
        rank: int,
        step: int = 0,
        tokens: int = 0,
        every_s: float = 1.0,
        workers: int = 1,
        tell: Callable[[Progress], object] = lambda progress: None,
    ) -> None:
        """``step`` and ``tokens``: what the run has done already. They do not count for the speed. ``tell`` gets the `Progress` of each line."""
        self.stage, self.workers, self.tell = stage, workers, tell
        self.every_s = every_s
        self.meter = Meter(0, step, tokens, time.monotonic())
        self.printed_s = float("-inf")
        self.estimated_from_s = self.meter.began_s
        self.first = rank == 0

    def __call__(self, step: int, steps: int, loss: float, tokens: int) -> None:
        """Note that ``step`` of ``steps`` is done, with this ``loss`` in nats per token. ``tokens`` counts from the start of the run."""
        now_s, done = time.monotonic(), step - self.meter.step
        if done == ESTIMATED_STEPS[0]:
            self.estimated_from_s = now_s
        if self.first and done == ESTIMATED_STEPS[1] and step < steps:
            print(left(steps - step, (now_s - self.estimated_from_s) / (ESTIMATED_STEPS[1] - ESTIMATED_STEPS[0])), flush=True)
        if self.first and (now_s - self.printed_s >= self.every_s or step == steps):
            self.printed_s = now_s
            at = self.meter.progress(step, steps, loss, tokens, self.workers, now_s)
            print(line(self.stage, at), flush=True)
            self.tell(at)


def left(steps: int, step_s: float) -> str:
    """How long so many steps take, in words.

    >>> left(400, 0.5), left(400, 0.01), left(40000, 0.5)
    ('about 3 min left for 400 steps', 'about 4 s left for 400 steps', 'about 5.6 h left for 40,000 steps')
    """
    seconds = steps * step_s
    words = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"about {words} left for {steps:,} steps"


def line(stage: str, at: Progress) -> str:
    """
    >>> line("finetune", Progress(25, 100, 1.23456, 5000, 500.0, 30.0, workers=2))
    'progress stage=finetune step=25/100 loss=1.2346 tokens_per_s=500 eta_s=30'
    """
    speed = f"tokens_per_s={at.tokens_per_s:.0f} eta_s={at.eta_s:.0f}"
    return f"progress stage={stage} step={at.step}/{at.steps} loss={at.loss:.4f} {speed}"
