"""The arbiter under any demand, with a simulated clock."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.capacity.arbiter import SERVING, Budget, Decision, Demand, FleetDemand, Job, Past, arbitrate, divide, largest_rise


def agree(bounds: dict[str, Any]) -> bool:
    ceiling = bounds["training_ceiling_slots"]
    return ceiling is None or ceiling >= bounds["training_floor_slots"]


BUDGETS = (
    st.fixed_dictionaries(
        dict(
            serving_floor_slots=st.integers(0, 2),
            serving_ceiling_slots=st.none() | st.integers(2, 8),
            training_floor_slots=st.integers(0, 2),
            training_ceiling_slots=st.none() | st.integers(0, 8),
            cool_down_s=st.sampled_from([0.0, 10.0, 60.0]),
            headroom_slots=st.integers(0, 2),
        )
    )
    .filter(agree)
    .map(Budget.model_validate)
)
JOBS = st.lists(
    st.builds(Job, st.just(""), st.integers(0, 3), st.floats(0, 100), st.integers(0, 3), st.integers(3, 8), st.integers(1, 2)),
    max_size=4,
).map(lambda jobs: tuple(job._replace(id=f"job-{n}") for n, job in enumerate(jobs)))
LIFE = st.lists(st.tuples(st.floats(0.1, 30), st.integers(0, 10)), min_size=1, max_size=40)


def fleet(wanted: int) -> tuple[FleetDemand]:
    return (FleetDemand("m", 0, wanted),)


def live(
    budget: Budget, slots: int, jobs: tuple[Job, ...], life: list[tuple[float, int]]
) -> list[tuple[float, Demand, Decision]]:
    """Every decision of a life: after ``dt`` seconds the load asks for so many slots."""
    past, now_s, seen = Past(), 0.0, list[tuple[float, Demand, Decision]]()
    for dt_s, wanted in life:
        now_s += dt_s
        demand = Demand(slots, fleet(wanted), jobs)
        decision = arbitrate(budget, demand, past, now_s)
        past = decision.past
        seen.append((now_s, demand, decision))
    return seen


@given(BUDGETS, st.integers(0, 10), JOBS, LIFE)
def test_no_slot_has_two_owners_and_every_verdict_has_a_reason(
    budget: Budget, slots: int, jobs: tuple[Job, ...], life: list[tuple[float, int]]
) -> None:
    for _, _, decision in live(budget, slots, jobs, life):
        grants = decision.grants
        assert sum(grants.values()) <= slots and min(grants.values()) >= 0
        assert set(grants) == {SERVING, *(job.id for job in jobs)}
        for job in jobs:
            assert grants[job.id] == 0 or job.least <= grants[job.id] <= job.most
        assert all(one.reason for one in decision.assignments)
        if budget.training_ceiling_slots is not None:
            assert sum(grants[job.id] for job in jobs) <= budget.training_ceiling_slots


@given(BUDGETS, st.integers(0, 10), JOBS, LIFE)
def test_serving_gets_at_once_what_it_asks_for_within_its_bounds(
    budget: Budget, slots: int, jobs: tuple[Job, ...], life: list[tuple[float, int]]
) -> None:
    for _, demand, decision in live(budget, slots, jobs, life):
        most = min(slots if budget.serving_ceiling_slots is None else budget.serving_ceiling_slots, slots)
        most = max(0, min(most, slots - (budget.training_floor_slots if jobs else 0)))
        assert decision.grants[SERVING] >= min(max(demand.wanted, budget.serving_floor_slots), most)
        assert decision.grants[SERVING] <= most


@given(BUDGETS, st.integers(0, 10), JOBS, LIFE)
def test_the_lease_falls_only_after_the_cool_down(
    budget: Budget, slots: int, jobs: tuple[Job, ...], life: list[tuple[float, int]]
) -> None:
    """Flapping load makes no flapping lease: whatever it fell below was asked for a cool-down ago or longer."""
    seen = live(budget.model_copy(update={"headroom_slots": 0}), slots, jobs, life)
    for (_, _, before), (now_s, _, after) in pairwise(seen):
        if after.grants[SERVING] < before.grants[SERVING]:
            recent = [(at_s, demand.wanted) for at_s, demand, _ in seen if at_s <= now_s]
            assert all(wanted <= after.grants[SERVING] for at_s, wanted in recent if at_s > now_s - budget.cool_down_s)


def test_bounds_that_contradict_each_other_are_refused() -> None:
    for who in ("serving", "training"):
        with pytest.raises(ValidationError, match=f"{who}_ceiling_slots 1 is below {who}_floor_slots 2; raise it"):
            Budget.model_validate({f"{who}_ceiling_slots": 1, f"{who}_floor_slots": 2})


def test_a_cool_down_may_be_longer_than_the_memory_of_traffic() -> None:
    budget = Budget(cool_down_s=60, memory_s=30)
    leases = [decision.grants[SERVING] for _, _, decision in live(budget, 4, (), [(1.0, 3), *[(1.0, 1)] * 65])]
    assert leases[:60] == [3] * 60 and leases[-1] == 1


def test_a_flapping_load_makes_the_cool_down_longer() -> None:
    budget = Budget(cool_down_s=10, headroom_slots=0)
    life = [(1.0, 3 if second // 12 % 2 == 0 else 1) for second in range(240)]
    leases = [decision.grants[SERVING] for _, _, decision in live(budget, 4, (), life)]
    falls = sum(later < earlier for earlier, later in pairwise(leases))
    assert falls <= 2, "ten times up and down, and the lease fell twice at most"


def test_the_headroom_is_what_recent_traffic_rose_by() -> None:
    budget = Budget(cool_down_s=10, hand_over_s=5, headroom_slots=2)
    life = [(1.0, 1)] * 5 + [(1.0, 3)] * 5 + [(1.0, 1)] * 30
    leases = [decision.grants[SERVING] for _, _, decision in live(budget, 8, (), life)]
    assert leases[4] == 1 and leases[6] == 5 and leases[-1] == 3, "one that is asked for, two for the next rise"
    assert largest_rise(((0, 1), (10, 3)), 5) == 2 and largest_rise(((0, 3), (1, 1), (20, 2)), 5) == 1


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(0, 9)), max_size=30), st.floats(0.1, 30))
def test_the_largest_rise_is_that_of_all_pairs(life: list[tuple[float, int]], within_s: float) -> None:
    asked = tuple((sum(dt_s for dt_s, _ in life[: n + 1]), wanted) for n, (_, wanted) in enumerate(life))
    ends_s = [*(at_s for at_s, _ in asked[1:]), float("inf")]
    rises = [
        later - earlier
        for n, (at_s, later) in enumerate(asked)
        for (_, earlier), end_s in zip(asked[: n + 1], ends_s, strict=False)
        if end_s > at_s - within_s
    ]
    assert largest_rise(asked, within_s) == max(rises, default=0)


def test_the_higher_priority_comes_first_and_the_older_before_the_younger() -> None:
    low, old, young = Job("low", 0, 0, 2, 4), Job("old", 1, 0, 1, 2), Job("young", 1, 5, 1, 4)
    assert divide([low, young, old], 1) == {"old": 1, "young": 0, "low": 0}
    assert divide([low, young, old], 3) == {"old": 2, "young": 1, "low": 0}
    assert divide([low, young, old], 6) == {"old": 2, "young": 2, "low": 2}
    assert divide([low, young, old], 20) == {"old": 2, "young": 4, "low": 4}


def test_a_lower_job_runs_in_what_the_higher_one_cannot_use() -> None:
    assert divide([Job("high", 1, 0, 4, 4), Job("low", 0, 0, 1, 4)], 3) == {"high": 0, "low": 3}


def test_a_rise_in_many_steps_is_no_flapping() -> None:
    budget, past = Budget(cool_down_s=10), Past()
    for now_s, wanted in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 1)]:
        past = arbitrate(budget, Demand(8, fleet(wanted)), past, now_s).past
    assert arbitrate(budget, Demand(8, fleet(1)), past, 15.1).grants[SERVING] == 1


def test_a_job_that_cannot_run_is_told_what_to_do_about_it() -> None:
    def reason(demand: Demand) -> str:
        return arbitrate(Budget(), demand, Past(), 0.0).assignments[1].reason

    huge = (Job("huge", 0, 0, 8, 8),)
    assert reason(Demand(8, fleet(1), huge)) == "it needs 8 slots; serving has 1 and jobs before it the rest"
    there = "it needs 8 slots, and the pool has 4"
    assert reason(Demand(4, fleet(1), huge)) == f"{there}: it waits for machines; or give it fewer with training.min_workers"
    assert reason(Demand(4, fleet(1), huge, pool_ceiling=9)) == reason(Demand(4, fleet(1), huge)), (
        "as many as that were not refused"
    )
    fewer = "give it fewer with training.min_workers, or allow more machines"
    assert reason(Demand(4, fleet(1), huge, pool_ceiling=8)) == f"{there}, and the autoscaler adds no more for it: {fewer}"


# several fleets


def whole(fleets: list[FleetDemand]) -> tuple[FleetDemand, ...]:
    """With names, and with floors and wants of whole replicas."""
    return tuple(
        fleet._replace(name=f"fleet-{n}", wanted_slots=fleet.wanted_slots * size, floor_slots=fleet.floor_slots * size)
        for n, fleet in enumerate(fleets)
        for size in [fleet.slots_per_replica]
    )


def left(budget: Budget, slots: int, lease: int) -> int:
    rest = slots - lease
    return rest if budget.training_ceiling_slots is None else min(rest, budget.training_ceiling_slots)


def capped(slots: int, fleet: FleetDemand, ceiling: int | None) -> int:
    return slots if ceiling is None else min(slots, ceiling * fleet.slots_per_replica)


FLEETS = st.lists(
    st.builds(FleetDemand, st.just(""), st.integers(0, 2), st.integers(0, 6), st.integers(0, 2), st.integers(1, 3)),
    min_size=1,
    max_size=4,
).map(whole)
CROWDS = st.lists(st.tuples(st.floats(0.1, 30), FLEETS), min_size=1, max_size=12)


def decisions(
    budget: Budget, slots: int, jobs: tuple[Job, ...], crowds: list[tuple[float, tuple[FleetDemand, ...]]]
) -> list[tuple[Demand, Decision]]:
    past, now_s, seen = Past(), 0.0, list[tuple[Demand, Decision]]()
    for dt_s, fleets in crowds:
        now_s += dt_s
        demand = Demand(slots, fleets, jobs)
        seen.append((demand, arbitrate(budget, demand, past, now_s)))
        past = seen[-1][1].past
    return seen


@given(BUDGETS, st.integers(0, 12), JOBS, CROWDS)
def test_fleets_share_the_lease_in_whole_replicas(
    budget: Budget, slots: int, jobs: tuple[Job, ...], crowds: list[tuple[float, tuple[FleetDemand, ...]]]
) -> None:
    for demand, decision in decisions(budget, slots, jobs, crowds):
        lease = decision.grants[SERVING]
        assert sum(one.slots for one in decision.fleets) <= lease and sum(decision.grants.values()) <= slots
        assert all(one.reason for one in decision.fleets)
        for fleet, one in zip(demand.fleets, decision.fleets, strict=True):
            assert one.name == fleet.name and one.slots >= 0 and one.slots % fleet.slots_per_replica == 0


@given(BUDGETS, st.integers(0, 12), JOBS, CROWDS)
def test_floors_come_before_wants(
    budget: Budget, slots: int, jobs: tuple[Job, ...], crowds: list[tuple[float, tuple[FleetDemand, ...]]]
) -> None:
    for demand, decision in decisions(budget, slots, jobs, crowds):
        if sum(fleet.floor_slots for fleet in demand.fleets) <= decision.grants[SERVING]:
            assert all(one.slots >= fleet.floor_slots for fleet, one in zip(demand.fleets, decision.fleets, strict=True))


@given(BUDGETS, st.integers(0, 12), JOBS, CROWDS)
def test_a_fleet_lacks_nothing_that_a_lower_one_has_above_its_floor(
    budget: Budget, slots: int, jobs: tuple[Job, ...], crowds: list[tuple[float, tuple[FleetDemand, ...]]]
) -> None:
    """Up to what is less than a replica."""
    for demand, decision in decisions(budget, slots, jobs, crowds):
        pairs = list(zip(demand.fleets, decision.fleets, strict=True))
        spare = decision.grants[SERVING] - sum(one.slots for one in decision.fleets)
        for fleet, one in pairs:
            lower = sum(max(0, low.slots - other.floor_slots) for other, low in pairs if other.priority < fleet.priority)
            assert one.lacks == 0 or spare + lower < fleet.slots_per_replica


@given(BUDGETS, st.integers(0, 12), JOBS, CROWDS)
def test_jobs_get_what_serving_does_not_need(
    budget: Budget, slots: int, jobs: tuple[Job, ...], crowds: list[tuple[float, tuple[FleetDemand, ...]]]
) -> None:
    """The lease is no larger than the floors and the largest wants and the headroom, whatever the fleets' number."""
    seen = decisions(budget, slots, jobs, crowds)
    for n, (demand, decision) in enumerate(seen):
        names = {fleet.name for fleet in demand.fleets}
        wants = [
            (fleet.name, max(fleet.wanted_slots, fleet.floor_slots)) for before, _ in seen[: n + 1] for fleet in before.fleets
        ]
        largest = sum(max((want for other, want in wants if other == name), default=0) for name in names)
        assert decision.grants[SERVING] <= max(largest + budget.headroom_slots, budget.serving_floor_slots)
        assert {id: n for id, n in decision.grants.items() if id != SERVING} == divide(
            jobs, left(budget, slots, decision.grants[SERVING])
        )


