"""A run on Ray Train follows its grant as an elastic one does, on a small Ray of its own. The grants come from an actor that the test tells."""

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
from cluster.jobspec import Trainer
from cluster.store.objects import Store
from jobs.training.launch import TRAINERS
from jobs.training.state.checkpoints import Checkpoints
from tests.cluster.test_driver import Cancelled, Fit, config, grants, slots_free
from tests.waiting import when

__all__ = ["config", "grants"]
"""Fixtures."""

pytestmark = pytest.mark.chaos


@pytest.fixture
def start(grants: Any, config: Config) -> Iterator[Callable[..., Fit]]:
    """Starts runs that are never over."""
    runs: list[Fit] = []

    def begin(name: str, trainer: Trainer) -> Fit:
        runs.append(Fit(config, name, 100_000, TRAINERS[trainer]))
        return runs[-1]

    yield begin
    for run in runs:
        run.cancelled = True
        run.thread.join(60)
        assert not run.thread.is_alive()


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if re.search("RayTrainWorker", " ".join(process.cmdline()))]


def holds(grants: Any, held: int, active: int) -> Callable[[], bool]:
    return lambda: ray.get(grants.holds.remote()) == (held, active)


def kept(config: Config, run: str) -> int:
    """The step of the newest checkpoint."""
    newest = Checkpoints(Store(config.store), run).newest()
    return newest.step if newest else -1


@pytest.mark.parametrize("trainer", ["elastic", "ray_train"])
def test_a_run_that_yields_a_slot_goes_on_with_the_other(grants: Any, start: Any, trainer: Trainer) -> None:
    ray.get(grants.give.remote(2))
    run: Fit = start(f"{trainer}-1", trainer)
    began_s = when(holds(grants, 2, 2), 240)
    asked_s = time.monotonic()
    ray.get(grants.give.remote(1))
    when(lambda: slots_free() >= 2, 60)
    free_s = time.monotonic() - asked_s
    when(holds(grants, 1, 1), 240)
    again_s = time.monotonic() - asked_s
    print(
        f"{trainer}: trains {began_s:.1f} s after the grant; slot free {free_s:.1f} s and training again {again_s:.1f} s after it fell"
    )
    when(lambda: run.began()[-1][0] == 1, 10)  # the driver notes it at its next turn
    steps = [step for _, step in run.began()]
    assert steps[0] == 0 < steps[-1] and steps == sorted(steps)


def test_a_run_on_ray_train_loses_no_step_that_it_was_told_to_keep(grants: Any, config: Config, start: Any) -> None:
    ray.get(grants.give.remote(0, "serving has all"))
    run: Fit = start("small-1", "ray_train")
    when(lambda: "waiting for slots: serving has all" in run.notes, 60)
    ray.get(grants.give.remote(2))
    when(holds(grants, 2, 2), 240)
    assert run.began()[-1] == (2, 0) and slots_free() == 1
    ray.get(grants.give.remote(1))
    when(lambda: slots_free() == 3, 60)
    stopped = kept(config, "small-1")
    when(holds(grants, 1, 1), 240)
    assert stopped > 0 and run.began()[-1] == (1, stopped), "from exactly the step after which the two stopped"

    groups = len(run.began())
    os.kill(workers()[0].pid, signal.SIGKILL)
    print(f"killed: trains again after {when(lambda: len(run.began()) > groups, 240):.1f} s")
    assert run.began()[-1] == (1, stopped), "Ray Train has started it again from the newest checkpoint"

    when(lambda: run.seen[-1].step > stopped + 10, 60)
    ray.get(grants.give.remote(0, "serving has all"))
    when(holds(grants, 0, 0), 60)
    assert slots_free() == 3 and kept(config, "small-1") > stopped
    stopped = kept(config, "small-1")
    ray.get(grants.give.remote(1))
    when(holds(grants, 1, 1), 240)
    assert run.began()[-1] == (1, stopped)

    run.cancelled = True
    run.thread.join(30)
    assert isinstance(run.error, Cancelled) and kept(config, "small-1") >= run.seen[-1].step
