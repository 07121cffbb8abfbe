"""What a model computes in: bfloat16 where the processor is faster with it, float32 otherwise.

A frozen base is loaded in bfloat16 and takes half the memory; its adapter stays in float32. Weights that are trained stay in float32, and PyTorch's
autocast makes a copy in bfloat16 of each where it is used (Micikevicius et al. 2018). Losses, sums of gradients and the optimizer are in float32.
"""

import contextlib
import time
from typing import Any, Literal

import torch

from jobs.training.recipe import Recipe

Precision = Literal["float32", "bfloat16"]
FASTER = 2.0
"""A block of layers must be so many times as fast for the whole step to gain: the optimizer, the loss and the copies of the weights gain nothing."""
TRIED_TOKENS, TRIED_TIMES = 256, 3
WIDEST = 1024
"""A wider block gains no less, and takes seconds."""


def resolve(recipe: Recipe, gpu: bool, hidden_size: int) -> Recipe:
    """The recipe with the precision for this machine. The job's driver decides, so that all workers of a run compute in the same one.

    A processor may know bfloat16 and have no instructions for it. So this asks the processor, and then times a block of the model's width. Example:
    with AVX-512 BF16 a block of the seedling (128 wide) is 1.7 times as fast, which its weights' copies use up; one of SmolLM2-135M (576) 2.6 times.
    """
    if recipe.precision != "auto":
        return recipe
    chosen: Precision = "bfloat16" if gpu or faster_in_bfloat16(hidden_size) else "float32"
    return recipe.model_copy(update={"precision": chosen})


def faster_in_bfloat16(width: int) -> bool:
    """Whether this processor trains a block of layers enough faster in bfloat16, on one thread."""
    known = torch.cpu.get_capabilities()
    if not (known.get("avx512_bf16") or known.get("amx_bf16")):
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tried = min(width, WIDEST)
        return block_s(tried, bfloat16=False) > FASTER * block_s(tried, bfloat16=True)
    finally:
        torch.set_num_threads(threads)


def block_s(width: int, bfloat16: bool) -> float:
    """Seconds that one block of a transformer takes forward and backward, the best of a few."""
    block = torch.nn.TransformerEncoderLayer(width, 1, 3 * width, dropout=0.0, batch_first=True, norm_first=True)
    tokens = torch.zeros(1, TRIED_TOKENS, width, requires_grad=True)
    took_s: list[float] = []
    for _ in range(TRIED_TIMES):
        began_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            made = block(tokens)
        made.float().sum().backward()
        took_s.append(time.perf_counter() - began_s)
    return min(took_s)


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
