"""What training runs share: reaching Ray, running a loop on workers, progress lines, lineage; and the fine-tuning loop itself."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster import __version__, pool
from cluster.config import Config
from cluster.errors import JobFailed
from cluster.registry import Registry
from cluster.types import Generation, Kind, Lineage, Manifest, VersionId

REPORT_INTERVAL_S = 1.0


# the driver's side


def connect(config: Config) -> None:
    """Join the pool that this job belongs to. Without one, start a Ray of the run's own with as many slots."""
    if ray.is_initialized():
        return
    running = pool.find(config)
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    elif running:
        ray.init(address=running.address)
    else:
        ray.init(address="local", resources={"slot": config.pool.slots}, include_dashboard=False)


def fit(config: Config, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], verb: str) -> Result:
    """Run ``loop(settings)`` on `training.workers` workers, each holding its slots."""
    gpu = config.fleet.accelerator == "gpu"
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.training.workers,
            use_gpu=gpu,
            # Slots are what is arbitrated. Ray would also ask for a CPU per worker and leave none for serving on a small machine.
            resources_per_worker={"GPU" if gpu else "slot": config.training.slots_per_worker, "CPU": 0},
        ),
        run_config=RunConfig(name=f"{verb}-{uuid.uuid4().hex[:12]}", storage_path=f"{config.store}/runs"),
    )
    return trainer.fit()


def register(registry: Registry, result: Result, name: str, kind: Kind, base: VersionId | None, lineage: Lineage) -> Manifest:
    """The run's checkpoint as the next version of ``name``. The run's own copy is removed: the version is the one that lasts."""
    if result.checkpoint is None:
        raise JobFailed("The run ended without a checkpoint.", "Look for the reason in the job's log.")
    with result.checkpoint.as_directory() as folder:
        manifest = registry.register(name, kind, base, Path(folder), lineage)
    result.filesystem.delete_dir(result.path)
    return manifest


def job_id() -> str:
    """The submission id where `ray job submit` started this process, else Ray's own id of the driver."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    return metadata.get("job_submission_id") or ray.get_runtime_context().get_job_id()


def code_revision() -> str:
    """The commit of the code that runs, or the package's version where it is no checkout (as in a job's uploaded folder)."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"springtide {__version__}"


def print_result(manifest: Manifest, move: Generation | None) -> None:
    """The run's last line: one JSON object that says what came out of it."""
    shown = {key: manifest.lineage.metrics.get(key) for key in ("eval_loss_before", "eval_loss", "exact_match")}
    generation = move.generation if move else None
    print("result", json.dumps({"version": str(manifest.id), "kind": manifest.kind, **shown, "published_generation": generation}))


# the workers' side


class Progress:
    """Prints ``progress stage=… step=12/100 loss=1.2345 tokens_per_s=5310 eta_s=17`` from rank 0.

    At most one line per `REPORT_INTERVAL_S`, but always the first step and the last. `cluster.submit.progress` reads them.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.started_s = time.monotonic()
        self.printed_s = float("-inf")
        self.first = ray.train.get_context().get_world_rank() == 0

    def __call__(self, step: int, steps: int, loss: float, tokens: int) -> None:
        """``tokens`` counts from the start of the run."""
        now_s = time.monotonic()
        if self.first and (now_s - self.printed_s >= REPORT_INTERVAL_S or step == steps):
            self.printed_s = now_s
            # Not print(): Ray Train turns that into a log record, with a prefix and subject to levels.
            sys.stdout.write(progress_line(self.stage, step, steps, loss, tokens, now_s - self.started_s) + "\n")
            sys.stdout.flush()


def progress_line(stage: str, step: int, steps: int, loss: float, tokens: int, elapsed_s: float) -> str:
    """
    >>> progress_line("finetune", 25, 100, 1.23456, 5000, 10.0)
    'progress stage=finetune step=25/100 loss=1.2346 tokens_per_s=500 eta_s=30'
    """
    per_s, eta_s = tokens / max(elapsed_s, 1e-9), elapsed_s / step * (steps - step)
    return f"progress stage={stage} step={step}/{steps} loss={loss:.4f} tokens_per_s={per_s:.0f} eta_s={eta_s:.0f}"


@contextlib.contextmanager
def checkpoint(metrics: dict[str, float]) -> Iterator[Path]:
    """A folder to save into on rank 0; on leaving, it and ``metrics`` are reported. Every worker must pass here equally often."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        first = ray.train.get_context().get_world_rank() == 0
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if first else None)
