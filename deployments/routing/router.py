"""The gateway's side of control's two-phase moves, and the waits of requests: for a move, for a newer view, for a fleet to wake.

Example of a move: control calls `prepare(["m"], 7)` on every gateway, and each holds new requests for m. When all have answered, control
calls `adopt` with the view of revision 7, and the held requests go on by it. So no client that has seen the new generation at one gateway
gets the old one from another.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from cluster.types import FleetState, View
from cluster.view import ViewDelta
from deployments.routing.engine_routes import EngineRoute
from deployments.routing.table import Table, Target

HOLD_TIMEOUT_S = 10.0
"""How long a request may wait for a move that control announced. Afterwards it goes by what this gateway knows."""


class Router:
    """A `Table` under moves."""

    def __init__(self, table: Table, wake: Callable[[FleetState], Awaitable[None]]) -> None:
        """``wake`` returns once the fleet has a replica, or gives up."""
        self.table = table
        self.moving: dict[str, int] = {}
        """Alias → the revision of the view that its held requests wait for."""
        self.changed = asyncio.Condition()
        self.waking: dict[str, asyncio.Task[None]] = {}
        """Fleet → the call that wakes it."""
        self._wake = wake

    # told by control

    def prepare(self, aliases: list[str], revision: int) -> None:
        """Hold new requests for ``aliases`` until a view at least as new as ``revision`` arrives."""
        if revision > self.table.view.revision:  # else this call was overtaken by the view that it announces
            self.moving.update(dict.fromkeys(aliases, revision))

    async def adopt(self, news: View | ViewDelta) -> int:
        """Route by a newer view from now on. Returns the revision in force."""
        self.table.adopt(news)
        for fleet in self.table.view.fleets.values():
            if fleet.failed and fleet.name in self.waking:  # Serve would start one replica after the other for the call
                self.waking.pop(fleet.name).cancel()
        async with self.changed:
            self.moving = {alias: revision for alias, revision in self.moving.items() if revision > self.table.view.revision}
            self.changed.notify_all()
        return self.table.view.revision

    # asked by requests

    async def resolve(self, model: str, session: str, route: EngineRoute) -> Target:
        """What ``model`` means, after a move of it that control has announced. Raises as `Table.resolve_for` does.

        Where the alias's own fleet sleeps it wakes, though another fleet with the same weights may answer meanwhile.
        """
        if awaited := self.moving.get(model):
            try:
                async with asyncio.timeout(HOLD_TIMEOUT_S), self.changed:
                    await self.changed.wait_for(lambda: model not in self.moving)
            except TimeoutError:
                if self.moving.get(model) == awaited:  # a newer move has its own time
                    self.moving.pop(model)
        target = self.table.resolve_for(route, model, session)
        if (own := self.table.asleep(target.fleet)) is not None:
            self._start(own)
        return target

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a newer view than the one in force has come, or after ``timeout_s``."""
        revision = self.table.view.revision
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self.changed:
                await self.changed.wait_for(lambda: self.table.view.revision > revision)

    def wake(self, target: Target) -> FleetState | None:
        """Wake the fleet that answers for the version and has no replica, and return it. None where no fleet need be woken. One whose engine
        has just failed to start is not woken."""
        fleet = self.table.fleet_to_wake(str(target.version), target.fleet)
        if fleet is not None:
            self._start(fleet)
        return fleet

    def _start(self, fleet: FleetState) -> None:
        if not fleet.failed and (fleet.name not in self.waking or self.waking[fleet.name].done()):
            self.waking[fleet.name] = asyncio.ensure_future(self._wake(fleet))
