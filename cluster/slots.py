"""Slots of the running pool: the units of accelerator that serving and training share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import ray


def slots() -> dict[str, float]:
    """``{"total", "free"}``. GPUs where there are any, else the logical resource."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = "GPU" if total.get("GPU") else "slot"
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}
