"""Does a model fit on a slot? What its weights, its adapters and its KV cache need, and the longest context for which there is room.

Computed as vLLM 0.29 computes it, from the configuration and the tensors' headers alone, before anything starts. `python -m tests.fit_table`
prints the two beside each other. What a fleet leaves open (`max_model_len`, and without a GPU
`kv_cache_bytes`) is chosen here too, by the same function for whoever prints it and for the engine that starts.

Example: SmolLM2-135M on a laptop with 16 GiB. One token takes 45 KiB, so the whole context of 8,192 tokens fits. In a KV cache of 128 MiB
2,688 tokens would.

>>> smollm = {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
>>> model = Model({**smollm, "max_position_embeddings": 8192}, {})
>>> laptop = Slot("slot", memory_bytes=16 * GIB, dtype="float32")
>>> found = fit(model, laptop)
>>> found.fits, found.token_bytes, found.context_tokens, found.requests, size_words(found.kv_cache_bytes)
(True, 46080, 8192, 3, '1.4 GiB')
>>> fit(model, laptop._replace(kv_cache_bytes=128 << 20)).context_tokens
2688
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

from cluster.capacity import options
from cluster.capacity.attention import Attention, attention
from cluster.capacity.kv_cache import Cache, Slot, cache_of, longest_tokens, requests
from cluster.capacity.lora import takes_adapters

GIB = 1 << 30
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of stored tensors that an engine turns into its own dtype. Others, quantized weights for example, stay as they are stored."""
OTHER_BYTES: dict[str, int] = {"slot": 2 * GIB, "gpu": 3 * GIB}
"""Accelerator → allowance for what an engine needs beside weights, adapters and KV cache: activations, graphs, libraries. On two cores an
engine with a small model took 2.3 GB with its KV cache. On GPUs it is an estimate."""
PARALLEL, MOST_UTILIZATION, LEAST_TOKENS = (1, 2, 4, 8), 0.95, 16
"""What is proposed of `tensor_parallel_size`, of `gpu_memory_utilization` at most, and of `max_model_len` at least."""
LEAST_CONTEXT_TOKENS = 1024
"""A context that nobody asked for is no shorter, unless the model's own is: where there is room for less, the model does not fit."""
CHOSEN_KV_TOKENS, CHOSEN_KV_BYTES = 32_768, 128 << 20
"""What a KV cache that nobody sized has room for without a GPU, where there is memory for it: so many tokens, one request of the whole context,
and so many bytes."""
UNKNOWN_KV_BYTES = GIB
"""And where it is unknown what the model keeps."""
MOST_KV_SHARE = 0.5
"""The share of the memory that is left beside the rest of the engine which such a KV cache takes at most: a second replica, jobs and the pool
itself run on the same machine."""


class Tensor(Protocol):
    """A tensor as its file's header describes it (`cluster.store.headers.Tensor`)."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...


class Model(NamedTuple):
    config: dict[str, Any]
    """The raw config.json."""
    tensors: Mapping[str, Tensor]


class Fit(NamedTuple):
    """What a model needs on one device of a slot, and whether that is there."""

    attention: Attention
    weights_bytes: int
    adapters_bytes: int
    other_bytes: int
    engine_bytes: int | None
    """What there is for all of it. None: not known."""
    context_tokens: int
    """The longest request that the engine takes: what the fleet says, or the model's own context as far as there is room for it."""
    kv_cache_bytes: int | None
    """The size of the KV cache. None: vLLM takes what is left of its share."""
    takes_adapters: bool
    """Whether vLLM can load adapters onto this architecture."""
    token_bytes: int
    """The KV cache of one more token in the layers that keep every token."""
    sliding_token_bytes: int
    """The KV cache of one token in the layers that slide."""
    request_bytes: int
    """The KV cache of one request of ``context_tokens``."""
    kv_budget_bytes: int | None
    """What there is for the KV cache. None: not known."""
    longest_tokens: int | None
    """The longest context for which there is room, at most the model's own. 0: none."""
    requests: int | None
    """How many requests of ``context_tokens`` there is room for at once."""
    problem: str = ""
    """Why it does not fit."""
    changes: tuple[dict[str, Any], ...] = ()
    """Key of the fleet → a value. With any one of these it would fit."""

    @property
    def fits(self) -> bool | None:
        """None: it cannot be told."""
        if self.problem:
            return False
        return None if self.attention.unknown or self.kv_budget_bytes is None else True

    @property
    def settings(self) -> dict[str, int]:
        """Key of the fleet → its value, of those that the engine must be told. The model's own context it reads itself.

        >>> Fit(Attention(default_tokens=8192), 0, 0, 0, None, 4096, None, True, 0, 0, 0, None, None, None).settings
        {'max_model_len': 4096}
        """
        context = {"max_model_len": self.context_tokens} if self.context_tokens != self.attention.default_tokens else {}
        return {**context, **({"kv_cache_bytes": self.kv_cache_bytes} if self.kv_cache_bytes else {})}


