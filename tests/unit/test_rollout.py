"""The rollout: total, monotone, and the same whenever it is read again."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli.publishing import policy
from cluster.publishing.canary import Comparison, Tally
from cluster.publishing.rollout import (
    DIRECT,
    ENDED,
    WARM_TIMEOUT_S,
    Facts,
    Order,
    Policy,
    Rollout,
    Warmth,
    begin,
    decide,
    waiting_for,
    wanted,
)
from cluster.types import VersionId

ONE, TWO, THREE = VersionId("m", 1), VersionId("m", 2), VersionId("m", 3)
WARM = Facts(warmth=Warmth(2, 2), passed=True)
GOOD = Tally(requests=100, ttft_s=(0.01,) * 50, itl_s=(0.001,) * 50, finish={"stop": 100})
FAILING = Tally(requests=100, errors=30, finish={"stop": 70})


def start(policy: Policy | None = None, incumbent: VersionId | None = ONE) -> Rollout:
    return begin("m", 1, TWO, incumbent, policy or Policy(), "better", "me", now_s=0)


def run(rollout: Rollout, *facts: Facts, step_s: float = 100) -> list[Rollout]:
    """Every record, deciding until nothing changes for each of ``facts`` in turn."""
    records, now_s = [rollout], 0.0
    for one in facts:
        while (after := decide(records[-1], one, now_s := now_s + step_s)) is not None:
            records.append(after)
    return records


def seen(canary: Tally = GOOD, stable: Tally = GOOD) -> Facts:
    return WARM._replace(comparison=Comparison(canary, stable))


def stages(records: list[Rollout]) -> list[tuple[str, int]]:
    return [(record.stage, record.percent) for record in records]


def test_a_good_version_goes_live_step_by_step() -> None:
    records = run(start(), WARM, seen(), seen(GOOD._replace(requests=200)))
    assert stages(records) == [("registered", 0), ("warming", 0), ("canary", 5), ("canary", 25), ("canary", 100), ("live", 0)]
    assert [record.n for record in records] == [1, 2, 3, 4, 5, 6]
    assert [wanted(record) for record in records[1:4]] == [(ONE, None, 0), (ONE, TWO, 5), (ONE, TWO, 25)]
    assert wanted(records[-1]) == (TWO, None, 0)


def test_each_step_needs_answers_of_its_own() -> None:
    at_25 = run(start(), WARM, seen())[-1]
    assert (at_25.percent, at_25.seen) == (25, 100)
    assert decide(at_25, seen(GOOD._replace(requests=149)), 10_000) is None
    enough = decide(at_25, seen(GOOD._replace(requests=150)), 10_000)
    assert enough is not None and enough.percent == 100
    restarted = decide(at_25, seen(GOOD._replace(requests=50)), 10_000)
    assert restarted is not None, "a gateway that was restarted counts from 0"


def test_at_100_percent_every_replica_has_its_own_time() -> None:
    moved = start(DIRECT).next("canary", "ready", 0, percent=100)
    assert decide(moved, Facts(warmth=Warmth(3, 1)), 2.5 * WARM_TIMEOUT_S) is None
    late = decide(moved, Facts(warmth=Warmth(3, 1, waits="a slot")), 3.5 * WARM_TIMEOUT_S)
    assert late is not None and late.stage == "rolled_back" and "waiting for a slot" in late.reason
    assert waiting_for(moved, Facts(warmth=Warmth(3, 1, waits="a slot")), 0) == "a slot"


def test_direct_goes_live_when_every_replica_holds_it() -> None:
    half = run(start(DIRECT), Facts(warmth=Warmth(2, 1)))
    assert stages(half) == [("registered", 0), ("warming", 0)]
    assert stages(run(half[-1], Facts(warmth=Warmth(2, 2)))) == [("warming", 0), ("canary", 100), ("live", 0)]


def test_two_versions_that_cannot_be_held_at_once_change_places_at_once() -> None:
    assert stages(run(start(), WARM._replace(can_split=False)))[2:] == [("canary", 100), ("live", 0)]


def test_a_swap_that_fails_on_one_replica_goes_back_on_all() -> None:
    moved = start(DIRECT).next("canary", "ready", 0, percent=100)
    assert wanted(moved) == (TWO, None, 0)
    last = run(moved, Facts(warmth=Warmth(2, 1, "out of memory")))[-1]
    assert last.stage == "rolled_back" and last.reason == "out of memory" and wanted(last) == (ONE, None, 0)


def test_the_first_version_of_an_alias_needs_no_canary() -> None:
    assert stages(run(start(incumbent=None), WARM))[-1] == ("live", 0)


def test_without_a_verdict_nothing_is_touched() -> None:
    assert run(start(), Facts(warmth=Warmth(2, 2))) == [start()]


def test_the_gates_no_ends_it_with_the_gates_words() -> None:
    last = run(start(), Facts(passed=False, verdict="held-out loss: too high"))[-1]
    assert last.stage == "rolled_back" and "too high" in last.reason


def test_a_replicas_refusal_ends_it_with_the_replicas_words() -> None:
    last = run(start(), WARM._replace(warmth=Warmth(2, 1, "rank 64 is above 16")))[-1]
    assert last.stage == "rolled_back" and last.reason == "rank 64 is above 16"


def test_a_worse_canary_is_rolled_back_with_the_numbers() -> None:
    last = run(start(), WARM, seen(canary=FAILING))[-1]
    assert last.stage == "rolled_back" and "30.0%" in last.reason and wanted(last) == (ONE, None, 0)


@pytest.mark.parametrize("requests", [0, 49])
def test_a_step_needs_its_requests(requests: int) -> None:
    assert run(start(), WARM, seen(canary=Tally(requests=requests)))[-1].percent == 5


def test_a_step_needs_its_time() -> None:
    canary = run(start(), WARM)[-1]
    assert decide(canary, seen(), canary.since_s + 59) is None
    assert decide(canary, seen(), canary.since_s + 60) is not None


def test_orders_are_obeyed_between_warming_and_live() -> None:
    canary = run(start(), WARM)[-1]
    promoted = decide(canary, WARM._replace(order=Order("promote", "ann", "looks good")), 200)
    aborted = decide(canary, WARM._replace(order=Order("abort", "ann", "looks bad")), 200)
    assert promoted and promoted.percent == 100 and "ann: looks good" in promoted.reason
    assert aborted and aborted.stage == "rolled_back" and "ann: looks bad" in aborted.reason


def test_a_version_that_never_warms_is_given_up() -> None:
    warming = run(start(), WARM._replace(warmth=Warmth(2, 1)), step_s=1)[-1]
    late = decide(warming, Facts(warmth=Warmth(2, 1)), warming.since_s + WARM_TIMEOUT_S + 1)
    assert late and late.stage == "rolled_back" and "1 of 2" in late.reason


@pytest.mark.parametrize(("successor", "stage"), [(THREE, "retired"), (ONE, "rolled_back")])
def test_a_live_version_ends_when_it_is_replaced(successor: VersionId, stage: str) -> None:
    live = run(start(DIRECT), WARM)[-1]
    assert run(live, Facts(replaced_by=successor))[-1].stage == stage


@pytest.mark.parametrize("steps", [(), (0, 100), (5, 5, 100), (50, 25, 100), (5, 50)])
def test_steps_that_do_not_rise_to_100_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must rise"):
        Policy(steps=steps)


TALLIES = st.builds(
    Tally,
    requests=st.integers(0, 200),
    errors=st.integers(0, 200),
    ttft_s=st.lists(st.floats(0, 5), max_size=30).map(tuple),
    itl_s=st.lists(st.floats(0, 5), max_size=30).map(tuple),
    finish=st.dictionaries(st.sampled_from(["stop", "length"]), st.integers(0, 100)),
)
FACTS = st.builds(
    Facts,
    warmth=st.none() | st.builds(Warmth, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["", "no"])),
    passed=st.none() | st.booleans(),
    comparison=st.none() | st.builds(Comparison, TALLIES, TALLIES),
    order=st.none() | st.builds(Order, st.sampled_from(["promote", "abort"]), st.just("ann"), st.just("why")),
    replaced_by=st.sampled_from([None, ONE, THREE]),
)
ORDER = ["registered", "warming", "canary", "live", "retired", "rolled_back"]


@given(
    st.sampled_from([Policy(), DIRECT, Policy(gate=False, min_requests=0)]),
    st.sampled_from([None, ONE]),
    st.lists(FACTS),
    st.data(),
)
def test_any_facts_in_any_order_move_a_rollout_forward_only(
    policy: Policy, incumbent: Any, facts: list[Facts], data: Any
) -> None:
    rollout, now_s = start(policy, incumbent), 0.0
    for one in facts:
        now_s += data.draw(st.floats(0, 1000))
        after = decide(rollout, one, now_s)
        if after is None:
            continue
        assert rollout.stage not in ENDED and after.n == rollout.n + 1 and after.since_s == now_s and after.reason
        assert (ORDER.index(after.stage), after.percent) > (ORDER.index(rollout.stage), rollout.percent) or after.stage in (
            "live",
            *ENDED,
        )
        assert ORDER.index(after.stage) >= ORDER.index(rollout.stage)
        assert after.percent in (0, *policy.steps) and (after.percent > 0) == (after.stage == "canary")
        rollout = after
    alias = wanted(rollout)
    assert alias is None or alias.stable in (ONE, TWO)
    if rollout.stage == "rolled_back":
        assert alias is None or (alias.stable == incumbent and alias.canary is None)
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout


def test_who_asks_for_no_gate_is_not_stopped_by_an_old_verdict() -> None:
    """Found by a newcomer: `publish --canary` was refused for want of a held-out set, and then `--no-gate` with the same words."""
    begun = begin("m", 1, VersionId("m", 2), VersionId("m", 1), Policy(gate=False), "by hand", "me", 0.0)
    after = decide(begun, Facts(passed=False, verdict="nothing was measured"), 1.0)
    assert after is not None and after.stage == "warming"


def test_a_canary_on_a_pool_without_a_gate_needs_no_verdict() -> None:
    """`publish --canary` takes the usual steps, and whether a verdict is needed from the pool."""
    for gate in (False, True):
        pools = DIRECT.model_copy(update={"gate": gate})
        chosen = policy(pools, canary=True, steps=None, gate=None)
        assert chosen.gate == gate and chosen.steps == Policy().steps
        assert policy(pools, canary=True, steps=None, gate=not gate).gate != gate


def test_a_canary_that_nobody_asks_has_a_deadline_and_says_what_it_waits_for() -> None:
    """With one shared key 5 % of the sessions were nobody, and the canary stayed one for ever."""
    policy = Policy(steps=(5, 100), min_requests=50, min_step_s=60, max_step_s=3600)
    step = start(policy).next("canary", "ready", 0.0, percent=5)
    nothing = Facts(warmth=Warmth(1, 1), comparison=Comparison(Tally(requests=3), Tally(requests=900)))
    assert decide(step, nothing, 3600) is None
    assert waiting_for(step, nothing, 30.0) == "30 s and 47 more requests at 5 %, for 3570 s more at most"
    for facts in (nothing, Facts()):
        ended = decide(step, facts, 3601)
        assert ended is not None and ended.stage == "rolled_back" and "more requests" in ended.reason


def test_canary_and_stable_are_compared_when_a_look_is_due_and_before_the_next_step() -> None:
    policy = Policy(steps=(5, 100), min_requests=50, min_step_s=0)
    step = start(policy).next("canary", "ready", 0.0, percent=5)
    bad = Facts(comparison=Comparison(Tally(requests=40, errors=20), Tally(requests=900)), look=False)
    assert decide(step, bad, 1.0) is None
    looked = decide(step, bad._replace(look=True), 1.0)
    assert looked is not None and looked.stage == "rolled_back"
    enough = decide(step, bad._replace(comparison=Comparison(Tally(requests=60, errors=30), Tally(requests=900))), 1.0)
    assert enough is not None and enough.stage == "rolled_back", "no step is taken unseen"
