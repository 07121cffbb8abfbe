"""The fleet's ``engine:`` section: what is taken, what is refused and why, and where it arrives. vLLM's files are read, and not imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config, engine_options
from cluster.cli.app import pairs
from cluster.config import Config, Fleet
from cluster.engine_options import problems, refusal
from cluster.errors import ConfigError
from cluster.pool import graph
from cluster.vllm_arguments import arguments

TEMPLATE = "{% for one in messages %}{{ one.content }}{% endfor %}"


def fleet(**options: Any) -> Fleet:
    return config.parse({"fleet": {"engine": options}}).fleet


@pytest.mark.parametrize(
    "options",
    [
        {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
        {"quantization": "awq", "kv_cache_dtype": "fp8"},
        {"enable_prefix_caching": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
        {"speculative_config": {"model": "/models/draft", "num_speculative_tokens": 3}},
        {"structured_outputs_config": {"backend": "guidance"}},
        {"compilation_config": {"mode": 3, "backend": "inductor"}},
        {"generation_config": "vllm", "override_generation_config": {"temperature": 0.5}},
        {"chat_template": TEMPLATE, "default_chat_template_kwargs": {"enable_thinking": False}},
        {"hf_overrides": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
        {"allowed_media_domains": ["example.org"], "cpu_offload_params": ["experts"]},
    ],
)
def test_what_vllm_takes_is_taken(options: dict[str, Any]) -> None:
    assert fleet(**options).engine == options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tool_call_parsr": "hermes"},
            r"fleet\.engine\.tool_call_parsr: vLLM has no such argument \(did you mean tool_call_parser\?\)",
        ),
        ({"tool-call-parser": "hermes"}, r"did you mean tool_call_parser\?"),
        ({"max_num_seq": 3}, r"fleet\.engine\.max_num_seq: vLLM has no such argument"),
        ({"zzzzzz": 1}, r"fleet\.engine\.zzzzzz: vLLM has no such argument\."),
        ({"max_num_seqs": 3}, "the fleet's own key max_num_seqs decides this"),
        ({"kv_cache_memory_bytes": 3}, "the fleet's own key kv_cache_bytes"),
        ({"max_logprobs": "many"}, r"fleet\.engine\.max_logprobs: 'many' is not what vLLM takes here: int"),
        ({"enable_prefix_caching": "maybe"}, r"'maybe' is not what vLLM takes here: bool \| None"),
        ({"kv_cache_dtype": "fp9"}, "'fp9' is not what vLLM takes here: CacheDType .Input should be 'auto', .*'fp8'"),
        ({"fingerprint_mode": "some"}, "'some' is not what vLLM takes here: Literal"),
        ({"speculative_config": "ngram"}, r"'ngram' is not what vLLM takes here: dict\[str, Any\] \| None"),
        ({"tool_call_parser": "herms"}, r"fleet\.engine\.tool_call_parser: vLLM has no parser 'herms' \(did you mean hermes"),
        ({"reasoning_parser": "nobody's"}, 'vLLM has no parser "nobody\'s" .it has .*granite'),
        ({"chat_template": "qwen"}, "this is no template"),
        ({"port": 8001, "ssl_keyfile": "k", "max_logprobs": "x"}, "port: refused.*ssl_keyfile: refused.*max_logprobs"),
        ({"data_parallel_size": 2}, "as many slots as tensor_parallel_size says"),
        ({"enable_lora": False}, "adapters come from the store"),
    ],
)
def test_what_vllm_does_not_take_is_named_with_what_it_does(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        config.parse({"fleet": {"engine": options}})


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"trust_remote_code": False},
        {"tool_parser_plugin": "/tmp/p.py"},
        {"reasoning_parser_plugin": "/tmp/p.py"},
        {"io_processor_plugin": "p"},
        {"logits_processors": ["os:system"]},
        {"worker_cls": "os.system"},
        {"scheduler_cls": "os.system"},
        {"worker_extension_cls": "os.system"},
        {"model_class_overrides": {"X": "os:system"}},
        {"middleware": ["os.system"]},
        {"distributed_executor_backend": "os.system"},
        {"log_config_file": "/tmp/l.json"},
        {"tool_server": "demo"},
        {"load_format": "pt"},
        {"tokenizer": "somebody/else"},
        {"hf_config_path": "somebody/else"},
        {"revision": "main"},
        {"allowed_local_media_path": "/"},
        {"kv_transfer_config": {"kv_connector": "X", "kv_connector_module_path": "os"}},
        {"structured_outputs_config": {"reasoning_parser_plugin": "/tmp/p.py"}},
        {"structured_outputs_config": {"reasoning-parser-plugin": "/tmp/p.py"}},
        {"compilation_config": {"backend": "os.system"}},
        {"compilation_config": {"inductor_passes": {"a": "os.system"}}},
        {"compilation_config": {"cache_dir": "/tmp/c"}},
        {"ec_manager_config": {"encoder_cache_manager_cls": "os.system"}},
        {"generation_config": "/etc"},
        {"speculative_config": {"model": "pkg.Proposer", "num_speculative_tokens": 1}},
        {"speculative_config": {"model": "somebody/draft", "num_speculative_tokens": 1}},
        {"speculative_config": {"method": "custom_class", "model": "/x", "num_speculative_tokens": 1}},
        {"speculative_config": {"method": "ngram", "draft_load_config": {"load_format": "pt"}}},
        {"speculative_config": {"method": "ngram", "trust-remote-code": True}},
        {"spec_method": "custom_class", "spec_model": "/x", "spec_tokens": 1},
        {"spec_model": "pkg.Proposer", "spec_tokens": 1},
        {"trust_request_chat_template": True},
        {"enable_prompt_embeds": True},
    ],
)
def test_what_brings_code_or_files_from_outside_is_refused_wherever_it_stands(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"refused|absolute path"):
        config.parse({"fleets": {"chat": {"engine": options}}})


def test_names_are_known_without_importing_vllm() -> None:
    code = "import sys; from cluster import config; config.parse({'fleet': {'engine': {'max_logprobs': 5}}}); print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert len(arguments()) > 200


def test_without_vllm_only_what_is_refused_is_known() -> None:
    assert [one.key for one in problems({"anything": 1, "trust_remote_code": True}, {})] == [("trust_remote_code",)]


@given(st.dictionaries(st.sampled_from(sorted(arguments())), st.none() | st.booleans() | st.integers() | st.text(max_size=9)))
def test_whatever_is_given_every_problem_names_a_key_that_was_given(options: dict[str, Any]) -> None:
    found = list(problems(options, arguments()))
    assert {one.key[0] for one in found} <= options.keys() and all(one.words for one in found)
    assert {name for name in options if refusal(name)} <= {one.key[0] for one in found}


def test_every_argument_that_springtide_sets_is_refused_in_the_section() -> None:
    on_gpus = config.load("gpu").spec("seedling").engine_arguments()
    declared = config.load("gpu").fleet.engine
    assert [name for name in on_gpus if not refusal(name) and name not in declared] == []


# where it comes from, and where it goes


def test_it_is_set_on_the_command_line_and_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPRINGTIDE_FLEET__ENGINE__TOOL_CALL_PARSER", "hermes")
    monkeypatch.setenv("SPRINGTIDE_FLEET__ENGINE__ENABLE_PREFIX_CACHING", "false")
    sets = config.from_pairs(pairs(["fleet.engine.reasoning_parser=qwen3", "fleet.engine.speculative_config.method=ngram"]))
    loaded = config.load(file=tmp_path / "none.yaml", overrides=sets).fleet.engine
    assert (loaded["tool_call_parser"], loaded["enable_prefix_caching"]) == ("hermes", False)
    assert (loaded["reasoning_parser"], loaded["speculative_config"]) == ("qwen3", {"method": "ngram"})


def test_fleets_inherit_each_argument_by_itself_and_null_gives_it_back_to_vllm() -> None:
    fleets = {"chat": {"engine": {"reasoning_parser": "qwen3"}}, "plain": {"engine": {"tool_call_parser": None}}}
    loaded = config.parse({"fleet": {"engine": {"tool_call_parser": "hermes"}}, "fleets": fleets})
    chat, plain = (loaded.spec(name).engine_arguments() for name in fleets)
    assert (chat["tool_call_parser"], chat["reasoning_parser"]) == ("hermes", "qwen3")
    assert "tool_call_parser" not in plain and "reasoning_parser" not in plain


def test_a_bad_argument_of_one_fleet_is_named_with_the_fleet() -> None:
    with pytest.raises(ConfigError, match=r"fleets\.chat\.engine\.tool_call_parsr: vLLM has no such argument"):
        config.parse({"fleets": {"chat": {"engine": {"tool_call_parsr": "hermes"}}}})


def test_false_reaches_the_engine() -> None:
    """On a command line it was left out, and prefix caching stayed on."""
    assert Config().spec_of("m", fleet(enable_prefix_caching=False)).engine_arguments()["enable_prefix_caching"] is False


def test_a_change_restarts_the_fleet_and_not_another() -> None:
    """Serve replaces replicas when an application's arguments change."""
    fleets: Any = {"chat": {}, "code": {}}
    before = graph.schema(config.parse({"fleets": fleets}))["applications"]
    fleets["chat"] = {"engine": {"tool_call_parser": "hermes"}}
    after = graph.schema(config.parse({"fleets": fleets}))["applications"]
    changed = {old["name"] for old, new in zip(before, after, strict=True) if old["args"] != new["args"]}
    assert changed >= {"fleet-chat"} and "fleet-code" not in changed


