"""What vLLM cannot bear is refused in the client's terms, and what real clients send is not."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest
from deployments.api.engine_limits import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_REGEX_CHARACTERS,
    MAX_REPEATED,
    check,
    depth,
)
from deployments.api.repetitions import MANY, plain, written_out

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def properties(count: int, one: Any = None, **more: Any) -> dict[str, Any]:
    """A schema of an object. ``#`` in ``one`` becomes the property's number."""
    text = json.dumps(one or {"type": "string"})
    return {"type": "object", "properties": {f"p{n}": json.loads(text.replace("#", str(n))) for n in range(count)}, **more}


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def tag(format: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": format}


def deep(levels: int, one: str = "a") -> str:
    return "(" * levels + one + ")" * levels


PATTERNS = [
    r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$",
    r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:?\d{2})?)?$",
    r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    r"^(https?:\/\/)?(www\.)?[-a-zA-Z0-9@:%._\+~#=]{1,128}\.[a-zA-Z0-9()]{1,6}([-a-zA-Z0-9()@:%_\+.~#?&//=]*)$",
    r"^\+?1?[ -.]?\(?\d{3}\)?[ -.]?\d{3}[ -.]?\d{4}$", r"^\+?[1-9]\d{1,14}$", r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$",
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?$",
    "^[a-z]{0,64}$", "^[a-z]{1,255}$", "^.{1,128}$", r"^[a-z0-9]+(?:-[a-z0-9]+)*$", r"^[A-Z][a-z]{1,30}( [A-Z][a-z]{1,30}){0,4}$",
    r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$", r"^(/[^/ ]{1,100}){1,5}$",
    r"^P(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?$", "^M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})$",
    r"^(January|February|March|April|May|June|July|August|September|October|November|December)?( \d{1,2})?$", r"^(\w+\s+){0,30}\w+$",
]  # fmt: skip
"""What people write: addresses, dates, UUIDs, URLs, telephone numbers, numbers, versions, names, paths, durations, and lengths."""
SENTENCE = r"^(\w{1,20} ){0,30}\w{1,20}$"
SQL = """
root ::= "SELECT" ws ("DISTINCT" ws)? columns ws "FROM" ws name (ws join)* (ws where)? (ws group)? (ws having)? (ws order)? (ws limit)? ";"?
columns ::= "*" | name (ws? "," ws? name)*
join ::= ("LEFT" ws | "RIGHT" ws | "INNER" ws)? "JOIN" ws name ws "ON" ws name ws? "=" ws? name
where ::= "WHERE" ws name ws? ("=" | "<" | ">") ws? value
group ::= "GROUP BY" ws name
having ::= "HAVING" ws name
order ::= "ORDER BY" ws name (ws "ASC" | ws "DESC")?
limit ::= "LIMIT" ws [0-9]{1,9}
value ::= "-"? [0-9]+ ("." [0-9]+)? | "'" [^']{0,60} "'"
name ::= [a-zA-Z_] [a-zA-Z0-9_]{0,62} ("." [a-zA-Z_] [a-zA-Z0-9_]{0,62})?
ws ::= [ \\n\\t]+
"""
DEEP_EBNF = "root ::= " + deep(9_000, '"a"')
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "structured_outputs as a list": ({"structured_outputs": []}, "structured_outputs"),
    "structured_outputs as no text": ({"structured_outputs": ""}, "structured_outputs"),
    "structured_outputs as text": ({"structured_outputs": "[a-z]"}, "structured_outputs"),
    "a tool without a name": ({"tool_choice": {"function": {"name": "f"}}, "tools": [TOOL, {"name": "f"}]}, "tools[1].function.name"),
    "a tool that is a number": ({"tool_choice": {"function": {"name": "f"}}, "tools": [1]}, "tools[0].function.name"),
    "no messages": ({"messages": []}, "messages"),
    "logprobs of chosen tokens": ({"logprobs": 1, "logprob_token_ids": [5]}, "logprob_token_ids"),
    "endless repetitions": ({"repetition_detection": {"max_pattern_size": 10**6, "min_count": 2}}, "repetition_detection"),
    "a book of bad words": ({"bad_words": ["a" * 20_000]}, "bad_words"),
    "a long regex": ({"structured_outputs": {"regex": "a" * 5_000}}, "structured_outputs.regex"),
    "a deep regex": ({"structured_outputs": {"regex": "(" * 100 + "a" + ")" * 100}}, "structured_outputs.regex"),
    "a regex of a million": ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "structured_outputs.regex"),
    "a grammar of a million": ({"structured_outputs": {"grammar": 'root ::= ("a"{1000}){1000}'}}, "structured_outputs.grammar"),
    "a deep schema": (formatted(nested(100)), "response_format"),
    "a deep schema in Anthropic's form": ({"output_config": {"format": {"type": "json_schema", "schema": nested(100)}}}, "output_config.format"),
    "a schema deeper than JSON is written": (formatted(nested(300)), "response_format"),
    "a schema as text": ({"structured_outputs": {"json": json.dumps(nested(100))}}, "structured_outputs.json"),
    "a pattern in a schema": (formatted({"type": "string", "pattern": "(a{1000}){1000}"}), "response_format"),
    "a pattern in a tool": (
        {"tools": [{"function": {"name": "f", "parameters": {"type": "string", "pattern": "(a{999}){999}"}}}]}, "tools[0].parameters",
    ),
    "patterns for names": (formatted({"type": "object", "patternProperties": {"^a": {}}}), "response_format"),
    "many choices": ({"structured_outputs": {"choice": ["abc"] * 20_000}}, "structured_outputs.choice"),
    "some of many properties": (formatted(properties(200, minProperties=100)), "response_format"),
    "all but one of many properties": (formatted(properties(300, maxProperties=299)), "response_format"),
    "a thousand properties": (formatted(properties(1_100)), "response_format"),
    "a thousand properties as text": ({"structured_outputs": {"json": json.dumps(properties(1_100))}}, "structured_outputs.json"),
    "hundreds of addresses": (formatted(properties(300, {"type": "string", "format": "uri"})), "response_format"),
    "a hundred templates": (formatted(properties(100, {"type": "string", "format": "uri-template"})), "response_format"),
    "hundreds of patterns": (formatted(properties(60, {"type": "string", "pattern": "^[a-z]{1,80}#$"})), "response_format"),
    "slow tools together": ({"tools": [tool(properties(100)), tool(properties(800)), tool(properties(700))]}, "tools[2].parameters"),
    "a slow schema in Anthropic's form, without a type": ({"output_config": {"format": {"schema": properties(1_100)}}}, "output_config.format"),
    "megabytes of tools": ({"tools": [tool({"enum": ["a"] * 15_000})] * 100}, "tools[8].parameters"),
    "text that is no JSON": ({"structured_outputs": {"json": "{no JSON"}}, "structured_outputs.json"),
    "text that only Python takes for JSON": ({"structured_outputs": {"json": '{"pattern": "a", "x": NaN}'}}, "structured_outputs.json"),
    "a schema as text in text": ({"structured_outputs": {"json": json.dumps(json.dumps(nested(100)))}}, "structured_outputs.json"),
    "a deep grammar in a tag": ({"response_format": tag({"type": "grammar", "grammar": DEEP_EBNF})}, "response_format"),
    "a deep grammar in a tag as text": (
        {"structured_outputs": {"structural_tag": json.dumps(tag({"type": "grammar", "grammar": DEEP_EBNF}))}},
        "structured_outputs.structural_tag",
    ),
    "a deep regex after an escaped bracket": ({"structured_outputs": {"regex": rf"\[{deep(1000)}]"}}, "structured_outputs.regex"),
    "a deep pattern after an escaped bracket": (formatted({"pattern": rf"\[{deep(1000)}]"}), "response_format"),
    "a deep regex after an empty class": ({"structured_outputs": {"regex": f"[^]{deep(1000)}]"}}, "structured_outputs.regex"),
    "a regex of millions after an escaped bracket": ({"structured_outputs": {"regex": r"\[(a{4000}){4000}]"}}, "structured_outputs.regex"),
    "a regex with leading zeros": ({"structured_outputs": {"regex": "(a{" + "0" * 20 + "4000}){4000}"}}, "structured_outputs.regex"),
    "a regex of more than digits tell": ({"structured_outputs": {"regex": "a{" + "9" * 20 + "}"}}, "structured_outputs.regex"),
    "a pattern of a number too long to print": (formatted({"pattern": "a" + "{999999999}" * 500}), "response_format"),
    "a pattern of a number too large for a fraction": (
        {"structured_outputs": {"json": '{"p\\u0061ttern": "a' + "{999999999}" * 40 + '"}'}}, "structured_outputs.json",
    ),
    "a grammar of millions between literals": (
        {"structured_outputs": {"grammar": 'root ::= "[" ("a"{4000}){4000} "]"'}}, "structured_outputs.grammar",
    ),
    "a grammar of millions behind a comment": (
        {"structured_outputs": {"grammar": 'root ::= ("a"{1900} ) #x\n {1900 #"\n}'}}, "structured_outputs.grammar",
    ),
    "a grammar with a long literal": ({"structured_outputs": {"grammar": f'root ::= "{"a" * 1900}"{{1900}}'}}, "structured_outputs.grammar"),
    "a grammar without a last number": ({"structured_outputs": {"grammar": 'root ::= ("a"{4000,-1}){4000,-1}'}}, "structured_outputs.grammar"),
    "a deep grammar behind a comment": ({"structured_outputs": {"grammar": f'a ::= "a" # "\n{DEEP_EBNF}'}}, "structured_outputs.grammar"),
    "a deep grammar behind an empty class": (
        {"structured_outputs": {"grammar": f'root ::= [] {deep(9_000, "[a]")} "]"'}}, "structured_outputs.grammar",
    ),
    "a regex in a grammar": ({"structured_outputs": {"grammar": f'root ::= Regex("{deep(9_000)}")'}}, "structured_outputs.grammar"),
    "a quoted bracket in a rule's name": (
        {"structured_outputs": {"grammar": f'root[capture = "]"] ::= {deep(9_000, "[a]")} "a"'}}, "structured_outputs.grammar",
    ),
    "an escaped name": (
        {"structured_outputs": {"json": '{"p\\u0061ttern": "' + deep(3_000) + '"}'}}, "structured_outputs.json",
    ),
    "escaped brackets": (
        {"structured_outputs": {"json": '{"pattern": "' + r"\u0028" * 300 + "a" + r"\u0029" * 300 + '"}'}}, "structured_outputs.json",
    ),
    "escaped patterns for names": (
        {"structured_outputs": {"json": '{"type": "object", "p\\u0061tternProperties": {"^a": {}}}'}}, "structured_outputs.json",
    ),
    **{f"{name}, as EBNF": ({"structured_outputs": {"grammar": f"root ::= {text}"}}, "structured_outputs.grammar") for name, text in {
        "150 optional classes": "[a-z]? " * 150, "51 optional classes": "[a-z]? " * 51, "300 optional literals": '"a"* ' * 300,
        "a long class behind a comment": "[a-z]{60000} #" + "#" * 60_000,
        "fifty repetitions that differ": " ".join(f'[a-z]{{0,{70 + n}}} "{n}"' for n in range(50)) + " #" + "#" * 9_000,
        "optional names among optional classes": "[a-z]? a? " * 50, "51 classes or nothing": '([a-z] | "") ' * 51,
    }.items()},
    **{f"{text[:24]}, {len(text)} characters, as a pattern": (formatted({"type": "string", "pattern": f"^{text}$"}), "response_format") for text in (
        "[a-z]?" * 51, "[a-z]?" * 100, "([a-z]? ?){80}", r"(\w+ )*" * 64, r"\w{0,20}[a-z]{0,20}" * 10, r"(\w{1,20}x?)?" * 20, "[a-z]{1,20}" * 20,
        "[a-z]{0,20}[a-z]" * 20, "[a-z]{0,20}(a|b|c|d)" * 20, ("(" + "|".join(f"[{a}-z][a-z]?" for a in "abcdefghij") + ")?") * 20,
        "(?:[a-z]?){0,60}", "([a-z]|)" * 51, "(?:|[a-z])" * 51, "((a|)(b|))" * 30,
    )},
    **{f"{text[:24]}, {len(text)} characters, as a regex": ({"structured_outputs": {"regex": text}}, "structured_outputs.regex") for text in (
        "[a-z]?" * 100, r"(\w+ )*" * 64, ".?" * 51,
    )},
    "optional classes in a hundred patterns": (
        formatted(properties(100, {"type": "string", "pattern": "^" + "[a-z]?" * 20 + "#$"})), "response_format",
    ),
    "optional classes in a tag": ({"response_format": tag({"type": "regex", "pattern": "[a-z]?" * 100})}, "response_format"),
    "optional classes in a tag's grammar": (
        {"response_format": tag({"type": "grammar", "grammar": "root ::= " + "[a-z]? " * 100})}, "response_format",
    ),
    "a tag's schema": ({"response_format": {"type": "structural_tag", "format": nested(80)}}, "response_format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_and_its_parameter_is_named(case: str) -> None:
    body, param = REFUSED[case]
    with pytest.raises(BadRequest) as caught:
        check(body)
    assert caught.value.param == param and caught.value.do


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}},
        {"tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": {"type": "function", "name": "f"}},
        {"output_config": {"format": {"type": "json_schema", "schema": nested(20)}}},
        {"prompt": "a", "echo": True, "logprobs": 5, "bad_words": ["never"], "allowed_token_ids": [1, 2]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}T[0-9:]{8}Z"}},
        {"structured_outputs": {"grammar": 'root ::= "SELECT " name\nname ::= [a-z]{1,30}'}},
        formatted(nested(20)),
        formatted(properties(300)),
        formatted({"type": "array", "minItems": 1, "maxItems": 2**31 - 1}),
        formatted({"type": "object", "properties": {"format": {"type": "string"}, "minItems": {}, "properties": {"type": "object"}}}),
        formatted({"properties": [], "required": 1, "format": [], "pattern": {}, "maxItems": None, "minProperties": "x"}),
        formatted(properties(900, required=[f"p{n}" for n in range(900)], additionalProperties=False)),
        formatted(properties(60, {"type": "string", "format": "uri"}, minProperties=1)),
        formatted(properties(20, {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"})),
        {"tools": [tool(properties(30, {"type": "string", "format": "date-time", "description": "when " * 20}))] * 100},
        {"structured_outputs": {"json": '{"type": "string", "pattern": "\\u0028a\\u0029"}'}},
        {"structured_outputs": {"regex": r"\[(a|b)\]\(\{[^\](){}]{1,9}\}\)"}},
        {"structured_outputs": {"grammar": 'root ::= "[" ("(" [^\\]"(] ")"){1,9} "]" # "(("' + " \n#(" * 100}},
        {"structured_outputs": {"grammar": "root ::= " + " | ".join(f'"keyword {n}"' for n in range(3_000))}},
        {"structured_outputs": {"grammar": "\n".join(f'r{n} ::= "name{n}" [a-z]{{1,9}} (r{n + 1} | [0-9]+)?' for n in range(1_000))}},
        {"structured_outputs": {"structural_tag": json.dumps(tag({"type": "grammar", "grammar": 'root ::= "(" [a-z]{1,9} ")"'}))}},
        formatted({"enum": ["patternProperties"], "properties": {"pattern": {"type": "string"}, "grammar": {"type": "string"}}}),
        formatted({"type": "string", "pattern": r"^\\((\\d{3})\\) \\d{3}-\\d{4}$", "description": "((((" * 40}),
        *({"structured_outputs": {"grammar": "root ::= " + " | ".join(f'"keyword {n}"' for n in range(count))}} for count in (400, 1_000)),
        {"structured_outputs": {"grammar": SQL}},
        {"structured_outputs": {"grammar": 'root ::= [a-z]{0,60} # ' + "why " * 5_000}},
        {"structured_outputs": {"regex": "[a-z]{0,300}"}}, {"structured_outputs": {"regex": SENTENCE}},
        formatted({"type": "string", "pattern": SENTENCE}),
        {"structured_outputs": {"grammar": "root ::= ([a-z]? [0-9]?){0,80}"}},
        {"structured_outputs": {"regex": "[a-z]{0,3900}"}},
        *(formatted({"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": one} for n in range(2)}}) for one in PATTERNS),
        *({"structured_outputs": {"regex": one.strip("^$")}} for one in PATTERNS),
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}, "bad_words": ["a"]},
        {"response_format": None, "structured_outputs": None, "tools": None, "bad_words": None, "repetition_detection": None},
        {"repetition_detection": {"max_pattern_size": 20, "min_count": 3}},
    ],
)  # fmt: skip
def test_what_real_clients_send_passes(body: dict[str, Any]) -> None:
    check(body)


