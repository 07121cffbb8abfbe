"""The settings of a fine-tuning run: ``recipes/<name>.yaml`` or your own file, with ``--set key=value`` on top."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_serializer, model_validator

from cluster.config import Section, from_pairs, merge
from cluster.errors import ConfigError, DataError
from jobs import sources
from jobs.training.schedule import Schedule, Shape

RECIPES = Path(__file__).parents[1] / "recipes"
PREFERENCE_RATE = 0.1
"""What preferences need of fine-tuning's learning rate. A pair's loss says which answer, not which words, so nothing in it keeps the text whole.

Tülu 3 (Lambert et al. 2024) takes a tenth too, Zephyr (Tunstall et al. 2023) a fortieth.
"""


class Lora(Section):
    rank: int = Field(16, ge=1)
    """At most `fleet.max_lora_rank`: vLLM loads no larger one."""
    alpha: int = Field(32, ge=1)
    """The output of the adapter is scaled by alpha / rank."""
    dropout: float = Field(0, ge=0, lt=1)
    """Each worker draws its own masks. So with dropout the losses depend on the number of workers."""


class Distillation(Section):
    temperature: float = Field(default=2, gt=0)
    """Divides the logits of teacher and student before they are compared: the higher, the more counts what the teacher takes for unlikely."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Of the teacher. The rest is the weight of the data: 0 trains the student alone, 1 takes nothing from the data but the prompts."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward, KL(teacher ‖ student): the student covers all that the teacher may say. reverse: it keeps to what the teacher finds likely."""


class Preference(Section):
    """How `springtide dpo` learns from pairs, see `jobs.training.objectives.dpo.losses`."""

    beta: float = Field(default=0.1, gt=0)
    """How much the model is held to the base: it may move further with a smaller one."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO (Rafailov et al. 2023). ipo: identity preference optimisation (Azar et al. 2023)."""
    label_smoothing: float = Field(default=0, ge=0, lt=0.5)
    """The share of pairs that are the wrong way round, as far as you know: conservative DPO (Mitchell 2023)."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing is for the loss sigmoid only")
        return self


Scale = Literal["group", "none"]
"""What divides the advantages of a group of answers."""


class Reinforcement(Section):
    group: int = Field(default=8, ge=2)
    """Answers to each prompt, at most `gateway.max_choices`."""
    answer_tokens: int = Field(default=128, ge=1)
    """Longer answers are cut off."""
    at_once: int = Field(default=32, ge=1)
    """Answers under way at a time, over the whole fleet."""
    staleness: int = Field(default=1, ge=0)
    """How many steps the weights that answer may be behind those that learn. 0: answers wait for each update."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """A token's probability counts as changed by no more than this factor below 1, and ``clip_high`` above."""
    clip_high: float = Field(default=0.28, gt=0)
    """Higher than ``clip_low``, so that what is rare can become likely (Yu et al. 2025, DAPO)."""
    scale: Scale = "group"
    """group: a group's advantages are divided by the standard deviation of its rewards. none: they are not."""
    kl: float = Field(default=0, ge=0)
    """The weight of the divergence from the base. 0 saves a forward pass."""


