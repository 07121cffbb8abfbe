"""`cluster.capacity.attention` and `cluster.capacity.fit` say what vLLM 0.29 says of the same configurations, and what transformers takes for
keys that a file leaves out. It needs no weights: vLLM's own arithmetic runs on what it reads from config.json."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import options
from cluster.capacity.attention import DEFAULTS, LATENT, attention
from cluster.capacity.kv_cache import BATCH_TOKENS, BLOCK_TOKENS, Slot, cache_of
from cluster.vllm_arguments import arguments
from tests.fit_table import described_by_vllm, engine, groups_of, ours, vllms
from tests.support.architectures import ARCHITECTURES

LENGTHS = (1, 127, 128, 129, 1000, 4095, 4097, 8192, 50_000)
BUDGETS = (1 << 27, 1 << 31, 3 << 32)
SLOTS = {
    "laptop": Slot("slot", dtype="float32"),
    "gpu": Slot("gpu"),
    "four GPUs": Slot("gpu", tensor_parallel_size=4),
    "fp8": Slot("gpu", kv_cache_dtype="fp8"),
    "other blocks and batches": Slot("gpu", block_size=64, max_num_batched_tokens=1024),
}


@pytest.mark.parametrize("where", SLOTS)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if attention(ARCHITECTURES[name]).layers])
def test_blocks_bytes_and_the_longest_context_are_vllms(name: str, where: str) -> None:
    from vllm.v1.core import kv_cache_utils as theirs

    config, slot = ARCHITECTURES[name], SLOTS[where]
    assert [ours(config, slot, budget) for budget in BUDGETS] == [vllms(config, slot, budget) for budget in BUDGETS]
    cache = cache_of(attention(config), slot)
    groups, needed = groups_of(config, slot, cache), theirs._max_memory_usage_bytes_from_groups
    assert [cache.request_bytes(tokens) for tokens in LENGTHS] == [
        needed(engine(tokens, slot, cache), groups) for tokens in LENGTHS
    ]


@pytest.mark.parametrize("name", ["gemma-3-4b-it", "gpt-oss-20b", "Mistral-7B-v0.1"])
def test_without_the_hybrid_manager_every_layer_keeps_every_token(name: str) -> None:
    slot = Slot("gpu", keeps_all=True)
    assert ours(ARCHITECTURES[name], slot) == vllms(ARCHITECTURES[name], slot)


def test_the_options_that_are_counted_with_are_vllms() -> None:
    known = arguments()
    assert {*options.UNKNOWN, *options.NUMBERS, "kv_cache_dtype", "quantization", "hf_overrides"} <= {*known}
    assert {"disable_hybrid_kv_cache_manager", "speculative_config", "spec_method", "spec_model"} <= {*known}
    source = (Path(importlib.util.find_spec("vllm").origin).parent / "config/quantization.py").read_text()  # pyright: ignore
    assert all(f'"{method}"' in source for method in options.WEIGHT_BYTES if method != "fp8")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_heads_and_context_are_those_that_vllm_reads(name: str) -> None:
    from vllm.config.model import _get_and_verify_max_len

    text, described = described_by_vllm(ARCHITECTURES[name])
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
    taken = (Path(vllm.__file__).parent / "engine/arg_utils.py").read_text()
    assert f"UsageContext.OPENAI_API_SERVER: {BATCH_TOKENS['slot']} * world_size" in taken
    assert f"UsageContext.OPENAI_API_SERVER: {BATCH_TOKENS['gpu']}," in taken
