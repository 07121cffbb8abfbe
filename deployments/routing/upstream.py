"""Choose a replica, stream its bytes, retry before the first one. Nothing is parsed or re-serialised per token, and no task runs for one.

A replica that dies before its first byte is tried again on another, and never on a third: the request may be what ended it
(`deployments.routing.query_of_death`). After the first byte the client gets a well-formed error event and never a silent end: only whole
server-sent events are passed on, so the error cannot land inside a half-sent one.

Clients hear that a replica failed; the reason, with addresses and the engine's own words, goes to the log.
"""

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from cluster import logs
from cluster.errors import AnswerTimeout, NoReplica, ReplicaLost, SpringtideError
from cluster.types import ReplicaState, VersionId
from deployments.routing.answer import Answer
from deployments.routing.connection import Connection, ConnectionLost, Connections, NeverConnected
from deployments.routing.engine_errors import AGAIN, EngineDied, engine_error, stream_error
from deployments.routing.engine_routes import EngineRoute
from deployments.routing.payload import Payload
from deployments.routing.query_of_death import Loss, Quarantine, Shape
from deployments.routing.table import Table
from deployments.wire import EVENT_END, is_closed, request_headers

EVENT_STREAM = "text/event-stream"
ATTEMPTS = 2
"""A request that has cost one replica its life may cost a second; never the whole fleet."""

log = logs.logger(__name__)


class Timeouts(NamedTuple):
    """Seconds that a replica may take."""

    first_byte_s: float
    """Until a stream's first byte."""
    idle_s: float
    """Between two reads of a stream."""
    whole_s: float
    """For a whole answer: its first byte comes when it is complete."""


@dataclass(frozen=True)
class Call:
    """One request to the engine."""

    version: VersionId
    route: EngineRoute
    payload: Payload
    request_id: str
    fleet: str = ""
    """Whose replicas are asked first (`Target.fleet`)."""

    @property
    def shape(self) -> Shape:
        return self.payload.shape(self.route.path)


