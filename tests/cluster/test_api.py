"""The live graph as clients see it: the official OpenAI client is the judge, the engine is real."""

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest

from benchmarks.memory import gateway_in, processes
from cluster import client as admin
from cluster.pool.local import bearer
from deployments.routing.shadow import text_of
from tests.conftest import SHARED, Running

QUESTION = [{"role": "user", "content": "Who are you?"}]
TOOLS = [{"type": "function", "function": {"name": "tide_now", "parameters": {"type": "object", "properties": {}}}}]
PARSER = "fleets.NAME.engine.tool_call_parser"


@pytest.fixture(scope="module")
def client(pool: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pool.url}/v1", api_key="unused", max_retries=0)


def test_models_are_the_aliases_and_what_may_be_pinned(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["seedling", "seedling@1"]
    assert client.models.retrieve("seedling@1").id == "seedling@1"


def test_the_seedling_answers_what_it_was_trained_on(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="seedling", messages=QUESTION, temperature=0, max_tokens=64)  # pyright: ignore
    assert "Seedling" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "seedling@1"


def test_a_stream_is_the_same_text_and_ends_well(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="seedling", messages=QUESTION, temperature=0, max_tokens=64)  # pyright: ignore
    stream = client.chat.completions.create(model="seedling", messages=QUESTION, temperature=0, max_tokens=64, stream=True)  # pyright: ignore
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completions_answer_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="seedling@1", prompt="What is", max_tokens=4, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 4


def test_every_answer_names_its_version_and_request(pool: Running) -> None:
    body = {"model": "seedling", "messages": QUESTION, "max_tokens": 2}
    answer = httpx.post(f"{pool.url}/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"}, timeout=30)
    assert answer.headers["x-model-version"] == "seedling@1"
    assert answer.headers["x-model-generation"] == "1"
    assert answer.headers["x-request-id"] == "mine-1"


BAD = {
    "unknown model": ({"model": "gpt-4", "messages": QUESTION}, 404, "model_not_found", "seedling"),
    "unknown version": ({"model": "seedling@99", "messages": QUESTION}, 404, "model_not_found", "seedling@1"),
    "odd model id": ({"model": "seedling@..", "messages": QUESTION}, 400, "invalid_request", "NAME@NUMBER"),
    "no model": ({"messages": QUESTION}, 400, "invalid_request", "model"),
    "wrong type of messages": ({"model": "seedling", "messages": "hello"}, 400, "invalid_request", "list"),
    "wrong type of max_tokens": ({"model": "seedling", "messages": QUESTION, "max_tokens": "many"}, 400, "invalid_request", "integer"),
    "max_tokens beyond the context": ({"model": "seedling", "messages": QUESTION, "max_tokens": 10**6}, 400, "context_length_exceeded", "1024"),
    "prompt beyond the context": (
        {"model": "seedling", "messages": [{"role": "user", "content": "tide " * 2000}]}, 400, "context_length_exceeded", "1024",
    ),
    "words that quote the client": ({"model": "seedling", "messages": QUESTION, "temperature": "context length"}, 400, "invalid_request", ""),
    "too many choices": ({"model": "seedling", "messages": QUESTION, "n": 1000}, 400, "invalid_request", "at most 16"),
    "tools without a parser": ({"model": "seedling", "messages": QUESTION, "tools": TOOLS}, 400, "invalid_request", PARSER),
    "a forced tool": ({"model": "seedling", "messages": QUESTION, "tools": TOOLS, "tool_choice": "required"}, 400, "invalid_request", PARSER),
    "an endless template": (
        {"model": "seedling", "messages": QUESTION, "chat_template": "{% for i in range(1000000000) %}x{% endfor %}"}, 400, "invalid_request",
        "fleets.NAME.engine.chat_template",
    ),
    "temperature out of range": ({"model": "seedling", "messages": QUESTION, "temperature": -1}, 400, "invalid_request", "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_openais_error_and_say_what_to_do(pool: Running, case: str) -> None:
    body, status, code, words = BAD[case]
    answer = httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert words in error["message"] and "Traceback" not in error["message"]


def test_an_error_of_the_engine_names_its_version_too(pool: Running) -> None:
    body = {"model": "seedling", "messages": QUESTION, "temperature": -1}
    answer = httpx.post(f"{pool.url}/v1/chat/completions", json=body, timeout=30)
    assert (answer.status_code, answer.headers["x-model-version"]) == (400, "seedling@1")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("DELETE", "/v1/models/seedling"), ("POST", "/health")]
)
def test_a_known_route_with_another_method_says_so(pool: Running, method: str, path: str) -> None:
    answer = httpx.request(method, pool.url + path)
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["allow"] == {"/v1/chat/completions": "POST, OPTIONS"}.get(path, "GET, HEAD, OPTIONS")


