"""The elastic run as a state machine: whatever happens to its workers and its grant, it keeps its promises.

`World` plays Ray, the machines, the workers and the store. It checks every promise at every turn.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.capacity.allocator import Grant
from jobs.training.drivers.elasticity import (
    HUNG_S,
    MOST_FAILURES,
    Actions,
    Balance,
    Counts,
    Limits,
    Phase,
    ReservationFacts,
    Run,
    RunFacts,
    SpareFacts,
    WorkerFacts,
    balance,
    next_actions,
)
from jobs.training.drivers.grants import NO_CONTROL_S

DEADLINE_S = 20
SETTLED_S = 400
"""Longer than any patience in `World`."""


@dataclass
class Process:
    """A worker or a spare, and what is wrong with it."""

    machine: str
    since_s: float
    loads_s: int
    phase: Phase = Phase.LOADING
    heard_s: float = 0.0
    group: int = 0
    trained: int = 0
    step: int = -1
    first: int = -1
    broken: str = ""
    dead: bool = False
    hung: bool = False
    finished: bool = False

    @property
    def answers(self) -> bool:
        return not (self.dead or self.hung)


@dataclass
class World:
    limits: Limits = field(default_factory=lambda: Limits(1, DEADLINE_S))
    now_s: float = 1.0
    grant: Grant | None = field(default_factory=lambda: Grant(0, "because"))
    silent_s: float = 0.0
    run: Run = field(default_factory=lambda: Run(moved_s=1.0))
    workers: dict[int, Process] = field(default_factory=dict[int, Process])
    spares: dict[int, Process] = field(default_factory=dict[int, Process])
    spare_since_s: dict[int, float] = field(default_factory=dict[int, float])
    reservations: dict[int, tuple[float, str]] = field(default_factory=dict[int, tuple[float, str]])
    ids: int = 0
    stored: int = -1
    store_works: bool = True
    stubborn: int = 0
    """The newest group that never ends its step."""
    deaf: int = 0
    """The newest group that goes on without one of its workers until it is stopped."""
    breaks: bool = False
    """Whether every group breaks before its first step."""
    stopped: int = 0
    steps: int = 10**9
    failed: str = ""
    finished: bool = False
    over_s: float = 0.0
    """How long the run has held more than its grant."""
    notes: list[str] = field(default_factory=list[str])

    # what happens

    def facts(self) -> RunFacts:
        workers = [
            WorkerFacts(
                id,
                one.phase,
                one.machine,
                one.since_s,
                one.heard_s,
                one.group,
                one.trained,
                one.step,
                one.first,
                one.phase is Phase.ACTIVE,
                one.broken,
                "it died" if one.dead else "",
                one.finished,
            )
            for id, one in self.workers.items()
        ]
        spares = [
            SpareFacts(id, one.machine, self.spare_since_s[id], one.heard_s, one.phase is Phase.IDLE, "died" if one.dead else "")
            for id, one in self.spares.items()
        ]
        reserved = [ReservationFacts(id, since_s, machine) for id, (since_s, machine) in self.reservations.items()]
        return RunFacts(self.now_s, self.grant, self.silent_s, tuple(workers), tuple(reserved), tuple(spares))

    def turn(self) -> Actions:
        for one in (*self.workers.values(), *self.spares.values()):
            if one.answers:
                one.heard_s = self.now_s
        facts = self.facts()
        before = self.run
        self.run, do = next_actions(self.run, facts, self.limits)
        self.check(before, facts, do)
        self.carry_out(do)
        self.live()
        self.now_s += 1
        return do

    def carry_out(self, do: Actions) -> None:
        self.notes += do.notes
        if do.keep_s is not None and self.store_works:
            self.stored = max([self.stored, *(one.step for one in self.workers.values() if one.answers)])
        for id in do.end:
            self.workers.pop(id, None)
            self.spares.pop(id, None)
        for id in do.cancel:
            del self.reservations[id]
        for id in do.retire:
            self.spares[id], self.spare_since_s[id] = self.workers.pop(id), self.now_s
        for reservation, spare in do.place:
            _, machine = self.reservations.pop(reservation)
            if spare is not None:
                self.workers[spare] = self.spares.pop(spare)
            else:
                self.ids += 1
                self.workers[self.ids] = Process(machine, self.now_s, loads_s=6 + self.ids % 4, heard_s=self.now_s)
        for _ in range(do.reserve):
            self.ids += 1
            self.reservations[self.ids] = self.now_s, ""
        self.stopped = self.stopped if do.stop is None else do.stop
        self.form(do.form)
        self.finished, self.failed = self.finished or do.finish, self.failed or (do.fail.words if do.fail else "")

    def form(self, ids: tuple[int, ...]) -> None:
        """Everybody takes over the newest state."""
        first = max([0, self.stored, *(self.workers[id].step for id in ids)])
        for id in ids:
            one = self.workers[id]
            one.phase, one.group, one.first, one.broken, one.step = Phase.ACTIVE, self.run.group, first, "", first

    def live(self) -> None:
        """One second."""
        for id, (since_s, machine) in self.reservations.items():
            self.reservations[id] = since_s, machine or f"machine {id % 2}"
        for one in (*self.workers.values(), *self.spares.values()):
            if one.phase is Phase.LOADING and one.answers:
                one.loads_s -= 1
                one.phase = Phase.IDLE if one.loads_s <= 0 else one.phase
        self.train()

    def train(self) -> None:
        """One step of the process group, if nothing is in its way."""
        joined = [one for one in self.workers.values() if one.group == self.run.group]
        active = [one for one in joined if one.phase is Phase.ACTIVE]
        if not active or any(one.hung for one in joined) or self.stubborn == self.run.group:
            return
        broken = len(joined) < self.size or any(one.dead for one in joined) or self.breaks
        deaf = self.deaf == self.run.group and self.stopped < self.run.group
        if len(active) == len(joined) and (not broken or deaf):
            for one in active:
                one.step, one.trained = one.step + 1, one.group
            active[0].finished = active[0].step >= self.steps
        if (broken and not deaf) or self.stopped == self.run.group or len(active) < len(joined):
            # One leaves the group before the others do.
            for one in active if len(active) < len(joined) else active[:1]:
                one.phase, one.broken = Phase.IDLE, "its peer is gone" if broken else ""

    size: int = 0
    """Of the newest group."""

    # what is promised

    def check(self, before: Run, facts: RunFacts, do: Actions) -> None:
        if before.over:
            assert do == Actions()
            return
        wanted = len(facts.workers) + len(facts.reservations) if self.grant is None else self.grant.slots
        staying = {one.id: one for one in facts.workers if one.id not in (*do.end, *do.retire)}
        active = [one for one in staying.values() if one.phase is Phase.ACTIVE]
        self.check_slots(facts, do, wanted, len(staying), len(active))
        self.check_group(do, staying, active, wanted)
        self.check_state(before, facts, do, staying)
        if not do.fail:
            assert not any(one.gone for one in staying.values())
            assert not any(facts.now_s - one.heard_s > HUNG_S for one in staying.values() if one.phase is not Phase.LOADING)
        self.over_s = self.over_s + 1 if len(facts.workers) > wanted else 0
        assert self.over_s <= DEADLINE_S + 4 or do.fail  # a step of the way takes a turn here

    def check_slots(self, facts: RunFacts, do: Actions, wanted: int, staying: int, active: int) -> None:
        """Never more than the grant and what is still being given back."""
        reserved = len(facts.reservations) - len(do.cancel) + do.reserve
        group = sum(one.group == self.run.group for one in facts.workers)
        assert do.fail or do.finish or staying + reserved <= max(wanted, group if active else 0)
        assert not (do.reserve and (do.cancel or do.retire))
        assert len({*do.end, *do.cancel, *do.retire}) == len(do.end) + len(do.cancel) + len(do.retire)

    def check_group(self, do: Actions, staying: dict[int, WorkerFacts], active: list[WorkerFacts], wanted: int) -> None:
        """Never two process groups, and only of workers that can train."""
        if do.form:
            assert not active and self.limits.min_workers <= len(do.form) <= wanted
            assert all(staying[id].phase is Phase.IDLE for id in do.form)
            self.size = len(do.form)

    def check_state(self, before: Run, facts: RunFacts, do: Actions, staying: dict[int, WorkerFacts]) -> None:
        """The newest state stays in a worker's memory, or is kept. What only dead or hung workers know is lost already."""
        known = {one.id: one.step for one in facts.workers if self.workers[one.id].answers}
        newest = max(known.values(), default=-1)
        if newest > max(0, self.stored) and not do.finish:
            held = any(step == newest for id, step in known.items() if id in staying)
            tried = before.kept == before.group > 0  # for half of the deadline, which is an instant here
            assert held or do.keep_s is not None or not self.store_works or tried
            assert not do.fail or do.keep_s is not None


