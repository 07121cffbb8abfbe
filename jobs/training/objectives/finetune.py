"""Supervised fine-tuning on one worker: the model, and the result's files.

It trains all weights, or a LoRA adapter on frozen ones (Hu et al. 2021), by the peft library.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from cluster.config import Config, parse
from cluster.store.registry import registry_of
from cluster.types import VersionId
from jobs.training.objectives.tokens import NextTokens
from jobs.training.recipe import Recipe
from jobs.training.sharding.sharded import Weights
from jobs.training.step.packed import pack
from jobs.training.step.precision import weights_dtype
from jobs.training.step.weightless import weightless


class SupervisedFineTuning(NextTokens):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "base", "train", "held_out"}``.

    ``base`` is the id of a weights version; ``train`` and ``held_out`` are lists of `Row`. Making one reads the base from the store.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        self.base: Tuned = tuned(config, recipe, settings["base"])
        weights = stored(self.base.folder, recipe)
        data = settings["train"], settings["held_out"]
        super().__init__(recipe, self.base.model, *data, self.base.device, weights, settings.get("part", 0))

    def save(self, target: Path) -> None:
        """See `Tuned.save`."""
        self.base.save(self.plain, self.weights, target)


class Tuned(NamedTuple):
    """A base of which a run trains all weights, or an adapter."""

    id: VersionId
    """Of the base."""
    folder: Path
    """The base's files."""
    model: Any
    """In training mode."""
    device: torch.device
    """Where this worker computes."""

    def save(self, model: Any, weights: Callable[[], Mapping[str, torch.Tensor]], target: Path) -> None:
        """Write the adapter of the ``model`` to the folder ``target``. Without an adapter, write all ``weights`` in the base's own precision.

        The base's other files, its tokenizer's included, are copied beside the weights byte for byte.
        """
        if hasattr(model, "peft_config"):
            save_adapter(model, self.id, target, weights())
        else:
            save_whole(model, weights(), self.folder, target)


def save_adapter(model: Any, base: VersionId, target: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write an adapter on ``base`` to the folder ``target``. ``state``: its weights by name, where they are not the model's own of now."""
    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = str(base)  # not a path of this machine
    peft_config.target_modules = sorted(peft_config.target_modules)  # a set, whose order would change the digest
    model.save_pretrained(target, save_embedding_layers=False, state_dict=state)
    (target / "README.md").unlink(missing_ok=True)


def save_whole(model: Any, weights: Mapping[str, torch.Tensor], base: Path, target: Path) -> None:
    """Write the ``weights`` of a model in the precision of the version in the folder ``base``, and copy its other files, the tokenizer's among them,
    byte for byte."""
    known = json.loads((base / "config.json").read_text())
    save_weights(model, weights, getattr(torch, known.get("dtype") or known.get("torch_dtype") or "float32"), target)
    for path in base.iterdir():
        if path.is_file() and "safetensors" not in path.name and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def tuned(config: Config, recipe: Recipe, base: str) -> Tuned:
    """Read the weights version ``base`` from the store, and make it ready to train."""
    torch.set_num_threads(config.training.threads_per_worker)
    registry = registry_of(config)
    manifest = registry.manifest(VersionId.parse(base))
    folder = registry.fetch(manifest, config.home / "cache")
    return Tuned(manifest.id, folder, trainable(recipe, folder), device_of(config))


def save_weights(model: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, target: Path) -> None:
    """Write the ``weights`` of a model in ``dtype``. The model itself stays as it is, because the run may go on."""
    copies: dict[int, torch.Tensor] = {}  # what is tied stays tied, so that transformers writes it once
    weights = {name: copies.setdefault(one.data_ptr(), one.to(dtype, copy=True)) for name, one in weights.items()}
    own, model.config.dtype = model.config.dtype, dtype
    try:
        model.save_pretrained(target, state_dict=weights)
    finally:
        model.config.dtype = own


def device_of(config: Config) -> torch.device:
    """Where this worker's model is."""
    return torch.device("cuda" if config.pool.accelerator == "gpu" else "cpu")


def stored(folder: Path, recipe: Recipe) -> Weights:
    """Opens the weights of a folder. Where its files have the model's names, rows are read as they are asked for; otherwise all at once."""

    def opened() -> Mapping[str, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM

        handles = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        found = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (no mapping)
        model = weightless(AutoConfig.from_pretrained(folder, local_files_only=True))
        if found.keys() >= {name for name, _ in model.named_parameters()}:
            return found
        return AutoModelForCausalLM.from_pretrained(folder, dtype=weights_dtype(recipe), local_files_only=True).state_dict()

    return opened


def trainable(recipe: Recipe, folder: Path) -> torch.nn.Module:
    """The model in ``folder``: with an adapter to train, or with all weights to train if the recipe has no LoRA."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(recipe.seed)  # an adapter starts from random numbers, and every worker needs the same ones
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=weights_dtype(recipe), local_files_only=True)
    return ready(recipe, model)


def ready(recipe: Recipe, model: Any) -> torch.nn.Module:
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
    return model.train()
