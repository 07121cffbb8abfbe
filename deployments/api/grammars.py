"""What a request constrains its answer by: grammars, JSON schemas, regular expressions, and what compiling them takes. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from cluster.errors import BadRequest

Body = Mapping[str, Any]

FORMAT_MS = {"uri-template": 70.0, "uri": 20.0, "uri-reference": 20.0, "email": 20.0, "hostname": 7.0, "ipv6": 2.0}
"""Of a JSON schema's ``format``: milliseconds that xgrammar 0.2 takes to compile one, with a vocabulary of 49,152 tokens."""
PATTERN_MS = 1.7
"""One character or class of a ``pattern``, with its repetitions written out."""
PROPERTY_MS = 0.005
"""A property that may be absent, times the number of those in its object: each may follow each."""
BOUNDED_MS = 1.0
"""The same where the object bounds their number, times that number."""


class Grammar(NamedTuple):
    param: str
    kind: str
    """``regex``, ``grammar``, or ``json`` for everything that is a JSON document."""
    text: Any
    """As in the body: text, or a document."""


def grammars(body: Body) -> Iterator[Grammar]:
    """Every grammar that the engine may compile for the request."""
    outputs = as_dict(body.get("structured_outputs"))
    for part in ("json", "regex", "choice", "grammar", "structural_tag"):
        if outputs.get(part) is not None:
            yield Grammar(f"structured_outputs.{part}", part if part in ("regex", "grammar") else "json", outputs[part])
    for param, form in (
        ("response_format", body.get("response_format")),
        ("text.format", as_dict(body.get("text")).get("format")),
        ("output_config.format", as_dict(body.get("output_config")).get("format")),  # Anthropic's
    ):
        if as_dict(form).get("type") not in (None, "text") or as_dict(form).get("schema"):  # Anthropic's type may be left out
            yield Grammar(param, "json", form)
    for number, tool in enumerate(as_list(body.get("tools"))):
        function = as_dict(as_dict(tool).get("function")) or as_dict(tool)
        for name in ("parameters", "input_schema"):  # OpenAI's name, and Anthropic's
            if function.get(name):
                yield Grammar(f"tools[{number}].{name}", "json", function[name])


def written(grammar: Grammar) -> str:
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
BRACKET = re.compile(r"[()\[\]{}]")
REPEATED = re.compile(r"\{\s*(\d{1,9})\s*,?\s*(\d{0,9})\s*\}")


def brackets(grammar: Grammar, text: str) -> str:
    """The text without what only looks like a bracket."""
    return ESCAPE.sub("", CLASS.sub("", text)) if grammar.kind == "regex" else STRING.sub("", text)


def patterns(grammar: Grammar, text: str) -> list[str]:
    """The regular expressions in a grammar. EBNF repeats in the same way."""
    return PATTERN.findall(text) if grammar.kind == "json" else [text]


def depth(text: str) -> int:
    """
    >>> depth('{"a": [[1]]}'), depth("((a)|(b))"), depth("a(")
    (3, 2, 1)
    """
    most = level = 0
    for bracket in BRACKET.findall(text):
        level += 1 if bracket in "([{" else -1
        most = max(most, level)
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


def compile_ms(grammar: Grammar) -> float:
    """About how long the engine takes to compile a JSON schema. 0 for everything else, and for text that is no JSON.

    >>> compile_ms(Grammar("response_format", "json", {"type": "string", "format": "uri"}))
    20.0
    >>> compile_ms(Grammar("response_format", "json", {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"]}))
    0.005
    """
    if grammar.kind != "json":
        return 0
    try:
        return sum(map(_node_ms, _objects(orjson.loads(grammar.text) if isinstance(grammar.text, str) else grammar.text)))
    except orjson.JSONDecodeError:
        return 0


def _node_ms(node: dict[str, Any]) -> float:
    """One JSON object of a schema, without what is in it."""
    format, properties = node.get("format"), as_dict(node.get("properties"))
    ms = FORMAT_MS.get(format, 0.0) if isinstance(format, str) else 0.0
    ms += PATTERN_MS * sum(written_out(one) for one in (node.get("pattern"), node.get("regex")) if isinstance(one, str))
    if properties:
        required = {name for name in as_list(node.get("required")) if isinstance(name, str)}
        bound = min(len(properties), _most(node, "minProperties", "maxProperties"))
        ms += PROPERTY_MS * len(properties.keys() - required) ** 2 + BOUNDED_MS * len(properties) * bound
    return ms


def _most(node: dict[str, Any], *keys: str) -> float:
    """The greatest of the numbers under these keys; 0 where there is none.

    >>> _most({"minProperties": 3, "maxProperties": "9"}, "minProperties", "maxProperties")
    3
    """
    return max([0, *(value for key in keys if isinstance(value := node.get(key), int | float))])


def _objects(document: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a document, itself included."""
    left = [document]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
