"""One fine-tuning with each trainer, on the real pool: the same losses, and the same again where a worker's process is killed on the way."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.types import VersionId
from tests.cluster.test_slots import Job, finetune
from tests.conftest import Running
from tests.waiting import when

pytestmark = pytest.mark.chaos

EPOCHS = 100
TRAINERS = ("elastic", "ray_train")
STEP = re.compile(r"progress stage=finetune step=(\d+)/")
BEGAN = re.compile(r"\(\w+ pid=(\d+)\)\S* training with (\d+) workers from step (\d+)")
KEPT = re.compile(r"checkpoint step=(\d+)")


class Done(NamedTuple):
    """A run at its end."""

    job: Job
    metrics: dict[str, float]
    took_s: float

    @property
    def losses(self) -> dict[str, float]:
        return {name: self.metrics[name] for name in ("eval_loss_before", "eval_loss", "train_loss")}

    def __str__(self) -> str:
        losses = " ".join(f"{name}={loss:.5f}" for name, loss in self.losses.items())
        return f"{losses} tokens_per_s={self.metrics['tokens'] / self.metrics['seconds']:.0f} seconds={self.took_s:.1f}"


def started(pool: Running, folder: Path, trainer: str, workers: int, *set_: str) -> Job:
    # In bfloat16, which some processors are faster with, every way to divide a batch rounds otherwise: losses differ by a hundredth.
    line = finetune("--trainer", trainer, "--workers", str(workers), "--set", "precision=float32", *set_, epochs=EPOCHS)
    return Job(pool, folder, *line, workers=workers, checkpoint_s=1, report_s=0)


def finished(pool: Running, job: Job, began_s: float) -> Done:
    assert job.process.wait(280) == 0, job.text
    made = json.loads(re.findall(r"^result (.*)", job.text, re.MULTILINE)[0])
    metrics = pool.registry.manifest(VersionId.parse(made["version"])).lineage.metrics
    return Done(job, metrics, time.monotonic() - began_s)


def whole(pool: Running, folder: Path, trainer: str, workers: int, *set_: str) -> Done:
    began_s = time.monotonic()
    return finished(pool, started(pool, folder, trainer, workers, *set_), began_s)


def killed(pool: Running, folder: Path, trainer: str) -> Done:
    """A run of one worker whose process is killed after a third of the steps."""
    began_s = time.monotonic()
    job = started(pool, folder, trainer, 1)
    when(lambda: job.steps > EPOCHS // 2 and bool(KEPT.search(job.text)), 280)
    worker, then, kept = int(BEGAN.findall(job.text)[-1][0]), len(job.text), int(KEPT.findall(job.text)[-1])
    os.kill(worker, signal.SIGKILL)
    began_again_s = when(lambda: bool(BEGAN.search(job.text[then:])), 280)
    again_s = began_again_s + when(lambda: bool(STEP.search(job.text[then:].rpartition("training with")[2])), 60)
    done, reached = finished(pool, job, began_s), max(map(int, STEP.findall(job.text[:then])))
    _, _, first = BEGAN.findall(job.text[then:])[-1]
    print(f"{trainer}: killed after step {reached}, trains again from step {first} after {again_s:.1f} s")
    assert int(first) >= kept, "nothing is done twice that was in a checkpoint"
    return done


@pytest.fixture(scope="module")
def alone(pool: Running, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What all runs here are compared with."""
    done = whole(pool, tmp_path_factory.mktemp("alone"), "elastic", 1)
    print(f"elastic, 1 worker: {done}")
    return done


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_both_trainers_learn_the_same(pool: Running, tmp_path: Path, alone: Done, workers: int) -> None:
    runs = {trainer: whole(pool, tmp_path, trainer, workers) for trainer in TRAINERS if (trainer, workers) != ("elastic", 1)}
    for trainer, done in runs.items():
        print(f"{trainer}, {workers} workers: {done}")
        assert done.losses == pytest.approx(alone.losses, rel=1e-3)
        assert f"training with {workers} workers from step 0" in done.job.text
        assert done.metrics["steps_lost"] == 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_worker_of_two_processes_learns_the_same(pool: Running, tmp_path: Path, alone: Done, trainer: str) -> None:
    done = whole(pool, tmp_path, trainer, 1, "--set", "sharding.tensor=2")
    print(f"{trainer}, 1 worker of 2 processes: {done}")
    assert done.losses == pytest.approx(alone.losses, rel=1e-3)
    assert "training with 1 workers from step 0" in done.job.text and done.metrics["steps_lost"] == 0


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_killed_worker_costs_only_the_steps_since_the_newest_checkpoint(
    pool: Running, tmp_path: Path, alone: Done, trainer: str
) -> None:
    done = killed(pool, tmp_path, trainer)
    print(f"{trainer}, killed: {done}")
    assert done.losses == pytest.approx(alone.losses, rel=1e-3)