def fit(model: Model, slot: Slot) -> Fit:
    """Raises `VersionRefused` where the configuration holds something else than what belongs there."""
    measured = measure(model, slot)
    return measured._replace(changes=_changes(model, slot, measured)) if measured.problem else measured


def measure(model: Model, slot: Slot) -> Fit:
    """`fit`, without what to change."""
    config = options.merged(model.config, slot.overrides)
    smaller = slot.unknown or _why_smaller(model, slot)
    adapters, kept = takes_adapters(config), attention(config)
    cache = cache_of(kept._replace(unknown=smaller or kept.unknown or slot.kv_unknown), slot)
    kept = cache.kept
    weights, places = weights_bytes(model, slot), adapters_bytes(model, slot) if adapters else 0
    other, room = OTHER_BYTES[slot.accelerator], slot.engine_bytes
    left = None if room is None else max(0, room - weights - places - other)
    most = _most_kv_bytes(slot, left)
    context = slot.max_model_len or _context(cache, most)
    chosen = slot.kv_cache_bytes or (_chosen_kv_bytes(cache, context, most) if slot.accelerator == "slot" else None)
    budget = chosen or left
    found = Fit(
        attention=kept,
        weights_bytes=weights,
        adapters_bytes=places,
        other_bytes=other,
        engine_bytes=room,
        context_tokens=context,
        kv_cache_bytes=chosen,
        takes_adapters=adapters,
        token_bytes=kept.full_layers * cache.layer_token_bytes,
        sliding_token_bytes=kept.sliding_layers * cache.layer_token_bytes,
        request_bytes=cache.request_bytes(context),
        kv_budget_bytes=budget,
        longest_tokens=None if most is None or kept.unknown else longest_tokens(cache, most),
        requests=None if budget is None or kept.unknown or not kept.layers else requests(cache, budget, context),
    )
    return found._replace(problem=_problem(found, slot, smaller))


def _most_kv_bytes(slot: Slot, left_bytes: int | None) -> int | None:
    """What the KV cache may take, of the bytes that the rest of the engine leaves. None: not known."""
    if slot.kv_cache_bytes is not None or left_bytes is None:
        return slot.kv_cache_bytes
    return int(left_bytes * MOST_KV_SHARE) if slot.accelerator == "slot" else left_bytes


def _context(cache: Cache, most_bytes: int | None) -> int:
    """The context of an engine whose fleet does not say it: the model's own, or as much of it as there is room for."""
    own = cache.kept.default_tokens
    if most_bytes is None or cache.kept.unknown or not cache.kept.layers:
        return own
    return min(own, max(LEAST_CONTEXT_TOKENS, longest_tokens(cache, most_bytes)))


