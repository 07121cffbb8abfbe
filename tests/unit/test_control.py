"""Control over a real store: what is bad costs itself, what is lost is found again, and every fleet goes its own way."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity.arbiter import FleetDemand
from cluster.config import parse
from cluster.control.actor import BEATS, GROUPS, ORDERS, WAITING, Control
from cluster.control.allocation import demand
from cluster.control.announcing import Announcer
from cluster.control.applications import Application, Applications, surge_app
from cluster.control.describe import fleet as fleet_described
from cluster.control.desired import Desired
from cluster.control.hosting import Hosting
from cluster.control.loop import Loop
from cluster.control.reconcile import LEFTOVERS
from cluster.control.replicas import Replicas
from cluster.control.slots import Served
from cluster.errors import BadRequest, Conflict, FleetNotFound, ModelNotFound, PoolUnavailable, StoreUnavailable, VersionRefused
from cluster.publishing.placement import Hosted, SurgeFacts, Swap, fleet_of, next_swap, surge_weights
from cluster.publishing.rollout import DIRECT, Policy, begin
from cluster.redact import redact
from cluster.store.registry import Registry
from cluster.types import UNBOUNDED, Generation, Lineage, ReplicaBounds, ReplicaState, VersionId
from tests.controlled import Controlled, adapter, make_base, no_serve, stop_all, two_fleets, wait_until


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    stop_all()


ONE, OTHER, TWO = VersionId("m", 1), VersionId("n", 1), VersionId("m", 2)


def test_an_alias_whose_record_is_damaged_costs_itself_only(tmp_path: Path) -> None:
    """Control used to stop for every alias where one record could not be read."""
    config, registry, machines = two_fleets(tmp_path)
    registry.move("bad", ONE, "will be damaged", "test", after=0)
    root = registry.store.local_root
    assert root is not None
    next((root / "aliases/bad").iterdir()).write_text("{")
    control = Controlled(config, machines)
    made = adapter(registry, tmp_path, ONE, 1)
    assert control.publish(made.id, "m").stage == "live"
    assert [damaged.path for damaged in control.registry.damaged()] == ["aliases/bad/00000001.json"]
    assert control.view.aliases["m"].stable == made.id and set(control.view.aliases) == {"m", "n"}
    assert control.publish(made.id, "bad").stage == "live", "a new generation takes the place of the damaged one"
    assert control.view.aliases["bad"].generation == 2


def test_a_manifest_that_is_damaged_while_its_rollout_is_under_way_costs_no_fleet(tmp_path: Path) -> None:
    """After a restart of control it used to put every fleet into back-off: each read the manifests of all rollouts under way."""
    config, registry, machines = two_fleets(tmp_path)
    registry.move("poet", OTHER, "first", "test", after=0)
    made = adapter(registry, tmp_path, OTHER, 3, name="poet")
    registry.record(first := begin("poet", 1, made.id, OTHER, DIRECT, "will be damaged", "test", 0))
    registry.record(first.next("warming", "", 0.0))
    assert registry.store.local_root is not None
    (registry.store.local_root / "versions/poet/1/manifest.json").write_text("{")
    control = Controlled(config, machines)
    failures = control.reconcilers.loop.queue.failures
    wait_until(lambda: ("alias", "poet") in failures and control.view.aliases.keys() >= {"m", "n"})
    good = adapter(control.registry, tmp_path, ONE, 1)
    assert control.publish(good.id, "m").stage == "live"
    assert [key for key in failures if key[0] == "fleet"] == []


def test_a_rollout_under_way_is_loaded_by_the_fleet_that_it_belongs_to(tmp_path: Path) -> None:
    config, registry, _ = two_fleets(tmp_path)
    made = adapter(registry, tmp_path, OTHER, 3, name="poet")
    registry.record(first := begin("poet", 1, made.id, None, DIRECT, "first", "test", 0))
    registry.record(first.next("warming", "", 0.0))
    hosting = Hosting(config, Desired(registry), Replicas(lambda _: None), Applications(no_serve), lambda kind, name: None)
    hosting.desired.load()
    assert {name: hosting.coming_to(fleet) for name, fleet in hosting.fleets.items()} == {"m": [], "n": [made.id]}


def test_the_view_says_which_fleet_an_alias_belongs_to_and_which_surge_answers_for_a_fleet(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    made = adapter(registry, tmp_path, OTHER, 3, name="poet")
    registry.move("poet", made.id, "first", "test", after=0)
    control = Controlled(config, machines)
    wait_until(lambda: control.view.alias_fleets == {"m": "m", "n": "n", "poet": "n"})
    hosting = Hosting(config, Desired(registry), Replicas(lambda _: None), Applications(no_serve), lambda kind, name: None)
    hosting.fleets["m"].surge_wanted = TWO
    fleets = Announcer(hosting, control.gateways)._fleets()
    assert {name: fleet.surge for name, fleet in fleets.items()} == {"m": surge_app("m", TWO), "n": ""}


def test_a_call_that_was_given_up_is_not_carried_out_later() -> None:
    """Whoever heard that control was busy used to find, after trying again, that both attempts were made."""
    loop, done = Loop(lambda _: None), list[str]()
    with pytest.raises(PoolUnavailable, match="busy"):
        loop.call(lambda: done.append("given up"), timeout_s=0.05)
    loop.start()
    loop.call(lambda: done.append("tried again"))
    assert done == ["tried again"]
    with pytest.raises(PoolUnavailable, match="may still take effect"):
        loop.call(lambda: time.sleep(0.3), timeout_s=0.05)
    loop.stop()


def damage_rollout(registry: Registry, alias: str, version: VersionId) -> None:
    """Give the alias a first rollout that nobody can read."""
    registry.record(begin(alias, 1, version, None, DIRECT, "will be damaged", "test", 0))
    assert registry.store.local_root is not None
    (registry.store.local_root / f"rollouts/{alias}/1/00000001.json").write_text("{")


def test_an_alias_whose_rollout_is_damaged_stands_still_and_the_others_go_on(tmp_path: Path) -> None:
    """Control used to stop for every alias where one record could not be read."""
    config, registry, machines = two_fleets(tmp_path)
    damage_rollout(registry, "bad", OTHER)
    control = Controlled(config, machines)
    made = adapter(registry, tmp_path, ONE, 1)
    assert control.publish(made.id, "m").stage == "live"
    failures = control.reconcilers.loop.queue.failures
    wait_until(lambda: ("alias", "bad") in failures)
    assert [key for key in failures] == [("alias", "bad")] and control.view.aliases["m"].stable == made.id


def test_a_fleet_whose_own_rollout_is_damaged_still_announces_its_replicas_and_publishes_to_other_aliases(tmp_path: Path) -> None:
    """Its replicas used to get no traffic, and in a pool with one fleet no alias went on."""
    config, registry, machines = two_fleets(tmp_path)
    damage_rollout(registry, "m", ONE)
    control = Controlled(config, machines)
    failures = control.reconcilers.loop.queue.failures
    wait_until(lambda: ("alias", "m") in failures)
    machines.start("replica-late", "fleet-m", ONE)
    wait_until(lambda: "replica-late" in {one.id for one in control.view.replicas})
    assert control.publish(adapter(registry, tmp_path, ONE, 1).id, "poet").stage == "live"
    assert [key for key in failures] == [("alias", "m")]


def test_an_alias_whose_manifest_is_restored_has_its_fleet_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read once used to have no fleet until somebody moved any alias."""
    monkeypatch.setattr("cluster.control.hosting.UNREADABLE_S", 0.2)
    config, registry, machines = two_fleets(tmp_path)
    made = adapter(registry, tmp_path, ONE, 1, name="poet")
    registry.move("poet", made.id, "first", "test", after=0)
    assert registry.store.local_root is not None
    manifest = registry.store.local_root / "versions/poet/1/manifest.json"
    whole = manifest.read_text()
    manifest.write_text("{")
    control = Controlled(config, machines)
    wait_until(lambda: control.view.aliases.keys() >= {"m", "n"})
    assert control.hosting.assigned()["poet"] is None
    manifest.write_text(whole)
    wait_until(lambda: str(made.id) in machines.there["replica-m"].held)


