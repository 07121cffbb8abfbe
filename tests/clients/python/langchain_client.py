"""LangChain's integration for OpenAI."""

import asyncio
from typing import Any

import openai
from checks import CHAT, ENCODER, PARIS, URL, alike, check, run
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

place: Any = {"base_url": f"{URL}/v1", "api_key": "unused", "max_retries": 0}
model = ChatOpenAI(model=CHAT, temperature=0, max_tokens=60, timeout=120, **place)
QUESTION = PARIS[0]["content"]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Snow in {city}."


@check
def a_chain_is_invoked_and_names_its_version() -> None:
    answer = model.invoke(QUESTION)
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0, answer
    assert answer.response_metadata["model_name"] == f"{CHAT}@1", answer.response_metadata


@check
def a_stream_is_the_same_text_and_counts_its_tokens() -> None:
    whole, joined = model.invoke(QUESTION), AIMessageChunk(content="")
    for chunk in model.stream(QUESTION, stream_usage=True):
        joined += chunk
    assert joined.content == whole.content
    assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


@check
def questions_are_batched() -> None:
    questions = [QUESTION, "Count from one to five."]
    assert [one.content for one in model.batch(questions)] == [model.invoke(one).content for one in questions]


@check
def it_is_asked_without_blocking() -> None:
    async def texts() -> list[str]:
        return [chunk.content async for chunk in model.astream(QUESTION)]

    assert "Paris" in "".join(asyncio.run(texts()))


@check
def a_bound_tool_is_called_and_its_result_read() -> None:
    question = HumanMessage("What is the weather in Paris?")
    called = model.bind_tools([weather], tool_choice="any").invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "weather" and "city" in call["args"], called
    answer = model.bind_tools([weather]).invoke(
        [question, called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    )
    assert answer.content or answer.tool_calls, answer


@check
def an_answer_follows_a_schema() -> None:
    for method in ("json_schema", "function_calling"):
        person = model.with_structured_output(Person, method=method).invoke("Ada is 36 years old. Give her name and age.")
        assert isinstance(person, Person), (method, person)


@check
def vectors_are_alike_where_the_texts_are() -> None:
    # LangChain would send token ids of OpenAI's own models, as its manual says of servers that are not OpenAI's.
    vectors = OpenAIEmbeddings(model=ENCODER, check_embedding_ctx_length=False, **place)
    puppy, taxes = vectors.embed_documents(["a puppy", "taxes are due in April"])
    dog = vectors.embed_query("a dog")
    assert len(dog) == 384 and alike(dog, puppy) > 0.6 > 0.4 > alike(dog, taxes)


@check
def errors_are_those_of_the_client() -> None:
    for kind, wrong in ((openai.NotFoundError, {"model": "nobody"}), (openai.BadRequestError, {"max_tokens": 10**6})):
        try:
            ChatOpenAI(**{"model": CHAT, **place, **wrong}).invoke(QUESTION)
        except kind as error:
            assert error.code in ("model_not_found", "context_length_exceeded"), error
        else:
            raise AssertionError(f"{wrong} was answered")


@check
def a_stream_that_is_left_ends() -> None:
    stream = model.stream("Write a very long story about the sea.", max_tokens=2000, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()


run("langchain-openai")
