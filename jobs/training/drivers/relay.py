"""Relays progress from a worker of Ray Train to its driver, and orders back. Ray Train itself tells a driver nothing before the run ends.

Example: rank 0 tells the board step 12 and then step 13. A second after its last look, the driver's thread sees step 13 and passes it on.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs.training.progress import Progress

LOOK_S = 1
"""How often the driver looks at the board."""
ANSWER_S = 5
"""How long the board may take to answer."""


class Board:
    """An actor between rank 0, which tells how far the run is, and the driver, which looks and may order a stop.

    >>> board = Board()
    >>> board.begin(), board.tell("step 12"), board.look()
    (1, None, 'step 12')
    >>> board.stop(within_s=60.0)
    >>> 59 < board.tell("step 13") <= 60, board.begin()
    (True, 0)
    """

    def __init__(self, group: int = 0) -> None:
        """``group``: the number of the newest process group before this board."""
        self.group = group
        self.newest: Any = None
        self.stop_s: float | None = None

    def begin(self) -> int:
        """The number of the process group that begins now; 0 where none may begin any more."""
        self.group += self.stop_s is None
        return self.group if self.stop_s is None else 0

    def tell(self, newest: Any) -> float | None:
        """Note how far the run is. Returns the seconds that the workers have left to stop; None where nobody told them to."""
        self.newest = newest
        return None if self.stop_s is None else self.stop_s - time.monotonic()

    def look(self) -> Any:
        """What rank 0 told last; None before that."""
        return self.newest

    def stop(self, within_s: float) -> None:
        """Order the workers to stop after the step under way. Of several orders the strictest counts."""
        self.stop_s = min(self.stop_s or math.inf, time.monotonic() + within_s)


@contextlib.contextmanager
def relayed(watch: Callable[[Progress], None]) -> Iterator[Callable[[Progress], object]]:
    """A function that workers call with their progress. ``watch`` gets the newest progress in this process, at most once per `LOOK_S` seconds.

    At the end of the block ``watch`` gets the last progress once more. If Ray fails meanwhile, ``watch`` hears nothing, and the block goes on.
    """
    import ray  # after `jobs.reach`

    board: Any = ray.remote(Board).options(num_cpus=0).remote()
    done = threading.Event()

    def look() -> None:
        seen: Progress | None = None
        while not done.wait(LOOK_S):
            # The board or Ray may be gone. The job ends then too, and says why; progress must not hide the reason.
            with contextlib.suppress(Exception):
                newest: Any = ray.get(board.look.remote(), timeout=ANSWER_S)
                if newest is not None and newest != seen:
                    watch(newest)
                    seen = newest

    threading.Thread(target=look, name="relay", daemon=True).start()
    try:
        yield lambda progress: board.tell.remote(progress)
    finally:
        done.set()
        with contextlib.suppress(Exception):  # as above
            last: Any = ray.get(board.look.remote(), timeout=LOOK_S)
            if last is not None:
                watch(last)
            ray.kill(board)
