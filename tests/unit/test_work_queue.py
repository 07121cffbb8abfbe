"""The queue of keys that control reconciles: no key is lost, none is handed out twice, and a failing one delays nobody."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.control.work_queue import FIRST_RETRY_S, LAST_RETRY_S, Key, WorkQueue

KEYS = st.sampled_from([("alias", "a"), ("alias", "b"), ("fleet", "a")])
A, B = ("alias", "a"), ("alias", "b")


class Queue(RuleBasedStateMachine):
    """Adds, takes, ends and failures in any order, beside what must be true of them."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.now_s = WorkQueue(), 0.0
        self.running: list[Key] = []
        self.added: set[Key] = set()
        """Keys that must be handed out some time."""

    @rule(key=KEYS, later_s=st.floats(0, 5))
    def add(self, key: Key, later_s: float) -> None:
        self.queue.add(key, self.now_s + later_s)
        self.added.add(key)

    @rule(key=KEYS)
    def retry(self, key: Key) -> None:
        self.queue.retry(key, self.now_s)
        self.added.add(key)

    @rule()
    def take(self) -> None:
        key = self.queue.take(self.now_s)
        if key is not None:
            assert key not in self.running, "two reconcilers have the same object"
            self.running.append(key)

    @rule(pause_s=st.floats(0, 3))
    def done(self, pause_s: float) -> None:
        if self.running:
            self.queue.done(self.running.pop(0), self.now_s + pause_s)

    @rule()
    def failed(self) -> None:
        if self.running:
            failure = self.queue.failed(self.running.pop(0), "no", self.now_s)
            assert FIRST_RETRY_S - 1e-6 <= failure.retry_s - self.now_s <= LAST_RETRY_S + 1e-6

    @rule(key=KEYS)
    def drop(self, key: Key) -> None:
        if key not in self.running:
            self.queue.drop(key)
            self.added.discard(key)

    @rule(passed_s=st.floats(0, 70))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @invariant()
    def every_key_is_waiting_or_being_reconciled(self) -> None:
        assert all(key in self.queue for key in self.added)

    def teardown(self) -> None:
        """Whatever has happened, every key is handed out once its time has come."""
        while self.running:
            self.queue.done(self.running.pop(), self.now_s)
        taken = set[Key]()
        while (key := self.queue.take(self.now_s + LAST_RETRY_S + 10)) is not None:
            taken.add(key)
        assert taken == self.added


TestQueue = Queue.TestCase
TestQueue.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


def test_a_key_that_fails_waits_twice_as_long_each_time_and_no_other_key_waits() -> None:
    """Every alias used to stand still while one could not be read."""
    queue, now_s, tries = WorkQueue(), 0.0, {A: list[float](), B: list[float]()}
    queue.add(A, 0.0)
    queue.add(B, 0.0)
    while now_s < 10:
        while (key := queue.take(now_s)) is not None:
            tries[key].append(now_s)
            if key == A:
                queue.failed(A, "damaged", now_s)
            else:
                queue.done(B, now_s + 0.5)
        now_s += 0.5
    assert tries[A] == [0, 0.5, 1.5, 3.5, 7.5] and len(tries[B]) == 20
    assert queue.failures[A].words == "damaged" and B not in queue.failures


def test_events_do_not_shorten_a_back_off_and_an_operator_does() -> None:
    queue = WorkQueue()
    queue.add(A, 0.0)
    for now_s in (0.0, 0.5, 1.5):
        assert queue.take(now_s) == A
        queue.failed(A, "no", now_s)
    queue.add(A, 1.6)
    assert queue.take(1.6) is None
    queue.retry(A, 1.7)
    assert queue.take(1.7) == A


def test_a_key_that_is_added_while_it_is_reconciled_is_reconciled_again() -> None:
    queue = WorkQueue()
    queue.add(A, 0.0)
    assert queue.take(0.0) == A and queue.take(0.0) is None
    queue.add(A, 0.1)
    queue.done(A, 60.0)
    assert queue.take(0.2) == A
