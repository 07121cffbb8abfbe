"""How much one gateway holds at a time: requests, bytes of their bodies, and requests that wait for a fleet to wake. No I/O.

Beyond a bound the next request is told at once to come back later. Without bounds ten thousand clients with bodies of 8 MB would end the
gateway, and every stream with it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Overloaded

LATER = "Try again later."


class Budget:
    def __init__(self, max_requests: int, max_bytes: int, max_waiting: int) -> None:
        """``max_waiting``: for each fleet."""
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.max_waiting = max_waiting
        self.requests = 0
        self.bytes = 0
        self.waiting: Counter[str] = Counter()
        """Fleet without a replica → the requests that wait for it."""

    @contextmanager
    def admit(self) -> Iterator["Held"]:
        """Count one request while it is here, and free what it held. Raises `Overloaded`."""
        if self.requests >= self.max_requests:
            raise Overloaded(f"This gateway answers {self.requests} requests already.", LATER)
        self.requests += 1
        held = Held(self)
        try:
            yield held
        finally:
            self.requests -= 1
            self.bytes -= held.bytes

    @contextmanager
    def wait(self, fleet: str) -> Iterator[None]:
        """Count one request that waits for ``fleet`` to wake. Raises `Overloaded`."""
        if self.waiting[fleet] >= self.max_waiting:
            raise Overloaded(f"{self.waiting[fleet]} requests wait for a replica already.", LATER)
        self.waiting[fleet] += 1
        try:
            yield
        finally:
            self.waiting[fleet] -= 1
            if not self.waiting[fleet]:
                del self.waiting[fleet]


class Held:
    """What one request holds of a `Budget`."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.bytes = 0

    def take(self, count: int) -> None:
        """Hold ``count`` more bytes. Raises `Overloaded` where the gateway holds too many; a negative count gives some back."""
        if self.budget.bytes + count > self.budget.max_bytes:
            raise Overloaded(f"This gateway holds {self.budget.bytes >> 20} MiB of requests already.", LATER)
        self.bytes += count
        self.budget.bytes += count
