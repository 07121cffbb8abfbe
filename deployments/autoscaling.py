"""How many replicas the load wants. Serve's controller unpickles this module alone, so it imports the standard library only."""

import math
from typing import Any


class LoadPolicy:
    """Replicas so that each has at most ``target_running`` requests in flight, from what the replicas themselves count.

    Serve sees no requests, because they go from the gateway to the replica's own port.
    """

    def __init__(self, target_running: int = 32) -> None:
        self.target_running = target_running

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``AutoscalingContext`` → (replicas wanted, state to keep: none)."""
        running = sum(context.aggregated_metrics.get("running", {}).values())
        wanted = max(1, math.ceil(running / self.target_running))
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, low), high), {}
