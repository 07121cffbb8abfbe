"""What ``--model`` means to a command: a name or version in the store, or a model that goes into the store first (`cluster.store.imports`)."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from cluster import client
from cluster.config import Config, FleetSpec
from cluster.errors import BadRequest
from cluster.memory import device_bytes
from cluster.store import fitting, imports
from cluster.store.imports import Source
from cluster.store.registry import Registry, registry_of
from cluster.types import NAME, VersionId


def alias_for(named: str, config: Config, console: Console, found: Callable[[], object] = lambda: None) -> str:
    """The alias that serves ``named`` when the pool starts. Moves it at once: nothing serves yet, so no replica has to confirm.

    Where the alias means the same model with what was trained on it since, it stays. ``found`` is called once the model is there and fits: what
    follows may take long, and something else can begin.
    """
    registry = registry_of(config)
    if _is_version(named):
        id = registry.manifest(VersionId.parse(named)).id
        _point(registry, id)
        return id.name
    if _is_alias(named, registry):
        return named

    def check(source: Source) -> None:
        check_fits(source, config.spec(config.default_fleet))
        found()

    id = _imported(named, registry, config, console, check)
    now = registry.alias(id.name)
    if now is None or not comes_from(registry, now.stable, id):
        _point(registry, id)
    return id.name


def version_for(named: str, config: Config | None, console: Console, check: Callable[[Source], None] = lambda _: None) -> str:
    """What a running pool knows ``named`` as: a name or version as it stands, or the version that the model becomes in the pool's store.

    ``config``: the pool's; None for a pool elsewhere, whose store may be out of reach. There a folder or file raises `BadRequest`. ``check`` may
    refuse a model before it is copied.
    """
    if _is_version(named) or (config is None and NAME.fullmatch(named)):
        return named
    if config is None:
        raise BadRequest(
            f"{named} is not in the pool's store, and only a command on the pool's machine puts a model there.",
            "Give a name or version that `springtide models` lists, or run this where the pool runs, without --pool.",
            param="model",
        )
    registry = registry_of(config)
    return named if _is_alias(named, registry) else str(_imported(named, registry, config, console, check))


def comes_from(registry: Registry, version: VersionId, ancestor: VersionId) -> bool:
    """Whether a version is ``ancestor``, sits on it, or was trained from it, in however many steps."""
    seen: set[VersionId] = set()
    while version not in seen:
        seen.add(version)
        manifest = registry.manifest(version)
        if ancestor in (version, manifest.weights):
            return True
        version = manifest.lineage.parent or version
    return False


def _is_version(named: str) -> bool:
    return "@" in named and "/" not in named


def _is_alias(named: str, registry: Registry) -> bool:
    return NAME.fullmatch(named) is not None and registry.alias(named) is not None


def check_fits(source: Source, spec: FleetSpec) -> None:
    """Raise `DoesNotFit` before a model is copied or converted, which may take long."""
    fitting.fit(spec, imports.model_of(source), source.name, device_bytes(spec.accelerator))


def _imported(named: str, registry: Registry, config: Config, console: Console, check: Callable[[Source], None]) -> VersionId:
    registry.store.check_writable()
    with console.status(f"Looking for {escape(named)}…") as line:

        def tell(words: str) -> None:
            line.update(f"{escape(words)}…")

        source = imports.find(named, tell)
        check(source)
        id = imports.add(registry, source, config.home / "imports", tell)
    console.print(f"{escape(named)} is [bold]{id}[/] in the store.")
    return id


def _point(registry: Registry, id: VersionId) -> None:
    now = registry.alias(id.name)
    if now is None or now.stable != id:
        registry.move(id.name, id, "chosen at start", client.author(), now.generation if now else 0)
