"""Versions that a run makes on its way: the replicas of its base's fleet hold the newest, clients see none, and none stays."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control import interims as rules
from cluster.control.interims import Interims
from cluster.control.jobs import JobService
from cluster.errors import BadRequest, ModelNotFound, PoolUnavailable, VersionRefused
from cluster.pool.submit import JobServer
from cluster.store.jobs import JobResult, JobSpec, JobStatus
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId, interim_name
from deployments.api.models import model_list
from deployments.routing.table import Table
from tests.adapters import make_adapter
from tests.controlled import Controlled, stop_all, two_fleets, wait_until

RUN = "rl-65f0a1b2c3d4"
NAME = interim_name(RUN)


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    stop_all()


def interim(registry: Registry, folder: Path, seed: int, run: str = RUN) -> VersionId:
    root = registry.store.local_root
    assert root is not None
    made = make_adapter(folder / f"{run}-{seed}", root / "versions/m/1/files", rank=2, seed=seed)
    return registry.catalog.register_interim(run, VersionId("m", 1), made, Lineage(job=run)).id


def held(control: Controlled) -> set[str]:
    return {id for replica in control.view.replicas for id in replica.held if id.startswith(NAME)}


def test_the_replicas_of_the_fleet_hold_the_newest_versions_and_let_go_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "EXPIRES_S", 0.5)
    config, registry, machines = two_fleets(tmp_path)
    control, made = Controlled(config, machines), [interim(registry, tmp_path, seed) for seed in range(4)]
    time.sleep(0.6)  # control has heard of all runs by now
    for id in made:
        began_s = time.monotonic()
        control.interims.hold(RUN, [str(id)], places=2)
        assert str(id) in held(control) and time.monotonic() - began_s < 0.5
    wait_until(lambda: held(control) == {str(id) for id in made[-2:]})
    assert not [replica for replica in control.view.replicas if replica.app == "fleet-n" and len(replica.held) > 1]
    control.interims.end(RUN)
    wait_until(lambda: not held(control))


def test_a_run_that_says_nothing_any_more_loses_its_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "EXPIRES_S", 1.0)
    config, registry, machines = two_fleets(tmp_path)
    control, id = Controlled(config, machines), interim(registry, tmp_path, 0)
    control.interims.hold(RUN, [str(id)], places=3)
    assert held(control) == {str(id)}
    wait_until(lambda: not held(control))


def test_a_control_that_starts_again_takes_nothing_from_a_replica_and_learns_of_the_versions_again(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    first, older = Controlled(config, machines), interim(registry, tmp_path, 0)
    first.interims.hold(RUN, [str(older)], places=3)
    stop_all()
    second = Controlled(config, machines)
    newer = interim(registry, tmp_path, 1)
    second.interims.hold(RUN, [str(newer)], places=3)
    assert held(second) == {str(older), str(newer)}


def test_clients_see_no_interim_version_and_can_ask_for_none_of_its_names(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control, id = Controlled(config, machines), interim(registry, tmp_path, 0)
    control.interims.hold(RUN, [str(id)], places=3)
    table = Table()
    table.adopt(control.view)
    assert {model["id"] for model in model_list(table)["data"]} == {"m", "n", "m@1", "n@1"}
    assert table.resolve(str(id)).version == id, "who knows it may ask for it"
    with pytest.raises(ModelNotFound) as error:
        table.resolve("unknown")
    assert NAME not in str(error.value)
    assert registry.names() == ["m", "n"]
    with pytest.raises(BadRequest, match="does not begin with interim--"):
        control.publishing.publish(str(id), "m", "", "")
    with pytest.raises(BadRequest, match="does not begin with interim--"):
        registry.register(NAME, "weights", None, tmp_path, Lineage())


def test_live_adapters_keep_their_places(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path, {"max_cpu_loras": 2, "max_loras": 1})
    control = Controlled(config, machines)
    for seed in range(3):
        control.interims.hold(RUN, [str(interim(registry, tmp_path, seed))], places=5)
    assert len(control.hosting.interims.of(RUN)) == 2, "as many as there are places"
    other = interim(registry, tmp_path, 9, run="rl-2")
    with pytest.raises(VersionRefused, match="All 2 places for adapters of the fleet m are taken"):
        control.interims.hold("rl-2", [str(other)], places=3)


def test_a_version_that_is_removed_leaves_its_number(tmp_path: Path) -> None:
    _, registry, _ = two_fleets(tmp_path)
    first, second = (interim(registry, tmp_path, seed) for seed in range(2))
    registry.catalog.remove(second)
    assert registry.catalog.interims(RUN) == [first]
    assert interim(registry, tmp_path, 2).n == 3
    registry.catalog.remove_interims(RUN)
    assert registry.store.children("versions") == ["m", "n"]


def test_what_a_killed_run_left_goes_with_its_job(tmp_path: Path) -> None:
    """The numbers stay taken while the run can be resumed."""
    _, registry, _ = two_fleets(tmp_path)
    service = JobService(registry, away)
    for run, kept in ((RUN, ["1"]), ("rl-over", [])):
        interim(registry, tmp_path, 0, run)
        service.jobs.create(JobSpec(id=run, verb="rl", options={}, owner="ann", created_s=0))
        service.jobs.finish(run, JobResult(status=JobStatus.LOST, ended_s=1))
        if kept:
            registry.store.put_new(f"runs/{run}/000000000010/manifest.json", b"{}")
        service.reaper.forget(run)
        assert registry.store.children(f"versions/{interim_name(run)}") == kept
        assert Registry(registry.store).catalog.interims(run) == []


def away() -> JobServer:
    raise PoolUnavailable("Ray's job server does not answer.")


CALLS = st.lists(st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 5)), min_size=1, max_size=20)


@given(CALLS)
def test_in_whatever_order_the_calls_arrive_the_newest_versions_stay(
    calls: list[tuple[list[int], int]],
) -> None:
    interims = Interims(0.0)
    for numbers, places in calls:
        before = interims.of(RUN)
        interims.need(RUN, [VersionId(NAME, n) for n in numbers], places, 0.0)
        now = interims.of(RUN)
        assert len(now) <= places and list(now) == sorted(set(now))
        assert now[-1].n == max(n for some in (numbers, [one.n for one in before]) for n in some)
