"""The ``config.json`` that a GGUF file becomes, as far as it says what an engine keeps. It is known before the file is converted."""

from collections.abc import Sequence
from math import prod
from typing import Any

from cluster.store import headers
from cluster.store.gguf_header import Header

TYPES = {
    "gpt-oss": "gpt_oss",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "command-r": "cohere",
    "minimax-m2": "minimax_m2",
}
"""Architecture in llama.cpp's words → model type, where they differ."""
WITHOUT_ADAPTERS = {
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mamba": "MambaForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
"""Architectures whose name matters (`cluster.capacity.lora`)."""
KEYS = {
    "num_hidden_layers": ("block_count",),
    "num_attention_heads": ("attention.head_count",),
    "num_key_value_heads": ("attention.head_count_kv",),
    "hidden_size": ("embedding_length",),
    "head_dim": ("attention.key_length", "rope.dimension_count"),
    "max_position_embeddings": ("context_length",),
    "state_size": ("ssm.state_size",),
    "conv_L_cache": ("shortconv.l_cache",),
    "num_local_experts": ("expert_count",),
}
"""Key of config.json → the file's keys, of which the first that is there counts."""
SLIDING = ("gemma2", "gemma3", "gpt-oss")
"""Architectures whose window transformers takes over."""
NAMES = {"output.weight": "lm_head.weight", "token_embd.weight": "embed_tokens.weight"}
"""Tensors whose names matter (`cluster.capacity.fit.weights_bytes`)."""
HEADS_DIFFER = "global_head_dim"
"""Gemma 4 has two sizes of heads, and the file states the larger one."""


def configuration(header: Header) -> dict[str, Any]:
    """
    >>> from cluster.store.gguf_header import Field
    >>> llama = Header({"general.architecture": Field([8], [b"llama"]), "llama.block_count": Field([4], (30,))}, {})
    >>> configuration(llama)
    {'model_type': 'llama', 'tie_word_embeddings': True, 'num_hidden_layers': 30}
    """
    named = str(header.value("general.architecture") or "")
    found: dict[str, Any] = {"model_type": TYPES.get(named, named), "tie_word_embeddings": "output.weight" not in header.tensors}
    stated = {key: _first(header, [f"{named}.{name}" for name in names]) for key, names in KEYS.items()}
    if any(isinstance(value, list) for value in stated.values()):
        stated["block_configs"] = True  # each layer has its own number
    if named in SLIDING:
        stated["sliding_window"] = header.value(f"{named}.attention.sliding_window")
    if named == "gemma4":
        stated[HEADS_DIFFER] = stated.pop("head_dim")
    if named in WITHOUT_ADAPTERS:
        stated["architectures"] = [WITHOUT_ADAPTERS[named]]
    return found | {key: value for key, value in stated.items() if value is not None}


def _first(header: Header, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := header.value(name)) is not None), None)


def tensors(header: Header, dtype: str) -> dict[str, headers.Tensor]:
    """The tensors as they are once the file is converted. ``dtype``: of the numbers, for example ``BF16``."""
    return {
        NAMES.get(name, name): headers.Tensor(dtype, tensor.shape, 0, prod(tensor.shape) * headers.SIZES[dtype])
        for name, tensor in header.tensors.items()
    }
