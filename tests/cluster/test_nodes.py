"""A pool of several nodes on one machine: real raylets that join and die while a job trains."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster import admin
from cluster import pool as pools
from tests.cluster.test_tide import Record, finetune, record, running
from tests.conftest import Running
from tests.waiting import when

__all__ = ["record"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@contextmanager
def node(pool: Running, slots: int) -> Iterator["subprocess.Popen[bytes]"]:
    """One more node, as `ray start --address` on another machine would join."""
    executable = pools.ray_command(pool.config)[0]
    options = {
        "address": pool.pool.address,
        "num-cpus": 2,
        "resources": json.dumps({"slot": slots}),
        "object-store-memory": 80 << 20,
    }
    ports = {"min-worker-port": 0, "max-worker-port": 0, "dashboard-agent-listen-port": 0, "metrics-export-port": 0}
    flags = [f"--{name}={value}" for name, value in {**options, **ports}.items()]
    joined = subprocess.Popen(
        [executable, "start", "--block", "--disable-usage-stats", *flags],
        env={**os.environ, **pools.client_environment(pool.config), "RAY_worker_niceness": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield joined
    finally:
        for process in [*psutil.Process(joined.pid).children(recursive=True), psutil.Process(joined.pid)]:
            process.kill()
        joined.wait(10)


def total(pool: Running) -> float:
    return admin.status(pool.config)["slots"]["total"]


def test_a_job_grows_onto_a_node_that_joins_and_outlives_its_loss(pool: Running, tmp_path: Path, record: Record) -> None:
    assert total(pool) == 3
    with node(pool, slots=2) as joined:
        when(lambda: total(pool) == 5, 60)
        with running(pool, tmp_path, *finetune(), workers=4) as job:
            raylets = [one for one in psutil.Process(joined.pid).children(recursive=True) if "raylet" in one.name()]
            then = len(job.text)
            for raylet in raylets:
                raylet.kill()
            print(f"two go on {when(lambda: 'training with 2 workers' in job.text[then:], 60):.1f} s after the node died")
            print(f"the pool has noticed {when(lambda: total(pool) == 3, 60):.1f} s later")
            when(lambda: job.trains(2), 30)
            assert job.goes_on()
            with node(pool, slots=2):
                print(f"four again {when(lambda: job.trains(4), 90):.1f} s after another joined")
                time.sleep(1)
                assert job.goes_on()
