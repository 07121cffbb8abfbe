"""The gateway's pure parts: reading bodies, whole events, the engine's words in OpenAI's form, autoscaling."""

import asyncio
import contextlib
import os
import pickle
import select
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors
from cluster.config import Gateway
from cluster.errors import BadRequest, BodyTooLarge, ContextExceeded, ReplicaLost, SpringtideError
from cluster.pool import graph
from deployments.api.bodies import as_sent, check, model_name, session_of
from deployments.api.inference import request_id
from deployments.http import parse_json, read_body
from deployments.routing.engine_errors import engine_error
from deployments.routing.engine_routes import ENGINE_ROUTES
from deployments.routing.upstream import whole_events

COMPLETIONS = ENGINE_ROUTES["/v1/completions"]
LIMITS = Gateway(max_choices=4, max_prompts=20)


def receive_all(parts: list[bytes], announced: int | None = None, limit: int = 100) -> bytes:
    messages = [{"body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]

    async def receive() -> Any:
        return messages.pop(0)

    headers = [(b"content-length", str(announced).encode())] if announced is not None else []
    return asyncio.run(read_body({"headers": headers}, receive, limit))


def test_a_body_in_parts_is_joined() -> None:
    assert receive_all([b"ab", b"", b"cd"]) == b"abcd"


@pytest.mark.parametrize("announced", [101, None])
def test_a_body_over_the_limit_is_refused_with_or_without_its_length(announced: int | None) -> None:
    with pytest.raises(BodyTooLarge):
        receive_all([b"x" * 60, b"x" * 60], announced)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a": NaN}', b"[" * 5000])
def test_what_is_not_a_json_object_is_a_bad_request(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(raw)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_bad_request(raw: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse_json(raw), dict)


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": 3}, {"model": None}, {"model": ["m"]}])
def test_a_model_must_be_named(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        model_name(body)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "body",
    [
        *({"n": n} for n in (4, 4.0, 1.0, None)),
        {"n": 2, "prompt": ["a"] * 10},
        {"prompt": ["a"] * 20},
        {"prompt": [7] * 5000},
        {"n": 4, "prompt": "one"},
    ],
)
def test_what_is_within_the_limits_passes(body: dict[str, Any]) -> None:
    """`n: 1.0` was said to be too many, and so were 20 prompts."""
    check(body, COMPLETIONS, LIMITS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"n": 5}, "max_choices"),
        ({"best_of": 5.0}, "max_choices"),
        ({"n": 1e300}, "at most 4"),
        ({"n": "2"}, "whole number"),
        ({"n": 1.5}, "whole number"),
        ({"n": [1]}, "whole number"),
        ({"prompt": ["a"] * 21}, "gateway.max_prompts"),
        ({"n": 3, "prompt": ["a"] * 10}, "gateway.max_prompts"),
        ({"best_of": 2, "prompt": [[1, 2]] * 11}, "gateway.max_prompts"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_and_the_key_is_named(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        check(body, COMPLETIONS, LIMITS)


def test_a_session_is_what_the_client_calls_it_and_never_its_key() -> None:
    """All clients with one shared key were one session: a canary of 5 % got none of the traffic, or all of it."""
    bearer = (b"authorization", b"Bearer shared")
    assert session_of([bearer], {}, COMPLETIONS) == "" and session_of([bearer], {"user": 7}, COMPLETIONS) == ""
    assert session_of([bearer], {"user": "anna"}, COMPLETIONS) == "anna"
    assert session_of([bearer], {"user": "anna", "safety_identifier": "s-1"}, COMPLETIONS) == "s-1"
    assert session_of([bearer, (b"x-session-id", b"x-1")], {"safety_identifier": "s-1"}, COMPLETIONS) == "x-1"


@given(st.lists(st.sampled_from([b"data: a\n\n", b'data: {"b": 1}\n\n', b"data: [DONE]\n\n"])), st.data())
def test_only_whole_events_pass_and_no_byte_is_lost(events: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(events)
    cut = data.draw(st.integers(0, len(stream)))
    whole, rest = whole_events(stream[:cut])
    assert whole + rest == stream[:cut]
    assert whole == b"" or whole.endswith(b"\n\n")
    assert b"\n\n" not in rest


def test_a_forged_request_id_cannot_break_a_log_line() -> None:
    assert request_id([(b"x-request-id", b'abc\n{"level":1}' + b"x" * 500)]) == ("abclevel:1" + "x" * 500)[:64]


def test_the_engines_words_arrive_in_openais_form() -> None:
    body = b'{"error": {"message": "This model\'s maximum context length is 8 tokens.", "param": "max_tokens", "code": 400}}'
    error = engine_error(400, body)
    assert isinstance(error, ContextExceeded)
    assert error.body()["error"]["code"] == "context_length_exceeded"
    assert error.param == "max_tokens"
    assert isinstance(engine_error(500, b"not json"), ReplicaLost)


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, SpringtideError)])
def test_every_error_survives_a_process_boundary(kind: type[SpringtideError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", "do this", param="p")))
    assert (type(error), error.message, error.do, error.param) == (kind, "what", "do this", "p")
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


def test_what_a_job_says_reaches_a_file_at_once() -> None:
    """Python keeps lines for a file until they are 8 KiB; a line of progress a second took a minute to be seen."""
    code = "import sys; from jobs import main; main(lambda: (print('a line'), sys.stdin.read()))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdin and job.stdout
        seen, _, _ = select.select([job.stdout], [], [], 20)
        assert seen and job.stdout.readline() == b"a line\n"
        job.stdin.close()


def test_a_failed_deployment_is_told_without_its_tracebacks() -> None:
    message = (
        "Deployment failed.\nTraceback (most recent call last):\n  File x\ncluster.errors.ModelNotFound: m has no version.\n"
    )
    assert graph.cause(message) == "m has no version."
    assert graph.cause("it is waiting") == "it is waiting"


ENDLESS = "{% for i in range(1000000000) %}x{% endfor %}"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"chat_template": ENDLESS}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": ENDLESS}}, "chat_template_kwargs.chat_template"),
        ({"chat_template": None}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"chat_template_kwargs": 3}, None),
    ],
)
def test_a_request_cannot_bring_its_own_chat_template(path: str, body: dict[str, Any], key: str | None) -> None:
    if key is None:
        return check(body, ENGINE_ROUTES[path], Gateway())
    with pytest.raises(BadRequest, match=r"fleets\.NAME\.engine\.chat_template") as refused:
        check(body, ENGINE_ROUTES[path], Gateway())
    assert refused.value.param == key


def test_no_client_puts_itself_before_the_others() -> None:
    assert "priority" not in as_sent({"priority": -1}, ENGINE_ROUTES["/v1/chat/completions"], "7")
