"""The fleet follows its load, on the real pool: down to no replica and back, and up where the engines have too much to do."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks import load
from cluster import client
from cluster.pool import graph
from cluster.publishing.rollout import DIRECT
from cluster.types import Lineage, VersionId
from tests.adapters import make_adapter, make_weights
from tests.conftest import Running
from tests.waiting import when

QUICK: dict[str, Any] = {"scale_up_after_s": 0, "scale_down_after_s": 2, "sleep_after_s": 2}


def deploy(pool: Running, **fleet: Any) -> None:
    graph.deploy(pool.config.model_copy(update={"fleet": pool.config.fleet.model_copy(update=fleet)}))


def replicas(pool: Running) -> int:
    return len(client.of(pool.config).status()["replicas"])


def ask(pool: Running, timeout_s: float = 120) -> httpx.Response:
    body = {"model": "seedling", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=timeout_s)


def test_a_fleet_that_nobody_asks_sleeps_and_the_next_request_wakes_it(pool: Running) -> None:
    deploy(pool, min_replicas=0, max_replicas=1, **QUICK)
    try:
        print(f"asleep after {when(lambda: replicas(pool) == 0, 60):.1f} s")
        asleep = httpx.get(f"{pool.url}/health")
        assert asleep.status_code == 200 and asleep.json()["status"] == "asleep"
        assert [one["id"] for one in httpx.get(f"{pool.url}/v1/models").json()["data"]] == ["seedling", "seedling@1"]
        sleeping = {one.pid for one in engines(pool)}
        answers: list[httpx.Response] = []
        held = pool.config.gateway.max_held
        asking = [threading.Thread(target=lambda: answers.append(ask(pool))) for _ in range(held + 3)]
        began_s = time.monotonic()
        for one in asking:
            one.start()
        stages: list[str] = []
        while any(one.is_alive() for one in asking):
            stages.append(httpx.get(f"{pool.url}/health").json().get("stage", ""))
            time.sleep(0.2)
        print(f"awake after {time.monotonic() - began_s:.1f} s: {sorted(set(stage.partition(',')[0] for stage in stages))}")
        refused = [one for one in answers if one.status_code != 200]
        assert len(answers) == held + 3 and 0 < len(refused) <= 3, "as many wait as may, and a place that is free again is taken"
        assert {(one.status_code, one.headers["retry-after"], one.json()["error"]["code"]) for one in refused} == {
            (503, "15", "overloaded")
        }
        assert {one.pid for one in engines(pool)} == sleeping, "the one that the last replica left asleep"
    finally:
        deploy(pool)
        when(lambda: replicas(pool) == 1, 60)


@pytest.mark.chaos
def test_engines_with_too_much_to_do_get_another_beside_them(pool: Running) -> None:
    """The first burst waits for an engine to start; the next finds it asleep.

    Beside an engine that starts, two cores have little time for twelve clients: of their requests one to three are at the replica for two
    seconds and more, and a fleet that gives back after two ends the second replica before it has begun.
    """
    deploy(pool, min_replicas=1, max_replicas=2, target_running=4, **{**QUICK, "scale_down_after_s": 10})
    try:
        for burst in ("first", "second"):
            with load.background(f"{pool.url}/v1", "seedling", streams=12) as samples:
                print(f"{burst} burst: another replica after {when(lambda: replicas(pool) == 2, 120):.1f} s")
            assert not [sample.error for sample in samples if sample.error]
            when(lambda: replicas(pool) == 1, 60)
            assert len(engines(pool)) == 2, "one sleeps"
    finally:
        deploy(pool)


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["replica", "engine"])
def test_an_engine_ends_with_its_replica_and_a_replica_with_its_engine(pool: Running, victim: str) -> None:
    """Whoever is killed: the other does not stay behind, and there is another pair soon."""
    (replica,), pid = named(pool, "ray::ServeReplica:fleet"), client.of(pool.config).status()["replicas"][0]["pid"]
    (engine,) = (one for one in engines(pool) if one.pid == pid)
    (replica if victim == "replica" else engine).kill()
    _, left = psutil.wait_procs([replica, engine], timeout=5)
    assert left == []
    when(lambda: [one["pid"] != pid for one in client.of(pool.config).status()["replicas"]] == [True], 90)


@pytest.mark.chaos
def test_an_engine_that_slept_through_publishes_wakes_with_what_is_live(pool: Running, tmp_path: Path) -> None:
    """New weights and an adapter on them; the bits in its memory are those of the engine that was swapped."""
    before, deployed = pool.registry.aliases()["seedling"].stable, {"min_replicas": 2, "max_replicas": 2, **QUICK}
    try:
        deploy(pool, **deployed)
        when(lambda: replicas(pool) == 2, 90)
        deploy(pool, **{**deployed, "min_replicas": 1, "max_replicas": 1})
        when(lambda: len(engines(pool)) == 2 and replicas(pool) == 1, 60)
        base = pool.registry.fetch(pool.registry.manifest(VersionId("seedling", 1)), tmp_path / "cache")
        folder = make_weights(tmp_path / "weights", base, 77, 0.02)
        weights = pool.registry.register("seedling", "weights", None, folder, Lineage())
        client.of(pool.config).publish(weights.id, "seedling", "while one sleeps", DIRECT)
        adapter = make_adapter(tmp_path / "adapter", folder, 8, 78)
        tuned = pool.registry.register("seedling", "adapter", weights.id, adapter, Lineage())
        client.of(pool.config).publish(tuned.id, "seedling", "while it still sleeps", DIRECT)
        deploy(pool, **deployed)
        print(f"awake after {when(lambda: replicas(pool) == 2, 60):.1f} s")
        states = client.of(pool.config).status()["replicas"]
        assert {state["base"] for state in states} == {str(weights.id)} and len({state["fingerprint"] for state in states}) == 1
        assert all(str(tuned.id) in state["held"] for state in states)
        assert len(engines(pool)) == 2, "none was started"
    finally:
        client.of(pool.config).publish(before, "seedling", "as it was", DIRECT)
        deploy(pool)


def named(pool: Running, name: str) -> list[psutil.Process]:
    return [one for one in pool.pool.descendants() if name in line_of(one)]


def line_of(process: psutil.Process) -> str:
    """Its command line; empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def engines(pool: Running) -> list[psutil.Process]:
    return named(pool, "ray::Engine")
