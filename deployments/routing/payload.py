"""A request's body with the place of ``model`` left open: serialised once, whichever version answers in the end. No I/O."""

from typing import Any

import orjson

from cluster.errors import BadRequest
from cluster.types import VersionId
from deployments.routing.query_of_death import Shape, size_class, unusual


class Payload:
    """Example: ``{"model": "m", "n": 2}`` is kept as ``"n":2}``, and sent as ``{"model":"m@1","n":2}``."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.streams = bool(body.get("stream"))
        self._rest = _dump({key: value for key, value in body.items() if key != "model"})[1:]
        self.unusual = unusual(body)

    def __len__(self) -> int:
        return len(self._rest)

    def shape(self, path: str) -> Shape:
        """What the request has in common with others to ``path``, for `deployments.routing.query_of_death`."""
        return Shape(path, self.unusual, size_class(len(self)))

    def named(self, version: VersionId) -> bytes:
        """The body to post for ``version``."""
        comma = b"," if len(self._rest) > 1 else b""
        return b'{"model":"%s"%s%s' % (str(version).encode(), comma, self._rest)


def _dump(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:  # it reads deeper than it writes
        raise BadRequest(f"The body is nested too deeply: {error}.", "Send one flat JSON object.") from None
