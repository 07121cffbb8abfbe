"""Versions' files on a machine: as few bytes as the question needs, a cache with a limit, and failures that leave nothing behind."""

import fcntl
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.config import Config
from cluster.control import admission, weight_distribution
from cluster.errors import DigestMismatch, StoreUnavailable, VersionRefused
from cluster.store import files as module
from cluster.store.artefact import difference
from cluster.store.files import Files
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, VersionId
from tests.s3 import Bucket, serving

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving() as (bucket, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield bucket


def base(registry: Registry, folder: Path, seed: int = 0, size: int = 200_000) -> Manifest:
    """A version of about a megabyte."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": np.full((8, 4), seed, np.float32),
        "filler": np.full(size, seed, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return registry.register("m", "weights", None, folder, Lineage())


def adapter(registry: Registry, folder: Path, on: VersionId, rank: int = 2) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    tensors = {
        f"{PREFIX}.lora_A.weight": np.ones((rank, 4), np.float32),
        f"{PREFIX}.lora_B.weight": np.ones((8, rank), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return registry.register("a", "adapter", on, folder, Lineage())


def test_admission_reads_headers_of_the_base_and_not_its_bytes(bucket: Bucket, tmp_path: Path) -> None:
    """It downloaded the whole base, and the hosted weights once more, to look at their shapes."""
    registry = Registry(Store("s3://pool"))
    on = base(registry, tmp_path / "base")
    made = adapter(registry, tmp_path / "adapter", on.id)
    spec = Config(home=tmp_path / "home", store="s3://pool").spec("seedling")
    bucket.sent_bytes = 0
    admission.check(spec, Registry(Store("s3://pool")), made, on.id)
    assert bucket.sent_bytes < 100_000 and not list((tmp_path / "home/cache" / on.digest).rglob("*.safetensors"))
    with pytest.raises(VersionRefused, match="rank 32"):
        admission.check(spec, registry, adapter(registry, tmp_path / "large", on.id, 32), on.id)


def test_whether_weights_fit_an_engine_is_known_from_headers_and_settings(bucket: Bucket, tmp_path: Path) -> None:
    """A control that was restarted within a rollout hashed both versions, while everybody waited."""
    registry = Registry(Store("s3://pool"))
    one, two, wide = (base(registry, tmp_path / f"{n}", n, size) for n, size in ((1, 200_000), (2, 200_000), (3, 200_001)))
    bucket.sent_bytes = 0
    shapes = admission.Shapes()
    assert shapes.swap_obstacle(registry, tmp_path / "cache", two.id, one.id) == ""
    assert shapes.swap_obstacle(registry, tmp_path / "cache", wide.id, one.id) == "shape"
    assert bucket.sent_bytes < 300_000 and not list((tmp_path / "cache").rglob("*.safetensors"))
    with registry.candidate(one.id, tmp_path / "cache") as first, registry.candidate(two.id, tmp_path / "cache") as second:
        assert difference(first, second) == ""


def test_settings_come_without_the_tensors(bucket: Bucket, tmp_path: Path) -> None:
    """Preparing a fine-tuning downloaded all weights to read a tokenizer."""
    registry = Registry(Store("s3://pool"))
    made = base(registry, tmp_path / "source")
    folder = registry.files.fetch_settings(made, tmp_path / "cache")
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"config.json", "tokenizer.json"}
    assert (registry.fetch(made, tmp_path / "cache") / "model.safetensors").is_file()


def test_a_header_that_is_longer_than_the_first_read_is_read_whole(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry(Store("s3://pool"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text("{}")
    save_file({f"tensor-number-{n}": np.zeros(1, np.float32) for n in range(3000)}, tmp_path / "source/model.safetensors")
    made = registry.register("m", "weights", None, tmp_path / "source", Lineage())
    assert struct.unpack("<Q", (tmp_path / "source/model.safetensors").read_bytes()[:8])[0] > 64 << 10
    assert len(registry.candidate(made.id, tmp_path / "cache").tensors) == 3000


def kept(cache: Path) -> set[str]:
    return {folder.name for folder in cache.iterdir() if folder.is_dir()}


def test_the_cache_gives_up_what_was_not_used_for_the_longest(bucket: Bucket, tmp_path: Path) -> None:
    """It grew for ever."""
    registry = Registry(Store("s3://pool"))
    cache, made = tmp_path / "cache", [base(registry, tmp_path / f"{n}", n) for n in range(4)]
    files = Files(registry.store, limit_bytes=2_000_000)  # room for two
    for n, manifest in enumerate(made[:2]):
        folder = files.fetch(manifest, cache)
        files.release(manifest)
        os.utime(folder / ".lock", (n, n))
    files.fetch(made[0], cache)  # used again, so the other one is the oldest now
    files.release(made[0])
    files.fetch(made[2], cache)
    assert kept(cache) == {made[0].digest, made[2].digest}
    files.fetch(made[3], cache)
    assert kept(cache) == {made[2].digest, made[3].digest}, "what is in use stays"


def test_what_another_process_uses_stays_and_nobody_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry(Store("s3://pool"))
    cache, made = tmp_path / "cache", [base(registry, tmp_path / f"{n}", n) for n in range(2)]
    other, files = Files(registry.store, 1_000_000), Files(registry.store, 1_000_000)  # a lock of its own, as another process has
    folder = other.fetch(made[0], cache)
    assert files.fetch(made[1], cache).is_dir() and folder.is_dir(), "above the limit rather than without a version"
    other.release(made[0])
    with (folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


def test_a_failed_download_leaves_nothing_and_is_not_repeated_at_once(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left its part file, and was tried again every 30 s, as often as control asked."""
    registry = Registry(Store("s3://pool"))
    made, cache, now = base(registry, tmp_path / "source"), tmp_path / "cache", [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    tried: list[str] = []

    def breaks(path: str, target: Path) -> None:
        tried.append(path)
        target.write_bytes(b"the first half")
        raise StoreUnavailable("the connection broke.")

    whole = registry.store.download
    monkeypatch.setattr(registry.store, "download", breaks)
    for wait_s, tries in ((0, 1), (5, 1), (15, 2), (15, 2), (15, 3)):
        now[0] += wait_s
        with pytest.raises(StoreUnavailable, match="the connection broke"):
            registry.fetch(made, cache)
        assert len(tried) == tries
    assert [path.name for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")] == []
    monkeypatch.setattr(registry.store, "download", whole)
    now[0] += 1000
    assert (registry.fetch(made, cache) / "config.json").is_file()


def test_a_damaged_download_is_refused_removed_and_not_repeated_at_once(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry(Store("s3://pool"))
    made = base(registry, tmp_path / "source")
    bucket.objects["versions/m/1/files/config.json"] = b"{ }"
    with pytest.raises(DigestMismatch, match=r"config\.json"):
        registry.fetch(made, tmp_path / "cache")
    with pytest.raises(StoreUnavailable, match="tried again in"):
        registry.fetch(made, tmp_path / "cache")


def test_processes_that_fetch_at_once_download_once(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry(Store("s3://pool"))
    made = base(registry, tmp_path / "source")
    threads = [threading.Thread(target=lambda: Files(registry.store).fetch(made, tmp_path / "cache")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.reads["versions/m/1/files/model.safetensors"] == 1


def test_threads_that_hold_a_version_at_once_leave_no_lock(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that found none took a lock of its own, and all but one stayed: the cache never gave the version up."""
    registry, locked = Registry(Store("s3://pool")), module.lock
    made, cache = base(registry, tmp_path / "source"), tmp_path / "cache"
    files, together = Files(registry.store), threading.Barrier(8)

    def slow(folder: Path) -> int:
        time.sleep(0.05)
        return locked(folder)

    def fetch() -> None:
        together.wait()
        files.fetch(made, cache)

    monkeypatch.setattr(module, "lock", slow)
    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in threads:
        files.release(made)
    with (cache / made.digest / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_carried_weights_stay_within_the_caches_limit(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came through Ray's object store made no room: the cache grew with every version that was published."""
    registry, cache = Registry(Store("s3://pool")), tmp_path / "cache"
    old, *new = (base(registry, tmp_path / f"{n}", n) for n in range(3))
    files = Files(registry.store, limit_bytes=2_000_000)  # room for two
    files.fetch(old, cache)
    files.release(old)
    carried = {
        made.digest: {file.path: (tmp_path / f"{n}" / file.path).read_bytes() for file in made.files}
        for n, made in enumerate(new, 1)
    }
    monkeypatch.setattr(weight_distribution.ray, "get", lambda reference: reference)
    weight_distribution.unpack(carried, cache, files.limit_bytes)
    assert kept(cache) == {made.digest for made in new}
    bucket.reads.clear()
    assert all(files.fetch(made, cache).is_dir() for made in new)
    assert not bucket.reads, "nothing was asked of the store"
