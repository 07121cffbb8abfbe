"""Whether a worker has room for a whole model while it trains it, or workers have to share it (`jobs.training.sharding.sharded`).

A worker needs the weights, for each trained number 4 bytes of gradient and 8 of AdamW's moments, and what a layer's backward pass needs of its
forward pass. The last depends on the tokens in memory at a time. A step of a whole model is computed as in `needed`, and nothing is tried out.

Example: Llama-3-8B with all weights trained, on GPUs of 80 GB. Whole it does not fit; four workers that share it have room.

>>> llama = Sizes(8_030_000_000, 8_030_000_000, 218_000_000, 1_050_000_000, 32, 4096, 14336, 128256)
>>> whole, slices = needed(llama, 1024, "bfloat16"), needed(llama, 1024, "bfloat16", workers=4)
>>> choose(whole, slices, 80 << 30, 4)
Choice(weights='fsdp', why='a slot has 80.0 GiB, and the whole model takes 144.6 GiB; of 4 workers each takes 42.6 GiB')
>>> adapter = llama._replace(parameters=8_072_000_000, trained=42_000_000)
>>> choose(needed(adapter, 1024, "bfloat16"), needed(adapter, 1024, "bfloat16", workers=4), 80 << 30, 4)
Choice(weights='whole', why='a slot has 80.0 GiB, and the whole model takes 30.3 GiB')
"""

import math
from typing import Any, Literal, NamedTuple

import torch

from cluster.capacity.fit import GIB, size_words
from cluster.config import Config
from cluster.memory import device_bytes
from jobs.training.recipe import Recipe, Sharding
from jobs.training.sharding.sharded import layers_of
from jobs.training.step.weightless import weightless

OTHER_BYTES = 2 * GIB
"""For libraries, communication, and gaps between tensors."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


class Sizes(NamedTuple):
    """Numbers of a model."""

    parameters: int
    trained: int
    layer: int
    """Parameters of the largest decoder layer."""
    outside: int
    """Parameters outside the decoder layers."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


class Needed(NamedTuple):
    """Bytes on one worker."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self) + OTHER_BYTES


class Choice(NamedTuple):
    weights: Literal["whole", "fsdp"]
    why: str


def needed(sizes: Sizes, tokens: int, precision: str, workers: int = 1, recomputed: bool = False) -> Needed:
    """What a worker needs of whom there are so many that share the model.

    ``tokens``: in memory at a time. ``recomputed``: whether the backward pass computes each layer again (`gradient_checkpointing`).
    """
    element, frozen = ELEMENT_BYTES[precision], sizes.parameters - sizes.trained
    shared, own = (frozen, sizes.trained) if frozen else (sizes.trained, 0)
    stored = element if frozen else 4
    weights = math.ceil(shared / workers) * stored + own * 4
    if workers > 1:  # while a layer computes, it and the next one are whole, and so is what is outside of the layers
        weights += (2 * sizes.layer + sizes.outside) * element
    elif not frozen and element < 4:  # the copies by which trained weights compute
        weights += sizes.parameters * element
    trained = math.ceil(sizes.trained / (1 if frozen else workers))
    return Needed(weights, 4 * trained, 8 * trained, tokens * token_bytes(sizes, element, bool(frozen), recomputed))


def token_bytes(sizes: Sizes, element: int, adapter: bool, recomputed: bool) -> int:
    """What the backward pass needs of a token, as Korthikanti et al. (2022) count it, for a layer of Llama's.

    Of a layer: eleven vectors of the hidden size around norms and attention, and four of the feed-forward size. An adapter takes its inputs in
    float32, in copies where the model is in bfloat16. Of the output layer: logits, their logarithms and their gradient, in float32.
    """
    layer = element * (11 * sizes.hidden + 4 * sizes.intermediate)
    if adapter and element < 4:
        layer += 4 * (6 * sizes.hidden + sizes.intermediate)
    kept = sizes.layers * element * sizes.hidden + layer if recomputed else sizes.layers * layer
    return kept + (3 * 4 + element) * sizes.vocabulary


def choose(whole: Needed, slices: Needed, slot_bytes: int | None, workers: int) -> Choice:
    """``slices``: what each of so many ``workers`` needs if they share the model. ``slot_bytes``: the memory of a slot; None: not known."""
    if slot_bytes is None:
        return Choice("whole", "it is not known how much memory a slot has")
    there = f"a slot has {size_words(slot_bytes)}, and the whole model takes {size_words(whole.total)}"
    if whole.total <= slot_bytes:
        return Choice("whole", there)
    if workers == 1:
        return Choice("whole", f"{there}; one worker has nobody to share it with (training.workers)")
    return Choice("fsdp", f"{there}; of {workers} workers each takes {size_words(slices.total)}")


# what is known of a model and of a slot


def resolve(recipe: Recipe, config: Config, shape: Any) -> Recipe:
    """The recipe with its sharding chosen, where it leaves that open; the log says what and why. ``shape``: transformers' configuration of the model.

    The precision must be resolved before.
    """
    if recipe.sharding.weights != "auto":
        return recipe
    found, workers = sizes_of(shape, recipe), config.training.workers
    of = (found, recipe.micro_batch_tokens, recipe.precision)
    whole, slices = (needed(*of, count, recipe.gradient_checkpointing) for count in (1, workers))
    choice = choose(whole, slices, slot_bytes(config), workers)
    print(f"sharding: {choice.weights}, because {choice.why}", flush=True)
    return recipe.model_copy(update={"sharding": Sharding(weights=choice.weights)})


def sizes_of(shape: Any, recipe: Recipe) -> Sizes:
    """Counted on the meta device, which takes no memory."""
    model = weightless(shape)
    parameters, head = count(model), model.get_output_embeddings()
    linears = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    adapter = recipe.lora and recipe.lora.rank * sum(one.in_features + one.out_features for one in linears)
    layers, text = [count(layer) for layer in layers_of(model)], shape.get_text_config()
    return Sizes(
        parameters + (adapter or 0),
        adapter or parameters,
        max(layers, default=0),
        parameters - sum(layers),
        text.num_hidden_layers,
        text.hidden_size,
        getattr(text, "intermediate_size", 4 * text.hidden_size),
        text.vocab_size,
    )


def count(module: torch.nn.Module) -> int:
    """Its parameters. What is tied counts once."""
    return sum(one.numel() for one in module.parameters())


def slot_bytes(config: Config) -> int | None:
    """The memory of a slot. Without GPUs the slots share the machine."""
    memory_bytes = device_bytes(config.pool.accelerator)
    return memory_bytes if config.pool.accelerator == "gpu" or memory_bytes is None else memory_bytes // config.pool.slots
