"""ASGI's types, and whole JSON answers, for every route of the gateway."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from cluster.errors import SpringtideError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


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
