"""Who gets a processor first where there are too few: engines, then what carries requests to them, then training.

On an accelerator's host too an engine's own thread decides when the next step begins, and everything else can wait some milliseconds.
Processes may only lower themselves, so engines stay where they were started and the others step back.
"""

import gc
import os

CARRYING, TRAINING = 5, 10
"""Niceness, as in ``nice(1)``; an engine has 0."""


def renice(niceness: int) -> None:
    """Lower this process, and those it starts from now on, to ``niceness``, unless it is that low already."""
    os.nice(max(0, niceness - os.nice(0)))


def freeze_gc() -> None:
    """Take what a process has loaded out of the collector's sight, once it is ready.

    While anything on the pool waits for a resource, Ray has every process collect its garbage, every 10 s (its ``local_gc_min_interval_s``).
    With vLLM loaded that takes half a second of a core each time, in which nothing is answered.
    """
    gc.collect()
    gc.freeze()
