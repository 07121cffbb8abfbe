"""Slots of the running pool: the units of accelerator that serving and training share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from typing import NamedTuple

import ray
from ray import serve


def slots() -> dict[str, float]:
    """``{"total", "free"}``. GPUs where there are any, else the logical resource."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = "GPU" if total.get("GPU") else "slot"
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}


class Served(NamedTuple):
    """Replicas, counted in slots."""

    held: int
    """Of those that run or end."""
    wanted: int
    """Of those that run or should."""
    starting: int = 0
    """Replicas, not slots: those that wait for their place, or are being started."""


def served(apps: tuple[str, ...], slots_per_replica: int) -> Served:
    """What Serve's applications hold, and what they will once every replica that it wants has its place."""
    known = serve.status().applications
    deployments = [one for app in apps if app in known for one in known[app].deployments.values()]
    counts = [
        (state.value if hasattr(state, "value") else str(state), n)
        for one in deployments
        for state, n in one.replica_states.items()
    ]
    held = sum(n for state, n in counts if state != "STARTING")
    wanted = sum(n for state, n in counts if state != "STOPPING")
    starting = sum(n for state, n in counts if state == "STARTING")
    return Served(held * slots_per_replica, wanted * slots_per_replica, starting)
