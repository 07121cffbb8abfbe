"""What the gateway makes of a body before a replica sees it, route by route."""

from typing import Any

import pytest

from cluster.config import Gateway
from cluster.errors import BadRequest
from cluster.types import TASKS
from deployments.api.bodies import as_sent, check, session_of
from deployments.routing.engine_routes import ENGINE_ROUTES, paths_of
from deployments.routing.payload import Payload
from deployments.routing.shadow import text_of

LIMITS = Gateway(max_choices=4, max_prompts=20, max_inputs=30)
CHAT, RESPONSES, MESSAGES, EMBEDDINGS = (
    ENGINE_ROUTES[f"/v1/{name}"] for name in ("chat/completions", "responses", "messages", "embeddings")
)


def test_every_task_has_routes_and_only_text_is_streamed() -> None:
    assert all(paths_of(task) for task in TASKS)
    assert {row.path for row in ENGINE_ROUTES.values() if row.terminator} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
    }


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/inference/v1/generate", "/pooling", "/invocations", "/v1/messages/render"]
)
def test_what_is_not_in_the_table_is_no_clients_business(path: str) -> None:
    assert path not in ENGINE_ROUTES


@pytest.mark.parametrize(
    "state",
    [{"previous_response_id": "resp_1"}, {"conversation": {"id": "c"}}, {"background": True}],
    ids=lambda state: next(iter(state)),
)
def test_what_a_single_replica_would_have_to_keep_is_refused_and_the_key_is_named(state: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="no replica keeps any") as caught:
        check({"input": "Hi", **state}, RESPONSES, LIMITS)
    assert caught.value.param == next(iter(state))
    check({"input": "Hi", "previous_response_id": None, "background": False}, RESPONSES, LIMITS)


def test_an_answer_is_never_stored_and_its_id_is_ours() -> None:
    sent = as_sent({"input": "Hi", "store": True, "request_id": "resp_forged"}, RESPONSES, "r-1")
    assert sent == {"input": "Hi", "store": False, "request_id": "resp_r-1"}


@pytest.mark.parametrize("path", ENGINE_ROUTES)
def test_what_operators_say_to_engines_is_left_out_of_what_clients_send(path: str) -> None:
    body = {"x": 1, "kv_transfer_params": {"remote_host": "10.0.0.1"}, "ec_transfer_params": {}, "vllm_xargs": {"a": 1}}
    assert {"kv_transfer_params", "ec_transfer_params", "vllm_xargs"}.isdisjoint(as_sent(body, ENGINE_ROUTES[path], "r"))


def test_a_null_is_an_absent_key_and_a_schemas_null_stays() -> None:
    """vLLM refuses `tools: null` of /v1/responses."""
    schema = {"enum": [None, "a"], "default": None}
    messages = [{"role": "assistant", "content": None, "tool_calls": None}, {"role": "user", "content": "Hi"}]
    sent = as_sent({"messages": messages, "n": None, "stop": None, "tools": [{"parameters": schema}]}, CHAT, "r")
    assert sent == {
        "messages": [{"role": "assistant"}, {"role": "user", "content": "Hi"}],
        "tools": [{"parameters": schema}],
    }


def test_a_route_without_streams_is_not_asked_for_one() -> None:
    assert as_sent({"input": "a", "stream": True}, EMBEDDINGS, "r") == {"input": "a"}
    assert as_sent({"messages": [], "stream": True}, MESSAGES, "r")["stream"] is True


@pytest.mark.parametrize(("value", "streams"), [("false", False), ("No", False), (0.0, False), ("true", True), (1, True)])
def test_a_stream_is_one_to_the_gateway_where_it_is_one_to_the_engine(value: Any, streams: bool) -> None:
    """ "false" was a stream to the gateway alone, so a whole answer was cut by the limit for first bytes."""
    assert Payload(as_sent({"messages": [], "stream": value}, CHAT, "r")).streams is streams
    assert as_sent({"messages": [], "stream": value}, CHAT, "r")["stream"] is streams


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/v1/embeddings", {"input": ["a"] * 31}, "input"),
        ("/v1/embeddings", {"input": [[1, 2]] * 31}, "input"),
        ("/v1/embeddings", {"messages": [[{"role": "user", "content": "a"}]] * 31}, "messages"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 31}, "documents"),
        ("/v2/rerank", {"query": "a", "documents": [{"content": []}] * 31}, "documents"),
        ("/score", {"text_1": ["a"] * 31, "text_2": ["a"] * 31}, "text_1"),
        ("/v1/score", {"queries": "a", "items": ["a"] * 31}, "items"),
        ("/classify", {"input": ["a"] * 31}, "input"),
    ],
)
def test_inputs_are_bounded_and_the_error_names_their_key(path: str, body: dict[str, Any], key: str) -> None:
    with pytest.raises(BadRequest, match=r"at most 30.*gateway\.max_inputs") as caught:
        check(body, ENGINE_ROUTES[path], LIMITS)
    assert caught.value.param == key
    check({name: value[:30] if isinstance(value, list) else value for name, value in body.items()}, ENGINE_ROUTES[path], LIMITS)


@pytest.mark.parametrize(
    "body", [{"input": list(range(500))}, {"input": [{"role": "user", "content": "a"}] * 40}, {"input": "a" * 99}]
)
def test_one_text_of_many_tokens_is_one_input(body: dict[str, Any]) -> None:
    check(body, EMBEDDINGS, LIMITS)


def test_vectors_are_numbers_or_base64() -> None:
    """vLLM sends `bytes` with a header of some hundred bytes for each input, and no client reads so long a header."""
    with pytest.raises(BadRequest, match="encoding_format"):
        check({"input": "a", "encoding_format": "bytes"}, EMBEDDINGS, LIMITS)
    check({"input": "a", "encoding_format": "base64"}, EMBEDDINGS, LIMITS)


@pytest.mark.parametrize(
    ("path", "body", "session"),
    [
        ("/v1/messages", {"metadata": {"user_id": "anna"}, "user": "bob"}, "anna"),
        ("/v1/messages", {"metadata": "anna"}, ""),
        ("/v1/responses", {"prompt_cache_key": "k", "user": "bob"}, "bob"),
        ("/v1/responses", {"prompt_cache_key": "k"}, "k"),
        ("/v1/embeddings", {"user": "bob"}, "bob"),
    ],
)
def test_each_route_has_its_own_place_for_the_session(path: str, body: dict[str, Any], session: str) -> None:
    assert session_of([], body, ENGINE_ROUTES[path]) == session


STREAMED = [
    b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"partial_json":"{"}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"b"}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    b'event: response.created\ndata: {"type":"response.created","response":{"output":[]}}\n\n'
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"ab"}\n\n'
    b'event: response.output_text.done\ndata: {"type":"response.output_text.done","text":"ab"}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"output":[{"content":[{"text":"ab"}]}]}}\n\n',
]
WHOLE = [b'{"content":[{"type":"text","text":"ab"}]}', b'{"output":[{"type":"message","content":[{"text":"ab"}]}]}']


@pytest.mark.parametrize("body", [*STREAMED, *WHOLE])
def test_a_shadow_compares_the_text_of_every_form(body: bytes) -> None:
    """It looked for `choices` only, and raised over everything else."""
    assert text_of(body) == ["ab"]
