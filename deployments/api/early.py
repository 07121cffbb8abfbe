"""A stream that begins with comment lines while its first event is still awaited (``gateway.early_comment_s``).

A proxy in front of the gateway, or a client, may give up on a connection that stays silent while a fleet wakes or an engine is busy. A comment
(``: waiting``) means nothing to a client of server-sent events. It commits the answer to status 200 and its headers: an error that comes
later is an event of the stream, and the headers cannot name the version, which is not known yet. Each event of the answer names it.
"""

import asyncio
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Self

import orjson

from cluster.errors import SpringtideError
from deployments.http import Send
from deployments.routing.forms import Form

COMMENT = b": waiting\n\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EarlyStream:
    """A `Send` in front of another. Every ``after_s`` of silence it sends a comment, until the answer begins."""

    def __init__(self, send: Send, after_s: float, form: Form) -> None:
        self._send = send
        self.after_s = after_s
        self.form = form
        self.opened = False
        self.failed = False
        """Whether the answer turned out to be an error."""
        self.sending = asyncio.Lock()
        """Held while a comment is sent: what is half sent must not be cut."""
        self.comments: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.comments = asyncio.create_task(self._comment())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """An error that was to be a whole answer becomes the stream's last event, where the stream has begun."""
        await self._stop()
        if not (self.opened and isinstance(error, SpringtideError)):
            return False
        await self._send({"type": "http.response.body", "body": self.form.event(self.form.body(error))})
        return True

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if self.comments is not None:
            await self._stop()
        if not self.opened:
            return await self._send(message)
        if message["type"] == "http.response.start":
            self.failed = message["status"] != 200
        elif self.failed:
            await self._send({**message, "body": self.form.event(orjson.loads(message["body"]))})
        else:
            await self._send(message)

    async def _comment(self) -> None:
        while True:
            await asyncio.sleep(self.after_s)
            async with self.sending:
                if not self.opened:
                    await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                    self.opened = True
                await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})

    async def _stop(self) -> None:
        if self.comments is not None:
            async with self.sending:
                self.comments.cancel()
            self.comments = None
