"""A pool over HTTP: errors arrive as they left, and nothing in the environment leads a command elsewhere."""

import ast
import contextlib
import hashlib
import http.server
import io
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import errors
from cluster.cli import jobs, patience, publishing
from cluster.client import Client
from cluster.endpoint import Endpoint
from cluster.errors import PoolUnavailable, Refused, SpringtideError, received
from cluster.publishing.rollout import Policy, begin
from cluster.types import VersionId
from tests.conftest import ROOT, free_ports

FAMILY = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SpringtideError) and kind is not Refused
]


class Gateway(http.server.BaseHTTPRequestHandler):
    """Answers with one document after the other, the last again and again, and remembers what it was asked."""

    status = 200
    documents: list[bytes]
    asked: list[tuple[str, str, str, bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.command, self.path, self.headers.get("authorization") or "", body))
        document = self.documents.pop(0) if len(self.documents) > 1 else self.documents[0]
        self.send_response(self.status)
        self.send_header("content-length", str(len(document)))
        self.end_headers()
        self.wfile.write(document)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def gateway(status: int, *documents: Any) -> Iterator[tuple[Client, list[tuple[str, str, str, bytes]]]]:
    told = [document if isinstance(document, bytes) else json.dumps(document).encode() for document in documents]
    kind = type("One", (Gateway,), {"status": status, "documents": told, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Client(Endpoint(f"http://127.0.0.1:{server.server_port}", "key")), kind.asked  # type: ignore[attr-defined]
        finally:
            server.shutdown()


@pytest.mark.parametrize("kind", FAMILY)
def test_an_error_arrives_as_it_left(kind: type[SpringtideError]) -> None:
    """It used to arrive as an internal error with status 500, whatever it was."""
    sent = kind("Somebody was faster.", "Look first.", "alias")
    with gateway(sent.status, sent.body()) as (client, _), pytest.raises(SpringtideError) as raised:
        client.history("seedling")
    for found in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert (found.status, found.code, found.type, found.param) == (sent.status, sent.code, sent.type, "alias")
        assert str(found) == str(sent)
        assert found.body() == sent.body()


def test_an_error_that_can_be_told_by_its_class_is_of_it() -> None:
    assert type(received(409, errors.Conflict("x").body())) is errors.Conflict
    assert type(received(404, errors.JobNotFound("x").body())) is errors.JobNotFound


@pytest.mark.parametrize("document", [{}, {"error": None}, {"error": {"code": "teapot", "type": "t"}}, [], "x", None, 3])
def test_an_error_of_another_server_keeps_its_status(document: Any) -> None:
    error = received(418, document)
    assert isinstance(error, Refused) and error.status == 418 and str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.code, str(again)) == (418, error.code, str(error))


def test_what_is_no_gateway_is_said_to_be_none() -> None:
    with gateway(502, b"<html>Bad gateway</html>") as (client, _), pytest.raises(PoolUnavailable, match="502 and no JSON"):
        client.status()
    (closed,) = free_ports(1)
    with pytest.raises(PoolUnavailable, match="does not answer"):
        Client(Endpoint(f"http://127.0.0.1:{closed}", "")).status()


def test_proxies_of_the_environment_never_take_a_command_elsewhere(monkeypatch: Any) -> None:
    """`ALL_PROXY` of the shell took the commands for the own pool to the proxy, or ended them with a traceback."""
    (closed,) = free_ports(1)
    for key in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(key, f"http://127.0.0.1:{closed}")
    monkeypatch.setenv("ALL_PROXY", "socks9://nowhere")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with gateway(200, {"slots": {}}) as (client, asked):
        assert client.status() == {"slots": {}}
    assert asked == [("GET", "/admin/status", "Bearer key", b"")]


def test_nothing_in_cluster_asks_a_proxy_of_the_environment() -> None:
    """`springtide run` ended with a traceback where `ALL_PROXY` named a scheme that httpx does not know."""
    calls = [
        (path.name, node)
        for path in (ROOT / "cluster").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("httpx.get", "httpx.post", "httpx.request", "httpx.stream", "httpx.Client")
    ]
    assert len(calls) >= 3
    trusting = [ast.unparse(node) for name, node in calls if "trust_env=False" not in ast.unparse(node)]
    assert trusting == ["httpx.Client(trust_env=True)"], "doctor's, which asks nobody"


def test_an_upload_sends_the_bytes_and_says_how_far_it_is(tmp_path: Path) -> None:
    file, told = tmp_path / "data.jsonl", list[int]()
    file.write_bytes(b"x" * 2_500_000)
    with gateway(200, {"source": "upload:0"}) as (client, asked):
        assert client.upload(file, told.append) == "upload:0"
    method, path, _, body = asked[0]
    assert (method, path, hashlib.sha256(body).digest()) == ("PUT", "/admin/uploads", hashlib.sha256(file.read_bytes()).digest())
    assert told == [1 << 20, 2 << 20, 2_500_000]


def test_watching_a_rollout_costs_one_request_a_look_however_many_there_were(monkeypatch: Any) -> None:
    """It listed every record of every rollout of the alias twice a second, and asked for the whole status beside."""
    begun = begin("m", 7, VersionId("m", 2), VersionId("m", 1), Policy(), "by hand", "me", 0.0)
    stages = (begun.next("warming", "", 1.0), begun.next("canary", "", 2.0, 5), begun.next("live", "", 3.0))
    told = [{"record": one.model_dump(mode="json"), "seen": {"waiting_for": "requests"}} for one in stages]
    monkeypatch.setattr(publishing, "LOOK_AGAIN_S", 0)
    with gateway(200, *told) as (client, asked):
        assert publishing.watch(client, Console(file=io.StringIO()), begun).stage == "live"
    assert [path for _, path, _, _ in asked] == ["/admin/rollouts/m"] * 3


def test_a_watched_rollout_that_another_followed_is_found_by_its_number(monkeypatch: Any) -> None:
    """It was looked for by its place, and a history holds the newest rollouts only: an `IndexError`, or another rollout's end."""
    ids = VersionId("m", 2), VersionId("m", 1)
    seventh, eighth = (begin("m", number, *ids, Policy(), "by hand", "me", 0.0) for number in (70, 71))
    ended = seventh.next("rolled_back", "by hand", 1.0)
    told = {
        "moves": [],
        "rollouts": [[one.model_dump(mode="json") for one in records] for records in ([seventh, ended], [eighth])],
    }
    monkeypatch.setattr(publishing, "LOOK_AGAIN_S", 0)
    with gateway(200, {"record": eighth.model_dump(mode="json"), "seen": {}}, told) as (client, asked):
        assert publishing.watch(client, Console(file=io.StringIO()), seventh) == ended
    assert [path for _, path, _, _ in asked] == ["/admin/rollouts/m", "/admin/history/m"]


def test_a_gateway_that_is_silent_for_a_moment_does_not_end_the_following() -> None:
    """A rollout or a job was followed only until control was started again."""
    answers = iter([PoolUnavailable("away"), 2, PoolUnavailable("away"), PoolUnavailable("gone")])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, PoolUnavailable):
            raise answer
        return answer

    look = patience.Patient(ask, 1)
    assert [look(), look(), look()] == [1, 2, 2]
    look.heard_s -= patience.GONE_S + 1
    with pytest.raises(PoolUnavailable, match="gone"):
        look()


def test_ctrl_c_ends_the_following_and_not_the_job(monkeypatch: Any) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    running = {"id": "j", "verb": "finetune", "status": "running", "owner": "", "created_s": 0, "progress": None, "waiting": ""}
    monkeypatch.setattr(jobs.time, "sleep", interrupted)
    with gateway(200, {**running, "message": "", "result": None}) as (client, asked):
        assert jobs.followed(client, "j", "Fine-tuning") is None
    assert {(method, path) for method, path, _, _ in asked} == {("GET", "/admin/jobs/j")}
    assert all(command in jobs.going_on("j") for command in ("springtide logs j --follow", "springtide cancel j"))


def test_an_order_says_who_claims_to_give_it() -> None:
    with gateway(409, errors.Conflict("no").body()) as (client, asked), contextlib.suppress(errors.Conflict):
        client.publish(VersionId("seedling", 2), "seedling", "why")
    assert json.loads(asked[0][3]).keys() == {"version", "alias", "reason", "claimed_author"}
