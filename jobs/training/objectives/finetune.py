"""Supervised fine-tuning on one worker: the model, and the result's files.

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
from jobs.training.objectives.tokens import NextTokens
from jobs.training.packed import pack
from jobs.training.precision import weights_dtype
from jobs.training.recipe import Recipe


class SupervisedFineTuning(NextTokens):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "base", "train", "held_out"}``.

    ``base`` is the id of a weights version; ``train`` and ``held_out`` are lists of `Row`. Making one reads the base from the store.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        torch.set_num_threads(config.training.threads_per_worker)
        registry = registry_of(config)
        self.base = registry.manifest(VersionId.parse(settings["base"]))
        self.folder = registry.fetch(self.base, config.home / "cache")
        super().__init__(recipe, trainable(config, recipe, self.folder), settings["train"], settings["held_out"])

    def save(self, target: Path) -> None:
        """Write the adapter to the folder ``target``. Without an adapter, write all weights in the base's own precision.

        The base's other files, its tokenizer's included, are copied beside the weights byte for byte.
        """
        if hasattr(self.model, "peft_config"):
            save_adapter(self.model, self.base.id, target)
        else:
            save_whole(self.model, self.folder, target)


def save_adapter(model: Any, base: VersionId, target: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter on ``base`` to the folder ``target``. ``state``: its weights by name, where they are not the model's own of now."""
    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = str(base)  # not a path of this machine
    peft_config.target_modules = sorted(peft_config.target_modules)  # a set, whose order would change the digest
    model.save_pretrained(target, save_embedding_layers=False, state_dict=state)
    (target / "README.md").unlink(missing_ok=True)


def save_whole(model: Any, base: Path, target: Path) -> None:
    """Write all weights in the precision of the version in the folder ``base``, and copy its other files, the tokenizer's among them, byte for
    byte."""
    stored = json.loads((base / "config.json").read_text())
    save_weights(model, getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32"), target)
    for path in base.iterdir():
        if path.is_file() and "safetensors" not in path.name and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def save_weights(model: Any, dtype: torch.dtype, target: Path) -> None:
    """Write all weights in ``dtype``. The model itself stays as it is, because the run may go on."""
    copies: dict[int, torch.Tensor] = {}  # what is tied stays tied, so that transformers writes it once
    weights = {name: copies.setdefault(one.data_ptr(), one.to(dtype, copy=True)) for name, one in model.state_dict().items()}
    own, model.config.dtype = model.config.dtype, dtype
    try:
        model.save_pretrained(target, state_dict=weights)
    finally:
        model.config.dtype = own


def trainable(config: Config, recipe: Recipe, folder: Path) -> torch.nn.Module:
    """The model in ``folder`` on this worker's device: with an adapter to train, or with all weights to train if the recipe has no LoRA."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(recipe.seed)  # an adapter starts from random numbers, and every worker needs the same ones
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=weights_dtype(recipe), local_files_only=True)
    return ready(config, recipe, model)


def ready(config: Config, recipe: Recipe, model: Any) -> torch.nn.Module:
    """A model as loaded, ready to be trained as `trainable` says."""
    if not pack(model.eval()):
        print("this architecture takes no packed examples; they are padded to the longest of each portion", flush=True)
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
    return model.to("cuda" if config.pool.accelerator == "gpu" else "cpu").train()
