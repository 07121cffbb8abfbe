"""What a model computes in: bfloat16 where the processor is faster with it, float32 otherwise.

A frozen base is loaded in bfloat16 and takes half the memory; its adapter stays in float32. Weights that are trained stay in float32, and PyTorch's
autocast makes a copy in bfloat16 of each where it is used (Micikevicius et al. 2018). Losses, sums of gradients and the optimizer are in float32.
"""

import contextlib
from typing import Any, Literal

import torch

from jobs.training.flops import product_per_s
from jobs.training.recipe import Recipe

Precision = Literal["float32", "bfloat16"]
FASTER = 1.2
"""So many times the speed makes bfloat16 worth its rounding."""


def resolve(recipe: Recipe, gpu: bool, hidden_size: int) -> Recipe:
    """The recipe with the precision for this machine. The job's driver decides, so that all workers of a run compute in the same one.

    A processor may know bfloat16 and have no instructions for it. So this asks the processor, and then times a product of the model's width.
    """
    if recipe.precision != "auto":
        return recipe
    chosen: Precision = "bfloat16" if gpu or faster_in_bfloat16(hidden_size) else "float32"
    return recipe.model_copy(update={"precision": chosen})


def faster_in_bfloat16(width: int) -> bool:
    """Whether this processor multiplies faster in bfloat16, on one thread."""
    known = torch.cpu.get_capabilities()
    if not (known.get("avx512_bf16") or known.get("amx_bf16")):
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product_per_s(width, torch.bfloat16) > FASTER * product_per_s(width, torch.float32)
    finally:
        torch.set_num_threads(threads)


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """What the base's weights are loaded in."""
    return torch.bfloat16 if recipe.precision == "bfloat16" and recipe.lora else torch.float32


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """What a sharded model casts its weights to before it computes; None where they stay as they are."""
    return torch.bfloat16 if recipe.precision == "bfloat16" and not recipe.lora else None


def computing(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Computes within the block as the recipe says, where the weights are in float32. A sharded model does so by itself."""
    trained_in_half = recipe.precision == "bfloat16" and not recipe.lora and recipe.sharding.weights == "whole"
    return torch.autocast(device.type, torch.bfloat16) if trained_in_half else contextlib.nullcontext()