@given(st.integers(0, 12), FLEETS)
def test_fleets_that_keep_to_their_ceilings_come_to_what_each_was_given(slots: int, fleets: tuple[FleetDemand, ...]) -> None:
    """Replicas end where there are too many, and start where a slot is free; Serve reports what it may start, not what the load asks for."""
    past, held, ceilings, grants = Past(), [0] * len(fleets), [None] * len(fleets), list[int]()
    held[0] = slots - slots % fleets[0].slots_per_replica  # one fleet has all
    for turn in range(8):
        wants = [
            capped(max(fleet.wanted_slots, fleet.floor_slots), fleet, ceiling)
            for fleet, ceiling in zip(fleets, ceilings, strict=True)
        ]
        told = tuple(fleet._replace(wanted_slots=want) for fleet, want in zip(fleets, wants, strict=True))
        decision = arbitrate(Budget(), Demand(slots, told), past, float(turn))
        past, ceilings, grants = decision.past, [one.ceiling for one in decision.fleets], [one.slots for one in decision.fleets]
        goals = [capped(want, fleet, ceiling) for want, fleet, ceiling in zip(wants, fleets, ceilings, strict=True)]
        held = [min(has, goal) for has, goal in zip(held, goals, strict=True)]
        for n, fleet in enumerate(fleets):
            room = min(slots - sum(held), goals[n] - held[n])
            held[n] += room - room % fleet.slots_per_replica
        assert sum(held) <= slots
    wanted = [max(fleet.wanted_slots, fleet.floor_slots) for fleet in fleets]
    assert held == [min(has, want) for has, want in zip(grants, wanted, strict=True)]


