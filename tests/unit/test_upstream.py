"""The way of a request to a replica and back, against replicas that fail in every way a peer can. The peers are faked; the sockets are not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson
import pytest
from aiohttp import web

from cluster.errors import (
    AnswerTimeout,
    BadRequest,
    ContextExceeded,
    NoReplica,
    NotSupported,
    ReplicaLost,
    SpringtideError,
    WrongTask,
)
from cluster.types import Generation, ReplicaState, VersionId, View
from deployments.routing.answer import Answer
from deployments.routing.engine_errors import engine_error
from deployments.routing.engine_routes import DONE, ENGINE_ROUTES, EngineRoute
from deployments.routing.measure import Trace
from deployments.routing.payload import Payload
from deployments.routing.table import Table
from deployments.routing.upstream import Call, Timeouts, Upstream

ONE = VersionId("m", 1)
EVENTS = [b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', b'data: {"choices": [{"finish_reason": "stop"}]}\n\n']
CHAT, RESPONSES, MESSAGES = (ENGINE_ROUTES[f"/v1/{name}"] for name in ("chat/completions", "responses", "messages"))
PATIENT = Timeouts(first_byte_s=5, idle_s=5, whole_s=5)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Told(NamedTuple):
    """What the client got, and what the trace saw."""

    status: int
    body: bytes
    trace: Trace
    asked: list[int]
    """Which replicas were asked, in order."""


def stream(*parts: bytes, status: int = 200, abort: bool = False) -> Handler:
    """A replica that sends ``parts`` one by one, and then ends well, or cuts the connection."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if abort and request.transport is not None:
            request.transport.abort()
        return response

    return handle


async def dies(request: web.Request) -> web.StreamResponse:
    """Before its first byte."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def whole(_: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": [{"finish_reason": "length"}]})


def refuses(status: int, body: Any = None) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status) if body is None else web.json_response(body, status=status)

    return handle


def forward(*handlers: Handler, stream: bool = True, timeouts: Timeouts = PATIENT, route: EngineRoute = CHAT) -> Told:
    """Send one call to a table of these replicas, tried in this order."""

    async def run() -> Told:
        asked: list[int] = []
        servers = [await serve(handler, number, asked) for number, handler in enumerate(handlers)]
        table = Table()
        states = tuple(
            ReplicaState(str(n), f"http://127.0.0.1:{port}", "s", "m@1", {"m@1": "d"}, {}, 0)
            for n, (_, port) in enumerate(servers)
        )
        move = Generation(alias="m", generation=1, stable=ONE, reason="", author="", time_s=0)
        table.adopt(View(1, {"m": move}, states))
        for number in range(len(handlers)):
            table.in_flight[str(number)] = number  # the least busy is asked first
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        upstream, trace = Upstream(table, timeouts), Trace()
        try:
            call = Call(ONE, route, Payload({"stream": stream}), "id")
            await upstream.forward(call, Answer(send, [(b"x-model-version", b"m@1")], trace))
        finally:
            upstream.close()
            for runner, _ in servers:
                await runner.cleanup()
        assert (b"x-model-version", b"m@1") in sent[0]["headers"] and not sent[-1].get("more_body")
        return Told(sent[0]["status"], b"".join(message["body"] for message in sent[1:]), trace, asked)

    return asyncio.run(run())


async def serve(handler: Handler, number: int, asked: list[int]) -> tuple[web.AppRunner, int]:
    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(number)
        return await handler(request)

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


def last_event(body: bytes) -> dict[str, Any]:
    return orjson.loads(body.rstrip().rpartition(b"data: ")[2])


def test_a_stream_is_passed_on_byte_for_byte() -> None:
    told = forward(stream(*EVENTS, DONE))
    assert (told.status, told.body) == (200, b"".join(EVENTS) + DONE)
    assert (told.trace.events, told.trace.finish, told.trace.failed) == (3, "stop", False)


def test_events_that_arrive_in_halves_are_passed_on_whole() -> None:
    joined = b"".join(EVENTS) + DONE
    told = forward(stream(*(joined[i : i + 7] for i in range(0, len(joined), 7))))
    assert told.body == joined


def test_a_replica_that_dies_before_its_first_byte_is_replaced_by_another() -> None:
    told = forward(dies, stream(*EVENTS, DONE))
    assert told.asked == [0, 1] and told.body.endswith(DONE) and not told.trace.failed


def test_a_whole_answer_that_never_comes_is_asked_for_elsewhere() -> None:
    assert forward(dies, whole).trace.finish == "length"


def test_a_request_costs_two_replicas_at_most() -> None:
    with pytest.raises(ReplicaLost):
        forward(dies, dies, stream(*EVENTS, DONE))


DEAD = {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "code": 500}}


def test_a_request_that_has_cost_an_engine_is_not_begun_again_where_the_next_replica_is_leaving() -> None:
    """The waiting began anew, with two more attempts: such a request could cost four engines."""
    with pytest.raises(ReplicaLost, match="The replica failed"):
        forward(refuses(500, DEAD), refuses(503), stream(*EVENTS, DONE))


class Gateway:
    """One `Upstream` over so many replicas, for several requests."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = handlers
        self.asked: list[int] = []

    async def __aenter__(self) -> "Gateway":
        self.servers = [await serve(handler, number, self.asked) for number, handler in enumerate(self.handlers)]
        self.table = Table()
        urls = [f"http://127.0.0.1:{port}" for _, port in self.servers]
        self.table.adopt(
            View(1, {}, tuple(ReplicaState(str(n), url, "s", "m@1", {"m@1": "d"}, {}, 0) for n, url in enumerate(urls)))
        )
        self.upstream = Upstream(self.table, PATIENT)
        return self

    async def __aexit__(self, *why: object) -> None:
        self.upstream.close()
        for runner, _ in self.servers:
            await runner.cleanup()

    async def ask(self, **body: Any) -> str:
        """The error's code; empty where there is an answer."""
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            await self.upstream.forward(Call(ONE, CHAT, Payload(body), "mine"), Answer(send, [], None))
        except SpringtideError as error:
            return error.code
        body_sent = b"".join(message["body"] for message in sent[1:])
        return last_event(body_sent)["error"]["code"] if body.get("stream") and DONE not in body_sent else ""


