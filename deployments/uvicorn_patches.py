"""uvicorn's connection to a client, below ASGI: a piece of a stream is written without a task, a dict and five coroutines, and a client's
leaving ends its request without three tasks that wait for it.

Ray Serve starts uvicorn itself and takes no protocol class, so `expose_connections` has uvicorn put each request's connection into its scope.
A contract test names uvicorn's version, and what this file relies on: ``RequestResponseCycle`` has the transport, the flow control, and what
was sent so far; ``HttpToolsProtocol.connection_lost`` marks it as disconnected (``uvicorn/protocols/http/httptools_impl.py``).
"""

import asyncio
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from uvicorn.protocols.http import httptools_impl

KEY = "springtide.connection"


class ClientConnection:
    """The client's end of one request."""

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._loop = asyncio.get_running_loop()

    @property
    def streams(self) -> bool:
        """Whether a body is under way, in chunks, and this is the connection's event loop. Its beginning and its end belong to ASGI."""
        cycle = self._cycle
        started = cycle.response_started and not cycle.response_complete
        in_chunks = bool(cycle.chunked_encoding) and cycle.scope["method"] != "HEAD"
        return started and in_chunks and asyncio.get_running_loop() is self._loop

    def write(self, piece: bytes) -> None:
        """Send a piece of the body, as one chunk of HTTP. It may only be called while `streams` holds. What has left hears nothing."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    @property
    def full(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self._cycle.flow.write_paused

    async def drain(self) -> None:
        """Return once the client has read enough, or has left."""
        await self._cycle.flow.drain()

    @property
    def left(self) -> bool:
        """Whether the client left before its answer was complete."""
        return self._cycle.disconnected

    def when_left(self, tell: Callable[[], Any]) -> None:
        """Call ``tell`` in this event loop as soon as `left` holds."""
        loop = asyncio.get_running_loop()
        self._cycle.when_left = lambda: loop.call_soon_threadsafe(tell)
        if self.left:
            loop.call_soon(tell)


def expose_connections() -> None:
    """Have uvicorn put a `ClientConnection` into the scope of each request that this process serves from now on, and tell it of a client's
    leaving."""
    cycle: Any = httptools_impl.RequestResponseCycle
    if getattr(cycle.__init__, "patched", False):
        return
    init = cycle.__init__

    def exposed(self: Any, scope: MutableMapping[str, Any], *more: Any, **named: Any) -> None:
        init(self, scope, *more, **named)
        scope[KEY] = ClientConnection(self)

    exposed.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    cycle.__init__ = exposed
    protocol: Any = httptools_impl.HttpToolsProtocol
    lost = protocol.connection_lost

    def told(self: Any, error: Exception | None) -> None:
        lost(self, error)
        if self.cycle is not None and self.cycle.disconnected and (tell := getattr(self.cycle, "when_left", None)):
            tell()

    protocol.connection_lost = told
    complete = protocol.on_message_complete

    def read_on(self: Any) -> None:
        """uvicorn stops reading while much of a body waits, and reads on with the next ``receive``. Nobody receives after the last piece, and a
        connection that is not read from is not seen to be lost."""
        complete(self)
        if not self.pipeline:  # else it has stopped because requests wait behind this one, and they are to stay few
            self.flow.resume_reading()

    protocol.on_message_complete = read_on


def has_connection(scope: MutableMapping[str, Any]) -> bool:
    """Whether `connection_of` would find one."""
    return KEY in scope


def connection_of(scope: MutableMapping[str, Any]) -> ClientConnection | None:
    """Take the connection that a request came by out of its scope, which would keep it alive in a circle. None where another server than a
    patched uvicorn serves the request."""
    return scope.pop(KEY, None)


@contextmanager
def ended_when_left(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """Cancel what this task does within as soon as the request's client leaves. There is nobody to be told of it then.

    Ray Serve can watch for that itself, by three tasks and a queue for each request. HAProxy asks it not to (`cluster.pool.haproxy`). Serve
    counts such a request as answered then.
    """
    connection: ClientConnection | None = scope.get(KEY)
    task = asyncio.current_task()
    if connection is None or task is None:
        yield
        return
    connection.when_left(task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not connection.left:
            raise  # somebody else ends this task
    finally:
        connection.when_left(lambda: None)
        scope.pop(KEY, None)  # see `connection_of`
