"""Workers of two processes and two slots come, go and die on a small Ray of its own. The grants come from an actor that the test tells."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import Config, parse
from cluster.control.client import ACTOR, NAMESPACE
from cluster.jobspec import Trainer
from cluster.store.registry import registry_of
from cluster.types import Lineage
from jobs.training.launch import TRAINERS
from tests.cluster.test_driver import Fit, Grants, slots_free, workers
from tests.unit.test_sharded import Tuning, settings
from tests.waiting import when

pytestmark = pytest.mark.chaos

SECONDS = 240


class Paced(Tuning):
    """Twenty milliseconds a step, so that a run is not over before something happens to it."""

    def gradients(self, batch: list[int], rank: int, world: int) -> Any:
        time.sleep(0.02)
        return super().gradients(batch, rank, world)


@pytest.fixture(scope="module")
def grants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    ray.init("local", num_cpus=2, resources={"slot": 4}, include_dashboard=False, log_to_driver=False, namespace=NAMESPACE)
    yield ray.remote(Grants).options(name=ACTOR, num_cpus=0, max_concurrency=4).remote()
    ray.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    training = {"workers": 2, "yield_deadline_s": 10, "checkpoint_s": 3600, "report_s": 3600, "threads_per_worker": 1}
    config = parse({"home": str(tmp_path), "store": (tmp_path / "store").as_uri(), "training": training})
    shape = LlamaConfig(
        vocab_size=62,
        hidden_size=16,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "small")
    registry_of(config).register("small", "weights", None, tmp_path / "small", Lineage())
    return config


@pytest.fixture
def start(grants: Any, config: Config) -> Iterator[Callable[..., Fit]]:
    runs: list[Fit] = []

    def begin(name: str, trainer: Trainer, epochs: float) -> Fit:
        chosen = settings(config, epochs=epochs, sharding={"tensor": 2})

        def fit(config: Config, _work: Any, _settings: Any, *more: Any) -> Any:
            return TRAINERS[trainer](config, Paced, chosen, *more, parts=2)

        runs.append(Fit(config, name, epochs, fit))
        return runs[-1]

    yield begin
    for run in runs:
        run.cancelled = True
        run.thread.join(60)
        assert not run.thread.is_alive()


def holds(grants: Any, held: int, active: int) -> Callable[[], bool]:
    return lambda: ray.get(grants.holds.remote()) == (held, active)


def test_workers_of_two_processes_follow_their_grant_and_outlive_a_process(grants: Any, start: Any) -> None:
    ray.get(grants.give.remote(4))
    run: Fit = start("small-1", "elastic", 100_000)
    when(holds(grants, 4, 4), SECONDS)
    when(lambda: run.began()[-1][0] == 2, 10)  # the driver notes it at its next turn
    assert len(workers()) == 4 and slots_free() == 0

    ray.get(grants.give.remote(3))  # three slots are one worker and one slot too many
    when(lambda: slots_free() == 2, 60)
    when(holds(grants, 2, 2), 60)
    ray.get(grants.give.remote(4))
    when(holds(grants, 4, 4), 60)

    os.kill(workers()[-1].pid, signal.SIGKILL)
    groups = len(run.began())
    when(lambda: len(run.began()) > groups and run.began()[-1][0] == 1, 60)
    when(holds(grants, 4, 4), SECONDS)

    ray.get(grants.give.remote(0, "serving has all"))
    when(lambda: slots_free() == 4, 60)
    kept = run.kept[-1].step
    assert kept >= run.seen[-1].step
    ray.get(grants.give.remote(2))
    when(holds(grants, 2, 2), SECONDS)
    when(lambda: run.began()[-1] == (1, kept), 10)
    steps = [step for _, step in run.began()]
    assert steps[0] == 0 and steps == sorted(steps)


def test_on_ray_train_a_round_has_two_processes_for_a_worker(grants: Any, start: Any) -> None:
    ray.get(grants.give.remote(2))
    run: Fit = start("small-2", "ray_train", 20)
    run.thread.join(SECONDS)
    assert run.ended and not run.error, run.error
    assert run.ended.metrics["eval_loss"] < run.ended.metrics["eval_loss_before"]
    assert run.began() == [(1, 0)]
