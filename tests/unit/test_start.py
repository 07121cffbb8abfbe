"""What `springtide up` does at once and in which order, without a pool."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import demo
from cluster.config import Config


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Ray that is up when it is told to be."""
    found = SimpleNamespace(come_up=threading.Event(), asked=threading.Event(), ended=[])

    def up(_: Config) -> str:
        found.asked.set()
        assert found.come_up.wait(10)
        return "up"

    def down(_: Config) -> None:
        found.ended.append(found.come_up.is_set())
        found.come_up.set()

    monkeypatch.setattr(demo.local, "up", up)
    monkeypatch.setattr(demo.local, "down", down)
    return found


def within(begins: Callable[[Any], None]) -> None:
    with demo._ray(Config()) as begin:
        begins(begin)


def test_ray_starts_beside_what_else_there_is_to_do(ray: Any) -> None:
    with demo._ray(Config()) as begin:
        assert not ray.asked.is_set(), "nothing starts before the model is found and fits"
        started = begin()
        assert ray.asked.wait(10) and not started.done()
        ray.come_up.set()
        assert begin().result() == "up" and begin() is started
    assert ray.ended == []


def test_a_model_that_is_refused_meanwhile_leaves_no_ray(ray: Any) -> None:
    def refused(begin: Any) -> None:
        begin()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(refused)
    assert ray.ended == [False, True], "at once, and again when the thread has ended: it may just have begun"


def test_a_model_that_is_refused_before_starts_none(ray: Any) -> None:
    def refused(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(refused)
    assert not ray.asked.is_set() and ray.ended == []
