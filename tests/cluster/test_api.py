"""The live graph as clients see it: the official OpenAI client is the judge, the engine is real."""

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import Callable

import aiohttp
import httpx
import openai
import psutil
import pytest

from cluster import client as admin
from cluster.pool.local import bearer
from tests.conftest import Running

QUESTION = [{"role": "user", "content": "Who are you?"}]


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
