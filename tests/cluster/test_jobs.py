"""A job's record after every way to end, and a listing that is true in each: processes killed by their ids."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster import client
from cluster import config as configuration
from cluster.errors import JobNotFound, PoolUnavailable
from cluster.jobspec import parse
from cluster.pool import graph
from cluster.pool import local as pools
from cluster.store.jobs import JobStore
from cluster.store.objects import Store
from cluster.store.registry import Registry
from tests.conftest import ROOT, Running, free_ports, pretrain
from tests.waiting import when

TIDE = ROOT / "jobs" / "seedling" / "tide.jsonl"
LONG = 4000
"""Epochs that nobody waits for."""


class Asked:
    """The pool, asked over HTTP as anybody asks it."""

    def __init__(self, pool: Running) -> None:
        self.pool = pool
        self.store = pool.registry.store
        self.records = JobStore(self.store)
        self.client = client.of(pool.config)

    def finetune(self, **options: Any) -> str:
        source = self.client.upload(TIDE)
        return self.client.submit(parse("finetune", {"data": f"{source}#tide.jsonl", "base": "seedling@1", **options}))

    def evaluate(self, version: str) -> str:
        return self.client.submit(parse("evaluate", {"version": version, "held_out": self.client.upload(TIDE)}))

    def get(self, path: str) -> Any:
        """The document as it is sent."""
        answer = httpx.get(f"{self.pool.url}{path}", headers=pools.bearer(), timeout=30)
        if answer.status_code != 200:
            raise PoolUnavailable(answer.text)
        return answer.json()

    def job(self, id: str) -> dict[str, Any]:
        return self.get(f"/admin/jobs/{id}")

    def status(self, id: str) -> str:
        """As a job alone says it, and as the listing does."""
        alone, [listed] = self.job(id), [one for one in self.get("/admin/jobs?limit=50")["jobs"] if one["id"] == id]
        return alone["status"] if alone["status"] == listed["status"] else f"{alone['status']} alone, {listed['status']} listed"

    def is_now(self, id: str, status: str) -> Callable[[], bool]:
        return lambda: self.status(id) == status

    def trains(self, id: str) -> bool:
        progress = self.job(id)["progress"]
        return progress is not None and progress["step"] > 0

    def processes(self, words: str) -> list[psutil.Process]:
        """Of this pool, by their command lines."""
        found: list[psutil.Process] = []
        for one in self.pool.pool.descendants():
            try:
                found += [one] if words in " ".join(one.cmdline()) else []
            except psutil.NoSuchProcess:
                continue
        return found

    def driver(self, id: str) -> psutil.Process:
        """The job's own process, and not the shell that started it."""
        name = self.job(id)["options"]["name"]
        [one] = [one for one in self.processes(f"--name={name}") if "python" in one.cmdline()[0]]
        return one


@pytest.fixture(scope="module")
def asked(pool: Running) -> Asked:
    return Asked(pool)


def test_a_normal_end(asked: Asked) -> None:
    id = asked.finetune(name="recorded", epochs=8, workers="1-2", priority=3)
    began_s = time.monotonic()
    assert asked.status(id) in ("queued", "waiting", "running")
    when(asked.is_now(id, "succeeded"), 120)
    took_s = time.monotonic() - began_s
    one = asked.job(id)
    assert one["result"]["made"]["version"] == "recorded@1" and one["owner"] == client.author() and one["verb"] == "finetune"
    assert one["progress"]["step"] == one["progress"]["steps"] > 0 and one["facts"]["base"] == "seedling@1"
    assert one["options"]["workers"] == "1-2"
    objects = asked.store.children(f"jobs/{id}/events")
    print(f"{len(objects)} objects of events in {took_s:.0f} s")
    assert 1 <= len(objects) <= took_s / 3 + 2
    happened = asked.client.events(id)
    assert happened == asked.records.events(id) and [event.at_s for event in happened] == sorted(event.at_s for event in happened)
    lineage = asked.pool.registry.versions("recorded")[0].lineage
    assert lineage.job == id and lineage.dataset_sha256 == hashlib.sha256(TIDE.read_bytes()).hexdigest()
    assert asked.store.children(f"runs/{id}") == []
    first = asked.client.log(id)
    assert f"run {id}" in first.text
    assert asked.client.log(id, first.next) == ("", first.next)


def test_a_cancel_removes_its_own_run_and_no_other(asked: Asked) -> None:
    """A log that names another run's name is no order to remove that run."""
    bystander = "finetune-00000000aaaa"
    asked.store.put_new(f"runs/{bystander}/about.json", b"{}")
    id = asked.finetune(name="cancelled-a", epochs=LONG)
    when(lambda: asked.trains(id), 90)
    asked.client.cancel(id)
    assert asked.status(id) == "cancelled" and asked.job(id)["message"] == f"Cancelled by {client.author()}."
    when(lambda: id not in asked.store.children("runs"), 10)
    assert bystander in asked.store.children("runs")
    asked.store.remove(f"runs/{bystander}")
    asked.client.cancel(id)
    assert asked.status(id) == "cancelled", "once more changes nothing"
    with pytest.raises(JobNotFound):
        asked.client.cancel("finetune-00000000bbbb")


