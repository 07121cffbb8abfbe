"""The gateway's application: forms of errors, and what it says of models."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.config import Config, parse
from cluster.types import FleetState, Generation, ReplicaState, VersionId, View
from deployments.api.application import Application
from deployments.api.inference import Routing
from deployments.routing.budget import Budget
from deployments.routing.measure import Recorder
from deployments.routing.router import Router
from deployments.routing.table import Table

ONE = VersionId("m", 1)


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    """Of a pool whose only model makes vectors. Nothing here reaches an engine."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    values = {**Config().dump(), "home": str(tmp_path), "store": tmp_path.as_uri()}
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
    status, _, body = ask(application, "POST", "/v1/messages", {"model": "m", "messages": [], "max_tokens": 1})
    error = orjson.loads(body)
    assert status == 404 and error["type"] == "error" and error["error"]["type"] == "not_found_error"
    assert "m is of the task embed" in error["error"]["message"] and "/v1/embeddings" in error["error"]["message"]
    status, _, body = ask(application, "POST", "/v1/chat/completions/", {"model": "m", "messages": []})
    assert (status, orjson.loads(body)["error"]["code"]) == (404, "model_not_supported")
    status, _, body = ask(application, "POST", "//v1/messages/", [])
    assert (status, orjson.loads(body)["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")])
def test_an_answer_that_is_not_kept_is_said_to_be_so(application: Application, method: str, path: str) -> None:
    status, _, body = ask(application, method, path)
    assert status == 404 and "No answer is kept" in orjson.loads(body)["error"]["message"]


def test_the_list_of_models_says_what_each_is_for(application: Application) -> None:
    assert {entry["task"] for entry in orjson.loads(ask(application, "GET", "/v1/models")[2])["data"]} == {"embed"}
