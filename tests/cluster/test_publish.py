"""Publishing into live traffic: nothing fails, every answer has one version, nobody sees versions go back and forth."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import load
from cluster import client as admin
from cluster.config import Config
from cluster.errors import VersionRefused
from cluster.pool import graph, submit
from cluster.types import Lineage, Manifest, VersionId
from tests.adapters import make_adapter
from tests.conftest import ROOT, Running
from tests.waiting import when

TIDE = ROOT / "jobs" / "seedling" / "tide.jsonl"
THINK_S = 0.4
"""A client's pause between requests: always some in flight, and two cores still have time to train and to start engines."""
ONE = VersionId("seedling", 1)


def traffic(pool: Running, streams: int = 8) -> AbstractContextManager[list[load.Sample]]:
    """Concurrent streaming clients until the block ends."""
    return load.background(f"{pool.url}/v1", "seedling", streams, THINK_S)


def versions_seen(samples: list[load.Sample], client: int) -> list[str]:
    """One client's versions in the order in which it sent its requests, repetitions joined."""
    own = sorted((s for s in samples if s.client == client), key=lambda s: s.start_s)
    return [str(version) for version, _ in groupby(s.version for s in own)]


def adapter(pool: Running, tmp_path: Path, rank: int = 8, seed: int = 0) -> Manifest:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_adapter(tmp_path / f"adapter-{seed}", base, rank, seed)
    return pool.registry.register("seedling", "adapter", ONE, folder, Lineage())


def ask(pool: Running, model: str = "seedling", **of: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 48, **of}
    return httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=150)


def named(pool: Running, prefix: str) -> list[psutil.Process]:
    """The pool's processes whose name (at most 15 characters of it) starts with ``prefix``."""
    return [
        p
        for p in pool.pool.descendants()
        if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and p.name().startswith(prefix)
    ]


