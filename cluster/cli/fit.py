"""What fits, for commands: `springtide fit MODEL` for one model on one slot, and `springtide up` for every fleet before Ray starts."""

import contextlib
from typing import NamedTuple

from cluster.capacity.fit import Fit, Model, changes_in_words
from cluster.capacity.kv_cache import Slot
from cluster.config import Config, FleetSpec
from cluster.errors import ModelNotFound, RecordDamaged, VersionRefused
from cluster.memory import device_bytes
from cluster.store import fitting, imports
from cluster.store.objects import Store
from cluster.store.registry import Registry, registry_of
from cluster.types import NAME, VersionId


class Fitted(NamedTuple):
    """A fleet whose model is in the store, and how its engine will start."""

    fleet: str
    weights: VersionId
    slot: Slot
    found: Fit


def read(named: str, config: Config) -> tuple[str, Model]:
    """What a model is called, and what is known of it. ``named`` is what ``--model`` takes, if it is on this machine; of an adapter its base
    counts.

    Raises `ModelNotFound`, and `VersionRefused` for files that are not what they must be.
    """
    registry = existing(config)
    if "/" not in named and registry and ("@" in named or (NAME.fullmatch(named) and registry.alias(named))):
        id = registry.resolve(named).weights
        return str(id), fitting.of_version(registry, id, config.home / "cache")
    source = None if "@" in named and "/" not in named else imports.here(named)
    if source is None:
        raise _absent(named, registry)
    return named, imports.model_of(source)


def existing(config: Config) -> Registry | None:
    """The registry of a store that is there. A question must not create one."""
    root = Store(config.store).local_root
    return None if root is not None and not root.is_dir() else registry_of(config)


def _absent(named: str, registry: Registry | None) -> ModelNotFound:
    known = ", ".join(registry.aliases() if registry else ()) or "none"
    return ModelNotFound(
        f"There is no folder {named}, no such model in the store, and none in the hub's cache on this machine.",
        f"Models: {known}. A version is written NAME@NUMBER. A model of a hub must be downloaded first.",
        param="model",
    )


def spec_for(config: Config, named: str) -> FleetSpec:
    """The declared fleet that hosts a model; for a model that none hosts, what every fleet has."""
    model = named.partition("@")[0]
    hosts = (name for name, fleet in config.fleets.items() if fleet.model == model)
    name = next(hosts, None)
    return config.spec(name) if name else config.spec_of(model, config.fleet)


def of_fleets(config: Config, registry: Registry) -> list[Fitted]:
    """How the engines of the declared fleets will start, of those whose model is in the store and can be read. Raises `DoesNotFit` for one that
    cannot start."""
    memory_bytes = device_bytes(config.pool.accelerator)
    return [one for name in config.fleets if (one := _fitted(config.spec(name), registry, memory_bytes))]


def _fitted(spec: FleetSpec, registry: Registry, memory_bytes: int | None) -> Fitted | None:
    try:
        if (live := registry.alias(spec.fleet.model)) is None:
            return None
        weights = registry.manifest(live.stable).weights
        model = fitting.of_version(registry, weights, spec.home / "cache")
        return Fitted(spec.name, weights, fitting.slot(spec, memory_bytes), fitting.fit(spec, model, str(weights), memory_bytes))
    except (RecordDamaged, VersionRefused):  # it costs this fleet alone, whose engine says why
        return None


def before_start(config: Config, named: str | None) -> None:
    """Raise `DoesNotFit` where `springtide up` would, for a model that is on this machine already or for the fleets as they are. Called before
    Ray is imported, which takes longer than all of this. Whatever else is wrong is found on the way."""
    registry = existing(config)
    if named is None and registry is not None:
        of_fleets(config, registry)
    if named is not None:
        with contextlib.suppress(ModelNotFound, VersionRefused):
            check(config, *read(named, config))


def check(config: Config, name: str, model: Model) -> None:
    """Raise `DoesNotFit` where the first fleet cannot host the model."""
    fitting.fit(config.spec(config.default_fleet), model, name, device_bytes(config.pool.accelerator))


def verdict(found: Fit) -> str:
    """Whether it fits, in one sentence; and if it does not, what to change."""
    if found.problem:
        return f"It does not fit: {found.problem}. {changes_in_words(found)}"
    if why := found.attention.unknown:
        return f"It is unknown what it needs: {why}. vLLM finds out when it starts."
    if found.kv_budget_bytes is None:
        return "Whether it fits depends on the memory of one device. Give it with --memory-gib."
    at_once = "" if found.requests is None else f", {found.requests} at once"
    return f"It fits: requests of {found.context_tokens} tokens{at_once}."
