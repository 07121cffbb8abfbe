"""The allocator under random heartbeats and loads: no slot is promised twice, none is lost for ever."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.capacity.allocator import LISTEN_S, SILENT_S, Allocator, Heartbeat
from cluster.capacity.arbiter import Budget, FleetDemand, Job
from cluster.capacity.ceiling import Ceiling

BUDGET = Budget(cool_down_s=5, headroom_slots=0, serving_floor_slots=1)


def job(id: str, most: int = 4, least: int = 1, priority: int = 0) -> Job:
    return Job(id, priority, 0.0, least, most)


def fleet(wanted: int) -> tuple[FleetDemand]:
    return (FleetDemand("m", 0, wanted),)


def started(slots: int = 4, held: int = 1, wanted: int = 1) -> Allocator:
    allocator = Allocator(BUDGET, 0.0)
    allocator.turn(slots, held, fleet(wanted), LISTEN_S)
    return allocator


def test_a_control_that_was_just_started_changes_nothing() -> None:
    allocator = Allocator(BUDGET, 0.0)
    allocator.heartbeat(Heartbeat(job("a"), held=3), 0.1)
    assert allocator.turn(4, 1, fleet(1), 0.2) == 1
    assert allocator.heartbeat(Heartbeat(job("a"), held=3), 0.3).slots == 3


def test_a_clock_that_is_set_back_does_not_stop_decisions() -> None:
    allocator = Allocator(BUDGET, 1000.0)
    allocator.heartbeat(Heartbeat(job("a")), 10.0)
    allocator.turn(4, 1, fleet(1), 10.1)
    assert allocator.grant("a", 0).slots == 3


def test_a_waiting_job_gets_what_is_free_and_yields_when_serving_wants_it() -> None:
    allocator = started()
    allocator.heartbeat(Heartbeat(job("a")), 4.0)
    allocator.turn(4, 1, fleet(1), 4.1)
    assert allocator.grant("a", 0).slots == 3
    allocator.heartbeat(Heartbeat(job("a"), held=3), 5.0)
    assert allocator.turn(4, 1, fleet(3), 5.1) == 3
    assert allocator.grant("a", 3).slots == 1


def test_a_job_grows_only_by_what_has_been_given_back() -> None:
    allocator = started(held=3, wanted=1)  # two replicas are ending
    allocator.heartbeat(Heartbeat(job("a"), held=1), 20.0)
    allocator.turn(4, 3, fleet(1), 20.1)
    assert allocator.grant("a", 1).slots == 1
    allocator.turn(4, 1, fleet(1), 20.2)
    assert allocator.grant("a", 1).slots == 3


def test_what_a_job_was_promised_stays_its_own_until_it_says_that_it_has_it() -> None:
    """It takes the slots, Ray counts them as used, and control hears of it a snapshot later."""
    allocator = started()
    allocator.heartbeat(Heartbeat(job("a"), held=0), 20.0)
    allocator.turn(4, 1, fleet(1), 20.1, free=3)
    assert allocator.grant("a", 0).slots == 3
    allocator.turn(4, 1, fleet(1), 20.2, free=0)
    assert allocator.grant("a", 0).slots == 3
    allocator.turn(4, 3, fleet(3), 20.3, free=0)
    assert allocator.grant("a", 0).slots == 1


def test_a_silent_job_is_forgotten_and_the_next_one_gets_its_slots() -> None:
    allocator = started()
    allocator.heartbeat(Heartbeat(job("a"), held=3), 4.0)
    allocator.heartbeat(Heartbeat(job("b")), 4.0)
    allocator.turn(4, 1, fleet(1), 4.1)
    assert allocator.grant("b", 0).slots == 0
    allocator.heartbeat(Heartbeat(job("b")), 4.0 + SILENT_S)
    allocator.turn(4, 1, fleet(1), 4.1 + SILENT_S)
    assert allocator.grant("b", 0).slots == 3


def test_the_record_keeps_a_job_that_stays_as_it_is_only_once() -> None:
    allocator = started(slots=8)
    for turn in range(20):
        allocator.heartbeat(Heartbeat(job("a", most=1), held=1), 4.0 + turn / 10)
        allocator.turn(8, 1, fleet(1 + turn % 2), 4.0 + turn / 10)
    assert len(allocator.since(4.05)) == 19 and len({id(snapshot.jobs[0]) for snapshot in allocator.since(4.05)}) == 1


def test_slots_that_a_ceiling_hides_from_the_autoscaler_are_requested() -> None:
    """A fleet that may not start its replica asks nobody for a place, so a pool that can grow would stay as it is."""
    allocator = started()
    allocator.turn(4, 4, (FleetDemand("a", 1, 5), FleetDemand("b", 0, 2, floor_slots=1)), 20.0)
    assert [(one.slots, one.lacks, one.ceiling) for one in allocator.decision.fleets] == [(3, 2, 3), (1, 1, 1)]
    assert allocator.requested(lease=4, pool_ceiling=None) == 3
    assert allocator.requested(lease=4, pool_ceiling=6) == 2, "the first of them as far as the autoscaler goes"
    allocator.budget = BUDGET.model_copy(update={"serving_ceiling_slots": 4})
    assert allocator.requested(lease=4, pool_ceiling=None) == 0, "serving may not have more, so nobody needs a machine"


@settings(max_examples=200)
@given(
    st.integers(1, 12),
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 8)), max_size=4)),
        min_size=1,
        max_size=30,
    ),
)
def test_what_is_promised_never_exceeds_what_there_is(slots: int, rounds: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
    """Jobs take what they were promised or give back down to it; serving holds what it holds."""
    allocator, now_s, holding, known = Allocator(BUDGET, 0.0), LISTEN_S, dict[str, int](), dict[str, Job]()
    for serving, wanted, jobs in rounds:
        now_s += 1
        known |= {str(n): job(str(n), least=least, most=least + more) for n, (least, more) in enumerate(jobs)}
        for id, one in known.items():
            allocator.heartbeat(Heartbeat(one, holding.get(id, 0)), now_s)
        held = min(serving, max(0, slots - sum(holding.values())))
        lease = allocator.turn(slots, held, fleet(min(wanted, slots)), now_s)
        grants = {id: grant.slots for id, grant in allocator.grants.items()}
        growing = sum(max(0, has - holding.get(id, 0)) for id, has in grants.items())
        assert 0 <= lease <= slots and growing <= max(0, slots - held - sum(holding.get(id, 0) for id in grants))
        assert sum(grants.values()) <= slots - lease
        holding = {id: has for id, has in grants.items() if has}


def test_of_two_processes_that_run_one_job_the_first_has_the_slots_until_it_is_silent() -> None:
    allocator = Allocator(Budget(), 0.0)
    allocator.heartbeat(Heartbeat(job("a"), held=2, driver="first"), 10.0)
    allocator.turn(3, 1, fleet(1), 10.1)
    assert allocator.heartbeat(Heartbeat(job("a"), driver="second"), 10.2).slots == 0 and allocator.held_by_jobs == 2
    allocator.end("a", "second")
    assert allocator.held_by_jobs == 2
    allocator.heartbeat(Heartbeat(job("a"), driver="second"), 10.0 + SILENT_S)
    allocator.turn(3, 1, fleet(1), 10.1 + SILENT_S)
    assert allocator.grant("a", 0).slots == 2


def waiting(*jobs: Job, held: int = 0) -> Allocator:
    """Each job waits, but the first one, which holds ``held``."""
    allocator = started(slots=8)
    for n, one in enumerate(jobs):
        allocator.heartbeat(Heartbeat(one, held=0 if n else held), 4.0)
    return allocator


def test_a_job_that_never_fits_is_not_asked_for() -> None:
    huge, fits = job("huge", most=9, least=9, priority=1), job("fits")
    assert waiting(huge, fits).requested(lease=1, pool_ceiling=None) == 10
    assert waiting(huge, fits).requested(lease=1, pool_ceiling=9) == 1
    assert waiting(huge, held=9).requested(lease=1, pool_ceiling=4) == 9, "what a job holds always counts"


def test_what_ray_train_asks_the_autoscaler_for_is_not_asked_for_again() -> None:
    allocator = started(slots=8)
    allocator.heartbeat(Heartbeat(job("trains"), held=4, requested=4), 4.0)
    assert allocator.requested(lease=1, pool_ceiling=None) == 0
    allocator.heartbeat(Heartbeat(job("trains"), held=4), 5.0)
    assert allocator.requested(lease=1, pool_ceiling=None) == 4


def test_of_jobs_that_fit_singly_but_not_together_the_first_are_asked_for() -> None:
    first, second, third = job("first", least=3, priority=2), job("second", least=2, priority=1), job("third")
    assert waiting(third, second, first).requested(lease=1, pool_ceiling=4) == 3
    assert waiting(third, second, first).requested(lease=0, pool_ceiling=4) == 4, "the third one beside the first"
    assert waiting(third, second, first).requested(lease=1, pool_ceiling=6) == 5


def converge(
    allocator: Allocator, lease: int, room: int, total: int, known: Ceiling, again: bool = False
) -> tuple[Ceiling, int, int]:
    """Ask until nothing more is learnt: what is known then, what is asked for, and how often the autoscaler refused on the way."""
    before, asked, refusals = None, 0, 0
    while again or asked > room or known != before:
        before, most = known, known.has(total).slots(again)
        asked, again = lease + allocator.requested(lease, most), False
        refused = asked > room
        known = known.has(total).refused(asked, total) if refused else known.has(total).granted(asked, most)
        refusals += refused
    return known, asked, refusals


def largest(allocator: Allocator, lease: int, room: int) -> int:
    return max(asked for most in range(room + 1) if (asked := lease + allocator.requested(lease, most)) <= room)


JOBS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=40)


def waiters(jobs: list[tuple[int, int]]) -> Allocator:
    return waiting(*(job(str(n), least=least, most=9, priority=priority) for n, (least, priority) in enumerate(jobs)))


def halvings(slots: int) -> int:
    return math.ceil(math.log2(max(1, slots)))


@given(st.integers(0, 4), st.integers(0, 12), st.integers(0, 12), JOBS)
def test_a_few_refusals_lead_to_the_largest_request_that_fits(
    lease: int, total: int, more: int, jobs: list[tuple[int, int]]
) -> None:
    """Nobody says how many slots there can be, only that so many there cannot."""
    allocator, room = waiters(jobs), max(lease, total + more)
    _, asked, refusals = converge(allocator, lease, room, total, Ceiling())
    assert asked == largest(allocator, lease, room)
    assert refusals <= 1 + halvings(lease + allocator.requested(lease, None) - total)


@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), JOBS), min_size=2, max_size=5))
def test_what_the_pool_can_have_is_learnt_anew_when_it_or_the_jobs_change(
    lease: int, rounds: list[tuple[int, int, list[tuple[int, int]]]]
) -> None:
    known = Ceiling()
    for total, more, jobs in rounds:
        allocator, room = waiters(jobs), max(lease, total + more)
        known, asked, refusals = converge(allocator, lease, room, total, known, again=True)
        assert asked == largest(allocator, lease, room)
        assert refusals <= 3 + 2 * halvings(360)


def test_a_refusal_that_is_tried_again_in_vain_costs_one_round() -> None:
    allocator = waiters([(1, 0)] * 100)
    known, asked, refusals = converge(allocator, 1, 4, 1, Ceiling())
    assert (known, asked) == (Ceiling(4, 5), 4) and refusals <= 7
    assert converge(allocator, 1, 4, 4, known, again=True) == (known, 4, 1)
    assert known.has(9) == known, "a pool that grows elsewhere is found when the refusal is tried again"
    assert Ceiling(2, 9).has(5) == Ceiling(5, 9)
