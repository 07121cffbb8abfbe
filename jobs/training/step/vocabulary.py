"""The output layer and what is computed of its logits, for some tokens at a time.

The logits of a portion (tokens × vocabulary, in float32) and their gradient are the largest tensors of a step. So a portion with more than
`CHUNK_NUMBERS` logits is computed in chunks. In the backward pass each chunk is computed again (Chen et al. 2016), so the memory does not grow with
the tokens. Example: with a vocabulary of 49,152 a chunk has 1,365 tokens.

Smaller portions are not divided: computing again takes time.

An architecture that changes what its output layer says (a soft cap, a scale) gives its logits whole, see `ends_in_head`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 1 << 26
"""Logits that are in memory at a time: 268 MB in float32."""


def chunk_tokens(model: Any) -> int:
    """How many tokens have logits at a time."""
    return max(1, CHUNK_NUMBERS // model.config.get_text_config().vocab_size)


def by_chunks(compute: Callable[..., torch.Tensor], tokens: int, *tensors: torch.Tensor) -> torch.Tensor:
    """``compute(*tensors)`` of so many ``tokens`` at a time, joined along the first dimension. The gradient flows through the result.

    ``tensors``: of the same first dimension, the tokens. ``compute`` must treat each token alone.

    >>> by_chunks(lambda a, b: a * b, 2, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    tensor([ 4, 10, 18])
    """
    *chunks, last = zip(*(tensor.split(tokens) for tensor in tensors), strict=True)
    # The backward pass begins with the last chunk, so that one is kept: it takes no more memory than another one that is computed again.
    made: list[Any] = [checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat([*made, compute(*last)])


class States(NamedTuple):
    """What a model makes of tokens, and what makes logits of it."""

    states: torch.Tensor
    """Shape (rows, tokens, width)."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """The output layer. It has run for no token."""


def states_of(model: Any, **inputs: Any) -> States:
    """Run a model without its output layer. Where something may follow that layer, the states are the logits, and the head changes nothing."""
    if not getattr(model, "ends_in_head", False):
        return States(model(**inputs).logits, torch.nn.Identity())
    return _before_head(model, **inputs)


def _before_head(model: Any, **inputs: Any) -> States:
    given: list[torch.Tensor] = []

    def keep(layer: Any, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        given.append(arguments[0])
        return arguments[0][:, :0]

    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(keep):
        model(**inputs)
    return States(given[0], head)


def ends_in_head(model: Any, input_ids: torch.Tensor) -> bool:
    """Whether the model's logits are what its output layer says, to the bit. ``input_ids``: any, of shape (1, tokens)."""
    if model.get_output_embeddings() is None:
        return False
    logits = model(input_ids=input_ids, use_cache=False).logits
    states, head = _before_head(model, input_ids=input_ids, use_cache=False)
    return torch.equal(head(states).float(), logits.float())
