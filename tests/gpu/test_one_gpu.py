"""The tide on a real GPU: one accelerator that an engine and a job take in turns. Skipped where there is none.

In an environment of ``requirements/gpu.txt``: ``pytest -m chaos -s tests/gpu``. The model has 0.8 billion random parameters, so that what
moves has the size of something; what it says is nonsense.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from cluster import admin, graph
from cluster import config as configuration
from cluster import pool as pools
from cluster.config import Config, Fleet
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Lineage, VersionId
from deployments.memory import GIB, memories
from tests.cluster.test_tide import Job, finetune, processes, running
from tests.cluster.test_tide_queue import began, holds, stopped
from tests.conftest import Running, free_ports, pretrain
from tests.waiting import when

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and vLLM's GPU build (requirements/gpu.txt)"),
]
TRUNK = VersionId("trunk", 1)
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}

STRANGER = """
import time, torch
taken = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.8), dtype=torch.uint8, device="cuda")
print("holds", flush=True)
time.sleep(8)
"""


@pytest.fixture(autouse=True)
def jobs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are processes of this one here, and read its environment; `ray job submit` would give them the pool's configuration."""
    monkeypatch.setenv("SPRINGTIDE_FLEET__ACCELERATOR", "gpu")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One slot, which is a GPU. The fleet may sleep."""
    config = one_gpu(tmp_path_factory.mktemp("home"))
    pool = pools.up(config)
    registry = Registry(Store(config.store))
    try:
        timed("seedling trained on the GPU", lambda: pretrain(config.model_copy(update={"fleet": seedling(config)})))
        timed("trunk made and registered", lambda: plant(config, registry, tmp_path_factory.mktemp("trunk")))
        timed("deployed", lambda: graph.deploy(config))
        yield Running(config, registry, pool)
    finally:
        pools.down(config)


def one_gpu(home: Path) -> Config:
    gcs, dashboard, gateway = free_ports(3)
    fleet = {"min_replicas": 0, "max_replicas": 1, "scale_up_after_s": 0, "scale_down_after_s": 2, "sleep_after_s": 2}
    return configuration.load(
        overrides={
            "home": str(home),
            "pool": {"gcs_port": gcs, "dashboard_port": dashboard, "agent_ports": 21000 + os.getpid() % 50 * 100, "slots": 1},
            "gateway": {"port": gateway, "cold_start_timeout_s": 300},
            "fleet": {"accelerator": "gpu", "model": TRUNK.name, "dtype": "bfloat16", "kv_cache_bytes": None, **fleet},
            "training": {"budget": {"cool_down_s": 2}},
        }
    )


def seedling(config: Config) -> Fleet:
    return config.fleet.model_copy(update={"model": "seedling"})


def timed(what: str, act: Callable[[], Any]) -> None:
    began_s = time.monotonic()
    act()
    print(f"{what} in {time.monotonic() - began_s:.1f} s")


def plant(config: Config, registry: Registry, folder: Path) -> None:
    """A larger model with the seedling's tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    small = registry.fetch(registry.manifest(VersionId("seedling", 1)), config.home / "cache")
    shape = AutoConfig.from_pretrained(small, local_files_only=True)
    for key, value in {**SHAPE, "num_key_value_heads": 16, "head_dim": 128}.items():
        setattr(shape, key, value)
    model: Any = LlamaForCausalLM(shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small, local_files_only=True).save_pretrained(folder)
    registry.register(TRUNK.name, "weights", None, folder, Lineage())
    registry.move(TRUNK.name, TRUNK, "made here", "the tests", 0)


def used() -> float:
    """GiB of the GPU's memory that somebody has."""
    [memory] = memories("0")
    return (memory.total - memory.free) / GIB


def ask(pool: Running) -> float:
    """Seconds until an answer, from one request."""
    body = {"model": TRUNK.name, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}
    began_s = time.monotonic()
    answer = httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=150)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began_s


def asleep(pool: Running) -> bool:
    return admin.status(pool.config)["replicas"] == []