def _chosen_kv_bytes(cache: Cache, context_tokens: int, most_bytes: int | None) -> int:
    """The size of a KV cache that nobody sized, without a GPU: vLLM would take nine tenths of the machine."""
    at_once = -(-CHOSEN_KV_TOKENS // context_tokens)
    one = cache.request_bytes(context_tokens)
    wanted = UNKNOWN_KV_BYTES if cache.kept.unknown else max(CHOSEN_KV_BYTES, at_once * one, one + cache.block_bytes)
    return wanted if most_bytes is None else max(1 << 20, min(wanted, most_bytes))


def weights_bytes(model: Model, slot: Slot) -> int:
    """Of one device, as the engine holds them: in its own dtype, or as it quantizes them. An output layer that is tied to the embedding is the
    same tensor. The draft model's are among them."""
    tied = model.config.get("tie_word_embeddings") is True
    held = {name: tensor for name, tensor in model.tensors.items() if not (tied and name == "lm_head.weight")}
    method = "" if "quantization_config" in model.config else slot.quantization
    total = sum(_tensor_bytes(name, tensor, method, slot) for name, tensor in held.items())
    return -(-(int(total) + (slot.draft_bytes or 0)) // slot.tensor_parallel_size)


def _tensor_bytes(name: str, tensor: Tensor, method: str, slot: Slot) -> float:
    if tensor.dtype not in FLOATS:
        return tensor.end - tensor.begin
    return prod(tensor.shape) * (options.quantized_bytes(method, name, len(tensor.shape)) or slot.element_bytes)


def _why_smaller(model: Model, slot: Slot) -> str:
    """Why the weights may be smaller than they are computed: what vLLM makes of them is not known here."""
    if not slot.quantization or "quantization_config" in model.config or slot.quantization in options.WEIGHT_BYTES:
        return ""
    return f"what {slot.quantization} makes of the weights is not computed here (engine.quantization)"


def adapters_bytes(model: Model, slot: Slot) -> int:
    """vLLM reserves a pair of matrices for each matrix of the model and each place of an adapter. Of the pair, tensor parallelism divides one."""
    sides = 0
    for tensor in model.tensors.values():
        if len(tensor.shape) in (2, 3):  # three: the experts of one layer
            *experts, outer, inner = tensor.shape
            sides += prod(experts) * (inner + -(-outer // slot.tensor_parallel_size))
    return slot.max_loras * slot.max_lora_rank * sides * slot.element_bytes


def _problem(found: Fit, slot: Slot, smaller: str) -> str:
    """``smaller``: why it may need less than was computed. Then nothing is refused for want of memory."""
    if found.attention.heads % slot.tensor_parallel_size:
        return f"tensor_parallel_size {slot.tensor_parallel_size} does not divide the model's {found.attention.heads} attention heads"
    held = found.weights_bytes + found.adapters_bytes + found.other_bytes + (slot.kv_cache_bytes or 0)
    if found.engine_bytes is not None and held > found.engine_bytes and not smaller:
        parts = "weights, adapters and the engine itself" + (" with its KV cache" if slot.kv_cache_bytes else "")
        return f"{parts} need {size_words(held)}, and there are {size_words(found.engine_bytes)}"
    if found.context_tokens > found.attention.max_tokens:
        return f"max_model_len is {found.context_tokens}, and the model was made for {found.attention.max_tokens} tokens"
    if found.longest_tokens is not None and found.longest_tokens < found.context_tokens:
        there = size_words(found.kv_budget_bytes or 0)
        return f"one request of {found.context_tokens} tokens needs {size_words(found.request_bytes)} of KV cache, and there are {there}"
    return ""


def _changes(model: Model, slot: Slot, found: Fit) -> tuple[dict[str, Any], ...]:
    """Of what may help, what does: one key, and only where none is enough, one key with a shorter context."""
    candidates = _candidates(slot, found)
    if alone := _enough(model, slot, candidates):
        return alone
    longest = [measure(model, slot._replace(**change)).longest_tokens or 0 for change in candidates]
    shorter = [change | {"max_model_len": tokens} for change, tokens in zip(candidates, longest, strict=True)]
    return _enough(model, slot, [change for change in shorter if change["max_model_len"] >= LEAST_TOKENS])


def _candidates(slot: Slot, found: Fit) -> list[dict[str, Any]]:
    longest, block_bytes = found.longest_tokens, cache_of(found.attention, slot).block_bytes
    values: list[tuple[str, Any]] = [
        ("max_model_len", found.attention.max_tokens if longest is None else longest if longest >= LEAST_TOKENS else None),
        ("kv_cache_bytes", found.request_bytes + block_bytes if found.kv_cache_bytes else None),
        ("dtype", "bfloat16" if slot.dtype == "float32" else None),
        ("gpu_memory_utilization", MOST_UTILIZATION if slot.gpu_memory_utilization < MOST_UTILIZATION else None),
        *(("tensor_parallel_size", size) for size in PARALLEL if slot.accelerator == "gpu"),
        ("quantization", "fp8" if slot.accelerator == "gpu" and not slot.quantization else None),
    ]
    return [{key: value} for key, value in values if value]


def _enough(model: Model, slot: Slot, changes: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Those with which the model fits. Of several values of one key the first is enough."""
    fitting = [change for change in changes if not measure(model, slot._replace(**change)).problem]
    return tuple({next(iter(change)): change for change in reversed(fitting)}.values())[::-1]


def changes_in_words(found: Fit) -> str:
    """What to do about a model that does not fit: the keys of the fleet to change."""
    changes = [" and ".join(f"fleet.{_key(key)}={value}" for key, value in change.items()) for change in found.changes]
    return f"Set {', or '.join(changes)}." if changes else "Take a smaller or a quantized model, or more memory."


def _key(name: str) -> str:
    return f"engine.{name}" if name == "quantization" else name


def size_words(count: int) -> str:
    """
    >>> size_words(46080), size_words(128 << 20), size_words(16_060_522_496)
    ('45.0 KiB', '128.0 MiB', '15.0 GiB')
    """
    for unit, bytes_ in (("GiB", GIB), ("MiB", 1 << 20)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
