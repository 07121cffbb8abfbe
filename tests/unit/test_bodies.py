"""Bodies in: packed, late, marked, or from a client that leaves; and what one gateway holds of them."""

import asyncio
import gzip
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedEncoding
from cluster.types import VersionId
from deployments import http
from deployments.http import ignores_leaving, parse_json, read_body, send_error, until_left
from deployments.routing.budget import Budget
from deployments.routing.payload import Payload

ONE = VersionId("m", 1)


def read(raw: bytes, encoding: str = "", limit: int = 1000, took: Any = lambda count: None) -> bytes:
    async def receive() -> Any:
        return {"type": "http.request", "body": raw}

    return asyncio.run(read_body({"headers": [(b"content-encoding", encoding.encode())]}, receive, limit, took))


def test_a_packed_body_is_unpacked_and_counts_by_what_it_unpacks_to() -> None:
    """gzip was `not valid JSON`."""
    raw, counts = b'{"a": "' + b"x" * 500 + b'"}', list[int]()
    assert read(gzip.compress(raw), "gzip", took=counts.append) == raw == read(gzip.compress(raw), "x-gzip")
    assert sum(counts) == len(raw)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(1, 40))
def test_every_member_of_a_packed_body_is_read(members: list[bytes], piece_bytes: int) -> None:
    """Those after the first were dropped without a word."""
    whole = b"".join(members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "PIECE_BYTES", piece_bytes)
        assert http._unpack(b"".join(map(gzip.compress, members)), len(whole)) == whole, "as large as the limit"


@pytest.mark.parametrize(
    ("raw", "encoding", "error"),
    [
        (b"no gzip", "gzip", BadRequest),
        (gzip.compress(b"{}" * 50)[:-9], "gzip", BadRequest),
        (b"", "gzip", BadRequest),
        (gzip.compress(b"x" * 100_000), "gzip", BodyTooLarge),
        (gzip.compress(b"{}") + gzip.compress(b"x" * 100_000), "gzip", BodyTooLarge),
        (gzip.compress(b"x" * 600) * 2, "gzip", BodyTooLarge),
        (gzip.compress(b"{}") + b"no gzip", "gzip", BadRequest),
        (gzip.compress(b"{}") + gzip.compress(b"{}" * 50)[:-9], "gzip", BadRequest),
        (gzip.compress(b"") * (http.MOST_MEMBERS + 1), "gzip", BadRequest),
        (b"{}", "br", UnsupportedEncoding),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused(raw: bytes, encoding: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(raw, encoding)


@pytest.mark.parametrize(("raw", "name"), [(b"null", "null"), (b"[]", "array"), (b"7", "number"), (b'"a"', "string")])
def test_what_is_no_object_is_named_in_jsons_words(raw: bytes, name: str) -> None:
    with pytest.raises(BadRequest, match=f"The body is a JSON {name}"):
        parse_json(raw)


def test_a_byte_order_mark_is_no_part_of_the_json() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(("whole_s", "pause_s", "part_s"), [(5, 0.05, 60), (0.2, 0.1, 0.02)])
def test_a_body_that_does_not_come_is_not_waited_for(
    whole_s: float, pause_s: float, part_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sent half a body held its place for good. One that sends nothing is cut off before one that sends slowly."""
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", whole_s)
    monkeypatch.setattr(http, "BODY_PAUSE_S", pause_s)
    parts: list[bytes] = []

    async def slowly() -> Any:
        await asyncio.sleep(part_s)
        parts.append(b"x")
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(BodyTimeout):
        asyncio.run(read_body({"headers": []}, slowly, 100))
    assert bool(parts) == (part_s < pause_s)


# clients that leave


async def nowhere(message: Any) -> None:
    pass


def request(*messages: Any) -> Any:
    waiting = list(messages)

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(60)
        message = waiting.pop(0)
        await asyncio.sleep(0.01)
        return message

    return receive


def test_a_request_ends_when_its_client_leaves_also_where_serve_was_told_not_to_look() -> None:
    """By Serve's own proxy, which passes requests on without a connection of theirs."""
    assert ignores_leaving({"headers": [(b"x-request-disconnect-disabled", b"?1")]}) and not ignores_leaving({"headers": []})
    seen: list[Any] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("ended")

    asyncio.run(until_left(endless, {}, request({"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}), nowhere))  # pyright: ignore
    assert seen == [{"type": "http.request", "body": b"{}"}, "ended"]


def test_a_request_that_is_answered_ends_with_its_answer_and_its_error() -> None:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise BadRequest("no")

    asyncio.run(until_left(answers, {}, request({"type": "http.request", "body": b""}), nowhere))
    with pytest.raises(BadRequest):
        asyncio.run(until_left(raises, {}, request(), nowhere))


# what a gateway holds


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=5) | st.none(), max_size=5))
def test_a_body_is_sent_under_any_version_and_is_otherwise_what_came(body: dict[str, Any]) -> None:
    payload = Payload({"model": "alias", **body})
    for version in (ONE, VersionId("other", 12)):
        assert orjson.loads(payload.named(version)) == {**body, "model": str(version)}


def test_a_waiting_request_is_serialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was serialised five times a second for as long as it waited."""
    payload = Payload({"model": "m", "prompt": "x" * 1000})
    monkeypatch.setattr(orjson, "dumps", None)
    assert payload.named(ONE) == payload.named(ONE) and len(payload) > 1000


def test_a_body_that_is_nested_too_deeply_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="nested"):
        Payload(parse_json(b'{"a":' * 500 + b"1" + b"}" * 500))


def test_what_a_gateway_holds_is_bounded_and_given_back() -> None:
    """Ten thousand requests of 8 MB each were all held."""
    budget = Budget(max_requests=2, max_bytes=100, max_waiting=1)
    with budget.admit() as one, budget.admit() as two:
        one.take(60)
        with pytest.raises(Overloaded):
            two.take(50)
        two.take(40)
        one.take(-10)
        with pytest.raises(Overloaded), budget.admit():
            pass
        with budget.wait("m"), budget.wait("n"), pytest.raises(Overloaded), budget.wait("m"):
            pass
    assert (budget.requests, budget.bytes, budget.waiting) == (0, 0, {})


@given(st.lists(st.lists(st.integers(0, 60), max_size=4), max_size=8))
def test_whatever_was_refused_nothing_stays_held(requests: list[list[int]]) -> None:
    budget = Budget(max_requests=3, max_bytes=100, max_waiting=1)

    def hold(rest: list[list[int]]) -> None:
        if not rest:
            return
        try:
            with budget.admit() as held:
                for count in rest[0]:
                    held.take(count)
                assert budget.bytes <= 100 and budget.requests <= 3
                hold(rest[1:])
        except Overloaded:
            pass

    hold(requests)
    assert (budget.requests, budget.bytes) == (0, 0)


def test_who_is_refused_hears_when_to_come_back() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(send_error(send, Overloaded("full")))
    assert sent[0]["status"] == 503 and {(b"retry-after", b"15"), (b"connection", b"close")} <= set(sent[0]["headers"])
