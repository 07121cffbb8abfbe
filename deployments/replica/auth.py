"""In front of a replica's engine: lets only the gateways in, counts who is being answered, and closes while weights change."""

import asyncio
import hmac
import time
from collections import Counter
from typing import Any

from deployments.http import Receive, Scope, Send
from deployments.wire import CLOSED, FORBIDDEN, SECRET, VERSION, header


class AuthMiddleware:
    """ASGI middleware around the engine's application: lets only the gateway in, and counts the requests in flight."""

    def __init__(self, app: Any, secret: str) -> None:
        self.app = app
        self.secret = secret.encode()
        self.running = 0
        self.closed = False
        """While the replica takes other weights over: whoever comes is sent away, and comes back by the gateway's newer view."""
        self.busy_until_s = 0.0
        self.answering: Counter[str] = Counter()
        """Version id → requests in flight."""
        self.used_s: dict[str, float] = {}
        """Version id → when it was last asked for."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """Of the requests in flight."""

    def cut(self) -> None:
        """End every request in flight. The gateways see a broken connection, and say so to the client."""
        for task in self.tasks:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks anything else
            return await send({"type": "websocket.close"})
        if not hmac.compare_digest(header(scope["headers"], SECRET).encode("latin-1"), self.secret):
            return await _refuse(send, FORBIDDEN)
        if self.closed:
            return await _refuse(send, CLOSED)
        version = header(scope["headers"], VERSION)
        self.running += 1
        self.answering[version] += 1
        self.used_s[version] = time.monotonic()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (uvicorn runs each request in a task)
        self.tasks.add(task)
        try:
            await self.app(scope, receive, send)
        finally:
            self.tasks.discard(task)
            self.running -= 1
            self.answering[version] -= 1
            self.busy_until_s = time.monotonic()


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})
