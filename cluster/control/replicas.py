"""Control's side of the replicas: their states as last heard, and what they were asked to load or to become."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from cluster import logs
from cluster.control.broadcast import broadcast
from cluster.control.weight_distribution import Carried
from cluster.types import ReplicaState

DESCRIBE_TIMEOUT_S = 2
LOAD_TIMEOUT_S = 600
"""How long a replica may take to load a version, or to become one."""
FORGET_S = 5
GONE_S = 3_600
"""A replica that said that it ends answers no more after this long: Serve waits for its streams for a part of that at most."""
OBSERVE_S = 0.4
THREADS = 8

log = logs.logger(__name__)


class Replicas:
    """The replicas of the fleet's applications. Loading may take minutes, so it is asked for and heard of later; ``changed`` is called then."""

    def __init__(self, app: str, changed: Callable[[], None]) -> None:
        self.apps: tuple[str, ...] = (app,)
        self.changed = changed
        self.observed_s = 0.0
        self.lock = Lock()
        self.seen: dict[str, tuple[ReplicaState, float]] = {}
        self.leaving: dict[str, float] = {}
        """Those that said that they end, and when: nobody shall be sent to them, whatever they still answer."""
        self.asked: dict[str, Future[None]] = {}
        """What was asked for and whether it was answered: `_ask`'s key."""
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ask-replicas")

    def observe(self, fresh: bool = False) -> tuple[ReplicaState, ...]:
        """The replicas heard lately. Silence for less than `FORGET_S` is no death: the machine may be busy, and gateways avoid a replica
        that breaks a connection by themselves. Asked again only after `OBSERVE_S`, unless it must be ``fresh``: what they were ordered to do
        they report unasked."""
        now_s = time.monotonic()
        if now_s - self.observed_s < OBSERVE_S and not fresh:
            return self.states
        for app in self.apps:
            self._hear(broadcast(app, "describe", timeout_s=DESCRIBE_TIMEOUT_S))
        self.observed_s = now_s = time.monotonic()
        with self.lock:
            self.seen = {id: (state, at_s) for id, (state, at_s) in self.seen.items() if now_s - at_s < FORGET_S}
        return self.states

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        return tuple(sorted(state for state, _ in self.seen.values()))

    def hold(self, ids: list[str], carried: Callable[[], Carried] = dict, missing: bool = True) -> bool:
        """Ask every replica to load these versions, or to lay them ready; True once they have answered since this was first asked.

        Asked again afterwards, it is asked anew, unless nothing is ``missing``. ``carried`` is called where they are asked, for what
        travels with the order.
        """
        key = f"hold {ids}"
        return (not missing and key not in self.asked) or self._ask(key, lambda: ("hold", ids, carried()))

    def forget(self, id: str) -> None:
        """What was answered about a version and never looked at is about an earlier rollout of it."""
        self.asked = {key: asked for key, asked in self.asked.items() if not (asked.done() and id in key)}

    def leave(self, replica: str) -> None:
        """It ends."""
        with self.lock:
            now_s = time.monotonic()
            self.leaving = {id: at_s for id, at_s in self.leaving.items() if now_s - at_s < GONE_S} | {replica: now_s}
            self.seen = {id: known for id, known in self.seen.items() if id != replica}
        self.changed()

    def become(self, replica: str, id: str, fingerprint: str, hurry: bool) -> bool:
        """Ask one replica to host other weights; True once it has answered. Its state says whether it worked."""
        return self._ask(f"{replica} become {id}", lambda: ("become", replica, id, fingerprint, hurry))

    def becoming(self, replica: str, id: str) -> bool:
        """Whether it was asked to become that and has not answered yet."""
        asked = self.asked.get(f"{replica} become {id}")
        return asked is not None and not asked.done()

    def _ask(self, key: str, order: Callable[[], tuple[Any, ...]]) -> bool:
        asked = self.asked.get(key)
        if asked is None:
            self.asked[key] = self.threads.submit(self._call, order)
            return False
        if not asked.done():
            return False
        del self.asked[key]
        return asked.exception() is None

    def _call(self, order: Callable[[], tuple[Any, ...]]) -> None:
        try:
            method, *arguments = order()
            for app in self.apps:
                self._hear(broadcast(app, method, *arguments, timeout_s=LOAD_TIMEOUT_S))
        finally:
            self.changed()

    def _hear(self, answers: list[Any]) -> None:
        now_s = time.monotonic()
        for answer in answers:
            if isinstance(answer, ReplicaState):
                with self.lock:
                    if answer.id in self.leaving:
                        continue
                    known = self.seen.get(answer.id, (answer, now_s))[0]
                    self.seen = {**self.seen, answer.id: (known if known.revision > answer.revision else answer, now_s)}
            elif isinstance(answer, Exception):
                log.warning("a replica: %s", answer)
