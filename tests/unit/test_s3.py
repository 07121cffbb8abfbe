"""The registry over S3's protocol: the same promises as on a disk."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from cluster.control.loop import CALL_TIMEOUT_S
from cluster.errors import Conflict, StoreUnavailable
from cluster.store.connection import DOCUMENTS, Limits
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage
from tests.s3 import Bucket, serving, tag

PAUSE_S = 0.1


@contextmanager
def found(bucket: Bucket) -> Iterator[Bucket]:
    with serving(bucket) as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield bucket


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with found(Bucket()) as bucket:
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


class Silent(Bucket):
    """Takes every question, and answers none."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError


class Slow(Bucket):
    """Sends an object in twenty pieces, and pauses before each."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = self.objects[request.match_info["key"]]
        headers = {"ETag": tag(body), "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT", "Content-Length": str(len(body))}
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        size = len(body) // 20
        for start in range(0, len(body), size):
            await asyncio.sleep(PAUSE_S)
            await answer.write(body[start : start + size])
        return answer


def test_control_may_be_waited_for_longer_than_a_bucket_that_hangs() -> None:
    """It took three minutes: whoever asked control something heard that control was busy, and never why."""
    assert DOCUMENTS.silent_s + DOCUMENTS.retry_s < CALL_TIMEOUT_S


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.get("a"),
        lambda store: store.size("a"),
        lambda store: store.children("a"),
        lambda store: store.put_own("a", b""),
        lambda store: store.read_range("a", 0, 8),
    ],
)
def test_a_bucket_that_hangs_is_given_up(ask: Callable[[Store], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.store.objects.DOCUMENTS", Limits(silent_s=0.2, retry_s=0.3))
    with found(Silent()):
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            ask(Store("s3://models/pool"))
        assert time.monotonic() - began_s < 10


def test_what_is_large_may_take_longer_than_a_bucket_may_be_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """obstore's own limits, thirty seconds for a whole request and three minutes of attempts, end the download of a large model."""
    for limits in ("DOCUMENTS", "FILES"):
        monkeypatch.setattr(f"cluster.store.objects.{limits}", Limits(silent_s=1, retry_s=1))
    body = os.urandom(200_000)
    with found(Slow()) as bucket:
        bucket.store("pool/weights", body)
        store, began_s = Store("s3://models/pool"), time.monotonic()
        store.download("weights", tmp_path / "weights")
        assert time.monotonic() - began_s > 1
    assert (tmp_path / "weights").read_bytes() == body
