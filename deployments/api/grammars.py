"""What a request constrains its answer by: grammars, JSON schemas, regular expressions, and what compiling them takes. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from cluster.errors import BadRequest
from deployments.api.repetitions import distinct, plain, written_out
from deployments.api.runs import run_ms

Body = Mapping[str, Any]

FORMAT_MS = {"uri-template": 70.0, "uri": 20.0, "uri-reference": 20.0, "email": 20.0, "hostname": 7.0, "ipv6": 2.0}
"""Of a JSON schema's ``format``: milliseconds that xgrammar 0.2 takes to compile one, with a vocabulary of 49,152 tokens."""
PATTERN_MS = 1.7
"""One character or class of a ``pattern``, with its repetitions written out."""
REPEATED_MS = 2.0
"""One state of a repetition in EBNF or in a regular expression of its own, where the repetitions differ."""
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


JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
BRACKET = re.compile(r"[()\[\]{}]")
CAPTURE = re.compile(r'\[[^\[\]"\r\n]*capture[ \t]*=[ \t]*"')


def document(grammar: Grammar) -> Any:
    """The JSON document. Raises `BadRequest` for text that is none, and for text in text, which xgrammar would read."""
    if not isinstance(grammar.text, str):
        return grammar.text
    try:
        found = orjson.loads(grammar.text)
    except orjson.JSONDecodeError:
        found = ""
    if isinstance(found, str):
        raise BadRequest(f"`{grammar.param}` is a text, but no JSON document.", "Send the document itself.", grammar.param)
    return found


def expressions(grammar: Grammar) -> Iterator[Grammar]:
    """The regular expressions and EBNF grammars in a grammar, which may be itself.

    >>> [one.text for one in expressions(Grammar("response_format", "json", {"items": {"pattern": "a+"}}))]
    ['a+']
    """
    if grammar.kind != "json":
        yield grammar._replace(text=written(grammar))
        return
    for node in objects(document(grammar)):
        for name, kind in (("pattern", "regex"), ("regex", "regex"), ("grammar", "grammar")):
            if isinstance(text := node.get(name), str):
                yield Grammar(grammar.param, kind, text)


def depth(text: str) -> int:
    """
    >>> depth('{"a": [[1]]}'), depth("((a)|(b))"), depth("a("), depth("))))((")
    (3, 2, 1, 2)
    """
    most = level = 0
    for bracket in BRACKET.findall(text):
        level = level + 1 if bracket in "([{" else max(0, level - 1)
        most = max(most, level)
    return most


def compile_ms(grammar: Grammar) -> float:
    """About how long the engine takes to compile it.

    >>> compile_ms(Grammar("response_format", "json", {"type": "string", "format": "uri"}))
    20.0
    >>> compile_ms(Grammar("response_format", "json", {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"]}))
    0.005
    >>> compile_ms(Grammar("structured_outputs.regex", "regex", "[a-z]?" * 50))
    5000.0
    """
    ms = sum(_expression_ms(one, grammar.kind == "json") for one in expressions(grammar))
    return ms + sum(map(_node_ms, objects(document(grammar)))) if grammar.kind == "json" else ms


def _expression_ms(one: Grammar, in_json: bool) -> float:
    """In a JSON string, xgrammar writes out a regular expression's repetitions."""
    if in_json and one.kind == "regex":
        return run_ms(one.text, in_json=True) + PATTERN_MS * written_out(plain(one.text))
    return run_ms(one.text, one.kind) + REPEATED_MS * distinct(one.text, one.kind)


def _node_ms(node: dict[str, Any]) -> float:
    """One JSON object of a schema, without what is in it and without its expressions."""
    format, properties = node.get("format"), as_dict(node.get("properties"))
    ms = FORMAT_MS.get(format, 0.0) if isinstance(format, str) else 0.0
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


def objects(document: Any) -> Iterator[dict[str, Any]]:
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
