"""Anthropic's own client for Python."""

from typing import Any

import anthropic
from checks import CHAT, CITY, LONG, PARIS, URL, check, run
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=URL, api_key="unused", max_retries=0, timeout=120)
WEATHER: Any = [{"name": "weather", "description": "The weather in a city.", "input_schema": CITY}]
asked: Any = {"model": CHAT, "messages": PARIS, "max_tokens": 24, "extra_body": {"temperature": 0}}
"""The client has no argument for a temperature any more."""


class Person(BaseModel):
    name: str
    age: int


@check
def a_message_gets_an_answer_that_names_its_version() -> None:
    raw = client.messages.with_raw_response.create(**asked)
    answer = raw.parse()
    assert answer.type == "message" and answer.role == "assistant" and "Paris" in answer.content[0].text, answer
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0
    assert raw.headers["x-model-version"] == f"{CHAT}@1"


@check
def a_stream_is_the_same_text_and_usage() -> None:
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason


@check
def the_raw_events_come_in_their_order() -> None:
    kinds = [event.type for event in client.messages.create(**asked, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    assert kinds.index("content_block_start") < kinds.index("content_block_delta") < kinds.index("content_block_stop")


@check
def tokens_are_counted_as_the_answer_counts_them() -> None:
    counted = client.messages.count_tokens(model=CHAT, messages=asked["messages"]).input_tokens
    assert counted == client.messages.create(**asked).usage.input_tokens


@check
def a_system_prompt_and_a_stop_sequence_are_followed() -> None:
    plain, told = client.messages.create(**asked), client.messages.create(**asked, system="You speak like a pirate.")
    assert told.usage.input_tokens != plain.usage.input_tokens
    stopped = client.messages.create(**asked, stop_sequences=["Paris"])
    assert stopped.stop_reason in ("stop_sequence", "end_turn") and "Paris" not in stopped.content[0].text, stopped


@check
def a_tool_is_called_whole_and_as_a_stream() -> None:
    question: Any = {**asked, "messages": [{"role": "user", "content": "What is the weather in Paris?"}], "max_tokens": 100}
    choices: Any = ({"type": "any"}, {"type": "tool", "name": "weather"})
    for choice in choices:
        whole = client.messages.create(**question, tools=WEATHER, tool_choice=choice)
        (call,) = (block for block in whole.content if block.type == "tool_use")
        assert call.name == "weather" and "city" in call.input, whole
        # vLLM 0.29 ends a named tool's call with a chat's "stop", which is "end_turn" here.
        assert whole.stop_reason == "tool_use" or (choice["type"] == "tool" and whole.stop_reason == "end_turn"), whole
        with client.messages.stream(**question, tools=WEATHER, tool_choice=choice) as stream:
            final = stream.get_final_message()
        (streamed,) = (block for block in final.content if block.type == "tool_use")
        assert streamed.input == call.input, (streamed, call)


@check
def an_answer_follows_a_schema() -> None:
    question: Any = [{"role": "user", "content": "Ada is 36 years old. Give her name and age."}]
    answer = client.messages.parse(**{**asked, "messages": question, "max_tokens": 60}, output_format=Person)
    assert isinstance(answer.parsed_output, Person), answer


@check
def the_result_of_a_tool_is_read() -> None:
    messages: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Snow, -3 degrees."}]},
    ]
    answer = client.messages.create(**{**asked, "messages": messages}, tools=WEATHER)
    assert answer.content, answer


@check
def errors_are_those_of_the_client() -> None:
    refused(anthropic.NotFoundError, "not_found_error", model="nobody")
    refused(anthropic.BadRequestError, "invalid_request_error", extra_body={"temperature": -1})
    refused(anthropic.BadRequestError, "invalid_request_error", max_tokens=10**6)
    refused(anthropic.BadRequestError, "invalid_request_error", messages=[])


def refused(kind: type[anthropic.APIStatusError], name: str, **wrong: Any) -> None:
    for stream in (False, True):
        try:
            client.messages.create(**{**asked, **wrong}, stream=stream)
        except kind as error:
            body: Any = error.body
            assert body["type"] == "error" and body["error"]["type"] == name and body["error"]["message"], body
        else:
            raise AssertionError(f"{wrong} was answered")


@check
def a_stream_that_is_left_ends() -> None:
    with client.messages.stream(**{**asked, "messages": LONG, "max_tokens": 2000}) as stream:
        next(iter(stream.text_stream))


run("anthropic")
