"""Relays progress from a worker of Ray Train to its driver. Ray Train itself tells a driver nothing before the run ends.

Example: rank 0 tells the board step 12 and then step 13. A second after its last look, the driver's thread sees step 13 and passes it on.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jobs.training.progress import Progress

LOOK_S = 1
"""How often the driver looks at the board."""
ANSWER_S = 5
"""How long the board may take to answer."""


class Board:
    """An actor that holds the newest progress. Rank 0 writes it, and the driver reads it."""

    def __init__(self) -> None:
        self.newest: Progress | None = None

    def tell(self, progress: Progress) -> None:
        self.newest = progress

    def look(self) -> Progress | None:
        return self.newest


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