def test_there_is_no_ceiling_where_nobody_lacks_anything_or_only_one_fleet_is_there() -> None:
    def ceilings(*fleets: FleetDemand) -> list[int | None]:
        return [one.ceiling for one in arbitrate(Budget(), Demand(4, fleets), Past(), 0.0).fleets]

    chat, code = FleetDemand("chat", 1, 3), FleetDemand("code", 0, 1)
    assert ceilings(chat, code) == [None, None]
    assert ceilings(chat._replace(wanted_slots=9)) == [None], "its replicas wait, and the autoscaler sees them"
    assert ceilings(chat._replace(wanted_slots=9), code) == [4, 0]
    assert ceilings(chat._replace(priority=0), code._replace(wanted_slots=3)) == [2, 2], "equals get equally much"


def test_what_is_asked_for_now_comes_before_what_was_asked_for_lately() -> None:
    """The slots of a load that has fallen are not kept idle from another fleet, whatever the priorities."""
    chat, code, budget = FleetDemand("chat", 1, 3), FleetDemand("code", 0, 1), Budget(cool_down_s=60)
    past = arbitrate(budget, Demand(4, (chat, code)), Past(), 0.0).past
    decision = arbitrate(budget, Demand(4, (chat._replace(wanted_slots=1), code._replace(wanted_slots=3))), past, 1.0)
    assert [(one.slots, one.lacks) for one in decision.fleets] == [(1, 0), (3, 0)]
    roomy = arbitrate(budget, Demand(8, (chat._replace(wanted_slots=1), code._replace(wanted_slots=3))), past, 1.0)
    assert roomy.grants[SERVING] == 6 and [one.slots for one in roomy.fleets] == [3, 3]


