"""The warm pool: engines that sleep on this machine, so that the next replica of their fleet need not start another.

Engines are Ray's named actors, so whoever looks finds them and there is no list to keep. Each fleet cares for its own. One that sleeps
holds no slot. With vLLM's sleep mode (GPUs) its weights move to the machine's memory and most of the accelerator's memory is free. On CPUs
it keeps its memory, and wakes in no time.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import FleetSpec
from cluster.control.client import ENGINES
from cluster.control.engines import EngineName
from cluster.errors import SpringtideError
from deployments.replica.lifecycle import Owner

ANSWER_S = 0.5
"""How long an engine may take to say whether it sleeps. One that starts, or is busy, does not answer in time, and does not sleep."""


def name_for(spec: FleetSpec, node: str, environment: dict[str, str]) -> EngineName:
    """The name of every engine that a replica of this fleet may own, but for its serial."""
    kind = _digest([spec.engine_arguments(), spec.engine_environment(), spec.store])
    return EngineName(node, spec.name, kind, _digest(environment), "")


def fitting(mine: EngineName, names: Iterable[str]) -> list[str]:
    """The engines that a replica may own, sorted."""
    return sorted(name for name in names if (one := EngineName.parse(name)) and one._replace(serial="") == mine)


def outdated(mine: EngineName, names: Iterable[str]) -> list[str]:
    """The engines of the same fleet and machine whose arguments the fleet does not use any more. Other fleets' engines are theirs."""
    parsed = ((name, EngineName.parse(name)) for name in names)
    return sorted(name for name, one in parsed if one and one[:2] == mine[:2] and one.kind != mine.kind)


class WarmPool:
    """The engines of one fleet on this machine, as a replica sees them."""

    def __init__(self, spec: FleetSpec) -> None:
        self.spec = spec
        self.environment = {
            key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if spec.accelerator == "gpu" and key in os.environ
        }
        self.name = name_for(spec, ray.get_runtime_context().get_node_id(), self.environment)

    async def engine(self, owner: Owner, weights: str, tell: Callable[[str], None]) -> Any:
        """An engine that hosts ``weights`` for this replica: one that slept, or a new one. ``tell`` hears what happens."""
        asleep = await self._find_asleep()
        for name in outdated(self.name, asleep):
            asleep[name].end.remote()
        for name in fitting(self.name, asleep):
            tell("wakes an engine")
            with contextlib.suppress(RayActorError):  # it has just ended
                if await self._owned(asleep[name], owner, weights):
                    return asleep[name]
        tell("starts its engine")
        engine = self._new()
        await self._owned(engine, owner, weights)
        return engine

    async def leave(self, engine: Any) -> None:
        """Let the engine sleep where the fleet keeps one more here; else it ends."""
        with contextlib.suppress(RayActorError):  # it died while it finished its streams
            await engine.release.remote(self.spec.fleet.warm_pool_size > 0)
        asleep = await self._find_asleep()
        for name in fitting(self.name, asleep)[self.spec.fleet.warm_pool_size :]:  # sorted: two replicas that leave at once agree
            asleep[name].end.remote()

    async def _owned(self, engine: Any, owner: Owner, weights: str) -> bool:
        try:
            return await engine.acquire.remote(owner, weights, self.spec)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SpringtideError) else error) from None

    def _new(self) -> Any:
        from deployments.replica.engine import Engine  # and all that it imports, which a replica that wakes one need not wait for

        where = NodeAffinitySchedulingStrategy(self.name.node, soft=False)
        name = str(self.name.next())
        options = {"name": name, "namespace": ENGINES, "lifetime": "detached", "num_cpus": 0, "scheduling_strategy": where}
        return ray.remote(Engine).options(**options).remote(self.spec, self.environment)

    async def _find_asleep(self) -> dict[str, Any]:
        """Name → engine, of the fleet's engines that sleep on this machine."""
        named: list[Any] = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        here = f"{self.name.node} {self.name.fleet} "
        names = [one["name"] for one in named if one["namespace"] == ENGINES and one["name"].startswith(here)]
        answers = await asyncio.gather(*map(_asleep, names))
        return {name: engine for name, engine in zip(names, answers, strict=True) if engine is not None}


def _digest(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


async def _asleep(name: str) -> Any:
    """The engine of that name where it sleeps, else None."""
    try:
        engine = await asyncio.to_thread(ray.get_actor, name, ENGINES)
        return engine if await asyncio.wait_for(engine.asleep.remote(), ANSWER_S) else None
    except (ValueError, RayError, TimeoutError):  # it has ended, or is not there yet
        return None
