"""What is left of fleets that are no more, and what is not: see `cluster.control.leftovers`."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from cluster.control.applications import Applications, surge_app
from cluster.control.engines import EngineName
from cluster.control.leftovers import Facts, Found, Leftovers, leftovers
from cluster.errors import PoolUnavailable
from cluster.pool.graph import fleet_app
from cluster.types import VersionId

FLEETS: tuple[str, ...] = ("a", "b", "c")
SURGE = "surge-x@m-2"
SLEEPER = "node x kind devices serial"


def facts(*served: str, declared: bool = False, hosted: str = "", draining: str = "", **ended: bool) -> Facts:
    found = Found(frozenset() if declared else frozenset(served), (SLEEPER, "node a kind devices serial", "not one of ours"))
    return Facts(frozenset((*served, "gateway", "fleet-a")), found, frozenset("a" + hosted), frozenset(draining), ended)


@pytest.mark.parametrize(
    ("what", "goes"),
    [
        (facts("fleet-x", SURGE, x=True), Leftovers(("x",), (SURGE,), (SLEEPER,))),
        (facts("fleet-x", SURGE, x=True, declared=True), Leftovers()),
        (facts("fleet-x", SURGE, x=False), Leftovers()),
        (facts("fleet-x", SURGE), Leftovers()),
        (facts("fleet-x", SURGE, hosted="x"), Leftovers()),
        (facts("fleet-x", SURGE, hosted="x", x=True), Leftovers()),
        (facts("fleet-x", SURGE, hosted="x", draining="x", x=True), Leftovers(engines=(SLEEPER,))),
        (facts(SURGE), Leftovers(surges=(SURGE,), engines=(SLEEPER,))),
        (facts(SURGE, x=True), Leftovers(surges=(SURGE,), engines=(SLEEPER,))),
        (facts(SURGE, x=False), Leftovers()),
        (facts(SURGE, hosted="x"), Leftovers()),
        (facts(x=True), Leftovers(engines=(SLEEPER,))),
        (facts("surge-x", "surge-x@m", "surge-x@m-0", "surge-@m-1", "surge-x@-1", x=True), Leftovers(engines=(SLEEPER,))),
    ],
    ids=[
        "killed after its end was written",
        "removed, and declared by now",
        "control has not read its record yet",
        "nothing says that it was removed: a configuration that control has not heard of, or somebody else",
        "declared",
        "declared, and removed before that",
        "drains already, and its reconciler ends its applications",
        "a declared fleet that is no more",
        "only the surge is left",
        "its record cannot be made true",
        "its fleet has no application yet",
        "only engines are left",
        "names that are nearly ours",
    ],
)
def test_what_goes(what: Facts, goes: Leftovers) -> None:
    assert leftovers(what) == goes


def some(of: st.SearchStrategy[Any]) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(of)


@st.composite
def any_facts(draw: st.DrawFn) -> Facts:
    names = st.sampled_from(FLEETS)
    surges = st.builds(surge_app, names, st.just(VersionId("m", 2)))
    served = draw(some(st.one_of(names.map(fleet_app), surges, st.sampled_from(["gateway", "somebody's"]))))
    imperative = draw(some(st.sampled_from(sorted(served)))) if served else frozenset()
    engines = draw(st.lists(st.builds(EngineName, st.just("n"), names, st.just("k"), st.just("d"), st.just("s")).map(str)))
    hosted = draw(some(names))
    draining = draw(some(st.sampled_from(sorted(hosted)))) if hosted else frozenset()
    return Facts(served, Found(imperative, tuple(engines)), hosted, draining, draw(st.dictionaries(names, st.booleans())))


@given(any_facts())
def test_nothing_goes_that_somebody_may_need(known: Facts) -> None:
    gone = leftovers(known)
    for name in gone.fleets:
        assert known.ended[name] and name not in known.hosted and fleet_app(name) in known.found.imperative
    for app in gone.surges:
        name = app.removeprefix("surge-").partition("@")[0]
        assert app in known.applications and name not in known.hosted and known.ended.get(name, True)
        assert fleet_app(name) not in known.applications or name in gone.fleets
    for engine in gone.engines:
        name = engine.split()[1]
        assert known.ended.get(name, True) and name not in known.hosted - known.draining


@given(any_facts())
def test_a_removed_fleet_that_control_started_keeps_nothing(known: Facts) -> None:
    gone = leftovers(known)
    for name in (name for name, ended in known.ended.items() if ended and name not in known.hosted):
        if fleet_app(name) in known.applications - known.found.imperative:
            continue
        assert (name in gone.fleets) == (fleet_app(name) in known.applications)
        assert {app for app in known.applications if app.startswith(f"surge-{name}@")} <= set(gone.surges)
        assert {engine for engine in known.found.engines if engine.split()[1] == name} <= set(gone.engines)


@pytest.mark.parametrize(
    ("source", "deleted"), [("imperative", ["fleet-x"]), (None, ["fleet-x"]), ("declarative", []), (PoolUnavailable("", ""), [])]
)
def test_an_application_that_a_configuration_declares_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, source: str | Exception | None, deleted: list[str]
) -> None:
    """It may have taken a name over whose fleet still drains."""
    gone = list[str]()
    monkeypatch.setattr(serve, "delete", gone.append)

    def answer() -> dict[str, Any]:
        if isinstance(source, Exception):
            raise source
        return {"fleet-x": {"source": source}} if source else {}

    api: Any = SimpleNamespace(applications=answer)
    applications = Applications(lambda: api)
    for app in ("fleet-x", SURGE):
        applications.end(app)
    for thread in (one for one in threading.enumerate() if one.name.startswith("delete-")):
        thread.join(10)
    assert sorted(gone) == [*deleted, SURGE]
