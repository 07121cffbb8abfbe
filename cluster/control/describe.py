"""Control's state as plain documents, for `springtide status` and for whoever else watches. Pure."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from cluster.control.aliases import Progress
from cluster.control.applications import Application
from cluster.control.cold_starts import FailedStart
from cluster.control.hosting import Fleet
from cluster.control.work_queue import Failure, Key
from cluster.publishing import rollout
from cluster.publishing.canary import Tally
from cluster.publishing.rollout import Facts
from cluster.types import FleetPhase, ReplicaState

SHOWN = 3
"""Adapters that a fleet's words name."""


def public(replica: ReplicaState) -> dict[str, Any]:
    """Its bounds are its fleet's, and stand there."""
    return {key: value for key, value in replica._asdict().items() if key not in ("secret", "bounds")}


def rollout_of(progress: Progress, now_s: float) -> dict[str, Any]:
    """A rollout's record, with what is `seen` of it."""
    return {**progress.rollout.model_dump(mode="json"), **seen(progress, now_s)}


def seen(progress: Progress, now_s: float) -> dict[str, Any]:
    """``{"waiting_for", "canary", "stable"}``: what a rollout waits for, and how canary and stable compare so far, where they do."""
    facts = progress.facts or Facts()
    compared = facts.comparison._asdict().items() if facts.comparison else ()
    waiting = rollout.waiting_for(progress.rollout, facts, now_s)
    return {"waiting_for": waiting, **{side: summary(tally) for side, tally in compared}}


def summary(tally: Tally) -> dict[str, Any]:
    """A tally in few words."""
    return {
        "requests": tally.requests,
        "errors": tally.errors,
        "ttft_p50_ms": round(median(tally.ttft_s) * 1000, 1) if tally.ttft_s else None,
        "itl_p50_ms": round(median(tally.itl_s) * 1000, 2) if tally.itl_s else None,
        "finish": tally.finish,
        "shadowed": tally.shadowed,
        "disagreed": tally.disagreed,
        "shadows_failed": tally.shadows_failed,
    }


def troubles(failures: Mapping[Key, Failure], now_s: float) -> list[dict[str, Any]]:
    """What control could not reconcile the last time it tried, and when it tries again."""
    return [
        {
            "kind": kind,
            "name": name,
            "error": one.words,
            "times": one.times,
            "retry_in_s": round(max(0.0, one.retry_s - now_s), 1),
        }
        for (kind, name), one in list(failures.items())
    ]


def fleet(
    fleet: Fleet, replicas: Sequence[ReplicaState], known: Mapping[str, Application], failure: FailedStart | None = None
) -> dict[str, Any]:
    """One fleet: ``{"name", "model", "phase", "words", "replicas", "min_replicas", …}``. ``failure``: of its last start."""
    own = [one for one in replicas if one.app == fleet.app]
    return _described(fleet, own, phase(fleet.removed, len(own), known.get(fleet.app), failure))


def surge(fleet: Fleet, replicas: Sequence[ReplicaState], known: Mapping[str, Application]) -> dict[str, Any] | None:
    """The surge of a fleet as one more fleet, with the same keys; None while it has none."""
    if fleet.surge is None:
        return None
    own, app = [one for one in replicas if one.app == fleet.surge_app], known.get(fleet.surge_app)
    there = phase(app is not None and app.status == "DELETING", len(own), app)
    return {
        **_described(fleet, own, there),
        "name": fleet.surge_app,
        "model": str(fleet.surge),
        "declared": False,
        "words": there[1] or f"answers while {fleet.name} takes {fleet.surge} over",
        "min_replicas": fleet.surge_size,
        "max_replicas": fleet.surge_size,
        "floor": 0,
        "ceiling": None,
        "surge": None,
    }


def _described(fleet: Fleet, own: Sequence[ReplicaState], there: tuple[FleetPhase, str]) -> dict[str, Any]:
    settings = fleet.spec.fleet
    return {
        "name": fleet.name,
        "model": fleet.model,
        "task": settings.task,
        "declared": fleet.declared,
        "phase": str(there[0]),
        "words": there[1] or without_place(fleet.placement.unplaced),
        "replicas": len(own),
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "floor": fleet.bounds.floor,
        "ceiling": fleet.bounds.ceiling,
        "priority": settings.priority,
        "slots": len(own) * settings.tensor_parallel_size,
        "slots_per_replica": settings.tensor_parallel_size,
        "weights": sorted({one.base for one in own}),
        "surge": str(fleet.surge) if fleet.surge else None,
    }


def failed_fleet(failure: tuple[str, str]) -> dict[str, Any]:
    """A fleet of the store whose record cannot be made true, and why."""
    name, words = failure
    return {"name": name, "model": None, "declared": False, "phase": str(FleetPhase.FAILED), "words": words, "replicas": 0}


def without_place(adapters: Sequence[str]) -> str:
    """Which live adapters no replica answers for, because all places are taken; for a person.

    >>> without_place(["a@1"]), without_place([f"a@{n}" for n in range(1, 6)])
    ('no place for a@1', 'no place for a@1, a@2, a@3 and 2 more')
    """
    more = f" and {len(adapters) - SHOWN} more" if len(adapters) > SHOWN else ""
    return f"no place for {', '.join(adapters[:SHOWN])}{more}" if adapters else ""


def phase(removed: bool, replicas: int, app: Application | None, failure: FailedStart | None = None) -> tuple[FleetPhase, str]:
    """Where a fleet is in its life, and why, for a person. ``failure``: of its last start.

    >>> phase(False, 0, Application("RUNNING"))
    (<FleetPhase.ASLEEP: 'asleep'>, 'no replica runs; a request wakes one')
    """
    if removed:
        return FleetPhase.DRAINING, "its replicas finish their streams and end"
    if replicas:
        return FleetPhase.SERVING, f"the next replica did not start: {failure.words}" if failure else ""
    if app is None:
        return FleetPhase.STARTING, "Serve does not have its application yet"
    if app.failed or (failure and failure.final):
        return FleetPhase.FAILED, failure.words if failure else app.failed
    if app.running or app.starting or app.status == "DEPLOYING":  # one that runs has not reported yet
        again = f"; the last one did not start: {failure.words}" if failure else ""
        return FleetPhase.STARTING, f"its replicas start, or wait for a slot{again}"
    return FleetPhase.ASLEEP, "no replica runs; a request wakes one"
