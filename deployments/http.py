"""ASGI's types, and whole bodies in and out, for every route of the gateway."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from cluster.errors import BadRequest, BodyTooLarge, SpringtideError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

DISCARD_TIMEOUT_S = 5


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The request's body. Raises `BodyTooLarge` before more than ``limit_bytes`` are held."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    parts: list[bytes] = []
    size_bytes = int(announced) if announced.isdigit() and int(announced) > limit_bytes else 0
    message: MutableMapping[str, Any] = {}
    while size_bytes <= limit_bytes:
        message = await receive()
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
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
    """The JSON object in a body. Raises `BadRequest`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", "Send one JSON object.") from None
    if not isinstance(body, dict):
        raise BadRequest(f"The body is a JSON {type(body).__name__}.", "Send one JSON object.")
    return body


async def send_json(send: Send, status: int, document: Any, headers: Headers | None = None) -> None:
    body = orjson.dumps(document)
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: SpringtideError, headers: Headers | None = None) -> None:
    """OpenAI's error object, with what HTTP wants beside some statuses."""
    close = [(b"connection", b"close")] if error.status == 413 else []  # the rest of the body is not read
    later = [(b"retry-after", str(error.retry_after_s).encode())] if error.retry_after_s else []
    await send_json(send, error.status, error.body(), [*close, *later, *(headers or [])])
