"""What training runs share: reaching Ray, running a loop on workers, progress lines, lineage; and the fine-tuning loop itself."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from cluster import priority, submit
from cluster.config import Config, parse
from cluster.errors import JobFailed
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Kind, Lineage, Manifest, VersionId
from jobs.data import Row
from jobs.recipe import Recipe
from jobs.rendezvous import Meeting

if TYPE_CHECKING:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

REPORT_INTERVAL_S = 1.0


# the driver's side


def connect() -> None:
    """Join the pool that `jobs.reach` found."""
    if ray.is_initialized():
        return
    # Ray Train watches its controller through the state API, at the *newest* Ray on the machine unless told which one. Where that
    # is another pool, it finds no controller there and takes the run's slots away.
    ray.init(runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})


def fit(config: Config, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], verb: str) -> Result:
    """Run ``loop(settings)`` on `training.workers` workers, each holding its slots."""
    gpu = config.fleet.accelerator == "gpu"
    # Else print() on a worker becomes a log record, and dill, which captures what `dis` prints, writes bytecode into our log.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"

    def behind_serving(settings: dict[str, Any]) -> None:
        priority.step_back(priority.TRAINING)
        loop(settings)

    name = f"{verb}-{uuid.uuid4().hex[:12]}"
    trainer = TorchTrainer(
        behind_serving,
        train_loop_config=settings,
        torch_config=Meeting(),
        scaling_config=ScalingConfig(
            num_workers=config.training.workers,
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


def register(registry: Registry, result: Result, name: str, kind: Kind, base: VersionId | None, lineage: Lineage) -> Manifest:
    """The run's checkpoint as the next version of ``name``. The run's own copy is removed: the version is the one that lasts."""
    if result.checkpoint is None:
        raise JobFailed("The run ended without a checkpoint.", "Look for the reason in the job's log.")
    try:
        with result.checkpoint.as_directory() as folder:
            return registry.register(name, kind, base, Path(folder), lineage)
    finally:
        result.filesystem.delete_dir(result.path)


def job_id() -> str:
    """The submission id where `ray job submit` started this process, else Ray's own id of the driver."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    return metadata.get("job_submission_id") or ray.get_runtime_context().get_job_id()


def code_revision() -> str:
    """The commit of the code that runs, as who submitted the job saw it; an uploaded folder has no ``.git`` of its own."""
    return os.environ.get("CODE_REVISION") or submit.revision()


def print_result(manifest: Manifest, stage: str | None) -> None:
    """The run's last line: one JSON object that says what came out of it. ``stage``: of its rollout, None where it is not published."""
    shown = {key: manifest.lineage.metrics.get(key) for key in ("eval_loss_before", "eval_loss", "exact_match")}
    print("result", json.dumps({"version": str(manifest.id), "kind": manifest.kind, **shown, "stage": stage}))


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
            print(progress_line(self.stage, step, steps, loss, tokens, now_s - self.started_s), flush=True)


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


# fine-tuning


def finetune(settings: dict[str, Any]) -> None:
    """One worker's part: TRL's trainer, which shares the batches out by the rank that Ray Train set, and the result on rank 0."""
    config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
    torch.set_num_threads(config.training.threads_per_worker)
    disable_progress_bar()
    registry = Registry(Store(config.store))
    base = registry.manifest(VersionId.parse(settings["base"]))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer_arguments(config, recipe, scratch)
        with arguments.main_process_first(local=True):  # one download per machine, into a cache that its workers share
            folder = registry.fetch(base, config.home / "cache")
        trainer = trainer_for(folder, recipe, arguments, settings["train"], settings["held_out"])
        before = trainer.evaluate()["eval_loss"]
        outcome = trainer.train()
        metrics = {
            "eval_loss_before": before,
            "eval_loss": trainer.evaluate()["eval_loss"],
            "train_loss": outcome.training_loss,
            "tokens": max(int(entry.get("num_tokens", 0)) for entry in trainer.state.log_history),
            "seconds": outcome.metrics["train_runtime"],
        }
        with checkpoint(metrics) as target:
            if trainer.is_world_process_zero():
                save(trainer.accelerator.unwrap_model(trainer.model), base.id, folder, target)


def trainer_arguments(config: Config, recipe: Recipe, scratch: str) -> "SFTConfig":
    """A recipe in TRL's words. TRL is imported here, because it takes seconds that pretraining need not spend."""
    from trl.trainer.sft_config import SFTConfig

    gpu = config.fleet.accelerator == "gpu"
    return SFTConfig(
        output_dir=scratch,
        use_cpu=not gpu,
        bf16=gpu,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation(ray.train.get_context().get_world_size()),
        gradient_checkpointing=recipe.gradient_checkpointing,
        learning_rate=recipe.learning_rate or 0,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_fraction,  # below 1 it is a fraction
        weight_decay=recipe.weight_decay,
        max_length=None,  # what is too long was left out already
        seed=recipe.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,
    )


def trainer_for(folder: Path, recipe: Recipe, arguments: "SFTConfig", train: list[Row], held_out: list[Row]) -> "SFTTrainer":
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_trainer import SFTTrainer

    # A frozen base needs no master copy in full precision; weights that are trained do.
    dtype = torch.bfloat16 if arguments.bf16 and recipe.lora else torch.float32
    lora = recipe.lora and LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",  # peft leaves the output layer out, which vLLM could not adapt
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True),
        args=arguments,
        train_dataset=dataset(train),
        eval_dataset=dataset(held_out),
        processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        peft_config=lora,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def dataset(rows: list[Row]) -> "Dataset":
    """Columns ``input_ids`` and ``labels``; a label of -100 carries no loss."""
    from datasets import Dataset

    masked = ([-100] * row.prompt_tokens + row.input_ids[row.prompt_tokens :] for row in rows)
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": list(masked)})


class Report(TrainerCallback):
    """Progress lines from TRL's logs."""

    def __init__(self) -> None:
        self.progress = Progress("finetune")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:  # evaluation and the summary log too
            self.progress(state.global_step, state.max_steps, logs["loss"], int(logs["num_tokens"]))


def save(model: Any, base: VersionId, folder: Path, target: Path) -> None:
    """An adapter, or all the weights in the base's own precision with the base's tokenizer byte for byte."""
    if peft_config := getattr(model, "peft_config", {}).get("default"):
        peft_config.base_model_name_or_path = str(base)  # not a path of this machine
        peft_config.target_modules = sorted(peft_config.target_modules)  # a set, whose order would change the digest
        model.save_pretrained(target, save_embedding_layers=False)
        (target / "README.md").unlink(missing_ok=True)
        return
    stored = json.loads((folder / "config.json").read_text())
    model.to(getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")).save_pretrained(target)
    for path in folder.iterdir():
        if path.is_file() and "safetensors" not in path.name and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
