"""The gateway's routing table: it follows the newest view, and chooses only who holds the version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest, ModelNotFound, NoReplica, WrongTask
from cluster.types import FleetState, Generation, ReplicaState, VersionId, View
from deployments.routing.engine_routes import ENGINE_ROUTES
from deployments.routing.table import SUSPECT_S, Table, Target

CHAT, EMBEDDINGS, TOKENIZE = (ENGINE_ROUTES[path] for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"))
V1, V2 = VersionId("m", 1), VersionId("m", 2)
FLEET = FleetState("m", "m", ("a@1", "m@1", "m@2"), "fleet-m")
OTHER = FleetState("n", "n", ("n@1",), "fleet-n")


def replica(id: str, *held: VersionId) -> ReplicaState:
    return ReplicaState(id, f"http://{id}", "secret", "m@1", {str(v): "digest" for v in held}, {}, 0, app="fleet-m")


def generation(n: int, version: VersionId) -> Generation:
    return Generation(alias="m", generation=n, stable=version, reason="", author="", time_s=0)


def table(*replicas: ReplicaState, live: VersionId = V1, revision: int = 1) -> Table:
    made = Table()
    made.adopt(View(revision, {"m": generation(1, live)}, replicas, {fleet.name: fleet for fleet in (FLEET, OTHER)}))
    return made


def test_an_alias_means_its_live_version_and_a_pin_means_itself() -> None:
    assert table(replica("a", V1, V2)).resolve("m")[0] == V1
    assert table(replica("a", V1, V2)).resolve("m@2") == (V2, None, "")


@pytest.mark.parametrize("replicas", [(), (replica("a", V1),)])
def test_a_version_that_no_replica_holds_and_no_fleet_lists_does_not_exist(replicas: tuple[ReplicaState, ...]) -> None:
    """Every pin counted as possible while no replica ran: `m@99` woke a fleet that sleeps, and waited for it two minutes."""
    with pytest.raises(ModelNotFound, match="no fleet answers for it"):
        table(*replicas).resolve("m@99")
    assert table(*replicas).resolve("m@2")[0] == V2, "the fleet lists it: it is about to be loaded, or the fleet sleeps"


def test_an_alias_whose_base_nobody_hosts_is_said_to_be_so_at_once() -> None:
    """It waited 30 s for a replica that nobody would start."""
    made = table(replica("a", V1), live=VersionId("unhosted", 1))
    with pytest.raises(ModelNotFound, match=r"no fleet hosts unhosted@1.*springtide models unhosted@1.*springtide fleets add"):
        made.resolve("m")
    assert not made.askable("unhosted@1")


def test_the_fleet_that_has_no_replica_is_woken_although_another_runs() -> None:
    """A fleet was woken only where no replica ran at all."""
    made = table(replica("a", V1))
    assert made.fleet_to_wake("n@1") == OTHER and made.askable("n@1")
    assert made.fleet_to_wake("m@2") is None and not made.askable("m@2"), "its fleet runs: a replica loads it, or nobody will"
    assert made.fleet_to_wake("m@1") is None and made.fleet_to_wake("nobody@1") is None
    assert sorted(made.versions()) == ["m@1", "n@1"]


def test_a_fleet_sleeps_again_when_its_last_replica_has_left() -> None:
    made = table(replica("a", V1), replica("b", V1))
    for revision, left in ((2, (replica("b", V1),)), (3, ())):
        made.adopt(View(revision, {"m": generation(1, V1)}, left, {"m": FLEET}))
    assert made.fleet_to_wake("m@1") == FLEET
    with pytest.raises(ModelNotFound):
        made.resolve("n@1")


@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.sets(st.sampled_from([V1, V2]))), max_size=6))
def test_what_a_table_learns_step_by_step_is_what_it_learns_at_once(views: list[dict[str, set[VersionId]]]) -> None:
    stepwise, whole = Table(), Table()
    for revision, held in enumerate(views, 1):
        news = View(revision, {}, tuple(replica(id, *versions) for id, versions in held.items()), {"m": FLEET} if held else {})
        stepwise.adopt(news)
        whole = Table()
        whole.adopt(news)
    assert +stepwise.running == +whole.running and stepwise.holders == whole.holders and stepwise.listed_by == whole.listed_by


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


TWINS = {name: FleetState(name, name, ("m@1",), f"fleet-{name}") for name in ("chat", "batch")}
"""Two fleets that host the same weights."""


def twins(*replicas: ReplicaState, **surges: str) -> Table:
    made, fleets = Table(), {name: fleet._replace(surge=surges.get(name, "")) for name, fleet in TWINS.items()}
    moves = {name: generation(1, V1).model_copy(update={"alias": name}) for name in ("chat", "batch", "poet", "stray")}
    made.adopt(View(1, moves, replicas, fleets, {"chat": "chat", "batch": "batch", "poet": "batch", "stray": ""}))
    return made


def in_app(id: str, app: str, *held: VersionId) -> ReplicaState:
    return replica(id, *held)._replace(app=app)


def chosen(made: Table, model: str, tried: frozenset[str] = frozenset()) -> set[str]:
    version, _, fleet = made.resolve(model)
    return {made.choose(version, 0, tried, fleet).id for _ in range(40)}


def test_fleets_that_host_the_same_weights_do_not_answer_each_others_requests() -> None:
    """Any replica that held the version was taken, so one fleet's load used the slots of the other."""
    made = twins(in_app("c", "fleet-chat", V1), in_app("b", "fleet-batch", V1))
    made.in_flight["c"] = 30
    assert chosen(made, "chat") == {"c"} and chosen(made, "batch") == {"b"}
    assert chosen(made, "poet") == {"b"}, "control says where an adapter's alias belongs"
    made.in_flight["c"] = 0
    assert chosen(made, "m@1") == chosen(made, "stray") == {"b", "c"}, "whoever names the version gets any holder"


