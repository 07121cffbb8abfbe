"""Requests that no client should send, and some that they do, against a real engine: ``python -m tests.fuzz [REQUESTS]`` on this machine's pool.

A request is a route, a model, and some parameters of sampling and structured output, each with a likely value or with any. Eight are sent at
once, so that they share batches. A fault is an answer of 500 or above, an error of the server inside a stream, a stream without an end, a
connection that breaks, or an answer that is no JSON. Prints how many were sent, what came back, and what became of the engines.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TOGETHER = 8
TIMEOUT_S = 60
DRAW = "draw"
"""The command that prints requests instead of sending them."""
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# values

WORDS = [
    "",
    " ",
    "a",
    "Who are you?",
    "tide",
    "\n",
    "\x00",
    "\u202eevil",
    "😀🏳️‍🌈",
    "\ud7ff",
    "<|im_end|>",
    "</s>",
    "{% raw %}",
    "a" * 3000,
]
words = st.sampled_from(WORDS) | st.text(max_size=20)
numbers = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        16,
        17,
        0.0,
        -0.0,
        0.1,
        1.0,
        1.5,
        2.0,
        1e-12,
        1e-300,
        1e300,
        -1e300,
        2**31,
        -(2**31),
        2**32,
        2**63 - 1,
        2**63,
        -(2**63),
        10**15,
    ]
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
small = st.integers(0, 8)
token_ids = st.lists(st.integers(0, 300), max_size=4) | st.lists(numbers, max_size=3)

# what constrains an answer

NESTED: dict[str, Any] = {"type": "object"}
for _ in range(60):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
SCHEMAS: list[Any] = [
    {}, {"type": "object"}, {"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 1, "maximum": 3}, {"enum": ["a", "b", None, 1.5]},
    {"type": "object", "properties": {"a": {"$ref": "#/nope"}}}, {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"type": "string", "pattern": "^(a|b)+$"}, {"type": "string", "pattern": "(("}, {"type": "string", "pattern": "(a{1000}){1000}"},
    {"type": "string", "pattern": "^(?=x)y$"}, {"type": "string", "format": "date-time"}, {"type": "string", "format": "nonsense"},
    {"type": "string", "minLength": 5, "maxLength": 2}, {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**9},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, {"type": "number", "multipleOf": 0.1}, {"type": "number", "multipleOf": 0},
    {"type": "integer", "minimum": 5, "maximum": 1}, {"anyOf": []}, {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"not": {}}, {"type": []},
    {"type": "object", "patternProperties": {"^a": {"type": "string"}}}, {"type": "object", "additionalProperties": False, "required": ["a"]},
    {"type": "object", "properties": {"\x00": {"type": "string"}, "😀": {"const": "\n"}}}, {"const": "a" * 2000}, NESTED, True, False,
    None, 3, "x", [],
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}},
]  # fmt: skip
REGEXES = [
    "[a-z]{1,3}", "(((", "", "a|", "(a|b)*a(a|b){12}", "(a+)+b", "(a{1000}){1000}", "a{100000}", "\\d+\\.\\d+", "(?=a)b", "(?i)a", "\\1", "[z-a]",
    "[[:alpha:]]", "\\p{L}+", ".*", "^$", "(?P<n>a)", "a{2,1}", "\x00", "\\", "[", "😀+", "(" * 60 + "a" + ")" * 60, "(" * 500 + "a" + ")" * 500,
    "|".join(f"w{n}" for n in range(500)), "(a?){40}a{40}", "[^\\n]*\\n[^\\n]*",
]  # fmt: skip
GRAMMARS = [
    'root ::= "a" | "b"', 'root ::= root', 'root ::= root "a" | "a"', 'root ::= x', "", "root ::= ", 'root ::= "a', "start: \"a\" | \"b\"",
    "start: /[a-z]+/", 'start: start "a"', "root ::= " + "(" * 60 + '"a"' + ")" * 60, "root ::= " + "(" * 900 + '"a"' + ")" * 900,
    "\n".join(f"r{n} ::= r{n + 1}" for n in range(300)) + '\nr300 ::= "a"\nroot ::= r0', 'root ::= "a"{1,100000}', "root ::= [a-z]{3}", "%%%", "\x00",
]  # fmt: skip
TAGS: list[Any] = [
    {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f"]}, {"structures": [], "triggers": []},
    {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}, {"format": {"type": "const_string", "value": "a"}}, {}, [], "x",
    {"format": {"type": "json_schema", "json_schema": {"type": "object"}}}, {"format": {"type": "regex", "pattern": "(a|b)*"}},
]  # fmt: skip
schemas, regexes, grammars, tags = (st.sampled_from(some) for some in (SCHEMAS, REGEXES, GRAMMARS, TAGS))
regexes |= st.text("ab()[]{}|*+?.\\^$,09", max_size=12)


def runs(ones: Sequence[str], between: str, nothing: str) -> st.SearchStrategy[str]:
    """Optional and repeated elements in a row, some in groups: up to hundreds, which take minutes to compile where nobody refuses them.
    ``nothing``: how an alternative is written that is empty."""
    times = st.sampled_from(["?", "*", "+", "?", "*"]) | st.integers(1, 200).map(lambda most: f"{{0,{most}}}")
    element = st.tuples(st.sampled_from(ones), times).map("".join) | st.sampled_from(ones).map(lambda one: f"({one}|{nothing})")
    group = st.tuples(st.lists(element, min_size=1, max_size=3).map(between.join), times).map(
        lambda pair: f"({pair[0]}){pair[1]}"
    )
    repeated = st.tuples(element | group, st.sampled_from([1, 3, 20, 60, 150]))
    return st.lists(repeated, min_size=1, max_size=3).map(
        lambda some: between.join(between.join([one] * count) for one, count in some)
    )


regexes |= runs(["[a-z]", "a", "\\w", ".", "\\d", "(\\w+ )", "(ab|c)", "[a-z]-"], "", "")
grammars |= runs(["[a-z]", '"a"', "[^a]", '("ab" | "c")', "r"], " ", '""').map(lambda one: f"root ::= {one}\nr ::= [a-z]?")
schemas |= regexes.map(lambda one: {"type": "string", "pattern": f"^{one}$"})
structured = st.one_of(
    schemas.map(lambda one: {"json": one}),
    schemas.map(lambda one: {"json": json.dumps(one)}),
    regexes.map(lambda one: {"regex": one}),
    st.lists(words, max_size=4).map(lambda some: {"choice": some}),
    grammars.map(lambda one: {"grammar": one}),
    tags.map(lambda one: {"structural_tag": json.dumps(one)}),
    st.sampled_from([{"json_object": True}, {"json_object": False}, {}, {"regex": "a", "choice": ["a"]}, [], "x"]),
)
formats = st.one_of(
    schemas.map(lambda one: {"type": "json_schema", "json_schema": {"name": "x", "schema": one}}),
    tags.map(lambda one: {"type": "structural_tag", **(one if isinstance(one, dict) else {"format": one})}),
    st.sampled_from(
        [{"type": "json_object"}, {"type": "text"}, {"type": "nonsense"}, {"type": "json_schema"}, "json_object", []]
    ),
)
tools = st.lists(
    schemas.map(lambda one: {"type": "function", "function": {"name": "f", "parameters": one}})
    | st.sampled_from([{}, {"type": "function"}, {"type": "function", "function": {}}, 1, "f"]),
    max_size=2,
)
choices = st.sampled_from(
    ["none", "auto", "required", "any", {"type": "function", "function": {"name": "f"}}, {"function": 1}, {}, [], 1]
)

LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2), "top_p": st.floats(0.01, 1), "top_k": st.integers(-1, 50), "min_p": st.floats(0, 1),
    "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2), "repetition_penalty": st.floats(0.01, 3) | st.just(1e-30),
    "length_penalty": st.floats(-2, 2), "n": st.integers(1, 4), "best_of": st.integers(1, 4), "seed": st.integers(-(2**63), 2**63 - 1),
    "logit_bias": st.dictionaries(st.integers(-1, 2000).map(str), st.floats(-200, 200) | numbers, max_size=3),
    "prompt_logprobs": st.integers(-1, 6), "echo": st.booleans(), "stop": words | st.lists(words, max_size=6), "stop_token_ids": token_ids,
    "bad_words": st.lists(words, max_size=3), "min_tokens": small, "max_tokens": st.integers(0, 12), "ignore_eos": st.booleans(),
    "allowed_token_ids": token_ids, "truncate_prompt_tokens": st.integers(-2, 40), "truncation_side": st.sampled_from(["left", "right"]),
    "structured_outputs": structured, "response_format": formats, "stream": st.booleans(), "use_beam_search": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}),
    "include_stop_str_in_output": st.booleans(), "skip_special_tokens": st.booleans(), "spaces_between_special_tokens": st.booleans(),
    "add_special_tokens": st.booleans(), "return_tokens_as_token_ids": st.booleans(), "return_token_ids": st.booleans(),
    "logprob_token_ids": token_ids, "cache_salt": words, "priority": numbers, "stream_interval": small, "user": words, "suffix": words,
    "repetition_detection": st.fixed_dictionaries({"max_pattern_size": numbers, "min_count": numbers}),
    "vllm_xargs": st.dictionaries(words, numbers, max_size=2), "kv_transfer_params": st.dictionaries(words, words, max_size=2),
    "thinking_token_budget": numbers, "prompt_embeds": words, "request_id": words,
}  # fmt: skip
OF_CHAT: dict[str, st.SearchStrategy[Any]] = {
    "logprobs": st.booleans(), "top_logprobs": st.integers(-1, 21), "max_completion_tokens": st.integers(0, 12), "tools": tools,
    "tool_choice": choices,
    "add_generation_prompt": st.booleans(), "continue_final_message": st.booleans(), "parallel_tool_calls": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "max", "enormous"]), "include_reasoning": st.booleans(), "return_prompt_text": st.booleans(),
    "documents": st.lists(st.dictionaries(words, words, max_size=2), max_size=2),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["tokenize", "chat_template", "messages", "return_tensors", "max_length", "truncation", "x"]), anything, max_size=2
    ),
    "mm_processor_kwargs": st.dictionaries(words, words, max_size=1), "media_io_kwargs": st.dictionaries(words, st.just({}), max_size=1),
}  # fmt: skip
parts = st.sampled_from(
    [
        {"type": "text", "text": "a"}, {"type": "text"}, {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {}, 1,
    ]
)  # fmt: skip
roles = st.sampled_from(["user", "user", "user", "system", "assistant", "tool", "developer", "nobody", ""])
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": words | st.lists(parts, max_size=2) | st.none()},
        optional={"name": words, "tool_calls": st.sampled_from([None, [], [{}], [CALL]]), "tool_call_id": words},
    ),
    max_size=3,
)
prompts = st.one_of(words, st.lists(words, max_size=3), token_ids, st.lists(token_ids, max_size=2), st.none())

RUINS = (
    lambda raw: raw.replace(b"1", b"NaN", 1), lambda raw: raw.replace(b"0", b"Infinity", 1), lambda raw: raw.replace(b"2", b"1e999", 1),
    lambda raw: raw[:-1] + b', "temperature": 0, "temperature": 5}', lambda raw: raw[: len(raw) // 2], lambda raw: raw.replace(b"a", b"\xff", 1),
    lambda raw: raw.replace(b'"', b'"\\ud800', 1), lambda raw: b"[" + raw + b"]", lambda raw: raw + b"x",
)  # fmt: skip
"""What may become of a body on its way."""


class Asked(NamedTuple):
    path: str
    raw: bytes


@st.composite
def requests(draw: st.DrawFn, models: Sequence[str]) -> Asked:
    """Mostly a request that is right but for a parameter or two."""
    chat = draw(st.booleans())
    likely = LIKELY | OF_CHAT if chat else LIKELY | {"logprobs": st.integers(-1, 21)}
    body: dict[str, Any] = {"model": draw(st.sampled_from(models)), "max_tokens": 4}
    rare = draw(st.integers(0, 3)) == 0
    if chat:
        body["messages"] = draw(messages if rare else st.just([{"role": "user", "content": "Who are you?"}]))
    else:
        body["prompt"] = draw(
            prompts if rare else st.sampled_from(["Who are you?", "a", ["a", "What is the sea? " * 5], [5, 6, 7]])
        )
    for name in draw(st.lists(st.sampled_from(sorted(likely)), max_size=5, unique=True)):
        body[name] = draw(anything if draw(st.integers(0, 4)) == 0 else likely[name])
    raw = json.dumps(body).encode()
    return Asked(CHAT if chat else COMPLETIONS, draw(st.sampled_from(RUINS))(raw) if draw(st.integers(0, 9)) == 0 else raw)


# sending


@dataclass
class Figures:
    """What became of all requests."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter[int])
    faults: list[str] = field(default_factory=list[str])
    longest_s: float = 0.0

    def __str__(self) -> str:
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(self.statuses.items()))
        return f"{self.requests} requests: {answers}; {len(self.faults)} faults; the longest took {self.longest_s:.1f} s"


