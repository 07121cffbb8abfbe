"""The requests of `benchmarks.parity` that are written out, each with what is meant to differ."""

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.parity.request import CHATS, COMPLETIONS, EMBEDDINGS, MESSAGES, RERANK, RESPONSES, SCORE, TOKENIZE, Request
from benchmarks.real import CHAT, ENCODER

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY}}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def _chat(name: str, differs: str = "", /, messages: Any = None, **body: Any) -> Request:
    asked = [{"role": "user", "content": "What is the capital of France?"}] if messages is None else messages
    whole = {"model": CHAT, "messages": asked, "temperature": 0, "max_tokens": 8, **body}
    return Request(name, CHATS, {key: value for key, value in whole.items() if value != "absent"}, differs=differs)


def _completion(name: str, differs: str = "", /, **body: Any) -> Request:
    return Request(
        name, COMPLETIONS, {"model": CHAT, "prompt": "One, two,", "temperature": 0, "max_tokens": 4, **body}, differs=differs
    )


def conversations() -> Iterator[Request]:
    user, call = (
        {"role": "user", "content": "What is the weather in Paris?"},
        {"name": "weather", "arguments": '{"city": "Paris"}'},
    )
    called: list[Any] = [
        user,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
    ]
    answered = [*called, {"role": "tool", "tool_call_id": "call_1", "content": "Snow."}]
    yield _chat(
        "several turns", messages=[user, {"role": "assistant", "content": "Snow."}, {"role": "user", "content": "And in Rome?"}]
    )
    yield _chat(
        "content in parts",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello"}]}],
    )
    yield _chat("the result of a tool", messages=answered, tools=TOOLS)
    yield _chat("the result of a tool, streamed", messages=answered, tools=TOOLS, stream=True)
    yield _chat(
        "a message goes on",
        messages=[user, {"role": "assistant", "content": "It is"}],
        continue_final_message=True,
        add_generation_prompt=False,
    )
    yield _chat("an empty question", messages=[{"role": "user", "content": ""}])
    yield _chat("a name", messages=[{"role": "user", "name": "anna", "content": "Who am I?"}])
    yield _chat("the developer's role", messages=[{"role": "developer", "content": "Be brief."}, user])
    yield _chat("an unknown role", messages=[{"role": "narrator", "content": "It rains."}, user])
    yield _chat("a long question", messages=[{"role": "user", "content": "sea " * 400}])


def texts() -> Iterator[Request]:
    yield _completion("many prompts", prompt=[f"{number}," for number in range(16)])
    yield _completion("many answers", n=4, prompt=["a", "b"], temperature=1, seed=5)
    yield _completion("a suffix", suffix="three")
    yield _completion("beams", use_beam_search=True, n=2)
    yield _completion("an empty prompt", prompt="")
    yield _completion("no prompts", prompt=[])


def vectors() -> Iterator[Request]:
    def embed(name: str, **body: Any) -> Request:
        return Request(name, EMBEDDINGS, {"model": ENCODER, "input": "a dog", **body})

    yield embed("token ids", input=[1037, 3899])
    yield embed("lists of token ids", input=[[1037, 3899], [1037, 17022]])
    yield embed("many texts", input=[f"text number {number}" for number in range(64)])
    yield embed("nothing", input=[])
    yield embed("an empty text", input="")
    yield embed("fewer dimensions", dimensions=64)
    yield embed("a text too long", input="dog " * 600)
    yield embed("a text too long is cut", input="dog " * 600, truncate_prompt_tokens=-1)
    yield embed("another encoding of numbers", encoding_format="hex")


BOUNDS = "bounded by gateway.max_choices, .max_prompts, .max_inputs"
STATE = "no replica keeps an answer"
UNNAMED = "a pool has several models, so a request must name one"
INTERNAL = "keys by which engines speak with each other are dropped"
ALIEN = "vLLM's other encodings are no JSON"


def refused() -> Iterator[Request]:
    """What Springtide refuses or leaves out, and bare vLLM does not."""
    yield _chat("a priority", priority=3)
    yield _chat("a priority below zero", priority=-1)
    yield _chat("a chat template", chat_template="{{ 'x' * 9 }}")
    yield _chat("17 answers", n=17, max_tokens=1)
    yield _completion("129 prompts", BOUNDS, prompt=["a"] * 129, max_tokens=1)
    yield _chat(
        "log-probabilities of chosen tokens",
        "refused: in vLLM it changes other requests' answers",
        logprobs=True,
        logprob_token_ids=[5],
    )
    yield _chat("no model", UNNAMED, model="absent")
    yield _completion("an empty model", UNNAMED, model="")
    yield _chat("a request id", request_id="abc")
    yield _chat("transfer parameters", INTERNAL, kv_transfer_params={"prompt_token_ids": [504, 3575, 282]})
    yield Request("2,049 texts", EMBEDDINGS, {"model": ENCODER, "input": ["a"] * 2049}, differs=BOUNDS)
    yield Request("vectors as bytes", EMBEDDINGS, {"model": ENCODER, "input": "a", "encoding_format": "bytes"}, differs=ALIEN)


WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": -1}, {"temperature": "hot"}, {"temperature": None}, {"max_tokens": -1}, {"max_tokens": 0}, {"max_tokens": 10**6},
    {"n": 0}, {"n": -1}, {"n": "2"}, {"n": 1.0}, {"n": 1.5}, {"top_p": 0}, {"top_p": 2}, {"top_k": -5}, {"stop": 5}, {"stop": [""]},
    {"logprobs": "yes"}, {"top_logprobs": 3}, {"frequency_penalty": 9}, {"seed": "x"}, {"messages": []}, {"messages": "Hi"},
    {"messages": [{}]}, {"messages": [{"role": "user"}]}, {"stream_options": {"include_usage": True}}, {"logit_bias": {"999999": 1}},
    {"logit_bias": {"a": 1}}, {"response_format": {"type": "yaml"}}, {"response_format": {"type": "json_schema"}},
    {"structured_outputs": {"regex": "(("}}, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"tool_choice": "required"},
    {"tools": []}, {"tools": [{"type": "function"}]}, {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
    {"min_tokens": 99}, {"repetition_penalty": 0}, {"unknown_key": 1}, {"logprobs": True, "top_logprobs": 99},
)  # fmt: skip
"""Most are wrong in both; a few look so, and both answer."""


def wrong() -> Iterator[Request]:
    for body in WRONG:
        yield _chat(json.dumps(body)[1:60].rstrip("}"), **body)
    for name, raw in (("no JSON", "{"), ("a list", "[]"), ("nothing", ""), ("text", '"hello"')):
        yield Request(f"the body: {name}", CHATS, raw)
    yield _chat("an unknown model", model="nobody")
    yield _chat("an unknown model, streamed", model="nobody", stream=True)
    yield _completion("a completion by an unknown model", model="nobody")
    yield _completion("a context too long", prompt=[504] * 9000)
    yield _completion("a token that is none", prompt=[10**7])
    yield _completion("logprobs: 99", logprobs=99)
    yield _completion("a stream that is wrong", stream=True, max_tokens=-5)
    yield _chat("a chat with the encoder", model=ENCODER)
    yield Request("vectors of the chat model", EMBEDDINGS, {"model": CHAT, "input": "a dog"})
    yield Request("an unknown route", "/v1/nothing", {"model": CHAT})
    yield Request("a known route, read", CHATS, None, "GET")


def others() -> Iterator[Request]:
    asked, counted = {"model": CHAT, "temperature": 0}, [{"role": "user", "content": "What is the capital of France?"}]
    for stream in (False, True):
        more = {"stream": True} if stream else {}
        words = ", streamed" if stream else ""
        yield Request(f"a response{words}", RESPONSES, {**asked, "input": "Who wrote Hamlet?", "max_output_tokens": 12, **more})
        yield Request(f"a message{words}", MESSAGES, {**asked, "messages": counted, "max_tokens": 12, **more})
        yield Request(
            f"a message by nobody{words}", MESSAGES, {**asked, "model": "nobody", "messages": counted, "max_tokens": 12, **more}
        )
        tool = {"name": "weather", "input_schema": CITY}
        yield Request(
            f"a message that calls a tool{words}",
            MESSAGES,
            {**asked, "messages": counted, "max_tokens": 64, "tools": [tool], "tool_choice": {"type": "any"}, **more},
        )
    yield Request("an earlier response", RESPONSES, {**asked, "input": "Hi", "previous_response_id": "resp_1"}, differs=STATE)
    yield Request("in the background", RESPONSES, {**asked, "input": "Hi", "background": True})
    yield Request("a message without max_tokens", MESSAGES, {**asked, "messages": counted})
    yield Request("tokens of a message", f"{MESSAGES}/count_tokens", {"model": CHAT, "messages": counted})
    yield Request("tokens of a text", TOKENIZE, {"model": CHAT, "prompt": "The capital of France"})
    yield Request("a text of tokens", "/detokenize", {"model": CHAT, "tokens": [504, 3575, 282, 4649]})
    yield Request("a ranking", RERANK, {"model": ENCODER, "query": "a dog", "documents": ["taxes", "a puppy"]})
    yield Request("scores", SCORE, {"model": ENCODER, "text_1": "a dog", "text_2": ["a puppy", "taxes"]})
