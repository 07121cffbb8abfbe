"""Supervised fine-tuning on one worker: the gradients on the answers' tokens, the held-out loss, and the result's files.

It trains all weights, or a LoRA adapter on frozen ones (Hu et al. 2021), by the peft library.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from cluster.config import Config, parse
from cluster.store.registry import registry_of
from cluster.types import VersionId
from jobs.data import Row
from jobs.training.held_out import answer_losses, answer_tokens, held_out_loss
from jobs.training.recipe import Recipe
from jobs.training.schedule import Schedule, share_out


class SupervisedFineTuning:
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "base", "train", "held_out"}``.

    ``base`` is the id of a weights version; ``train`` and ``held_out`` are lists of `Row`. Making one reads the base from the store.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, self.recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        torch.set_num_threads(config.training.threads_per_worker)
        registry = registry_of(config)
        self.base = registry.manifest(VersionId.parse(settings["base"]))
        self.folder = registry.fetch(self.base, config.home / "cache")
        self.rows: list[Row] = settings["train"]
        self.held_out: list[Row] = settings["held_out"]
        recipe = self.recipe
        self.schedule = Schedule(
            len(self.rows), recipe.global_batch, recipe.epochs, recipe.seed, recipe.learning_rate or 0, recipe.warmup_fraction
        )
        self.model = trainable(config, self.recipe, self.folder)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, self.schedule.learning_rate, weight_decay=self.recipe.weight_decay)

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients. Returns its part of the loss, of shape (), and the tokens of the whole batch.

        The loss is the mean over the answer tokens of the whole batch, in nats per token. So it depends on neither the micro-batches nor the
        number of workers. Example: a batch has answers of 10 and 30 tokens, one on each of two workers. Each divides its sum by 40, and the
        two parts add up to the mean over 40 tokens.
        """
        rows = [self.rows[i] for i in batch]
        answers = sum(answer_tokens(row) for row in rows)
        total = torch.zeros((), device=self.trained[0].device)
        for portion in share_out(range(len(rows)), rank, world, self.recipe.micro_batch):
            loss = answer_losses(self.model, [rows[i] for i in portion]).sum() / answers
            loss.backward()
            total += loss.detach()
        return total, sum(len(row.input_ids) for row in rows)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss"}``: the held-out loss in nats per token. All workers of the process group call this together."""
        self.model.eval()
        loss = held_out_loss(self.model, self.held_out, self.recipe.micro_batch, rank, world)
        self.model.train()
        return {"eval_loss": loss}

    def save(self, target: Path) -> None:
        """Write the adapter to the folder ``target``. Without an adapter, write all weights in the base's own precision.

        The base's other files, its tokenizer's included, are copied beside the weights byte for byte.
        """
        model: Any = self.model
        if peft_config := getattr(model, "peft_config", {}).get("default"):
            peft_config.base_model_name_or_path = str(self.base.id)  # not a path of this machine
            peft_config.target_modules = sorted(peft_config.target_modules)  # a set, whose order would change the digest
            model.save_pretrained(target, save_embedding_layers=False)
            (target / "README.md").unlink(missing_ok=True)
            return
        stored = json.loads((self.folder / "config.json").read_text())
        model.to(getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")).save_pretrained(target)
        for path in self.folder.iterdir():
            if path.is_file() and "safetensors" not in path.name and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def trainable(config: Config, recipe: Recipe, folder: Path) -> torch.nn.Module:
    """The model in ``folder`` on this worker's device: with an adapter to train, or with all weights to train if the recipe has no LoRA."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(recipe.seed)  # an adapter starts from random numbers, and every worker needs the same ones
    gpu = config.pool.accelerator == "gpu"
    # Weights that are trained need full precision; a frozen base does not.
    dtype = torch.bfloat16 if gpu and recipe.lora else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=recipe.lora.rank,
            lora_alpha=recipe.lora.alpha,
            lora_dropout=recipe.lora.dropout,
            target_modules="all-linear",  # peft leaves out the output layer, for which vLLM takes no adapter
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.to("cuda" if gpu else "cpu").train()