async def send(session: aiohttp.ClientSession, url: str, asked: Asked, figures: Figures) -> None:
    began_s = time.monotonic()
    try:
        async with session.post(url + asked.path, data=asked.raw, headers={"content-type": "application/json"}) as answer:
            status, body = answer.status, await answer.read()
            fault = fault_of(status, answer.content_type, body)
    except (aiohttp.ClientError, TimeoutError) as error:
        status, body, fault = 0, b"", f"{type(error).__name__}: {error}"
    figures.requests += 1
    figures.statuses[status] += 1
    figures.longest_s = max(figures.longest_s, time.monotonic() - began_s)
    if fault:
        figures.faults.append(f"{fault}\n  {asked.path} {asked.raw[:2000]!r}\n  {status} {body[:500]!r}")


def fault_of(status: int, content_type: str, body: bytes) -> str:
    """What is wrong with an answer; empty where nothing is. A refusal is right where it has OpenAI's form."""
    if status >= 500:
        return "an error of the server's"
    if content_type == "text/event-stream":
        return fault_of_stream(body)
    try:
        document = json.loads(body)
    except ValueError:
        return "no JSON"
    if status == 200:
        return "" if document.get("choices") else "no choices"
    return "" if set(document.get("error", ())) == {"message", "type", "param", "code"} else "an error in no known form"


