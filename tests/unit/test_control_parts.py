"""Control's decisions, without Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.control import adapters
from cluster.control.applications import Application, Applications
from cluster.control.cold_starts import ColdStarts, FailedStart, Starting, stage
from cluster.control.describe import fleet as described_fleet
from cluster.control.describe import phase, public, surge
from cluster.control.desired import Desired
from cluster.control.gateways import Gateways
from cluster.control.hosting import Fleet, Hosting
from cluster.control.replicas import Orders, Replicas
from cluster.publishing.placement import count_holders, fleet_state, lacks, routable, target_weights, warmth
from cluster.types import ColdStage, ColdStart, File, Generation, Lineage, Manifest, ReplicaState, VersionId, View
from cluster.view import delta
from tests.controlled import adapter as make_adapter
from tests.controlled import no_serve, two_fleets
from tests.waiting import when

ONE, TWO = VersionId("m", 1), VersionId("m", 2)
ADAPTER = Manifest(
    id=TWO, kind="adapter", base=ONE, files=(File(path="a", sha256="s", size_bytes=1),), lineage=Lineage(), created_s=0
)


def move(generation: int, version: VersionId) -> Generation:
    return Generation(alias="m", generation=generation, stable=version, reason="", author="", time_s=0)


def replica(held: dict[str, str], base: str = "m@1", running: int = 0) -> ReplicaState:
    return ReplicaState("r", "http://r", "secret", base, held, {}, running)


def generation(history: Sequence[Generation], replicas: Sequence[ReplicaState], announced: Generation | None = None) -> int:
    """The one that gateways should route by."""
    return routable(history, count_holders(replicas), announced).generation


def test_an_alias_moves_only_when_somebody_can_answer_for_it() -> None:
    history = [move(1, ONE), move(2, TWO)]
    assert generation(history, (replica({"m@1": "d"}),)) == 1
    assert generation(history, (replica({"m@1": "d", "m@2": "e"}),)) == 2
    assert generation(history, ()) == 2


def test_everybody_moves_only_when_half_of_the_replicas_can_bear_it() -> None:
    """Weights are taken over one replica after another; the first must not get everybody's requests."""
    history, old, new = [move(1, ONE), move(2, TWO)], replica({"m@1": "d"}), replica({"m@2": "e"}, "m@2")
    assert generation(history, (new, old, old), history[0]) == 1
    assert generation(history, (new, old, new, old), history[0]) == 2
    assert generation(history, (replica({}), new, old), history[0]) == 2, "one that is steered around answers for nobody"
    shared = move(2, ONE).model_copy(update={"canary": TWO, "percent": 25})
    assert generation([history[0], shared], (new, old, old, old), history[0]) == 2, "a canary's share is its share"


def test_requests_wait_for_the_newest_move_where_nobody_can_answer_for_any() -> None:
    history = [move(1, ONE), move(2, TWO)]
    assert generation(history, (replica({}),), history[0]) == 2


def test_the_holders_are_counted_once_however_many_aliases_a_fleet_has() -> None:
    """Every alias looked through all replicas in every turn: 300 aliases and 1,000 replicas were 300,000 looks."""

    class Held(dict[str, str]):
        def __iter__(self) -> Any:
            looks.append("iterated")
            return super().__iter__()

        def __contains__(self, id: object) -> bool:
            looks.append("asked")
            return super().__contains__(id)

    looks: list[str] = []
    holders = count_holders([replica(Held({"m@1": "d", "m@2": "e"})), replica(Held({"m@1": "d"})), replica(Held())])
    assert holders.answering == 2 and holders.by_version == {"m@1": 2, "m@2": 1}
    for _ in range(300):
        assert routable([move(1, ONE), move(2, TWO)], holders).generation == 2
    assert looks == ["iterated"] * 2


def test_a_canary_that_a_second_fleet_hosts_takes_no_replica_of_the_first() -> None:
    shared = move(2, ONE).model_copy(update={"canary": TWO, "percent": 50})
    two = (replica({}), replica({})._replace(id="s"))
    assert sorted(map(str, target_weights(two, shared, lambda id: id).values())) == ["m@1", "m@2"]
    assert set(target_weights(two, shared, lambda id: id, TWO).values()) == {ONE}


