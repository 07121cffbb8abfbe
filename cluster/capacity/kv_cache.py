"""The KV cache on one device of a slot, computed as vLLM 0.29 computes it (``vllm/v1/core/kv_cache_utils.py``, ``kv_cache_interface.py``).

Example: Llama-3-8B in two bytes keeps 4 KiB of a token in each of 32 layers, and a block of 16 tokens of all layers takes 2 MiB.

>>> llama = Attention(full_layers=32, heads=32, kv_heads=8, head_size=128, max_tokens=8192)
>>> cache = cache_of(llama, Slot("gpu"))
>>> cache.layer_token_bytes, cache.block_bytes, cache.request_bytes(8192), longest_tokens(cache, 512 << 20)
(4096, 2097152, 1073741824, 4080)
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cluster.capacity.attention import Attention
from cluster.capacity.options import KV_BYTES

BLOCK_TOKENS: dict[str, int] = {"slot": 128, "gpu": 16}
"""Accelerator → tokens of one block of the KV cache. vLLM takes 16 on CPUs too where the attention is latent."""
BATCH_TOKENS: dict[str, int] = {"slot": 2048, "gpu": 8192}
"""Accelerator → tokens of one batch: a sliding window keeps them beside its own. 8192 is what vLLM takes on GPUs of 70 to 160 GiB."""
IN_FLIGHT: dict[str, int] = {"slot": 1, "gpu": 2}
"""Accelerator → batches in flight."""


class Slot(NamedTuple):
    """Where the model shall run, and what a fleet's configuration says of its engine, mostly in its words and vLLM's."""

    accelerator: Literal["slot", "gpu"]
    memory_bytes: int | None = None
    """Of one device, or of the machine where there is no GPU. None: not known."""
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    max_loras: int = 4
    max_lora_rank: int = 16
    kv_cache_dtype: str = "auto"
    quantization: str = ""
    """What vLLM makes of whole weights while it loads them. Weights that are stored quantized stay as they are stored."""
    block_size: int | None = None
    max_num_batched_tokens: int | None = None
    keeps_all: bool = False
    """Layers that slide keep every token too, where others do: vLLM's hybrid KV cache manager is off."""
    overrides: Mapping[str, Any] = {}
    """What stands in the place of the model's own configuration (``hf_overrides``)."""
    draft: str = ""
    """The folder of the draft model (speculative decoding)."""
    draft_bytes: int | None = None
    """Its weights. None: they are not on this machine."""
    unknown: str = ""
    """Why nothing can be told with these options."""
    kv_unknown: str = ""
    """Why the KV cache cannot be told with these options."""

    @property
    def element_bytes(self) -> int:
        """With ``auto`` vLLM takes two bytes, for models that were saved with four as well."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_element_bytes(self) -> int:
        return KV_BYTES.get(self.kv_cache_dtype, self.element_bytes)

    @property
    def engine_bytes(self) -> int | None:
        """What vLLM takes of a device at most. With a KV cache of a given size it does not look at the share."""
        share = self.gpu_memory_utilization if self.kv_cache_bytes is None else 1
        return None if self.memory_bytes is None else int(self.memory_bytes * share)


class Cache(NamedTuple):
    """vLLM's KV cache on one device. Blocks of all groups of layers come from one pool, so they have one size."""

    kept: Attention
    layer_token_bytes: int
    """Bytes of one token in one layer."""
    block_tokens: int
    batch_tokens: int

    @property
    def groups(self) -> tuple[int, int]:
        """How many groups the full and the sliding layers are divided into. Each group has about as many layers as there are of the rarer
        kind, and tables of blocks of its own."""
        few, many = sorted((self.kept.full_layers, self.kept.sliding_layers))
        layers = few if few and many >= 1.5 * few else max(1, many)
        return -(-self.kept.full_layers // layers), -(-self.kept.sliding_layers // layers)

    @property
    def block_bytes(self) -> int:
        counts = zip((self.kept.full_layers, self.kept.sliding_layers), self.groups, strict=True)
        layers = max(-(-layers // max(1, groups)) for layers, groups in counts)
        return layers * self.block_tokens * self.layer_token_bytes

    def blocks(self, tokens: int) -> int:
        """The blocks that one request of ``tokens`` takes at most. A window may begin in the middle of a block."""
        within = min(self.kept.window_tokens - 1 + self.batch_tokens, tokens)
        full, sliding = -(-tokens // self.block_tokens), -(-within // self.block_tokens) + 1
        return self.groups[0] * full + self.groups[1] * sliding

    def request_bytes(self, tokens: int) -> int:
        return self.blocks(tokens) * self.block_bytes


def cache_of(kept: Attention, slot: Slot) -> Cache:
    """The KV cache on one device. Tensor parallelism divides the heads; a latent vector has none to divide."""
    if slot.keeps_all and kept.full_layers:
        kept = kept._replace(full_layers=kept.layers, sliding_layers=0)
    heads = 1 if kept.latent else max(1, kept.kv_heads // slot.tensor_parallel_size)
    layer_token_bytes = heads * kept.head_size * (1 if kept.latent else 2) * slot.kv_element_bytes
    block_tokens = slot.block_size or (16 if kept.latent else BLOCK_TOKENS[slot.accelerator])
    batch_tokens = (slot.max_num_batched_tokens or BATCH_TOKENS[slot.accelerator]) * IN_FLIGHT[slot.accelerator]
    return Cache(kept, layer_token_bytes, block_tokens, batch_tokens)


def longest_tokens(cache: Cache, budget_bytes: int) -> int:
    """The longest context of one request that ``budget_bytes`` hold; 0 where they hold none. vLLM never gives one of the blocks away."""
    room = budget_bytes - cache.block_bytes
    return bisect_right(range(1, cache.kept.max_tokens + 1), room, key=cache.request_bytes)


def requests(cache: Cache, budget_bytes: int, tokens: int) -> int:
    """How many requests of ``tokens`` there is room for at once."""
    return max(0, budget_bytes // cache.block_bytes - 1) // cache.blocks(tokens)
