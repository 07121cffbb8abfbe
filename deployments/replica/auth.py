"""Authentication in front of a replica's engine: only the gateways know the secret."""

import hmac
from typing import Any

from deployments import wire
from deployments.http import Receive, Scope, Send
from deployments.replica.in_flight import refuse


class AuthMiddleware:
    """ASGI middleware: 403 without the engine's secret, and nothing but HTTP."""

    def __init__(self, app: Any, secret: str) -> None:
        self.app = app
        self.secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # vLLM has WebSocket routes, and no gateway uses them
            return await send({"type": "websocket.close"})
        if not hmac.compare_digest(wire.header(scope["headers"], wire.SECRET).encode("latin-1"), self.secret):
            return await refuse(send, wire.FORBIDDEN)
        await self.app(scope, receive, send)
