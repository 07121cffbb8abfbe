"""How many replicas the load wants. Serve's controller unpickles this module alone, so it imports the standard library only.

Serve sees no requests, because they go from the gateway to the replica's own port. It need not: how many there are says little where one
asks for a word and another for a page. What the engines themselves say decides: requests that run and wait, the KV cache, the time to the
first token (`deployments.replica.load`). Serve adds its bounds and delays, and the way from none to one (`ray.serve.autoscaling_policy`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Load(NamedTuple):
    """One engine's, over the last seconds."""

    running: float = 0.0
    waiting: float = 0.0
    kv_use: float = 0.0
    """The share of the KV cache that is taken, 0 to 1."""
    ttft_s: float = 0.0
    """The time to the first token that nine requests in ten stayed below; 0 where there were none."""


class Target(NamedTuple):
    running: float = 32
    """Requests per replica, those that wait included."""
    kv_use: float = 0.8
    ttft_s: float = 1.0


CALM = 0.5
"""A replica is given back only where the first token came within this share of its target."""


def replicas_for(loads: Sequence[Load], target: Target) -> int:
    """The least with which every target would be met; one more than there are where the first token comes too late while requests wait: late
    with none that waits, it is late because the request is large, and another replica would not help.

    >>> replicas_for([Load(running=32, waiting=20, kv_use=0.3)], Target())
    2
    >>> replicas_for([Load(running=2, waiting=3, ttft_s=1.4)], Target())
    2
    >>> replicas_for([Load(running=1), Load(running=2, ttft_s=0.7)], Target())
    2
    """
    count = len(loads)
    requests = sum(load.running + load.waiting for load in loads) / target.running
    cache = sum(load.kv_use for load in loads) / target.kv_use
    wanted = math.ceil(max(requests, cache))
    slowest_s = max((load.ttft_s for load in loads), default=0.0)
    if slowest_s > target.ttft_s and any(load.waiting for load in loads):
        return max(wanted, count + 1)
    if slowest_s > CALM * target.ttft_s:
        return max(wanted, count)
    return wanted


class LoadPolicy:
    """Serve's class-based policy."""

    def __init__(self, kv_use: float, ttft_s: float) -> None:
        self.target = Target(kv_use=kv_use, ttft_s=ttft_s)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``AutoscalingContext`` → (replicas wanted, state to keep: none)."""
        metrics: dict[str, dict[Any, float]] = context.aggregated_metrics or {}
        replicas = dict.fromkeys(replica for values in metrics.values() for replica in values)
        loads = [Load(*(metrics.get(name, {}).get(replica, 0.0) for name in Load._fields)) for replica in replicas]
        wanted = replicas_for(loads, self.target._replace(running=context.config.target_ongoing_requests))
        silent = context.current_num_replicas - len(loads)  # too busy to say how busy it is, or just started
        if silent > 0:
            return bounded(max(wanted, context.target_num_replicas), metrics), {}
        only_one_on_its_way = context.current_num_replicas == 0 and context.target_num_replicas > 0
        return bounded(max(wanted, only_one_on_its_way), metrics), {}


def bounded(wanted: int, metrics: Mapping[str, Mapping[Any, float]]) -> int:
    """Within the fleet's bounds, which its replicas repeat with their load (`cluster.types.ReplicaBounds`). Serve then ends replicas after
    the fleet's ``scale_down_after_s``, as for any other reason.

    A fleet with a floor does not sleep: Serve would go from three replicas to one first, and for minutes some adapters would have none. Their
    requests could not say so, because they reach no engine.

    >>> bounded(3, {"ceiling": {"a": 2.0, "b": 2.0}}), bounded(3, {})
    (2, 3)
    >>> bounded(0, {"floor": {"a": 2.0, "b": 0.0}})
    2
    """
    floor = max(metrics.get("floor", {}).values(), default=0.0)
    ceiling = min(metrics.get("ceiling", {}).values(), default=math.inf)
    return int(min(max(wanted, floor), ceiling))
