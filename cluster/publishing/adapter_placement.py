"""Which replicas hold which adapters. Pure.

An engine has `max_cpu_loras` places for adapters. While one engine has places for all live adapters of its fleet, every replica holds all of
them, so any replica answers any request. Beyond that the fleet's places are divided: each adapter gets as many replicas as the places allow.

An assignment is sticky. A replica keeps what it holds, and a replica that comes or goes moves few adapters. An assignment is also a floor:
an engine keeps other adapters in the places that are left, and unloads them when it needs the places.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from cluster.types import ReplicaState


class AdapterPlacement(NamedTuple):
    """Who must hold what."""

    assigned: dict[str, tuple[str, ...]]
    """Replica id → ids of the adapters that it must hold."""
    copies: dict[str, int]
    """Adapter's id → how many replicas must hold it; only of adapters that not every replica holds. 0: there is no place for it."""

    def asked(self, replica: ReplicaState, id: str) -> bool:
        """Whether the replica must hold the adapter."""
        return id not in self.copies or id in self.assigned.get(replica.id, ())


NOTHING = AdapterPlacement({}, {})


def assign(adapters: Sequence[str], replicas: Sequence[ReplicaState], places: int) -> AdapterPlacement:
    """Divide the places of ``replicas``, which host the same weights, among ``adapters``; ``places``: adapters per replica.

    Example: two replicas with 2 places each, three adapters. Four places are enough for one copy of each adapter. Replica r holds a and b,
    replica s holds nothing: r keeps a and b, and s loads c. A fifth adapter finds no place, and its ``copies`` are 0.
    """
    if not replicas:
        return NOTHING
    if len(adapters) <= places:
        return AdapterPlacement({one.id: tuple(adapters) for one in replicas}, {})
    copies = max(1, len(replicas) * places // len(adapters))
    holders = _kept(adapters, replicas, copies, places)
    _fill(holders, replicas, copies, places)
    assigned: dict[str, list[str]] = {one.id: [] for one in replicas}
    for id, some in holders.items():
        for replica in some:
            assigned[replica].append(id)
    return AdapterPlacement({id: tuple(ids) for id, ids in assigned.items()}, {id: len(some) for id, some in holders.items()})


def _kept(adapters: Sequence[str], replicas: Sequence[ReplicaState], copies: int, places: int) -> dict[str, list[str]]:
    """Adapter → the replicas that hold it already and keep it: of several the ones that keep the fewest."""
    there: dict[str, list[str]] = {id: [] for id in adapters}
    for replica in replicas:
        for id in replica.held:
            if id in there:
                there[id].append(replica.id)
    kept = dict.fromkeys((one.id for one in replicas), 0)
    for id, some in there.items():
        chosen = sorted((one for one in some if kept[one] < places), key=lambda one: (kept[one], one))[:copies]
        there[id] = chosen
        for one in chosen:
            kept[one] += 1
    return there


def _fill(holders: dict[str, list[str]], replicas: Sequence[ReplicaState], copies: int, places: int) -> None:
    """Give every adapter its copies, those with the fewest first, on the replicas with the most room."""
    used = dict.fromkeys((one.id for one in replicas), 0)
    for some in holders.values():
        for replica in some:
            used[replica] += 1
    room = [(count, id) for id, count in used.items() if count < places]
    heapq.heapify(room)
    for some in sorted(holders.values(), key=len):
        passed: list[tuple[int, str]] = []
        while len(some) < copies and room:
            count, replica = heapq.heappop(room)
            if replica in some:
                passed.append((count, replica))
                continue
            some.append(replica)
            if count + 1 < places:
                passed.append((count + 1, replica))
        for entry in passed:
            heapq.heappush(room, entry)
