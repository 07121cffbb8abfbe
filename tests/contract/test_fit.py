"""`cluster.capacity.attention` and `cluster.capacity.fit` say what vLLM 0.29 says of the same configurations, and what transformers takes for
keys that a file leaves out. It needs no weights: vLLM's own arithmetic runs on what it reads from config.json."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity.attention import DEFAULTS, LATENT, attention
from cluster.capacity.fit import BATCH_TOKENS, BLOCK_TOKENS, Cache, Slot, cache_of, longest_tokens, requests
from tests.support.architectures import ARCHITECTURES

LENGTHS = (1, 127, 128, 129, 1000, 4095, 4097, 8192, 50_000)
BUDGETS = (1 << 27, 1 << 31, 3 << 32)


def folder(path: Path, name: str) -> Path:
    (path / "config.json").write_text(json.dumps(ARCHITECTURES[name]))
    return path


def vllms(path: Path) -> tuple[Any, Any]:
    """What vLLM reads from the folder: transformers' configuration of the language model, and its own description of it."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase

    config: Any = get_config(str(path), trust_remote_code=False)
    text: Any = get_hf_text_config(config)
    convertor: Any = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    return text, convertor(config, text).convert()


def specs(text: Any, described: Any, slot: Slot, block_tokens: int) -> dict[str, Any]:
    """The layers' KV cache, as vLLM's attention layers describe it for one of the slot's devices. Which layers slide is said by their kinds,
    or, where the configuration has none, by the window (``vllm/engine/arg_utils.py``)."""
    import torch
    from vllm.config import ModelConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    owner: Any = SimpleNamespace(use_mla=described.is_deepseek_mla, model_arch_config=described)
    parallel: Any = SimpleNamespace(tensor_parallel_size=slot.tensor_parallel_size)
    heads = ModelConfig.get_num_kv_heads(owner, parallel)
    dtype = torch.float32 if slot.dtype == "float32" else torch.bfloat16
    same = {"block_size": block_tokens, "num_kv_heads": heads, "head_size": described.head_size, "dtype": dtype}
    window: Any = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 1000
    full: Any = partial(MLAAttentionSpec if described.is_deepseek_mla else FullAttentionSpec, **same)
    layers = enumerate(kinds[: described.total_num_hidden_layers])
    return {
        str(n): SlidingWindowSpec(**same, sliding_window=window) if kind == "sliding_attention" else full() for n, kind in layers
    }


def engine(max_model_len: int, slot: Slot) -> Any:
    """The numbers that the arithmetic takes from an engine's configuration. The configuration itself needs a machine and a model to be made."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        speculative_config=None,
        max_in_flight_tokens=BATCH_TOKENS[slot.accelerator],
    )


@pytest.mark.parametrize("slot", [Slot("slot", dtype="float32"), Slot("gpu"), Slot("gpu", tensor_parallel_size=4)])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "all-MiniLM-L6-v2"])
def test_blocks_bytes_and_the_longest_context_are_vllms(name: str, slot: Slot, tmp_path: Path) -> None:
    from vllm.v1.core import kv_cache_utils as theirs

    text, described = vllms(folder(tmp_path, name))
    cache = cache_of(attention(ARCHITECTURES[name]), slot)
    layers = specs(text, described, slot, cache.block_tokens)
    at = partial(engine, slot=slot)
    groups = theirs.get_kv_cache_groups(at(1), layers)
    assert cache.block_bytes == theirs._pool_bytes_per_block(groups)
    needed = theirs._max_memory_usage_bytes_from_groups
    assert [cache.request_bytes(tokens) for tokens in LENGTHS] == [needed(at(tokens), groups) for tokens in LENGTHS]
    for budget in BUDGETS:
        most = theirs._estimate_max_model_len_from_groups(at(cache.kept.max_tokens), groups, budget - cache.block_bytes)
        assert longest_tokens(cache, budget) == most
        assert requests(cache, budget, 4096) == at_once(cache, groups, budget, at(4096))


def at_once(cache: Cache, groups: Any, budget: int, configured: Any) -> int:
    """vLLM's figure counts the block that it never gives away."""
    from vllm.v1.core import kv_cache_utils as theirs

    usable = SimpleNamespace(num_blocks=max(0, budget // cache.block_bytes - 1), kv_cache_groups=groups)
    found: Any = theirs.get_max_concurrency_for_kv_cache_config(configured, usable)  # pyright: ignore[reportArgumentType]
    return int(found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_heads_and_context_are_those_that_vllm_reads(name: str, tmp_path: Path) -> None:
    from vllm.config.model import _get_and_verify_max_len

    text, described = vllms(folder(tmp_path, name))
    kept = attention(ARCHITECTURES[name])
    window = getattr(text, "sliding_window", None)
    assert kept.default_tokens == _get_and_verify_max_len(text, described, None, None, False, window)
    assert kept.latent == described.is_deepseek_mla
    if kept.layers:
        assert (kept.layers, kept.heads) == (described.total_num_hidden_layers, described.total_num_attention_heads)
        assert kept.head_size == described.head_size
        assert kept.latent or kept.kv_heads == described.total_num_kv_heads


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    made: Any = CONFIG_MAPPING[kind]()
    layers = made.num_hidden_layers
    every = DEFAULTS[kind].get("sliding_window_pattern")
    if every:
        kinds = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)]
        assert made.layer_types == kinds
    stated = {key: value for key, value in DEFAULTS[kind].items() if key != "sliding_window_pattern"}
    assert {key: getattr(made, key) for key in stated} == stated
    bare = {key: getattr(made, key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")}
    kept = attention({"model_type": kind, **bare})
    assert kept.head_size == (getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads)


def test_vllm_has_the_types_that_we_take_for_latent() -> None:
    import vllm.transformers_utils.model_arch_config_convertor as theirs

    source = Path(theirs.__file__).read_text().split("def is_deepseek_mla")[1].split("def ")[0]
    assert all(f'"{kind}"' in source for kind in LATENT)


def test_cpus_take_the_blocks_and_batches_that_we_count_with() -> None:
    import vllm

    source = (Path(vllm.__file__).parent / "platforms/cpu.py").read_text()
    assert f"cache_config.block_size = {BLOCK_TOKENS['slot']}" in source and "scheduler_config.async_scheduling = False" in source
    arguments = (Path(vllm.__file__).parent / "engine/arg_utils.py").read_text()
    assert f"UsageContext.OPENAI_API_SERVER: {BATCH_TOKENS['slot']} * world_size" in arguments
    assert f"UsageContext.OPENAI_API_SERVER: {BATCH_TOKENS['gpu'] // 2}," in arguments
