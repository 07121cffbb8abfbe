"""Fits a fleet to the weights that it is to host: reads their configuration and headers, and lets `cluster.capacity.fit` choose and judge.

Everybody asks here: `springtide fit`, `up` and `fleets add` before anything starts, a publish before anything moves, and the engine about the
files that it loads. So an engine starts with the numbers that were printed.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from cluster.capacity import fit as capacity
from cluster.capacity.fit import Fit, Model
from cluster.capacity.kv_cache import Slot
from cluster.config import FleetSpec
from cluster.errors import DoesNotFit, VersionRefused
from cluster.memory import device_bytes
from cluster.store import gguf, gguf_config, gguf_header
from cluster.store.headers import header
from cluster.store.layout import check_own_weights
from cluster.store.registry import Registry
from cluster.types import VersionId

TENSORS = ".safetensors"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""A type in torch's words → in those of a tensor's header."""
LIMITS = "sentence_bert_config.json"
"""Where an encoder's makers say that it takes less than its config.json does."""


def of_version(registry: Registry, id: VersionId, cache: Path) -> Model:
    """Of a version in the store. Of the tensors some kilobytes are read, however large they are."""
    with registry.candidate(id, cache) as candidate:
        manifest = candidate.manifest
        names = loaded(file.path for file in manifest.files)
        kept = manifest.model_copy(update={"files": tuple(file for file in manifest.files if file.path in names)})
        return Model(configuration(candidate.settings), registry.files.tensors(kept, cache))


def of_folder(folder: Path) -> Model:
    """Of a folder on this machine. Raises `VersionRefused` for files that are not what they must be."""
    names = loaded(path.name for path in folder.glob(f"*{TENSORS}"))
    if not names:
        raise VersionRefused(f"{folder} has no {TENSORS} file.", "Save the model with safe_serialization=True.", param="model")
    return Model(configuration(folder), {key: tensor for name in names for key, tensor in header(folder / name).items()})


def of_gguf(file: Path) -> Model:
    """Of a GGUF file that is not converted yet. Raises `VersionRefused` where it is damaged."""
    header = gguf_header.read(file)
    return Model(gguf_config.configuration(header), gguf_config.tensors(header, DTYPES[gguf.as_dtype(header)]))


def loaded(paths: Iterable[str]) -> list[str]:
    """The files that an engine loads: a folder may hold the same weights once more, under the names of their makers' own format.

    >>> loaded(["config.json", "model-1-of-1.safetensors", "consolidated.safetensors", "onnx/model.safetensors"])
    ['model-1-of-1.safetensors']
    """
    tensors = sorted(path for path in paths if path.endswith(TENSORS) and "/" not in path)
    return [path for path in tensors if path.startswith("model")] or tensors


def configuration(folder: Path) -> dict[str, Any]:
    """The raw config.json of a folder, with the limit of an encoder's makers."""
    if not (folder / "config.json").is_file():
        raise VersionRefused(f"{folder} has no config.json.", "Give a folder in Hugging Face layout.", param="model")
    limits = _object(folder / LIMITS) if (folder / LIMITS).is_file() else {}
    stated = _object(folder / "config.json")
    check_own_weights(stated, folder / "config.json")
    return {**stated, **{key: limits[key] for key in ("max_seq_length",) if limits.get(key)}}


def _object(path: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VersionRefused(f"{path} cannot be read: {str(error)[:200]}.", "Save the model again.", param="model") from error
    if not isinstance(values, dict):
        raise VersionRefused(f"{path} holds no JSON object.", "Save the model again.", param="model")
    return cast(dict[str, Any], values)


def slot(spec: FleetSpec, memory_bytes: int | None) -> Slot:
    """One slot as the fleet's engine uses it, with the draft model of speculative decoding where that is on this machine."""
    found = spec.slot(memory_bytes)
    if found.draft and os.path.isdir(found.draft):
        return found._replace(draft_bytes=capacity.weights_bytes(of_folder(Path(found.draft)), found._replace(draft="")))
    return found


def fit(spec: FleetSpec, model: Model, name: str, memory_bytes: int | None) -> Fit:
    """How a fleet's engine will host the model ``name``. ``memory_bytes``: of one device. Raises `DoesNotFit` with the numbers and the keys to
    change; what is unknown is left to vLLM."""
    found = capacity.fit(model, slot(spec, memory_bytes))
    if found.problem:
        key = next((next(iter(change)) for change in found.changes), "max_model_len")
        raise DoesNotFit(f"{name} does not fit: {found.problem}.", capacity.changes_in_words(found), param=f"fleet.{key}")
    return found


def fitted(spec: FleetSpec, folder: Path, name: str) -> FleetSpec:
    """The fleet as it starts on this machine over the model ``name`` in ``folder``. It reads files, and may ask the GPUs' driver."""
    return spec.fitted(fit(spec, of_folder(folder), name, device_bytes(spec.accelerator)))
