"""``GET /v1/models`` and ``GET /v1/models/{model}``: the aliases served here, and any version that a replica holds."""

from typing import Any

from cluster.errors import ModelNotFound
from cluster.types import Generation, View


def model_list(view: View) -> dict[str, Any]:
    """The aliases that a replica can answer for, or all while none runs: a request wakes one. Then every held version, which a client may
    pin."""
    held = {id for replica in view.replicas for id in replica.held}
    aliases = [_alias(move) for _, move in sorted(view.aliases.items()) if str(move.stable) in held or not view.replicas]
    return {"object": "list", "data": [*aliases, *(_version(id) for id in sorted(held))]}


def model(view: View, name: str) -> dict[str, Any]:
    move = view.aliases.get(name)
    held = any((str(move.stable) if move else name) in replica.held for replica in view.replicas)
    if held or (move and not view.replicas):
        return _alias(move) if move else _version(name)
    raise ModelNotFound(f"The model {name[:80]!r} does not exist.", "GET /v1/models lists the models served here.", param="model")


def _alias(move: Generation) -> dict[str, Any]:
    return {
        "id": move.alias,
        "object": "model",
        "created": int(move.time_s),
        "owned_by": "springtide",
        "version": str(move.stable),
        "generation": move.generation,
    }


def _version(id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": "springtide", "version": id}
