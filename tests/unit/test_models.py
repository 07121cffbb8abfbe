"""What `GET /v1/models` lists, and what one entry says."""

import pytest

from cluster.errors import ModelNotFound
from cluster.types import Generation, ReplicaState, VersionId, View
from deployments.api.models import model, model_list


def view(*held: str) -> View:
    moves = {
        name: Generation(alias=name, generation=1, stable=VersionId(name, 1), reason="", author="", time_s=7) for name in "nm"
    }
    return View(1, moves, (ReplicaState("a", "", "", "m@1", dict.fromkeys(held, "d"), {}, 0),))


def test_aliases_that_can_answer_come_first_then_every_held_version() -> None:
    assert [entry["id"] for entry in model_list(view("m@2", "m@1"))["data"]] == ["m", "m@1", "m@2"]


def test_while_no_replica_runs_every_alias_is_there() -> None:
    asleep = view()._replace(replicas=())
    assert [entry["id"] for entry in model_list(asleep)["data"]] == ["m", "n"] and model(asleep, "m")["version"] == "m@1"
    with pytest.raises(ModelNotFound):
        model(asleep, "m@1")


def test_one_entry_is_that_of_the_list() -> None:
    here = view("m@1", "m@2")
    assert [model(here, entry["id"]) for entry in model_list(here)["data"]] == model_list(here)["data"]
    for absent in ("n", "n@1", "o"):
        with pytest.raises(ModelNotFound):
            model(here, absent)
