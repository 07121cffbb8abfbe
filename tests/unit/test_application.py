"""The gateway's application: forms of errors, and which pages of other sites may call it."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.config import Config, parse
from cluster.errors import ConfigError
from cluster.types import FleetState, Generation, ReplicaState, VersionId, View
from deployments.api.application import Application
from deployments.api.inference import Routing
from deployments.routing.budget import Budget
from deployments.routing.measure import Recorder
from deployments.routing.router import Router
from deployments.routing.table import Table

HI = [{"role": "user", "content": "Hi"}]
PAGE = "https://chat.example.org"
ONE = VersionId("m", 1)


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    """Of a pool whose only model makes vectors. Nothing here reaches an engine."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    values = {**Config().dump(), "home": str(tmp_path), "store": tmp_path.as_uri(), "gateway": {"cors_origins": [PAGE]}}
    table = Table()
    move = Generation(alias="m", generation=1, stable=ONE, reason="", author="", time_s=0)
    replica = ReplicaState("r", "", "", "m@1", {"m@1": "d"}, {}, 0, app="fleet-m")
    table.adopt(View(1, {"m": move}, (replica,), {"m": FleetState("m", "m", ("m@1",), "fleet-m", task="embed")}, {"m": "m"}))

    async def wake(_: FleetState) -> None: ...

    nothing: Any = None
    parts = Routing(Router(table, wake), nothing, nothing, Recorder(), nothing, Budget(4, 4096, 4))
    return Application(parse(values), parts)


def ask(application: Application, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": orjson.dumps(body)}

    async def send(message: Any) -> None:
        sent.append(message)

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
    asyncio.run(application(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def test_each_route_answers_in_the_form_that_its_clients_expect(application: Application) -> None:
    status, _, body = ask(application, "POST", "/v1/messages", {"model": "m", "messages": HI, "max_tokens": 1})
    error = orjson.loads(body)
    assert status == 404 and error["type"] == "error" and error["error"]["type"] == "not_found_error"
    assert "m is of the task embed" in error["error"]["message"] and "/v1/embeddings" in error["error"]["message"]
    status, _, body = ask(application, "POST", "/v1/chat/completions/", {"model": "m", "messages": HI})
    assert (status, orjson.loads(body)["error"]["code"]) == (404, "model_not_supported")
    status, _, body = ask(application, "POST", "//v1/messages/", [])
    assert (status, orjson.loads(body)["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")])
def test_an_answer_that_is_not_kept_is_said_to_be_so(application: Application, method: str, path: str) -> None:
    status, _, body = ask(application, method, path)
    assert status == 404 and "No answer is kept" in orjson.loads(body)["error"]["message"]


def test_whoever_packs_a_body_in_another_way_hears_which_way_is_taken(application: Application) -> None:
    status, headers, _ = ask(application, "POST", "/v1/chat/completions", {"model": "m"}, content_encoding="br")
    assert (status, headers["accept-encoding"]) == (415, "gzip")


def test_the_list_of_models_says_what_each_is_for(application: Application) -> None:
    assert {entry["task"] for entry in orjson.loads(ask(application, "GET", "/v1/models")[2])["data"]} == {"embed"}


PREFLIGHT = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,x-stainless-os"}


def test_a_page_of_an_allowed_origin_may_ask_and_read_the_answer(application: Application) -> None:
    status, headers, body = ask(application, "OPTIONS", "/v1/chat/completions", origin=PAGE, **PREFLIGHT)
    assert (status, body, headers["access-control-allow-origin"], headers["vary"]) == (204, b"", PAGE, "origin")
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == PREFLIGHT["access_control_request_headers"]
    for path in ("/v1/models", "/v1/nowhere"):
        assert ask(application, "GET", path, origin=PAGE)[1]["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", ["https://chat.example.org.evil.net", "http://chat.example.org", "null"])
def test_no_other_page_may(application: Application, origin: str) -> None:
    status, headers, _ = ask(application, "OPTIONS", "/v1/chat/completions", origin=origin, **PREFLIGHT)
    assert (status, headers["allow"]) == (405, "POST, OPTIONS") and "access-control-allow-origin" not in headers
    assert ask(application, "GET", "/v1/models")[1]["vary"] == "origin", "or a cache would hand this answer to a page that may"
    assert "access-control-allow-origin" not in ask(application, "GET", "/v1/models", origin=origin)[1]


def test_no_page_may_use_what_belongs_to_the_operator(application: Application) -> None:
    application.cors_origins = ("*",)
    assert ask(application, "GET", "/v1/models", origin="https://any.example")[1]["access-control-allow-origin"]
    for path in ("/admin/status", "//admin/status"):
        status, headers, _ = ask(application, "OPTIONS", path, origin="https://any.example", **PREFLIGHT)
        assert status == 401 and "access-control-allow-origin" not in headers, path


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/", "https://*.example.org", ""])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.cors_origins"):
        parse({"gateway": {"cors_origins": [origin]}})
