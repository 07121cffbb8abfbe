"""``GET /v1/models`` and ``GET /v1/models/{model}``: what can be asked now, by an alias or by a version's id."""

from typing import Any

from cluster.errors import ModelNotFound
from cluster.types import Generation
from deployments.routing.table import Table, unhosted


def model_list(table: Table) -> dict[str, Any]:
    """First the aliases whose stable version a replica holds, or a fleet that sleeps and can be woken; then all such versions, which a
    client may pin.

    Of the aliases those come first that fleets were started for, in the order of the fleets: whoever names no model takes the first, and what
    somebody publishes beside it changes nothing for them.
    """
    askable = set(table.versions())
    own = {fleet.model: place for place, fleet in enumerate(table.view.fleets.values())}
    moves = sorted(table.view.aliases.values(), key=lambda move: (own.get(move.alias, len(own)), move.alias))
    aliases = [_alias(table, move) for move in moves if str(move.stable) in askable]
    return {"object": "list", "data": [*aliases, *(_version(table, id) for id in sorted(askable))]}


def model(table: Table, name: str) -> dict[str, Any]:
    """One entry of the list. Raises `ModelNotFound`."""
    move = table.view.aliases.get(name)
    if table.askable(str(move.stable) if move else name):
        return _alias(table, move) if move else _version(table, name)
    if move and not table.hosts(str(move.stable)):
        raise unhosted(name, move.stable)
    raise ModelNotFound(
        f"The model {name[:80]!r} {'cannot answer now' if move else 'does not exist'}.",
        "GET /v1/models lists the models served here.",
        param="model",
    )


def _alias(table: Table, move: Generation) -> dict[str, Any]:
    fleet = table.view.alias_fleets.get(move.alias, "")
    return {
        "id": move.alias,
        "object": "model",
        "created": int(move.time_s),
        "owned_by": "springtide",
        "version": str(move.stable),
        "generation": move.generation,
        "task": table.task(str(move.stable), fleet) or None,
    }


def _version(table: Table, id: str) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": 0,
        "owned_by": "springtide",
        "version": id,
        "task": table.task(id) or None,
    }
