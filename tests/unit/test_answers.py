"""A teacher's answers over real HTTP, from a gateway that says what the test tells it to."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.client import Client
from cluster.endpoint import Endpoint
from cluster.errors import ContextExceeded, DataError, ModelNotFound, Overloaded, SpringtideError
from cluster.store.objects import Store
from cluster.types import VersionId
from jobs import answers
from jobs.data.chat import Example

TEACHER = VersionId("oak", 3)
CALL = {"type": "function", "id": "c1", "function": {"name": "tide_now", "arguments": {"at": "Bergen"}}}


def examples(count: int) -> list[Example]:
    wrong = {"role": "assistant", "content": "wrong"}
    return [Example([{"role": "user", "content": f"question {at}"}], [wrong], at + 1) for at in range(count)]


def choice(content: str, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "annotations": None, "tool_calls": []}
    return {"choices": [{"finish_reason": finish_reason, "message": message}]}


@contextlib.contextmanager
def gateway(told: dict[str, list[dict[str, Any] | SpringtideError]]) -> Iterator[tuple[Client, list[dict[str, Any]]]]:
    """``told``: what is answered to a question, one after the other; otherwise the question in capitals."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            question = body["messages"][-1]["content"]
            said = told[question].pop(0) if told.get(question) else choice(question.upper())
            status, document = (said.status, said.body()) if isinstance(said, SpringtideError) else (200, said)
            raw = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Client(Endpoint(f"http://127.0.0.1:{server.server_port}", "")), asked
        finally:
            server.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


def said(found: list[Example]) -> list[str]:
    return [example.completion[0]["content"] for example in found]


def test_answers_take_the_place_of_the_datas_and_keep_their_order(store: Store) -> None:
    notes: list[str] = []
    with gateway({}) as (pool, asked):
        found = answers.answered(pool, store, "run", TEACHER, examples(20), notes.append)
    assert said(found) == [f"QUESTION {at}" for at in range(20)] and [one.line for one in found] == [*range(1, 21)]
    assert {body["model"] for body in asked} == {"oak@3"} and {body["temperature"] for body in asked} == {0}
    assert notes == ["oak@3 has answered 20 of 20 prompts"]


def test_a_run_that_goes_on_asks_only_for_what_is_missing(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "PART", 4)
    with gateway({"question 6": [ModelNotFound("gone")]}) as (pool, asked):
        with pytest.raises(ModelNotFound):
            answers.answered(pool, store, "run", TEACHER, examples(10), print)
        asked.clear()
        found = answers.answered(pool, store, "run", TEACHER, examples(10), print)
    assert sorted(body["messages"][0]["content"] for body in asked) == [f"question {at}" for at in range(4, 10)]
    assert said(found) == [f"QUESTION {at}" for at in range(10)]


def test_what_has_no_whole_answer_is_left_out_and_stays_so(store: Store) -> None:
    told = {"question 0": [choice("so lon", "length")], "question 1": [ContextExceeded("too long")], "question 2": [choice(" ")]}
    with gateway({key: list(value) for key, value in told.items()}) as (pool, asked):
        for _ in range(2):
            assert said(answers.answered(pool, store, "run", TEACHER, examples(4), print)) == ["QUESTION 3"]
    assert len(asked) == 4


def test_a_question_for_which_there_is_no_room_waits(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "WAITS_S", (0.01, 0.01))
    full = [Overloaded("full"), Overloaded("full")]
    with gateway({"question 0": [*full], "question 1": [*full, *full]}) as (pool, asked):
        assert said(answers.answered(pool, store, "run", TEACHER, examples(1), print)) == ["QUESTION 0"] and len(asked) == 3
        with pytest.raises(Overloaded):
            answers.answered(pool, store, "other", TEACHER, examples(2), print)


def test_what_the_teacher_refuses_is_named_by_its_line(store: Store) -> None:
    refused = SpringtideError("roles must alternate")
    refused.status = 400
    with gateway({"question 2": [refused]}) as (pool, _), pytest.raises(DataError, match="Line 3: the teacher refuses it: roles"):
        answers.answered(pool, store, "run", TEACHER, examples(4), print)


def test_calls_and_tools_are_sent_as_a_request_has_them() -> None:
    tool = {"type": "function", "function": {"name": "tide_now", "parameters": {}}}
    prompt = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    body = answers.request(TEACHER, Example(prompt, [], 1, (tool,)))
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": "Bergen"}' and body["tools"] == [tool]
    wire = {
        "finish_reason": "tool_calls",
        "message": {"role": "assistant", "content": None, "tool_calls": body["messages"][1]["tool_calls"]},
    }
    assert answers.whole_answer(wire) == prompt[1], "an answer comes back as the data would have it"
