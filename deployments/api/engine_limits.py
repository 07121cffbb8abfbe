"""What vLLM 0.29 cannot bear, refused before it gets there. One function per fault, each with its reason. Pure.

`tests.fuzz` finds such requests. Where vLLM can be mended, `deployments.vllm_patches` does that instead.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from cluster.errors import BadRequest

Body = Mapping[str, Any]

MAX_CHARACTERS = 64 << 10
"""Of one grammar, JSON schema, list of choices or structural tag. The largest tool schemas in use have a tenth of it."""
MAX_REGEX_CHARACTERS = 4 << 10
MAX_DEPTH = 64
"""Levels of brackets in a grammar, a schema or a regular expression. Their compilers call themselves for each level."""
MAX_REPEATED = 4_000
"""Characters and classes of a regular expression once its repetitions are written out. Each becomes a state of an automaton."""
MAX_PATTERN_TOKENS = 64
"""Of a repetition that ``repetition_detection`` looks for."""
MAX_BAD_CHARACTERS = 16 << 10
"""Of all ``bad_words`` together."""


def check(body: Body) -> None:
    """Raise `BadRequest` for a request that the engine cannot bear; ``param`` names what is wrong with it."""
    for refuse in CHECKS:
        refuse(body)


# errors of the engine that are no errors of the client's: it answers 500


def refuse_misshapen(body: Body) -> None:
    """vLLM reads some parameters before it has checked their types: ``{"structured_outputs": []}`` is an AttributeError in it, and a tool
    without a name beside ``{"tool_choice": {…}}`` a KeyError."""
    if not isinstance(body.get("structured_outputs"), dict | None):
        raise BadRequest("`structured_outputs` must be an object.", 'For example {"regex": "[a-z]+"}.', "structured_outputs")
    if isinstance(body.get("tool_choice"), dict):
        for number, tool in enumerate(_list(body.get("tools"))):
            if not isinstance(_dict(_dict(tool).get("function")).get("name"), str):
                raise BadRequest(
                    f"`tools[{number}]` has no `function.name`.", "Name every tool.", f"tools[{number}].function.name"
                )
    if body.get("messages") == []:
        raise BadRequest("`messages` is empty.", "Send at least one message.", "messages")


# faults that reach other clients' answers


def refuse_chosen_logprobs(body: Body) -> None:
    """With ``logprob_token_ids`` in a batch, every other request of the batch gets the log-probabilities of those tokens instead of its own
    (``v1/sample/sampler.py``: one tensor for all)."""
    if body.get("logprob_token_ids"):
        raise BadRequest(
            "`logprob_token_ids` is not supported: in vLLM it changes other requests' answers.",
            "Ask for `top_logprobs`.",
            "logprob_token_ids",
        )


# requests whose work is out of all proportion


def refuse_long_repetitions(body: Body) -> None:
    """vLLM looks for every length of a repetition, after every token, in the loop that schedules everybody's tokens."""
    size = _dict(body.get("repetition_detection")).get("max_pattern_size")
    if isinstance(size, int | float) and size > MAX_PATTERN_TOKENS:
        raise BadRequest(
            f"`max_pattern_size` is {size}; at most {MAX_PATTERN_TOKENS} are allowed.",
            "Look for shorter ones.",
            "repetition_detection",
        )


def refuse_many_bad_words(body: Body) -> None:
    """vLLM tokenizes each of them twice in the loop that serves everybody's tokens."""
    count = sum(len(word) for word in _list(body.get("bad_words")) if isinstance(word, str))
    if count > MAX_BAD_CHARACTERS:
        raise BadRequest(
            f"`bad_words` has {count} characters; at most {MAX_BAD_CHARACTERS} are allowed.", "Send fewer.", "bad_words"
        )


def refuse_bombs(body: Body) -> None:
    """Grammars that take seconds or gigabytes to compile, or whose compiler runs out of stack and takes the engine with it."""
    for grammar in _grammars(body):
        text = _written(grammar)
        limit = MAX_REGEX_CHARACTERS if grammar.kind == "regex" else MAX_CHARACTERS
        _refuse_above(len(text), limit, "characters", grammar)
        _refuse_above(depth(_brackets(grammar, text)), MAX_DEPTH, "levels of brackets", grammar)
        for pattern in _patterns(grammar, text):
            _refuse_above(depth(ESCAPE.sub("", CLASS.sub("", pattern))), MAX_DEPTH, "levels of brackets", grammar)
            _refuse_above(written_out(pattern), MAX_REPEATED, "characters once its repetitions are written out", grammar)
        if '"patternProperties"' in text:
            # Only the backend outlines reads them. It builds its automaton over the whole vocabulary, which has no bound in time.
            raise BadRequest(f"`{grammar.param}` uses `patternProperties`.", "Name the properties.", grammar.param)