class Sharding(Section):
    """How the workers of a run, and the processes of a worker, divide the model. A word is short for the ``weights``; ``none`` is ``whole``."""

    weights: Literal["whole", "fsdp", "auto"] = "whole"
    """whole: each worker has all of the model. fsdp: each has a slice of it only, see `jobs.training.sharding.sharded`. auto: whole where there is
    room, see `jobs.training.sharding.fit`."""
    tensor: int = Field(default=1, ge=1)
    """Processes of a worker, each of which has a part of every layer and a slot, see `jobs.training.sharding.tensor_parallel`."""

    pipeline: int = Field(default=1, ge=1)
    """Processes of a worker, each of which has a run of layers and a slot, see `jobs.training.sharding.pipeline_parallel`."""

    @property
    def parts(self) -> int:
        """Processes of a worker."""
        return self.tensor * self.pipeline

    @model_validator(mode="before")
    @classmethod
    def word(cls, value: Any) -> Any:
        return {"weights": "whole" if value == "none" else value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check(self) -> Self:
        ways = {"weights": self.weights != "whole", "tensor": self.tensor > 1, "pipeline": self.pipeline > 1}
        if sum(ways.values()) > 1:
            chosen = " and ".join(f"{way} {getattr(self, way)}" for way, used in ways.items() if used)
            raise ValueError(f"{chosen} do not go together; choose one of them")
        return self

    @model_serializer
    def short(self) -> str | dict[str, Any]:
        """As runs have it that began before this was a section: they can be resumed."""
        if self.parts == 1:
            return "none" if self.weights == "whole" else self.weights
        return {way: count for way, count in (("tensor", self.tensor), ("pipeline", self.pipeline)) if count > 1}


OBJECTIVES = {"distillation": "distill", "preference": "dpo", "reinforcement": "rl"}
"""Section → the verb that reads it. Other verbs refuse the section, because they would ignore it."""


SHARDING = ("finetune", "pretrain", "dpo", "distill")
"""The verbs whose objectives can shard the model over the workers."""
PARTS = ("finetune", "pretrain")
"""The verbs whose objectives can cut a worker's model into parts."""


class Recipe(Section):
    lora: Lora | None = None
    """Train a LoRA adapter on every linear layer except the output layer. None: train all the weights."""
    learning_rate: float | None = Field(None, gt=0)
    """The peak of the schedule. None: derived from the width of the model, see `resolved`."""
    epochs: float = Field(3, gt=0)
    global_batch: int = Field(16, ge=1)
    """Examples per optimizer step. All workers share them."""
    micro_batch_tokens: int = Field(1024, ge=8)
    """Tokens that a worker has in memory at a time; an example that is longer comes alone. It accumulates the gradients of its share in such
    portions."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; what is trained is in float32 in any case. auto: bfloat16 on GPUs, and on processors where it is faster."""
    sharding: Sharding = Sharding()
    max_tokens: int | None = Field(None, ge=8)
    """Longer examples are left out. None: the context length of the model."""
    schedule: Shape = "cosine"
    """How the learning rate goes after the warm-up, see `jobs.training.schedule.Schedule.rate`."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0, ge=0)
    held_out_fraction: float = Field(0.05, gt=0, lt=1)
    """The fraction of the data that is kept for measuring. Unused with --eval-data."""
    measure_every_steps: int = Field(0, ge=0)
    """Measure the held-out loss after every so many steps, and make the result of the weights that had the least. 0: measure before and after, and
    take the last weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them. This takes less memory and more time."""
    compile: bool = False
    """Compile the decoder layers with PyTorch's compiler. The first steps take longer."""
    kernels: Literal["none", "liger"] = "none"
    """liger: layers of the package liger-kernel, for GPUs."""
    seed: int = 0
    distillation: Distillation | None = None
    preference: Preference | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.compile and self.sharding != Sharding():
            raise ValueError("compile: true and sharding exclude each other")
        return self

    def resolved(self, hidden_size: int, context_tokens: int) -> "Recipe":
        """The recipe with the learning rate and the token limit for this model.

        The learning rate is 5e-5 · (2000 / hidden)^0.781, and ten times that for LoRA. Thinking Machines fitted this rule to sweeps over
        14 models (J. Schulman and others, "LoRA Without Regret", 2025, with the exponent for Llama). It gives 3e-4 for LoRA on an 8B model
        and 4e-3 for LoRA on the seedling. Preferences get `PREFERENCE_RATE` of it.
        """
        rule = 5e-5 * (10 if self.lora else 1) * (PREFERENCE_RATE if self.preference else 1) * math.pow(2000 / hidden_size, 0.781)
        max_tokens = min(self.max_tokens or context_tokens, context_tokens)
        return self.model_copy(update={"learning_rate": self.learning_rate or rule, "max_tokens": max_tokens})


def schedule(recipe: Recipe, examples: int) -> Schedule:
    """The steps of a run with this recipe, whose learning rate is resolved."""
    rate = recipe.learning_rate or 0.0
    return Schedule(
        examples,
        recipe.global_batch,
        recipe.epochs,
        recipe.seed,
        rate,
        recipe.warmup_fraction,
        recipe.schedule,
        recipe.measure_every_steps,
    )


def load(
    name: str, overrides: list[str], epochs: float | None = None, fetch: sources.Fetch = sources.local, verb: str = "finetune"
) -> Recipe:
    """Load a recipe by its name, path or upload, with ``key=value`` overrides such as ``lora.rank=8``. Raises `ConfigError` naming the key.

    The ``verb``'s own section of `OBJECTIVES` is there in any case; those of other verbs are wrong.
    """
    shipped = not name.startswith(sources.UPLOAD) and "/" not in name and not name.endswith((".yaml", ".yml"))
    read = (lambda: (RECIPES / f"{name}.yaml").read_bytes()) if shipped else (lambda: fetch(name))
    if bad := [pair for pair in overrides if "=" not in pair]:
        raise ConfigError(f"--set {bad[0]} has no value.", "Write --set KEY=VALUE.", param=bad[0])
    changes = from_pairs(pair.split("=", 1) for pair in overrides)
    values = merge(merge(_yaml(sources.title(name), read), changes), {} if epochs is None else {"epochs": epochs})
    for section, whose in OBJECTIVES.items():
        if whose == verb:
            values[section] = values.get(section) or {}
        elif values.get(section) is not None:
            raise ConfigError(f"{section} is for springtide {whose} alone.", "Remove it from the recipe.", param=section)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(Recipe.model_fields)
        where, what = f"{key}: " if key else "", first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"The recipe {sources.title(name)} is not valid: {where}{what}.", f"Keys are: {known}.", param=key or None
        ) from error
    if recipe.sharding != Sharding() and verb not in (SHARDING if recipe.sharding.parts == 1 else PARTS):
        raise ConfigError(
            f"springtide {verb} does not shard its model in this way.", "Remove sharding from the recipe.", param="sharding"
        )
    return recipe


def _yaml(name: str, read: Callable[[], bytes]) -> dict[str, Any]:
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    try:
        values = yaml.safe_load(read().decode("utf-8")) or {}
    except (OSError, DataError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {name} cannot be read: {error}.", f"Name a file, or one of: {known}.", "recipe") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"The recipe {name} must hold keys and values.", f"Keys are: {', '.join(Recipe.model_fields)}.", "recipe"
        )
    return values
