"""``/admin``: what an operator may ask, for whoever holds the pool's token. `cluster.client` is its client.

One table (`operations`) has every operation: the method, the path, what it calls, and what its body must be. Most of them pass the request
to the control actor. What the actor raises reaches the client as it is.
"""

import hmac
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.exceptions import RayError, RayTaskError

from cluster.config import Config
from cluster.errors import BadRequest, PoolUnavailable, SpringtideError, Unauthorized
from cluster.pool import local
from cluster.publishing.rollout import Policy
from cluster.store.objects import Store
from deployments.api.uploads import Uploads
from deployments.http import Handler, Headers, Receive, Scope, Send, body_chunks, parse_json, read_body, send_json
from deployments.routes import Route, Routes

MAX_BODY_BYTES = 64 << 10


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Order(Body):
    claimed_author: str = "operator"
    """The name that the client gives itself. Nothing verifies it: everybody who has the pool's token may write any."""


class Publish(Order):
    version: str
    alias: str
    reason: str
    policy: Policy | None = None
    """None: the pool's own (``publishing.policy``)."""


class Step(Order):
    """Promote or abort."""

    alias: str
    reason: str
    version: str | None = None
    """The version whose rollout is meant. None: whichever is under way when the order is carried out."""


class Rollback(Order):
    alias: str
    reason: str
    to: str | None = None


class Submit(Order):
    """A job: the verb, and its options as `cluster.jobspec` has them."""

    verb: str
    options: dict[str, Any]


class AddFleet(Order):
    name: str
    overrides: dict[str, Any] = {}
    """What the fleet has of its own, as under ``fleets:`` in the configuration."""


class Request(NamedTuple):
    """What an operation sees of a request."""

    name: str
    """The part of the path that ``{name}`` stands for; empty where the path has none."""
    query: dict[str, str]
    body: Any
    """An instance of the operation's body; None where it has none."""
    chunks: AsyncIterator[bytes]
    """The raw body, for an operation that streams it."""


class Operation(NamedTuple):
    method: str
    path: str
    call: Callable[[Request], Awaitable[Any]]
    """Returns the JSON document of the answer."""
    body: type[Body] | None = None


class Control:
    """The control actor, asked by a method's name."""

    def __init__(self, actor: Callable[[], Any]) -> None:
        self.actor = actor

    async def __call__(self, method: str, *arguments: Any) -> Any:
        """What the method returns, as plain JSON values. Raises what it raises, or `PoolUnavailable` where nobody answers."""
        try:
            return plain(await getattr(self.actor(), method).remote(*arguments))
        except RayTaskError as error:
            if isinstance(error.cause, SpringtideError):
                raise error.cause from None
            raise
        except RayError as error:
            raise PoolUnavailable(
                "The control actor does not answer.", "It restarts by itself; try again in some seconds."
            ) from error


def operations(control: Control, uploads: Uploads) -> tuple[Operation, ...]:
    return (
        Operation("GET", "/admin/status", lambda _: control("status")),
        Operation("GET", "/admin/slots", lambda request: control("allocation", since(request.query))),
        Operation("GET", "/admin/models", lambda _: control("models")),
        Operation(
            "GET", "/admin/models/{name}", lambda request: control("version" if "@" in request.name else "models", request.name)
        ),
        Operation("GET", "/admin/history/{name}", lambda request: control("history", request.name)),
        Operation("GET", "/admin/rollouts/{name}", lambda request: control("rollout", request.name)),
        Operation("POST", "/admin/publish", lambda request: publish(control, request.body), Publish),
        Operation("POST", "/admin/promote", lambda request: step(control, "promote", request.body), Step),
        Operation("POST", "/admin/abort", lambda request: step(control, "abort", request.body), Step),
        Operation("POST", "/admin/rollback", lambda request: rollback(control, request.body), Rollback),
        Operation("GET", "/admin/fleets", lambda _: as_list("fleets", control("fleets"))),
        Operation("POST", "/admin/fleets", lambda request: as_list("fleets", add_fleet(control, request.body)), AddFleet),
        Operation("DELETE", "/admin/fleets/{name}", lambda request: as_list("fleets", remove_fleet(control, request))),
        Operation("GET", "/admin/jobs", lambda request: as_list("jobs", control("jobs", whole(request.query, "limit", 20)))),
        Operation("POST", "/admin/jobs", lambda request: submit(control, request.body), Submit),
        Operation("GET", "/admin/jobs/{name}", lambda request: control("job", request.name)),
        Operation(
            "POST",
            "/admin/jobs/{name}/cancel",
            lambda request: control("cancel", request.name, request.body.claimed_author),
            Order,
        ),
        Operation(
            "GET", "/admin/jobs/{name}/logs", lambda request: control("logs", request.name, whole(request.query, "offset", 0))
        ),
        Operation("GET", "/admin/jobs/{name}/events", lambda request: as_list("events", events(control, request))),
        Operation("PUT", "/admin/uploads", lambda request: uploads.take(request.chunks)),
    )


