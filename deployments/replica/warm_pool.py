"""Engines that sleep on this machine: the next replica owns one of them instead of starting another.

Engines are Ray's named actors, so whoever looks finds them and there is no list to keep. One that sleeps holds no slot. With vLLM's sleep
mode (GPUs) its weights lie in the machine's memory meanwhile and the accelerator's is free, but for what CUDA keeps of it; on CPUs it
keeps what it has, and costs memory and no time.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import FleetSpec
from cluster.control.client import ENGINES
from cluster.errors import SpringtideError

ANSWER_S = 0.5
"""How long an engine may take to say whether it sleeps. One that starts, or is busy, does not answer, and does not sleep."""


class Owner(NamedTuple):
    """The replica that an engine works for."""

    id: str
    app: str
    """The Serve application."""
    pid: int


class WarmPool:
    """The engines of this machine, as a replica sees them."""

    def __init__(self, spec: FleetSpec) -> None:
        self.spec = spec
        self.node: str = ray.get_runtime_context().get_node_id()
        self.environment = {
            key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if spec.accelerator == "gpu" and key in os.environ
        }
        self.kind = _digest([spec.engine_arguments(), spec.engine_environment(), spec.store])
        """Engines of one kind were started alike, and can stand in for each other where they are on the same accelerators."""

    async def engine(self, owner: Owner, weights: str, tell: Callable[[str], None]) -> Any:
        """An engine that hosts ``weights`` for this replica: one that slept, or a new one. ``tell`` hears what happens."""
        for name, sleeper in await self._sleepers():
            if not name.startswith(f"{self.node} {self.kind} "):
                sleeper.end.remote()  # what it was started with is not asked for any more
            if not name.startswith(self._prefix):
                continue
            tell("wakes an engine")
            with contextlib.suppress(RayActorError):  # it has just ended
                if await self._owned(sleeper, owner, weights):
                    return sleeper
        tell("starts its engine")
        engine = self._new()
        await self._owned(engine, owner, weights)
        return engine

    async def leave(self, engine: Any) -> None:
        """Let it sleep, where there is room for one more; else it ends."""
        await engine.rest.remote(self.spec.fleet.standby > 0)
        alike = [one for name, one in await self._sleepers() if name.startswith(self._prefix)]
        for one in alike[self.spec.fleet.standby :]:  # two replicas that leave at once agree on which
            one.end.remote()

    async def _owned(self, engine: Any, owner: Owner, weights: str) -> bool:
        try:
            return await engine.own.remote(owner, weights, self.spec)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SpringtideError) else error) from None

    @property
    def _prefix(self) -> str:
        return f"{self.node} {self.kind} {_digest(self.environment)} "

    def _new(self) -> Any:
        from deployments.replica.engine import Engine  # and all that it imports, which a replica that wakes one need not wait for

        where = NodeAffinitySchedulingStrategy(self.node, soft=False)
        name = f"{self._prefix}{uuid4().hex[:8]}"
        options = {"name": name, "namespace": ENGINES, "lifetime": "detached", "num_cpus": 0, "scheduling_strategy": where}
        return ray.remote(Engine).options(**options).remote(self.spec, self.environment)

    async def _sleepers(self) -> list[tuple[str, Any]]:
        """(name, engine), sorted by name, of all that sleep on this machine."""
        named: list[Any] = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = sorted(one["name"] for one in named if one["namespace"] == ENGINES and one["name"].startswith(self.node))
        answers = await asyncio.gather(*map(_asleep, names))
        return [(name, engine) for name, engine in zip(names, answers, strict=True) if engine is not None]


def _digest(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


async def _asleep(name: str) -> Any:
    """The engine of that name where it sleeps, else None."""
    try:
        engine = await asyncio.to_thread(ray.get_actor, name, ENGINES)
        return engine if await asyncio.wait_for(engine.sleeps.remote(), ANSWER_S) else None
    except (ValueError, RayError, TimeoutError):  # it has ended, or is not there yet
        return None