def text(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def test_train_publish_and_roll_back_under_load(pool: Running) -> None:
    """8 streaming clients for the whole of train + publish + rollback."""
    before, (*earlier, live) = text(ask(pool)), pool.registry.history("seedling")
    with traffic(pool) as samples:
        time.sleep(1)
        options = {"data": str(TIDE), "base": "seedling", "name": "seedling", "epochs": 30, "publish": True}
        *_, job = submit.follow(pool.config, submit.start(pool.config, "finetune", **options))
        after = text(ask(pool))
        time.sleep(1)
        assert pool.command("rollback", "seedling").returncode == 0
        time.sleep(1)
    assert job["progress"]["step"] == job["progress"]["steps"] and job["result"]["made"]["stage"] == "live"
    failures = [s.error for s in samples if not s.ok]
    assert failures == [] and len(samples) > 100
    made = job["result"]["made"]["version"]
    moves = pool.registry.history("seedling")[len(earlier) :]  # other tests may have moved it before
    assert [str(move.stable) for move in moves] == (seen := [str(live.stable), made, str(live.stable)])
    assert {(s.generation, s.version) for s in samples} == {(move.generation, str(move.stable)) for move in moves}
    for client in range(8):
        assert versions_seen(samples, client) == seen, "each client saw each generation once, in order"
    assert before != after and text(ask(pool)) == before
    assert ask(pool, made).headers["x-model-version"] == made, "old versions stay addressable"
    lineage = pool.registry.manifest(VersionId.parse(made)).lineage
    assert lineage.metrics["eval_loss"] < lineage.metrics["eval_loss_before"]


def test_an_adapter_is_acknowledged_by_digest_before_it_is_live(pool: Running, tmp_path: Path) -> None:
    made = adapter(pool, tmp_path, seed=1)
    live = pool.registry.aliases()["seedling"].stable
    rollout = admin.of(pool.config).publish(made.id, "seedling", "test")
    assert (rollout.alias, rollout.stage) == ("seedling", "live")
    for replica in admin.of(pool.config).status()["replicas"]:
        assert replica["held"][str(made.id)] == made.digest
    assert ask(pool).headers["x-model-version"] == str(made.id)
    admin.of(pool.config).publish(live, "seedling", "clean up")


def test_publishing_what_is_live_already_changes_nothing(pool: Running) -> None:
    live = pool.registry.aliases()["seedling"]
    assert admin.of(pool.config).publish(live.stable, "seedling", "again").stage == "live"
    assert pool.registry.aliases()["seedling"] == live


def test_a_damaged_adapter_is_refused_and_traffic_does_not_notice(pool: Running, tmp_path: Path) -> None:
    made = adapter(pool, tmp_path, seed=2)
    root = pool.registry.store.local_root
    assert root is not None
    tensors = root / f"versions/seedling/{made.id.n}/files/adapter_model.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    assert_refused_under_traffic(pool, made, "does not match its manifest")


def test_an_adapter_above_the_engines_rank_is_refused(pool: Running, tmp_path: Path) -> None:
    assert_refused_under_traffic(pool, adapter(pool, tmp_path, rank=64, seed=3), "rank 64")


def test_an_adapter_on_another_base_is_refused(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    other = pool.registry.register("sapling", "weights", None, base, Lineage()).id
    folder = make_adapter(tmp_path / "adapter", base)
    made = pool.registry.register("seedling", "adapter", other, folder, Lineage())
    assert_refused_under_traffic(pool, made, "fleet hosts seedling@1")


def test_an_adapter_that_the_engine_cannot_load_is_refused(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_adapter(tmp_path / "adapter", base)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    made = pool.registry.register("seedling", "adapter", ONE, folder, Lineage())
    assert_refused_under_traffic(pool, made, "not a whole safetensors file")


def assert_refused_under_traffic(pool: Running, made: Manifest, words: str) -> None:
    """Refused with words that explain, the alias unmoved, the same replica alive, no request failed."""
    live = pool.registry.aliases()["seedling"]
    replicas = {replica["id"] for replica in admin.of(pool.config).status()["replicas"]}
    with traffic(pool, streams=4) as samples:
        with pytest.raises(VersionRefused, match=words):
            admin.of(pool.config).publish(made.id, "seedling", "must not work")
        time.sleep(0.5)
    assert pool.registry.aliases()["seedling"] == live
    assert {replica["id"] for replica in admin.of(pool.config).status()["replicas"]} == replicas
    assert [s.error for s in samples if not s.ok] == [] and {s.version for s in samples} == {str(live.stable)}


def test_control_converges_after_it_was_killed(pool: Running, tmp_path: Path) -> None:
    """The alias moves in the store while nobody watches; the new control makes replicas and gateways follow. No request fails."""
    made = adapter(pool, tmp_path, seed=4)
    live = pool.registry.aliases()["seedling"]
    with traffic(pool, streams=4) as samples:
        (control,) = named(pool, "ray::Control")
        control.kill()
        pool.registry.move("seedling", made.id, "moved behind control's back", "test", live.generation)
        wait_until(lambda: ask(pool).headers.get("x-model-version") == str(made.id), timeout_s=40)
    assert [s.error for s in samples if not s.ok] == []
    admin.of(pool.config).publish(live.stable, "seedling", "clean up")


def test_a_replica_that_starts_later_comes_up_with_what_is_live(pool: Running, tmp_path: Path) -> None:
    """And with two gateways and two replicas no client sees a move of the alias go back."""
    made, next_one = adapter(pool, tmp_path, seed=5), adapter(pool, tmp_path, seed=6)
    admin.of(pool.config).publish(made.id, "seedling", "before the second replica")
    with traffic(pool, streams=8) as samples:
        graph.deploy(doubled(pool.config))
        wait_until(lambda: len(admin.of(pool.config).status()["replicas"]) == 2, timeout_s=120)
        assert all(replica["held"].get(str(made.id)) == made.digest for replica in admin.of(pool.config).status()["replicas"])
        wait_until(lambda: len(gateways(pool)) == 2, timeout_s=60)
        time.sleep(1)
        for version in (next_one, made) * 2:
            admin.of(pool.config).publish(version.id, "seedling", "moved under two gateways")
            time.sleep(1)
        graph.deploy(pool.config)
        wait_until(lambda: len(admin.of(pool.config).status()["replicas"]) == 1, timeout_s=90)
    assert len(cores(pool)) == 1, "whatever else there is sleeps"
    assert [s.error for s in samples if not s.ok] == [], "neither the new replica nor its end cost a request"
    assert [s.generation for s in samples if s.generation is None] == []
    for client in range(8):
        own = [s.generation or 0 for s in sorted((s for s in samples if s.client == client), key=lambda s: s.start_s)]
        assert own == sorted(own), "no client saw a generation come back"


def doubled(config: Config) -> Config:
    """The same with two replicas and two gateways."""
    fleet = config.fleet.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    return config.model_copy(update={"fleet": fleet, "gateway": config.gateway.model_copy(update={"replicas": 2})})


def cores(pool: Running) -> list[psutil.Process]:
    """Of the engines that serve."""
    serving = {replica["pid"] for replica in admin.of(pool.config).status()["replicas"]}
    return [process for process in named(pool, "VLLM::EngineCor") if process.ppid() in serving]


def gateways(pool: Running) -> list[psutil.Process]:
    return [p for p in named(pool, "ray::ServeRepli") if "Gateway" in "".join(p.cmdline())]


def test_when_vllm_dies_health_says_so_and_requests_fail_fast_or_wait_for_the_next_engine(pool: Running) -> None:
    """/health used to say ok for half a minute, while every request failed in words about a missing attribute."""
    live, unusual = pool.registry.aliases()["seedling"], {"min_p": 0.05, "ignore_eos": True, "max_tokens": 900}
    (core,) = cores(pool)
    with ThreadPoolExecutor() as threads:
        long = threads.submit(ask, pool, **unusual)
        time.sleep(0.5)
        core.kill()
        began_s, answer = time.monotonic(), long.result()
    took_s = time.monotonic() - began_s
    health_s = when(lambda: httpx.get(f"{pool.url}/health").json()["status"] != "ok", 3)
    print(f"an error after {took_s:.1f} s: {answer.json()['error']['message']} /health said so {health_s:.1f} s later")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_lost") and took_s < 2
    again = ask(pool, **unusual)
    assert (again.status_code, again.json()["error"]["code"]) == (503, "request_quarantined"), "it was alone there"
    assert "min_p 0.05" in again.json()["error"]["message"] and again.headers["x-request-id"] in again.json()["error"]["message"]
    assert 0 < int(again.headers["retry-after"]) <= 60
    wait_until(lambda: ask(pool).status_code == 200, timeout_s=150)
    assert ask(pool).headers["x-model-version"] == str(live.stable)


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.2)
