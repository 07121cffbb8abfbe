"""What supervised fine-tuning does with a model on one member: gradients of the answers' tokens, the held-out loss, the result's files."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cluster.config import Config, parse
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import VersionId
from jobs.data import Row
from jobs.training.recipe import Recipe
from jobs.training.schedule import Plan, share_out


class SupervisedFineTuning:
    """`jobs.training.worker.Work` for ``{"config", "recipe", "base", "train", "held_out"}``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        config, self.recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        torch.set_num_threads(config.training.threads_per_worker)
        registry = Registry(Store(config.store))
        self.base = registry.manifest(VersionId.parse(settings["base"]))
        self.folder = registry.fetch(self.base, config.home / "cache")
        self.rows: list[Row] = settings["train"]
        self.held_out: list[Row] = settings["held_out"]
        recipe = self.recipe
        self.plan = Plan(
            len(self.rows), recipe.global_batch, recipe.epochs, recipe.seed, recipe.learning_rate or 0, recipe.warmup_fraction
        )
        self.model = trainable(config, self.recipe, self.folder)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, self.plan.learning_rate, weight_decay=self.recipe.weight_decay)

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """The loss is the mean over the answers' tokens of the whole batch, so neither portions nor members weigh in, whatever their lengths."""
        rows = [self.rows[i] for i in batch]
        answers = sum(answer_tokens(row) for row in rows)
        total = torch.zeros((), device=self.trained[0].device)
        for portion in share_out(range(len(rows)), rank, world, self.recipe.micro_batch):
            loss = answer_loss(self.model, [rows[i] for i in portion]) / answers
            loss.backward()
            total += loss.detach()
        return total, sum(len(row.input_ids) for row in rows)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss"}``: the mean loss per answer token of the held-out examples."""
        self.model.eval()
        sums = torch.zeros(2, device=self.trained[0].device)
        for portion in share_out(range(len(self.held_out)), rank, world, self.recipe.micro_batch):
            some = [self.held_out[i] for i in portion]
            sums += torch.stack([answer_loss(self.model, some), sums.new_tensor(sum(map(answer_tokens, some)))])
        self.model.train()
        torch.distributed.all_reduce(sums)
        return {"eval_loss": (sums[0] / sums[1]).item()}

    def save(self, target: Path) -> None:
        """An adapter, or all the weights in the base's own precision with the base's tokenizer byte for byte."""
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
    """The model with an adapter on it, or with all its weights to be trained, on this member's device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(recipe.seed)  # an adapter starts from random numbers, the same on every member
    gpu = config.pool.accelerator == "gpu"
    # A frozen base needs no master copy in full precision; weights that are trained do.
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
            target_modules="all-linear",  # peft leaves the output layer out, which vLLM could not adapt
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.to("cuda" if gpu else "cpu").train()


def answer_tokens(row: Row) -> int:
    return len(row.input_ids) - max(1, row.prompt_tokens)  # nothing comes before the first


def answer_loss(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """The summed cross entropy of every token that is not the prompt's."""
    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    asked = torch.tensor(
        [[row.prompt_tokens <= at < len(row.input_ids) for at in range(1, width)] for row in rows], device=device
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return cross_entropy(logits[asked].float(), ids[:, 1:][asked], reduction="sum")
