"""Pretraining on one worker: a new Llama that learns to predict the next token of a text."""

import math
from pathlib import Path
from typing import Any

import torch

from cluster.config import parse
from cluster.store.objects import Store
from jobs.data.blocks import Blocks, Shard, cached
from jobs.training.objectives.finetune import device_of, save_weights
from jobs.training.objectives.tokens import NextTokens
from jobs.training.recipe import Recipe
from jobs.training.step.packed import pack

MODEL = "model"
"""The folder of the run that has the new model's configuration and tokenizer."""


class Pretraining(NextTokens):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "run", "shards", "train", "held_out", "length", "bytes_per_token"}``.

    ``shards`` are those of `jobs.data.blocks`, ``train`` and ``held_out`` the numbers of blocks, ``length`` the tokens of a block. The folder
    ``runs/<run>/model`` of the store has ``config.json`` and the tokenizer.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        torch.set_num_threads(config.training.threads_per_worker)
        store, run = Store(config.store), settings["run"]
        cache = config.home / "cache" / "runs" / run
        self.folder = cache / MODEL
        for name in store.children(f"runs/{run}/{MODEL}"):
            cached(store, f"runs/{run}/{MODEL}/{name}", self.folder)
        self.bytes_per_token: float = settings["bytes_per_token"]
        shards = [Shard(*one) for one in settings["shards"]]
        train, held_out = (Blocks(store, shards, settings[part], settings["length"], cache) for part in ("train", "held_out"))

        def new() -> Any:
            return untrained(self.folder, recipe.seed)

        device, part = device_of(config), settings.get("part", 0)
        super().__init__(recipe, new().train(), train, held_out, device, lambda: new().state_dict(), part)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """The held-out loss, the same in bits for each byte of text, which does not depend on the tokenizer, and the perplexity of a token."""
        loss = super().measure(rank, world)["eval_loss"]
        return {"eval_loss": loss, "bits_per_byte": loss / math.log(2) / self.bytes_per_token, "perplexity": math.exp(loss)}

    def save(self, target: Path) -> None:
        """Write the weights in float32, and the tokenizer, to the folder ``target``."""
        from transformers import AutoTokenizer

        save_weights(self.plain, self.weights(), torch.float32, target)
        AutoTokenizer.from_pretrained(self.folder, local_files_only=True).save_pretrained(target)


def untrained(folder: Path, seed: int) -> Any:
    """The model of ``folder/config.json`` with new weights, the same for the same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=shape.eos_token_id, pad_token_id=shape.pad_token_id)
    pack(model.eval())
    return model
