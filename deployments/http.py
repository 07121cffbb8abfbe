"""ASGI's types, whole bodies in and out, and clients that leave, for every route of the gateway."""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from cluster.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    MethodNotAllowed,
    Overloaded,
    SpringtideError,
    UnsupportedEncoding,
)
from deployments.wire import DISCONNECT_DISABLED, header

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARD_TIMEOUT_S = 5
BODY_TIMEOUT_S = 60
"""How long a client may take to send a body that is read whole."""
BODY_PAUSE_S = 10
"""How long it may send nothing of it."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIPPED = ("gzip", "x-gzip")
"""One encoding by two names (RFC 9110, section 8.4.1.3)."""
GZIP = zlib.MAX_WBITS | 16
NAMES = {list: "array", str: "string", bool: "boolean", type(None): "null"}
"""JSON's names for what is no object; what is missing is a number."""
PIECE_BYTES = 64 << 10
MOST_MEMBERS = 1000
"""A gzip body may consist of members, one after the other (RFC 1952). Each costs time however small it is."""


async def until_left(handle: Handler, scope: Scope, receive: Receive, send: Send) -> None:
    """Handle a request and end it when its client leaves, where neither Serve looks nor a connection tells of it
    (`deployments.uvicorn_patches.ended_when_left`): Serve's own proxy, which HAProxy falls back on, passes it on by Ray.

    One task reads ``receive`` to the client's leaving, and the handler reads the copy.
    """
    messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(maxsize=8)

    async def copy() -> None:
        while True:
            message = await receive()
            await messages.put(message)
            if message["type"] == "http.disconnect":
                return

    work, left = asyncio.ensure_future(handle(scope, messages.get, send)), asyncio.ensure_future(copy())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        work.cancel()  # nothing, where it is done
    with contextlib.suppress(asyncio.CancelledError):
        await work


def ignores_leaving(scope: Scope) -> bool:
    """Whether Serve was told not to look whether the client leaves: HAProxy tells it."""
    return any(name == DISCONNECT_DISABLED for name, _ in scope["headers"])


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, took: Callable[[int], None] = lambda count: None) -> bytes:
    """The request's body, unpacked. ``took`` hears of the bytes as they come, and may raise.

    Raises `BodyTooLarge` before more than ``limit_bytes`` are held, and `BodyTimeout` where they do not come.
    """
    encoding = header(scope["headers"], "content-encoding").lower()
    if encoding not in ("", "identity", *GZIPPED):
        raise UnsupportedEncoding(f"The body is packed with {encoding[:40]!r}.", "Send it as it is, or with gzip.")
    now_s = asyncio.get_running_loop().time
    ends_s = now_s() + BODY_TIMEOUT_S

    def came(count: int) -> None:
        limit.reschedule(min(ends_s, now_s() + BODY_PAUSE_S))
        took(count)

    try:
        async with asyncio.timeout(min(BODY_TIMEOUT_S, BODY_PAUSE_S)) as limit:
            raw = await _read(scope, receive, limit_bytes, came)
    except TimeoutError:
        words = f"Nothing of the body came for {BODY_PAUSE_S} s, or not all of it within {BODY_TIMEOUT_S} s."
        raise BodyTimeout(words, "Send it faster.") from None
    if encoding not in GZIPPED:
        return raw
    body = await asyncio.to_thread(_unpack, raw, limit_bytes)
    took(len(body) - len(raw))
    return body


def _unpack(raw: bytes, limit_bytes: int) -> bytes:
    """All members of a gzip body. ``limit_bytes`` bounds what they unpack to together."""
    body, at = bytearray(), 0
    for _ in range(MOST_MEMBERS):
        at = _unpack_member(raw, at, body, limit_bytes)
        if at == len(raw):
            return bytes(body)
    raise BadRequest(f"The body has more than {MOST_MEMBERS} gzip members.", "Pack it as one.")


