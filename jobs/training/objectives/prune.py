"""A smaller model made of a larger one: fewer layers, and fewer neurons in each feed-forward layer. Pure.

What is kept is kept exactly, so a student begins with what its teacher knows. Of the layers, those that are spread evenly stay, as in DistilBERT
(Sanh et al. 2019). Of the neurons, those with the largest weights stay, as in Minitron (Muralidharan et al. 2024), which looks at activations
too. The hidden size and the attention's heads stay as they are.

It knows one layout of weights: that of Llama, Mistral, Qwen 2 and 3, Gemma and OLMo, with ``model.layers.N`` and gated feed-forward layers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from cluster.errors import ConfigError

ALIGNED = 64
"""The number of neurons stays a multiple of this, so that fast products and engines that share a layer take it."""
LAYER = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(self_attn\.\w+\.(weight|bias)|mlp\.(?P<side>gate|up|down)_proj\.(weight|bias)|\w*norm\w*\.weight)"
)
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "lm_head.bias"}


class Size(NamedTuple):
    """What is to stay."""

    layers: int | None = None
    """How many; None for all."""
    width: float = 1.0
    """The fraction of the neurons of each feed-forward layer."""


Shape = dict[str, Any]
"""A model's ``config.json``."""


def smaller(shape: Shape, names: Iterable[str], size: Size) -> Shape:
    """The configuration of the pruned model. Raises `ConfigError` for another layout of weights, and for more than there is.

    ``names``: of the weights.

    >>> weights = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    >>> smaller({"num_hidden_layers": 2, "intermediate_size": 384}, weights, Size(1, 0.5))
    {'num_hidden_layers': 1, 'intermediate_size': 192}
    """
    count = shape.get("num_hidden_layers", 0)
    found = [LAYER.fullmatch(name) for name in names if name not in OUTSIDE]
    if not all(found) or {int(each["layer"]) for each in found if each} != set(range(count)):
        kind = shape.get("model_type", "this model")
        raise ConfigError(
            f"{kind} has another layout of weights than Llama's, and cannot be pruned.", "Name a student: --student NAME@N."
        )
    if size.layers is not None and size.layers > count:
        raise ConfigError(
            f"There are {count} layers, so {size.layers} cannot be kept.", f"Use --layers {count} or fewer.", "layers"
        )
    kept = kept_layers(count, size.layers or count)
    # One entry for each layer, for example "full_attention". A list of end tokens may be as long by chance.
    each = {key: value for key, value in shape.items() if "layer" in key and isinstance(value, list) and len(value) == count}
    lists = {key: [value[layer] for layer in kept] for key, value in each.items()}
    return {
        **shape,
        **lists,
        "num_hidden_layers": len(kept),
        "intermediate_size": kept_width(shape["intermediate_size"], size.width),
    }


def kept_layers(count: int, kept: int) -> list[int]:
    """Which of ``count`` layers stay: spread evenly, the first and the last among them.

    >>> kept_layers(12, 6), kept_layers(4, 2), kept_layers(4, 1)
    ([0, 2, 4, 7, 9, 11], [0, 3], [0])
    """
    return [round(at * (count - 1) / max(1, kept - 1)) for at in range(kept)]


def kept_width(neurons: int, fraction: float) -> int:
    """
    >>> kept_width(384, 0.5), kept_width(384, 0.4), kept_width(384, 0.01), kept_width(100, 1.0)
    (192, 128, 64, 100)
    """
    return min(neurons, max(ALIGNED, round(fraction * neurons / ALIGNED) * ALIGNED))


def pruned(weights: Mapping[str, torch.Tensor], shape: Shape, size: Size) -> tuple[dict[str, torch.Tensor], Shape]:
    """The weights that stay under their new names, and the new configuration.

    ``weights``: by name. ``shape``: their configuration. The layer 3 of 4 becomes the layer 1 of 2. What stays whole is the same tensor, not a
    copy. Raises `ConfigError` as `smaller` does.
    """
    made = smaller(shape, weights, size)
    kept = kept_layers(shape["num_hidden_layers"], made["num_hidden_layers"])
    taken = {name: tensor for name, tensor in weights.items() if name in OUTSIDE}
    for new, old in enumerate(kept):
        first = f"model.layers.{old}."
        layer = {name: tensor for name, tensor in weights.items() if name.startswith(first)}
        if made["intermediate_size"] < shape["intermediate_size"]:
            layer = narrowed(layer, first, made["intermediate_size"])
        taken |= {f"model.layers.{new}.{name.removeprefix(first)}": tensor for name, tensor in layer.items()}
    return taken, made


def narrowed(layer: Mapping[str, torch.Tensor], first: str, neurons: int) -> dict[str, torch.Tensor]:
    """A layer with the ``neurons`` of most weight, in their order. ``first``: how the names of its weights begin."""
    gate, up, down = (layer[f"{first}mlp.{side}_proj.weight"] for side in ("gate", "up", "down"))
    kept = heaviest(gate, up, down, neurons)

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = LAYER.fullmatch(name)
        side = found["side"] if found else None
        if side == "down":
            return (
                tensor[:, kept] if tensor.ndim == 2 else tensor
            )  # its bias has one number for each dimension, not for each neuron
        return tensor if side is None else tensor[kept]

    return {name: cut(name, tensor) for name, tensor in layer.items()}


def heaviest(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, neurons: int) -> torch.Tensor:
    """The numbers of the neurons to keep, rising: a tensor of shape (neurons,).

    ``gate`` and ``up``: shape (all neurons, hidden). ``down``: shape (hidden, all neurons). A neuron multiplies what the three make of it, so the
    product of its three norms bounds what it adds.

    >>> one = torch.tensor([[1.0], [3.0], [2.0]])
    >>> heaviest(one, one, one.T, 2)
    tensor([1, 2])
    """
    weight = gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)
    return weight.topk(neurons).indices.sort().values