def publish(control: Control, order: Publish) -> Awaitable[Any]:
    return control("publish", order.version, order.alias, order.reason, order.claimed_author, order.policy)


def step(control: Control, what: str, order: Step) -> Awaitable[Any]:
    return control(what, order.alias, order.reason, order.claimed_author, order.version)


def rollback(control: Control, order: Rollback) -> Awaitable[Any]:
    return control("rollback", order.alias, order.to, order.reason, order.claimed_author)


async def submit(control: Control, order: Submit) -> dict[str, str]:
    return {"id": await control("submit", order.verb, order.options, order.claimed_author)}


def events(control: Control, request: Request) -> Awaitable[Any]:
    return control("job_events", request.name, whole(request.query, "limit", 100))


def add_fleet(control: Control, order: AddFleet) -> Awaitable[Any]:
    return control("add_fleet", order.name, order.overrides, order.claimed_author)


def remove_fleet(control: Control, request: Request) -> Awaitable[Any]:
    force, author = request.query.get("force") == "true", request.query.get("claimed_author", Order().claimed_author)
    return control("remove_fleet", request.name, force, author)


async def as_list(key: str, rows: Awaitable[Any]) -> dict[str, Any]:
    return {key: await rows}


class Admin:
    """The handler of every path under ``/admin``: it checks the token, reads the body, and answers."""

    def __init__(self, actor: Callable[[], Any], config: Config) -> None:
        self.token = local.token().encode()
        self.max_upload_bytes = config.training.max_data_bytes
        self.operations = operations(Control(actor), Uploads(Store(config.store), self.max_upload_bytes))
        self.routes = Routes(*(Route(one.method, one.path, self._handler(one)) for one in self.operations))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whoever has no token does not learn which paths there are."""
        self._check_token(scope["headers"])
        await self.routes(scope, receive, send)

    def _handler(self, operation: Operation) -> Handler:
        async def handle(scope: Scope, receive: Receive, send: Send) -> None:
            chunks = body_chunks(scope, receive, self.max_upload_bytes, "training.max_data_bytes")
            body = read_order(operation.body, await read_body(scope, receive, MAX_BODY_BYTES)) if operation.body else None
            name = scope["path_params"].get("name", "")
            await send_json(send, 200, await operation.call(Request(name, query(scope["query_string"]), body, chunks)))

        return handle

    def _check_token(self, headers: Headers) -> None:
        offered = next((value for name, value in headers if name == b"authorization"), b"")
        if not hmac.compare_digest(offered, b"Bearer " + self.token):  # as long for a wrong token as for the right one
            raise Unauthorized(
                "The admin routes need the pool's token.",
                "Send it as `Authorization: Bearer …`. The `springtide` command takes it from SPRINGTIDE_API_KEY, and "
                "`springtide env --client` prints it where the pool runs.",
            )


def plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def query(raw: bytes) -> dict[str, str]:
    """
    >>> query(b"since_s=12.5&x=")
    {'since_s': '12.5'}
    """
    return {key: values[0] for key, values in parse_qs(raw.decode("latin-1")).items()}


def since(asked: dict[str, str]) -> float:
    """``since_s`` of a query, in seconds since the epoch; without it the beginning. Raises `BadRequest`.

    >>> since({"since_s": "12.5"}), since({})
    (12.5, 0.0)
    """
    text = asked.get("since_s", "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRequest(f"since_s: {text[:50]!r} is no number.", "Send a time in seconds since 1970.", param="since_s")
    return value


def whole(asked: dict[str, str], name: str, default: int) -> int:
    """A number of a query that counts something. Raises `BadRequest`."""
    text = asked.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise BadRequest(f"{name}: {text[:50]!r} is no whole number.", "Send 0 or more.", param=name)
    return int(text)


def read_order(kind: type[Body], raw: bytes) -> Body:
    """The body of an operation, checked. Raises `BadRequest` naming the field at fault."""
    try:
        return kind.model_validate(parse_json(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where, wanted = ".".join(map(str, first["loc"])), ", ".join(kind.model_fields)
        raise BadRequest(f"{where}: {first['msg']}.", f"Send {wanted}.", param=where) from None
