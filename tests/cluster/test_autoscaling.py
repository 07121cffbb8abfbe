"""The fleet follows its load, on the real pool: down to no replica and back, and up where the engines have too much to do."""

import threading
import time
from typing import Any

import httpx

from cluster import admin, graph
from jobs.bench import load
from tests.conftest import Running
from tests.waiting import when

QUICK: dict[str, Any] = {"scale_up_after_s": 0, "scale_down_after_s": 2, "sleep_after_s": 2}


def deploy(pool: Running, **fleet: Any) -> None:
    graph.deploy(pool.config.model_copy(update={"fleet": pool.config.fleet.model_copy(update=fleet)}))


def replicas(pool: Running) -> int:
    return len(admin.status(pool.config)["replicas"])


def ask(pool: Running, timeout_s: float = 120) -> httpx.Response:
    body = {"model": "seedling", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=timeout_s)


def test_a_fleet_that_nobody_asks_sleeps_and_the_next_request_wakes_it(pool: Running) -> None:
    deploy(pool, min_replicas=0, max_replicas=1, **QUICK)
    try:
        print(f"asleep after {when(lambda: replicas(pool) == 0, 60):.1f} s")
        asleep = httpx.get(f"{pool.url}/health")
        assert asleep.status_code == 200 and asleep.json()["status"] == "asleep"
        assert [one["id"] for one in httpx.get(f"{pool.url}/v1/models").json()["data"]] == ["seedling"]
        answers: list[httpx.Response] = []
        asking = [threading.Thread(target=lambda: answers.append(ask(pool))) for _ in range(3)]
        began_s = time.monotonic()
        for one in asking:
            one.start()
        stages: list[str] = []
        while any(one.is_alive() for one in asking):
            stages.append(httpx.get(f"{pool.url}/health").json().get("stage", ""))
            time.sleep(0.2)
        print(f"awake after {time.monotonic() - began_s:.1f} s: {sorted(set(stage.partition(',')[0] for stage in stages))}")
        assert [one.status_code for one in answers] == [200] * 3
        assert any("starts its engine" in stage for stage in stages)
    finally:
        deploy(pool)
        when(lambda: replicas(pool) == 1, 60)


def test_engines_with_too_much_to_do_get_another_beside_them(pool: Running) -> None:
    deploy(pool, min_replicas=1, max_replicas=2, target_running=4, **QUICK)
    try:
        with load.background(f"{pool.url}/v1", "seedling", streams=12) as samples:
            print(f"a second replica after {when(lambda: replicas(pool) == 2, 90):.1f} s")
        assert not [sample.error for sample in samples if sample.error]
        when(lambda: replicas(pool) == 1, 120)
    finally:
        deploy(pool)