def test_a_driver_that_is_killed(asked: Asked) -> None:
    id = asked.finetune(name="killed", epochs=LONG)
    when(lambda: asked.trains(id), 90)
    asked.driver(id).kill()
    print(f"lost after {when(asked.is_now(id, 'lost'), 40):.1f} s")
    one = asked.job(id)
    assert "Its driver was killed." in one["message"] and one["result"]["status"] == "lost"
    assert one["progress"]["step"] > 0, "where it was is still known"
    assert asked.records.result(id) is not None, "in the store, not in control's memory"


def test_control_that_is_killed(asked: Asked) -> None:
    id = asked.finetune(name="orphan", epochs=LONG)
    when(lambda: asked.trains(id), 90)
    reached = asked.job(id)["progress"]["step"]
    for control in asked.processes("ray::Control"):
        control.kill()

    def goes_on() -> bool:
        try:
            return asked.status(id) == "running" and asked.job(id)["progress"]["step"] > reached
        except PoolUnavailable:
            return False  # it is being started again

    print(f"listed as running again, and further, after {when(goes_on, 90):.1f} s")
    asked.client.cancel(id)
    assert asked.status(id) == "cancelled"


def test_an_evaluation_waits_in_words_and_can_be_cancelled(asked: Asked) -> None:
    """It took a slot that nobody arbitrates, and could wait for it without a word for ever."""
    holds = asked.finetune(name="holds", epochs=LONG, workers="2")
    when(lambda: asked.trains(holds), 90)
    id = asked.evaluate("seedling@1")
    when(asked.is_now(id, "waiting"), 90)
    assert "slots: " in asked.job(id)["waiting"]
    asked.client.cancel(id)
    assert asked.status(id) == "cancelled"
    assert asked.status(holds) == "running"
    again = asked.evaluate("seedling@1")
    when(asked.is_now(again, "waiting"), 90)
    asked.client.cancel(holds)
    when(asked.is_now(again, "succeeded"), 120)
    assert asked.job(again)["result"]["made"]["version"] == "seedling@1"


def test_bad_data_is_the_result_in_words(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "x"}\n')
    source = asked.client.upload(tmp_path / "mine.jsonl")
    id = asked.client.submit(parse("finetune", {"data": f"{source}#mine.jsonl", "base": "seedling@1"}))
    when(asked.is_now(id, "failed"), 60)
    assert "mine.jsonl, line 1: the keys are 'prompt'" in asked.job(id)["message"]


@pytest.mark.chaos
def test_a_head_that_is_killed_and_started_again_on_the_same_store(tmp_path: Path) -> None:
    gcs, dashboard, gateway = free_ports(3)
    ports = {"gcs_port": gcs, "dashboard_port": dashboard, "agent_ports": 26000, "slots": 3}
    config = configuration.load(
        overrides={"home": str(tmp_path), "pool": ports, "gateway": {"port": gateway}, "training": {"checkpoint_s": 2}}
    )
    pool = pools.up(config)
    try:
        pretrain(config)
        graph.deploy(config)
        registry = Registry(Store(config.store))
        asking = Asked(Running(config, registry, pool))
        done, id = asking.finetune(name="before", epochs=2), asking.finetune(name="headless", epochs=LONG)
        when(asking.is_now(done, "succeeded"), 120)
        when(lambda: any(name.isdigit() for name in asking.store.children(f"runs/{id}")), 120)
        processes = [*pool.descendants(), psutil.Process(pool.pid)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it was about to end
                process.kill()
        psutil.wait_procs(processes, timeout=20)  # until then it looks as if the pool ran
        assert JobStore(asking.store).result(id) is None, "nobody was left to say how it ended"
        pool = pools.up(config)
        graph.deploy(config)
        asking = Asked(Running(config, registry, pool))
        print(f"lost {when(asking.is_now(id, 'lost'), 150):.1f} s after control was back")
        assert asking.status(done) == "succeeded"
        assert f"--resume {id}" in asking.job(id)["message"]
        assert f"run {id}" in asking.client.log(id).text, "its log is on this machine still"
        again = asking.finetune(name="headless", epochs=LONG, resume=id)
        when(lambda: asking.trains(again), 120)
        assert asking.job(again)["run"] == id
        asking.client.cancel(again)
        assert asking.status(again) == "cancelled"
        when(lambda: id not in asking.store.children("runs"), 10)
    finally:
        pools.down(config)