def test_the_resolved_form_loads_back_to_itself() -> None:
    loaded = config.parse({"fleets": {"chat": {"engine": {"chat_template": TEMPLATE, "enable_prefix_caching": False}}}})
    assert config.parse(loaded.dump()) == loaded


# chat templates


@pytest.mark.parametrize("section", ["fleet", "fleets"])
def test_a_chat_template_is_read_where_the_command_runs(section: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    named = {"engine": {"chat_template": str(tmp_path / "t.jinja")}}
    loaded = config.load(file=tmp_path / "none.yaml", overrides={section: named if section == "fleet" else {"chat": named}})
    assert next(iter(loaded.fleets.values())).engine["chat_template"] == TEMPLATE


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja cannot be read: .*No such file"):
        engine_options.with_template({"engine": {"chat_template": str(tmp_path / "nowhere.jinja")}})


@pytest.mark.parametrize("values", [{}, None, {"engine": None}, {"engine": []}, {"engine": {"chat_template": 3}}])
def test_what_names_no_template_stays_as_it_is(values: Any) -> None:
    assert engine_options.with_template(values) is values


def test_over_http_no_file_of_the_pools_machine_is_read(tmp_path: Path) -> None:
    """`springtide fleets add` sends the text."""
    (tmp_path / "secret").write_text("{a}")
    with pytest.raises(ValueError, match="this is no template"):
        config.Config().fleet_with("chat", {"engine": {"chat_template": str(tmp_path / "secret")}})
