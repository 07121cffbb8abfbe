"""What vLLM cannot bear is refused in the client's terms, and what real clients send is not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadRequest
from deployments.api.engine_limits import MAX_DEPTH, MAX_REPEATED, check, depth, written_out

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
        {"structured_outputs": {"json": "{no JSON"}},
        formatted({"type": "string", "pattern": r"^\\((\\d{3})\\) \\d{3}-\\d{4}$", "description": "((((" * 40}),
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}, "bad_words": ["a"]},
        {"response_format": None, "structured_outputs": None, "tools": None, "bad_words": None, "repetition_detection": None},
        {"repetition_detection": {"max_pattern_size": 20, "min_count": 3}},
    ],
)  # fmt: skip
def test_what_real_clients_send_passes(body: dict[str, Any]) -> None:
    check(body)


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


@given(st.text("ab()[]{}|*+?\\,019", max_size=40))
def test_any_pattern_has_a_size_and_a_depth(pattern: str) -> None:
    assert 0 <= depth(pattern) <= len(pattern) and written_out(pattern) >= 0


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("", 0), ("abc", 3), ("a|b", 2), ("a{3}", 3), ("a{2,5}", 5), ("(ab){4}", 8), ("((a{10}){10}){10}", 1000),
     (r"\{3\}", 3), ("[{}]{7}", 7)],
)  # fmt: skip
def test_repetitions_are_written_out(pattern: str, size: int) -> None:
    assert written_out(pattern) == size


def test_the_limits_are_what_a_compiler_bears_and_more_than_clients_need() -> None:
    assert written_out("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}") < MAX_REPEATED / 50
    assert depth(json.dumps(nested(20))) < MAX_DEPTH