class Upstream:
    """Connections to the replicas of every fleet, kept alive between requests."""

    def __init__(self, table: Table, timeouts: Timeouts) -> None:
        self.table = table
        self.timeouts = timeouts
        self.quarantine = Quarantine()
        self.connections = Connections()

    def close(self) -> None:
        self.connections.close()

    async def forward(self, call: Call, answer: Answer) -> None:
        """Answer ``call``. Raises a `SpringtideError` only while nothing has been sent; `NoReplica` where a newer view may help."""
        self.quarantine.admit(call.shape, call.request_id, time.monotonic())
        failed: set[str] = set()
        while len(failed) < ATTEMPTS:
            try:
                replica = self.table.choose(call.version, time.monotonic(), frozenset(failed), call.fleet)
                if await self._try(replica, call, answer):
                    return
                failed.add(replica.id)
            except NoReplica:
                if not failed:
                    raise
                break  # it is not asked anew what the model means now: that would begin two more attempts
            except TimeoutError:
                raise AnswerTimeout("The replica took too long to answer.", "Ask for fewer tokens, or try again later.") from None
        raise ReplicaLost(f"{'Two replicas' if len(failed) > 1 else 'The replica'} failed over the request.", AGAIN)

    async def _try(self, replica: ReplicaState, call: Call, answer: Answer) -> bool:
        """Whether the request has its answer. False where another replica may be asked."""
        with self._counted(replica):
            try:
                await self._ask(replica, call, answer)
            except (ReplicaLost, ConnectionLost) as error:
                log.warning("replica %s failed over request %s: %s", replica.id, call.request_id, _words(error))
                self.table.suspect(replica.id, time.monotonic())
                self._note_loss(replica, call, error)
                return False
        return True

    def _note_loss(self, replica: ReplicaState, call: Call, error: Exception) -> None:
        """Remember whether the request may have ended the engine. To be called while it counts as in flight."""
        said = isinstance(error, EngineDied)
        if isinstance(error, NeverConnected) or not isinstance(error, (EngineDied, ConnectionLost)):
            return
        log.warning("replica %s was lost over request %s: %s", replica.id, call.request_id, call.shape)
        alone = self.table.in_flight[replica.id] == 1 and replica.id not in self.table.buried
        self.quarantine.lost(call.shape, Loss(replica.id, said, alone), time.monotonic())
        if said:
            self.table.bury(replica.id)

    async def _ask(self, replica: ReplicaState, call: Call, answer: Answer) -> None:
        unique = f"{call.request_id}-{secrets.token_hex(4)}"  # the engine refuses an id that is in flight already
        headers = request_headers(replica.secret, str(call.version), unique)
        limit_s = self.timeouts.first_byte_s if call.payload.streams else self.timeouts.whole_s
        async with asyncio.timeout(limit_s) as limit, self.connections.to(replica.url) as connection:
            connection.ask(call.route.path, headers, call.payload.named(call.version))
            whole = await self._first(connection, call)
            limit.reschedule(None)  # what follows has a limit of its own
            if whole is None:
                return await self._relay_events(connection, replica, call, answer)
            await answer.start(b"application/json", (b"content-length", str(len(whole)).encode()))
            await answer.whole(whole)
            self.quarantine.answered(call.shape)

    async def _first(self, connection: Connection, call: Call) -> bytes | None:
        """A whole answer, or None once a stream has begun: until then, another replica can still be tried."""
        head = await connection.head()
        if is_closed(head.status, head.content_length):
            raise NoReplica(f"The replica is leaving {call.version}.", AGAIN)
        if head.status != 200:
            task = self.table.task(str(call.version), call.fleet)
            raise engine_error(head.status, await connection.body(), task, call.route.path)
        if head.content_type != EVENT_STREAM:
            return await connection.body()
        first = await connection.peek()
        if first.startswith(call.route.form.mark):
            raise stream_error(first)
        return None

    @contextmanager
    def _counted(self, replica: ReplicaState) -> Iterator[None]:
        self.table.in_flight[replica.id] += 1
        try:
            yield
        finally:
            self.table.in_flight[replica.id] -= 1

    async def _relay_events(self, connection: Connection, replica: ReplicaState, call: Call, answer: Answer) -> None:
        """Pass whole events on. Ends with the route's terminator or with an error event of ours, never with both and never with neither."""
        await answer.start(b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))
        try:
            await self._relay_to_the_end(connection, call.route, answer)
            self.quarantine.answered(call.shape)
        except (SpringtideError, TimeoutError, ConnectionLost) as error:
            log.warning("a stream of request %s broke: %s", call.request_id, _words(error))
            if isinstance(error, EngineDied):  # a connection that breaks here may have been cut for a swap of weights
                self._note_loss(replica, call, error)
            return await answer.fail(broken(error), call.route.form)
        await answer.end()

    async def _relay_to_the_end(self, connection: Connection, route: EngineRoute, answer: Answer) -> None:
        events = Events(route, answer)
        await connection.relay(events.take, answer.drain, self.timeouts.idle_s)
        if not events.done:
            raise ReplicaLost("The stream ended before it was done.", AGAIN)


class Events:
    """A stream's events on their way from a replica to the client."""

    def __init__(self, route: EngineRoute, answer: Answer) -> None:
        self.done = False
        """Whether the last event that was passed on is the one that ends such a stream."""
        self._terminator, self._mark = route.terminator, route.form.mark
        self._answer = answer
        self._rest = b""
        """The beginning of an event whose end has not come yet."""

    def take(self, piece: bytes) -> bool:
        """Pass on the events that are complete. Returns whether the client must be waited for. Raises what an error event of the engine says."""
        whole, self._rest = whole_events(self._rest + piece if self._rest else piece)
        if self._mark in whole:
            raise stream_error(whole[whole.index(self._mark) :])
        if not whole:
            return False
        self.done = self._terminator in whole
        return self._answer.write(whole)


def _words(error: Exception) -> str:
    """For the log."""
    return str(getattr(error, "words", error)) or type(error).__name__


def broken(error: Exception) -> SpringtideError:
    """What a client hears of a stream that has begun and cannot go on."""
    if isinstance(error, SpringtideError):
        return error
    if isinstance(error, TimeoutError):
        return AnswerTimeout("The replica stopped sending.", AGAIN)
    return ReplicaLost("The replica ended while it was answering.", AGAIN)


def whole_events(buffer: bytes) -> tuple[bytes, bytes]:
    r"""Split after the last complete server-sent event.

    >>> whole_events(b"data: a\n\ndata: b")
    (b'data: a\n\n', b'data: b')
    """
    if buffer.endswith(EVENT_END):
        return buffer, b""
    end = buffer.rfind(EVENT_END)
    return (b"", buffer) if end < 0 else (buffer[: end + 2], buffer[end + 2 :])
