"""The loop that keeps a gateway's view as new as control's, and the gateway's way to ask control.

Control pushes every change (`cluster.control.gateways`); the loop catches up on pushes that were missed. While control is away the gateway
goes on with the view that it has.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from cluster import logs
from cluster.types import ColdStage, ColdStart
from deployments.routing.router import Router

REFRESH_S = 1.0
MAX_BACK_OFF_S = 15.0
"""The longest pause between two attempts while control does not answer."""
ANSWER_TIMEOUT_S = 30
"""How long control may take to answer: a view waits for the end of a move."""
STAGE_TIMEOUT_S = 2

log = logs.logger(__name__)


class Refresh:
    def __init__(self, router: Router, connect: Callable[[], Any]) -> None:
        """``connect`` returns control's handle and may block for long: it is called in a thread. While Ray's own processes are away it does
        not return, and an event loop that waited for it would answer nobody."""
        self.router = router
        self.connect = connect
        self.control: Any = None
        self.configuration: dict[str, Any] = {}
        """What control should have. It is told again after it was away: a control that was started again has what it began with."""
        self.failed_since_s: float | None = None
        """When control stopped answering; None while it answers."""
        self._task: asyncio.Task[None] | None = None

    async def start(self, configuration: dict[str, Any]) -> None:
        """Hand control the configuration, take its view, and begin the loop. Raises what stands in the way: Serve then tries again."""
        self.control, self.configuration = await asyncio.to_thread(self.connect), configuration
        await self._hand_over()
        await self._catch_up()
        self._task = asyncio.create_task(self._loop())

    async def configure(self, configuration: dict[str, Any]) -> None:
        """Hand control another configuration; where it is away, as soon as it answers again."""
        self.configuration = configuration
        try:
            await self._hand_over()
        except (TimeoutError, RayError) as error:
            self._note_failure(error)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def check(self) -> None:
        """Raise where the loop has ended: this gateway would route by an old view for good. Serve replaces it then."""
        if self._task is not None and self._task.done():
            raise RuntimeError(f"the refresh of the view has ended: {self._task}")

    async def stage(self, fleet: str) -> ColdStart:
        """How far the first replica of a fleet is, in words for whoever waits for it."""
        try:
            async with asyncio.timeout(STAGE_TIMEOUT_S):
                return await self.control.stage.remote(fleet)
        except (TimeoutError, RayError):
            return ColdStart(ColdStage.QUEUED, "")

    async def _hand_over(self) -> None:
        """Tell control the configuration. One that is stuck counts as away: the loop must not wait for it for ever."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self.control.configure.remote(self.configuration)

    async def _catch_up(self) -> None:
        known = self.router.table.view
        async with asyncio.timeout(
            ANSWER_TIMEOUT_S
        ):  # asyncio.wait_for may lose a cancellation, and the loop would go on after `stop`
            news = await self.control.view.remote(known.revision)
        await self.router.adopt(news or known)

    async def _loop(self) -> None:
        pause_s = REFRESH_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                if self.failed_since_s is not None:  # the actor may have ended for good
                    self.control = await asyncio.to_thread(self.connect)
                    await self._hand_over()
                await self._catch_up()
                self._note_success()
                pause_s = REFRESH_S
            except Exception as error:  # noqa: BLE001 (the loop's edge)
                # Whatever it was (control restarts, Ray's head is away, an answer that cannot be read), the next attempt may succeed. A loop
                # that ended here would leave a gateway that looks well and routes by an old view for good.
                pause_s = min(2 * pause_s, MAX_BACK_OFF_S) if self.failed_since_s else REFRESH_S
                self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        """Say it once: control may be away for hours."""
        if self.failed_since_s is None:
            self.failed_since_s = time.monotonic()
            log.warning("control does not answer, the known view goes on: %s: %s", type(error).__name__, error)

    def _note_success(self) -> None:
        if self.failed_since_s is not None:
            log.info("control answers again after %.0f s", time.monotonic() - self.failed_since_s)
            self.failed_since_s = None
