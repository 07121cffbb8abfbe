"""A stream that waits long begins with comments; whatever comes then, its client reads one well-formed stream."""

import asyncio
from typing import Any

import orjson
import pytest

from cluster.errors import ModelNotFound, NoReplica, SpringtideError
from deployments.api.early import COMMENT, EarlyStream
from deployments.http import send_error
from deployments.routing.forms import ANTHROPIC, OPENAI, Form

EVENT = b"data: a\n\n"


def sent_by(*waits_and_then: Any, after_s: float = 0.05, form: Form = OPENAI) -> list[Any]:
    """What the client gets: of numbers that are waited for, in seconds, messages that are sent, errors that are sent or raised."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        async with EarlyStream(send, after_s, form) as early:
            for step in waits_and_then:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, type):
                    raise step("No.")
                elif isinstance(step, SpringtideError):
                    await send_error(early, step, form=form.body)
                else:
                    await early(step)

    asyncio.run(run())
    return sent


START = {"type": "http.response.start", "status": 200, "headers": [(b"x-model-version", b"m@1")]}
BODY = {"type": "http.response.body", "body": EVENT, "more_body": True}
END = {"type": "http.response.body", "body": b""}


def test_an_answer_in_time_is_passed_on_as_it_is() -> None:
    assert sent_by(START, BODY, 0.15, BODY, END) == [START, BODY, BODY, END], "a pause between events is none of its business"


def test_a_long_silence_is_broken_again_and_again_until_the_answer_begins() -> None:
    start, *bodies = sent_by(0.13, START, BODY, 0.13, END)
    assert start["status"] == 200 and (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    *comments, event, end = [one["body"] for one in bodies]
    assert len(comments) > 1 and set(comments) == {COMMENT} and (event, end) == (EVENT, b"") and not bodies[-1].get("more_body")


@pytest.mark.parametrize("error", [NoReplica("Later."), ModelNotFound])
def test_an_error_after_a_comment_is_the_streams_last_event(error: Any) -> None:
    """Status and headers are sent already."""
    start, comment, *_, last = sent_by(0.07, error)
    assert (start["status"], comment["body"]) == (200, COMMENT) and not last.get("more_body")
    said = orjson.loads(last["body"].removeprefix(b"data: "))["error"]
    assert said["code"] in ("no_replica", "model_not_found")


def test_an_error_after_a_comment_has_the_routes_form() -> None:
    last = sent_by(0.07, NoReplica("Later."), form=ANTHROPIC)[-1]["body"]
    assert last.startswith(b"event: error\ndata: ") and b"overloaded_error" in last


def test_an_error_in_time_is_a_whole_answer() -> None:
    with pytest.raises(ModelNotFound):
        sent_by(ModelNotFound)
    assert sent_by(NoReplica("Later."))[0]["status"] == 503