def _refuse_above(count: int, limit: int, of_what: str, grammar: "Grammar") -> None:
    if count > limit:
        raise BadRequest(
            f"`{grammar.param}` has {count} {of_what}; at most {limit} are allowed.", "Make it simpler.", grammar.param
        )


CHECKS: tuple[Callable[[Body], None], ...] = (
    refuse_misshapen,
    refuse_chosen_logprobs,
    refuse_long_repetitions,
    refuse_many_bad_words,
    refuse_bombs,
)


# what a request constrains its answer by


class Grammar(NamedTuple):
    param: str
    kind: str
    """``regex``, ``grammar``, or ``json`` for everything that is a JSON document."""
    text: Any
    """As in the body: text, or a document."""


def _grammars(body: Body) -> Iterator[Grammar]:
    """Every grammar that the engine may compile for the request."""
    outputs = _dict(body.get("structured_outputs"))
    for part in ("json", "regex", "choice", "grammar", "structural_tag"):
        if outputs.get(part) is not None:
            yield Grammar(f"structured_outputs.{part}", part if part in ("regex", "grammar") else "json", outputs[part])
    for param, form in (("response_format", body.get("response_format")), ("text.format", _dict(body.get("text")).get("format"))):
        if _dict(form).get("type") not in (None, "text"):
            yield Grammar(param, "json", form)
    for number, tool in enumerate(_list(body.get("tools"))):
        function = _dict(_dict(tool).get("function")) or _dict(tool)
        for name in ("parameters", "input_schema"):  # OpenAI's name, and Anthropic's
            if function.get(name):
                yield Grammar(f"tools[{number}].{name}", "json", function[name])


def _written(grammar: Grammar) -> str:
    """The grammar as text. Raises `BadRequest` where it is nested deeper than orjson writes."""
    if isinstance(grammar.text, str):
        return grammar.text
    try:
        return orjson.dumps(grammar.text).decode()
    except orjson.JSONEncodeError:
        raise BadRequest(f"`{grammar.param}` is nested too deeply.", "Make it simpler.", grammar.param) from None


STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
ESCAPE = re.compile(r"\\.", re.DOTALL)
PATTERN = re.compile(r'"(?:pattern|regex)"\s*:\s*"((?:[^"\\]|\\.)*)"')
REPEATED = re.compile(r"\{\s*(\d{1,9})\s*,?\s*(\d{0,9})\s*\}")


def _brackets(grammar: Grammar, text: str) -> str:
    """The text without what only looks like a bracket."""
    return ESCAPE.sub("", CLASS.sub("", text)) if grammar.kind == "regex" else STRING.sub("", text)


def _patterns(grammar: Grammar, text: str) -> list[str]:
    """The regular expressions in a grammar. EBNF repeats in the same way."""
    return PATTERN.findall(text) if grammar.kind == "json" else [text]


def depth(text: str) -> int:
    """
    >>> depth('{"a": [[1]]}'), depth("((a)|(b))"), depth("a(")
    (3, 2, 1)
    """
    most = level = 0
    for character in text:
        if character in "([{":
            level += 1
            most = max(most, level)
        elif character in ")]}":
            level -= 1
    return most


def written_out(pattern: str) -> int:
    """How many characters and classes a regular expression has once its repetitions are written out.

    >>> written_out("a{3}b"), written_out("(a{10}b){10}"), written_out("[a-z]+"), written_out("(a|bc){3,}")
    (4, 110, 1, 9)
    """
    text = ESCAPE.sub("x", CLASS.sub("x", pattern))
    groups, last, at = [0], 0, 0
    """Sizes of the groups that are open, and of what a repetition would repeat."""
    while at < len(text):
        character = text[at]
        if repeated := REPEATED.match(text, at):
            last *= max(1, *(int(count or 0) for count in repeated.groups()))
        elif character == ")" and len(groups) > 1:
            last += groups.pop()
        elif character not in "*+?":
            groups[-1] += last
            last = int(character not in "(|")
            groups += [0] if character == "(" else []
        at = repeated.end() if repeated else at + 1
    return sum(groups) + last


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
