"""A run on Ray Train follows its grant, on a small Ray of its own. The grants come from an actor that the test tells."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from cluster.config import Config
from cluster.store.objects import Store
from jobs.training import rounds
from jobs.training.checkpoints import Checkpoints
from tests.cluster.test_driver import Cancelled, Fit, config, grants, slots_free
from tests.waiting import when

__all__ = ["config", "grants"]
"""Fixtures."""


@pytest.fixture
def start(grants: Any, config: Config) -> Iterator[Callable[[str, float], Fit]]:
    runs: list[Fit] = []

    def begin(name: str, epochs: float) -> Fit:
        runs.append(Fit(config, name, epochs, rounds.fit))
        return runs[-1]

    yield begin
    for run in runs:
        run.cancelled = True
        run.thread.join(60)
        assert not run.thread.is_alive()


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if re.search("RayTrainWorker", " ".join(process.cmdline()))]


@pytest.mark.timeout(600)
def test_a_run_on_ray_train_follows_its_grant_and_loses_no_step(grants: Any, config: Config, start: Any) -> None:
    def holds(held: int, active: int) -> Callable[[], bool]:
        return lambda: ray.get(grants.holds.remote()) == (held, active)

    def kept() -> int:
        newest = Checkpoints(Store(config.store), "small-1").newest()
        return newest.step if newest else -1

    ray.get(grants.give.remote(0, "serving has all"))
    run: Fit = start("small-1", 100_000)
    when(lambda: "waiting for slots: serving has all" in run.notes, 60)
    ray.get(grants.give.remote(2))
    print(f"two train {when(holds(2, 2), 240):.1f} s after the grant")
    assert run.began()[-1] == (2, 0) and slots_free() == 1

    asked_s = time.monotonic()
    ray.get(grants.give.remote(1))
    when(lambda: slots_free() == 3, 60)
    print(f"slots free {time.monotonic() - asked_s:.1f} s after the grant fell, ", end="")
    stopped = kept()
    when(holds(1, 1), 240)
    print(f"one trains after {time.monotonic() - asked_s:.1f} s")
    assert run.began()[-1] == (1, stopped), "from exactly the step after which the two stopped"

    os.kill(workers()[0].pid, signal.SIGKILL)
    groups = len(run.began())
    print(f"killed: trains again after {when(lambda: len(run.began()) > groups, 240):.1f} s")
    assert run.began()[-1] == (1, stopped), "Ray Train has started it again from the newest checkpoint"

    when(lambda: run.seen[-1].step > stopped + 10, 60)
    ray.get(grants.give.remote(0, "serving has all"))
    when(holds(0, 0), 60)
    assert slots_free() == 3 and kept() > stopped
    stopped = kept()
    ray.get(grants.give.remote(1))
    when(holds(1, 1), 240)
    assert run.began()[-1] == (1, stopped)

    run.cancelled = True
    run.thread.join(30)
    assert isinstance(run.error, Cancelled) and kept() >= run.seen[-1].step
