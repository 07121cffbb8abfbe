"""Other code for a model's layers, by recipe: PyTorch's compiler (``compile``), and the kernels of liger (``kernels: liger``).

Both compute what transformers' own layers do. Compiling takes its time in the first steps.
"""

import importlib.util
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from cluster.errors import ConfigError
from jobs.training.recipe import Recipe

COMPILER = "inductor"
"""PyTorch's name for what turns traced layers into machine code."""


def check(recipe: Recipe, gpu: bool, model_type: str | None = None) -> None:
    """Raise `ConfigError` where the recipe asks for kernels that this pool or this type of model does not have. The driver calls this.

    ``model_type``: as in ``config.json``; None where it is not known yet.
    """
    if recipe.kernels == "none":
        return
    if not gpu:
        raise ConfigError("kernels: liger is for GPUs, and this pool has none.", "Leave kernels out of the recipe.", "kernels")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("kernels: liger needs the package liger-kernel.", "Install it on every machine of the pool.", "kernels")
    if model_type and _liger(model_type) is None:
        raise ConfigError(f"liger-kernel knows no model of the type {model_type}.", "Leave kernels out of the recipe.", "kernels")


def choose(recipe: Recipe, model: Any) -> None:
    """Give the layers of a model, with its adapter if it has one, the code that the recipe asks for.

    The decoder layers are compiled, each alone, because the examples' lengths are new in every portion: what depends on them is outside
    (`jobs.training.step.packed`). All layers share the code. liger has not run here: it needs a GPU.
    """
    if recipe.kernels == "liger":
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        apply: Any = _liger(plain.config.model_type)
        apply(model=plain, fused_linear_cross_entropy=False)  # the loss is ours
    if recipe.compile:
        for part in model.modules():
            if isinstance(part, GradientCheckpointingLayer):
                part.compile(dynamic=True, backend=COMPILER)


def _liger(model_type: str) -> Any:
    """liger's function for a type of model; None where it has none."""
    from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports] (optional)

    return getattr(liger, f"apply_liger_kernel_to_{model_type}", None)
