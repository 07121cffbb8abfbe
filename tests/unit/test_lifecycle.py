"""An engine's life keeps its promises in whatever order its events come: see `deployments.replica.lifecycle`."""

import contextlib
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.replica.lifecycle import ADMITTING, OWNING, TRANSITIONS, UNOWNED, IllegalTransition, Life, Owner, State

A, B = Owner("replica-a", "fleet-x", 1), Owner("replica-b", "fleet-x", 2)


class Lives(RuleBasedStateMachine):
    """What replicas, control, Serve and bad luck do to one engine, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.broken = self.ended = False

    def to(self, *states: State) -> bool:
        """Enter these states one after another, as far as the life allows; whether it allowed all."""
        for state in states:
            before = (self.life.state, self.life.owner)
            try:
                self.life.to(state)
            except IllegalTransition:
                assert (self.life.state, self.life.owner) == before
                return False
        return True

    @rule(owner=st.sampled_from([A, B]))
    def acquire(self, owner: Owner) -> None:
        before = self.life.owner
        taken = self.life.acquire(owner)
        assert taken == (before is None and self.life.state in OWNING.values())
        assert self.life.owner == (owner if taken else before), "an owner is never taken its engine away from"

    @precondition(lambda self: self.life.state in OWNING.values())
    @rule(outcome=st.sampled_from([State.SERVING] * 8 + [State.NEW, State.ASLEEP, State.ENDED]))
    def comes_up(self, outcome: State) -> None:
        with contextlib.suppress(IllegalTransition):
            self.life.to(outcome)

    @rule(way=st.sampled_from([State.SWAPPING, State.RESTARTING]), again=st.booleans(), reverts=st.booleans())
    def swap_weights(self, way: State, again: bool, reverts: bool) -> None:
        if self.to(State.DRAINING, way):
            assert not self.life.admits
            if again and way is State.RESTARTING:
                assert self.to(State.RESTARTING)
            assert self.to(State.SERVING if reverts else State.BROKEN)

    @rule(drains=st.booleans())
    def swap_gives_up_while_draining(self, drains: bool) -> None:
        if self.to(State.DRAINING) and drains:
            assert self.to(State.SERVING)

    @rule(keep=st.booleans())
    def release(self, keep: bool) -> None:
        if self.to(State.LEAVING):
            assert self.life.admits, "a gateway may not know yet"
            assert self.to(State.FALLING_ASLEEP, State.ASLEEP) if keep else self.to(State.ENDED)

    @rule()
    def fails(self) -> None:
        self.broken |= self.to(State.BROKEN)

    @precondition(lambda self: self.life.owner is None or self.broken)
    @rule(now=st.sampled_from([True] + [False] * 9))
    def end(self, now: bool) -> None:
        self.ended |= now and self.to(State.ENDED)

    @rule(state=st.sampled_from([state for state in State if state is not State.ENDED]))
    def anything(self, state: State) -> None:
        """A bug somewhere: it changes nothing, or it is allowed."""
        allowed = self.life.may(state) and state not in OWNING.values()
        assert self.to(state) == allowed

    @invariant()
    def an_owner_if_and_only_if_awake(self) -> None:
        assert (self.life.owner is None) == (self.life.state in UNOWNED)

    @invariant()
    def admits_only_for_an_owner_and_with_weights_in_place(self) -> None:
        if self.life.admits:
            assert self.life.owner is not None
            assert self.life.state not in (State.DRAINING, State.SWAPPING, State.RESTARTING, State.BROKEN, State.ENDED)

    @invariant()
    def what_broke_or_ended_never_serves_again(self) -> None:
        if self.life.state is State.BROKEN:
            assert TRANSITIONS[State.BROKEN] == {State.ENDED}
        if self.ended:
            assert self.life.state is State.ENDED
        if self.broken:
            assert not self.life.admits


Lives.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_lives = Lives.TestCase


def reachable(start: State) -> set[State]:
    found: set[State] = set()
    todo = [start]
    while todo:
        if (state := todo.pop()) not in found:
            found.add(state)
            todo += TRANSITIONS[state]
            todo += [OWNING[state]] if state in OWNING else []
    return found


def names(states: Iterable[State]) -> list[str]:
    return sorted(state.name for state in states)


def test_every_state_can_be_reached_and_every_life_can_end() -> None:
    assert names(reachable(State.NEW)) == names(State) == names(TRANSITIONS)
    assert all(State.ENDED in reachable(state) for state in State)


def test_from_broken_and_ended_no_way_leads_back() -> None:
    assert names(reachable(State.BROKEN)) == ["BROKEN", "ENDED"]
    assert names(reachable(State.ENDED)) == ["ENDED"]


def test_only_owned_states_admit_and_only_own_gives_an_owner() -> None:
    assert not ADMITTING & UNOWNED
    assert set(OWNING) <= UNOWNED
    life = Life()
    with pytest.raises(IllegalTransition, match="NEW cannot be STARTING"):
        life.to(State.STARTING)
    assert life.acquire(A) and not life.acquire(B) and life.owner == A


def test_an_engine_serves_one_replica_after_another() -> None:
    life = Life()
    for owner, coming_up in ((A, State.STARTING), (B, State.WAKING)):
        assert life.acquire(owner) and life.state is coming_up
        for state in (State.SERVING, State.LEAVING, State.FALLING_ASLEEP, State.ASLEEP):
            life.to(state)
        assert life.owner is None


def test_an_engine_whose_files_could_not_be_read_waits_for_the_next_replica() -> None:
    life = Life()
    assert life.acquire(A)
    life.to(State.NEW)
    assert life.owner is None and life.acquire(B)
