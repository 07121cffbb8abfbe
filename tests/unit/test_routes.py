"""The table of routes: what a path takes, HEAD, OPTIONS, and what is not there."""

import asyncio
from typing import Any

import orjson
import pytest

from cluster.errors import MethodNotAllowed, RouteNotFound
from deployments.http import send_error, send_json
from deployments.routes import ANY, Route, Routes


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send_json(send, 200, {"path": scope["path"], **scope["path_params"]})


ROUTES = Routes(
    Route("GET", "/v1/models", answer),
    Route("GET", "/v1/models/*", answer),
    Route("POST", "/v1/completions", answer),
    Route(ANY, "/admin/*", answer),
    Route("GET", "/jobs", answer),
    Route("POST", "/jobs", answer),
    Route("GET", "/jobs/{name}/logs", answer),
)


def ask(method: str, path: str, *headers: tuple[bytes, bytes]) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ROUTES({"method": method, "path": path, "headers": headers}, None, send))  # pyright: ignore[reportArgumentType]
    return sent


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/m"),
        ("GET", "/v1/models/"),
        ("GET", "//v1//models///m/"),
        ("POST", "/v1/completions/"),
        ("POST", "/v1/completions"),
        ("PUT", "/admin/x"),
        ("GET", "/jobs"),
        ("POST", "/jobs"),
        ("GET", "/jobs/a/logs"),
    ],
)
def test_a_path_takes_its_methods(method: str, path: str) -> None:
    assert ask(method, path)[0]["status"] == 200


def test_a_handler_finds_the_named_part_of_the_path() -> None:
    assert orjson.loads(ask("GET", "/jobs/m@1/logs")[1]["body"])["name"] == "m@1"


def test_head_is_get_without_the_body() -> None:
    """It was 405."""
    got, head = ask("GET", "/v1/models"), ask("HEAD", "/v1/models")
    assert head[0] == got[0] and [message["body"] for message in head[1:]] == [b""]


def test_options_says_what_the_path_takes() -> None:
    for path, allow in (("/v1/models", b"GET, HEAD, OPTIONS"), ("/jobs", b"GET, POST, HEAD, OPTIONS")):
        start = ask("OPTIONS", path)[0]
        assert start["status"] == 204 and (b"allow", allow) in start["headers"]


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [("GET", "/v1/completions", ()), ("OPTIONS", "/v1/completions", ((b"access-control-request-method", b"POST"),))],
)
def test_another_method_and_a_preflight_are_refused_with_what_the_path_takes(method: str, path: str, headers: Any) -> None:
    """405 came without `Allow`."""
    with pytest.raises(MethodNotAllowed) as caught:
        ask(method, path, *headers)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(send_error(send, caught.value))
    assert sent[0]["status"] == 405 and (b"allow", b"POST, OPTIONS") in sent[0]["headers"]


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/modelsx", "/admin", "/admin/", "/jobs/{name}/logs/x", "/jobs//logs", "/jobs/a/b/logs"]
)
def test_what_is_not_in_the_table_is_not_there(path: str) -> None:
    with pytest.raises(RouteNotFound):
        ask("GET", path)
