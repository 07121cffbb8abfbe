"""What a hand-over took, read from the record of who held what."""

from cluster.capacity.handover import Allocation, Handover, SlotSnapshot, doubly_owned, handovers


def at(at_s: float, grant: int, held: int, active: int, serving: int = 1) -> SlotSnapshot:
    return SlotSnapshot(at_s, 4, serving, serving, serving, (Allocation("a", grant, held, active),))


def test_a_yield_is_timed_from_the_decision_to_the_slots_and_to_the_training() -> None:
    snapshots = [at(0, 3, 3, 3), at(10, 1, 3, 3), at(11, 1, 1, 0), at(11.5, 1, 1, 1)]
    assert handovers(snapshots) == [Handover(10, "a", "yield", 3, 1, 1.0, 1.5)]


def test_a_yield_of_everything_has_no_training_after_it() -> None:
    assert handovers([at(0, 3, 3, 3), at(1, 0, 3, 3), at(2, 0, 0, 0)]) == [Handover(1, "a", "yield", 3, 0, 1.0, None)]


def test_a_growth_is_timed_until_the_new_workers_train() -> None:
    snapshots = [at(0, 1, 1, 1), at(5, 3, 1, 1), at(5.5, 3, 3, 1), at(9, 3, 3, 3)]
    assert handovers(snapshots) == [Handover(5, "a", "grow", 1, 3, None, 4.0)]


def test_what_was_overtaken_by_another_decision_is_one_hand_over() -> None:
    snapshots = [at(0, 3, 3, 3), at(1, 2, 3, 3), at(2, 1, 3, 3), at(3, 1, 1, 1)]
    assert handovers(snapshots) == [Handover(1, "a", "yield", 3, 1, 2.0, 2.0)]


def test_a_hand_over_that_was_called_off_is_none() -> None:
    assert handovers([at(0, 2, 2, 2), at(1, 3, 2, 2), at(2, 2, 2, 2)]) == []


def test_two_owners_of_a_slot_are_seen() -> None:
    assert doubly_owned([at(0, 3, 3, 3, serving=1), at(1, 3, 3, 3, serving=2)]) == [at(1, 3, 3, 3, serving=2)]


def test_slots_are_free_when_the_last_of_overlapping_yields_has_given_them_back() -> None:
    [done] = handovers([at(0, 3, 3, 3), at(1, 2, 3, 3), at(2, 2, 2, 2 - 1), at(3, 1, 2, 1), at(9, 1, 1, 1)])
    assert done.slots_free_s == 8
