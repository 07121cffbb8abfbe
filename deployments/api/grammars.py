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


JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
ESCAPE = re.compile(r"\\.", re.DOTALL)
OPAQUE = {
    "regex": re.compile(r"(?P<one>\\.|\[(?:[^\]\\]++|\\.)*+\]?)", re.DOTALL),
    "grammar": re.compile(
        r"""
        "(?P<literal>(?:[^"\\\r\n]++|\\.)*+)"?
        | (?P<one>\[(?:[^\]\\\r\n]++|\\.)*+\]?)
        | (?:\#[^\r\n]*+ | \s++)++
        """,
        re.VERBOSE,
    ),
}
"""What a compiler reads as one, from left to right: of a regular expression escapes and classes; of EBNF literals, classes, comments and blanks.
As xgrammar has it: ``]`` ends a class, also as its first character, and in EBNF a line ends a literal and a class. One that is never closed
reaches as far as it can: if each were given up, and tried again from the next bracket, the time would grow with the square of the length."""
PART = re.compile(r"\{\s*+([0-9]*+)\s*+(?:,\s*+-?([0-9]*+)\s*+)?+\}|[^(){|*+?]++|.", re.DOTALL)
"""A repetition, a run of characters, or another character."""
BRACKET = re.compile(r"[()\[\]{}]")
CAPTURE = re.compile(r'\[[^\[\]"\r\n]*capture[ \t]*=[ \t]*"')
MANY = 10**9
"""All sizes above are one: nobody needs their digits."""


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


def plain(text: str, kind: str = "regex") -> str:
    r"""The expression with ``x`` for each character or class that is written otherwise: every bracket left is one.

    >>> plain(r"\[([(]a\))"), plain('root ::= ("[" [a-z] {3} "abc" )  # (', "grammar")
    ('x(xax)', 'root::=(xx{3}x{3})')
    """
    return OPAQUE[kind].sub(_plain, text)


def _plain(found: re.Match[str]) -> str:
    if found["one"] is not None:
        return "x"
    if (literal := found.groupdict().get("literal")) is None:
        return ""
    size = len(ESCAPE.sub("x", literal))
    return "x" if size < 2 else f"x{{{size}}}"  # what repeats a literal repeats all of it


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


def written_out(simple: str) -> int:
    """How many characters and classes a plain expression has once its repetitions are written out; at most `MANY`.

    >>> written_out("a{3}b"), written_out("(a{10}b){10}"), written_out("x+"), written_out("(a|bc){3,}")
    (4, 110, 1, 9)
    >>> written_out("a" + "{999999999}" * 500) == MANY
    True
    """
    groups, last = [0], 0
    """Sizes of the groups that are open, and of what a repetition would repeat."""
    for part in PART.finditer(simple):
        one = part[0]
        if part[1] is not None:
            last = min(MANY, last * max(1, _number(part[1]), _number(part[2] or "")))
        elif one == ")" and len(groups) > 1:
            last += groups.pop()
        elif one not in "*+?":
            groups[-1] += last + len(one) - 1
            last = int(one not in "(|")
            groups += [0] if one == "(" else []
    return min(MANY, sum(groups) + last)


def _number(digits: str) -> int:
    """
    >>> _number("0004000"), _number(""), _number("9" * 5_000)
    (4000, 0, 1000000000)
    """
    digits = digits.lstrip("0")
    return int(digits or 0) if len(digits) < 10 else MANY


def compile_ms(grammar: Grammar) -> float:
    """About how long the engine takes to compile a JSON schema. 0 for everything else.

    >>> compile_ms(Grammar("response_format", "json", {"type": "string", "format": "uri"}))
    20.0
    >>> compile_ms(Grammar("response_format", "json", {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"]}))
    0.005
    """
    return sum(map(_node_ms, objects(document(grammar)))) if grammar.kind == "json" else 0


def _node_ms(node: dict[str, Any]) -> float:
    """One JSON object of a schema, without what is in it."""
    format, properties = node.get("format"), as_dict(node.get("properties"))
    ms = FORMAT_MS.get(format, 0.0) if isinstance(format, str) else 0.0
    ms += PATTERN_MS * sum(written_out(plain(one)) for one in (node.get("pattern"), node.get("regex")) if isinstance(one, str))
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
