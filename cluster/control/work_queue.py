"""Which objects control reconciles next: a queue of keys with a back-off per key. Pure: the caller passes the time in.

The queue works as the one of Kubernetes' controllers does (``k8s.io/client-go/util/workqueue``, used by controller-runtime). A key names
an object, never an event, so a hundred events about one object are one entry. Reconciling is level-triggered: the reconciler looks at the
whole object and needs no event. A key that fails waits 0.5 s, then 1 s, 2 s, … up to a minute, and no other key waits with it.

Example: the record of alias ``a`` is damaged. ``("alias", "a")`` fails and is tried again at 0.5 s, 1.5 s, 3.5 s, …; ``("alias", "b")``
is reconciled every half second throughout. When the record is repaired, the next try succeeds and ``a`` has its old pace again.
"""

import heapq
from typing import NamedTuple

Key = tuple[str, str]
"""(kind of object, its name): ``("alias", "seedling")``, ``("fleet", "seedling")``"""

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 60.0


class Failure(NamedTuple):
    """Why a key backs off."""

    words: str
    times: int
    """Failures since the last success."""
    retry_s: float
    """When the key is tried again, by the caller's clock."""


class WorkQueue:
    """A set of keys, each with the time at which it is due."""

    def __init__(self) -> None:
        self.failures: dict[Key, Failure] = {}
        """The keys that back off."""
        self._due_s: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        """Every time that a key was ever given; those that `_due_s` does not confirm are out of date and are skipped."""
        self._running: set[Key] = set()
        self._again_s: dict[Key, float] = {}
        """Keys that were added while they were being reconciled: what was looked at may be old already."""

    def __contains__(self, key: Key) -> bool:
        return key in self._due_s or key in self._running

    def add(self, key: Key, due_s: float) -> None:
        """Reconcile ``key`` at ``due_s``, or earlier if that is planned. A key that backs off keeps its time: an object that fails and is
        mentioned by many events would cost a try for each of them."""
        if key in self.failures and key not in self._running:
            return
        if key in self._running:
            self._again_s[key] = min(self._again_s.get(key, due_s), due_s)
        elif due_s < self._due_s.get(key, float("inf")):
            self._plan(key, due_s)

    def retry(self, key: Key, now_s: float) -> None:
        """Reconcile ``key`` now although it backs off: an operator has just done something about it."""
        self.failures.pop(key, None)
        self.add(key, now_s)

    def take(self, now_s: float) -> Key | None:
        """The key that has been due for the longest; None where none is due. Nobody else gets it until `done`, `failed` or `drop`."""
        due_s = self.next_s()
        if due_s is None or due_s > now_s:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due_s[key]
        self._running.add(key)
        return key

    def done(self, key: Key, next_s: float) -> None:
        """``key`` was reconciled. It is due again at ``next_s``, or earlier if it was added meanwhile."""
        self.failures.pop(key, None)
        self._running.discard(key)
        self._plan(key, min(next_s, self._again_s.pop(key, next_s)))

    def failed(self, key: Key, words: str, now_s: float) -> Failure:
        """``key`` could not be reconciled; it waits twice as long as the last time."""
        times = self.failures[key].times + 1 if key in self.failures else 1
        failure = Failure(words, times, now_s + min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(times - 1, 30)))
        self.failures[key] = failure
        self._running.discard(key)
        self._again_s.pop(key, None)
        self._plan(key, failure.retry_s)
        return failure

    def drop(self, key: Key) -> None:
        """The object is no more."""
        self.failures.pop(key, None)
        self._running.discard(key)
        self._again_s.pop(key, None)
        self._due_s.pop(key, None)

    def next_s(self) -> float | None:
        """When the next key is due; None for an empty queue."""
        while self._heap and self._due_s.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _plan(self, key: Key, due_s: float) -> None:
        self._due_s[key] = due_s
        heapq.heappush(self._heap, (due_s, key))