def test_what_has_ended_two_engines_is_asked_of_no_third() -> None:
    """Example: `echo` with `logprobs`, which ended every engine that it reached."""

    async def run() -> None:
        async with Gateway(*[refuses(500, DEAD)] * 4) as gateway:
            assert [await gateway.ask(prompt=text, echo=True, logprobs=10) for text in "abc"] == [
                "replica_lost",
                "request_quarantined",
                "request_quarantined",
            ]
            assert len(gateway.asked) == 2 and gateway.table.answering == 2

    asyncio.run(run())


def test_an_engine_that_says_that_it_ended_is_asked_no_more() -> None:
    async def run() -> None:
        async with Gateway(refuses(500, DEAD), whole) as gateway:
            assert [await gateway.ask(prompt="a") for _ in range(20)] == [""] * 20, "a plain request is never refused"
            assert gateway.asked.count(0) <= 1 and gateway.table.answering in (1, 2)

    asyncio.run(run())


def test_a_stream_whose_engine_ends_is_remembered_too() -> None:
    event = b"data: " + orjson.dumps(DEAD) + b"\n\n"

    async def run() -> None:
        async with Gateway(*[stream(EVENTS[0], event, DONE)] * 3) as gateway:
            assert await gateway.ask(stream=True, min_p=0.1) == "replica_lost"
            assert await gateway.ask(stream=True, min_p=0.1) == "request_quarantined", "it was alone there"

    asyncio.run(run())


def test_replicas_that_break_connections_are_counted_and_those_that_refuse_them_are_not() -> None:
    async def run() -> None:
        async with Gateway(dies, dies) as gateway:
            await gateway.ask(min_p=0.1)
            assert await gateway.ask(min_p=0.1) == "request_quarantined"
        async with Gateway(whole, whole) as gateway:
            for runner, _ in gateway.servers:
                await runner.cleanup()
            assert [await gateway.ask(min_p=0.1) for _ in range(3)] == ["replica_lost"] * 3

    asyncio.run(run())


@pytest.mark.parametrize("parts", [EVENTS[:1], [EVENTS[0], EVENTS[1][:9]]])
def test_a_replica_that_dies_in_the_middle_ends_the_stream_with_an_error_event(parts: list[bytes]) -> None:
    told = forward(stream(*parts, abort=True), stream(*EVENTS, DONE))
    assert told.asked == [0] and told.trace.failed, "what was half answered is never answered again by somebody else"
    assert told.body.startswith(EVENTS[0]) and last_event(told.body)["error"]["code"] == "replica_lost"
    assert DONE not in told.body and all(event.startswith(b"data: ") for event in told.body.strip().split(b"\n\n"))


