"""Another configuration: it is taken over as a whole, or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, parse
from cluster.control import allocation
from cluster.control.actor import Control
from cluster.control.allocation import Allocation
from cluster.control.hosting import Hosting
from cluster.control.jobs import JobService
from cluster.control.reconcile import Reconcilers
from cluster.errors import ConfigError, StoreUnavailable


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """A control of which only the loop's thread runs, and has nothing to reconcile."""
    for part in (Allocation, JobService, Reconcilers):
        monkeypatch.setattr(part, "start", lambda _: None)
    control = Control(settings(tmp_path, fleets={"m": {"max_replicas": 2}, "n": {}}))
    control.reconcilers.loop.start()
    yield control
    control.reconcilers.loop.stop()


def settings(folder: Path, store: str = "store", **changed: Any) -> dict[str, Any]:
    return parse({"home": str(folder / "home"), "store": (folder / store).as_uri(), **changed}).dump()


def state(control: Control) -> dict[str, Any]:
    """Everything that a configuration decides."""
    hosting, slots, jobs = control.hosting, control.slots, control.job_service
    return {
        "config": [control.config, hosting.config],
        "fleets": {name: (fleet.spec, fleet.declared, fleet.removed) for name, fleet in hosting.fleets.items()},
        "slots": (slots.accelerator, slots.lease.resource, slots.allocator.budget),
        "stores": [one.store.url for one in (control.registry, hosting.desired.registry, jobs.registry, jobs.jobs, jobs.reaper)],
    }


def other(folder: Path) -> dict[str, Any]:
    """One that changes everything."""
    return settings(
        folder,
        "elsewhere",
        fleets={"m": {"max_replicas": 3}, "o": {}, "added": {"max_replicas": 2}},
        pool={"accelerator": "gpu"},
        training={"budget": {"cool_down_s": 7}},
    )


def test_a_valid_configuration_changes_all_that_it_decides(control: Control, tmp_path: Path) -> None:
    control.configure(other(tmp_path))
    now = state(control)
    new = parse(other(tmp_path))
    assert now["config"] == [new, new]
    assert now["fleets"] == {name: (new.spec(name), True, False) for name in ("m", "o", "added")}
    assert now["slots"] == ("gpu", "GPU", new.training.budget) and set(now["stores"]) == {new.store}


@pytest.mark.parametrize(
    "wrong",
    [
        {"fleets": {"m": {"max_replicas": 0}}},
        {"fleets": {"m": {}, "o": {"model": "m"}}},
        {"fleets": {"../m": {}}},
        {"training": {"budget": {"serving_floor_slots": 3, "serving_ceiling_slots": 1}}},
        {"no_such_key": 1},
    ],
)
def test_an_invalid_configuration_changes_nothing(control: Control, tmp_path: Path, wrong: dict[str, Any]) -> None:
    before = state(control)
    with pytest.raises(ConfigError):
        control.configure({**other(tmp_path), **wrong})
    assert state(control) == before


@pytest.mark.parametrize(
    ("part", "method"),
    [
        (Config, "spec"),
        (Hosting, "add"),
        (Hosting, "remove"),
        (allocation, "Lease"),
        (Allocation, "configure"),
        (JobService, "configure"),
    ],
)
def test_a_failure_half_way_leaves_everything_as_before(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any, method: str
) -> None:
    """The part that failed, and those after it, kept the old configuration, and the others had the new one. ``added`` was added at run time,
    and the new configuration declares it."""
    control.hosting.add(control.config.spec_of("added", control.config.fleet_with("added", {})), declared=False)
    before, real, failed = state(control), getattr(part, method), list[str]()

    def fail_once(*arguments: Any, **named: Any) -> Any:
        if not failed:
            failed.append(method)
            raise StoreUnavailable("something broke")
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(part, method, fail_once)
        with pytest.raises(StoreUnavailable, match="something broke"):
            control.configure(other(tmp_path))
    assert failed and state(control) == before
    control.configure(other(tmp_path))
    assert control.hosting.fleets.keys() == {"m", "o", "added"}, "it is taken over once nothing fails"