def fault_of_stream(body: bytes) -> str:
    events = [event.removeprefix(b"data: ") for event in body.strip().split(b"\n\n")]
    last = json.loads(events[-1]) if events[-1].startswith(b"{") else {}
    if events[-1] == b"[DONE]" or last.get("error", {}).get("type") == "invalid_request_error":
        return ""
    return "an error of the server's in a stream" if "error" in last else "a stream without an end"


async def send_all(url: str, asked: Iterable[Asked], figures: Figures) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        await asyncio.gather(*(send(session, url, one, figures) for one in asked))


def fuzz(url: str, models: Sequence[str], count: int, figures: Figures | None = None) -> Figures:
    """Send about ``count`` requests, others each time. Goes on after a fault. Adds to ``figures`` where they are given."""
    figures = Figures() if figures is None else figures
    draw(models, count, lambda asked: asyncio.run(send_all(url, asked, figures)))
    return figures


def fuzz_alike(url: str, models: Sequence[str], count: int) -> Figures:
    """The same with the same requests each time, whichever tests run."""
    figures = Figures()
    for asked in alike(models, count):
        asyncio.run(send_all(url, asked, figures))
    return figures


def alike(models: Sequence[str], count: int) -> list[list[Asked]]:
    """About ``count`` requests, the same each time.

    A process of their own draws them. Hypothesis also draws from the constants in the source of every module of ours that its process has
    imported, so in a run of all tests, or after a change anywhere, three quarters of the requests were others.
    """
    line = [sys.executable, "-m", "tests.fuzz", DRAW, str(count), *models]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return [[Asked(path, bytes.fromhex(raw)) for path, raw in json.loads(group)] for group in done.stdout.splitlines()]


