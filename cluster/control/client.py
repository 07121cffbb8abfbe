"""How other processes of the pool reach control: its name, and a client that raises what it raises. Imports little, since much waits for it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster.errors import PoolUnavailable, SpringtideError
from cluster.types import PUBLISH_TIMEOUT_S

if TYPE_CHECKING:
    from cluster.capacity.allocator import Grant, Heartbeat
    from cluster.config import Config
    from cluster.publishing.rollout import Policy, Rollout

ACTOR, NAMESPACE = "springtide-control", "springtide"
ENGINES = "springtide-engines"
"""The namespace of the engines' actors, those that sleep included."""
ANSWER_S = 5
INTERIM_S = 60
"""How long replicas may take to hold a run's newest version, and control to hear of it."""


class Client(Protocol):
    """What callers outside the actor may ask. `SpringtideError`s arrive as themselves."""

    def publish(self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None) -> Rollout: ...
    def heartbeat(self, beat: Heartbeat) -> Grant: ...
    def leave(self, job: str, driver: str) -> None: ...
    def progress(self, job: str, snapshot: dict[str, Any]) -> bool: ...
    def hold_interims(self, run: str, versions: list[str], places: int) -> None: ...
    def end_interims(self, run: str) -> None: ...


class _Remote:
    """`Client` over the actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def publish(self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None) -> Rollout:
        return self._call("publish", PUBLISH_TIMEOUT_S, version, alias, reason, author, policy)

    def heartbeat(self, beat: Heartbeat) -> Grant:
        return self._call("heartbeat", ANSWER_S, beat)

    def leave(self, job: str, driver: str) -> None:
        self._call("leave", ANSWER_S, job, driver)

    def progress(self, job: str, snapshot: dict[str, Any]) -> bool:
        return self._call("progress", ANSWER_S, job, snapshot)

    def hold_interims(self, run: str, versions: list[str], places: int) -> None:
        self._call("hold_interims", INTERIM_S, run, versions, places)

    def end_interims(self, run: str) -> None:
        self._call("end_interims", INTERIM_S, run)

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SpringtideError) else error) from None
        except (RayActorError, GetTimeoutError) as error:
            raise PoolUnavailable(
                "The control actor does not answer.", "It restarts by itself; try again in some seconds."
            ) from error


def connect() -> Client:
    """The control of the pool that this process runs on, for jobs. Others speak HTTP: `cluster.client`. Raises `PoolUnavailable`."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    try:
        return _Remote(ray.get_actor(ACTOR, namespace=NAMESPACE))
    except ValueError as error:
        raise PoolUnavailable(
            "The pool has no control actor: nothing is being served.", "Start serving with `springtide up`."
        ) from error


def ensure(config: Config) -> Any:
    """The control actor's handle; the actor is started if there is none. Anyone on the pool may call this: the first one wins.

    It blocks for as long as Ray takes to answer.
    """
    try:
        return ray.get_actor(ACTOR, namespace=NAMESPACE)
    except ValueError:
        # Imported here, because only the first process of a pool needs the reconciler, the lease and the metrics.
        from cluster.control import actor

        return actor.start(config)


class Line:
    """A line to control for whoever tells it something again and again: control is looked up once, and again when it does not answer."""

    def __init__(self) -> None:
        self.control: Any = None

    async def tell(self, what: str, *arguments: Any) -> bool:
        """Whether it was heard."""
        try:
            await self._call(what, *arguments)
        except (ValueError, RayError, TimeoutError):  # there is none yet, or it is being started again
            self.control = None
            return False
        return True

    async def ask(self, what: str, *arguments: Any) -> Any:
        """What control answers; None where it does not."""
        try:
            return await self._call(what, *arguments)
        except (ValueError, RayError, TimeoutError):  # as above
            self.control = None
            return None

    async def _call(self, what: str, *arguments: Any) -> Any:
        if self.control is None:
            self.control = await asyncio.to_thread(ray.get_actor, ACTOR, NAMESPACE)
        return await asyncio.wait_for(getattr(self.control, what).remote(*arguments), ANSWER_S)


def tell(what: str, *arguments: Any) -> None:
    """Tell control something; nobody waits for it, and it would learn of it later in any case."""
    with contextlib.suppress(ValueError):  # no control yet
        getattr(ray.get_actor(ACTOR, namespace=NAMESPACE), what).remote(*arguments)
