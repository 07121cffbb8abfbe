"""OpenAI's own client for Python."""

import asyncio
import base64
import json
import struct
from typing import Any

import openai
from checks import CHAT, CITY, ENCODER, LONG, PARIS, URL, alike, check, run
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0, timeout=120)
WEATHER: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY}}
]
chat: Any = {"model": CHAT, "messages": PARIS, "temperature": 0, "max_tokens": 24}


class Person(BaseModel):
    name: str
    age: int


@check
def models_are_listed_and_described() -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {CHAT, ENCODER} <= set(listed), sorted(listed)
    assert client.models.retrieve(CHAT).object == "model"


@check
def a_question_gets_an_answer_that_names_its_version() -> None:
    raw = client.chat.completions.with_raw_response.create(**chat)
    answer = raw.parse()
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == raw.headers["x-model-version"] == f"{CHAT}@1", (answer.model, dict(raw.headers))


@check
def a_stream_is_the_same_text_and_ends_with_the_usage() -> None:
    whole = client.chat.completions.create(**chat)
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


@check
def the_streams_helper_puts_the_answer_together() -> None:
    with client.chat.completions.stream(**chat) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(pieces) == stream.get_final_completion().choices[0].message.content


@check
def several_choices_with_logprobs_and_a_stop() -> None:
    answer = client.chat.completions.create(**{**chat, "temperature": 1, "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 3})
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(token.top_logprobs) == 3 for choice in answer.choices for token in choice.logprobs.content)
    stopped = client.chat.completions.create(**chat, stop=["Paris"])
    assert stopped.choices[0].finish_reason == "stop" and "Paris" not in stopped.choices[0].message.content


@check
def a_tool_is_called_whole_and_as_a_stream() -> None:
    asked: Any = {
        **chat,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "max_tokens": 60,
        "tools": WEATHER,
    }
    forced = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", forced):
        whole = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = whole.message.tool_calls
        assert call.function.name == "weather" and call.id, whole
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments and '"city"' in call.function.arguments


@check
def a_tool_is_called_unforced_after_an_example() -> None:
    rome = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: Any = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [rome]},
        {"role": "user", "content": "What is the weather in Paris?"},
    ]
    asked: Any = {**chat, "messages": messages, "max_tokens": 60, "tools": WEATHER}
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    with client.chat.completions.stream(**asked) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.arguments == call.function.arguments, (
        choice
    )


@check
def the_result_of_a_tool_is_read() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Snow, -3 degrees."},
    ]
    answer = client.chat.completions.create(**{**chat, "messages": messages, "tools": WEATHER, "tool_choice": "none"})
    assert answer.choices[0].message.content, answer


@check
def an_answer_follows_a_schema() -> None:
    question: Any = [{"role": "user", "content": "Ada is 36 years old. Give her name and age."}]
    parsed = client.chat.completions.parse(**{**chat, "messages": question, "max_tokens": 60}, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person), parsed


@check
def completions_echo_and_stream() -> None:
    asked: Any = {"model": CHAT, "prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True, logprobs=1).choices[0]
    assert echoed.text == asked["prompt"] + whole.choices[0].text and echoed.logprobs.token_logprobs[0] is None
    assert "".join(one.choices[0].text for one in client.completions.create(**asked, stream=True)) == whole.choices[0].text
    both = client.completions.create(**{**asked, "prompt": ["One, two,", "The capital of France is"]})
    assert both.choices[1].text == whole.choices[0].text


@check
def responses_come_whole_and_as_a_stream() -> None:
    asked: Any = {"model": CHAT, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(**asked)
    assert "Paris" in whole.output_text, whole
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == whole.output_text


@check
def vectors_are_alike_where_the_texts_are() -> None:
    texts = ["a dog", "a puppy", "taxes are due in April"]
    dog, puppy, taxes = (one.embedding for one in client.embeddings.create(model=ENCODER, input=texts).data)
    assert len(dog) == 384 and alike(dog, puppy) > 0.6 > 0.4 > alike(dog, taxes)
    packed: Any = client.embeddings.create(model=ENCODER, input="a dog", encoding_format="base64").data[0].embedding
    assert alike(list(struct.unpack("<384f", base64.b64decode(packed))), dog) > 0.999
    numbers = client.embeddings.create(model=ENCODER, input="a dog", encoding_format="float").data[0].embedding
    assert alike(numbers, dog) > 0.999


@check
def errors_are_those_of_the_client() -> None:
    refused(openai.NotFoundError, "model_not_found", model="nobody")
    refused(openai.BadRequestError, "context_length_exceeded", max_tokens=10**6)
    refused(openai.BadRequestError, "invalid_request", temperature=-1)
    refused(openai.BadRequestError, "invalid_request", n=10**6)
    refused(openai.NotFoundError, None, model=ENCODER)


def refused(kind: type[openai.APIStatusError], code: str | None, **wrong: Any) -> None:
    for stream in (False, True):
        try:
            client.chat.completions.create(**{**chat, **wrong}, stream=stream)
        except kind as error:
            assert code in (None, error.code) and error.message and error.request_id, (error, error.code, error.request_id)
        else:
            raise AssertionError(f"{wrong} was answered")


@check
def a_stream_that_is_left_ends() -> None:
    stream = client.chat.completions.create(
        **{**chat, "messages": LONG, "max_tokens": 2000}, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()


@check
def a_task_that_is_cancelled_ends() -> None:
    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0) as own:
            asked = own.chat.completions.create(**{**chat, "messages": LONG, "max_tokens": 2000}, extra_body={"ignore_eos": True})
            try:
                await asyncio.wait_for(asked, 1)
            except TimeoutError:
                return
            raise AssertionError("2,000 tokens came within a second")

    asyncio.run(cancelled())


run("openai")