def happen(world: World, what: str, number: int) -> None:
    """One thing that nobody asked for."""
    some = [*world.workers.values(), *world.spares.values()]
    victim = some[number % len(some)] if some else None
    if what == "grant":
        world.grant = Grant(number % 6, "because")
    elif what == "dies" and victim:
        victim.dead = True
    elif what == "hangs" and victim:
        victim.hung = True
    elif what == "stubborn":
        world.stubborn = world.run.group
    elif what == "deaf":
        world.deaf = world.run.group
    elif what == "store":
        world.store_works = not world.store_works
    elif what == "silent":
        world.silent_s = number * 10.0


EVENTS = st.tuples(
    st.sampled_from(["grant", "grant", "grant", "dies", "hangs", "stubborn", "deaf", "store", "silent"]),
    st.integers(0, 20),
    st.integers(1, 25),
)


@given(st.lists(EVENTS, max_size=12), st.integers(1, 2), st.integers(2, 5))
@settings(deadline=None)
def test_whatever_happens_a_run_keeps_its_promises_and_trains_on_its_grant_in_the_end(
    events: list[tuple[str, int, int]], least: int, last: int
) -> None:
    world = World(Limits(least, DEADLINE_S, spare_s=60))
    for what, number, turns in [*events, ("grant", last, SETTLED_S)]:
        happen(world, what, number)
        for _ in range(turns):
            world.turn()
    loading_hung = any(one.hung for one in world.workers.values() if one.phase is Phase.LOADING)  # found after 15 minutes
    if not world.failed and not loading_hung:
        assert [one.phase for one in world.workers.values()] == [Phase.ACTIVE] * last
        assert not world.reservations and len({one.group for one in world.workers.values()}) == 1
        before = world.run.step
        assert world.turn() == Actions() and (world.turn(), world.run.step > before)[1]


