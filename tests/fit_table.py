"""What an engine needs for ten kinds of models: computed here and by vLLM 0.29 itself, beside each other.

    python -m tests.fit_table

It needs no weights. vLLM's own arithmetic (``vllm/v1/core/kv_cache_utils.py``) runs on what it reads from each config.json.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

from cluster.capacity.attention import attention
from cluster.capacity.kv_cache import Cache, Slot, cache_of, longest_tokens, requests
from tests.support.architectures import ARCHITECTURES, KINDS

BUDGET_BYTES = 8 << 30
REQUEST_TOKENS = 8192
GPU = Slot("gpu")
TORCH_TYPES = {"auto": "bfloat16", "fp8": "uint8"}


class Needs(NamedTuple):
    """Of one model on one device."""

    block_bytes: int
    """One block of the KV cache, of all layers that share it."""
    request_bytes: int
    """One request of `REQUEST_TOKENS`."""
    longest_tokens: int
    """The longest request that `BUDGET_BYTES` hold."""
    at_once: int
    """Requests of 4,096 tokens at once in `BUDGET_BYTES`."""


def ours(config: dict[str, Any], slot: Slot, budget: int = BUDGET_BYTES) -> Needs:
    cache = cache_of(attention(config), slot)
    longest = longest_tokens(cache, budget)
    return Needs(cache.block_bytes, cache.request_bytes(REQUEST_TOKENS), longest, requests(cache, budget, 4096))


def vllms(config: dict[str, Any], slot: Slot, budget: int = BUDGET_BYTES) -> Needs:
    from vllm.v1.core import kv_cache_utils as theirs

    cache = cache_of(attention(config), slot)
    at, groups = partial(engine, slot=slot, cache=cache), groups_of(config, slot, cache)
    block, needed = theirs._pool_bytes_per_block(groups), theirs._max_memory_usage_bytes_from_groups
    most = theirs._estimate_max_model_len_from_groups(at(cache.kept.max_tokens), groups, budget - block)
    usable = SimpleNamespace(
        num_blocks=max(0, budget // block - 1), kv_cache_groups=groups
    )  # it counts the block that it never gives away
    at_once: Any = theirs.get_max_concurrency_for_kv_cache_config(at(4096), usable)  # pyright: ignore[reportArgumentType]
    return Needs(block, needed(at(REQUEST_TOKENS), groups), most, int(at_once))


def groups_of(config: dict[str, Any], slot: Slot, cache: Cache) -> Any:
    """The groups into which vLLM divides the layers of a model."""
    from vllm.v1.core import kv_cache_utils as theirs

    text, described = described_by_vllm(config)
    return theirs.get_kv_cache_groups(engine(1, slot, cache), specs(text, described, slot, cache.block_tokens))


def described_by_vllm(config: dict[str, Any]) -> tuple[Any, Any]:
    """What vLLM reads from config.json: transformers' configuration of the language model, and its own description of it."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase

    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        found: Any = get_config(folder, trust_remote_code=False)
    text: Any = get_hf_text_config(found)
    convertor: Any = MODEL_ARCH_CONFIG_CONVERTORS.get(found.model_type, ModelArchConfigConvertorBase)
    return text, convertor(found, text).convert()


def specs(text: Any, described: Any, slot: Slot, block_tokens: int) -> dict[str, Any]:
    """The layers' KV cache, as vLLM's attention layers describe it for one of the slot's devices. Which layers slide is said by their kinds,
    or, where the configuration has none, by the window (``vllm/engine/arg_utils.py``)."""
    import torch
    from vllm.config import ModelConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    owner: Any = SimpleNamespace(use_mla=described.is_deepseek_mla, model_arch_config=described)
    parallel: Any = SimpleNamespace(tensor_parallel_size=slot.tensor_parallel_size)
    heads = ModelConfig.get_num_kv_heads(owner, parallel)
    dtype = torch.float32 if slot.dtype == "float32" else getattr(torch, TORCH_TYPES[slot.kv_cache_dtype])
    same = {"block_size": block_tokens, "num_kv_heads": heads, "head_size": described.head_size, "dtype": dtype}
    window: Any = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 1000
    full: Any = partial(MLAAttentionSpec if described.is_deepseek_mla else FullAttentionSpec, **same)
    layers = enumerate(kinds[: described.total_num_hidden_layers])
    return {
        str(n): SlidingWindowSpec(**same, sliding_window=window) if kind == "sliding_attention" else full() for n, kind in layers
    }


def engine(max_model_len: int, slot: Slot, cache: Cache) -> Any:
    """The numbers that the arithmetic takes from an engine's configuration. The configuration itself needs a machine and a model to be made."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=slot.keeps_all),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        speculative_config=None,
        max_in_flight_tokens=cache.batch_tokens,
    )


def rows() -> Iterator[str]:
    """The table in Markdown. An encoder keeps nothing, so there is nothing to compare."""
    yield "| Model | Kind | A block | A request of 8,192 tokens | Longest in 8 GiB | 4,096 tokens at once | vLLM's own |"
    yield "|---|---|---|---|---|---|---|"
    for name, config in ARCHITECTURES.items():
        if not attention(config).layers:
            yield f"| {name} | {KINDS[name]} | 0 | 0 | | | the same |"
            continue
        own, theirs = ours(config, GPU), vllms(config, GPU)
        yield f"| {name} | {KINDS[name]} | {' | '.join(f'{value:,}' for value in own)} | {'the same' if own == theirs else theirs} |"


if __name__ == "__main__":
    for row in rows():
        print(row)
        sys.stdout.flush()
