"""LiteLLM, as a library, through its providers for OpenAI's API and for vLLM."""

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the internet for prices

import litellm
from checks import CHAT, CITY, ENCODER, LONG, PARIS, PERSON, URL, alike, check, run

place: Any = {"api_base": f"{URL}/v1", "api_key": "unused", "num_retries": 0, "timeout": 120}
asked: Any = {**place, "messages": PARIS, "temperature": 0, "max_tokens": 24}
PROVIDERS = ("openai", "hosted_vllm")
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY}}]


@check
def both_providers_answer_whole_and_as_a_stream() -> None:
    for provider in PROVIDERS:
        whole = litellm.completion(model=f"{provider}/{CHAT}", **asked)
        assert "Paris" in whole.choices[0].message.content and whole.usage.total_tokens > 0, whole
        chunks = list(
            litellm.completion(model=f"{provider}/{CHAT}", **asked, stream=True, stream_options={"include_usage": True})
        )
        built = litellm.stream_chunk_builder(chunks, messages=PARIS)
        assert built.choices[0].message.content == whole.choices[0].message.content
        assert built.usage.completion_tokens == whole.usage.completion_tokens


@check
def texts_are_completed() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{CHAT}", prompt="The capital of France is", max_tokens=5, **place
    )
    assert answer.choices[0].text, answer


@check
def it_is_asked_without_blocking() -> None:
    async def text() -> str:
        stream = await litellm.acompletion(model=f"openai/{CHAT}", **asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert "Paris" in asyncio.run(text())


@check
def a_tool_is_called() -> None:
    question = {**asked, "messages": [{"role": "user", "content": "What is the weather in Paris?"}], "max_tokens": 100}
    for provider in PROVIDERS:
        answer = litellm.completion(model=f"{provider}/{CHAT}", **question, tools=WEATHER, tool_choice="required")
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather" and "city" in call.function.arguments, answer


@check
def an_answer_follows_a_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    question = {**asked, "messages": [{"role": "user", "content": "Ada is 36 years old."}], "max_tokens": 60}
    text = litellm.completion(model=f"hosted_vllm/{CHAT}", **question, response_format=form).choices[0].message.content
    assert '"name"' in text and '"age"' in text, text


@check
def vectors_are_alike_where_the_texts_are() -> None:
    texts = ["a dog", "a puppy", "taxes are due in April"]
    for provider in PROVIDERS:
        answer = litellm.embedding(model=f"{provider}/{ENCODER}", input=texts, encoding_format="float", **place)
        dog, puppy, taxes = (one["embedding"] for one in answer.data)
        assert len(dog) == 384 and alike(dog, puppy) > 0.6 > 0.4 > alike(dog, taxes)


@check
def anthropics_form_goes_through_it_too() -> None:
    answer = litellm.completion(model=f"anthropic/{CHAT}", **{**asked, "api_base": URL})
    assert "Paris" in answer.choices[0].message.content, answer


@check
def errors_are_those_of_the_client() -> None:
    cases: Any = (
        (litellm.NotFoundError, {"model": "nobody"}),
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "sea " * 9000}]}),
    )
    for kind, wrong in cases:
        model = f"hosted_vllm/{wrong.get('model', CHAT)}"
        try:
            litellm.completion(**{**asked, **wrong, "model": model})
        except kind:
            continue
        raise AssertionError(f"{wrong} was answered")


@check
def a_stream_that_is_left_ends() -> None:
    async def leave() -> None:
        stream = await litellm.acompletion(
            model=f"openai/{CHAT}",
            **{**asked, "messages": LONG, "max_tokens": 2000},
            stream=True,
            extra_body={"ignore_eos": True},
        )
        await anext(aiter(stream))
        await stream.aclose()

    asyncio.run(leave())


run("litellm")
