"""Control's side of the replicas: what each last said of itself, and what the replicas of a fleet were ordered to do.

Replicas report by themselves, as a Kubernetes node does: at once when they hold something else, and every second otherwise
(`deployments.replica.replica`). So nothing waits for a slow one, and a large fleet costs no round of questions.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

from cluster import logs
from cluster.control.broadcast import broadcast
from cluster.control.weight_distribution import Carried
from cluster.types import HoldOrder, ReplicaBounds, ReplicaState

LOAD_TIMEOUT_S = 600
"""How long a replica may take to load a version, or to swap its weights."""
SILENT_S = 5
"""A replica that has said nothing for this long is no more. Shorter silence is no death: the machine may be busy, and gateways avoid a
replica that breaks a connection by themselves."""
LEAVING_S = 3_600
"""A replica that said that it ends reports nothing any more after this long: Serve waits for its streams for a part of that at most."""
UNASKED_S = 600
"""An answer that nobody has asked for this long is forgotten. Who still wants it asks within a minute, also after failures
(`cluster.control.work_queue`)."""
THREADS = 8

log = logs.logger(__name__)
OrderKey = tuple[str, ...]


class Replicas:
    """Every replica of the pool. Any thread may report; ``changed`` hears the Serve application whose replicas have changed."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        self.changed = changed
        self.changes = 0
        """Grows whenever a replica comes, goes, or holds something else."""
        self._lock = Lock()
        self._seen: dict[str, tuple[ReplicaState, float]] = {}
        self._leaving: dict[str, float] = {}
        """Those that said that they end, and when: nobody shall be sent to them, whatever they still report."""

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """Those that were heard lately."""
        with self._lock:
            now_s = time.monotonic()
            heard = {id: (state, at_s) for id, (state, at_s) in self._seen.items() if now_s - at_s < SILENT_S}
            self.changes += len(heard) != len(self._seen)
            self._seen = heard
            return tuple(sorted(state for state, _ in self._seen.values()))

    def of(self, *apps: str) -> tuple[ReplicaState, ...]:
        return tuple(state for state in self.states if state.app in apps)

    def report(self, *states: ReplicaState) -> None:
        """Some replicas say how they are. One that was overtaken on its way counts as a sign of life only."""
        changed: set[str] = set()
        with self._lock:
            now_s = time.monotonic()
            for state in states:
                if state.id in self._leaving:
                    continue
                before, _ = self._seen.get(state.id, (None, 0.0))
                current = before if before is not None and before.revision > state.revision else state
                if before is None or _what(before) != _what(current):
                    changed.add(current.app)
                    self.changes += 1
                self._seen[state.id] = current, now_s
        for app in changed:
            self.changed(app)

    def leave(self, replica: str) -> None:
        """It ends."""
        with self._lock:
            now_s = time.monotonic()
            self._leaving = {id: at_s for id, at_s in self._leaving.items() if now_s - at_s < LEAVING_S} | {replica: now_s}
            gone, _ = self._seen.pop(replica, (None, 0.0))
            self.changes += 1
        if gone is not None:
            self.changed(gone.app)

    def tell(self, app: str, method: str, *arguments: Any) -> None:
        """Order all replicas of an application to do something, and wait until all have answered."""
        answers = broadcast(app, method, *arguments, timeout_s=LOAD_TIMEOUT_S)
        self.report(*(answer for answer in answers if isinstance(answer, ReplicaState)))
        for answer in answers:
            if isinstance(answer, Exception):
                log.warning("a replica: %s", answer)


def _what(state: ReplicaState) -> tuple[Any, ...]:
    """The part of a replica's state that control decides by."""
    return state.url, state.base, state.held, state.refused, state.staged, state.bounds, state.revision


class Given(NamedTuple):
    """An order that replicas were given."""

    answer: Future[None]
    asked_s: float
    """When its answer was last asked for, on the monotonic clock."""


class Orders:
    """What the replicas of one fleet were ordered to do. Loading takes up to minutes, so each order has a thread, and no fleet waits for
    another's. ``apps`` says at any time which Serve applications the fleet consists of."""

    def __init__(self, replicas: Replicas, apps: Callable[[], tuple[str, ...]], changed: Callable[[], None]) -> None:
        self.replicas = replicas
        self.apps = apps
        self.changed = changed
        self._given: dict[OrderKey, Given] = {}
        """Those that have no answer yet, or one that nobody has heard. Who learns otherwise that an order was carried out, or that its replica
        is gone, never asks."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="orders")

    def hold(self, wanted: Mapping[str, HoldOrder], carried: Callable[[], Carried] = dict, missing: bool = True) -> bool:
        """Order replicas, by their ids, to load versions or to stage them; True once all have answered since this was first ordered.

        Ordered again afterwards, they are told anew, unless nothing is ``missing``. ``carried`` is called in the order's thread, for the
        files that travel with it.
        """
        key = ("hold", *sorted({id for one in wanted.values() for id in one.load}))
        return (not missing and key not in self._given) or self._give(key, lambda: ("hold", dict(wanted), carried()))

    def bound(self, bounds: ReplicaBounds, replicas: tuple[str, ...]) -> bool:
        """Tell these replicas how few and how many of the fleet there may be; their states say when they have heard it."""
        return self._give(("bound", *map(str, bounds), *replicas), lambda: ("bound", bounds))

    def swap(self, replica: str, id: str, fingerprint: str, cut_streams: bool) -> bool:
        """Order one replica to swap its weights; True once it has answered. Its state says whether it worked."""
        return self._give(("swap_weights", replica, id), lambda: ("swap_weights", replica, id, fingerprint, cut_streams))

    def swapping(self, replica: str, id: str) -> bool:
        """Whether it was ordered to and has not answered yet."""
        given = self._given.get(("swap_weights", replica, id))
        return given is not None and not given.answer.done()

    def forget(self, id: str) -> None:
        """An answer about a version that nobody has looked at is about an earlier rollout of it.

        >>> orders = Orders(Replicas(print), tuple, lambda: None)
        >>> orders._given = {("hold", "m@1"): Given(Future(), 0), ("hold", "m@12"): Given(Future(), 0)}
        >>> for given in orders._given.values(): given.answer.set_result(None)
        >>> orders.forget("m@1")
        >>> list(orders._given)
        [('hold', 'm@12')]
        """
        self._given = {key: given for key, given in self._given.items() if not (given.answer.done() and id in key)}

    def close(self) -> None:
        """The fleet is no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _give(self, key: OrderKey, order: Callable[[], tuple[Any, ...]]) -> bool:
        given, now_s = self._given.get(key), time.monotonic()
        if given is None:
            self._forget_unasked(now_s)
            self._given[key] = Given(self._threads.submit(self._carry_out, order), now_s)
            return False
        if not given.answer.done():
            self._given[key] = given._replace(asked_s=now_s)
            return False
        del self._given[key]
        return given.answer.exception() is None

    def _forget_unasked(self, now_s: float) -> None:
        self._given = {
            key: given for key, given in self._given.items() if not given.answer.done() or now_s - given.asked_s <= UNASKED_S
        }

    def _carry_out(self, order: Callable[[], tuple[Any, ...]]) -> None:
        try:
            method, *arguments = order()
            for app in self.apps():
                self.replicas.tell(app, method, *arguments)
        finally:
            self.changed()
