"""How an engine's process ends: it is told to, nobody owns it for too long, or vLLM died."""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

from cluster import logs
from cluster.control.client import tell
from deployments.replica.hosting import Hosting
from deployments.replica.lifecycle import Life, State

WATCH_S = 0.2
"""How often is looked whether vLLM died."""
REPLY_S = 0.5
"""How long the last answers of a process that ends have to get out."""

log = logs.logger(__name__)


class Ending:
    """Ends this process, in order where it can. Created in the event loop of the engine's actor."""

    def __init__(self, life: Life, unowned_s: float) -> None:
        """``unowned_s``: how long the engine may be without its first owner."""
        self.life = life
        self.hosting: Hosting | None = None
        """None until vLLM has started."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.timer = self._timer(unowned_s)

    def started(self, hosting: Hosting) -> None:
        self.hosting = hosting
        self._run(self._watch(hosting))

    def after(self, seconds: float) -> None:
        """End then, unless the engine is owned by then."""
        self.timer.cancel()
        self.timer = self._timer(seconds)

    async def end(self) -> None:
        """Let answers in flight finish, stop vLLM, and exit."""
        if self.life.state is State.ENDED:
            return
        self.life.to(State.ENDED)
        try:
            if self.hosting is not None:
                await self.hosting.shut()
        finally:
            self.exit_soon(0)

    def exit_soon(self, status: int) -> None:
        asyncio.get_running_loop().call_later(REPLY_S, os._exit, status)

    async def _watch(self, hosting: Hosting) -> None:
        """End this process soon after vLLM died. The replica ends with it, and Serve starts another at once.

        Example: a request raises in vLLM's engine process. Every request in flight gets a 500, no new one is admitted, control drops the
        replica from the gateways' view, and half a second later the process is gone.
        """
        while self.life.state is not State.ENDED:
            await asyncio.sleep(WATCH_S)
            if self.life.state is State.BROKEN:
                await asyncio.sleep(REPLY_S)  # control must hear why the swap failed before it forgets this replica
                return self._die()
            if not hosting.vllm.dead:
                continue
            if self.life.state is State.ASLEEP:
                return await self.end()
            if self.life.admits:  # in other states the call that needed vLLM fails, and decides
                self.life.to(State.BROKEN)
                return self._die()

    def _die(self) -> None:
        log.error("vLLM died, or could not go back to its weights: this process ends")
        if self.life.owner is not None:
            tell("leaving", self.life.owner.id)
        self.exit_soon(1)

    def _timer(self, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, lambda: self._run(self._expire()))

    async def _expire(self) -> None:
        if self.life.owner is None:
            await self.end()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self.tasks.discard)
