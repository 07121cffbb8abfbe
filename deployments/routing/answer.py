"""Where an answer goes: to the client, and past the trace where one is kept.

An answer begins and ends by ASGI, so that Serve counts it and adds its headers. What a stream sends between the two goes to the client's
connection itself, where there is one (`deployments.uvicorn_patches`).
"""

from cluster.errors import SpringtideError
from deployments.http import Headers, Send
from deployments.routing.forms import Form
from deployments.routing.measure import Trace
from deployments.uvicorn_patches import ClientConnection


class Answer:
    """One request's."""

    def __init__(self, send: Send, headers: Headers, trace: Trace | None, connection: ClientConnection | None = None) -> None:
        """``headers``: what every answer to this request has."""
        self.trace = trace
        self._send = send
        self._headers = headers
        self._connection = connection
        self._held: list[bytes] = []
        """Pieces that wait for `drain`, where there is no connection to write to."""

    async def start(self, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        lines = [(b"content-type", content_type), *headers, *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": lines})
        if self._connection is not None and not self._connection.streams:
            self._connection = None

    async def whole(self, body: bytes) -> None:
        """The body, all of it."""
        self._saw(body)
        await self._send({"type": "http.response.body", "body": body})

    def write(self, events: bytes) -> bool:
        """Send whole events of a stream. Returns whether `drain` must come before the next."""
        self._saw(events)
        if self._connection is None:
            self._held.append(events)
            return True
        self._connection.write(events)
        return self._connection.full

    async def drain(self) -> None:
        """Wait for a client that reads slowly."""
        if self._connection is not None:
            return await self._connection.drain()
        held, self._held = b"".join(self._held), []
        await self._send({"type": "http.response.body", "body": held, "more_body": True})

    async def end(self) -> None:
        """Of a stream."""
        await self._send({"type": "http.response.body", "body": b"".join(self._held)})

    async def fail(self, error: SpringtideError, form: Form) -> None:
        """The last event of a stream that has begun and cannot go on: a well-formed error of the route's form."""
        if self.trace is not None:
            self.trace.failed = True
        self._held.append(form.event(form.body(error)))
        await self.end()

    def _saw(self, piece: bytes) -> None:
        if self.trace is not None:
            self.trace.saw(piece)
