"""The gateway's routing table: it follows the newest view, and chooses only who holds the version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest, ModelNotFound, NoReplica
from cluster.types import Generation, ReplicaState, VersionId, View
from deployments.routing.table import SUSPECT_S, Table

V1, V2 = VersionId("m", 1), VersionId("m", 2)


def replica(id: str, *held: VersionId) -> ReplicaState:
    return ReplicaState(id, f"http://{id}", "secret", "m@1", {str(v): "digest" for v in held}, {}, 0)


def generation(n: int, version: VersionId) -> Generation:
    return Generation(alias="m", generation=n, stable=version, reason="", author="", time_s=0)


def table(*replicas: ReplicaState, live: VersionId = V1, revision: int = 1) -> Table:
    made = Table()
    made.adopt(View(revision, {"m": generation(1, live)}, replicas))
    return made


def test_an_alias_means_its_live_version_and_a_pin_means_itself() -> None:
    assert table(replica("a", V1, V2)).resolve("m")[0] == V1
    assert table(replica("a", V1, V2)).resolve("m@2") == (V2, None)


def test_a_version_that_nobody_holds_does_not_exist_unless_no_replica_is_there_to_ask() -> None:
    with pytest.raises(ModelNotFound, match="m@1"):
        table(replica("a", V1)).resolve("m@2")
    assert table().resolve("m@2") == (V2, None)


def test_an_alias_never_goes_back_although_control_was_restarted_and_says_so() -> None:
    here = table(replica("a", V1, V2))
    here.adopt(View(2, {"m": generation(7, V2)}, (replica("a", V1, V2),)))
    here.adopt(View(3, {"m": generation(6, V1)}, (replica("a", V1, V2),)))
    assert here.resolve("m")[0] == V2 and here.view.revision == 3


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="m"):
        table().resolve("gpt-4")


@pytest.mark.parametrize("bad", ["m@", "m@0", "m@-1", "m@x", "@1", "m@1@2", "m@00001", "../m@1", "m@" + "9" * 40])
def test_a_malformed_pin_is_a_bad_request(bad: str) -> None:
    with pytest.raises(BadRequest):
        table().resolve(bad)


def test_an_older_view_is_ignored() -> None:
    newer = table(revision=5, live=V2)
    assert not newer.adopt(View(4, {"m": generation(1, V1)}, ()))
    assert newer.resolve("m")[0] == V2


def test_only_a_replica_that_holds_the_version_is_chosen() -> None:
    assert {table(replica("a", V1), replica("b", V1, V2)).choose(V2, 0).id for _ in range(20)} == {"b"}


def test_before_the_first_view_nothing_is_said_not_to_exist() -> None:
    with pytest.raises(NoReplica):
        Table().resolve("m")


def test_the_least_busy_replica_is_chosen() -> None:
    made = table(replica("a", V1), replica("b", V1))
    made.in_flight["a"] = 3
    assert made.choose(V1, 0).id == "b"


def test_a_suspect_is_chosen_last_and_forgiven_later() -> None:
    made = table(replica("a", V1), replica("b", V1))
    made.in_flight["b"] = 3
    made.suspect("a", 10)
    assert made.choose(V1, 10.1).id == "b"
    assert made.choose(V1, 10.1, tried=frozenset({"b"})).id == "a", "a suspect is better than nobody"
    assert made.choose(V1, 10.1 + SUSPECT_S).id == "a"


def test_many_replicas_share_the_load_although_each_request_looks_at_few() -> None:
    made = table(*(replica(f"r{n}", V1) for n in range(400)))
    for _ in range(4000):
        made.in_flight[made.choose(V1, 0).id] += 1
    assert max(made.in_flight.values()) <= 13 and min(made.in_flight[f"r{n}"] for n in range(400)) >= 5, "10 each on average"


def test_what_was_tried_is_not_chosen_of_many_either() -> None:
    made = table(*(replica(f"r{n}", V1) for n in range(40)))
    assert made.choose(V1, 0, tried=frozenset(f"r{n}" for n in range(39))).id == "r39"


def test_an_error_names_only_so_many_models() -> None:
    made = Table()
    made.adopt(View(1, {f"m{n}": generation(1, V1) for n in range(5000)}, (replica("a", V1),)))
    with pytest.raises(ModelNotFound, match=r"and 4981 more") as caught:
        made.resolve("gpt-4")
    assert len(str(caught.value)) < 500


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_requests_spread_evenly(order: list[str]) -> None:
    made = table(*(replica(id, V1) for id in "abcd"))
    for _ in order:
        made.in_flight[made.choose(V1, 0).id] += 1
    counts = [made.in_flight[id] for id in "abcd"]
    assert max(counts) - min(counts) <= 1