def _unpack_member(raw: bytes, at: int, body: bytearray, limit_bytes: int) -> int:
    """Append to ``body`` the member that begins at ``at``. Returns where it ends."""
    unpacker = zlib.decompressobj(GZIP)
    while not unpacker.eof:
        piece = raw[at : at + PIECE_BYTES]  # zlib copies what follows a member, so it must not get all of the rest
        if not piece:
            raise BadRequest("The body ended in the middle of its gzip stream.", "Send all of it.")
        try:
            body += unpacker.decompress(piece, limit_bytes + 1 - len(body))
        except zlib.error as error:
            raise BadRequest(f"The body is not gzip: {error}.", "Send it as it is, or packed with gzip.") from None
        if len(body) > limit_bytes:
            raise BodyTooLarge(f"The body is larger than {limit_bytes} bytes.", "Send less, or raise gateway.max_body_bytes.")
        at += len(piece) - len(unpacker.unused_data)
    return at


async def _read(scope: Scope, receive: Receive, limit_bytes: int, took: Callable[[int], None]) -> bytes:
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    parts: list[bytes] = []
    size_bytes = int(announced) if announced.isdigit() and int(announced) > limit_bytes else 0
    message: MutableMapping[str, Any] = {}
    while size_bytes <= limit_bytes:
        message = await receive()
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        took(len(parts[-1]))
        if not message.get("more_body"):
            break
    if size_bytes > limit_bytes:
        await _discard(receive, more=not parts or bool(message.get("more_body")), limit_bytes=4 * limit_bytes)
        raise BodyTooLarge(f"The body is larger than {limit_bytes} bytes.", "Send less, or raise gateway.max_body_bytes.")
    return b"".join(parts)


async def body_chunks(scope: Scope, receive: Receive, limit_bytes: int, limit: str) -> AsyncIterator[bytes]:
    """The request's body as it comes in. ``limit``: the key of the configuration that bounds it. Raises `BodyTooLarge`, and `BadRequest` where
    the client leaves before the end."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    size_bytes, more = 0, True
    too_large = BodyTooLarge(f"The body is larger than {limit_bytes} bytes.", f"Send less, or raise {limit}.")
    if announced.isdigit() and int(announced) > limit_bytes:
        await _discard(receive, True, 4 << 20)
        raise too_large
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The body ended early.", "Send it again.")
        size_bytes += len(message.get("body", b""))
        if size_bytes > limit_bytes:
            raise too_large
        yield message.get("body", b"")
        more = bool(message.get("more_body"))


async def _discard(receive: Receive, more: bool, limit_bytes: int) -> None:
    """Read on for a moment: a client that is still sending would see its connection break, and not the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while more and limit_bytes > 0:
                message = await receive()
                limit_bytes -= len(message.get("body", b""))
                more = bool(message.get("more_body"))


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body, after a byte order mark or without one. Raises `BadRequest`."""
    try:
        body = orjson.loads(raw.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", "Send one JSON object, in UTF-8.") from None
    if not isinstance(body, dict):
        raise BadRequest(f"The body is a JSON {NAMES.get(type(body), 'number')}.", "Send one JSON object.")
    return body


async def send_json(send: Send, status: int, document: Any, headers: Headers | None = None) -> None:
    body = orjson.dumps(document)
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send,
    error: SpringtideError,
    headers: Headers | None = None,
    form: Callable[[SpringtideError], dict[str, Any]] = SpringtideError.body,
) -> None:
    """The error in the form that the route's clients expect, OpenAI's by default, with the headers that some statuses need."""
    more: Headers = list(headers or [])
    if isinstance(error, BodyTooLarge | BodyTimeout | Overloaded):  # the rest of the body is not read
        more.append((b"connection", b"close"))
    if error.retry_after_s:
        more.append((b"retry-after", str(error.retry_after_s).encode()))
    if isinstance(error, UnsupportedEncoding):
        more.append((b"accept-encoding", b"gzip"))
    if isinstance(error, MethodNotAllowed) and error.allow:
        more.append((b"allow", ", ".join(error.allow).encode()))
    await send_json(send, error.status, form(error), more)