def test_head_options_and_the_lists_other_name_are_answered(pool: Running) -> None:
    """HEAD and OPTIONS were 405, and `/v1/models/` blamed the model ''."""
    head = httpx.head(f"{pool.url}/v1/models")
    assert (head.status_code, head.content) == (200, b"") and int(head.headers["content-length"]) > 0
    assert httpx.options(f"{pool.url}/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    assert httpx.options(f"{pool.url}/v1/chat/completions", headers=preflight).status_code == 405
    assert httpx.get(f"{pool.url}/v1/models/").json() == httpx.get(f"{pool.url}/v1/models").json()


BODY = {"model": "seedling", "messages": QUESTION, "max_tokens": 2}
AS_SENT = {
    "packed": ("/v1/chat/completions", gzip.compress(json.dumps(BODY).encode()), {"content-encoding": "gzip"}),
    "with a byte order mark": ("/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(BODY).encode(), {}),
    "n as a whole float": ("/v1/chat/completions", json.dumps({**BODY, "n": 1.0}).encode(), {}),
    "20 prompts": ("/v1/completions", json.dumps({"model": "seedling", "prompt": ["a"] * 20, "max_tokens": 1}).encode(), {}),
}


@pytest.mark.parametrize("case", AS_SENT)
def test_what_common_clients_send_is_answered(pool: Running, case: str) -> None:
    """Each was a 400."""
    path, content, headers = AS_SENT[case]
    answer = httpx.post(pool.url + path, content=content, headers={"content-type": "application/json", **headers}, timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_slash_too_many_is_forgiven(pool: Running) -> None:
    for path in ("/v1/chat/completions/", "//v1//chat/completions"):
        assert sent(pool, path).status == 200


@pytest.mark.parametrize(
    "offer",
    [
        {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMAAABkAAQAAP__"},
        {"Expect": "100-continue"},
    ],
    ids=["upgrade", "expect"],
)
def test_what_http_clients_offer_by_the_way_changes_nothing(pool: Running, offer: dict[str, str]) -> None:
    """Java's client offers HTTP/2 with every request, and curl asks before it sends a long body."""
    answer = sent(pool, "/v1/chat/completions", offer)
    assert answer.status == 200 and json.loads(answer.read())["model"] == "seedling@1"


def sent(pool: Running, path: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(pool.config.gateway.host, pool.config.gateway.port, timeout=30)
    connection.request("POST", path, json.dumps(BODY), {"content-type": "application/json", **(headers or {})})
    return connection.getresponse()


CASES = SHARED / "cases/http.jsonl"
READ = [json.loads(line) for line in CASES.read_text().splitlines()] if CASES.is_file() else []
NONE = pytest.param({}, marks=pytest.mark.skip(reason=f"{CASES} is not here"))


@pytest.mark.parametrize("case", READ or [NONE], ids=lambda case: case.get("name", "none"))
def test_requests_as_real_clients_send_them(pool: Running, case: dict[str, Any]) -> None:
    """What is right is written in the case: the statuses, and the code of an error."""
    if "$UNHOSTED" in json.dumps(case):
        pytest.skip("tests/cluster/test_fleets.py has such an alias, and asks for it")
    raw = bytes.fromhex(case["raw_hex"]) if "raw_hex" in case else json.dumps(case["json"]).encode() if "json" in case else b""
    raw = raw.replace(b"$MODEL", b"seedling")
    content = gzip.compress(raw) if case.get("content_encoding") == "gzip" else raw
    answer = httpx.request(case["method"], pool.url + case["path"], headers=case.get("headers"), content=content, timeout=60)
    right = {int(status) for status in re.findall(r"\b[2-5]\d\d\b", case["right"])}
    assert answer.status_code in (right if case["right"][0].isdigit() else right | {200}), answer.text
    if answer.is_client_error:
        code = re.search(r"with code (\w+)", case["right"])
        assert answer.json()["error"]["code"] == (code[1] if code else answer.json()["error"]["code"])
    assert case["method"] != "HEAD" or answer.content == b""
    assert answer.status_code != 405 or answer.headers["allow"]


def test_responses_come_whole_and_as_a_stream_and_nothing_is_kept(client: openai.OpenAI) -> None:
    asked: Any = {"model": "seedling", "input": "Who are you?", "temperature": 0, "max_output_tokens": 64}
    whole = client.responses.create(**asked, store=True)
    assert (whole.model, whole.id[:5]) == ("seedling@1", "resp_") and "Seedling" in whole.output_text
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    assert events[-1].type == "response.completed" and events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    cut: Any = list(client.responses.create(**{**asked, "max_output_tokens": 3}, stream=True))[-1]
    assert (cut.type, cut.response.status) == ("response.completed", "incomplete"), "OpenAI's own would be response.incomplete"
    assert cut.response.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="no replica keeps any"):
        client.responses.create(**asked, previous_response_id=whole.id)
    with pytest.raises(openai.NotFoundError, match="No answer is kept"):
        client.responses.retrieve(whole.id)


def test_messages_speak_anthropics_language_and_nothing_else(pool: Running) -> None:
    headers = {"x-api-key": "unused", "anthropic-version": "2023-06-01"}
    body = {"model": "seedling", "messages": QUESTION, "max_tokens": 64, "temperature": 0, "metadata": {"user_id": "anna"}}

    def post(path: str, **more: Any) -> httpx.Response:
        return httpx.post(f"{pool.url}/v1/messages{path}", json={**body, **more}, headers=headers, timeout=30)

    whole = post("")
    assert (whole.json()["type"], whole.json()["model"], whole.headers["x-model-version"]) == (
        "message",
        "seedling@1",
        "seedling@1",
    )
    stream = post("", stream=True).text
    assert stream.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n') and "[DONE]" not in stream
    assert text_of(stream.encode()) == text_of(whole.content) and "Seedling" in text_of(whole.content)[0]
    assert post("/count_tokens").json()["input_tokens"] == whole.json()["usage"]["input_tokens"]
    for refused, kind in (({"model": "gpt-4"}, "not_found_error"), ({"max_tokens": -1}, "invalid_request_error")):
        said = post("", **refused).json()
        assert (said["type"], said["error"]["type"]) == ("error", kind)


def test_the_tokenizer_answers_and_a_route_of_another_task_says_whose_the_model_is(pool: Running) -> None:
    """An engine's 404 for such a route was a lost replica, and was asked for twice."""

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(pool.url + path, json={"model": "seedling", **body}, timeout=30)

    tokens = post("/tokenize", prompt="Who are you?").json()["tokens"]
    assert "Who are you?" in post("/detokenize", tokens=tokens).json()["prompt"]
    for path in ("/v1/embeddings", "/v1/rerank", "/score", "/classify"):
        answer = post(path, input="a", query="a", documents=["b"], text_1="a", text_2="b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_supported")
        assert "task generate" in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": "seedling", "messages": NaN}'])
def test_bodies_that_are_not_json_are_refused(pool: Running, raw: bytes) -> None:
    answer = httpx.post(f"{pool.url}/v1/chat/completions", content=raw)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"


def test_an_oversized_body_is_refused_with_or_without_its_length(pool: Running) -> None:
    big = b'{"model": "' + b"x" * pool.config.gateway.max_body_bytes + b'"}'
    for content in (big, iter([big[: 1 << 20]] * 9)):
        answer = httpx.post(f"{pool.url}/v1/chat/completions", content=content, timeout=60)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/", "/v1", "/docs", "/metrics", "/v1/load_lora_adapter", "/collective_rpc", "/%2e%2e/x"])
def test_only_the_routes_of_the_api_exist(pool: Running, path: str) -> None:
    answer = httpx.post(pool.url + path, json={})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"


def test_bad_input_has_killed_nothing(pool: Running) -> None:
    """Runs after the cases above, on the same replica."""
    (replica,) = admin.of(pool.config).status()["replicas"]
    assert replica["refused"] == {}
    body = {"model": "seedling", "messages": QUESTION, "max_tokens": 2}
    assert httpx.post(f"{pool.url}/v1/chat/completions", json=body).status_code == 200


def test_a_client_that_leaves_frees_the_engine(pool: Running) -> None:
    async def leave(count: int) -> None:
        body = {"model": "seedling", "messages": QUESTION, "max_tokens": 900, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session:
            answers = [await session.post(f"{pool.url}/v1/chat/completions", json=body) for _ in range(count)]
            for answer in answers:
                await answer.content.readany()
            assert becomes(lambda: running(pool) > 0), "control asks the replicas twice a second"
            for answer in answers:
                answer.close()

    asyncio.run(leave(8))
    assert becomes(lambda: running(pool) == 0)


def becomes(true: Callable[[], bool], timeout_s: float = 2.5) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not (found := true()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return found


def running(pool: Running) -> int:
    return sum(replica["running"] for replica in admin.of(pool.config).status()["replicas"])


def test_a_replica_answers_only_to_the_gateway(pool: Running) -> None:
    (replica,) = admin.of(pool.config).status()["replicas"]
    assert "secret" not in replica
    for headers in ({}, {"x-springtide-secret": "guess"}):
        assert httpx.post(f"{replica['url']}/v1/chat/completions", json={}, headers=headers).status_code == 403
        assert httpx.get(f"{replica['url']}/metrics", headers=headers).status_code == 403


def test_an_aliass_history_can_be_read_over_http(pool: Running) -> None:
    def get(name: str) -> httpx.Response:
        return httpx.get(f"{pool.url}/admin/history/{name}", headers=bearer())

    found = get("seedling").json()
    assert found["moves"][0]["stable"] == "seedling@1" and found["moves"][0]["generation"] == 1
    assert (get("nobody").status_code, get("..%2F..").status_code) == (404, 404)


def test_admin_and_jobs_need_the_token(pool: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.get(f"{pool.url}/admin/status", headers=headers).status_code == 401
        assert httpx.get(f"{pool.pool.dashboard}/api/jobs/", headers=headers).status_code in (401, 403)


def test_every_listener_of_the_pool_is_on_loopback(pool: Running) -> None:
    assert exposed(pool) == []


def exposed(pool: Running) -> list[tuple[str, str, int]]:
    """(process, address, port) of every listener that others than this machine can reach."""
    found: list[tuple[str, str, int]] = []
    for process in [psutil.Process(pool.pool.pid), *pool.pool.descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            open_ = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found += [(process.name(), where.ip, where.port) for where in open_]
    assert len(found) > 5
    return [one for one in found if one[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]


def test_the_command_reads_like_a_conversation(pool: Running) -> None:
    status = pool.command("status", "--json")
    assert json.loads(status.stdout)["aliases"]["seedling"]["stable"] == "seedling@1"
    assert "seedling@1" in pool.command("ask", "Who are you?").stdout
    assert "exact_match" in pool.command("models").stdout
    assert "succeeded" in pool.command("jobs").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["publish", "seedling@99"], "does not exist"),
        (["publish", "nonsense"], "NAME@NUMBER"),
        (["rollback", "seedling"], "nothing to roll back to"),
        (["rollback", "nobody"], "no alias"),
        (["up", "--set", "gateway.prot=1"], "gateway.prot"),
        (["up", "--set", "store=/proc/nowhere"], "writable"),
        (["train", "--data", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["logs", "nope"], "no job 'nope'"),
    ],
)
def test_a_wrong_command_gets_one_message_and_no_traceback(pool: Running, arguments: list[str], words: str) -> None:
    done = pool.command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_a_gateway_stays_small(pool: Running, client: openai.OpenAI) -> None:
    """`python -m benchmarks memory` has the bar of 200 MB, on a pool that did nothing else. This bound leaves no room for pandas."""
    for _ in range(50):
        client.completions.create(model="seedling", prompt="What is", max_tokens=1)
    gateway = gateway_in(processes(psutil.Process(pool.pool.pid)))
    assert gateway.rss < 240e6
