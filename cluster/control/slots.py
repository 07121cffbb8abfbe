"""Slots of the running pool: the units of accelerator that serving and training share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from collections.abc import Iterable
from typing import Literal, NamedTuple

import ray

from cluster import memory
from cluster.config import FleetSpec
from cluster.control.applications import Application


def slots(accelerator: str) -> dict[str, float]:
    """``{"total", "free"}``. ``accelerator``: `pool.accelerator`."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = resource(accelerator)
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}


def device_bytes(accelerator: Literal["slot", "gpu"]) -> int | None:
    """The memory of one device of a slot. None where slots are on other machines than this one, whose devices may be others."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    here = len(alive) == 1 and resource(accelerator) in alive[0]["Resources"]
    return memory.device_bytes(accelerator) if here else None


def resource(accelerator: str) -> str:
    """What a slot is to Ray."""
    return "GPU" if accelerator == "gpu" else "slot"


class ServingFleet(NamedTuple):
    """A fleet whose slots are counted."""

    spec: FleetSpec
    apps: tuple[str, ...]
    """The Serve applications that it consists of."""
    floor: int = 0
    """The replicas that its adapters need; see `cluster.types.ReplicaBounds`."""


class Served(NamedTuple):
    """Replicas, counted in slots."""

    running: int = 0
    ending: int = 0
    """Serve lists a replica until it has heard of its end, and one that ends before it had a slot as well."""
    wanted: int = 0
    """Of those that run or should."""

    def held(self, used: int, by_jobs: int) -> int:
        """The slots that replicas hold, given those that Ray says are ``used`` and those that jobs hold: one that starts may have its place,
        or wait for it.

        >>> Served(running=1, ending=2, wanted=1).held(used=3, by_jobs=1)
        2
        """
        uncertain = self.ending + max(0, self.wanted - self.running)
        return self.running + min(uncertain, max(0, used - by_jobs - self.running))


def served(app: Application | None, slots_per_replica: int) -> Served:
    """What an application holds, and what it will once every replica that it wants has its place.

    >>> served(Application("RUNNING", running=2, starting=1), slots_per_replica=2)
    Served(running=4, ending=0, wanted=6)
    """
    if app is None:
        return Served()
    return Served(
        app.running * slots_per_replica, app.ending * slots_per_replica, (app.running + app.starting) * slots_per_replica
    )


def together(parts: Iterable[Served]) -> Served:
    """Of several applications.

    >>> together([Served(1, 0, 2), Served(2, 1, 2)])
    Served(running=3, ending=1, wanted=4)
    """
    return Served(*map(sum, zip(Served(), *parts, strict=True)))