def test_a_fleet_at_its_ceiling_still_counts_as_asking_for_what_it_asked_for_before() -> None:
    """Serve reports two replicas of a fleet that may have two, however high its load is."""
    fleets = (FleetDemand("a", 0, 3), FleetDemand("b", 0, 3))
    first = arbitrate(Budget(cool_down_s=60), Demand(4, fleets), Past(), 0.0)
    capped = tuple(fleet._replace(wanted_slots=2) for fleet in fleets)
    second = arbitrate(Budget(cool_down_s=60), Demand(4, capped), first.past, 1.0)
    assert [one.ceiling for one in (*first.fleets, *second.fleets)] == [2, 2, 2, 2]
    later = arbitrate(Budget(cool_down_s=60), Demand(4, capped), second.past, 62.0)
    assert [one.ceiling for one in later.fleets] == [None, None], "once a cool-down it may try"


def test_the_slots_of_a_fleet_that_is_removed_are_free_at_once() -> None:
    past = arbitrate(Budget(cool_down_s=60), Demand(4, (FleetDemand("a", 0, 1), FleetDemand("b", 0, 3))), Past(), 0.0).past
    assert arbitrate(Budget(cool_down_s=60), Demand(4, (FleetDemand("a", 0, 1),)), past, 1.0).grants[SERVING] == 1
