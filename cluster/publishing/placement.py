"""Which replica should host which weights, how far the replicas are with a version, and what gateways may route by. Pure.

A fleet's replicas host one base at a time: weights, and adapters on them. Publishing other weights to the alias that the fleet hosts swaps
them replica by replica; everything here decides the next step of that from what is known now, so it can be decided anew at any time.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import ceil
from typing import NamedTuple

from cluster.publishing.rollout import Rollout, Warmth
from cluster.types import FleetState, Generation, Manifest, ReplicaState, VersionId

Weights = Callable[[VersionId], VersionId]
"""Version → the weights version it is, or sits on."""


class Swap(NamedTuple):
    """One replica that must change its weights. Gateways send it nothing meanwhile."""

    replica: str
    weights: VersionId


class Hosted(NamedTuple):
    """What a fleet hosts now, and may host when its rollout has ended."""

    fleet: str
    model: str
    """The alias whose weights it hosts."""
    weights: frozenset[VersionId]
    """Those of the alias's stable version, and of its canary while there is one."""


def fleet_of(alias: str, weights: VersionId | None, hosted: Sequence[Hosted]) -> str | None:
    """The fleet that an alias belongs to: the one that hosts it as its model, or else the one that hosts its version's ``weights``.

    Nobody configures it, so it is true as soon as a fleet is added. Example: the fleet ``chat`` hosts the model ``seedling``, now
    seedling@2. The alias ``seedling`` belongs to it; so does ``poet``, which means an adapter on seedling@2; an adapter on other@1 belongs
    to no fleet, and a gateway answers for it with 404.
    """
    for one in hosted:
        if one.model == alias:
            return one.fleet
    return next((one.fleet for one in hosted if weights in one.weights), None)


def target_weights(
    replicas: Sequence[ReplicaState], move: Generation, weights: Weights, surge: VersionId | None = None
) -> dict[str, VersionId]:
    """Replica id → the weights that it should host while the fleet's alias is at ``move``.

    A canary on other weights gets its share of the replicas: at least one, and never the last. Those that host it already come
    first, so that a new step swaps as few as possible. A canary that a ``surge`` hosts needs none of these.

    Example: four replicas, m@1 stable, m@2 canary at 25 %: one is to host m@2, three m@1. At 50 % a second one is swapped.
    """
    stable = weights(move.stable)
    canary = weights(move.canary) if move.canary else stable
    wanted = {replica.id: stable for replica in replicas}
    if canary not in (stable, surge) and len(replicas) > 1:
        count = min(len(replicas) - 1, ceil(move.percent * len(replicas) / 100))
        ordered = sorted(replicas, key=lambda replica: (replica.base != str(canary), replica.id))
        wanted.update({replica.id: canary for replica in ordered[:count]})
    return wanted


def next_swap(
    replicas: Sequence[ReplicaState], targets: Mapping[str, VersionId], may: Callable[[ReplicaState, str], bool], now: Swap | None
) -> Swap | None:
    """The one replica that should swap its weights next; None where every replica hosts its target.

    One at a time: while it swaps it answers nobody, and the others carry its traffic. The one that swaps already goes on. ``may``: whether
    the replica can be asked for these weights; what it has refused it is asked for again only now and then.
    """
    wrong = [one for one in replicas if one.id in targets and one.base != str(targets[one.id]) and may(one, str(targets[one.id]))]
    if not wrong:
        return None
    chosen = next((one for one in wrong if now is not None and one.id == now.replica), wrong[0])
    return Swap(chosen.id, targets[chosen.id])


class SurgeFacts(NamedTuple):
    """What `surge_weights` goes by."""

    running: VersionId | None
    """The weights that the fleet's surge hosts now."""
    held: frozenset[str]
    """Ids of the versions that the fleet's own replicas hold."""
    move: Generation | None
    """The newest move of the fleet's alias."""
    rollout: Rollout | None
    """Its newest rollout."""
    needed: str | None
    """Why the rollout needs a surge; empty where it does not, None while that is not known yet."""
    ready: bool
    """Whether the fleet's own replicas are ready for the version: nothing is started for one that they refuse."""


def surge_weights(facts: SurgeFacts, weights: Weights) -> VersionId | None:
    """The weights that a surge of the fleet should host; None where there should be no surge.

    Example: the fleet hosts m@1, and m@2 has another shape. The rollout of m@2 warms: once the fleet's replicas have its files, a surge
    starts for m@2. At 100 % the fleet's replicas start other engines, one after another, while the surge answers. When they hold m@2, the
    surge is not wanted any more. Had the rollout been aborted, it would have ended at once.
    """
    running, move, now = facts.running, facts.move, facts.rollout
    # Clients may get a version that the fleet does not hold: whoever holds it must stay, whatever became of the rollout.
    if running and move and not all(str(id) in facts.held for id in move.versions):
        return running
    if now is None or now.stage not in ("warming", "canary"):
        return None
    # It was started for this rollout. The reason may be gone by now (a second replica came): that is none to end it half-way.
    if running == weights(now.version) and now.incumbent and weights(now.incumbent) != running:
        return running
    if facts.needed is None:
        return running
    return weights(now.version) if facts.needed and (now.stage == "canary" or facts.ready) else None


