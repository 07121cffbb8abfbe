"""`springtide fit MODEL` reads the configuration and the headers of a model, and says whether it fits on one slot (`cluster.capacity.fit`)."""

import json
from pathlib import Path
from typing import Any, cast

from cluster.capacity.fit import Fit, Model, Slot
from cluster.config import Config, Fleet
from cluster.errors import ModelNotFound, VersionRefused
from cluster.store.headers import header
from cluster.store.registry import Registry, registry_of
from cluster.types import NAME


def read(named: str, config: Config) -> tuple[str, Model]:
    """What a model is called, and what is known of it. ``named`` is a name or version in the store, or a folder; of an adapter its base counts.

    Raises `ModelNotFound`, and `VersionRefused` for files that are not what they must be.
    """
    registry = registry_of(config)
    if "/" not in named and ("@" in named or (NAME.fullmatch(named) and registry.alias(named))):
        id = registry.resolve(named).weights
        with registry.candidate(id, config.home / "cache") as candidate:
            return str(id), Model(configuration(candidate.settings), candidate.tensors)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise _absent(named, folder, registry)
    # A folder may hold the same weights once more, under the names of their makers' own format.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise VersionRefused(f"{folder} has no .safetensors file.", "Save the model with safe_serialization=True.", param="model")
    tensors = {name: tensor for path in files for name, tensor in header(path).items()}
    return str(folder), Model(configuration(folder), tensors)


def configuration(folder: Path) -> dict[str, Any]:
    """The raw config.json of a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise VersionRefused(f"{folder} has no config.json.", "Give a folder in Hugging Face layout.", param="model")
    try:
        values: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VersionRefused(f"{path} cannot be read: {str(error)[:200]}.", "Save the model again.", param="model") from error
    if not isinstance(values, dict):
        raise VersionRefused(f"{path} holds no JSON object.", "Save the model again.", param="model")
    return cast(dict[str, Any], values)


def _absent(named: str, folder: Path, registry: Registry) -> ModelNotFound:
    if folder.exists():
        return ModelNotFound(f"{folder} is a file.", "Give the folder that holds config.json and the safetensors files.", "model")
    known = ", ".join(registry.aliases()) or "none"
    return ModelNotFound(
        f"There is no folder {named}, and no such model in the store.",
        f"Models: {known}. A version is written NAME@NUMBER. A model of a hub must be downloaded first.",
        param="model",
    )


def fleet_of(config: Config, named: str) -> Fleet:
    """The declared fleet that hosts a model; for a model that none hosts, what every fleet has."""
    name = named.partition("@")[0]
    return next((fleet for fleet in config.fleets.values() if fleet.model == name), config.fleet)


def slot_of(config: Config, fleet: Fleet, memory_bytes: int | None) -> Slot:
    """One slot of the pool as a fleet's engine uses it. ``memory_bytes``: of one device, None where it is not known."""
    return Slot(
        accelerator=config.pool.accelerator,
        memory_bytes=memory_bytes,
        gpu_memory_utilization=fleet.gpu_memory_utilization,
        kv_cache_bytes=fleet.kv_cache_bytes,
        tensor_parallel_size=fleet.tensor_parallel_size,
        dtype=fleet.dtype,
        max_model_len=fleet.max_model_len,
        max_loras=fleet.max_loras,
        max_lora_rank=fleet.max_lora_rank,
    )


def verdict(found: Fit) -> str:
    """Whether it fits, in one sentence; and if it does not, what to change."""
    if found.problem:
        changes = [" and ".join(f"fleet.{key}={value}" for key, value in change.items()) for change in found.changes]
        what = f"Set {', or '.join(changes)}." if changes else "Take a smaller or a quantized model, or more memory."
        return f"It does not fit: {found.problem}. {what}"
    if why := found.attention.unknown:
        return f"It is unknown what its KV cache needs: {why}. vLLM finds out when it starts."
    if found.kv_budget_bytes is None:
        return "Whether it fits depends on the memory of one device. Give it with --memory-gib."
    at_once = "" if found.requests is None else f", {found.requests} at once"
    return f"It fits: requests of {found.context_tokens} tokens{at_once}."
