"""How a worker of Ray Train tells its driver how far it is: Ray Train itself tells a driver nothing before the end."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jobs.training.progress import Progress

LOOK_S = 1
ANSWER_S = 5


class Board:
    """An actor that holds the newest progress: rank 0 writes, the driver reads."""

    def __init__(self) -> None:
        self.newest: Progress | None = None

    def tell(self, progress: Progress) -> None:
        self.newest = progress

    def look(self) -> Progress | None:
        return self.newest


@contextlib.contextmanager
def relayed(watch: Callable[[Progress], None]) -> Iterator[Callable[[Progress], object]]:
    """Something to call on a worker, and ``watch`` hears it in this process, at most once every `LOOK_S`."""
    import ray  # after `jobs.reach`

    board: Any = ray.remote(Board).options(num_cpus=0).remote()
    done = threading.Event()

    def look() -> None:
        seen: Progress | None = None
        while not done.wait(LOOK_S):
            # The board, or Ray, may be gone: then the job ends too, and says why.
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