def test_an_adapter_hears_that_its_weights_were_refused() -> None:
    refusing = replica({}, base="other@1")._replace(refused={"m@1": "out of memory"})
    assert "could not load m@1: out of memory" in warmth((refusing,), ADAPTER).refused


def test_a_control_that_was_just_restarted_takes_no_alias_from_a_gateway(monkeypatch: Any) -> None:
    """It knows nothing yet, and one gateway does not answer: nobody is told anything until the next round."""
    told: list[str] = []

    def tell(method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        told.append(method)
        return [TimeoutError()] if method == "prepare" else [1]

    gateways = Gateways()
    monkeypatch.setattr(gateways, "_tell", tell)
    assert not gateways.announce({"m": move(1, ONE)}, (replica({"m@1": "d"}),), {}, {})
    assert told == ["prepare"]


def test_a_rollback_is_followed_although_both_versions_are_held() -> None:
    history = [move(1, ONE), move(2, TWO), move(3, ONE)]
    assert generation(history, (replica({"m@1": "d", "m@2": "e"}),)) == 3


def test_a_replica_lacks_a_version_by_digest() -> None:
    assert lacks(replica({}), "m@2", ADAPTER.digest)
    assert lacks(replica({"m@2": "another digest"}), "m@2", ADAPTER.digest)
    assert not lacks(replica({"m@2": ADAPTER.digest}), "m@2", ADAPTER.digest)


def test_only_replicas_with_the_weights_under_an_adapter_must_hold_it(tmp_path: Path) -> None:
    """While weights are swapped, a fleet's replicas host different ones."""
    config, registry, _ = two_fleets(tmp_path)
    made = make_adapter(registry, tmp_path, ONE, 1, name="poet")
    registry.move("poet", made.id, "first", "test", after=0)
    replicas = Replicas(lambda _: None)
    hosting = Hosting(config, Desired(registry), replicas, Applications(no_serve), lambda kind, name: None)
    hosting.desired.load()
    replicas.report(replica({"m@1": "d"})._replace(app="fleet-m"), replica({}, "m@2")._replace(id="s", app="fleet-m"))
    placed = adapters.place(hosting, hosting.fleets["m"])
    assert placed.assigned == {"r": ("poet@1",), "s": ()}


def test_load_alone_is_not_worth_telling_the_gateways() -> None:
    one, busier, more = (View(1, {}, (state,)) for state in (replica({}), replica({}, running=9), replica({"m@2": "d"})))
    assert delta(one, busier).empty and not delta(one, more).empty


def test_a_fleet_answers_for_what_sits_on_its_own_weights() -> None:
    other = VersionId("other", 1)
    moves = {"m": move(1, ONE), "a": move(1, VersionId("a", 3)), "b": move(1, VersionId("b", 1))}
    sits = {ONE: ONE, VersionId("a", 3): ONE, VersionId("b", 1): other}
    assert fleet_state("f", "m", "app", moves, sits.__getitem__).versions == ("a@3", "m@1")
    assert fleet_state("f", "unknown", "app", moves, sits.__getitem__).versions == ()


def test_a_secret_is_never_shown() -> None:
    assert "secret" not in public(replica({}))


def test_the_orders_of_a_version_are_forgotten_and_not_those_of_one_whose_id_begins_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`m@1` also meant `m@12`: beginning a rollout of the one made control order all replicas to do the other once more."""
    told: list[str] = []
    replicas = Replicas(lambda _: None)
    monkeypatch.setattr(replicas, "tell", lambda app, method, replica, id, *rest: told.append(id))
    orders = Orders(replicas, lambda: ("fleet-m",), lambda: None)
    ids = ["m@1", "m@12", "m@112"]
    for id in ids:
        assert not orders.swap("r", id, "", False)
    when(lambda: not any(orders.swapping("r", id) for id in ids), 10)
    orders.forget("m@1")
    assert [orders.swap("r", id, "", False) for id in ids] == [False, True, True], "only the first is ordered once more"
    when(lambda: not orders.swapping("r", "m@1"), 10)
    assert sorted(told) == sorted([*ids, "m@1"])
    orders.close()


def test_answers_that_nobody_asks_for_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order to a replica that had gone since stayed in memory for as long as its fleet."""
    orders = Orders(Replicas(lambda _: None), tuple, lambda: None)

    def give(number: int) -> None:
        assert not orders.swap(f"r{number}", "m@1", "", False)
        when(lambda: all(given.answer.done() for given in orders._given.values()), 10)

    give(0)
    give(1)
    assert orders.swap("r0", "m@1", "", False), "its answer may still be wanted"
    monkeypatch.setattr("cluster.control.replicas.UNASKED_S", 0)
    for number in range(2, 8):
        give(number)
    assert len(orders._given) == 1, "the newest alone"
    orders.close()


def test_a_surge_is_listed_as_one_more_fleet_while_it_is_there(tmp_path: Path) -> None:
    config, *_ = two_fleets(tmp_path)
    fleet = Fleet(config.spec("m"), declared=True)
    assert surge(fleet, (), {}) is None
    fleet.surge, fleet.surge_size = TWO, 2
    starting = surge(fleet, (), {"surge-m@m-2": Application("DEPLOYING", starting=2)})
    assert starting is not None and (starting["name"], starting["phase"], starting["replicas"]) == ("surge-m@m-2", "starting", 0)
    one = replica({"m@2": "d"}, "m@2")._replace(app="surge-m@m-2")
    serving = surge(fleet, (one, replica({"m@1": "d"})._replace(app="fleet-m")), {})
    assert serving is not None and (serving["phase"], serving["slots"], serving["weights"]) == ("serving", 1, ["m@2"])
    assert serving["words"] == "answers while m takes m@2 over"
    assert serving.keys() == described_fleet(fleet, (), {}).keys(), "whoever reads fleets reads it too"
    assert (serving["declared"], serving["ceiling"], serving["surge"]) == (False, None, None)


# replicas whose engines do not start


def failing(final: bool = True) -> ColdStarts:
    starts = ColdStarts()
    starts.starting("r-1", "starts its engine", "fleet-m", 0.0)
    starts.failed("r-1", "fleet-m", FailedStart("m@1", "no memory", final, 10.0))
    return starts


def test_an_engine_that_failed_for_good_is_not_started_again_for_a_minute() -> None:
    starts = failing()
    assert starts.holding("fleet-m", 69.0, "m@1") == starts.holding("fleet-m", 69.0) == "no memory"
    assert starts.holding("fleet-m", 71.0, "m@1") == "", "by then somebody may have changed something"
    assert starts.holding("fleet-m", 11.0, "m@2") == "", "other weights may do"
    assert starts.holding("fleet-n", 11.0, "m@1") == ""
    assert failing(final=False).holding("fleet-m", 11.0, "m@1") == "", "what may pass by itself is tried again"


def test_why_the_last_start_failed_is_told_until_one_succeeds() -> None:
    starts = failing()
    assert starts.those(set(), {"fleet-m": Application("DEPLOYING", starting=1)}, 11.0) == {}
    starts.starting("r-2", "starts its engine", "fleet-m", 80.0)
    failure = starts.failure("fleet-m")
    assert failure is not None and failure.words == "no memory"
    starts.arrived("r-2")
    assert starts.failure("fleet-m") is None


def test_whoever_waits_for_a_replica_hears_why_the_last_one_did_not_start() -> None:
    told = [Starting("fleet-m", "starts its engine", 0.0)]
    assert stage(told, False, 1, False, 10.0, "no memory") == ColdStart(ColdStage.STARTING, "no memory")
    assert stage([], False, 0, False, 10.0, "no memory").words == "no memory"
    assert stage([], True, 0, False, 10.0, "no memory").stage == ColdStage.RUNNING


def test_a_fleet_says_in_the_engines_words_why_it_does_not_start() -> None:
    serve = "A replica failed to start. Error:\ncluster.errors.EngineFailed: The engine of m did not start on m@1: no memory\n"
    final, passing = (FailedStart("m@1", "no memory", final, 0.0) for final in (True, False))
    assert phase(False, 0, Application("DEPLOYING", serve, starting=1), final) == ("failed", "no memory")
    assert phase(False, 0, Application("DEPLOYING", starting=1), passing)[0] == "starting", "Serve tries again"
    assert phase(False, 0, Application("DEPLOY_FAILED", serve)) == ("failed", "The engine of m did not start on m@1: no memory")
    assert phase(False, 1, Application("RUNNING"), passing) == ("serving", "the next replica did not start: no memory")
    assert phase(False, 0, Application("RUNNING", running=1))[0] == "starting", "it has not reported yet"
