"""Which pages of other sites may call the API from a browser: those of ``gateway.cors_origins``, none by default. ``/admin`` is never one.

A browser asks first (a preflight: OPTIONS with the method it is about to use), and shows a page an answer only where the answer names its
origin (https://fetch.spec.whatwg.org/#http-cors-protocol).
"""

from collections.abc import MutableMapping
from typing import Any

from deployments.http import Headers, Scope, Send
from deployments.routes import plain_path
from deployments.wire import MODEL_GENERATION, MODEL_VERSION, REQUEST_ID, header

EVERY = "*"
VARY = (b"vary", b"origin")
REMEMBER_S = 600
"""How long a browser need not ask again."""
EXPOSED = ", ".join((REQUEST_ID, MODEL_VERSION, MODEL_GENERATION, "retry-after"))
"""The headers of an answer that a page may read."""


def allowed_origin(scope: Scope, origins: tuple[str, ...]) -> str:
    """The origin of the page that asks, where it may; else empty."""
    origin = header(scope["headers"], "origin") if origins else ""
    may = bool(origin) and (origin in origins or EVERY in origins) and not plain_path(scope["path"]).startswith("/admin")
    return origin if may else ""


def is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and bool(header(scope["headers"], "access-control-request-method"))


async def answer_preflight(scope: Scope, send: Send, origin: str) -> None:
    """Any header may be sent: clients' libraries have many of their own, and none of them opens anything."""
    asked = header(scope["headers"], "access-control-request-headers")
    headers = [
        *_names(origin),
        (b"access-control-allow-methods", b"GET, HEAD, POST"),
        (b"access-control-allow-headers", asked.encode("latin-1") or b"*"),
        (b"access-control-max-age", str(REMEMBER_S).encode()),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body"})


def shown_to(origin: str, send: Send) -> Send:
    """``send`` with the headers that let a page of ``origin`` read the answer."""

    async def shown(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            exposed = (b"access-control-expose-headers", EXPOSED.encode())
            message = {**message, "headers": [*message["headers"], *_names(origin), exposed]}
        await send(message)

    return shown


def varying(send: Send) -> Send:
    """``send`` with what keeps a cache from handing an answer without those headers to such a page."""

    async def marked(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], VARY]}
        await send(message)

    return marked


def _names(origin: str) -> Headers:
    return [(b"access-control-allow-origin", origin.encode("latin-1")), VARY]
