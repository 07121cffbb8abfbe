"""Which replicas hold which adapters."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cluster.control import describe
from cluster.errors import VersionRefused
from cluster.publishing.adapter_placement import AdapterPlacement, WantedAdapters, assign, combine
from cluster.publishing.placement import count_holders, routable
from cluster.types import Generation, ReplicaBounds, ReplicaState, VersionId
from tests.controlled import Controlled, adapter, stop_all, two_fleets, wait_until

NAMES = [f"a@{n}" for n in range(1, 31)]


def live(*adapters: str) -> WantedAdapters:
    return WantedAdapters(adapters)


def replica(id: str, *held: str) -> ReplicaState:
    return ReplicaState(id, f"http://{id}", "secret", "m@1", dict.fromkeys(("m@1", *held), "digest"), {}, 0)


def follow(replicas: list[ReplicaState], placement: AdapterPlacement) -> list[ReplicaState]:
    """The replicas when each holds what it must and no more."""
    return [replica(one.id, *placement.assigned[one.id]) for one in replicas]


def copies(placement: AdapterPlacement) -> Counter[str]:
    return Counter(id for ids in placement.assigned.values() for id in ids)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[str], list[ReplicaState], int]:
    places = draw(st.integers(1, 8))
    held = st.lists(st.sampled_from(NAMES), unique=True, max_size=places)
    replicas = [replica(f"r{n}", *draw(held)) for n in range(draw(st.integers(1, 6)))]
    return draw(st.lists(st.sampled_from(NAMES), unique=True)), replicas, places


def test_while_all_adapters_fit_every_replica_holds_all_of_them() -> None:
    placement = assign(live("a@1", "a@2"), [replica("r"), replica("s", "a@2")], places=2)
    assert placement == AdapterPlacement({"r": ("a@1", "a@2"), "s": ("a@1", "a@2")}, {}, 1)


def test_a_place_that_a_live_adapter_lacks_is_no_candidates() -> None:
    """A candidate that was held already kept its place, and a live adapter had none."""
    placement = assign(WantedAdapters(("a@1", "a@2"), ("candidate@1",)), [replica("r", "a@1", "candidate@1")], places=2)
    assert set(placement.assigned["r"]) == {"a@1", "a@2"}
    assert placement.copies["candidate@1"] == 0 and placement.replicas_needed == 2
    assert placement.unplaced == (), "it is not live yet"


def test_a_replica_that_is_left_alone_keeps_the_live_adapters_that_it_answers_for() -> None:
    """The first adapters by name took their places: what answered was unloaded, for what did not."""
    placement = assign(live("a@1", "b@1"), [replica("r", "b@1")], places=1)
    assert placement.assigned["r"] == ("b@1",) and placement.unplaced == ("a@1",)


def test_the_placements_of_a_fleet_and_its_surge_are_one() -> None:
    """What the surge had no place for had none at all."""
    fleet = assign(live("a@1", "a@2", "a@3"), [replica("r"), replica("s")], places=2)
    surge = assign(live("a@1", "a@2", "a@3"), [replica("t")], places=2)
    whole = assign(live("a@1", "a@2", "a@3"), [replica("u")], places=3)
    both = combine([fleet, surge])
    assert surge.unplaced and both.unplaced == () and all(both.copies[id] >= 1 for id in ("a@1", "a@2", "a@3"))
    assert both.replicas_needed == 2 and both.assigned.keys() == {"r", "s", "t"}
    assert combine([surge, whole]).copies == {id: count + 1 for id, count in surge.copies.items()}
    assert combine([]) == AdapterPlacement({}, {})


@given(fleets())
def test_so_many_replicas_as_are_needed_have_a_place_for_every_adapter(fleet: tuple[list[str], list[ReplicaState], int]) -> None:
    adapters, replicas, places = fleet
    needed = assign(live(*adapters), replicas, places).replicas_needed
    more = [*replicas, *(replica(f"new{n}") for n in range(needed))][: max(1, needed)]
    assert assign(live(*adapters), more, places).unplaced == ()
    if needed > 1:
        assert assign(live(*adapters), more[: needed - 1], places).unplaced


@given(fleets())
def test_no_replica_has_more_than_its_places_and_no_adapter_is_left_out_while_there_is_one(
    fleet: tuple[list[str], list[ReplicaState], int],
) -> None:
    adapters, replicas, places = fleet
    placement = assign(live(*adapters), replicas, places)
    assert all(len(set(ids)) == len(ids) <= places for ids in placement.assigned.values())
    found = copies(placement)
    assert sum(id in found for id in adapters) == min(len(adapters), len(replicas) * places)
    assert all(found[id] == count for id, count in placement.copies.items())


@given(fleets())
def test_replicas_that_hold_what_they_must_are_asked_for_nothing_else(fleet: tuple[list[str], list[ReplicaState], int]) -> None:
    adapters, replicas, places = fleet
    placement = assign(live(*adapters), replicas, places)
    again = assign(live(*adapters), follow(replicas, placement), places)
    assert {id: set(ids) for id, ids in again.assigned.items()} == {id: set(ids) for id, ids in placement.assigned.items()}


@given(fleets(), st.data())
def test_a_replica_that_goes_moves_only_what_it_held(
    fleet: tuple[list[str], list[ReplicaState], int], data: st.DataObject
) -> None:
    adapters, replicas, places = fleet
    before = assign(live(*adapters), replicas, places)
    gone = data.draw(st.sampled_from(replicas)).id
    left = [one for one in follow(replicas, before) if one.id != gone]
    after = assign(live(*adapters), left, places)
    for one in left:
        new = set(after.assigned[one.id]) - set(before.assigned[one.id])
        assert all(id in before.assigned[gone] or not before.copies.get(id, 1) for id in new) or len(adapters) <= places


def test_an_adapter_that_one_of_four_replicas_must_hold_moves_when_that_one_holds_it() -> None:
    """It used to wait for half of all replicas."""

    def move(generation: int) -> Generation:
        stable = VersionId("a", generation)
        return Generation(alias="a", generation=generation, stable=stable, reason="", author="", time_s=0)

    four = (replica("r", "a@2"), replica("s", "a@1"), replica("t", "a@1"), replica("u"))
    history = [move(1), move(2)]
    assert routable(history, count_holders(four), history[0]).generation == 1
    assert routable(history, count_holders(four), history[0], {"a@2": 1}).generation == 2


def test_a_fleet_serves_more_adapters_than_one_engine_has_places_for(tmp_path: Path) -> None:
    """Every live adapter had to be on every replica, so one more than `max_cpu_loras` was refused."""
    config, registry, machines = two_fleets(tmp_path, {"max_cpu_loras": 2, "max_loras": 1})
    machines.places = 2
    machines.start("replica-m2", "fleet-m", VersionId("m", 1))
    try:
        control = Controlled(config, machines)
        made = [adapter(registry, tmp_path, VersionId("m", 1), n, f"tenant-{n}") for n in range(5)]
        for one in made[:4]:
            assert control.publish(one.id, one.id.name).stage == "live"
        wait_until(lambda: all(len(held_of(control, name)) == 2 for name in ("replica-m", "replica-m2")))
        held = held_of(control, "replica-m") | held_of(control, "replica-m2")
        assert held == {str(one.id) for one in made[:4]}
        with pytest.raises(VersionRefused, match="all 4 places for adapters of the fleet m are taken"):
            control.publish(made[4].id, made[4].id.name)
        machines.start("replica-m3", "fleet-m", VersionId("m", 1))
        wait_until(lambda: "replica-m3" in {one.id for one in control.replicas.states})
        assert control.publish(made[4].id, made[4].id.name).stage == "live"
    finally:
        stop_all()


def test_a_fleet_keeps_as_many_replicas_as_its_adapters_need(tmp_path: Path) -> None:
    """Serve ended a replica when the load fell, and adapters beyond the other's places had no replica."""
    config, registry, machines = two_fleets(tmp_path, {"max_cpu_loras": 1, "max_loras": 1, "max_replicas": 2})
    machines.places = 1
    try:
        control = Controlled(config, machines)
        first, second = (adapter(registry, tmp_path, VersionId("m", 1), n, f"tenant-{n}") for n in range(2))
        assert control.publish(first.id, "tenant-0").stage == "live"
        asked = threading.Thread(target=control.publish, args=(second.id, "tenant-1"), daemon=True)
        asked.start()
        wait_until(lambda: machines.there["replica-m"].bounds == ReplicaBounds(2))
        assert asked.is_alive(), "it waits for the replica that Serve starts"
        machines.start("replica-m2", "fleet-m", VersionId("m", 1))
        asked.join(20)
        wait_until(lambda: control.view.aliases["tenant-1"].stable == second.id)
        del machines.there["replica-m"]
        control.replicas.leave("replica-m")
        wait_until(lambda: "no place for tenant-0@1" in {one["words"] for one in listed(control)})
        assert held_of(control, "replica-m2") == {"tenant-1@1"}, "it goes on with what it answered for"
    finally:
        stop_all()


def listed(control: Controlled) -> list[dict[str, Any]]:
    """What `springtide fleets` prints."""
    known, replicas = control.applications.known, control.replicas.states
    return [describe.fleet(one, replicas, known) for one in list(control.hosting.fleets.values())]


def held_of(control: Controlled, id: str) -> set[str]:
    """The adapters that a replica holds."""
    return {version for version in control.machines.there[id].held if version != "m@1"}
