"""What training runs share: reaching Ray, running a loop on workers of Ray Train, lineage, the result's line."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster import niceness
from cluster.config import Config
from cluster.errors import JobFailed
from cluster.pool import submit
from cluster.store.objects import Store
from cluster.types import Manifest
from jobs.training.ray_train_private import FileRendezvous

# the driver's side


def connect() -> None:
    """Join the pool that `jobs.reach` found."""
    if ray.is_initialized():
        return
    # Ray Train watches its controller through the state API, at the *newest* Ray on the machine unless told which one. Where that
    # is another pool, it finds no controller there and takes the run's slots away.
    ray.init(runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})


def fit(config: Config, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], name: str) -> Result:
    """Run ``loop(settings)`` as the run ``name`` on `training.min_workers` workers, each holding its slots."""
    gpu = config.pool.accelerator == "gpu"
    # Else print() on a worker becomes a log record, and dill, which captures what `dis` prints, writes bytecode into our log.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"

    def behind_serving(settings: dict[str, Any]) -> None:
        niceness.renice(niceness.TRAINING)
        loop(settings)

    trainer = TorchTrainer(
        behind_serving,
        train_loop_config=settings,
        torch_config=FileRendezvous(),
        scaling_config=ScalingConfig(
            num_workers=config.training.min_workers,
            use_gpu=gpu,
            # Slots are what is arbitrated. Ray would also ask for a CPU per worker and leave none for serving on a small machine.
            resources_per_worker={"GPU" if gpu else "slot": config.training.slots_per_worker, "CPU": 0},
        ),
        run_config=RunConfig(name=name, storage_path=f"{config.store}/runs"),
    )
    try:
        return trainer.fit()
    except BaseException:  # cancelled too: a run that did not end well leaves nothing
        Store(config.store).remove(f"runs/{name}")
        raise


@contextlib.contextmanager
def files(result: Result) -> Iterator[Path]:
    """A folder with the run's checkpoint; afterwards nothing is left of the run."""
    if result.checkpoint is None:
        raise JobFailed("The run ended without a checkpoint.", "Look for the reason in the job's log.")
    try:
        with result.checkpoint.as_directory() as folder:
            yield Path(folder)
    finally:
        result.filesystem.delete_dir(result.path)


def code_revision() -> str:
    """The commit of the code that runs, as who submitted the job saw it; an uploaded folder has no ``.git`` of its own."""
    return os.environ.get("CODE_REVISION") or submit.revision()


def result(manifest: Manifest, stage: str | None) -> dict[str, Any]:
    """What came out of a run, for its job's record and, as one line ``result {…}``, for whoever reads its log.

    ``stage``: of its rollout, None where it is not published.
    """
    shown = {key: manifest.lineage.metrics.get(key) for key in ("eval_loss_before", "eval_loss", "exact_match")}
    made = {"version": str(manifest.id), "kind": manifest.kind, **shown, "stage": stage}
    print("result", json.dumps(made), flush=True)
    return made


# the workers' side


@contextlib.contextmanager
def checkpoint(metrics: dict[str, float]) -> Iterator[Path]:
    """A folder to save into on rank 0; on leaving, it and ``metrics`` are reported. Every worker must pass here equally often."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        first = ray.train.get_context().get_world_rank() == 0
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if first else None)