def test_a_lost_answer_while_a_rollout_begins_leaves_no_conflict_behind(tmp_path: Path) -> None:
    """The record was written and its answer lost: every later publish of the alias used to be a conflict."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    first, second = adapter(registry, tmp_path, ONE, 1), adapter(registry, tmp_path, ONE, 2)
    wait_until(lambda: "m" in control.view.aliases)
    put, lost = control.registry.store.put_new, list[str]()

    def losing(path: str, data: bytes) -> None:
        put(path, data)
        if path.startswith("rollouts/") and not lost:
            lost.append(path)
            raise StoreUnavailable("the connection broke")

    control.registry.store.put_new = losing  # type: ignore[method-assign]
    assert control.publish(first.id, "m").stage == "live" and lost, "what was written is read back"
    assert control.publish(second.id, "m").stage == "live" and control.view.aliases["m"].stable == second.id


def test_a_replica_that_hangs_holds_up_its_own_fleet_only(tmp_path: Path) -> None:
    """One slow replica used to make each of control's rounds two seconds long."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    machines.hung["fleet-n"] = threading.Event()
    slow, quick = adapter(registry, tmp_path, OTHER, 1), adapter(registry, tmp_path, ONE, 2)
    outcomes: list[str] = []
    waiting = threading.Thread(target=lambda: outcomes.append(control.publish(slow.id, "n").stage))
    waiting.start()
    assert control.publish(quick.id, "m").stage == "live" and not outcomes
    machines.hung["fleet-n"].set()
    waiting.join(20)
    assert outcomes == ["live"]