def test_a_fleets_surge_answers_for_it() -> None:
    made = twins(in_app("s", "surge-chat@m-1", V1), in_app("b", "fleet-batch", V1), chat="surge-chat@m-1")
    assert chosen(made, "chat") == {"s"} and chosen(made, "batch") == {"b"}
    made.adopt(made.view._replace(revision=2, fleets=TWINS))
    assert chosen(made, "chat") == {"s", "b"}, "it is no surge of chat's any more"


def test_another_fleet_answers_while_the_own_one_has_nobody_left() -> None:
    made = twins(in_app("c", "fleet-chat", V1), in_app("b", "fleet-batch", V1))
    assert chosen(made, "chat", tried=frozenset({"c"})) == {"b"}
    made.adopt(made.view._replace(revision=2, replicas=(in_app("c", "fleet-chat"), in_app("b", "fleet-batch", V1))))
    assert chosen(made, "chat") == {"b"}, "it swaps its weights"
    made.adopt(made.view._replace(revision=3, replicas=(in_app("c", "fleet-chat", V1), in_app("b", "fleet-batch", V1))))
    assert chosen(made, "chat") == {"c"}, "it is back"
    with pytest.raises(NoReplica):
        chosen(made, "chat", tried=frozenset("bc"))


def test_a_fleet_of_suspects_leaves_its_requests_to_another() -> None:
    """Both attempts of each request went to the two dead replicas of its own fleet."""
    made = twins(in_app("c", "fleet-chat", V1), in_app("d", "fleet-chat", V1), in_app("b", "fleet-batch", V1))
    made.suspect("c", 0)
    assert chosen(made, "chat") == {"d"}
    made.suspect("d", 0)
    assert chosen(made, "chat") == {"b"}


def test_a_version_that_no_replica_of_a_running_fleet_holds_waits_for_a_place() -> None:
    """Its requests gave up after seconds, while the replica with a place for it started."""
    made = twins(in_app("c", "fleet-chat", V2))
    assert made.unplaced(Target(V1, None, "chat")) and not made.unplaced(Target(V2, None, "chat"))
    assert not made.unplaced(Target(V1, None, "batch")), "it has no replica, and is woken"
    made = twins(in_app("c", "fleet-chat"))
    assert not made.unplaced(Target(V1, None, "chat")), "it swaps its weights, for a moment"


