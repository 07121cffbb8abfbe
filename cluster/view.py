"""View deltas: what changed from one view to the next. A gateway that knows the old view needs only the delta. Pure.

A view grows with the pool, to the replicas of a thousand machines and ten thousands of adapters. A delta stays small.
"""

from typing import Any, NamedTuple

from cluster.types import FleetState, Generation, ReplicaState, View


class ViewDelta(NamedTuple):
    """From the view of revision ``since`` to that of ``revision``."""

    since: int
    revision: int
    moves: dict[str, Generation]
    """Aliases that are new or have moved."""
    ended: frozenset[str]
    """Aliases that are no more."""
    replicas: tuple[ReplicaState, ...]
    """Those that came, or hold something else."""
    left: frozenset[str]
    """Ids of replicas that are no more."""
    fleets: tuple[FleetState, ...] = ()
    """Fleets that came or changed."""
    removed: frozenset[str] = frozenset()
    """Names of fleets that are no more."""
    alias_fleets: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    """Aliases that are new, or belong to another fleet than before."""

    @property
    def empty(self) -> bool:
        return not any((self.moves, self.ended, self.replicas, self.left, self.fleets, self.removed, self.alias_fleets))


def delta(old: View, new: View) -> ViewDelta:
    """What turns the view ``old`` into the view ``new``. Load alone makes no delta: see `routed`."""
    known, there = old.aliases, {replica.id: replica for replica in old.replicas}
    moves = {name: move for name, move in new.aliases.items() if name not in known or known[name].generation != move.generation}
    replicas = tuple(one for one in new.replicas if one.id not in there or routed(there[one.id]) != routed(one))
    ended, left = frozenset(known.keys() - new.aliases), frozenset(there.keys() - {replica.id for replica in new.replicas})
    fleets = tuple(fleet for name, fleet in new.fleets.items() if old.fleets.get(name) != fleet)
    removed = frozenset(old.fleets.keys() - new.fleets)
    alias_fleets = {name: fleet for name, fleet in new.alias_fleets.items() if old.alias_fleets.get(name) != fleet}
    return ViewDelta(old.revision, new.revision, moves, ended, replicas, left, fleets, removed, alias_fleets)


def apply(view: View, change: ViewDelta) -> View:
    """The view after a delta. An alias never goes back a generation, because a control that has just restarted may know an older one."""
    aliases = dict(view.aliases)
    for name in change.ended:
        del aliases[name]
    for name, move in change.moves.items():
        aliases[name] = max(move, aliases.get(name, move), key=lambda one: one.generation)
    replicas = {replica.id: replica for replica in view.replicas if replica.id not in change.left}
    replicas |= {replica.id: replica for replica in change.replicas}
    fleets = {name: fleet for name, fleet in view.fleets.items() if name not in change.removed}
    fleets |= {fleet.name: fleet for fleet in change.fleets}
    alias_fleets = {**view.alias_fleets, **change.alias_fleets}
    for name in change.ended:
        alias_fleets.pop(name, None)
    return View(change.revision, aliases, tuple(replicas.values()), fleets, alias_fleets)


def routed(replica: ReplicaState) -> tuple[Any, ...]:
    """The part of a replica's state that a gateway routes by; load changes alone are not worth a push."""
    return replica.id, replica.url, replica.secret, replica.held
