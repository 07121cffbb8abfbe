"""What counts as the same answer of two servers, and the record of what they are asked."""

import base64
import json
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.parity import report
from benchmarks.parity.answers import Answer, Difference, differences, read
from benchmarks.parity.report import Compared
from benchmarks.parity.request import CHATS, Request
from benchmarks.parity.requests import COUNT, generated, recorded

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def whole(text: str = "Hi!", model: str = "m", **more: Any) -> Answer:
    message = {"role": "assistant", "content": text, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    document = {"id": "chatcmpl-1", "created": 5, "model": model, "choices": [choice], "usage": USAGE, **more}
    return read(200, JSON, json.dumps(document).encode())


def streamed(*chunks: dict[str, Any], done: bool = True) -> Answer:
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return read(200, EVENTS, f": waiting\n\n{lines}{'data: [DONE]' if done else ''}\n\n".encode())


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}, **more}]}


def test_the_record_is_what_the_script_writes() -> None:
    assert recorded() == generated()
    assert len(recorded()) == len({one.name for one in recorded()}) == COUNT


def test_ids_times_nulls_and_the_version_of_a_model_are_no_difference() -> None:
    assert differences(whole(), whole(model="m@1", id="chatcmpl-2", created=6, system_fingerprint="x", service_tier=None)) == []
    assert differences(whole(), whole(model="other")) == [Difference("fields", "model", "m", "other")]


def test_another_text_another_usage_and_another_field_are_found_each_by_its_name() -> None:
    assert [one.aspect for one in differences(whole(), whole("Ho!"))] == ["text"]
    assert [one.where for one in differences(whole(), whole(usage={**USAGE, "total_tokens": 6}))] == ["usage.total_tokens"]
    assert differences(whole(), whole(tail=1)) == [Difference("fields", "tail", None, 1)]


def test_where_both_refuse_their_words_may_differ_and_a_status_may_not_go_unseen() -> None:
    one, other = read(400, JSON, b'{"error": {"message": "a"}}'), read(404, JSON, b'{"error": {"message": "b"}}')
    assert differences(one, one._replace(document="else")) == []
    assert differences(one, other) == [Difference("status", "", 400, 404)]
    assert differences(whole(), one) == [Difference("status class", "", 200, 400)]


@given(st.lists(st.text(), min_size=1), st.integers(1, 5))
def test_how_a_stream_is_cut_makes_no_difference(words: list[str], size: int) -> None:
    text = "".join(words)
    others = [text[at : at + size] for at in range(0, len(text), size)]
    assert differences(streamed(*map(piece, ["", *words])), streamed(*map(piece, ["", *others]))) == []
    assert differences(streamed(*map(piece, words)), streamed(*map(piece, [*words, "!"]))) != []


def test_a_stream_that_breaks_or_fails_is_no_answer_like_another() -> None:
    good = streamed(piece("a"))
    assert [one.aspect for one in differences(good, streamed(piece("a"), done=False))] == ["end of the stream"]
    assert differences(good, streamed(piece("a"), {"error": {"message": "gone"}})) != []


def test_a_streams_tool_calls_logprobs_and_usage_are_put_together() -> None:
    def call(**more: Any) -> dict[str, Any]:
        return {
            "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **more}]}, "logprobs": {"content": [{"token": "a"}]}}]
        }

    one = streamed(
        call(id="x", function={"name": "f", "arguments": '{"a"'}),
        call(function={"arguments": ": 1}"}),
        {"choices": [], "usage": USAGE},
    )
    assert one.document["choices"][0]["tool_calls"] == {0: {"index": 0, "name": "f", "arguments": '{"a": 1}'}}
    assert one.document["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "a"}]}
    assert one.document["usage"] == USAGE


def test_messages_are_the_same_however_their_blocks_came() -> None:
    def events(*texts: str) -> Answer:
        deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}} for text in texts]
        every = [{"type": "message_start", "message": {"id": texts[0]}}, {"type": "ping"}, *deltas, {"type": "message_stop"}]
        lines = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in every)
        return read(200, EVENTS, lines.encode())

    assert events("a", "b").ended and differences(events("a", "b"), events("ab")) == []
    assert differences(events("a", "b"), events("a")) != []


def test_vectors_are_compared_as_numbers() -> None:
    def vector(embedding: Any) -> Answer:
        return read(200, JSON, json.dumps({"data": [{"embedding": embedding}]}).encode())

    packed = base64.b64encode(struct.pack("<2f", 0.5, -0.25)).decode()
    assert differences(vector([0.5, -0.25]), vector(packed)) == []
    assert [one.aspect for one in differences(vector([0.5, -0.25]), vector([0.5, -0.2]))] == ["text"]


def test_the_tables_tell_what_was_meant_from_what_was_not() -> None:
    chat = {"model": "m", "stream": True}
    found = [Difference("text", "choices[0].text", "a", "b")]
    compared = [
        Compared(Request("same", CHATS, {}), []),
        Compared(Request("meant", CHATS, chat, differs="why"), [Difference("status class", "", 200, 400)]),
        Compared(Request("not meant", CHATS, chat), found),
        Compared(Request("no longer", CHATS, {}, differs="why"), []),
    ]
    table = report.text(compared)
    assert "| all | 4 | 3 | 2 | 3 | 1 | 1 |" in table and "| chat, streamed | 2 | 1 | 0 | 1 | 1 | 1 |" in table
    assert "| same |" not in table and '| not meant | text choices[0].text | "a" | "b" | **not meant** |' in table
    assert [("FAIL" in one, one[:1]) for one in report.verdicts(compared)] == [(True, "1"), (True, "1")]
