"""The control loop: one thread that reconciles whatever key is due, and carries out what other threads ask for between two keys.

All of control's state about aliases and fleets belongs to this thread, so it needs no lock, and no store is read while one is held.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from cluster import logs
from cluster.control.work_queue import Key, WorkQueue
from cluster.errors import PoolUnavailable
from cluster.redact import redact

Result = TypeVar("Result")
CALL_TIMEOUT_S = 60
IDLE_S = 5.0

log = logs.logger(__name__)


class Loop:
    """``reconcile(key)`` returns after how many seconds the key is due again, or None where its object is no more."""

    def __init__(self, reconcile: Callable[[Key], float | None]) -> None:
        self.reconcile = reconcile
        self.queue = WorkQueue()
        self.turned = threading.Condition()
        """Notified after every turn; for threads that wait for what a turn may bring."""
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._wake = threading.Event()
        self._stopped = False

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="control-loop").start()

    def stop(self) -> None:
        """End after this turn."""
        self._stopped = True
        self._wake.set()

    # from any thread

    def add(self, *keys: Key) -> None:
        """Something happened that concerns these keys."""
        self.post(lambda: self._add(keys))

    def retry(self, key: Key) -> None:
        """An operator did something about this key: it is reconciled now even if it backs off."""
        self.post(lambda: self.queue.retry(key, time.monotonic()))

    def call(self, work: Callable[[], Result], timeout_s: float = CALL_TIMEOUT_S) -> Result:
        """Run ``work`` in the loop's thread, between two keys. Returns what it returns and raises what it raises. Work that has not begun
        within ``timeout_s`` is never done: whoever heard that control was busy may ask again."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 (it belongs to whoever asked; the loop goes on)
                future.set_exception(error)

        self.post(run)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.cancel():
                raise PoolUnavailable(
                    f"Control was busy for more than {timeout_s} s.", "Try again; `springtide status` shows why."
                ) from None
            if not future.done():
                raise PoolUnavailable(
                    f"Control began this and did not end it within {timeout_s} s.",
                    "It may still take effect: look at `springtide status` before you try again.",
                ) from None
            return future.result()  # it ended at the last moment, or the work itself raised this

    def wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait in the caller's thread until ``done()`` holds after some turn. ``done`` must not block: the loop waits for it."""
        with self.turned:
            return self.turned.wait_for(done, timeout_s)

    def post(self, work: Callable[[], object]) -> None:
        """Run ``work`` in the loop's thread as soon as it is between two keys. It must not raise."""
        self._calls.put(work)
        self._wake.set()

    # the loop's thread

    def _add(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            self.queue.add(key, time.monotonic())

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            self._turn()
            with self.turned:
                self.turned.notify_all()
            due_s = self.queue.next_s()
            self._wake.wait(IDLE_S if due_s is None else max(0.0, due_s - time.monotonic()))

    def _turn(self) -> None:
        """Every key that is due now, once: what becomes due meanwhile waits for the next turn, so that waiters are told in between."""
        began_s = time.monotonic()
        self._carry_out_calls()
        while (key := self.queue.take(began_s)) is not None:
            self._reconcile(key)
            self._carry_out_calls()

    def _carry_out_calls(self) -> None:
        while True:
            try:
                work = self._calls.get_nowait()
            except Empty:
                return
            work()

    def _reconcile(self, key: Key) -> None:
        try:
            after_s = self.reconcile(key)
        except Exception as error:
            # Whatever stopped this key (store away, a damaged record, Serve that is still starting), the others must go on: a thread
            # that ended would leave an actor that looks alive and converges nothing.
            failure = self.queue.failed(key, redact(f"{type(error).__name__}: {error}"), time.monotonic())
            log.warning("%s %s: %s", *key, failure.words, exc_info=failure.times == 1)
            return
        if after_s is None:
            self.queue.drop(key)
        else:
            self.queue.done(key, time.monotonic() + after_s)
