"""``/admin``: what an operator may ask, for whoever holds the pool's token. `cluster.admin` is its client."""

import hmac
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.exceptions import RayError, RayTaskError

from cluster import pool
from cluster.errors import BadRequest, PoolUnavailable, RouteNotFound, SpringtideError, Unauthorized
from deployments.asgi import Headers, Receive, Scope
from deployments.openai.inference import parse, read

MAX_BODY_BYTES = 64 << 10


class Publish(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: str
    alias: str
    reason: str
    author: str


class Admin:
    """Checks the token and hands the request to the control actor, whose refusals come back as themselves."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self.token = pool.token().encode()

    async def answer(self, method: str, path: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        self._check_token(scope["headers"])
        if (method, path) == ("GET", "/admin/status"):
            return await self._ask(self.control.status.remote())
        if (method, path) == ("POST", "/admin/publish"):
            order = publish_order(parse(await read(scope, receive, MAX_BODY_BYTES)))
            move = await self._ask(self.control.publish.remote(order.version, order.alias, order.reason, order.author))
            return move.model_dump(mode="json")
        raise RouteNotFound(f"There is no {method} {path[:200]} here.", "GET /admin/status and POST /admin/publish are.")

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


def publish_order(body: dict[str, Any]) -> Publish:
    try:
        return Publish.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}.", "Send version, alias, reason and author."
        ) from None
