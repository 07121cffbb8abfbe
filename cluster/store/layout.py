"""What a version's folder may be made of. Nothing that could run code when it is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cluster.errors import VersionRefused
from cluster.types import Kind

LAYOUT: dict[Kind, tuple[str, str]] = {
    "weights": ("config.json", ".safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}
"""Per kind, the configuration file and the ending of at least one tensor file that must be there."""

ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
"""What a version may be made of. Everything else is refused: many formats run code when they are read."""


def check_layout(folder: Path, kind: Kind) -> None:
    """Raise `VersionRefused` for a folder that must not be served."""
    check_files(files_in(folder), kind, folder)


def files_in(folder: Path) -> dict[str, Path]:
    """Every file of a folder under its relative path. Hidden ones are left out: a hub's downloader keeps its notes in ``.cache``.

    Raises `VersionRefused` for a symbolic link, which may lead anywhere. `cluster.store.imports` follows those of a hub's cache.
    """
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() and not _hidden(path.relative_to(folder)))
    for path in paths:
        if path.is_symlink():
            raise VersionRefused(
                f"{path} is a symbolic link.", f"Give a folder with the files themselves: cp -rL {path.parent} COPY."
            )
    return {str(path.relative_to(folder)): path for path in paths}


def check_files(files: Mapping[str, Path], kind: Kind, origin: Path) -> None:
    """Raise `VersionRefused` for files that must not be served together. ``files``: relative path → the file; ``origin`` is for messages."""
    config_name, tensors = LAYOUT[kind]
    if config_name not in files:
        raise VersionRefused(f"{origin} has no {config_name}.", f"A version of kind {kind} is a folder in Hugging Face layout.")
    for name in files:
        if not is_harmless(name):
            raise VersionRefused(
                f"{origin / name} could run code when it is read.", f"Accepted are files ending in {', '.join(ENDINGS)}."
            )
    if not any(name.endswith(tensors) for name in files):
        raise VersionRefused(f"{origin} has no {tensors} file.", "Save it with safe_serialization=True.")
    for name, path in files.items():
        if is_configuration(name):
            values = read_config(path)
            if "auto_map" in values:
                raise VersionRefused(f"{origin / name} names code to run (auto_map).", "Remote code is never run; remove it.")
            check_own_weights(values, origin / name)


def check_own_weights(values: Mapping[str, Any], where: Path) -> None:
    """Raise `VersionRefused` for a configuration with which vLLM loads other weights than the version's own.

    ``speculators_config`` names a model, by a path or on the hub. vLLM serves that one, and takes the version for its draft model
    (``maybe_override_with_speculators`` in ``vllm/transformers_utils/config.py``).
    """
    if values.get("speculators_config") is not None:
        raise VersionRefused(
            f"{where} names another model to be loaded in place of its own weights (speculators_config).",
            "It is a draft model: serve the model that it was made for, and name this folder in engine.speculative_config.",
        )


def is_harmless(name: str) -> bool:
    """Whether a file of this name runs no code when it is read.

    >>> is_harmless("model.safetensors"), is_harmless("LICENSE"), is_harmless("pytorch_model.bin")
    (True, True, False)
    """
    return name.endswith(ENDINGS) or Path(name).name in ("LICENSE", "NOTICE")


def is_configuration(name: str) -> bool:
    """Whether a loader reads the file as settings, which may name code to run. ``data_config.json`` is sentence-transformers' list of what an
    encoder was trained on.

    >>> is_configuration("generation_config.json"), is_configuration("data_config.json")
    (True, False)
    """
    return name.endswith("config.json") and Path(name).name != "data_config.json"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `VersionRefused`."""
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise VersionRefused(f"{path} is not valid JSON: {error}.", "Save the model again.") from error
    if not isinstance(found, dict):
        raise VersionRefused(f"{path} holds no JSON object.", "Save the model again.")
    return cast(dict[str, Any], found)
