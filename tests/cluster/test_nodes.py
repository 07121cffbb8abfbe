"""A pool of several nodes on one machine: real raylets that join a pool whose job waits for them and die while it trains, or that Ray's autoscaler
adds and takes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import load
from cluster import client
from cluster.pool import graph, submit
from cluster.pool import local as pools
from cluster.store.jobs import JobStore
from jobs.training.state.checkpoints import Checkpoints
from tests.cluster.test_slots import LONG, TIDE, Job, Record, finetune, processes, record, replicas, running, scaled
from tests.conftest import ROOT, Running, free_ports
from tests.waiting import when

__all__ = ["record"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@contextmanager
def node(pool: Running, slots: int) -> Iterator["subprocess.Popen[bytes]"]:
    """One more node, in a process of its own, once the pool has it.

    Training stands still while it starts: a raylet ends where its agent has not begun within 15 s (ray-project/ray#65983), and beside training
    on two cores it has not.
    """
    there, process = total(pool) + slots, join(pool, slots)
    try:
        when(lambda: bool(raylets(process)), 60)
        with held(processes(pool, "ray::Worker")):
            when(lambda: total(pool) == there, 20)  # a member that does not answer for 30 s counts as lost
        yield process
    finally:
        end(process)


def raylets(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children(recursive=True) if "raylet" in one.name()]


@contextmanager
def held(members: Sequence[psutil.Process]) -> Iterator[None]:
    for member in members:
        member.suspend()
    try:
        yield
    finally:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.resume()


def end(process: "subprocess.Popen[bytes]") -> None:
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):  # it was about to end
            one.kill()
    process.wait(10)


def join(pool: Running, slots: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **pools.client_environment(pool.config), "RAY_worker_niceness": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.joined", pool.pool.address, str(slots)],
        env=environment,
        cwd=ROOT,
        stdout=(pool.config.home / "node.log").open("wb"),
        stderr=subprocess.STDOUT,
    )


def total(pool: Running) -> float:
    return client.of(pool.config).status()["slots"]["total"]


@pytest.mark.timeout(900)
def test_a_job_grows_onto_a_node_that_joins_and_outlives_its_loss(pool: Running, tmp_path: Path, record: Record) -> None:
    assert total(pool) == 3
    with node(pool, slots=2) as lost, running(pool, tmp_path, *finetune(), workers=4) as job:
        then = len(job.text)
        for raylet in raylets(lost):
            raylet.kill()
        print(f"two go on {when(lambda: 'training with 2 workers' in job.text[then:], 60):.1f} s after the node died")
        print(f"the pool has noticed {when(lambda: total(pool) == 3, 60):.1f} s later")
        when(lambda: job.trains(2), 30)
        assert job.goes_on()
        with node(pool, slots=2):
            grown_s = when(lambda: job.trains(4), 480)  # they load beside the training, on the same two cores
            print(f"four again {grown_s:.1f} s after another joined")
            time.sleep(1)
            assert job.goes_on()


@pytest.fixture
def autoscaled(pool: Running, tmp_path: Path) -> Iterator[Running]:
    """Another pool on the same store, with one slot, to which Ray's autoscaler adds machines with one each."""
    gcs, dashboard, gateway = free_ports(3)
    ports = {"gcs_port": gcs, "dashboard_port": dashboard, "agent_ports": pool.config.pool.agent_ports + 5_000, "slots": 1}
    quick = {"warm_pool_s": 3.0, "scale_down_after_s": 1.0}
    config = pool.config.model_copy(
        update={
            "home": tmp_path / "home",
            "pool": pool.config.pool.model_copy(update=ports),
            "gateway": pool.config.gateway.model_copy(update={"port": gateway}),
            "fleet": pool.config.fleet.model_copy(update=quick),
        }
    )
    resolved = pools.remember(config)
    os.environ.update(pools.environment(config))
    line = [sys.executable, "-m", "tests.autoscaled", str(resolved)]
    with (config.home / "pool.log").open("wb") as log:
        supervisor = psutil.Popen(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    started = pools.Pool(supervisor.pid, supervisor.create_time(), pools.address(config), pools.dashboard(config))
    (config.home / "pool.json").write_text(json.dumps(asdict(started)))
    try:
        when(lambda: answers(f"{started.dashboard}/api/version"), 60)
        graph.deploy(config)
        yield Running(config, pool.registry, started)
    finally:
        pools.down(config)
        pools.find(pool.config)  # its token and network again


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, headers=pools.bearer(), timeout=2).status_code == 200
    return False


def test_rays_autoscaler_adds_a_machine_for_a_job_that_has_no_room_and_takes_it_when_the_job_has_ended(
    autoscaled: Running, tmp_path: Path
) -> None:
    """Beside one that never has any: Ray adds nothing where not all that it is asked for fits."""
    huge = Job(autoscaled, tmp_path, *finetune(), workers=9, min_workers=9)
    print(f"is told so {when(lambda: 'and the autoscaler adds no more for it' in huge.text, 120):.1f} s after it was begun")
    began_s = time.monotonic()
    with running(autoscaled, tmp_path, *finetune(), workers=1) as job:
        print(f"trains {time.monotonic() - began_s:.1f} s after it was begun")
        assert total(autoscaled) == 2 and job.goes_on() and not huge.steps
    huge.process.terminate()
    huge.process.wait(30)
    print(f"the machine is gone {when(lambda: total(autoscaled) == 1, 60):.1f} s after the job ended")
    assert replicas(autoscaled) == 1


def test_rays_autoscaler_adds_a_machine_for_a_replica_and_takes_it_when_its_engine_has_ended(autoscaled: Running) -> None:
    assert total(autoscaled) == 1
    with load.background(f"{autoscaled.url}/v1", "seedling", streams=2) as samples:
        scaled(autoscaled, 2)
        print(f"{total(autoscaled):g} slots, {replicas(autoscaled)} replicas")
        assert total(autoscaled) == 2 and replicas(autoscaled) == 2
    assert samples and not [sample.error for sample in samples if sample.error]
    sleepy = autoscaled.config.fleet.model_copy(update={"min_replicas": 0, "sleep_after_s": 1.0})
    graph.deploy(autoscaled.config.model_copy(update={"fleet": sleepy}))
    when(lambda: replicas(autoscaled) == 0, 60)
    print(f"the machine is gone {when(lambda: total(autoscaled) == 1, 120):.1f} s later")


def test_rays_autoscaler_adds_a_machine_for_a_fleet_and_takes_it_when_the_fleet_is_removed(autoscaled: Running) -> None:
    """It used to be refused, since the pool's one slot is taken. Its engine would keep the machine, were it to sleep on."""
    operator = client.of(autoscaled.config)
    bounds = {"min_replicas": 1, "max_replicas": 1, "warm_pool_s": 600.0}
    operator.add_fleet("extra", {"model": "seedling@1", **bounds})
    print(f"it serves after {when(lambda: replicas(autoscaled) == 2, 150):.1f} s, on {total(autoscaled):g} slots")
    assert total(autoscaled) == 2
    operator.remove_fleet("extra", force=False)
    print(f"the machine is gone {when(lambda: total(autoscaled) == 1, 60):.1f} s after it was removed")
    assert [fleet["name"] for fleet in operator.fleets()] == ["seedling"]


def test_a_pool_that_ends_lets_its_jobs_keep_what_they_learnt(autoscaled: Running) -> None:
    """As by Ctrl-C in the terminal of `springtide run`."""
    options = {"data": str(ROOT / TIDE), "base": "seedling@1", "name": "ebb", "epochs": LONG}
    job = submit.start(autoscaled.config, "finetune", **options)
    reached = next(now["progress"]["step"] for now in submit.follow(autoscaled.config, job) if now["progress"])
    pools.down(autoscaled.config)
    kept = Checkpoints(autoscaled.registry.store, job).newest()
    assert kept and kept.step >= reached > 0
    result = JobStore(autoscaled.registry.store).result(job)
    assert result and result.status == "cancelled" and f"--resume {job}" in result.message
