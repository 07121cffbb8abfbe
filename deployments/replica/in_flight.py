"""The requests in flight in front of one engine: who may enter, who is being answered, and how to end them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from deployments import wire
from deployments.http import Receive, Scope, Send


class InFlight:
    """ASGI middleware that admits requests for the versions that ``admits`` says, and counts them by version."""

    def __init__(self, app: Any, admits: Callable[[str], bool]) -> None:
        self.app = app
        self.admits = admits
        self.answering: Counter[str] = Counter()
        """Version id → requests in flight."""
        self.used_s: dict[str, float] = {}
        """Version id → when it was last asked for."""
        self.busy_until_s = 0.0
        """When a request last ended."""
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        return self.answering.total()

    def streams(self, apart_from: str | None) -> int:
        """How many requests are in flight, those of one version left out."""
        return sum(count for id, count in self.answering.items() if id != apart_from)

    def cut(self) -> None:
        """End every request in flight. The gateways see a broken connection, and say so to the client."""
        for task in self.tasks:
            task.cancel()

    def idle(self, for_s: float) -> bool:
        """Whether no request has been in flight for so long."""
        return not self.running and time.monotonic() - self.busy_until_s > for_s

    async def until_answered(self, version: str, limit_s: float) -> bool:
        """Wait until no request for the version is in flight. False where some still are after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if not self.answering[version]:
                return True
            await asyncio.sleep(0.02)
        return not self.answering[version]

    async def until_quiet(self, quiet_s: float, limit_s: float) -> None:
        """Wait until no request has been in flight for ``quiet_s`` from now on, but not longer than ``limit_s``."""
        began_s = quiet_since_s = time.monotonic()
        while (now_s := time.monotonic()) - quiet_since_s < quiet_s and now_s - began_s < limit_s:
            await asyncio.sleep(0.1)
            if self.running or self.busy_until_s > quiet_since_s:
                quiet_since_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = wire.header(scope["headers"], wire.VERSION)
        if not self.admits(version):
            return await refuse(send, wire.CLOSED)
        self.answering[version] += 1
        self.used_s[version] = time.monotonic()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (uvicorn runs each request in a task)
        self.tasks.add(task)
        try:
            await self.app(scope, receive, send)
        finally:
            self.tasks.discard(task)
            self.answering -= Counter([version])
            self.busy_until_s = time.monotonic()


async def refuse(send: Send, status: int) -> None:
    """Answer with a status and no body."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})
