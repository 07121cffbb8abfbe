"""What jobs share around Ray: connecting to the pool, running a loop on Ray Train's workers, lineage, and the result's line."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster import niceness
from cluster.config import Config
from cluster.errors import JobFailed
from cluster.pool import submit
from cluster.store.objects import Store
from cluster.types import Manifest
from jobs.training.drivers.ray_train_private import FileRendezvous

COUNTED = {"tokens", "seconds", "examples", "steps_lost", "train_loss"}
"""Metrics of a version that say how long its run was, and not how good it is."""
LOOK_S = 0.5
"""Ray Train looks this often whether its workers live. Its default is 2 s."""

# the driver's side


def connect() -> None:
    """Connect to the pool that `jobs.reach` found; nothing if this process is connected."""
    if ray.is_initialized():
        return
    # Ray Train watches its controller through the state API. Unless it is told which Ray, it asks the newest one on the machine. If that
    # is another pool, it finds no controller there and takes the run's slots away.
    ray.init(runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})


def fit(config: Config, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], name: str) -> Result:
    """Run ``loop(settings)`` on `training.min_workers` workers, and return Ray Train's result. The run's name is ``name``.

    If the run fails or is cancelled, its files are removed from the store and the error goes on.
    """
    try:
        training = config.training
        return trainer(config, loop, settings, name, training.min_workers, training.slots_per_worker, FailureConfig()).fit()
    except BaseException:  # also when it is cancelled
        Store(config.store).remove(f"runs/{name}")
        raise


def trainer(
    config: Config,
    loop: Callable[[dict[str, Any]], object],
    settings: dict[str, Any],
    name: str,
    workers: int,
    slots_per_worker: int,
    failures: FailureConfig,
) -> TorchTrainer:
    """A trainer that runs ``loop(settings)`` on so many ``workers``. Each worker holds its slots. The run's name is ``name``."""
    gpu = config.pool.accelerator == "gpu"
    # Otherwise Ray turns print() on a worker into a log record. dill captures what `dis` prints, and its bytecode would fill our log.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(LOOK_S)

    def behind_serving(settings: dict[str, Any]) -> object:
        niceness.renice(niceness.TRAINING)
        return loop(settings)

    return TorchTrainer(
        behind_serving,
        train_loop_config=settings,
        torch_config=FileRendezvous(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            # The arbiter divides slots only. Ray would also ask for a CPU per worker, and on a small machine leave none for serving.
            resources_per_worker={"GPU" if gpu else "slot": slots_per_worker, "CPU": 0},
        ),
        run_config=RunConfig(name=name, storage_path=f"{config.store}/runs", failure_config=failures),
    )


@contextlib.contextmanager
def files(result: Result) -> Iterator[Path]:
    """A folder with the files of the run's checkpoint. At the end of the block the run is removed from the store.

    Raises `JobFailed` if the run has no checkpoint.
    """
    if result.checkpoint is None:
        raise JobFailed("The run ended without a checkpoint.", "Look for the reason in the job's log.")
    try:
        with result.checkpoint.as_directory() as folder:
            yield Path(folder)
    finally:
        result.filesystem.delete_dir(result.path)


def code_revision() -> str:
    """The commit of the code that runs. The submitter passes it on, because an uploaded folder has no ``.git``."""
    return os.environ.get("CODE_REVISION") or submit.revision()


def result(manifest: Manifest, stage: str | None) -> dict[str, Any]:
    """Print the run's result as one line ``result {…}`` for people who read the log, and return it for the job's record.

    It has the losses, and what else was measured both before and after. ``stage``: the stage of the version's rollout; None if it is not
    published. Example of the line:
    ``result {"version": "support@3", "kind": "adapter", "eval_loss_before": 2.1, "eval_loss": 1.4, "exact_match": null, "stage": "live"}``
    """
    metrics = manifest.lineage.metrics
    always = {key: metrics.get(key) for key in ("eval_loss_before", "eval_loss", "exact_match")}
    measured = {key: value for key, value in metrics.items() if key not in COUNTED}
    made = {"version": str(manifest.id), "kind": manifest.kind, **always, **measured, "stage": stage}
    print("result", json.dumps(made), flush=True)
    return made


# the workers' side


@contextlib.contextmanager
def checkpoint(metrics: dict[str, float]) -> Iterator[Path]:
    """A folder for the checkpoint's files. At the end of the block, Ray Train gets ``metrics``, and from rank 0 the files too.

    All workers must call this the same number of times, because ``ray.train.report`` waits for all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        first = ray.train.get_context().get_world_rank() == 0
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if first else None)