def slow(text: str) -> dict[str, dict[str, Any]]:
    """The text as each kind of grammar, up to its limit."""
    return {
        "grammar": {"structured_outputs": {"grammar": text[:MAX_CHARACTERS]}},
        "regex": {"structured_outputs": {"regex": text[:MAX_REGEX_CHARACTERS]}},
        "schema": {"tools": [tool({"pattern": text[: MAX_CHARACTERS // 2 - 20]})]},
        "text": {"structured_outputs": {"json": text[:MAX_CHARACTERS]}},
    }


@pytest.mark.parametrize("kind", ["grammar", "regex", "schema", "text"])
@pytest.mark.parametrize(
    "text",
    ['root ::= "' + "[" * 70_000 + '"', "[" * 70_000, '"' + '\\"' * 35_000, "[" + "\\]" * 35_000, "a{" + " " * 70_000, "a{1" + " " * 70_000,
     "a{1," + " " * 70_000, "{1" * 35_000, "(" * 70_000, "a[" * 35_000, "[capture " * 8_000, "#" * 70_000, '"\n' * 35_000, "(|" * 35_000],
)  # fmt: skip
def test_the_time_that_a_body_takes_does_not_grow_with_the_square_of_its_length(text: str, kind: str) -> None:
    body = slow(text)[kind]
    began_s = time.process_time()
    with suppress(BadRequest):
        check(body)
    assert time.process_time() - began_s < 0.2  # a few milliseconds


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "structured_outputs", "response_format", "text", "output_config", "tools", "tool_choice", "bad_words", "messages",
    "repetition_detection", "allowed_token_ids",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))
def test_any_body_passes_or_is_a_bad_request(body: dict[str, Any]) -> None:
    try:
        check(body)
    except BadRequest as error:
        assert error.param


@given(st.text('ab()[]{}|*+?\\,019"# \n', max_size=40), st.sampled_from(["regex", "grammar"]))
def test_any_pattern_has_a_size_and_a_depth(pattern: str, kind: str) -> None:
    simple = plain(pattern, kind)
    assert 0 <= depth(simple) <= len(pattern) + 1 and 0 <= written_out(simple) <= MANY


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("", 0), ("abc", 3), ("a|b", 2), ("a{3}", 3), ("a{2,5}", 5), ("(ab){4}", 8), ("((a{10}){10}){10}", 1000),
     (r"\{3\}", 3), ("[{}]{7}", 7)],
)  # fmt: skip
def test_repetitions_are_written_out(pattern: str, size: int) -> None:
    assert written_out(plain(pattern)) == size


def test_the_limits_are_what_a_compiler_bears_and_more_than_clients_need() -> None:
    assert written_out(plain("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")) < MAX_REPEATED / 50
    assert depth(json.dumps(nested(20))) < MAX_DEPTH