def test_a_stream_that_ends_without_its_end_is_an_error() -> None:
    assert last_event(forward(stream(*EVENTS)).body)["error"]["code"] == "replica_lost"


def test_the_engines_error_inside_a_stream_is_said_in_openais_form() -> None:
    event = b'data: {"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}}\n\n'
    error = last_event(forward(stream(EVENTS[0], event, DONE)).body)["error"]
    assert (error["type"], error["code"]) == ("server_error", "replica_lost")
    assert "out of memory" not in error["message"], "the engine's own words are for the log"


def test_a_replica_that_takes_other_weights_over_sends_the_request_back_to_be_resolved_again() -> None:
    with pytest.raises(NoReplica):
        forward(refuses(503))


def test_the_engines_own_503_is_tried_elsewhere() -> None:
    told = forward(refuses(503, {"error": {"message": "overloaded"}}), stream(*EVENTS, DONE))
    assert told.asked == [0, 1]


def test_a_bad_request_is_not_tried_again() -> None:
    with pytest.raises(BadRequest, match="temperature"):
        forward(refuses(400, {"error": {"message": "temperature must be positive", "code": 400}}), whole)


def slow(first_s: float, then_s: float, content_type: str = "text/event-stream") -> Handler:
    """A replica that waits before its first byte, and again before the rest."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(first_s)
        if content_type == "application/json":
            return web.json_response({"choices": [{"finish_reason": "length"}]})
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        await response.write(EVENTS[0])
        await asyncio.sleep(then_s)
        await response.write(EVENTS[1] + DONE)
        return response

    return handle


def test_a_first_byte_and_a_pause_have_limits_of_their_own() -> None:
    """One limit was for every read: a stream could pause for as long as its first byte might take."""
    assert forward(slow(0.3, 0), timeouts=Timeouts(5, 0.1, 5)).body.endswith(DONE), "the pause before the first byte is none"
    with pytest.raises(AnswerTimeout):
        forward(slow(0.5, 0), timeouts=Timeouts(0.1, 5, 5))
    told = forward(slow(0, 0.5), timeouts=Timeouts(5, 0.1, 5))
    assert last_event(told.body)["error"]["code"] == "timeout" and told.trace.failed


def test_a_whole_answer_is_not_limited_like_a_first_byte() -> None:
    """An answer that is not streamed has its first byte when it is complete: 300 s for the first byte ended it."""
    whole = slow(0.3, 0, "application/json")
    assert forward(whole, stream=False, timeouts=Timeouts(0.1, 0.1, 5)).trace.finish == "length"
    with pytest.raises(AnswerTimeout):
        forward(whole, stream=False, timeouts=Timeouts(5, 5, 0.1))


def test_a_replica_that_took_too_long_sees_its_client_leave() -> None:
    """vLLM ends a request whose client has left."""
    left: list[bool] = []

    async def waits(request: web.Request) -> web.StreamResponse:
        for _ in range(100):
            await asyncio.sleep(0.02)
            if request.transport is None or request.transport.is_closing():
                left.append(True)
                break
        return web.Response()

    with pytest.raises(AnswerTimeout) as caught:
        forward(waits, stream=False, timeouts=Timeouts(5, 5, 0.1))
    assert left and (caught.value.status, caught.value.code) == (504, "timeout")


def test_a_grammar_that_allows_nothing_is_its_senders_fault_and_costs_no_replica_its_name() -> None:
    """`root ::= root` was a 502, after two replicas."""
    for status, words, kind in ((500, "Internal server error", BadRequest), (500, "list index out of range", ReplicaLost)):
        assert isinstance(engine_error(status, orjson.dumps({"error": {"message": words, "param": None, "code": status}})), kind)


def test_what_the_engine_quotes_of_a_client_is_cut() -> None:
    """A million characters of a wrong `stop` came back."""
    assert len(str(engine_error(400, orjson.dumps({"error": {"message": "x" * 10**6, "code": 400}})))) <= 2_000


def test_no_address_of_a_replica_reaches_a_client() -> None:
    """The message was `Cannot connect to host 127.0.0.1:43211`."""
    with pytest.raises(ReplicaLost) as caught:
        forward(dies, dies)
    assert "127.0.0.1" not in str(caught.value) and "Two replicas failed" in str(caught.value)
    for status in (403, 404, 500):
        error = engine_error(status, b'{"error": {"message": "no attribute \'server\' at 10.0.0.7:9", "code": 500}}')
        assert isinstance(error, ReplicaLost) and "10.0.0.7" not in str(error)


def test_a_model_that_has_no_such_route_costs_no_replica_its_name() -> None:
    """The web server of an engine has the routes of its model's task only."""
    with pytest.raises(WrongTask, match="does not answer /v1/chat/completions"):
        forward(refuses(404, {"detail": "Not Found"}), whole)


