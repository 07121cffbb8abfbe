"""Slow work that a reconciler needs the result of: it runs in a thread of its own, once per key, while the reconcilers go on.

Example: whether two sets of weights have the same shape takes a download and a look into every file. The fleet's reconciler asks for it,
gets None, and returns; the fleet is reconciled again when the answer is there.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
THREADS = 8


class Background:
    """Used by one thread, the control loop; the work runs in others. ``changed`` is called from those when work has ended."""

    def __init__(self, changed: Callable[[], None], threads: int = THREADS) -> None:
        self.changed = changed
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="background")
        self._running: dict[Hashable, Future[Any]] = {}
        self._latest: dict[Hashable, Any] = {}

    def result(self, key: Hashable, work: Callable[[], Result]) -> Result | None:
        """What ``work`` returned, once; None while it runs. Raises what it raised, once. Asked again afterwards, it runs again."""
        running = self._running.get(key)
        if running is None:
            self._start(key, work)
            return None
        if not running.done():
            return None
        del self._running[key]
        return running.result()

    def latest(self, key: Hashable, work: Callable[[], Result]) -> Result | None:
        """What ``work`` returned the last time; None before that. It runs again with every call, but never twice at a time."""
        found = self.result(key, work)
        if found is not None:
            self._latest[key] = found
            self._start(key, work)
        return self._latest.get(key)

    def forget(self, about: Callable[[Any], bool]) -> None:
        """Drop what `latest` keeps under keys that are ``about`` something."""
        self._latest = {key: found for key, found in self._latest.items() if not about(key)}

    def _start(self, key: Hashable, work: Callable[[], Any]) -> None:
        self._running[key] = future = self.threads.submit(work)
        future.add_done_callback(lambda _: self.changed())
