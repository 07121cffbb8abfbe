"""TRL's SFTTrainer. ``python -m benchmarks.trainers.trl_sft JOB`` has its defaults; ``JOB tuned`` is without gradient checkpointing."""

import sys
import tempfile
from typing import Any

import torch

from benchmarks.trainers import Assignment, Clock, Finding, assignment, tell


def train(job: Assignment, tuned: bool) -> Finding:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports] (in TRL's own environment)

    torch.set_num_threads(job.threads)
    clock = Clock(job)

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.step(logs["loss"])

    # Weights that are trained stay in float32, and what is computed with them may be in bfloat16.
    loaded = job.precision if job.lora else "float32"
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, loaded), local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"gradient_checkpointing": False} if tuned else {}
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(job.batches[0]),
            num_train_epochs=1,
            learning_rate=job.learning_rate,
            lr_scheduler_type="linear",
            max_length=None,
            use_cpu=True,
            bf16=job.precision != loaded,
            completion_only_loss=True,  # it goes by the names of columns, and ours are tokenised already
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        SFTTrainer(
            model,
            args=config,
            train_dataset=dataset(job),
            peft_config=adapter(job),
            processing_class=AutoTokenizer.from_pretrained(job.base, local_files_only=True),
            callbacks=[Watch()],
        ).train()
    return clock.finding()


def dataset(job: Assignment) -> Any:
    """The examples in their order, tokenised already; the loss is on what the mask marks."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] (in TRL's own environment)

    examples = [example for batch in job.batches for example in batch]
    masks = [[int(at >= one["prompt_tokens"]) for at in range(len(one["input_ids"]))] for one in examples]
    return Dataset.from_dict({"input_ids": [one["input_ids"] for one in examples], "completion_mask": masks})


def adapter(job: Assignment) -> Any:
    """peft's settings of the adapter; None where all weights are trained."""
    from peft import LoraConfig

    if job.lora is None:
        return None
    return LoraConfig(
        r=job.lora["rank"], lora_alpha=job.lora["alpha"], lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


if __name__ == "__main__":
    tell(train(assignment(), sys.argv[2:] == ["tuned"]))
