"""What the store holds, in plain JSON values, for whoever asks over HTTP."""

from typing import Any

from cluster.errors import ModelNotFound
from cluster.publishing.rollout import Rollout
from cluster.store.registry import Registry
from cluster.types import Manifest, VersionId, check_name


def models(registry: Registry, name: str | None) -> dict[str, Any]:
    """``{"versions": [row, …]}``, oldest first: all, those of one model, or the one that an alias means. Raises `ModelNotFound`."""
    live_as: dict[VersionId, list[str]] = {}
    aliases = registry.aliases()
    for alias, move in aliases.items():
        live_as.setdefault(move.stable, []).append(alias)
    found = [manifest for one in ([check_name(name)] if name else registry.names()) for manifest in registry.versions(one)]
    if name and not found and name in aliases:
        found = [registry.manifest(aliases[name].stable)]
    if name and not found:
        known = ", ".join(sorted({*registry.names(), *aliases})) or "none"
        raise ModelNotFound(f"There is no model {name!r}.", f"Models: {known}. A version is written NAME@NUMBER.", param="model")
    return {"versions": [row(manifest, live_as.get(manifest.id, [])) for manifest in found]}


def row(manifest: Manifest, live_as: list[str]) -> dict[str, Any]:
    return {
        "version": str(manifest.id),
        "kind": manifest.kind,
        "base": str(manifest.base) if manifest.base else None,
        "live_as": live_as,
        "created_s": manifest.created_s,
        "job": manifest.lineage.job,
        "metrics": manifest.lineage.metrics,
    }


def version(registry: Registry, id: str) -> dict[str, Any]:
    """``{"manifest", "digest", "verdicts"}`` of one version, verdicts oldest first. Raises `ModelNotFound`."""
    manifest = registry.manifest(VersionId.parse(id))
    verdicts = [verdict.model_dump(mode="json") for verdict in registry.verdicts(manifest.id)]
    return {"manifest": manifest.model_dump(mode="json"), "digest": manifest.digest, "verdicts": verdicts}


def history(registry: Registry, alias: str) -> dict[str, Any]:
    """``{"moves": […], "rollouts": [[record, …], …]}`` of an alias, oldest first. Raises `ModelNotFound`."""
    moves, rollouts = registry.history(alias), registry.rollouts(alias)
    if not moves and not rollouts:
        raise ModelNotFound(f"There is no alias {alias}.", "`springtide models` lists the ones that exist.", param="model")
    return {
        "moves": [move.model_dump(mode="json") for move in moves],
        "rollouts": [[record.model_dump(mode="json") for record in records] for records in rollouts],
    }


def rollout(registry: Registry, alias: str) -> Rollout:
    """The newest rollout of an alias. Raises `ModelNotFound`."""
    one = registry.rollout(alias)
    if one is None:
        raise ModelNotFound(f"No rollout of {alias} has begun yet.", "`springtide publish` begins one.", param="model")
    return one
