"""What a fine-tune can know before it trains."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, parse
from cluster.errors import ConfigError, ModelNotFound
from cluster.store.fleets import FleetRecord, FleetRecords
from cluster.store.registry import Registry, registry_of
from cluster.types import Lineage, VersionId
from jobs.training.base import check_fits
from jobs.training.recipe import Recipe
from tests.controlled import make_base

FULL = Recipe.model_validate({})


def lora(rank: int) -> Recipe:
    return Recipe.model_validate({"lora": {"rank": rank}})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    fleets = {"m": {"max_lora_rank": 32}, "code": {"model": "coder", "max_lora_rank": 8}}
    return parse(
        {"home": str(tmp_path), "store": (tmp_path / "store").as_uri(), "fleet": {"max_lora_rank": 16}, "fleets": fleets}
    )


@pytest.fixture
def registry(config: Config, tmp_path: Path) -> Registry:
    """m@1 and third@1 exist; at run time somebody has added the fleet extra, whose alias means third@1."""
    registry = registry_of(config)
    for n, name in enumerate(("m", "third")):
        registry.register(name, "weights", None, make_base(tmp_path / name, n), Lineage())
    registry.move("extra", VersionId("third", 1), "first version of the fleet", "ann", after=0)
    added(registry, 1, overrides={"model": "extra", "max_lora_rank": 64})
    return registry


def added(registry: Registry, n: int, **what: Any) -> None:
    FleetRecords(registry.store).append(FleetRecord(name="extra", n=n, author="ann", time_s=0, **what))


@pytest.mark.parametrize(
    ("base", "limit", "fleet"),
    [
        ("m", 32, "the fleet m"),
        ("m@1", 32, "the fleet m"),
        ("coder", 8, "the fleet code"),
        ("extra", 64, "the fleet extra"),
        ("third@1", 64, "the fleet extra"),
    ],
)
def test_an_adapter_must_fit_the_fleet_that_would_serve_it(
    config: Config, registry: Registry, base: str, limit: int, fleet: str
) -> None:
    """Fleets that were added at run time were not known: a rank that theirs takes was refused, and one that it does not take was trained."""
    check_fits(lora(limit), config, registry, base)
    check_fits(FULL, config, registry, base)
    with pytest.raises(ConfigError, match=f"above max_lora_rank {limit} of {fleet}"):
        check_fits(lora(limit + 1), config, registry, base)


def test_what_no_fleet_hosts_must_fit_what_every_fleet_has(config: Config, registry: Registry) -> None:
    added(registry, 2, ended=True)
    with pytest.raises(ConfigError, match="above max_lora_rank 16 of every fleet"):
        check_fits(lora(17), config, registry, "third@1")
    with pytest.raises(ModelNotFound):
        check_fits(lora(8), config, registry, "nobody")


def test_a_fleet_whose_record_is_damaged_or_not_valid_any_more_costs_itself(config: Config, registry: Registry) -> None:
    added(registry, 2, overrides={"model": "extra", "max_lora_rank": -1})
    root = registry.store.local_root
    assert root
    (root / "fleets/torn").mkdir()
    (root / "fleets/torn/00000001.json").write_text("{")
    assert FleetRecords(registry.store).with_declared(config).keys() == {"m", "code"}
    check_fits(lora(32), config, registry, "m")