def steady(grant: int, **limits: Any) -> World:
    """A world in which the workers have followed the grant."""
    world = World(Limits(1, DEADLINE_S, **limits), grant=Grant(grant, "because"))
    for _ in range(30):
        world.turn()
    return world


def until(world: World, done: Any, most: int = 100) -> int:
    """Turns until it is done."""
    for turn in range(most):
        if done(world):
            return turn
        world.turn()
    raise AssertionError("never")


def trains(world: World, workers: int) -> bool:
    return [one.phase for one in world.workers.values() if one.phase is not Phase.LOADING] == [Phase.ACTIVE] * workers


@pytest.mark.parametrize("wrong", ["dead", "hung"])
def test_a_worker_that_dies_or_hangs_is_replaced_while_the_others_go_on(wrong: str) -> None:
    world = steady(3)
    setattr(world.workers[max(world.workers)], wrong, True)
    until(world, lambda world: trains(world, 2), HUNG_S + 5)
    until(world, lambda world: trains(world, 3), 20)
    assert world.run.lost == 0 and sum("workers lost" in note for note in world.notes) == 1


def test_a_group_that_lost_a_worker_stops_even_if_it_could_go_on() -> None:
    """A process of a machine that Ray has lost may go on for a while, and the others with it."""
    world = steady(3)
    world.deaf = world.run.group
    world.workers[max(world.workers)].dead = True
    assert world.turn().stop == world.deaf
    until(world, lambda world: trains(world, 3) and len(world.workers) == 3)
    assert len(world.notes) == 1 and world.run.lost == 0


