"""What the store holds, as it is told over HTTP."""

from pathlib import Path

import orjson
import pytest

from cluster.control import catalogue
from cluster.errors import ModelNotFound
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId
from tests.unit.test_registry import weights


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(Store((tmp_path / "store").as_uri()))
    for name in ("m", "m", "n"):
        registry.register(name, "weights", None, weights(tmp_path / "source"), Lineage(metrics={"loss": 1.5}))
    registry.move("m", VersionId("m", 1), "why", "who", 0)
    registry.move("chat", VersionId("m", 1), "why", "who", 0)
    return registry


def names(registry: Registry, name: str | None) -> list[tuple[str, list[str]]]:
    told = orjson.loads(orjson.dumps(catalogue.models(registry, name)))
    return [(row["version"], row["live_as"]) for row in told["versions"]]


def test_every_version_is_told_with_what_means_it(registry: Registry) -> None:
    assert names(registry, None) == [("m@1", ["chat", "m"]), ("m@2", []), ("n@1", [])]
    assert names(registry, "n") == [("n@1", [])]
    assert names(registry, "chat") == [("m@1", ["chat", "m"])], "an alias without versions of its own"


def test_what_does_not_exist_is_told_with_what_does(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="Models: chat, m, n"):
        catalogue.models(registry, "nobody")
    with pytest.raises(ModelNotFound, match="m@1, m@2"):
        catalogue.version(registry, "m@3")
    with pytest.raises(ModelNotFound, match="no alias nobody"):
        catalogue.history(registry, "nobody")


def test_a_version_and_a_history_can_be_sent_as_they_are(registry: Registry) -> None:
    told = orjson.loads(orjson.dumps(catalogue.version(registry, "m@1")))
    assert told["manifest"]["id"] == "m@1" and len(told["digest"]) == 64 and told["verdicts"] == []
    assert [move["stable"] for move in orjson.loads(orjson.dumps(catalogue.history(registry, "chat")))["moves"]] == ["m@1"]
