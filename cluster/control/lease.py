"""The lease: the slots that Ray Train must leave to serving and that Ray's autoscaler must have machines for.

Control holds it in serving's name and renews it. It is the arbiter's lease plus what jobs hold or need (`Allocator.requested`), so the
autoscaler adds a machine for a job that has no room, and for nothing else. `cluster.control.ray_autoscaling` says how Ray deals with it.

Two things are decided here:

- **where.** Slots in use are requested on nodes that are not idle, so that the autoscaler does not keep an idle machine for them. Example:
  node ``a`` is idle, node ``b`` runs a replica; the lease is 1. Without a selector the autoscaler could put it on ``a`` and keep both.
- **how many.** A request that is refused as a whole adds no machine for anybody. `cluster.capacity.ceiling` learns the largest that is not.
"""

import time
from collections.abc import Mapping

from cluster.capacity.ceiling import Ceiling
from cluster.control import ray_autoscaling

RENEW_S = 15
LISTEN_S = 5
"""How often to look whether the request was refused. The autoscaler decides as often, unless told otherwise."""
REFUSED_S = 300
"""After so long a refused request is tried again: somebody may have allowed more machines. Until the answer, nobody gets a machine."""
NODE = "ray.io/node-id"
"""A label that Ray gives every node."""
IDLE_NODES = 64
"""How many idle nodes a selector names; the next ones when these are gone. The autoscaler compares every slot with every node."""


class Lease:
    """Whoever holds it renews it."""

    def __init__(self, resource: str) -> None:
        """``resource``: what a slot is to Ray, ``slot`` or ``GPU``."""
        self.resource = resource
        self.selectors: list[dict[str, str]] | None = None
        """What is requested: a label selector for each slot."""
        self.renewed_s = self.heard_s = self.refused_s = float("-inf")
        self.known = Ceiling()
        self.grows = False
        """Whether an autoscaler has answered. Without one no request is ever refused, and no machine ever comes."""
        self.allowed: int | None = None
        """The ceiling when ``selectors`` were requested."""
        self.since: int | None = None
        """The first version of the cluster's state that was seen with as many slots requested as now. An answer about an older version is
        an answer to an older request."""

    def ceiling(self, total: int) -> int | None:
        """The most slots to request, for a pool that has ``total`` now. None if nothing was refused."""
        now_s = time.monotonic()
        self.known = self.known.has(total)
        if now_s - self.heard_s >= LISTEN_S:  # while nothing is requested too: whether there is an autoscaler is worth knowing
            self.heard_s = now_s
            self._listen(len(self.selectors or ()), total, now_s)
        return self.known.slots(retry=now_s - self.refused_s >= REFUSED_S)

    def _listen(self, asked: int, total: int, now_s: float) -> None:
        status = ray_autoscaling.status()
        if status is None:
            return  # what is known still holds, and a turn of the allocator must not be missed for want of news
        version = ray_autoscaling.version(status)
        self.since = version if self.since is None else min(self.since, version)  # lower than before: Ray was restarted
        refused = ray_autoscaling.refused(status, self.resource, asked, self.since)
        self.grows = self.grows or refused is not None
        if refused:
            self.known, self.refused_s = self.known.refused(asked, total), now_s
        elif refused is not None:
            self.known = self.known.granted(asked, self.allowed)

    def hold(self, slots: int, ceiling: int | None, in_use: Mapping[str, int]) -> None:
        """Request so many slots; ``ceiling`` was the most allowed. ``in_use``: node → its slots that somebody uses. Cheap if nothing changed.
        Raises what Ray raises if it does not answer."""
        now_s = time.monotonic()
        selectors = selectors_for(slots, in_use)
        if selectors == self.selectors and now_s - self.renewed_s < RENEW_S:
            self.allowed = ceiling
            return
        ray_autoscaling.request(self.resource, selectors)
        if len(selectors) != len(self.selectors or []):
            self.since = None
        self.selectors, self.allowed, self.renewed_s = selectors, ceiling, now_s


def selectors_for(slots: int, used: Mapping[str, int]) -> list[dict[str, str]]:
    """A label selector for each slot. Those in use must not be on an idle node; those that are not in use yet may be anywhere.

    >>> selectors_for(3, {"a": 0, "b": 2})
    [{'ray.io/node-id': '!in(a)'}, {'ray.io/node-id': '!in(a)'}, {}]
    """
    idle = sorted(node for node, slots_in_use in used.items() if not slots_in_use)[:IDLE_NODES]
    elsewhere = {NODE: f"!in({','.join(idle)})"} if idle else {}
    in_use = min(slots, sum(used.values()))
    return [*(elsewhere for _ in range(in_use)), *({} for _ in range(slots - in_use))]
