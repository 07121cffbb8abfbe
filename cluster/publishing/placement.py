"""Which replica should host which weights, and how far it is. Pure."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil

from cluster.publishing.rollout import Warmth
from cluster.types import FleetState, Generation, Manifest, ReplicaState, VersionId

Weights = Callable[[VersionId], VersionId]
"""Version → the weights version it is, or sits on."""


def bases(
    replicas: Sequence[ReplicaState], move: Generation, weights: Weights, apart: VersionId | None = None
) -> dict[str, VersionId]:
    """Replica id → the weights it should host for an alias at ``move``.

    A canary on other weights gets its share of the replicas: at least one, and never the last. Those that host it already come
    first, so that a new step moves as few as possible. One whose weights a second fleet hosts (``apart``) needs none of these.
    """
    stable = weights(move.stable)
    canary = weights(move.canary) if move.canary else stable
    wanted = {replica.id: stable for replica in replicas}
    if canary not in (stable, apart) and len(replicas) > 1:
        count = min(len(replicas) - 1, ceil(move.percent * len(replicas) / 100))
        ordered = sorted(replicas, key=lambda replica: (replica.base != str(canary), replica.id))
        wanted.update({replica.id: canary for replica in ordered[:count]})
    return wanted


def warmth(replicas: Sequence[ReplicaState], manifest: Manifest) -> Warmth:
    """How many replicas are ready for the version: holding it, or able to take its weights over within a moment."""
    ready = sum(holds(replica, manifest) or replica.staged.get(str(manifest.id)) == manifest.digest for replica in replicas)
    return Warmth(len(replicas), ready, _refusal(replicas, manifest))


def settled(replicas: Sequence[ReplicaState], manifest: Manifest, hosts: dict[str, VersionId]) -> Warmth:
    """How many of the replicas that should hold the version by now do. ``hosts``: see `bases`."""
    chosen = [replica for replica in replicas if hosts.get(replica.id) == manifest.weights]
    return Warmth(len(chosen), sum(holds(replica, manifest) for replica in chosen), _refusal(replicas, manifest))


def holds(replica: ReplicaState, manifest: Manifest) -> bool:
    return replica.held.get(str(manifest.id)) == manifest.digest


def lacks(replica: ReplicaState, manifest: Manifest) -> bool:
    """Whether this replica should hold the version, because it hosts its weights, and does not, by digest."""
    return replica.base == str(manifest.weights) and not holds(replica, manifest)


def answerable(
    history: Sequence[Generation], replicas: Sequence[ReplicaState], announced: Generation | None = None
) -> Generation:
    """The generation that gateways should follow: the newest whose versions are held, but never one before ``announced``.

    They differ from the newest of all where a replica is about to take other weights over, where an alias was moved in the store by
    other hands, or where control was killed between a move and its announcement: until a replica holds the version, the one before
    is the answer. While nobody holds that either, requests wait, and then for the newest: gateways that know of a move before it can
    be answered need not be told twice when it can.
    """
    since = announced.generation if announced else 0
    return next((move for move in reversed(history) if move.generation >= since and _borne(move, replicas)), history[-1])


def _borne(move: Generation, replicas: Sequence[ReplicaState]) -> bool:
    """Whether the replicas can bear the alias's traffic so: every version is held, and what all clients get by half of those that answer.

    Weights are taken over by one replica after another; the first must not get everybody's requests while the others stand idle.
    """
    answering = [replica for replica in replicas if replica.held]
    holders = [sum(str(id) in replica.held for replica in answering) for id in move.versions]
    return all(holders) and (move.canary is not None or 2 * holders[0] >= len(answering))


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
