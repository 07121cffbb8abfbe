"""Tables of what the gateway answers: a method, a path, and the handler. The API has one table, and ``/admin`` another."""

import re
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from cluster.errors import MethodNotAllowed, RouteNotFound
from deployments.http import Handler, Receive, Scope, Send
from deployments.wire import header

SLASHES = re.compile("/+")
ANY = "*"
"""The method of a route whose handler looks at the method itself."""


class Route(NamedTuple):
    method: str
    path: str
    """``{name}`` stands for one part of a path, and ``*`` at the end for any rest."""
    handle: Handler


class Routes:
    """A table of routes, and an ASGI application. HEAD is answered wherever GET is, and OPTIONS everywhere."""

    def __init__(self, *routes: Route) -> None:
        self.routes = routes
        handlers: dict[str, dict[str, Handler]] = {}
        for route in routes:
            handlers.setdefault(route.path, {})[route.method] = route.handle
        self.exact = {path: found for path, found in handlers.items() if not _is_pattern(path)}
        """Path → method → handler."""
        self.patterns = [(_pattern(path), found) for path, found in handlers.items() if _is_pattern(path)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. The handler finds the parts of the path in ``scope["path_params"]``.

        Raises `RouteNotFound`, or `MethodNotAllowed` with the methods of the path.
        """
        method, path = scope["method"], plain_path(scope["path"])
        handlers, parts = self._find(method, path)
        scope = {**scope, "path": path, "path_params": parts}
        if handle := handlers.get(method) or handlers.get(ANY):
            return await handle(scope, receive, send)
        if method == "HEAD" and "GET" in handlers:
            return await handlers["GET"](scope, receive, without_body(send))
        await refuse_method(scope, send, tuple(handlers))

    def _find(self, method: str, path: str) -> tuple[dict[str, Handler], dict[str, str]]:
        """The handlers of a path by their methods, and the parts of the path by their names."""
        if handlers := self.exact.get(path):
            return handlers, {}
        for pattern, handlers in self.patterns:
            if match := pattern.fullmatch(path):
                return handlers, match.groupdict()
        known = ", ".join(f"{route.method} {route.path}" for route in self.routes if route.method != ANY)
        raise RouteNotFound(f"There is no {method} {path[:200]} here.", f"There are {known}.")


def plain_path(path: str) -> str:
    """The path without doubled slashes, and without one at its end: clients join a base URL and a route in every way.

    >>> plain_path("//v1//models/"), plain_path("/")
    ('/v1/models', '/')
    """
    return (SLASHES.sub("/", path).rstrip("/") or "/") if path.endswith("/") or "//" in path else path


def _is_pattern(path: str) -> bool:
    return "{" in path or path.endswith("*")


def _pattern(path: str) -> re.Pattern[str]:
    """
    >>> _pattern("/jobs/{name}/logs").fullmatch("/jobs/j-1/logs")["name"]
    'j-1'
    """
    named = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path))
    return re.compile(re.sub(r"\\\*$", ".*", named), re.DOTALL)


async def refuse_method(scope: Scope, send: Send, methods: tuple[str, ...]) -> None:
    """Answer OPTIONS with what the path takes; raise `MethodNotAllowed` for everything else.

    A browser's preflight is refused as well: it asks whether another site's page may call, and no page may.
    """
    allow = (*methods, *(("HEAD",) if "GET" in methods else ()), "OPTIONS")
    if scope["method"] == "OPTIONS" and not header(scope["headers"], "access-control-request-method"):
        headers = [(b"allow", ", ".join(allow).encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        return await send({"type": "http.response.body"})
    words = f"{scope['path'][:200]} does not take {scope['method']}."
    raise MethodNotAllowed(words, f"It takes {', '.join(allow)}.", allow=allow)


def without_body(send: Send) -> Send:
    """HEAD: what GET answers, less the body."""

    async def bare(message: MutableMapping[str, Any]) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return bare
