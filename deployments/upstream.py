"""Choose a replica, stream its bytes, retry before the first one. Nothing is parsed or re-serialised per token.

A replica that dies before its first byte is tried again on another. After the first byte the client gets a well-formed error event and
never a silent end: only whole server-sent events are passed on, so the error cannot land inside a half-sent one.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from cluster.errors import BadRequest, BodyTooLarge, ContextExceeded, NoReplica, ReplicaLost, SpringtideError
from cluster.types import ReplicaState, VersionId
from deployments.table import Table

CONNECT_TIMEOUT_S = 2
EVENT_END = b"\n\n"
EVENT_STREAM = "text/event-stream"
LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Call:
    """One request to the engine: ``body`` is the JSON to post, ``headers`` what the answer to the client must carry."""

    version: VersionId
    path: str
    body: bytes
    request_id: str
    headers: Headers


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

    async def forward(self, call: Call, send: Send) -> None:
        """Answer ``call`` through ``send``. Raises a `SpringtideError` only while nothing has been sent."""
        tried: set[str] = set()
        last_words = ""
        while True:
            try:
                replica = self.table.choose(call.version, time.monotonic(), frozenset(tried))
            except NoReplica as none:
                raise (ReplicaLost(f"Every replica failed: {last_words}", none.do) if last_words else none) from None
            tried.add(replica.id)
            try:
                return await self._try(replica, call, send)
            except (ReplicaLost, *LOST) as error:
                last_words = str(error) or type(error).__name__
                self.table.suspect(replica.id, time.monotonic())

    async def _try(self, replica: ReplicaState, call: Call, send: Send) -> None:
        headers = {
            "content-type": "application/json",
            "x-springtide-secret": replica.secret,
            "x-request-id": f"{call.request_id}-{secrets.token_hex(4)}",  # the engine refuses an id that is in flight already
        }
        with self._counted(replica):
            async with self.session.post(replica.url + call.path, data=call.body, headers=headers) as response:
                if response.status != 200:
                    raise engine_error(response.status, await response.read())
                if response.content_type == EVENT_STREAM:
                    await _relay_events(response, call.headers, send)
                else:
                    await _relay_document(response, call.headers, send)

    @contextmanager
    def _counted(self, replica: ReplicaState) -> Iterator[None]:
        self.table.in_flight[replica.id] += 1
        try:
            yield
        finally:
            self.table.in_flight[replica.id] -= 1


async def _relay_document(response: aiohttp.ClientResponse, headers: Headers, send: Send) -> None:
    """A whole JSON answer, read to its end first: until then another replica can still be tried."""
    body = await response.read()
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), length, *headers]}
    )
    await send({"type": "http.response.body", "body": body})


async def _relay_events(response: aiohttp.ClientResponse, headers: Headers, send: Send) -> None:
    chunk = await response.content.readany()
    content_type = (b"content-type", b"text/event-stream; charset=utf-8")
    await send(
        {"type": "http.response.start", "status": 200, "headers": [content_type, (b"cache-control", b"no-cache"), *headers]}
    )
    rest = b""
    try:
        while chunk:
            whole, rest = whole_events(rest + chunk if rest else chunk)
            if whole:
                await send({"type": "http.response.body", "body": whole, "more_body": True})
            chunk = await response.content.readany()
    except LOST as error:
        lost = ReplicaLost(f"The replica ended while it was answering ({type(error).__name__}).", "Send the request again.")
        event = b"data: " + orjson.dumps(lost.body()) + EVENT_END
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def whole_events(buffer: bytes) -> tuple[bytes, bytes]:
    r"""Split after the last complete server-sent event.

    >>> whole_events(b"data: a\n\ndata: b")
    (b'data: a\n\n', b'data: b')
    """
    if buffer.endswith(EVENT_END):
        return buffer, b""
    end = buffer.rfind(EVENT_END)
    return (b"", buffer) if end < 0 else (buffer[: end + 2], buffer[end + 2 :])


def engine_error(status: int, body: bytes) -> SpringtideError:
    """The engine's refusal in our own family, so that ``type`` and ``code`` are OpenAI's and not the engine's.

    vLLM answers ``{"error": {"message", "type": "BadRequestError", "param", "code": 400}}``.
    """
    message, param = _engine_words(body)
    if status == 404:
        return ReplicaLost(f"The replica does not hold the version any more: {message}", "Send the request again.")
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