def warmth(replicas: Sequence[ReplicaState], manifest: Manifest) -> Warmth:
    """How many replicas are ready for the version: holding it, or able to take its weights over within a moment."""
    ready = sum(holds(replica, manifest) or replica.staged.get(str(manifest.id)) == manifest.digest for replica in replicas)
    waits = (f"{words} on {replica.id}" for replica in replicas if (words := replica.waiting.get(str(manifest.id))))
    return Warmth(len(replicas), ready, _refusal(replicas, manifest), next(waits, ""))


def held_by_targets(replicas: Sequence[ReplicaState], manifest: Manifest, targets: Mapping[str, VersionId]) -> Warmth:
    """How many of the replicas that should hold the version by now do. ``targets``: see `target_weights`."""
    chosen = [replica for replica in replicas if targets.get(replica.id) == manifest.weights]
    return Warmth(len(chosen), sum(holds(replica, manifest) for replica in chosen), _refusal(replicas, manifest))


def holds(replica: ReplicaState, manifest: Manifest) -> bool:
    return replica.held.get(str(manifest.id)) == manifest.digest


def lacks(replica: ReplicaState, id: str, digest: str | None) -> bool:
    """Whether the replica does not hold the version with this digest."""
    return replica.held.get(id) != digest


class Holders(NamedTuple):
    """What `routable` needs to know of a fleet's replicas. It is counted once for all of the fleet's aliases."""

    answering: int
    """Replicas that hold anything."""
    by_version: Mapping[str, int]
    """Version id → how many replicas hold it."""


def count_holders(replicas: Sequence[ReplicaState]) -> Holders:
    """Example: one replica holds m@1 and a@1, one holds m@1, one swaps its weights: 2 answer, 2 hold m@1, and 1 holds a@1."""
    held = [replica.held for replica in replicas if replica.held]
    return Holders(len(held), Counter(chain.from_iterable(held)))


def routable(
    history: Sequence[Generation],
    holders: Holders,
    announced: Generation | None = None,
    copies: Mapping[str, int] | None = None,
) -> Generation:
    """The generation that gateways should route by: the newest that the ``holders`` have capacity for, and never one before ``announced``.

    It differs from the newest of all where a replica is about to swap its weights, where an alias was moved in the store by other hands,
    or where control was killed between a move and its announcement: until a replica holds the version, the generation before is the answer.
    While nobody holds that either, requests wait, and then for the newest: gateways that know of a move before it can be answered need not
    be told twice when it can. ``copies``: adapter's id → how many replicas must hold it, where that is not all of them.

    Example: generations 1 (m@1) and 2 (m@2), and no replica holds m@2 yet: 1. One of one holds m@2: 2. Nobody holds either: 2.
    """
    since = announced.generation if announced else 0
    moves = (move for move in reversed(history) if move.generation >= since)
    return next((move for move in moves if _has_capacity(move, holders, copies or {})), history[-1])


def _has_capacity(move: Generation, holders: Holders, copies: Mapping[str, int]) -> bool:
    """Whether the replicas can carry the alias's traffic so: every version is held, and what all clients get by half of those that should.

    Weights are swapped on one replica after another; the first must not get everybody's requests while the others stand idle.
    """
    holding = [holders.by_version.get(str(id), 0) for id in move.versions]
    should = min(holders.answering, copies.get(str(move.stable), holders.answering))
    return all(holding) and (move.canary is not None or 2 * holding[0] >= should)


def fleet_state(name: str, model: str, app: str, moves: Mapping[str, Generation], weights: Weights) -> FleetState:
    """The fleet with the ids that its replicas answer for once they run: what ``model`` means, and what other aliases mean on the same
    weights.

    Example: ``model`` means m@2; alias a means a@1, an adapter on m@2; alias b means b@1, an adapter on other weights. The fleet's
    versions are a@1 and m@2. ``moves``: alias → its newest move.
    """
    hosted = {weights(id) for id in moves[model].versions} if model in moves else set[VersionId]()
    there = {str(id) for move in moves.values() for id in move.versions if weights(id) in hosted}
    return FleetState(name, model, tuple(sorted(there | {str(id) for id in hosted})), app)


def _refusal(replicas: Sequence[ReplicaState], manifest: Manifest) -> str:
    words = ((replica.id, id, replica.refused.get(str(id))) for replica in replicas for id in (manifest.id, manifest.weights))
    return next((f"Replica {replica} could not load {id}: {why}" for replica, id, why in words if why), "")
