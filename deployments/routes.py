"""One table of what the gateway answers: a path, the methods that it takes, and the handler."""

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from cluster.errors import MethodNotAllowed, RouteNotFound
from deployments.http import Handler, Receive, Scope, Send
from deployments.wire import header


class Route(NamedTuple):
    path: str
    """A whole path, or with ``*`` at its end every path that begins so."""
    methods: tuple[str, ...]
    """Empty: the handler looks at the method itself."""
    handle: Handler


class Routes:
    """One table of what a path takes. HEAD is answered wherever GET is, and OPTIONS everywhere."""

    def __init__(self, *routes: Route) -> None:
        self.exact = {route.path: route for route in routes if not route.path.endswith("*")}
        self.prefixes = [(route.path[:-1], route) for route in routes if route.path.endswith("*")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Raises `RouteNotFound`, or `MethodNotAllowed` with what the path takes."""
        path, method = scope["path"], scope["method"]
        route = self.exact.get(path) or next((route for prefix, route in self.prefixes if path.startswith(prefix)), None)
        if route is None:
            known = ", ".join(path for path in self.exact)
            raise RouteNotFound(f"There is no {method} {path[:200]} here.", f"There are {known}.")
        if not route.methods or method in route.methods:
            return await route.handle(scope, receive, send)
        if method == "HEAD" and "GET" in route.methods:
            return await route.handle(scope, receive, without_body(send))
        await refuse_method(scope, send, route.methods)


async def refuse_method(scope: Scope, send: Send, methods: tuple[str, ...]) -> None:
    """Answer OPTIONS with what the path takes; raise `MethodNotAllowed` for everything else.

    A browser's preflight is refused as well: it asks whether another site's page may call, and no page may.
    """
    allow = (*methods, *(("HEAD",) if "GET" in methods else ()), "OPTIONS")
    if scope["method"] == "OPTIONS" and not header(scope["headers"], "access-control-request-method"):
        headers = [(b"allow", ", ".join(allow).encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        return await send({"type": "http.response.body"})
    words = f"{scope['method']} is not what {scope['path'][:200]} takes."
    raise MethodNotAllowed(words, f"It takes {', '.join(allow)}.", allow=allow)


def without_body(send: Send) -> Send:
    """HEAD: what GET answers, less the body."""

    async def bare(message: MutableMapping[str, Any]) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return bare
