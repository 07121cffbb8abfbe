"""Which replicas hold which adapters. Pure.

An engine has `max_cpu_loras` places for adapters. While one engine has places for all live adapters of its fleet, every replica holds all of
them, so any replica answers any request. Beyond that the fleet's places are divided: each adapter gets as many replicas as the places allow.

An assignment is sticky. A replica keeps what it holds, and a replica that comes or goes moves few adapters. An assignment is also a floor:
an engine keeps other adapters in the places that are left, and unloads them when it needs the places.
"""

import heapq
from collections.abc import Sequence
from itertools import chain
from math import ceil
from typing import NamedTuple

from cluster.types import ReplicaState


class AdapterPlacement(NamedTuple):
    """Who must hold what."""

    assigned: dict[str, tuple[str, ...]]
    """Replica id → ids of the adapters that it must hold."""
    copies: dict[str, int]
    """Adapter's id → how many replicas must hold it; only of adapters that not every replica holds. 0: there is no place for it."""
    replicas_needed: int = 0
    """The fewest replicas that have a place for every adapter."""
    unplaced: tuple[str, ...] = ()
    """The live adapters without a place, sorted."""

    def asked(self, replica: ReplicaState, id: str) -> bool:
        """Whether the replica must hold the adapter."""
        return id not in self.copies or id in self.assigned.get(replica.id, ())


NOTHING = AdapterPlacement({}, {})


class WantedAdapters(NamedTuple):
    """Ids of the adapters of one fleet on the same weights."""

    live: tuple[str, ...] = ()
    """What clients may get."""
    coming: tuple[str, ...] = ()
    """Of rollouts under way. Those that are live already are not in here."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.live, *self.coming)

    def replicas_for(self, id: str, places: int) -> int:
        """The fewest replicas that have a place for this adapter beside those that go before it."""
        before = self.all.index(id) if id in self.all else len(self.all)
        return ceil((before + 1) / places)


def assign(adapters: WantedAdapters, replicas: Sequence[ReplicaState], places: int) -> AdapterPlacement:
    """Divide the places of ``replicas``, which host the same weights, among ``adapters``; ``places``: adapters per replica.

    Where there are too few places, live adapters go before those of rollouts, and of the live ones those go first that a replica holds.

    Example: two replicas with 2 places each, three adapters. Four places are enough for one copy of each adapter. Replica r holds a and b,
    replica s holds nothing: r keeps a and b, and s loads c. A fifth adapter finds no place, and its ``copies`` are 0; it needs a third
    replica. Now r is lost: s keeps c and loads one of the others, and two have no place until r is back.
    """
    every = adapters.all
    needed, room = ceil(len(every) / places), len(replicas) * places
    if not replicas or needed <= 1:
        return AdapterPlacement({one.id: every for one in replicas}, {}, needed)
    counts = dict.fromkeys(every if len(every) <= room else _first(adapters, replicas, room), 0)
    copies = max(1, room // len(every))
    assigned = {one.id: [id for id in one.held if id in counts][:places] for one in replicas}
    for id in chain.from_iterable(assigned.values()):
        counts[id] += 1
    if sum(copies - count for count in counts.values() if count < copies) > room - sum(map(len, assigned.values())):
        _drop(assigned, counts, copies)
    _fill(assigned, counts, copies, places)
    unplaced = tuple(sorted(id for id in adapters.live if id not in counts)) if len(every) > room else ()
    return AdapterPlacement(
        {replica: tuple(ids) for replica, ids in assigned.items()},
        counts if len(every) <= room else {id: counts.get(id, 0) for id in every},
        needed,
        unplaced,
    )


def _first(adapters: WantedAdapters, replicas: Sequence[ReplicaState], room: int) -> Sequence[str]:
    """The adapters that get the ``room`` places."""
    held = {id for replica in replicas for id in replica.held}
    return [*sorted(adapters.live, key=lambda id: id not in held), *adapters.coming][:room]


def _drop(assigned: dict[str, list[str]], counts: dict[str, int], copies: int) -> None:
    """Take the copies beyond ``copies`` from the replicas that hold the most: other adapters lack some, and there is no room."""
    over = {id for id, count in counts.items() if count > copies}
    for replica in sorted(assigned, key=lambda one: (-len(assigned[one]), one)) if over else ():
        for id in over.intersection(assigned[replica]):
            assigned[replica].remove(id)
            counts[id] -= 1
            if counts[id] == copies:
                over.remove(id)


def _fill(assigned: dict[str, list[str]], counts: dict[str, int], copies: int, places: int) -> None:
    """Give adapters the copies that they lack, those with the fewest first, on the replicas with the most room."""
    room = [(len(ids), replica) for replica, ids in assigned.items() if len(ids) < places]
    heapq.heapify(room)
    for id in sorted((id for id, count in counts.items() if count < copies), key=counts.__getitem__):
        passed: list[tuple[int, str]] = []
        while counts[id] < copies and room:
            count, replica = heapq.heappop(room)
            if id in assigned[replica]:
                passed.append((count, replica))
                continue
            assigned[replica].append(id)
            counts[id] += 1
            if count + 1 < places:
                passed.append((count + 1, replica))
        for entry in passed:
            heapq.heappush(room, entry)


def combine(groups: Sequence[AdapterPlacement]) -> AdapterPlacement:
    """The placements of several groups of replicas as one.

    Example: the fleet has two replicas and one copy of a. Its surge has one replica, which holds all: a has 2 copies.
    """
    if len(groups) == 1:
        return groups[0]
    counted = [one.copies or dict.fromkeys(next(iter(one.assigned.values()), ()), len(one.assigned)) for one in groups]
    copies = {id: sum(some.get(id, 0) for some in counted) for one in groups for id in one.copies}
    return AdapterPlacement(
        {id: ids for one in groups for id, ids in one.assigned.items()},
        copies,
        max((one.replicas_needed for one in groups), default=0),
        tuple(sorted({id for one in groups for id in one.unplaced if not copies[id]})),
    )
