"""What a fleet's ``engine:`` section changes of what a model needs on a slot.

>>> changed({"kv_cache_dtype": "fp8", "tool_call_parser": "hermes"})
{'kv_cache_dtype': 'fp8'}
>>> changed({"speculative_config": {"method": "draft_model", "model": "/models/small"}})["draft"]
'/models/small'
"""

from collections.abc import Mapping
from typing import Any, cast

KV_BYTES = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
"""``kv_cache_dtype`` → bytes of one number. With ``auto`` it has the model's own dtype."""
WEIGHT_BYTES = {
    "fp8": 1.0,
    "fp8_per_tensor": 1.0,
    "fp8_per_block": 1.0,
    "fp8_per_channel": 1.0,
    "int8_per_channel_weight_only": 1.0,
    "mxfp8": 33 / 32,
    "nvfp4_per_token": 9 / 16,
}
"""``quantization`` → bytes that vLLM makes of one number of a matrix that is stored whole. mxfp8 has a scale of one byte for 32 numbers, nvfp4
for 16."""
WITHOUT_KV = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Methods of speculative decoding that keep nothing of a token."""
NUMBERS = ("block_size", "max_num_batched_tokens")
UNKNOWN = {
    "cpu_offload_gb": "a part of the weights is kept in the machine's memory",
    "offload_backend": "a part of the weights is kept in the machine's memory",
    "disable_sliding_window": "vLLM chooses the context where the window is switched off",
    "num_gpu_blocks_override": "it says how large the KV cache is",
    "kv_cache_dtype_skip_layers": "its layers keep different types",
    "decode_context_parallel_size": "each device keeps a part of the tokens",
}
"""Option → why nothing can be told where it is set."""


def changed(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Field of `cluster.capacity.fit.Slot` → its value, of those that the section sets."""
    found: dict[str, Any] = {key: engine[key] for key in NUMBERS if engine.get(key)}
    for key in ("kv_cache_dtype", "quantization"):
        if engine.get(key) not in (None, "", "auto"):
            found[key] = engine[key]
    if engine.get("disable_hybrid_kv_cache_manager") is True:
        found["keeps_all"] = True
    if isinstance(engine.get("hf_overrides"), Mapping):
        found["overrides"] = engine["hf_overrides"]
    if why := _why_unknown(engine):
        found["unknown"] = why
    return found | _speculative(engine)


def _why_unknown(engine: Mapping[str, Any]) -> str:
    for key, why in UNKNOWN.items():
        if engine.get(key) not in (None, False, 0, 1, [], "auto"):
            return f"{why} (engine.{key})"
    dtype = engine.get("kv_cache_dtype") or "auto"
    if dtype != "auto" and dtype not in KV_BYTES:
        return f"a KV cache of the type {dtype} is not computed here (engine.kv_cache_dtype)"
    return ""


def _speculative(engine: Mapping[str, Any]) -> dict[str, Any]:
    said: Any = engine.get("speculative_config")
    config: Mapping[str, Any] = cast(Mapping[str, Any], said) if isinstance(said, Mapping) else {}
    method, draft = (engine.get(f"spec_{key}") or config.get(key) or "" for key in ("method", "model"))
    found = {"draft": str(draft)} if draft else {}
    if (method or draft) and method not in WITHOUT_KV:
        found["kv_unknown"] = "the draft model keeps a KV cache too (engine.speculative_config)"
    return found


def quantized_bytes(method: str, name: str, dimensions: int) -> float | None:
    """Bytes of one number of a tensor that is stored whole, where vLLM quantizes it while it loads. Embeddings and the output layer stay.

    >>> quantized_bytes("fp8", "model.layers.0.mlp.up_proj.weight", 2), quantized_bytes("fp8", "model.embed_tokens.weight", 2)
    (1.0, None)
    """
    kept = any(part in name for part in ("embed", "lm_head", "wte", "wpe", "shared.weight"))
    return None if dimensions < 2 or kept else WEIGHT_BYTES.get(method)


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with ``hf_overrides``, which may reach into its sections.

    >>> merged({"a": 1, "text_config": {"b": 2, "c": 3}}, {"text_config": {"b": 4}})
    {'a': 1, 'text_config': {'b': 4, 'c': 3}}
    """
    found = dict(config)
    for key, value in overrides.items():
        under = found.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        found[key] = merged(cast(Mapping[str, Any], under), cast(Mapping[str, Any], value)) if both else value
    return found
