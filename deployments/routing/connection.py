"""HTTP/1.1 to a replica, for streams: pieces of an answer are handed on from the socket's callback, without a task or a queue between.

Parsing is httptools' (the parser of Node.js). A client library wakes a task for each piece.

A connection carries one request at a time and is kept for the next.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT_S = 2
KEEP_S = 60
"""How long a connection that carries nothing is used again. A replica closes it much later."""


class ConnectionLost(Exception):
    """The replica ended the connection before its answer was complete, or sent what is no HTTP."""


class NeverConnected(ConnectionLost):
    """The replica has not read anything."""


class Head(NamedTuple):
    """What comes before an answer's body."""

    status: int
    headers: Mapping[bytes, bytes]

    @property
    def content_type(self) -> str:
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")

    @property
    def content_length(self) -> int | None:
        """None where the body comes in chunks."""
        length = self.headers.get(b"content-length", b"")
        return int(length) if length.isdigit() else None


class Connection(asyncio.Protocol):
    """One connection to a replica."""

    def __init__(self, closed: "Callable[[Connection], None]") -> None:
        self.closed = closed
        """Called once the connection is gone."""
        self.idle_since_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._lost = False
        self._waiter: asyncio.Future[None] | None = None
        self._begin()
        self._complete = True  # nothing has been asked

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._head: Head | None = None
        self._pieces: list[bytes] = []
        self._complete = self._keep_alive = False
        self._failure: Exception | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._full = self._paused = False
        self._heard_s = self._loop.time()

    # one request

    def ask(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send a POST. Raises `NeverConnected` where the replica has closed the connection."""
        if self.lost:
            raise NeverConnected("The replica closed the connection.")
        self._begin()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: replica\r\n{lines}content-length: {len(body)}\r\n\r\n"
        self._transport.writelines((head.encode("latin-1"), body))

    async def head(self) -> Head:
        """Raises `ConnectionLost`, as all that follow."""
        while self._head is None:
            await self._progress()
        return self._head

    async def peek(self) -> bytes:
        """What has come of the body, as soon as there is something; `relay` hands it on. Empty at its end. No more is read before `relay`."""
        while not self._pieces and not self._complete:
            await self._progress()
        self._pause()
        return b"".join(self._pieces)

    async def body(self) -> bytes:
        """All that is left of the body."""
        while not self._complete:
            await self._progress()
        return self._taken()

    async def relay(self, take: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]], idle_s: float) -> None:
        """Hand every piece to ``take`` as it comes, to the end of the body. Where ``take`` says so, ``drain`` is awaited before the next.

        Raises what ``take`` raises, and `TimeoutError` after ``idle_s`` without a piece.
        """
        self._take = take
        self._pass_on()
        self._watch = self._loop.call_later(idle_s, self._check_idle, idle_s)
        try:
            while True:
                if self._full:
                    await drain()
                    self._full = False
                    self._heard_s = self._loop.time()  # the pause was the client's
                self._resume()
                if self._complete and self._failure is None:
                    return
                await self._progress()
        finally:
            self._watch.cancel()
            self._take = None

    def _pause(self) -> None:
        if not self._paused and not self.lost:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    def _taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _progress(self) -> None:
        """Return after something has changed."""
        if self._failure is not None:
            raise self._failure
        if self._lost:
            raise ConnectionLost("The replica closed the connection.")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pass_on(self) -> None:
        """Hand on what has come."""
        if self._take is not None and self._pieces:
            try:
                self._full = self._take(self._taken())
            except Exception as error:  # noqa: BLE001 (a callback's edge: `relay` raises it in its caller's task)
                self._failure = error
            if self._full:
                self._pause()
        if self._full or self._complete or self._failure is not None:
            self._wake()

    def _check_idle(self, idle_s: float) -> None:
        """One timer for a whole stream: it looks when the last piece came, and sets itself again."""
        left_s = idle_s if self._full else self._heard_s + idle_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._check_idle, idle_s)
        else:
            self._failure = TimeoutError()
            self._wake()

    # between two requests

    @property
    def reusable(self) -> bool:
        return self._keep_alive and not self._lost and not self._paused and self._failure is None

    @property
    def lost(self) -> bool:
        return self._lost or self._transport.is_closing()

    def abort(self) -> None:
        """Close it at once: the replica sees its client leave."""
        self._transport.abort()

    # called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._complete:  # nobody asked for this
            return self._transport.abort()
        self._heard_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(error)
        if self._take is None:
            self._wake()
        else:
            self._pass_on()

    def _fail(self, error: Exception) -> None:
        """What follows a complete answer cannot make it worse, but the connection is of no more use."""
        self._keep_alive = False
        if not self._complete:
            self._failure = ConnectionLost(f"The replica's answer is no HTTP: {error}.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._wake()
        self.closed(self)

    # called by the parser, which goes on where more bytes follow an answer

    def on_message_begin(self) -> None:
        self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if not self._complete:
            self._head = Head(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if not self._complete:
            self._complete, self._keep_alive = True, self._parser.should_keep_alive()  # which it knows in this callback only


class Connections:
    """The connections to all replicas that carry nothing now, by the replica's URL."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}

    @contextlib.asynccontextmanager
    async def to(self, url: str) -> AsyncGenerator[Connection]:
        """A connection for one request. It is closed where the request did not come to its end. Raises `NeverConnected`."""
        connection = self._known(url) or await self._connect(url)
        try:
            yield connection
        finally:
            self._keep(url, connection)

    def close(self) -> None:
        for connection in [one for each in self._idle.values() for one in each]:
            connection.abort()
        self._idle.clear()

    def _known(self, url: str) -> Connection | None:
        """The one that was used last: those that were not needed for long grow old and go."""
        idle = self._idle.get(url, [])
        while idle:
            connection = idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since_s < KEEP_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, url: str) -> Connection:
        at = urlsplit(url)
        loop = asyncio.get_running_loop()

        def closed(connection: Connection) -> None:
            self._forget(url, connection)

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: Connection(closed), at.hostname or "", at.port or 80)
        except (OSError, TimeoutError) as error:
            raise NeverConnected(f"{type(error).__name__}: {error}") from error
        return connection

    def _keep(self, url: str, connection: Connection) -> None:
        if not connection.reusable or connection.lost:
            return connection.abort()
        connection.idle_since_s = now_s = time.monotonic()
        idle = self._idle.setdefault(url, [])
        idle.append(connection)
        while now_s - idle[0].idle_since_s > KEEP_S:
            idle.pop(0).abort()

    def _forget(self, url: str, connection: Connection) -> None:
        if connection in (idle := self._idle.get(url, [])):
            idle.remove(connection)
        if not self._idle.get(url):
            self._idle.pop(url, None)
