"""Choose a replica, stream its bytes, retry before the first one. Nothing is parsed or re-serialised per token.

A replica that dies before its first byte is tried again on another. After the first byte the client gets a well-formed error event and
never a silent end: only whole server-sent events are passed on, so the error cannot land inside a half-sent one.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
import orjson

from cluster.errors import AnswerTimeout, BadRequest, BodyTooLarge, ContextExceeded, NoReplica, ReplicaLost, SpringtideError
from cluster.types import ReplicaState, VersionId
from deployments.http import Headers, Send
from deployments.routing.measure import Trace
from deployments.routing.table import Table
from deployments.wire import is_closed, request_headers

CONNECT_TIMEOUT_S = 2
EVENT_END = b"\n\n"
EVENT_STREAM = "text/event-stream"
ERROR_EVENT = b'data: {"error"'
DONE = b"data: [DONE]\n\n"
ATTEMPTS = 2
"""A request that has cost one replica its life may cost a second; never the whole fleet."""
LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)


@dataclass(frozen=True)
class Call:
    """One request to the engine: ``body`` is the JSON to post."""

    version: VersionId
    path: str
    body: bytes
    request_id: str


@dataclass(frozen=True)
class Answer:
    """Where the answer goes: to the client, under ``headers``, and past the ``trace`` where one is kept."""

    send: Send
    headers: Headers
    trace: Trace | None

    async def start(self, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        lines = [(b"content-type", content_type), *headers, *self.headers]
        await self.send({"type": "http.response.start", "status": 200, "headers": lines})

    async def pass_on(self, chunk: bytes, more: bool) -> None:
        if self.trace is not None:
            self.trace.saw(chunk)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def fail(self, error: SpringtideError) -> None:
        """End a stream that has begun with a well-formed error event."""
        if self.trace is not None:
            self.trace.failed = True
        event = b"data: " + orjson.dumps(error.body()) + EVENT_END
        await self.send({"type": "http.response.body", "body": event, "more_body": True})


class Upstream:
    """Connections to the replicas of every fleet, kept alive between requests."""

    def __init__(self, table: Table, first_byte_timeout_s: float) -> None:
        self.table = table
        self.session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=first_byte_timeout_s),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        )

    async def close(self) -> None:
        await self.session.close()

    async def forward(self, call: Call, answer: Answer) -> None:
        """Answer ``call``. Raises a `SpringtideError` only while nothing has been sent; `NoReplica` where a newer view may help."""
        tried: dict[str, str] = {}
        while len(tried) < ATTEMPTS:
            try:
                replica = self.table.choose(call.version, time.monotonic(), frozenset(tried))
            except NoReplica:
                if not tried:
                    raise
                break
            try:
                return await self._try(replica, call, answer)
            except aiohttp.SocketTimeoutError:
                raise AnswerTimeout("The replica took too long to answer.", "Ask for fewer tokens, or try again later.") from None
            except (ReplicaLost, *LOST) as error:
                tried[replica.id] = str(error) or type(error).__name__
                self.table.suspect(replica.id, time.monotonic())
        raise ReplicaLost(f"The replica failed: {'; '.join(tried.values())}", "Send the request again.")

    async def _try(self, replica: ReplicaState, call: Call, answer: Answer) -> None:
        unique = f"{call.request_id}-{secrets.token_hex(4)}"  # the engine refuses an id that is in flight already
        headers = request_headers(replica.secret, str(call.version), unique)
        with self._counted(replica):
            async with self.session.post(replica.url + call.path, data=call.body, headers=headers) as response:
                if is_closed(response.status, response.content_length):
                    raise NoReplica(f"The replica is leaving {call.version}.", "Send the request again.")
                if response.status != 200:
                    raise engine_error(response.status, await response.read())
                if response.content_type == EVENT_STREAM:
                    await _relay_events(response, answer)
                else:
                    await _relay_document(response, answer)

    @contextmanager
    def _counted(self, replica: ReplicaState) -> Iterator[None]:
        self.table.in_flight[replica.id] += 1
        try:
            yield
        finally:
            self.table.in_flight[replica.id] -= 1


async def _relay_document(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """A whole JSON answer, read to its end first: until then another replica can still be tried."""
    body = await response.read()
    await answer.start(b"application/json", (b"content-length", str(len(body)).encode()))
    await answer.pass_on(body, more=False)


async def _relay_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Pass whole events on. Ends with the engine's ``[DONE]`` or with an error event of ours, never with both and never with neither."""
    chunk = await response.content.readany()
    if chunk.startswith(ERROR_EVENT):
        raise stream_error(chunk)
    await answer.start(b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))
    try:
        await _relay_to_the_end(chunk, response, answer)
    except (SpringtideError, TimeoutError, *LOST) as error:
        await answer.fail(error if isinstance(error, SpringtideError) else broken(error))
    await answer.send({"type": "http.response.body", "body": b""})


async def _relay_to_the_end(chunk: bytes, response: aiohttp.ClientResponse, answer: Answer) -> None:
    rest, done = b"", False
    while chunk:
        whole, rest = whole_events(rest + chunk if rest else chunk)
        if ERROR_EVENT in whole:  # raw in a stream it is the engine's own: inside an answer's text the quotes are escaped
            raise stream_error(whole[whole.index(ERROR_EVENT) :])
        if whole:
            done = whole.endswith(DONE)
            await answer.pass_on(whole, more=True)
        chunk = await response.content.readany()
    if not done:
        raise ReplicaLost("The stream ended before it was done.", "Send the request again.")


def broken(error: Exception) -> ReplicaLost:
    return ReplicaLost(f"The replica ended while it was answering ({type(error).__name__}).", "Send the request again.")


def whole_events(buffer: bytes) -> tuple[bytes, bytes]:
    r"""Split after the last complete server-sent event.

    >>> whole_events(b"data: a\n\ndata: b")
    (b'data: a\n\n', b'data: b')
    """
    if buffer.endswith(EVENT_END):
        return buffer, b""
    end = buffer.rfind(EVENT_END)
    return (b"", buffer) if end < 0 else (buffer[: end + 2], buffer[end + 2 :])


def stream_error(events: bytes) -> SpringtideError:
    """The engine reports an error inside a stream as ``data: {"error": {…, "code": 500}}``, and ends the stream as if all were well."""
    event = events.split(EVENT_END, 1)[0].removeprefix(b"data: ")
    try:
        status = int(orjson.loads(event)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        status = 500
    return engine_error(status, event)


def engine_error(status: int, body: bytes) -> SpringtideError:
    """The engine's refusal in our own family, so that ``type`` and ``code`` are OpenAI's and not the engine's.

    vLLM answers ``{"error": {"message", "type": "BadRequestError", "param", "code": 400}}``.
    """
    message, param = _engine_words(body)
    if status in (401, 403, 404):  # it was replaced, or does not hold the version any more
        return ReplicaLost(f"The replica does not answer for the version any more: {message}", "Send the request again.")
    if status >= 500:
        return ReplicaLost(message, "Send the request again; `springtide status` shows the replicas.")
    if status == 413:
        return BodyTooLarge(message, param=param)
    too_long = "context length" in message or "max_model_len" in message
    return (ContextExceeded if too_long else BadRequest)(message, param=param)


def _engine_words(body: bytes) -> tuple[str, str | None]:
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"]), error.get("param")
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "the engine gave no reason", None
