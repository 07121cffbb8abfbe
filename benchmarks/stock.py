"""The same training as Ray Train does it by itself: elastic between one worker and several, a checkpoint now and then, no lease.

``python -m benchmarks.stock --data FILE --workers 1,3``: what a user of Ray 2.60 would write, with the steps of
`jobs.training.objectives.finetune`, so that the benchmark compares how slots are handed over and not how losses are computed.
"""

import tempfile
from pathlib import Path
from typing import Any

from cluster.config import load
from cluster.jobspec import Finetune, Parser
from cluster.store.objects import Store
from cluster.store.registry import Registry
from jobs import main


def run() -> None:
    parser = Parser("benchmarks.stock")
    parser.add_argument("--data", required=True)
    parser.add_argument("--base", default="seedling")
    parser.add_argument("--workers", required=True, help="MIN,MAX")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument(
        "--look-s", type=float, default=60, help="how often Ray Train looks whether it may have more, or must give"
    )
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    options = Finetune(data=arguments.data, base=arguments.base, epochs=arguments.epochs, set=arguments.set)
    from jobs import finetune

    config = load()
    plan = finetune.prepare(config, Registry(Store(config.store)), options)
    from jobs.training.drivers import ray_train

    ray_train.connect()
    settings = {"config": config.dump(), "recipe": plan.recipe.model_dump(), "base": str(plan.base.id)}
    low, high = map(int, arguments.workers.split(","))
    settings |= {"train": plan.train, "held_out": plan.held_out, "checkpoint_s": config.training.checkpoint_s}
    train(settings, low, high, arguments.look_s)


def train(settings: dict[str, Any], low: int, high: int, look_s: float) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.config import parse

    config = parse(settings["config"])
    resources = {"CPU": 0, "slot": config.training.slots_per_worker}
    TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(low, high), resources_per_worker=resources, elastic_resize_monitor_interval_s=look_s
        ),
        run_config=RunConfig(storage_path=f"{config.store}/runs", failure_config=FailureConfig(max_failures=-1)),
    ).fit()


def work(settings: dict[str, Any]) -> None:
    """The loop on a worker: from the newest checkpoint on, and a checkpoint every so often."""
    import ray.train

    from cluster import niceness
    from jobs.training.objectives.finetune import SupervisedFineTuning
    from jobs.training.progress import ProgressPrinter
    from jobs.training.work import gather, update

    niceness.renice(niceness.TRAINING)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    tuning = SupervisedFineTuning(settings)
    step = restored(tuning)
    print(f"training with {world} workers from step {step}", flush=True)
    progress = ProgressPrinter("finetune", rank, step)
    for batch in tuning.schedule.batches(step):
        found = gather(tuning, batch, rank, world)
        update(tuning, step, found.norm)
        step += 1
        progress(step, tuning.schedule.steps, found.loss, 0)
        if step % 50 == 0:  # every worker must report equally often, so this cannot go by each one's clock
            save(tuning, step, rank)


def restored(tuning: Any) -> int:
    import ray.train
    import torch

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / "state.pt", weights_only=True)
    with torch.no_grad():
        for name, tensor in tuning.flat.tensors(saved["step"]).items():
            tensor.copy_(saved[name])
    return saved["step"]


def save(tuning: Any, step: int, rank: int) -> None:
    import ray.train
    import torch
    from ray.train import Checkpoint

    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save({"step": step, **tuning.flat.tensors(step)}, Path(folder) / "state.pt")
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


if __name__ == "__main__":
    main(run)
