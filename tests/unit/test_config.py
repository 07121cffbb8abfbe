import os
from pathlib import Path
from typing import Any

import pytest

from cluster import config
from cluster.errors import ConfigError
from cluster.store.fleets import FleetRecord


def test_later_layers_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "springtide.yaml"
    file.write_text("gateway: {port: 1111, replicas: 2}")
    monkeypatch.setenv("SPRINGTIDE_GATEWAY__PORT", "2222")
    loaded = config.load(file=file, overrides={"fleet": {"max_num_seqs": 7}})
    assert (loaded.gateway.port, loaded.gateway.replicas, loaded.fleet.max_num_seqs) == (2222, 2, 7)
    assert loaded.fleet.dtype == "float32", "from the laptop preset"


@pytest.mark.parametrize("layer", ["file", "environment", "override"])
def test_an_unknown_key_is_an_error_that_names_it(layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "springtide.yaml"
    file.write_text("gateway: {prot: 1}" if layer == "file" else "")
    if layer == "environment":
        monkeypatch.setenv("SPRINGTIDE_GATEWAY__PROT", "1")
    overrides = {"gateway": {"prot": 1}} if layer == "override" else {}
    with pytest.raises(ConfigError, match=r"gateway\.prot"):
        config.load(file=file, overrides=overrides)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"fleet": {"min_replicas": 3, "max_replicas": 2}}, "below min_replicas"),
        ({"training": {"min_workers": 3, "workers": 2}}, "min_workers 3 is above workers 2"),
        ({"fleet": {"max_loras": 32, "max_cpu_loras": 16}}, "max_cpu_loras"),
        ({"fleet": {"model": "../etc"}}, "not a model name"),
        ({"gateway": {"hold_timeout_s": 10}}, "must be longer than swap_drain_s"),
        ({"gateway": {"port": 70000}}, r"gateway\.port"),
        ({"fleet": {"dtype": "float8"}}, r"fleet\.dtype"),
        ({"pool": {"host": "::1"}}, r"pool\.host: Ray has no loopback but 127\.0\.0\.1"),
        ({"home": "~nobody-is-called-so"}, "knows no home for it"),
    ],
)
def test_values_that_cannot_work_say_why(values: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.load(overrides=values)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"fleet": {"standby_s": 60}}, r"fleet\.standby_s: this key is called warm_pool_s now"),
        ({"fleets": {"chat": {"standby": 2}}}, r"fleets\.chat\.standby: this key is called warm_pool_size now"),
    ],
)
def test_a_key_that_was_renamed_is_refused_with_its_new_name(values: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.load(overrides=values)


def test_a_fleets_task_reaches_the_engine() -> None:
    loaded = config.load(overrides={"fleets": {"chat": {}, "vectors": {"task": "embed"}, "judge": {"task": "score"}}})
    given = {name: loaded.spec(name).engine_arguments() for name in loaded.fleets}
    assert (given["chat"]["runner"], given["chat"]["enable_lora"]) == ("generate", True)
    assert (given["vectors"]["runner"], given["vectors"]["convert"]) == ("pooling", "embed")
    assert not given["vectors"]["enable_lora"]
    assert given["judge"]["runner"] == "pooling" and "convert" not in given["judge"]


def test_a_stored_fleet_of_an_older_release_still_starts() -> None:
    record = FleetRecord.model_validate({"name": "m", "n": 1, "overrides": {"standby_s": 60}, "author": "ann", "time_s": 1})
    assert config.load().fleet_with("m", record.overrides).warm_pool_s == 60


def test_the_resolved_form_loads_back_to_itself() -> None:
    loaded = config.load("gpu")
    assert config.parse(loaded.dump()) == loaded


def test_the_gpu_preset_is_what_a_gpu_team_expects() -> None:
    loaded = config.load("gpu")
    fleet = loaded.fleet
    assert (loaded.pool.accelerator, fleet.dtype, fleet.enforce_eager) == ("gpu", "bfloat16", False)
    assert fleet.tensor_parallel_size > 1 and fleet.min_replicas < fleet.max_replicas


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gpu, laptop"):
        config.load("tpu")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(file=tmp_path / "c.yaml")


def test_one_fleet_is_there_without_any_being_declared() -> None:
    loaded = config.parse({"fleet": {"model": "chat"}})
    assert (list(loaded.fleets), loaded.default_fleet, loaded.default_model) == (["chat"], "chat", "chat")


def test_fleets_inherit_what_they_do_not_say() -> None:
    loaded = config.parse({"fleet": {"dtype": "float32"}, "fleets": {"chat": {"dtype": "bfloat16"}, "small": {"model": "tiny"}}})
    assert [(name, fleet.model, fleet.dtype) for name, fleet in loaded.fleets.items()] == [
        ("chat", "chat", "bfloat16"),
        ("small", "tiny", "float32"),
    ]
    assert config.parse(loaded.dump()).fleets == loaded.fleets


@pytest.mark.parametrize(
    ("fleets", "words"),
    [
        ({"chat": {"max_replica": 2}}, r"fleets\.chat\.max_replica: there is no such key"),
        ({"../etc": {}}, "not a model name"),
        ({"a": {"model": "m"}, "b": {"model": "m"}}, "both host the model m"),
        ({"a": {"swap_drain_s": 99}}, "swap_drain_s 99.0 of the fleet a"),
    ],
)
def test_a_bad_fleet_is_named(fleets: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.parse({"fleets": fleets})


@pytest.mark.parametrize(
    "path", ["/tmp/a #1", "/tmp/a: b", "/tmp/100%", "/tmp/- x", "/tmp/{a}", "/tmp/木", "/tmp/a'b\"c", "/tmp/2026"]
)
def test_a_path_in_a_variable_or_option_is_taken_as_it_stands(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML took what follows a # for a comment, so `SPRINGTIDE_HOME="/tmp/a #1"` was the home /tmp/a."""
    monkeypatch.setenv("SPRINGTIDE_HOME", path)
    assert config.load().home == Path(path)
    assert config.load(overrides=config.from_pairs([("home", path)])).home == Path(path)


@pytest.mark.parametrize(
    ("host", "bare"), [("::", "::"), ("[::1]", "::1"), ("::1", "::1"), ("0.0.0.0", "0.0.0.0"), ("localhost", "localhost")]
)
def test_a_gateway_listens_on_any_kind_of_address(host: str, bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRINGTIDE_GATEWAY__HOST", host)
    assert config.load().gateway.host == bare


def test_localhost_is_loopback_for_ray_too() -> None:
    """Ray takes the machine's outer address for it."""
    assert config.load(overrides={"pool": {"host": "localhost"}}).pool.host == "127.0.0.1"


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        config.load()