def test_a_failure_counts_once_however_many_workers_are_lost_with_it() -> None:
    """Four workers that were lost with their machine while they loaded used to be four failures, and ended the run."""
    world = steady(0)
    world.grant = Grant(5, "because")
    until(world, lambda world: len(world.workers) == 5)
    for one in world.workers.values():
        one.dead = True
    until(world, lambda world: trains(world, 5))
    assert not world.failed


def test_after_too_many_failures_without_a_step_it_fails_with_the_reason() -> None:
    world = steady(2)
    world.breaks = True
    until(world, lambda world: world.failed)
    assert world.failed == f"The training failed {MOST_FAILURES + 1} times at step {world.run.step}: its peer is gone"
    assert world.turn() == Actions()


def test_a_step_between_two_failures_forgets_the_first() -> None:
    world = steady(2)
    for _ in range(3 * MOST_FAILURES):
        world.workers[max(world.workers)].dead = True
        world.turn()
        until(world, lambda world: trains(world, 2) and len(world.workers) == 2)
        world.turn()
        world.turn()
    assert not world.failed


def test_a_run_that_has_diverged_ends_at_once_and_keeps_its_checkpoints() -> None:
    spoilt = WorkerFacts(1, Phase.IDLE, group=1, trained=1, step=40, heard_s=1, diverged="the loss is nan")
    run, do = next_actions(Run(group=1, step=40, moved_s=1), RunFacts(1, Grant(1, ""), workers=(spoilt,)), Limits(1, DEADLINE_S))
    assert run.over and do.fail is not None and do.keep_s is None, "nothing of it is written"
    assert do.fail.words == "The training has diverged: at step 41 the loss is nan." and "learning rate" in do.fail.do


def test_a_run_that_is_done_starts_nothing_again() -> None:
    world = steady(2)
    world.steps = world.run.step + 3
    until(world, lambda world: world.finished)
    world.workers[max(world.workers)].dead = True
    world.grant = Grant(5, "because")
    assert [world.turn() for _ in range(20)] == [Actions()] * 20


def test_when_all_leave_the_newest_state_is_kept_and_spares_come_back_with_it() -> None:
    world = steady(2)
    world.grant = Grant(0, "serving has 2")
    until(world, lambda world: not world.workers)
    step = world.run.step
    world.turn()
    assert world.stored == step > 0 and len(world.spares) == 2 and "waiting for slots: serving has 2" in world.notes
    world.grant = Grant(2, "because")
    until(world, lambda world: trains(world, 2), 6)
    assert world.run.lost == 0 and "may have 2 slots" in world.notes


def test_a_group_that_does_not_stop_is_ended_at_the_deadline_and_its_state_kept_before() -> None:
    world = steady(2)
    world.stubborn = world.run.group
    world.grant = Grant(1, "because")
    until(world, lambda world: world.stored > 0, DEADLINE_S)
    assert world.over_s <= DEADLINE_S / 2 + 2
    until(world, lambda world: any("within 20 s" in note for note in world.notes), DEADLINE_S)
    until(world, lambda world: trains(world, 1), 20)
    assert world.run.lost == 0


def test_workers_that_answer_and_do_no_step_are_replaced() -> None:
    world = steady(2)
    world.stubborn = world.run.group
    until(world, lambda world: any("no step was done" in note for note in world.notes))
    until(world, lambda world: trains(world, 2), 20)


def test_a_worker_that_hangs_after_another_has_left_the_group_is_replaced() -> None:
    """It used to be waited for until somebody asked for its slots: whoever had left did no step any more, so nobody seemed to be stuck."""
    world = steady(2)
    one, other = world.workers.values()
    one.phase, world.stubborn = Phase.IDLE, world.run.group
    until(world, lambda _: other not in world.workers.values())
    until(world, lambda world: trains(world, 2), 20)