def test_of_two_fleets_that_sleep_the_alias_wakes_its_own() -> None:
    made = twins()
    assert made.fleet_to_wake("m@1", "batch") == TWINS["batch"] and made.fleet_to_wake("m@1") == TWINS["chat"]


def test_a_fleet_is_asleep_while_it_has_no_replica_whoever_else_answers() -> None:
    made = twins(in_app("c", "fleet-chat", V1))
    assert made.asleep("batch") == TWINS["batch"] and made.asleep("chat") is None and made.asleep("") is None


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


def test_a_route_is_answered_by_a_fleet_of_its_task() -> None:
    """An engine of another task answers with its web server's 404, and was taken for a lost replica."""
    made = tasks(chat="generate", batch="embed")
    assert made.resolve_for(CHAT, "chat").fleet == "chat" and made.resolve_for(EMBEDDINGS, "batch").fleet == "batch"
    with pytest.raises(WrongTask, match="batch is of the task embed, and /v1/chat/completions is for generate"):
        made.resolve_for(CHAT, "batch")
    with pytest.raises(WrongTask):
        made.resolve_for(EMBEDDINGS, "chat")
    assert made.resolve_for(TOKENIZE, "batch") and made.resolve_for(TOKENIZE, "chat"), "every model has a tokenizer"


def test_who_pins_a_version_of_two_fleets_gets_the_one_of_the_routes_task() -> None:
    made = tasks(chat="generate", batch="embed")
    assert (made.resolve_for(CHAT, "m@1").fleet, made.resolve_for(EMBEDDINGS, "m@1").fleet) == ("chat", "batch")
    assert tasks(chat="generate", batch="generate").resolve_for(CHAT, "m@1").fleet == "", "any holder is as good"
    with pytest.raises(WrongTask):
        tasks(chat="generate", batch="generate").resolve_for(EMBEDDINGS, "m@1")


def test_no_replica_of_another_task_stands_in() -> None:
    """While the fleet sleeps, another one with the same weights would answer with 404."""
    made = tasks(chat="generate", batch="embed")
    assert made.choose(V1, 0, frozenset(), "batch").id == "b"
    with pytest.raises(NoReplica):
        made.choose(V1, 0, frozenset("b"), "batch")
    assert tasks(chat="embed", batch="embed").choose(V1, 0, frozenset("b"), "batch").id == "c"


def test_a_version_whose_fleet_is_not_known_is_not_refused() -> None:
    made = Table()
    made.adopt(View(1, {"m": generation(1, V1)}, (replica("a", V1),)))
    assert made.task("m@1") == "" and made.resolve_for(EMBEDDINGS, "m").version == made.resolve_for(CHAT, "m@1").version == V1


def tasks(**tasks: str) -> Table:
    """`twins` with these tasks."""
    made = twins(in_app("c", "fleet-chat", V1), in_app("b", "fleet-batch", V1))
    fleets = {name: fleet._replace(task=tasks[name]) for name, fleet in TWINS.items()}  # pyright: ignore[reportArgumentType]
    made.adopt(made.view._replace(revision=2, fleets=fleets))
    return made


def test_a_replica_whose_engine_has_ended_is_chosen_no_more_and_its_versions_stay_known() -> None:
    """Control hears of it a moment later. Until then requests wait, and are not told that their version does not exist."""
    made = table(replica("a", V1))
    made.bury("a")
    made.bury("nobody")
    assert made.answering == 0 and made.resolve("m")[0] == V1
    with pytest.raises(NoReplica):
        made.choose(V1, 0)
    made.adopt(View(2, {"m": generation(1, V1)}, (replica("b", V1),), {"m": FLEET}))
    assert made.answering == 1 and made.choose(V1, 0).id == "b" and not made.buried


def test_a_replica_that_has_started_another_engine_is_chosen_again() -> None:
    made = table(replica("a", V1))
    made.bury("a")
    made.adopt(View(2, {"m": generation(1, V2)}, (replica("a", V2),), {"m": FLEET}))
    assert made.choose(V2, 0).id == "a"
