"""The HTTP contract between a gateway and a replica, and the headers that a client sends and gets. Both sides read it here.

A request to a replica carries the replica's secret, the version that is asked for, and an id. A replica that takes other weights over
answers `CLOSED` without a body, and the gateway asks again what the model means.
"""

from collections.abc import Iterable

SECRET = "x-springtide-secret"  # noqa: S105 (a header's name)
"""Opens a replica. Only gateways know it (`cluster.types.ReplicaState.secret`)."""
VERSION = "x-springtide-version"
"""The version that the gateway asks a replica for."""
REQUEST_ID = "x-request-id"
MODEL_VERSION = "x-model-version"
"""On every answer to a client: the version that answered."""
MODEL_GENERATION = "x-model-generation"
"""On every answer to a client that named an alias: the alias's generation."""
SESSION = "x-session-id"
"""A client's own name for a session: one session stays on one side of a canary."""
DISCONNECT_DISABLED = b"x-request-disconnect-disabled"
"""Ray Serve's own header: with ``?1`` Serve goes on with a request that the client has left. HAProxy sets it (`cluster.pool.haproxy`)."""
EVENT_END = b"\n\n"
"""Ends one server-sent event of a stream, from a replica and to a client."""

CLOSED = 503
"""The status of a replica that takes other weights over. Without a body: a 503 of the engine has one."""
FORBIDDEN = 403
"""The status of a replica that does not know the secret. Without a body."""


def request_headers(secret: str, version: str, request_id: str) -> dict[str, str]:
    """The headers of a request to a replica."""
    return {"content-type": "application/json", SECRET: secret, VERSION: version, REQUEST_ID: request_id}


def is_closed(status: int, content_length: int | None) -> bool:
    """Whether a replica's answer says that it takes other weights over."""
    return status == CLOSED and not content_length


def header(headers: Iterable[tuple[bytes, bytes]], name: str) -> str:
    """The value of the first header of that name in an ASGI scope; empty where there is none.

    >>> header([(b"x-session-id", b"anna")], SESSION)
    'anna'
    """
    wanted = name.encode("latin-1")
    return next((value for key, value in headers if key == wanted), b"").decode("latin-1")