def test_without_control_a_job_says_so_and_then_fails() -> None:
    """A job on a pool without control used to wait for ever and say nothing."""
    world = World(grant=None)
    for second in range(NO_CONTROL_S + 2):
        world.silent_s = second
        world.turn()
    assert world.notes == ["control has not answered for 11 s: the job waits"]
    assert world.failed.startswith(f"Control has not answered for {NO_CONTROL_S + 1} s")


def test_while_control_is_silent_a_job_keeps_what_it_holds_and_says_so_once() -> None:
    world = steady(2)
    for second in range(200):
        world.silent_s = second
        world.turn()
    world.silent_s = 0
    world.turn()
    assert trains(world, 2) and not world.failed
    told = [note for note in world.notes if "control" in note]
    assert told == ["control has not answered for 11 s: the job keeps its 2 slots", "control answers again"]


def test_steps_that_were_done_twice_are_counted_once() -> None:
    """A second group after the loss used to count a part of it again."""
    world = steady(2)
    world.store_works, world.stored = False, world.run.step - 5
    for one in world.workers.values():
        one.dead = True
    world.turn()
    lost = world.run.step - world.stored
    until(world, lambda world: trains(world, 2) and len(world.workers) == 2)
    world.turn()
    assert world.run.group == 4 and world.run.lost == lost


def test_a_group_that_has_waited_for_long_is_not_stuck_with_its_next_step() -> None:
    """For data, or for a measurement. The time until then was taken for the step's own."""
    worker = WorkerFacts(1, Phase.ACTIVE, group=1, trained=1, step=5, first=0)
    grant, limits = Grant(1, ""), Limits(min_workers=1, yield_deadline_s=30)
    run = Run(group=1, began=1, step=5, moved_s=0, longest_s=1)
    for now_s, stepping in ((100.0, False), (300.0, False), (300.1, True), (340.0, True)):
        run, actions = next_actions(
            run, RunFacts(now_s, grant, workers=(worker._replace(heard_s=now_s, stepping=stepping),)), limits
        )
        assert actions == Actions(), now_s
    run, actions = next_actions(run, RunFacts(346.0, grant, workers=(worker._replace(heard_s=346.0, stepping=True),)), limits)
    assert actions.end == (1,), "a step may be stuck"


COUNTS = st.integers(0, 5)


@given(st.builds(Counts, wanted=COUNTS, active=COUNTS, idle=COUNTS, loading=COUNTS, least=st.integers(1, 3)))
def test_a_run_has_no_more_workers_than_it_may(counts: Counts) -> None:
    do = balance(counts)
    there = counts.active + counts.idle + counts.loading
    assert do.dismiss <= counts.idle + counts.loading and not (do.reserve and do.dismiss)
    assert there + do.reserve - do.dismiss == max(counts.wanted, counts.active)
    assert do.stop == (counts.active > counts.wanted) or counts.idle  # otherwise a group stops for nothing


@pytest.mark.parametrize(
    ("counts", "balanced"),
    [
        (Counts(2, 0, 0, 0), Balance(reserve=2)),
        (Counts(2, 0, 1, 1), Balance(form=True)),
        (Counts(2, 0, 1, 1, least=2), Balance()),
        (Counts(2, 1, 1, 0), Balance(stop=True)),
        (Counts(3, 1, 1, 1), Balance()),
        (Counts(1, 2, 0, 0), Balance(stop=True)),
        (Counts(1, 2, 0, 1), Balance(stop=True, dismiss=1)),
        (Counts(1, 0, 2, 0), Balance(dismiss=1, form=True)),
        (Counts(0, 0, 2, 1), Balance(dismiss=3)),
        (Counts(2, 2, 0, 0), Balance()),
    ],
)
def test_what_follows_from_the_number_of_workers(counts: Counts, balanced: Balance) -> None:
    assert balance(counts) == balanced
