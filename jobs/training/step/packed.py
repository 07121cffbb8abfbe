"""Examples of several lengths in one row of tokens, and attention that keeps them apart.

A row holds the examples one after the other, each with positions from 0. `attend` is given to transformers under the name `SEGMENTS`: it runs
causal attention over each example alone, so it takes time for the squares of the examples' lengths, and no mask. Example: for examples of 3 and
2 tokens, the row has 5 tokens, the positions 0 1 2 0 1, and the bounds 0 3 5.

An architecture that looks back in another way than by this attention (a state-space layer, a convolution, soft caps, sinks) would get other
losses. So `pack` compares the losses with those of the model's own attention, before a run relies on it.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface

from jobs.training.step.vocabulary import ends_in_head

SEGMENTS = "segments"
TRIED_TOKENS = 7, 40, 19
"""Lengths of the examples by which attentions are compared."""
UNKNOWN = "softcap", "s_aux", "position_bias"
"""What some architectures ask of an attention function."""
ALIKE = 0.03
"""How much a token's loss may differ, relative to it and in nats: more than rounding in bfloat16 makes."""


class Segments(NamedTuple):
    """Token ids in one row."""

    input_ids: torch.Tensor
    """Shape (1, tokens)."""
    position_ids: torch.Tensor
    """Shape (1, tokens)."""
    bounds: torch.Tensor
    """Where each example begins in the row, and where the last one ends. Shape (examples + 1,), in the host's memory."""

    @classmethod
    def of(cls, examples: Sequence[Sequence[int]], device: torch.device) -> "Segments":
        ids = torch.tensor([[token for example in examples for token in example]], device=device)
        positions = torch.tensor([[at for example in examples for at in range(len(example))]], device=device)
        bounds = torch.tensor([0, *(len(example) for example in examples)], dtype=torch.int32)
        return cls(ids, positions, bounds.cumsum(0, dtype=torch.int32))


@torch.compiler.disable(reason="its loop has as many turns as there are examples")
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_bounds: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. ``query``: shape (1, heads, tokens, width); ``key`` and ``value`` may have fewer heads.

    Returns a tensor of shape (1, tokens, heads, width). Without ``segment_bounds`` the row is one example.
    """
    if attention_mask is not None or query.shape[0] != 1 or any(more.get(key) is not None for key in UNKNOWN):
        raise ValueError("this attention takes one row, without masks, soft caps and sinks")
    bounds = [0, query.shape[2]] if segment_bounds is None else segment_bounds.tolist()
    if not dropout and _flash_agrees(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device):
        return _flash(query, key, value, bounds, scaling, sliding_window), None
    return _one_by_one(query, key, value, bounds, scaling, sliding_window, dropout), None


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    scale: float | None,
    width: int | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    parts: list[torch.Tensor] = []
    for first, end in pairwise(bounds):
        q, k, v = (tensor[:, :, first:end] for tensor in (query, key, value))
        window = _window(end - first, width, query.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float | None, width: int | None
) -> torch.Tensor:
    """The same by one kernel for all examples, FlashAttention (Dao et al. 2022, 2023). It is for GPUs, and has not run on one yet."""
    starts = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest = max(end - first for first, end in pairwise(bounds))
    window = (width - 1 if width else -1, 0)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=grouped)
    return found[None]


@cache
@torch.no_grad()
def _flash_agrees(heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `_flash` computes what `_one_by_one` does, tried once for each kind of attention. Without a GPU, and in float32, it does not."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    bounds, tried = list(accumulate(TRIED_TOKENS, initial=0)), torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, count, bounds[-1], width, dtype=dtype, device=device, generator=tried)
        for count in (heads, key_heads, key_heads)
    )
    try:
        found = [(_flash(q, k, v, bounds, None, window), _one_by_one(q, k, v, bounds, None, window)) for window in (None, 16)]
    except (RuntimeError, NotImplementedError):  # a width or a GPU that the kernel does not know
        return False
    return all(torch.allclose(one, other, rtol=ALIKE, atol=ALIKE) for one, other in found)


def _window(tokens: int, width: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of attention to the last ``width`` tokens; None where that is all of them."""
    if width is None or tokens <= width:
        return None
    behind = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None]
    return (behind >= 0) & (behind < width)


AttentionInterface.register(SEGMENTS, attend)


def is_packed(model: Any) -> bool:
    """Whether `pack` has prepared the model, or the one within an adapter's."""
    return getattr(model, "takes_segments", False)


@torch.no_grad()
def pack(model: Any) -> bool:
    """Give a model the attention of this file. Where its losses differ from those by its own attention, the model gets that back.
    This also finds out whether its output layer may run by chunks.

    ``model``: as `from_pretrained` makes it, in evaluation mode, so that dropout changes nothing. Returns whether it takes packed examples now.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tried = torch.Generator().manual_seed(0)
    examples = [torch.randint(vocabulary, (tokens,), generator=tried).tolist() for tokens in TRIED_TOKENS]
    device = next(model.parameters()).device
    model.ends_in_head = ends_in_head(model, torch.tensor(examples[:1], device=device))
    alone = [_losses(model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0], ids) for ids in examples]
    try:
        model.set_attn_implementation(SEGMENTS)
        row = Segments.of(examples, device)
        logits = model(row.input_ids, position_ids=row.position_ids, use_cache=False, segment_bounds=row.bounds).logits[0]
        packed = [_losses(part, ids) for part, ids in zip(logits.split([*map(len, examples)]), examples, strict=True)]
        model.takes_segments = all(torch.allclose(a, b, rtol=ALIKE, atol=ALIKE) for a, b in zip(alone, packed, strict=True))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # the architecture asks for more than this attention has
        model.takes_segments = False
    if not model.takes_segments:
        _as_loaded(model)
    return model.takes_segments


def _as_loaded(model: Any) -> None:
    """The attention that `from_pretrained` chooses: PyTorch's where the architecture has it, and its own otherwise."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


def _losses(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return cross_entropy(logits[:-1].float(), torch.tensor(ids[1:], device=logits.device), reduction="none")
