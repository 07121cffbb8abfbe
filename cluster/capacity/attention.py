"""What an engine keeps of every token: a model's attention, read from its raw ``config.json``.

Read as vLLM 0.29 reads it (``vllm/transformers_utils/model_arch_config_convertor.py``), without importing it. The raw file counts, because
transformers 5.4 and newer change ``qk_rope_head_dim``. What this file cannot tell is said to be unknown, with the reason.

Example: Llama-3-8B keeps keys and values of 8 heads of 128 numbers in each of 32 layers.

>>> llama = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
>>> kept = attention({**llama, "max_position_embeddings": 8192})
>>> kept.full_layers, kept.sliding_layers, kept.kv_heads, kept.head_size, kept.max_tokens, kept.unknown
(32, 0, 8, 128, 8192, '')
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from cluster.errors import VersionRefused

Config = Mapping[str, Any]

LARGEST = 10**9
"""No number here is larger in a model that exists."""
UNSTATED_TOKENS = 2048
"""What vLLM takes for the context of a model whose configuration states none."""
NESTED = ("text_config", "llm_config", "language_config")
"""Where a multimodal model keeps the configuration of its language model."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
ENCODERS = frozenset({"bert", "camembert", "distilbert", "modernbert", "mpnet", "nomic_bert", "roberta", "xlm-roberta"})
"""Model types that read a text at once and keep nothing of it."""
LATENT = frozenset({"axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "pangu_ultra_moe"})
"""Model types for which vLLM keeps one latent vector per token and layer (MLA)."""
UNKNOWN = {
    "compress_ratios": "it compresses its KV cache",
    "block_configs": "its layers differ from each other",
    "index_topk": "it keeps an index of tokens beside the KV cache (DSA)",
    "rswa_window": "it attends to a reference window (R-SWA)",
    "global_head_dim": "its full and sliding layers have heads of different sizes",
    "swa_num_key_value_heads": "its full and sliding layers have different heads",
    "hybrid_layer_pattern": "it is a hybrid of several kinds of layers",
    "hybrid_override_pattern": "it is a hybrid of several kinds of layers",
    "layers_block_type": "it is a hybrid of several kinds of layers",
    "attn_type_list": "it is a hybrid of several kinds of layers",
    "attn_layer_period": "it is a hybrid of several kinds of layers",
    "full_attn_idxs": "it is a hybrid of several kinds of layers",
    "linear_attn_config": "it is a hybrid with linear attention",
    "linear_num_key_heads": "it is a hybrid with linear attention",
    "conv_L_cache": "it is a hybrid with convolutions",
    "mamba_d_state": "it keeps a state (Mamba)",
    "mamba_num_heads": "it keeps a state (Mamba)",
    "ssm_cfg": "it keeps a state (Mamba)",
    "state_size": "it keeps a state (Mamba)",
    "is_encoder_decoder": "it has an encoder and a decoder",
}
"""Key → why the bytes per token cannot be told where it is set."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "falcon": {"multi_query": True},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    "llama4_text": {"num_key_value_heads": 8, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 28},
    "qwen2_moe": {"num_key_value_heads": 16, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3_moe": {"num_key_value_heads": 4, "use_sliding_window": False},
    "smollm3": {"num_key_value_heads": 4, "use_sliding_window": False},
}
"""Model type → what transformers takes for a key that the file leaves out, where that is not what every other model means by its absence.
Gemma-3-4b's file names neither its heads nor their size."""


class Attention(NamedTuple):
    full_layers: int = 0
    """Layers that keep every token."""
    sliding_layers: int = 0
    """Layers that keep the last ``window_tokens``. Neither: the model keeps nothing."""
    window_tokens: int = 0
    heads: int = 0
    """Attention heads. Tensor parallelism must divide them."""
    kv_heads: int = 0
    head_size: int = 0
    """Numbers that one head keeps of a token, once for keys and once for values."""
    latent: bool = False
    """One vector per token and layer, in place of keys and values of every head (MLA). Tensor parallelism does not divide it."""
    max_tokens: int = UNSTATED_TOKENS
    """The longest context that the model was made for."""
    default_tokens: int = UNSTATED_TOKENS
    """The context that vLLM takes where nobody sets one."""
    unknown: str = ""
    """Why it cannot be told what the model keeps; empty where the other fields say it."""

    @property
    def layers(self) -> int:
        return self.full_layers + self.sliding_layers


def attention(config: Config) -> Attention:
    """Raises `VersionRefused` where a value is not of the kind that it must be."""
    text = {**_defaults(config), **_present(_text(config))}
    longest, default = _context(text)
    said = Attention(max_tokens=longest, default_tokens=default)
    if _encoder(config, text):
        return said
    if why := _why_unknown(config, text):
        return said._replace(unknown=why)
    layers = cast(int, _whole(text, *LAYERS)) - (_whole(text, "num_kv_shared_layers") or 0)
    if layers <= 0:
        raise _refuse("num_kv_shared_layers", text["num_kv_shared_layers"], "less than the number of layers")
    said = said._replace(heads=cast(int, _whole(text, *HEADS)))
    if text["model_type"] in LATENT:
        size = (_whole(text, "kv_lora_rank") or 0) + (_whole(text, "qk_rope_head_dim") or 0)
        return said._replace(full_layers=layers, kv_heads=1, head_size=size, latent=True)
    window = _window(text)
    sliding = _sliding(text, layers) if window else 0
    return said._replace(
        full_layers=layers - sliding,
        sliding_layers=sliding,
        window_tokens=window if sliding else 0,
        kv_heads=_kv_heads(text, said.heads),
        head_size=_head_size(text, said.heads),
    )


def _text(config: Config) -> Config:
    """The configuration of the language model."""
    for key in NESTED:
        if section := _section(config, key):
            return {"model_type": config.get("model_type"), **_present(section)}
    return config


def _defaults(config: Config) -> dict[str, Any]:
    kind = _text(config).get("model_type", "")
    if not isinstance(kind, str | None):
        raise _refuse("model_type", kind, "a word")
    return {"model_type": kind, **(DEFAULTS.get(kind or "") or DEFAULTS.get(f"{kind}_text") or {})}


def _present(section: Config) -> dict[str, Any]:
    """Without nulls, except the one that means something: a sliding window that is switched off."""
    return {key: value for key, value in section.items() if value is not None or key == "sliding_window"}


def _encoder(config: Config, text: Config) -> bool:
    causal = text.get("is_causal") is not False and text.get("use_bidirectional_attention") is not True
    return config.get("is_encoder_decoder") is not True and (text["model_type"] in ENCODERS or not causal)


def _why_unknown(config: Config, text: Config) -> str:
    for key, why in UNKNOWN.items():
        if text.get(key) or config.get(key):
            return f"{why} ({key})"
    if text.get("kv_lora_rank") and text["model_type"] not in LATENT:
        return f"vLLM does not treat the model type {text['model_type']} as MLA (kv_lora_rank)"
    if text["model_type"] not in LATENT and text.get("v_head_dim"):
        return "its keys and values have different sizes (v_head_dim)"
    kinds = _layer_types(text)
    if strange := next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention", "chunked_attention")), ""):
        return f"it has layers of the kind {strange} (layer_types)"
    if text["model_type"] in LATENT and not (_whole(text, "kv_lora_rank") and _whole(text, "qk_rope_head_dim")):
        return "its config.json does not state kv_lora_rank and qk_rope_head_dim"
    named = {"the number of its layers": LAYERS, "the number of its heads": HEADS}
    missing = [f"{what} ({keys[0]})" for what, keys in named.items() if not _whole(text, *keys)]
    if not (missing or _whole(text, "head_dim", "hidden_size_per_head", *HIDDEN)):
        missing = [f"the size of its heads (head_dim or {HIDDEN[0]})"]
    return f"its config.json does not state {' and '.join(missing)}" if missing else ""


def _kv_heads(text: Config, heads: int) -> int:
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        return 1
    return _whole(_section(text, "attn_config"), "kv_n_heads") or _whole(text, *KV_HEADS) or heads


def _head_size(text: Config, heads: int) -> int:
    size, hidden = _whole(text, "head_dim", "hidden_size_per_head"), _whole(text, *HIDDEN) or 0
    if not (size or hidden // heads):
        raise _refuse(HIDDEN[0], hidden, f"at least the number of heads, {heads}")
    return size or hidden // heads


def _window(text: Config) -> int:
    """Tokens of the sliding window; 0 without one.

    vLLM keeps every token of every layer where ``attention_chunk_size`` is set, because it switches its hybrid KV cache manager off for
    chunked attention (``vllm/config/vllm.py``).
    """
    off = text.get("use_sliding_window") is False or text.get("attention_chunk_size")
    return 0 if off else _whole(text, "sliding_window") or 0


def _sliding(text: Config, layers: int) -> int:
    """How many of the first ``layers`` slide, where there is a window at all."""
    if kinds := _layer_types(text):
        return sum(kind == "sliding_attention" for kind in kinds[:layers])
    if every := _whole(text, "sliding_window_pattern"):
        return layers - layers // every
    if text.get("use_sliding_window") and (first := _whole(text, "max_window_layers")):
        return max(0, layers - first)
    return layers


def _layer_types(text: Config) -> list[str]:
    kinds: Any = text.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in cast(list[Any], kinds)):
        raise _refuse("layer_types", cast(Any, kinds), "a list of words")
    return cast(list[str], kinds)


def _context(text: Config) -> tuple[int, int]:
    """The longest context, and the one that vLLM takes by itself: as its ``_get_and_verify_max_len``."""
    stated = [tokens for key in CONTEXT if (tokens := _whole(text, key))]
    longest = _whole(text, "model_max_length") or min(stated, default=UNSTATED_TOKENS)
    default, scaled = 0, float(longest)
    for rope in [] if "gemma3" in str(text["model_type"]) else _ropes(text):
        kind, original = rope.get("rope_type", rope.get("type")), _whole(rope, "original_max_position_embeddings")
        if kind == "longrope":
            default = _whole(text, "original_max_position_embeddings") or 0
        if kind not in ("su", "longrope", "llama3"):
            scaled = (original if kind == "yarn" and original else longest) * _factor(rope)
    longest = max(1, int(scaled))
    return longest, default or longest


def _ropes(text: Config) -> list[Config]:
    """What is said of the positions' scaling: once, or once per kind of layer."""
    said = _section(text, "rope_scaling") or _section(text, "rope_parameters")
    nested = [cast(Config, value) for value in said.values() if isinstance(value, dict)]
    return nested or [said]


def _factor(rope: Config) -> float:
    factor = rope.get("factor")
    if factor is None:
        return 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < LARGEST:
        raise _refuse("factor", factor, "a number")
    return float(factor)


def _section(config: Config, key: str) -> Config:
    """The object under ``key``; empty where there is none."""
    section = config.get(key)
    if not isinstance(section, dict | None):
        raise _refuse(key, section, "an object")
    return cast(Config, section or {})


def _whole(config: Config, *keys: str) -> int | None:
    """The first of ``keys`` that is set. Zero and null mean that it is not."""
    for key in keys:
        if (value := config.get(key)) is None or value == 0:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not 0 < value <= LARGEST:
            raise _refuse(key, value, "a whole number")
        return int(value)
    return None


def _refuse(key: str, value: Any, what: str) -> VersionRefused:
    return VersionRefused(f"config.json: {key} is {str(value)[:40]!r}, not {what}.", "Save the model again.", param=key)
