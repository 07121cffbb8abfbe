"""The admin routes: the table, the token, the bodies."""

import asyncio
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, parse
from cluster.errors import BadRequest, BodyTooLarge, MethodNotAllowed, RouteNotFound, SpringtideError, Unauthorized
from cluster.store.objects import Store
from deployments.api.admin import Admin, Publish, Request, operations, query, read_order, since
from deployments.api.uploads import Uploads
from deployments.http import body_chunks, send_error


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: Any) -> Admin:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    config = parse({**Config().dump(), "home": str(tmp_path), "store": tmp_path.as_uri(), "training": {"max_data_bytes": 2000}})
    return Admin(Actor, config)


class Method:
    def __init__(self, name: str) -> None:
        self.name = name

    async def remote(self, *arguments: Any) -> Any:
        return {"asked": [self.name, *arguments]}


class Actor:
    """Control's actor: it answers with what it was asked."""

    def __getattr__(self, name: str) -> Method:
        return Method(name)


def ask(
    admin: Admin, method: str, path: str, token: str = "token", body: bytes = b"", length: int | None = None
) -> tuple[dict[str, Any], bytes]:
    """The start of the answer, and its body."""
    headers = [
        (b"authorization", f"Bearer {token}".encode()),
        (b"content-length", str(len(body) if length is None else length).encode()),
    ]
    messages = [{"type": "http.request", "body": body[at : at + 700], "more_body": True} for at in range(0, len(body), 700)]
    messages.append({"type": "http.disconnect"} if length else {"type": "http.request", "body": b""})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def whole() -> None:
        scope = {"method": method, "path": path, "headers": headers, "query_string": b""}
        try:
            await admin(scope, receive, send)
        except MethodNotAllowed as error:
            await send_error(send, error)

    asyncio.run(whole())
    return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


def answer(*asked: Any, **more: Any) -> Any:
    return json.loads(ask(*asked, **more)[1])


@pytest.mark.parametrize("path", ["/admin/status", "/admin/uploads", "/admin/nowhere"])
def test_without_the_token_there_is_nothing_here(admin: Admin, path: str) -> None:
    for token in ("", "toke", "tokens", "tøken"):
        with pytest.raises(Unauthorized):
            answer(admin, "GET", path, token)


def test_every_get_is_found_and_nothing_else(admin: Admin) -> None:
    for one in admin.operations:
        if one.method == "GET":
            asked = answer(admin, "GET", one.path.replace("{name}", "m@1"))
            assert ("m@1" in json.dumps(asked)) == ("{name}" in one.path)
    for path in (
        "/admin/",
        "/admin/history/",
        "/admin/history/a/b",
        "/admin/models/a/b",
        "/admin/statu",
        "/admin/{name}",
    ):
        with pytest.raises(RouteNotFound, match="GET /admin/status"):
            ask(admin, "GET", path)


def test_admin_paths_answer_head_and_options_as_all_others_do(admin: Admin) -> None:
    """Both were 405, and the admin table had a matching of its own."""
    got, (head, nothing) = ask(admin, "GET", "/admin/fleets"), ask(admin, "HEAD", "/admin/fleets")
    assert head == got[0] and got[1] and not nothing
    start, _ = ask(admin, "OPTIONS", "/admin/fleets")
    assert start["status"] == 204 and (b"allow", b"GET, POST, HEAD, OPTIONS") in start["headers"]


def test_another_method_is_refused_with_those_that_the_admin_path_takes(admin: Admin) -> None:
    for path, allow in (("/admin/publish", b"POST, OPTIONS"), ("/admin/jobs/m/logs", b"GET, HEAD, OPTIONS")):
        start, body = ask(admin, "PUT", path)
        assert start["status"] == 405 and (b"allow", allow) in start["headers"]
        assert f"It takes {allow.decode()}" in body.decode()


BODIES: dict[str, Any] = {
    "publish": {"version": "m@1", "alias": "m", "reason": "why"},
    "promote": {"alias": "m", "reason": "why"},
    "abort": {"alias": "m", "reason": "why"},
    "rollback": {"alias": "m", "reason": "why"},
    "fleets": {"name": "m"},
    "jobs": {"verb": "finetune", "options": {}},
    "cancel": {},
}


def test_every_operation_calls_a_method_that_control_has(admin: Admin) -> None:
    from cluster.control.actor import Control

    async def control(method: str, *arguments: Any) -> Any:
        inspect.signature(getattr(Control, method)).bind(None, *arguments)
        called.add(method)
        return []

    called: set[str] = set()
    table: Any = operations(control, Uploads(Store("memory:///"), 10))  # type: ignore[arg-type]
    for one in table:
        if one.path == "/admin/uploads":
            continue
        told = json.dumps(BODIES[one.path.rpartition("/")[2]]).encode() if one.body else b""
        body = read_order(one.body, told) if one.body else None
        for name in ("m", "m@1"):
            asyncio.run(one.call(Request(name, {}, body, None)))  # type: ignore[arg-type]
    assert called >= {
        "status",
        "models",
        "version",
        "publish",
        "promote",
        "abort",
        "rollback",
        "jobs",
        "submit",
        "logs",
        "job_events",
        "add_fleet",
    }


@pytest.mark.parametrize(
    "raw", [b"{}", b'{"version": 3, "alias": "a", "reason": ""}', b'{"version": "a@1", "alias": "a", "reason": "", "x": 1}']
)
def test_a_body_that_is_not_as_its_operation_wants_it_is_refused_with_the_field(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="Send claimed_author, version, alias, reason, policy") as raised:
        read_order(Publish, raw)
    assert raised.value.param in ("version", "x")


@pytest.mark.parametrize("raw", [b"since_s=soon", b"since_s=nan", b"since_s=inf", b"since_s=%00"])
def test_a_time_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="since_s"):
        since(query(raw))
    assert since(query(b"since_s=1.5&x=2")) == 1.5 and since(query(b"")) == 0.0


# uploads


def test_an_upload_is_an_object_called_by_its_digest(admin: Admin, tmp_path: Path) -> None:
    data = bytes(range(256)) * 7
    name = hashlib.sha256(data).hexdigest()
    for _ in range(2):  # the second time it is there already
        assert answer(admin, "PUT", "/admin/uploads", body=data) == {"source": f"upload:{name}", "size_bytes": len(data)}
    assert Store(tmp_path.as_uri()).get(f"uploads/{name}") == data


@pytest.mark.parametrize(
    ("body", "length", "error"),
    [
        (b"x" * 2001, None, BodyTooLarge),
        (b"x", 2001, BodyTooLarge),
        (b"x" * 100, 200, BadRequest),  # the client left
        (b"", None, BadRequest),
    ],
)
def test_an_upload_that_is_refused_leaves_nothing(
    admin: Admin, tmp_path: Path, body: bytes, length: int | None, error: type[SpringtideError]
) -> None:
    with pytest.raises(error):
        answer(admin, "PUT", "/admin/uploads", body=body, length=length)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_stream_ends_with_the_body() -> None:
    messages = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def collect() -> list[bytes]:
        return [chunk async for chunk in body_chunks({"headers": []}, receive, 10, "key")]

    assert asyncio.run(collect()) == [b"a", b"b"]
