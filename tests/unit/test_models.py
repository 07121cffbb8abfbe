"""What `GET /v1/models` lists, and what one entry says."""

import pytest

from cluster.errors import ModelNotFound
from cluster.types import FleetState, Generation, ReplicaState, VersionId, View
from deployments.api.models import model, model_list
from deployments.routing.table import Table

FLEETS = {name: FleetState(name, name, (f"{name}@1",), f"fleet-{name}") for name in "mn"}


def table(*held: str, asleep: str = "") -> Table:
    """Aliases m, n and x. The fleet m runs one replica that holds ``held``; the fleets ``asleep`` have none."""
    moves = {
        name: Generation(alias=name, generation=1, stable=VersionId(name, 1), reason="", author="", time_s=7) for name in "nmx"
    }
    replicas = (ReplicaState("a", "", "", "m@1", dict.fromkeys(held, "d"), {}, 0, app="fleet-m"),) if held else ()
    made = Table()
    made.adopt(
        View(1, moves, replicas, {name: fleet for name, fleet in FLEETS.items() if name in asleep or (name == "m" and held)})
    )
    return made


def ids(table: Table) -> list[str]:
    return [entry["id"] for entry in model_list(table)["data"]]


def test_aliases_that_can_answer_come_first_then_every_held_version() -> None:
    assert ids(table("m@2", "m@1")) == ["m", "m@1", "m@2"]


def test_the_fleets_own_models_come_before_what_was_published_beside_them() -> None:
    """`springtide ask` without a model asks the first."""
    here = table("m@1", "a@1", asleep="n")
    beside = Generation(alias="a", generation=1, stable=VersionId("a", 1), reason="", author="", time_s=8)
    replicas = tuple(here.replicas.values())
    here.adopt(View(2, {**here.view.aliases, "a": beside}, replicas, here.view.fleets))
    assert ids(here) == ["m", "n", "a", "a@1", "m@1", "n@1"]


def test_what_a_sleeping_fleet_answers_for_is_there_and_what_nobody_hosts_is_not() -> None:
    """While no replica ran, every alias was listed, and pins were not."""
    assert ids(table(asleep="mn")) == ["m", "n", "m@1", "n@1"]
    assert ids(table("m@1", asleep="n")) == ["m", "n", "m@1", "n@1"]
    assert model(table(asleep="m"), "m@1")["version"] == "m@1"


def test_an_alias_that_nobody_hosts_is_said_to_be_so() -> None:
    with pytest.raises(ModelNotFound, match="no fleet hosts x@1"):
        model(table("m@1"), "x")


def test_one_entry_is_that_of_the_list() -> None:
    here = table("m@1", "m@2", asleep="n")
    assert [model(here, entry["id"]) for entry in model_list(here)["data"]] == model_list(here)["data"]
    for absent in ("x", "n@2", "o"):
        with pytest.raises(ModelNotFound):
            model(here, absent)
