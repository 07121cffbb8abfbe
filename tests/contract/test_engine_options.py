"""What `cluster.vllm_arguments` reads in vLLM 0.29's files beside vLLM itself, and how `deployments.replica.arguments` hands values over."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cluster import config
from cluster.engine_options import refusal
from cluster.errors import ConfigError
from cluster.vllm_arguments import adapter_of, arguments, listed
from deployments.replica.arguments import BY_VLLM, OURS, check_draft, check_template, namespace, refused_by_vllm

LOOKED_AT = {
    "chat_template_content_format",
    "cohere_format",
    "config_format",  # hf or mistral; others must be registered by code
    "disable_custom_all_reduce",
    "enable_mixed_moe_lora_format",
    "language_model_only",
    "mm_processor_kwargs",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "mm_processor_device",
    "enable_mm_processor_stats",
    "model_impl",
    "profiler_config",  # its folders are refused inside it, and no route starts a profile
    "skip_tokenizer_init",
    "tokenizer_mode",
}
"""Arguments whose names might mean code or files from outside, and do not."""
SUSPICIOUS = re.compile(
    "plugin|cls|class|module|custom|remote|trust|dir$|path|file|uri|url|processor|tokenizer|format|revision|token$|model_"
)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's parser of arguments loads plugins, ours too, and `tests.contract.test_vllm` looks at vLLM as it comes."""
    monkeypatch.setenv("VLLM_PLUGINS", "")


def fields() -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return {
        one.name: one.type
        for kind in (AsyncEngineArgs, FrontendArgs)
        for one in dataclasses.fields(kind)
        if not one.name.startswith("_")
    }


def test_the_arguments_that_are_read_are_the_ones_that_there_are() -> None:
    assert set(arguments()) == set(fields())


def test_the_parsers_that_are_read_are_the_ones_that_are_registered() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    assert set(listed("tool_parsers/__init__.py")) == set(ToolParserManager.list_registered())
    assert set(listed("reasoning/__init__.py")) == set(ReasoningParserManager.list_registered())


def test_the_type_of_every_argument_can_be_checked() -> None:
    """Those that cannot are converted by vLLM itself, and `BY_VLLM` says from what."""
    open_to_all = {name: kind for name, kind in fields().items() if not refusal(name)}
    assert set(BY_VLLM) <= set(open_to_all)
    for name, kind in open_to_all.items():
        TypeAdapter(BY_VLLM.get(name, kind))
    assert len(open_to_all) > 120


def test_a_type_that_is_read_says_what_vllms_own_says() -> None:
    samples: list[Any] = [True, 3, 0.5, "x", "auto", ["a"], {"a": 1}]
    for name, kind in fields().items():
        adapter = adapter_of(arguments()[name])
        if adapter is None or refusal(name) or name in BY_VLLM:
            continue
        assert [accepts(adapter, one) for one in samples] == [accepts(TypeAdapter(kind), one) for one in samples], name


def accepts(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValueError:
        return False
    return True


def test_no_argument_that_sounds_like_code_from_outside_is_open() -> None:
    """A new release may bring one. Look at it, then refuse it in `cluster.engine_options` or list it here."""
    assert [name for name in arguments() if SUSPICIOUS.search(name) and not refusal(name) and name not in LOOKED_AT] == []


def test_what_every_engine_has_is_not_open() -> None:
    assert [name for name in OURS if not refusal(name)] == []


def test_values_arrive_as_vllm_has_them() -> None:
    from vllm.config import CompilationConfig, StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    options = {
        "enable_prefix_caching": False,
        "quantization": "compressed-tensors",
        "kv_cache_dtype": "fp8",
        "structured_outputs_config": {"backend": "guidance"},
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
        "compilation_config": {"mode": 0},
        "cpu_offload_params": ["experts"],
        "attention_backend": "TORCH_SDPA",
        "tool_call_parser": "hermes",
        "sse_keep_alive_interval": 0,
    }
    spec = config.parse({"fleet": {"engine": {k: v for k, v in options.items() if not refusal(k)}}}).spec("seedling")
    args = namespace({**spec.engine_arguments(), **OURS})
    assert (args.enable_prefix_caching, args.quantization, args.kv_cache_dtype) == (False, "compressed-tensors", "fp8")
    assert (
        isinstance(args.structured_outputs_config, StructuredOutputsConfig)
        and args.structured_outputs_config.backend == "guidance"
    )
    assert isinstance(args.compilation_config, CompilationConfig) and args.cpu_offload_params == {"experts"}
    assert (args.tool_call_parser, args.enable_auto_tool_choice, args.scheduling_policy) == ("hermes", True, "priority")
    settings = AsyncEngineArgs.from_cli_args(args)
    assert (
        settings.speculative_config == options["speculative_config"]
        and settings.structured_outputs_config is args.structured_outputs_config
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimization_level": 7}, "optimization_level: Input should be"),
        ({"structured_outputs_config": {"backend": "xgramar"}}, r"structured_outputs_config\.backend: Input should be"),
        ({"structured_outputs_config": {"bakend": "xgrammar"}}, r"structured_outputs_config\.bakend"),
    ],
)
def test_a_type_that_only_vllm_can_name_is_checked_before_the_weights_are_read(options: dict[str, Any], words: str) -> None:
    spec = config.parse({"fleet": {"engine": options}}).spec("seedling")
    with (
        pytest.raises(ConfigError, match=f"vLLM refuses the arguments of the fleet seedling: {words}"),
        refused_by_vllm("seedling"),
    ):
        namespace(spec.engine_arguments())


@pytest.mark.parametrize("there", [True, False])
def test_a_draft_model_is_read_from_safetensors_only(there: bool, tmp_path: Path) -> None:
    (tmp_path / ("model.safetensors" if there else "pytorch_model.bin")).touch()
    args = namespace({"speculative_config": {"model": str(tmp_path), "num_speculative_tokens": 1}})
    if there:
        return check_draft(args)
    with pytest.raises(ConfigError, match="has no safetensors"):
        check_draft(args)


def test_a_chat_template_that_is_no_jinja_is_refused_with_its_line() -> None:
    check_template(None)
    check_template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}")
    with pytest.raises(ConfigError, match="chat_template, line 2: "):
        check_template("{% for m in messages %}\n{{ m.content }")
