"""``/admin``: what an operator may ask, for whoever holds the pool's token. `cluster.client` is its client."""

import hmac
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from pydantic import ValidationError
from ray.exceptions import RayError, RayTaskError

from cluster.errors import BadRequest, PoolUnavailable, RouteNotFound, SpringtideError, Unauthorized
from cluster.pool import local
from cluster.publishing.rollout import Policy
from cluster.types import Durable
from deployments.http import Headers, Receive, Scope, parse_json, read_body

MAX_BODY_BYTES = 64 << 10
HISTORY = "/admin/history/"


class Publish(Durable):
    """``POST /admin/publish``"""

    version: str
    alias: str
    reason: str
    author: str
    policy: Policy | None = None
    """None: the pool's own (``publishing.policy``)."""


class Step(Durable):
    """``POST /admin/promote`` and ``/admin/abort``"""

    alias: str
    reason: str
    author: str


class Rollback(Step):
    """``POST /admin/rollback``"""

    to: str | None = None


class Admin:
    """Checks the token and hands the request to the control actor, whose refusals come back as themselves."""

    def __init__(self, control: Callable[[], Any]) -> None:
        self.control = control
        self.token = local.token().encode()

    async def answer(self, method: str, path: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        self._check_token(scope["headers"])
        if (method, path) == ("GET", "/admin/status"):
            return await self._ask(self.control().status.remote())
        if (method, path) == ("GET", "/admin/slots"):
            return await self._ask(self.control().allocation.remote(since(scope["query_string"])))
        if method == "GET" and path.startswith(HISTORY):
            return await self._ask(self.control().history.remote(path.removeprefix(HISTORY)))
        if method != "POST" or path not in ORDERS:
            raise RouteNotFound(
                f"There is no {method} {path[:200]} here.",
                f"GET /admin/status, GET /admin/slots, GET {HISTORY}ALIAS and POST {', '.join(ORDERS)} are.",
            )
        order: Any = parse_order(ORDERS[path], parse_json(await read_body(scope, receive, MAX_BODY_BYTES)))
        rollout = await self._ask(self._call(path, order))
        return rollout.model_dump(mode="json")

    def _call(self, path: str, order: Any) -> Any:
        if isinstance(order, Publish):
            return self.control().publish.remote(order.version, order.alias, order.reason, order.author, order.policy)
        if isinstance(order, Rollback):
            return self.control().rollback.remote(order.alias, order.to, order.reason, order.author)
        return self.control().order.remote(order.alias, path.rpartition("/")[2], order.reason, order.author)

    def _check_token(self, headers: Headers) -> None:
        offered = next((value for name, value in headers if name == b"authorization"), b"")
        if not hmac.compare_digest(offered, b"Bearer " + self.token):
            raise Unauthorized(
                "The admin routes need the pool's token.", "Send it as `Authorization: Bearer …`; see `springtide env`."
            )

    async def _ask(self, reference: Any) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, SpringtideError):
                raise error.cause from None
            raise
        except RayError as error:
            raise PoolUnavailable(
                "The control actor does not answer.", "It restarts by itself; try again in some seconds."
            ) from error


ORDERS: dict[str, type[Durable]] = {
    "/admin/publish": Publish,
    "/admin/promote": Step,
    "/admin/abort": Step,
    "/admin/rollback": Rollback,
}


def since(query: bytes) -> float:
    """``since_s`` of a query, in seconds since the epoch; without it the beginning. Raises `BadRequest`.

    >>> since(b"since_s=12.5"), since(b"")
    (12.5, 0.0)
    """
    text = parse_qs(query.decode("latin-1")).get("since_s", ["0"])[0]
    try:
        since_s = float(text)
    except ValueError:
        since_s = math.nan
    if not math.isfinite(since_s):
        raise BadRequest(
            f"since_s: {text[:50]!r} is no number of seconds.", "Send a time in seconds since 1970.", param="since_s"
        )
    return since_s


def parse_order(kind: type[Durable], body: dict[str, Any]) -> Durable:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where, wanted = ".".join(map(str, first["loc"])), ", ".join(kind.model_fields)
        raise BadRequest(f"{where}: {first['msg']}.", f"Send {wanted}.") from None
