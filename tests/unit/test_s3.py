"""The registry over S3's protocol: the same promises as on a disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import Conflict
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage
from tests.s3 import Bucket, serving


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving() as (bucket, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield bucket


def test_versions_and_aliases_live_in_a_bucket_too(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry(Store("s3://models/pool"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "source" / "model.safetensors").write_bytes(b"x" * 100)
    made = registry.register("m", "weights", None, tmp_path / "source", Lineage())
    registry.move("m", made.id, "first", "me", after=0)
    with pytest.raises(Conflict):
        registry.move("m", made.id, "also first", "you", after=0)
    fresh = Registry(Store("s3://models/pool"))
    assert [m.id for m in fresh.versions("m")] == [made.id] and fresh.aliases()["m"].stable == made.id
    folder = fresh.fetch(made, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"x" * 100
    fresh.fetch(made, tmp_path / "cache")
    assert bucket.reads["pool/versions/m/1/files/model.safetensors"] == 1, "a machine fetches a version once"