def test_what_the_engine_cannot_do_with_the_model_is_not_asked_for_twice() -> None:
    with pytest.raises(NotSupported, match="Score API"):
        forward(refuses(501, {"error": {"message": "The model does not support Score API", "code": 501}}), whole)


ENDS = {
    "/v1/responses": b'event: response.completed\ndata: {"type": "response.completed", "response": {"output": []}}\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
}
SAYS_SO = b'event: content_block_delta\ndata: {"text": "event: message_stop\\n event: response.completed\\n event: error\\n"}\n\n'


@pytest.mark.parametrize("path", ENDS)
def test_each_route_has_an_end_of_its_own_and_text_that_speaks_of_it_is_none(path: str) -> None:
    """A stream without `data: [DONE]` was a replica's failure."""
    route = ENGINE_ROUTES[path]
    told = forward(stream(SAYS_SO, ENDS[path]), route=route)
    assert told.body == SAYS_SO + ENDS[path] and not told.trace.failed
    broken = forward(stream(SAYS_SO), route=route)
    assert broken.trace.failed and broken.body.startswith(SAYS_SO + b"event: error\ndata: {")


def test_a_broken_stream_ends_in_the_form_that_its_clients_know() -> None:
    error = last_event(forward(stream(SAYS_SO, abort=True), route=MESSAGES).body)
    assert error["type"] == "error" and error["error"]["type"] == "api_error" and "code" not in error["error"]
    error = last_event(forward(stream(SAYS_SO, abort=True), route=RESPONSES).body)
    assert (error["type"], error["code"], error["error"]["code"]) == ("error", "replica_lost", "replica_lost")


def test_an_error_event_of_anthropics_form_is_the_engines_failure() -> None:
    event = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"at 10.0.0.7"}}\n\n'
    told = forward(stream(SAYS_SO, event, ENDS["/v1/messages"]), route=MESSAGES)
    assert told.trace.failed and "10.0.0.7" not in last_event(told.body)["error"]["message"]
    assert forward(stream(event), stream(SAYS_SO, ENDS["/v1/messages"]), route=MESSAGES).asked == [0, 1], "nothing was sent yet"


@pytest.mark.parametrize(
    ("words", "too_long"),
    [
        ("This model's maximum context length is 1024 tokens. However, you requested 900 output tokens and your prompt …", True),
        ("Input length (4000) exceeds model's maximum context length (1024).", True),
        (
            "max_tokens=1000000 cannot be greater than max_model_len=max_total_tokens=1024. Please request fewer output tokens.",
            True,
        ),
        ("max_completion_tokens=1000000 cannot be greater than max_model_len=max_total_tokens=1024.", True),
        ("temperature: Input should be a valid number, got 'context length'", False),
        ("1 validation error: stop: max_model_len", False),
    ],
)
def test_only_the_engines_own_sentence_says_that_the_context_is_exceeded(words: str, too_long: bool) -> None:
    """`context length` anywhere in a message was enough, the client's own values included."""
    error = engine_error(400, orjson.dumps({"error": {"message": words, "param": None, "code": 400}}))
    assert isinstance(error, ContextExceeded) is too_long


@pytest.mark.parametrize(
    ("words", "no_parser"),
    [
        ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', True),
        ('tool_choice="required" requires --tool-call-parser to be set', True),
        ('tool_choice=function "tide\nnow" requires --tool-call-parser to be set', True),
        ("stop: tool_choice=x requires --tool-call-parser to be set", False),
    ],
)
def test_tools_without_a_parser_are_refused_with_the_key_to_set(words: str, no_parser: bool) -> None:
    """The client read of flags of `vllm serve` that nobody could give."""
    error = engine_error(400, orjson.dumps({"error": {"message": words, "param": None, "code": 400}}))
    assert isinstance(error, BadRequest) and ("fleets.NAME.engine.tool_call_parser" in str(error)) is no_parser
    assert error.param == ("tools" if no_parser else None)
