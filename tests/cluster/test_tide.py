"""Slots go from a running job to serving and back, on the real pool, and the job loses no step."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import admin, graph
from cluster.types import VersionId
from tests.conftest import ROOT, Running

TIDE = "jobs/seedling/tide.jsonl"


def when(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition held."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - began_s


def started(pool: Running, log: Path, workers: int, epochs: int) -> "subprocess.Popen[bytes]":
    home = {"SPRINGTIDE_HOME": str(pool.config.home), "SPRINGTIDE_TRAINING__WORKERS": str(workers)}
    line = [
        sys.executable,
        "-m",
        "jobs.finetune",
        "--data",
        TIDE,
        "--base",
        "seedling@1",
        "--name",
        "ebb",
        "--epochs",
        str(epochs),
    ]
    return subprocess.Popen(line, env={**os.environ, **home}, cwd=ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def scaled(pool: Running, replicas: int) -> None:
    fleet = pool.config.fleet.model_copy(update={"min_replicas": replicas, "max_replicas": replicas})
    graph.deploy(pool.config.model_copy(update={"fleet": fleet}))


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_gives_a_slot_to_serving_and_takes_it_back(pool: Running, tmp_path: Path) -> None:
    log = tmp_path / "job.log"

    def held() -> int:
        jobs = admin.status(pool.config)["tide"]["jobs"]
        return jobs[0]["held"] if jobs else 0

    job = started(pool, log, workers=2, epochs=600)
    try:
        when(lambda: "progress" in log.read_text(), 120)
        assert held() == 2
        print(f"{log.read_text().count('progress')} lines of progress with two workers")
        lines = log.read_text().count("progress")
        scaling = threading.Thread(target=scaled, args=(pool, 2))
        scaling.start()
        print(f"slot free after {when(lambda: held() != 2, 30):.1f} s")
        print(f"training again after {when(lambda: log.read_text().count('progress') > lines + 2, 60):.1f} s more")
        scaling.join()
        assert held() == 1 and len(admin.status(pool.config)["replicas"]) == 2
        scaled(pool, 1)
        print(f"whole again after {when(lambda: held() == 2, 200):.1f} s")
        assert job.wait(600) == 0, log.read_text()[-2000:]
    finally:
        job.kill()
        scaled(pool, 1)
    made = pool.registry.manifest(VersionId.parse(json.loads(log.read_text().rpartition("result ")[2])["version"]))
    print(made.lineage.metrics)
