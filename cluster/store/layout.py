"""What a version's folder may be made of. Nothing that could run code when it is read."""

import json
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


def check_layout(folder: Path, kind: Kind) -> list[str]:
    """The relative paths of a version's files, or `VersionRefused` for what must not be served."""
    config_name, tensors = LAYOUT[kind]
    if not (folder / config_name).is_file():
        raise VersionRefused(f"{folder} has no {config_name}.", f"A version of kind {kind} is a folder in Hugging Face layout.")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() and not _hidden(path.relative_to(folder)))
    for path in paths:
        _check_file(path)
    names = [str(path.relative_to(folder)) for path in paths]
    if not any(name.endswith(tensors) for name in names):
        raise VersionRefused(f"{folder} has no {tensors} file.", "Save it with safe_serialization=True.")
    for path in (path for path in paths if path.name.endswith("config.json")):
        if "auto_map" in _config(path):
            raise VersionRefused(f"{path} names code to run (auto_map).", "Remote code is never run; remove it.")
    return names


def _hidden(path: Path) -> bool:
    """Whether any part of it is: a folder that a hub's downloader filled keeps its notes in ``.cache``."""
    return any(part.startswith(".") for part in path.parts)


def _check_file(path: Path) -> None:
    if path.is_symlink():
        raise VersionRefused(
            f"{path} is a symbolic link.", f"Give a folder with the files themselves: cp -rL {path.parent} COPY."
        )
    if path.suffix not in ENDINGS and path.name not in ("LICENSE", "NOTICE"):
        raise VersionRefused(f"{path} could run code when it is read.", f"Accepted are files ending in {', '.join(ENDINGS)}.")


def _config(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise VersionRefused(f"{path} is not valid JSON: {error}.", "Save the model again.") from error
    if not isinstance(found, dict):
        raise VersionRefused(f"{path} holds no JSON object.", "Save the model again.")
    return cast(dict[str, Any], found)
