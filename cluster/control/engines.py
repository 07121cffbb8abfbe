"""Engines as anybody on the pool sees them: Ray's named actors, whose names say whose they are (`deployments.replica.warm_pool`)."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple, cast
from uuid import uuid4

import ray
from ray.exceptions import RayError

from cluster.control.client import ENGINES


class EngineName(NamedTuple):
    """The name of an engine's actor: who may own the engine can be read from it."""

    node: str
    fleet: str
    kind: str
    """Digest of the arguments that it was started with. Engines of one kind can stand in for each other."""
    devices: str
    """Digest of the accelerators that it was started on."""
    serial: str

    def __str__(self) -> str:
        return " ".join(self)

    @classmethod
    def parse(cls, text: str) -> "EngineName | None":
        parts = text.split(" ")
        return cls(*parts) if len(parts) == len(cls._fields) else None

    def next(self) -> "EngineName":
        return self._replace(serial=uuid4().hex[:8])


def names() -> list[str]:
    """Every engine of the pool, awake or asleep. It blocks for as long as Ray takes to answer."""
    named = cast(list[dict[str, Any]], ray.util.list_named_actors(all_namespaces=True))
    return [str(one["name"]) for one in named if one["namespace"] == ENGINES]


def end(names: Iterable[str]) -> None:
    """Let these end, but for those that a replica owns. It blocks for as long as Ray takes to find them."""
    for name in names:
        with contextlib.suppress(ValueError, RayError):  # it has just ended
            ray.get_actor(name, namespace=ENGINES).end.remote()
