"""Slots of the running pool: the units of accelerator that serving and training share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from typing import NamedTuple

import ray
from ray import serve


def slots(accelerator: str) -> dict[str, float]:
    """``{"total", "free"}``. ``accelerator``: `pool.accelerator`."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = resource(accelerator)
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}


def resource(accelerator: str) -> str:
    """What a slot is to Ray."""
    return "GPU" if accelerator == "gpu" else "slot"


class Served(NamedTuple):
    """Replicas, counted in slots."""

    running: int
    ending: int
    """Serve lists one until it has heard of its end, and one that ends before it had a slot as well."""
    wanted: int
    """Of those that run or should."""
    starting: int = 0
    """Replicas, not slots: those that wait for their place, or are being started."""

    def held(self, used: int, by_jobs: int) -> int:
        """The slots that replicas hold, given those that Ray says are ``used`` and those that jobs hold: one that starts may have its place,
        or wait for it.

        >>> Served(running=1, ending=2, wanted=1).held(used=3, by_jobs=1)
        2
        """
        uncertain = self.ending + max(0, self.wanted - self.running)
        return self.running + min(uncertain, max(0, used - by_jobs - self.running))


def served(apps: tuple[str, ...], slots_per_replica: int) -> Served:
    """What Serve's applications hold, and what they will once every replica that it wants has its place."""
    known = serve.status().applications
    deployments = [one for app in apps if app in known for one in known[app].deployments.values()]
    counts = [
        (state.value if hasattr(state, "value") else str(state), n)
        for one in deployments
        for state, n in one.replica_states.items()
    ]
    ending = sum(n for state, n in counts if state == "STOPPING")
    starting = sum(n for state, n in counts if state == "STARTING")
    running = sum(n for _, n in counts) - ending - starting
    return Served(running * slots_per_replica, ending * slots_per_replica, (running + starting) * slots_per_replica, starting)