def draw(models: Sequence[str], count: int, each: Callable[[list[Asked]], None], fixed: bool = False) -> None:
    """Call ``each`` with one group of requests after the other. ``fixed``: the same in every process that has imported nothing else."""

    @settings(
        max_examples=max(1, count // TOGETHER),
        derandomize=fixed,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(st.lists(requests(models), min_size=TOGETHER, max_size=TOGETHER))
    def group(asked: list[Asked]) -> None:
        each(asked)

    group()


# engines


def engines(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes of the engines whose fronts these are."""
    fronts = [psutil.Process(pid) for pid in pids]
    return [process for front in fronts for process in (front, *front.children(recursive=True))]


class Memory(NamedTuple):
    """Of some processes together, in MiB."""

    resident: float
    proportional: float
    """With pages that several share divided among them."""

    def __str__(self) -> str:
        return f"{self.resident:.0f} MB resident, {self.proportional:.0f} MB proportional"


def memory(processes: Iterable[psutil.Process]) -> Memory:
    """What they take. A process that has ended takes none."""
    found = [process.memory_full_info() for process in processes if process.is_running()]
    return Memory(sum(one.rss for one in found) / 2**20, sum(one.pss for one in found) / 2**20)


def grown(before: Memory, after: Memory) -> float:
    """
    >>> grown(Memory(100, 50), Memory(125, 75))
    0.5
    """
    return max(now / then for then, now in zip(before, after, strict=True)) - 1


def main(count: int) -> None:
    from cluster import client, config
    from cluster.pool import local

    configuration = local.remembered(config.load())
    status = client.of(configuration).status()
    pids = [replica["pid"] for replica in status["replicas"]]
    models = sorted({*status["aliases"], *(id for replica in status["replicas"] for id in replica["held"])})
    before, url, figures = engines(pids), local.gateway(configuration), Figures()
    fuzz(url, models, count // 3, figures)
    warm = memory(before)
    fuzz(url, models, count - count // 3, figures)
    ended = sum(not process.is_running() for process in before)
    print(
        figures,
        f"{ended} engines ended; after a third of the requests they took {warm}",
        f"and in the end {memory(before)}",
        sep="\n",
    )
    print(*figures.faults, sep="\n\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [DRAW]:
        draw(
            sys.argv[3:],
            int(sys.argv[2]),
            lambda asked: print(json.dumps([(path, raw.hex()) for path, raw in asked])),
            fixed=True,
        )
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000)