def test_new_weights_move_the_fleet_whose_model_they_are_and_no_other(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    made = registry.register("m", "weights", None, make_base(tmp_path / "new", 7), Lineage())
    assert control.publish(made.id, "m").stage == "live"
    assert {state.app: state.base for state in machines.there.values()} == {"fleet-m": "m@2", "fleet-n": "n@1"}
    assert {name: fleet.versions for name, fleet in control.view.fleets.items()} == {"m": ("m@2",), "n": ("n@1",)}


def test_an_adapter_goes_to_the_fleet_that_hosts_its_base(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    made = adapter(registry, tmp_path, OTHER, 3, name="poet")
    assert control.publish(made.id, "poet").stage == "live"
    assert {state.app for state in machines.there.values() if str(made.id) in state.held} == {"fleet-n"}
    assert control.view.fleets["n"].versions == ("n@1", "poet@1")
    with pytest.raises(VersionRefused, match="fleet hosts n@1 for"):
        control.publish(adapter(registry, tmp_path, ONE, 4).id, "n")
    nowhere = registry.register("elsewhere", "weights", None, make_base(tmp_path / "elsewhere", 9), Lineage())
    with pytest.raises(VersionRefused, match="no fleet hosts it"):
        control.publish(nowhere.id, "elsewhere")


def test_an_order_for_a_rollout_that_has_ended_reaches_no_later_one(tmp_path: Path) -> None:
    """It waits for a thread of control's. Meanwhile its rollout can end, and another version of the alias can become the canary."""
    config, registry, machines = two_fleets(tmp_path)
    control, m1 = Controlled(config, machines), VersionId("m", 1)
    first, second = (adapter(registry, tmp_path, m1, seed, "helper") for seed in (1, 2))
    wait_until(lambda: "m" in control.view.aliases)
    control.publish(first.id, "helper")
    canary = Policy(steps=(5, 100), min_requests=10, gate=False)
    assert control.publishing.publish(str(second.id), "helper", "test", "test", canary).stage == "canary"
    for what in ("promote", "abort"):
        with pytest.raises(Conflict, match=f"rollout of {first.id} on helper has ended"):
            control.publishing.order("helper", what, "test", "test", str(first.id))
    assert control.publishing.order("helper", "abort", "test", "test", str(second.id)).stage == "rolled_back"


def test_gateways_hear_nothing_before_every_alias_was_read(tmp_path: Path) -> None:
    """A control that was restarted and knows of some aliases only would take the others from the gateways."""
    config, registry, machines = two_fleets(tmp_path)
    for n in range(30):
        registry.move(f"alias-{n}", ONE, "many", "test", after=0)
    seen: list[int] = []

    class Listening(Controlled):
        def _hear(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
            answer = super()._hear(method, *arguments, timeout_s=timeout_s)
            seen.append(len(self.view.aliases)) if method == "adopt" else None
            return answer

    Listening(config, machines)
    wait_until(lambda: bool(seen))
    assert seen[0] == 32


def test_a_fleet_that_is_added_is_recorded_hosted_and_found_again_and_goes_when_it_is_removed(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    third = registry.register("third", "weights", None, make_base(tmp_path / "third", 5), Lineage())
    control.fleets.add("extra", {"model": str(third.id), "min_replicas": 0}, "somebody")
    wait_until(lambda: "fleet-extra" in control.applications.known)
    machines.start("replica-extra", "fleet-extra", third.id)
    wait_until(lambda: control.view.aliases.get("extra") is not None and "extra" in control.view.fleets)
    again = Controlled(config, machines)
    wait_until(lambda: "fleet-extra" in again.applications.known and again.view.fleets.keys() == {"m", "n", "extra"})
    made = adapter(registry, tmp_path, third.id, 1, name="poet")
    assert again.publish(made.id, "poet").stage == "live"
    with pytest.raises(Conflict, match="poet would have no fleet"):
        again.fleets.remove("extra", False, "somebody")
    again.fleets.remove("extra", True, "somebody")
    wait_until(lambda: "fleet-extra" not in again.applications.known and "extra" not in again.hosting.fleets)
    assert again.view.fleets.keys() == {"m", "n"}
    machines.there.pop("replica-extra")
    newest = again.fleets.records.newest("extra")
    assert newest is not None and newest.ended and newest.author == "somebody"
    assert newest.overrides == {"model": "extra", "min_replicas": 0}, "whoever ends it for good must know what it was"


def test_the_alias_of_a_removed_fleet_holds_no_other_fleets_weights_back(tmp_path: Path) -> None:
    """Whoever tried a second fleet on the same weights could never publish others to the first: nothing ends an alias."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    control.fleets.add("guest", {"model": str(ONE), "min_replicas": 0}, "somebody")
    made = registry.register("m", "weights", None, make_base(tmp_path / "made", 6), Lineage())
    with pytest.raises(VersionRefused, match="the fleet hosts m@1 for guest"):
        control.publish(made.id, "m")
    control.fleets.remove("guest", False, "somebody")
    for control_ in (control, Controlled(config, machines)):
        wait_until(lambda: "guest" in control_.hosting.ended_s)  # noqa: B023 (called at once)
        assert not control_.hosting.holds_back("guest") and control_.hosting.holds_back("n")
    registry.move("guest", ONE, "somebody wants it again", "somebody", after=1)
    control_.hosting.desired.refresh("guest")
    with pytest.raises(VersionRefused, match="the fleet hosts m@1 for guest"):
        control_.publish(made.id, "m")


def test_a_fleet_is_removed_without_force_only_where_another_answers_for_its_alias(tmp_path: Path) -> None:
    """Its own alias used to go with it: who asked for it had an answer before, and 404 after."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    third = registry.register("third", "weights", None, make_base(tmp_path / "third", 5), Lineage())
    control.fleets.add("alone", {"model": str(third.id), "min_replicas": 0}, "somebody")
    control.fleets.add("second", {"model": str(ONE), "min_replicas": 0}, "somebody")
    wait_until(lambda: control.view.fleets.keys() == {"m", "n", "alone", "second"})
    with pytest.raises(Conflict, match="alone would have no fleet"):
        control.fleets.remove("alone", False, "somebody")
    control.fleets.remove("second", False, "somebody")
    wait_until(lambda: control.view.fleets.keys() == {"m", "n", "alone"})
    assert control.hosting.assigned()["second"] == "m"
    control.fleets.remove("alone", True, "somebody")
    wait_until(lambda: control.view.fleets.keys() == {"m", "n"})


@pytest.mark.parametrize(
    ("name", "overrides", "error", "words"),
    [
        ("m", {}, Conflict, "already"),
        ("../m", {}, BadRequest, "not a model name"),
        ("x", {}, ModelNotFound, "no model x"),
        ("x", {"model": "m"}, BadRequest, "both host the model m"),
        ("x", {"model": "m@7"}, ModelNotFound, "m@7 does not exist"),
        ("free", {"threads": 3}, BadRequest, "there is no such key"),
        ("guest", {"model": "m@1", "threads": 3}, BadRequest, "there is no such key"),
        (
            "free",
            {"engine": {"tool_call_parsr": "hermes"}},
            BadRequest,
            r"engine\.tool_call_parsr: .*did you mean tool_call_parser",
        ),
        ("free", {"engine": {"trust_remote_code": True}}, BadRequest, r"engine\.trust_remote_code: refused"),
        ("free", {"min_replicas": 3, "max_replicas": 3}, BadRequest, "It needs 3 of the pool's 4 slots"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, name: str, overrides: dict[str, Any], error: type[Exception], words: str
) -> None:
    config, registry, machines = two_fleets(tmp_path)
    registry.move("free", ONE, "an alias", "test", after=0)
    control = Controlled(config, machines)
    with pytest.raises(error, match=words):
        control.fleets.add(name, overrides, "somebody")
    assert control.fleets.records.names() == [] and registry.alias("guest") is None


def test_a_fleet_has_room_on_machines_that_the_autoscaler_may_add(tmp_path: Path) -> None:
    """It used to be refused for want of slots that were one request away."""
    config, registry, machines = two_fleets(tmp_path)
    control, bounds = Controlled(config, machines), {"min_replicas": 3, "max_replicas": 3}
    for name in ("five", "many"):
        registry.move(name, ONE, "an alias", "test", after=0)
    control.room = 5
    control.fleets.add("five", bounds, "somebody")
    with pytest.raises(BadRequest, match="It needs 3 of the pool's 5 slots, and 5 are the least"):
        control.fleets.add("many", bounds, "somebody")
    control.room = None
    control.fleets.add("many", bounds, "somebody")


def killed_after_the_end_of(name: str, control: Controlled, surge: VersionId | None = None, **record: Any) -> None:
    """Control has written that the fleet has ended, and then nothing more."""
    control.reconcilers.loop.call(control.reconcilers.loop.stop)
    newest = control.fleets.records.newest(name)
    assert newest is not None
    control.fleets.records.append(newest.model_copy(update={"n": newest.n + 1, "ended": True, **record}))
    if surge:
        control.machines.served[surge_app(name, surge)] = Application("RUNNING", running=1)


def test_a_fleet_whose_control_was_killed_after_its_end_drains_under_the_next_one(tmp_path: Path) -> None:
    """Its application, its slots and its surge used to stay for ever: the next control never heard of them."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    registry.move("extra", ONE, "an alias", "test", after=0)
    control.fleets.add("extra", {"max_replicas": 3}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served)
    killed_after_the_end_of("extra", control, surge=TWO)
    machines.engines, machines.draining = {"node extra k d s", "node m k d s", "somebody's"}, True
    again = Controlled(config, machines)
    wait_until(lambda: {app.status for app in machines.served.values()} == {"DELETING"})
    assert machines.served.keys() == {"fleet-extra", "surge-extra@m-2"} and "extra" not in again.view.fleets
    described = fleet_described(again.hosting.fleets["extra"], (), again.applications.known)
    assert (described["phase"], described["max_replicas"], described["surge"]) == ("draining", 3, "m@2")
    with pytest.raises(Conflict, match="extra already, and it drains"):
        again.fleets.add("extra", {}, "somebody")
    wait_until(lambda: machines.engines == {"node m k d s", "somebody's"})
    machines.served.clear()
    again.refresh()
    wait_until(lambda: "extra" not in again.hosting.fleets)
    again.fleets.add("extra", {}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served and "extra" in again.view.fleets)


@pytest.mark.parametrize("overrides", [{}, {"threads": 3}], ids=["an older release wrote none", "not valid any more"])
def test_a_fleet_ends_whatever_its_record_says_that_it_was(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    registry.move("extra", ONE, "an alias", "test", after=0)
    control.fleets.add("extra", {"max_replicas": 3}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served)
    killed_after_the_end_of("extra", control, overrides=overrides)
    again = Controlled(config, machines)
    wait_until(lambda: not machines.served and "extra" not in again.hosting.fleets)


def test_a_fleet_that_serve_still_has_is_refused_before_control_has_looked(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    registry.move("extra", ONE, "an alias", "test", after=0)
    control.fleets.add("extra", {}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served)
    killed_after_the_end_of("extra", control)
    machines.declared.add("fleet-extra")
    again = Controlled(config, machines)
    with pytest.raises(Conflict, match="extra already, and it drains"):
        again.fleets.add("extra", {}, "somebody")
    again.applications.read = False
    with pytest.raises(PoolUnavailable, match="just started"):
        again.fleets.add("other", {"model": "extra"}, "somebody")


def test_what_was_removed_and_is_declared_by_now_stays(tmp_path: Path) -> None:
    """Serve has the configuration's application before control has heard of the configuration."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    registry.move("extra", ONE, "an alias", "test", after=0)
    control.fleets.add("extra", {}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served)
    killed_after_the_end_of("extra", control, surge=TWO)
    machines.declared.add("fleet-extra")
    machines.engines = {"node extra k d s"}
    looks = list[bool]()
    again = Controlled(config, machines)
    again.reconcilers.leftovers.look = lambda doubtful: (looks.append(doubtful), again.look(doubtful))[1]  # type: ignore[method-assign]
    again.reconcilers.loop.retry(LEFTOVERS)
    wait_until(lambda: len(looks) >= 2)
    assert all(looks) and machines.served.keys() == {"fleet-extra", "surge-extra@m-2"} and machines.engines
    declared = parse({**config.dump(), "fleets": {"m": {}, "n": {}, "extra": {"model": "extra"}}})
    again.reconcilers.loop.call(lambda: again.hosting.configure(declared, registry))
    wait_until(lambda: "extra" in again.view.fleets)


def test_a_fleet_that_drains_and_is_declared_meanwhile_stays(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control, machines.draining = Controlled(config, machines), True
    registry.move("extra", ONE, "an alias", "test", after=0)
    control.fleets.add("extra", {}, "somebody")
    wait_until(lambda: "fleet-extra" in machines.served)
    control.fleets.remove("extra", True, "somebody")
    wait_until(lambda: machines.served["fleet-extra"].status == "DELETING")
    declared = parse({**config.dump(), "fleets": {"m": {}, "n": {}, "extra": {}}})
    control.reconcilers.loop.call(lambda: control.hosting.configure(declared, registry))
    wait_until(lambda: "extra" in control.view.fleets)


def test_what_the_configuration_declares_is_removed_there(tmp_path: Path) -> None:
    config, _, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    with pytest.raises(BadRequest, match="part of the configuration"):
        control.fleets.remove("m", True, "somebody")
    with pytest.raises(FleetNotFound):
        control.fleets.remove("nobody", True, "somebody")


def test_a_reason_keeps_no_signature(tmp_path: Path) -> None:
    """A presigned URL in somebody's words used to be an alias's reason for ever."""
    config, registry, machines = two_fleets(tmp_path)
    control, made = Controlled(config, machines), adapter(registry, tmp_path, ONE, 1)
    url = "https://key:password@bucket.example/set.jsonl?X-Amz-Signature=abc"
    rollout = control.publishing.publish(str(made.id), "m", f"trained on {url}", "test", DIRECT)
    assert rollout.stage == "live"
    written = "".join(path.read_text() for path in Path(tmp_path / "store").rglob("*.json") if "versions" not in path.parts)
    assert "bucket.example/set.jsonl" in written and "abc" not in written and "password" not in written
    assert redact("no URL here: a@b, why?") == "no URL here: a@b, why?"


def test_a_replica_that_has_said_that_it_ends_is_not_listed_again() -> None:
    changed: list[str] = []
    replicas = Replicas(changed.append)
    state = ReplicaState("r", "http://r", "s", "m@1", {"m@1": "d"}, {}, 0, app="fleet-m")
    replicas.report(state)
    replicas.report(state._replace(running=3))
    assert changed == ["fleet-m"], "load alone is nothing to act on"
    replicas.leave("r")
    replicas.report(state)
    assert replicas.states == () and changed == ["fleet-m", "fleet-m"]


def test_an_answer_that_was_overtaken_does_not_count() -> None:
    replicas = Replicas(lambda _: None)
    state = ReplicaState("r", "http://r", "s", "m@1", {"m@1": "d"}, {}, 0, revision=2, app="fleet-m")
    replicas.report(state)
    replicas.report(state._replace(revision=1, held={}))
    assert replicas.of("fleet-m") == (state,)


def test_a_fleet_that_sleeps_lists_what_its_replicas_will_hold_again(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    first, second = adapter(registry, tmp_path, ONE, 1), adapter(registry, tmp_path, ONE, 2)
    for one in (first, second):
        control.publish(one.id, "m")
    machines.there.pop("replica-m")
    control.replicas.leave("replica-m")
    wait_until(lambda: control.view.fleets["m"].versions == ("m@1", "m@2", "m@3"))


def test_a_control_that_starts_while_every_fleet_sleeps_tells_the_gateways_what_may_be_woken(tmp_path: Path) -> None:
    """It used to wait for a replica first, and a gateway that started meanwhile knew of nothing to wake."""
    config, _, machines = two_fleets(tmp_path)
    machines.there.clear()
    control = Controlled(config, machines)
    control.applications.known = {name: Application("RUNNING") for name in control.applications.known}
    wait_until(lambda: control.view.fleets.keys() == {"m", "n"} and control.view.replicas == ())


def test_a_fleets_replicas_hear_its_bounds_until_each_of_them_says_so(tmp_path: Path) -> None:
    """An order that reached nobody counted as heard."""

    def heard() -> dict[str, ReplicaBounds]:
        return {id: state.bounds for id, state in machines.there.items() if state.app == "fleet-m"}

    config, _, machines = two_fleets(tmp_path)
    control, capped = Controlled(config, machines), ReplicaBounds(ceiling=2)
    machines.deaf, control.ceilings = 1, {"m": 2, "n": None}
    wait_until(lambda: heard() == {"replica-m": capped} and machines.deaf == 0)
    machines.start("another", "fleet-m", ONE)
    wait_until(lambda: heard() == {"replica-m": capped, "another": capped})
    control.ceilings = {"m": None, "n": None}
    wait_until(lambda: heard() == {"replica-m": UNBOUNDED, "another": UNBOUNDED})


def test_calls_that_wait_for_minutes_have_threads_of_their_own() -> None:
    """Sixty-four publishes that waited for their replicas used to keep heartbeats and views from being heard."""
    assert in_group(WAITING) == {"publish", "promote", "add_fleet", "submit", "hold_interims"}
    assert in_group(BEATS) >= {"heartbeat", "report", "leave", "starting", "leaving", "view", "stage"}
    assert "models" in in_group(None), "it reads the store"


def test_what_ends_or_undoes_something_waits_for_no_publish() -> None:
    """Sixty-four publishes that waited used to keep the abort or the rollback that would have ended them from being heard."""
    assert in_group(ORDERS) == {"abort", "rollback", "cancel", "remove_fleet", "end_interims"}
    assert GROUPS[ORDERS] > 0


def in_group(group: str | None) -> set[str]:
    """The methods of control that run on a group's threads, as Ray keeps it."""
    return {name for name, method in vars(Control).items() if getattr(method, "__ray_concurrency_group__", None) == group}


def test_another_configuration_brings_its_fleets_and_takes_those_that_it_does_not_name(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    wait_until(lambda: control.view.fleets.keys() == {"m", "n"})
    changed = parse({**config.dump(), "fleets": {"m": {"max_replicas": 3}, "sprout": {"model": "n"}}})
    control.reconcilers.loop.call(lambda: control.hosting.configure(changed, registry))
    control.reconcilers.changed("fleet", "m")
    wait_until(lambda: control.view.fleets.keys() == {"m", "sprout"})
    assert control.hosting.fleets["m"].spec.fleet.max_replicas == 3


# pure


def test_a_fleet_that_sleeps_keeps_no_slot() -> None:
    """Serve keeps the least number of replicas by itself; a floor above what it wants would keep slots from jobs for nobody."""
    config = parse({"fleet": {"min_replicas": 2, "max_replicas": 4, "tensor_parallel_size": 2, "priority": 3}})
    spec = config.spec(config.default_fleet)
    assert demand(spec, Served()) == FleetDemand("seedling", 3, 0, 0, 2)
    assert demand(spec, Served(running=6, wanted=6)) == FleetDemand("seedling", 3, 6, 4, 2)
    assert demand(spec, Served(running=6, wanted=6), adapters_floor=3) == FleetDemand("seedling", 3, 6, 6, 2)
    held_down = demand(spec, Served(running=2, wanted=2), adapters_floor=3)
    assert held_down == FleetDemand("seedling", 3, 2, 6, 2), "a ceiling may keep Serve from wanting what its adapters need"
    assert demand(spec, Served(), adapters_floor=3).floor_slots == 0, "asleep"


def test_an_alias_belongs_to_the_fleet_that_hosts_what_it_means() -> None:
    hosted = [Hosted("chat", "m", frozenset({ONE, TWO})), Hosted("code", "n", frozenset({OTHER}))]
    assert fleet_of("m", OTHER, hosted) == "chat", "the model of a fleet, whatever it means"
    assert fleet_of("poet", TWO, hosted) == "chat" and fleet_of("coder", OTHER, hosted) == "code"
    assert fleet_of("poet", VersionId("x", 1), hosted) is None and fleet_of("poet", None, hosted) is None


def test_one_replica_swaps_at_a_time_and_goes_on_until_it_has() -> None:
    replicas = [ReplicaState(id, "", "", "m@1", {}, {}, 0) for id in "abc"]
    targets = {id: TWO for id in "abc"}
    assert next_swap(replicas, targets, lambda *_: True, None) == Swap("a", TWO)
    assert next_swap(replicas, targets, lambda *_: True, Swap("b", TWO)) == Swap("b", TWO)
    assert next_swap(replicas, targets, lambda one, _: one.id == "c", Swap("b", TWO)) == Swap("c", TWO)
    assert next_swap([one._replace(base="m@2") for one in replicas], targets, lambda *_: True, None) is None


def test_a_surge_starts_when_it_is_needed_and_stays_until_nobody_needs_it() -> None:
    def wanted(**facts: Any) -> VersionId | None:
        known = SurgeFacts(None, frozenset({"m@1"}), at(ONE), under_way, "another shape", True)
        return surge_weights(known._replace(**facts), lambda id: id)

    under_way = begin("m", 1, TWO, ONE, Policy(), "", "", 0.0).next("warming", "", 0.0)
    live = under_way.next("canary", "", 0.0, 100).next("live", "", 0.0)
    assert wanted() == TWO and wanted(ready=False) is None and wanted(needed="") is None
    assert wanted(needed=None) is None and wanted(needed=None, running=TWO) == TWO, "not known yet: nothing changes"
    assert wanted(needed="", running=TWO) == TWO, "a second replica has come: no reason to end it half-way"
    assert wanted(rollout=live, running=TWO, move=at(TWO)) == TWO, "the fleet does not hold it yet"
    assert wanted(rollout=live, running=TWO, move=at(TWO), held=frozenset({"m@2"})) is None


def at(version: VersionId) -> Generation:
    return Generation(alias="m", generation=1, stable=version, reason="", author="", time_s=0)
