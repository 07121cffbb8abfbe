"""Telling what changed is as good as telling all."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.control.gateways import Gateways
from cluster.types import EMPTY_VIEW, FleetState, Generation, ReplicaState, VersionId, View
from cluster.view import apply, delta
from deployments.routing.table import Table

HELD = st.dictionaries(st.sampled_from(["m@1", "m@2", "n@1"]), st.sampled_from("de"))
REPLICAS = st.dictionaries(st.sampled_from("abcd"), HELD)
ALIASES = st.dictionaries(st.sampled_from("mno"), st.integers(1, 3))
VIEWS = st.lists(st.tuples(ALIASES, REPLICAS, st.booleans()), max_size=12)


def aliases(generations: dict[str, int]) -> dict[str, Generation]:
    return {
        name: Generation(alias=name, generation=n, stable=VersionId(name, n), reason="", author="", time_s=0)
        for name, n in generations.items()
    }


def replicas(held: dict[str, dict[str, str]]) -> tuple[ReplicaState, ...]:
    return tuple(
        ReplicaState(id, f"http://{id}", "secret", "m@1", versions, {}, 0, app=f"fleet-{id}") for id, versions in held.items()
    )


def fleets(held: dict[str, dict[str, str]]) -> dict[str, FleetState]:
    """Any fleets that differ where the replicas differ."""
    return {id: FleetState(id, id, tuple(sorted(versions)), f"fleet-{id}") for id, versions in held.items()}


def alias_fleets(generations: dict[str, int], held: dict[str, dict[str, str]]) -> dict[str, str]:
    """Any assignment of aliases that changes with the replicas."""
    return {name: str(len(held)) if n > 1 else "" for name, n in generations.items()}


def known(table: Table) -> tuple[Any, ...]:
    listed = {id: sorted(table._holding(id)) for id in table.holders}
    assert listed == {id: sorted(group) for id, group in table.holders.items()}
    for id, group in table.holders.items():
        by_fleet = {name: sorted(table._holding(id, name)) for name in table.view.fleets}
        assert by_fleet == {name: sorted(one for one in group if f"fleet-{name}" == table.replicas[one].app) for name in by_fleet}
    return (
        table.view.revision,
        table.view.aliases,
        sorted(table.view.replicas),
        sorted(table.replicas.values()),
        listed,
        table.view.fleets,
        table.view.alias_fleets,
    )


@given(ALIASES, REPLICAS, ALIASES, REPLICAS)
def test_a_view_and_what_changed_make_the_next_view_but_no_alias_goes_back(
    before: dict[str, int], there: dict[str, dict[str, str]], after: dict[str, int], then: dict[str, dict[str, str]]
) -> None:
    old = View(1, aliases(before), replicas(there), fleets(there), alias_fleets(before, there))
    new = View(2, aliases(after), replicas(then), fleets(then), alias_fleets(after, then))
    made = apply(old, delta(old, new))
    assert made.aliases == aliases({name: max(n, before.get(name, n)) for name, n in after.items()})
    assert sorted(made.replicas) == sorted(new.replicas) and made.revision == 2
    assert made.fleets == new.fleets and made.alias_fleets == new.alias_fleets


def test_the_move_of_one_alias_tells_of_no_other_alias() -> None:
    """Gateways hear of a move twice a second; the fleets of ten thousand aliases must not travel with it."""
    many = {f"a{n}": 1 for n in range(1000)}
    old = View(1, aliases(many), (), {}, dict.fromkeys(many, "chat"))
    moved = delta(old, old._replace(aliases=aliases({**many, "a1": 2})))
    assert list(moved.moves) == ["a1"] and not moved.alias_fleets and not moved.empty
    homeless = delta(old, old._replace(alias_fleets={**old.alias_fleets, "a2": ""}))
    assert homeless.alias_fleets == {"a2": ""} and not homeless.moves and not homeless.empty


@given(VIEWS)
def test_a_gateway_that_misses_some_of_it_knows_after_the_next_word_what_one_knows_that_hears_all(views: list[Any]) -> None:
    here, whole, gateways, moved = Table(), Table(), Gateways(), dict[str, int]()
    deaf = False

    def tell(method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        if method == "adopt" and not deaf:
            here.adopt(arguments[0])
        return [] if method == "adopt" and deaf else [here.view.revision]

    gateways._tell = tell  # type: ignore[method-assign]
    for generations, held, misses in views:
        deaf, before = misses, gateways.current.revision
        moved |= {name: max(n, moved.get(name, n)) for name, n in generations.items()}
        gateways.announce(aliases(moved), replicas(held), fleets(held), alias_fleets(moved, held))
        if gateways.current is not EMPTY_VIEW:
            whole.adopt(gateways.current)
        assert deaf or gateways.current.revision == before or known(here) == known(whole)


def test_a_gateway_that_is_ahead_of_a_new_control_hears_all_under_a_revision_above_its_own() -> None:
    here, gateways, told = Table(), Gateways(), list[str]()
    here.adopt(View(2**62, aliases({"m": 3}), replicas({"old": {}})))

    def tell(method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        if method == "adopt":
            told.append(type(arguments[0]).__name__)
            here.adopt(arguments[0])
        return [here.view.revision]

    gateways._tell = tell  # type: ignore[method-assign]
    assert gateways.announce(aliases({"m": 2}), replicas({"new": {"m@2": "d"}}), {}, {})
    assert told == ["ViewDelta", "View"] and here.view.revision == 2**62 + 1 == gateways.current.revision
    assert here.view.aliases["m"].generation == 3 and [one.id for one in here.view.replicas] == ["new"]
