"""Jobs that get nothing for a while: from serving, from a job that comes first, and one of Ray Train's own that knows neither."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from benchmarks.job import sizes
from cluster import client
from jobs.training.state.checkpoints import Checkpoints
from tests.cluster.test_slots import LONG, TIDE, Job, Record, finetune, record, replicas, running, scaled, scaling
from tests.conftest import Running
from tests.waiting import when

__all__ = ["record"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
WAITS = "waiting for slots: "


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that have left end at once, and nothing is in memory when the slots return."""
    monkeypatch.setenv("SPRINGTIDE_FLEET__WARM_POOL_S", "0")


def holds(job: Job, slots: int) -> bool:
    allocation = job.allocation
    return allocation is not None and allocation.held == slots


def stopped(job: Job) -> list[int]:
    return [int(step) for step in re.findall(r"stopped after step (\d+)", job.text)]


def began(job: Job) -> list[int]:
    return [int(step) for step in re.findall(r"training with \d+ workers from step (\d+)", job.text)]


def kept(pool: Running, job: Job) -> int:
    """The step of the newest whole checkpoint."""
    newest = Checkpoints(pool.registry.store, job.name).newest()
    return newest.step if newest else -1


def test_a_job_without_slots_waits_and_goes_on_from_the_step_it_kept(
    pool: Running, tmp_path: Path, record: Record, forgetful: None
) -> None:
    """Yield to zero: serving takes all three slots, and nothing of the job is left but what is in the store."""
    with running(pool, tmp_path, *finetune()) as job:
        with scaling(pool, 3):
            print(f"holds nothing {when(lambda: holds(job, 0), 60):.1f} s after serving asked for everything")
            when(lambda: WAITS in job.text, 10)
            at = stopped(job)[-1]
            assert kept(pool, job) == at and not job.goes_on()
            print(f"three replicas {when(lambda: replicas(pool) == 3, 300):.1f} s later")
        assert holds(job, 0) and "it needs 1 slot; serving has 3" in job.text
        scaled(pool, 1)
        print(f"whole again {when(lambda: job.trains(2), 120):.1f} s after serving gave two back")
        assert job.goes_on()
        print(f"stopped after {stopped(job)}, began at {began(job)}")
        assert began(job)[1:] == stopped(job) and f"going on from the checkpoint of step {at}\n" in job.text
        assert job.times("lost") == 0


def test_a_job_of_a_higher_priority_takes_the_slots_of_a_lower_one_and_gives_them_back(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """Jobs queue by ``--priority``: the one that comes later needs both slots, and the first has none until it has ended."""
    with running(pool, tmp_path, *finetune()) as low:
        began_s = time.monotonic()
        with running(pool, tmp_path, *finetune("--priority", "5"), min_workers=2) as high:
            print(f"the higher one trains with two {time.monotonic() - began_s:.1f} s after it was begun")
            assert holds(low, 0) and WAITS in low.text and kept(pool, low) == stopped(low)[-1]
            assert high.goes_on() and not low.goes_on()
            waiting = low.steps
        print(f"the lower one trains with two {when(lambda: low.trains(2), 60):.1f} s after the higher one had ended")
        assert low.goes_on() and low.steps > waiting
        assert began(low)[1:] == stopped(low) and low.times("lost") == 0


@contextmanager
def stock(pool: Running, folder: Path, *line: str) -> Iterator[Job]:
    """Ray Train's own elastic run, on whatever Ray gives it; control knows nothing of it."""
    line = ("--data", TIDE, "--base", "seedling@1", "--workers", "1,3", "--epochs", str(LONG), "--look-s", "2", *line)
    job = Job(pool, folder, "benchmarks.stock", *line)
    try:
        yield job
    finally:
        job.process.terminate()
        try:
            job.process.wait(30)
        except subprocess.TimeoutExpired:
            job.process.kill()


def workers(job: Job) -> list[int]:
    """Of each formation, in order; all its workers say so, and Ray prints some lines twice."""
    return [count for count, _ in groupby(count for _, count in sizes(job.text))]


def free(pool: Running) -> int:
    return round(client.of(pool.config).status()["slots"]["free"])


def test_ray_trains_own_elastic_run_stays_off_the_slots_of_serving(pool: Running, tmp_path: Path, record: Record) -> None:
    """H5 and the lease for Ray Train's own runs: it begins with what there is, gives a slot when the lease rises, takes it when it falls."""
    with stock(pool, tmp_path) as job:
        print(f"trains {when(lambda: 'progress' in job.text, 90):.1f} s after it was begun")
        assert workers(job) == [2] and free(pool) == 0 and job.goes_on(), job.text[-2000:]
        with scaling(pool, 2):
            print(f"gave a slot {when(lambda: workers(job)[-1:] == [1], 90):.1f} s after serving asked")
            print(f"a second replica {when(lambda: replicas(pool) == 2, 120):.1f} s later")
            assert free(pool) == 0
        scaled(pool, 1)
        print(f"grew again {when(lambda: workers(job)[-1:] == [2], 120):.1f} s after serving gave it back")
        said = job.times("progress")  # from its last checkpoint: it counts its steps anew
        when(lambda: job.times("progress") > said, 10)
        assert workers(job) == [2, 1, 2] and replicas(pool) == 1, job.text[-4000:]