def tune(*line: str, epochs: int = 100_000) -> list[str]:
    return [TRUNK.name if word == "seedling@1" else word for word in finetune(*line, epochs=epochs)]


def test_an_engine_that_sleeps_gives_its_memory_to_a_job_and_takes_it_back(pool: Running, tmp_path: Path) -> None:
    """Serving scales to zero, the job trains, a request takes the GPU back, and the job goes on from its step: no step is lost."""
    print(f"nobody: {used():.1f} GiB used; first answer, by an engine that had to start, after {ask(pool):.1f} s", end="")
    awake = used()
    print(f"; awake {awake:.1f} GiB", end="")
    print(f"; asleep {when(lambda: asleep(pool), 60):.1f} s after, {used():.1f} GiB")
    assert used() < awake / 4
    with running(pool, tmp_path, *tune(), workers=1) as job:
        assert job.goes_on()
        print(f"the job trains with {used():.1f} GiB used")
        print(f"answer {ask(pool):.2f} s after it was asked, by an engine that slept; {used():.1f} GiB")
        assert holds(job, 0)
        when(lambda: "waiting for slots" in job.text, 10)
        when(lambda: asleep(pool), 60)
        print(f"trains again {when(lambda: job.trains(1), 120):.1f} s after the fleet slept")
        assert job.goes_on()
        print(f"stopped after {stopped(job)}, began at {began(job)}, {job.times('checkpoint')} checkpoints")
        assert began(job)[1:] == stopped(job) and job.times("lost") == 0
        again_s = ask(pool)
        print(f"and once more: {again_s:.2f} s")


def test_an_engine_wakes_in_the_memory_of_a_job_that_had_to_be_killed(pool: Running, tmp_path: Path) -> None:
    """H2: it does not yield, is ended at the deadline of 5 s, and the engine that slept finds the memory free."""
    ask(pool)
    when(lambda: asleep(pool), 60)
    line = ("tests.unwilling", "stuck", "--base", TRUNK.name)
    with running(pool, tmp_path, *line, workers=1, yield_deadline_s=5, report_s=0) as job:
        when(lambda: job.steps == 10, 30)
        print(f"answer {ask(pool):.2f} s after it was asked, of which 5 s are the job's")
        assert "did not give their slots back within 5 s" in job.text and job.times("the state could not be kept") == 0


def test_memory_that_a_stranger_holds_is_waited_for(pool: Running) -> None:
    """H6: a process that Ray does not know of has most of the GPU while the engine sleeps, and ends after the request has come."""
    ask(pool)
    when(lambda: asleep(pool), 60)
    stranger = subprocess.Popen([sys.executable, "-c", STRANGER], stdout=subprocess.PIPE)
    assert stranger.stdout and stranger.stdout.readline() == b"holds\n"
    print(f"{used():.1f} GiB used; answer {ask(pool):.2f} s after it was asked; the stranger ended after 8")
    assert stranger.poll() == 0


def test_a_killed_engine_leaves_no_memory_behind(pool: Running) -> None:
    """H6: its core is a process of its own, which must end with it."""
    ask(pool)
    awake = used()
    [replica] = admin.status(pool.config)["replicas"]
    psutil.Process(replica["pid"]).kill()
    print(f"memory is back {when(lambda: used() < awake / 4, 10):.2f} s after an engine was killed")
    print(f"next answer {ask(pool):.1f} s later")
    assert len(processes(pool, "EngineCore")) == 1


def test_what_was_trained_on_the_gpu_goes_live(pool: Running, tmp_path: Path) -> None:
    job = Job(pool, tmp_path, *[TRUNK.name if word == "ebb" else word for word in tune("--publish", epochs=2)], workers=1)
    try:
        took_s = when(lambda: job.process.poll() is not None, 240)
    finally:
        job.process.kill()
    print(f"trained and published in {took_s:.1f} s; then an answer in {ask(pool):.1f} s")
    alias = pool.registry.alias(TRUNK.name)
    assert job.process.returncode == 0 and alias and alias.stable == VersionId(TRUNK.name, 2), job.text[-3000:]
