"""What `springtide up` does at once and in which order, without a pool, and what it stops where it fails."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import machine
from cluster.cli import demo
from cluster.config import Config, parse
from cluster.pool import local


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Ray that is up when it is told to be. ``others``: another command has started it meanwhile."""
    found = SimpleNamespace(come_up=threading.Event(), asked=threading.Event(), ended=[], others=False)

    def up(_: Config, began: Callable[[Any], None]) -> str:
        if not found.others:
            began("ours")
        found.asked.set()
        assert found.come_up.wait(10)
        return "up"

    def stop(_: Config, pool: Any) -> None:
        found.ended.append((pool, found.come_up.is_set()))
        found.come_up.set()

    monkeypatch.setattr(demo.local, "up", up)
    monkeypatch.setattr(demo.local, "stop", stop)
    return found


def within(begins: Callable[[Any], None]) -> None:
    with demo._ray(Config(), []) as begin:
        begins(begin)


def test_ray_starts_beside_what_else_there_is_to_do(ray: Any) -> None:
    with demo._ray(Config(), []) as begin:
        assert not ray.asked.is_set(), "nothing starts before the model is found and fits"
        started = begin()
        assert ray.asked.wait(10) and not started.done()
        ray.come_up.set()
        assert begin().result() == "up" and begin() is started
    assert ray.ended == []


def test_a_model_that_is_refused_meanwhile_leaves_no_ray(ray: Any) -> None:
    def refused(begin: Any) -> None:
        begin()
        assert ray.asked.wait(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(refused)
    assert ray.ended == [("ours", False), ("ours", True)], "at once, and again when the thread has ended: it may just have begun"


def test_a_start_that_fails_leaves_the_pool_of_another_command(ray: Any) -> None:
    ray.others = True

    def interrupted(begin: Any) -> None:
        begin()
        assert ray.asked.wait(10)
        ray.come_up.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(interrupted)
    assert ray.ended == []


def test_a_model_that_is_refused_before_starts_none(ray: Any) -> None:
    def refused(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(refused)
    assert not ray.asked.is_set() and ray.ended == []


@pytest.fixture
def two() -> Iterator[list[local.Pool]]:
    """Two pools as their files have them, each a process that does nothing."""
    line = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(line) for _ in range(2)]
    yield [local.Pool(one.pid, 0.0, "", "", "http://gateway", "", machine.start_ticks(one.pid)) for one in processes]
    for one in processes:
        one.kill()
        one.wait()


def test_of_two_pools_of_one_home_the_one_that_is_named_is_stopped(tmp_path: Path, two: list[local.Pool]) -> None:
    """Both began at the same time, and the file names the one that wrote it last."""
    config, (ours, others) = parse({**Config().dump(), "home": str(tmp_path), "store": tmp_path.as_uri()}), two
    file = config.home / "pool.json"
    local.write_json(file, asdict(others))
    local.stop(config, ours)
    assert not ours.alive and others.alive and json.loads(file.read_text())["pid"] == others.pid
    local.stop(config, ours)  # again: it has ended
    assert others.alive
    local.stop(config, others)
    assert not others.alive and not file.exists()
