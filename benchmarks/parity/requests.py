"""The requests of `benchmarks.parity`: ``python -m benchmarks.parity.requests`` writes them to ``requests.jsonl``, the same each time.

Most are drawn: a question, with one to three parameters that clients use. The others are written out, each with what is meant to differ.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.parity.request import CHATS, COMPLETIONS, EMBEDDINGS, Request
from benchmarks.parity.written import PERSON, TOOLS, conversations, others, refused, texts, vectors, wrong
from benchmarks.real import CHAT, ENCODER

FILE = Path(__file__).with_name("requests.jsonl")
COUNT = 300
SEED = 18

QUESTIONS = """\
What is the capital of France?
Count from one to five.
Say hello in Spanish.
What is 2 + 2?
Who wrote Hamlet?
Name three colours.
Is the sun a star?
Write a haiku about rain.
Ada is 36 years old.
Antwort auf Deutsch, bitte!
日本の首都はどこですか?
🙂
Translate to French: good night
Write one line of Python that prints hello.
Why is the sky blue?""".splitlines()
BEGINNINGS = """\
The capital of France is
Once upon a time
def add(a, b):
1, 2, 3,
Roses are red,
Der Himmel ist
The three colours are
Q: What is 2 + 2? A:
In the year 1969
🙂
Water boils at""".splitlines()
TEXTS = """\
a dog
a puppy
taxes are due in April
Ein Hund läuft.
猫
the quick brown fox jumps over the lazy dog
🙂
a
how do I reset my password?
The mitochondrion is the powerhouse of the cell.
def f(x): return x
London is rainy.""".splitlines()

SAMPLING: tuple[dict[str, Any], ...] = (
    {"stop": "."}, {"stop": [",", "\n"]}, {"stop": ["is"], "include_stop_str_in_output": True}, {"n": 2}, {"seed": 7}, {"top_p": 0.5},
    {"frequency_penalty": 0.7}, {"presence_penalty": 1.1}, {"repetition_penalty": 1.3}, {"logit_bias": {"28": -100, "1057": 5}},
    {"min_tokens": 6}, {"ignore_eos": True}, {"stop_token_ids": [28, 30]}, {"skip_special_tokens": False}, {"top_k": 1}, {"min_p": 0.1},
    {"bad_words": ["the", "is"]}, {"allowed_token_ids": [28, 30, 253, 282, 314, 260]}, {"temperature": 1, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "seed": 11}, {"user": "anna"}, {"return_token_ids": True}, {"prompt_logprobs": 2},
    {"spaces_between_special_tokens": False},
    {"structured_outputs": {"regex": "[a-z]{3,6}"}}, {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, {"structured_outputs": {"json": PERSON}, "max_tokens": 48},
    {"response_format": {"type": "json_object"}, "max_tokens": 48},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}, "max_tokens": 48},
)  # fmt: skip
"""Of chats and completions."""
CHAT_ONLY: tuple[dict[str, Any], ...] = (
    {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"max_completion_tokens": 5}, {"tools": TOOLS, "tool_choice": "none"},
    {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required", "max_tokens": 64}, {"tools": TOOLS, "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 64}, {"echo": True},
    {"add_generation_prompt": False}, {"store": True, "metadata": {"a": "b"}}, {"reasoning_effort": "low"}, {"service_tier": "auto"},
    {"stop": None, "n": None, "tools": None, "logit_bias": None, "response_format": None},
)  # fmt: skip
COMPLETION_ONLY: tuple[dict[str, Any], ...] = (
    {"logprobs": 0}, {"logprobs": 3}, {"echo": True}, {"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0},
    {"echo": True, "logprobs": 1, "max_tokens": 1}, {"add_special_tokens": False}, {"truncate_prompt_tokens": 2},
    {"return_tokens_as_token_ids": True, "logprobs": 1},
)  # fmt: skip


def generated() -> list[Request]:
    draw = random.Random(SEED)  # noqa: S311 (no secret)
    written = [*conversations(), *texts(), *vectors(), *refused(), *wrong(), *others()]
    vectors_too = [*written, *_vectors(draw, 24)]
    left = COUNT - len(vectors_too)
    return [*vectors_too, *_chats(draw, left * 3 // 5), *_completions(draw, left - left * 3 // 5)]


def _chats(draw: random.Random, count: int) -> Iterator[Request]:
    options = _in_turn(draw, (*CHAT_ONLY, *SAMPLING))
    for number in range(count):
        messages: list[Any] = [{"role": "user", "content": draw.choice(QUESTIONS)}]
        if draw.random() < 0.3:
            messages.insert(0, {"role": "system", "content": draw.choice(("Be brief.", "You are a pirate.", ""))})
        yield _drawn(draw, f"chat {number}", CHATS, {"model": CHAT, "messages": messages}, next(options))


def _completions(draw: random.Random, count: int) -> Iterator[Request]:
    options = _in_turn(draw, (*COMPLETION_ONLY, *SAMPLING))
    for number in range(count):
        several = draw.sample(BEGINNINGS, 2)
        prompt: Any = draw.choice(
            (several[0], several[0], several[0], several, [504, 3575, 282, 4649, 314], [[504, 3575], [28, 30]])
        )
        yield _drawn(draw, f"completion {number}", COMPLETIONS, {"model": CHAT, "prompt": prompt}, next(options))


def _drawn(draw: random.Random, name: str, path: str, body: dict[str, Any], option: dict[str, Any]) -> Request:
    whole = {**body, "temperature": 0, "max_tokens": draw.choice((1, 4, 8, 12, 16)), **option}
    if "max_completion_tokens" in option:
        del whole["max_tokens"]
    if draw.random() < 0.4:
        whole["stream"] = True
        more: Any = draw.choice((None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}))
        whole |= {"stream_options": more} if more else {}
    return Request(f"{name}: {', '.join(option)}", path, whole)


def _vectors(draw: random.Random, count: int) -> Iterator[Request]:
    options = _in_turn(
        draw, ({}, {"encoding_format": "base64"}, {"encoding_format": "float"}, {"user": "anna"}, {"truncate_prompt_tokens": 4})
    )
    for number in range(count):
        text = draw.sample(TEXTS, draw.choice((1, 1, 2, 5)))
        body = {"model": ENCODER, "input": text if len(text) > 1 or draw.random() < 0.3 else text[0], **next(options)}
        yield Request(f"vectors {number}", EMBEDDINGS, body)


def _in_turn(draw: random.Random, options: tuple[dict[str, Any], ...]) -> Iterator[dict[str, Any]]:
    """Each of them as often as the others, in a new order each time."""
    while True:
        yield from draw.sample(options, len(options))


def lines(requests: list[Request]) -> str:
    return "".join(json.dumps(request._asdict(), ensure_ascii=False) + "\n" for request in requests)


def recorded() -> list[Request]:
    return [Request(**json.loads(line)) for line in FILE.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    FILE.write_text(lines(generated()), "utf-8")
