"""A fleet's ``engine:`` section: whatever argument vLLM's engine and server take, but for those that are Springtide's own and those that
run code or read files from outside.

A wrong name is said at once, and a wrong type where it can be told without importing vLLM (`cluster.vllm_arguments`). The others are found
in the engine's process, before the weights load (`deployments.replica.arguments`).
"""

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from cluster.errors import ConfigError
from cluster.vllm_arguments import adapter_of, arguments, listed

PARSERS = {"tool_call_parser": "tool_parsers/__init__.py", "reasoning_parser": "reasoning/__init__.py"}
"""Argument → the file of vLLM that lists the values it may have, as the keys of its first dictionary."""

FLEET_KEYS = {
    "model": "model",
    "runner": "task",
    "convert": "task",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel_size",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "enforce_eager": "enforce_eager",
    "max_loras": "max_loras",
    "max_cpu_loras": "max_cpu_loras",
    "max_lora_rank": "max_lora_rank",
    "enable_sleep_mode": "warm_pool_size",
}
"""Argument → the fleet's own key that decides it."""
OURS = {
    "models and tokenizers come from the store, as versions": (
        "model_tag",
        "model_weights",
        "served_model_name",
        "tokenizer",
        "hf_token",
        "model_loader_extra_config",
    ),
    "adapters come from the store, and may have any module": (
        "enable_lora",
        "lora_modules",
        "default_mm_loras",
        "lora_target_modules",
    ),
    "a replica runs on one machine, in as many slots as tensor_parallel_size says": (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "data_parallel_*",
        "dp_supervisor_*",
        "nnodes",
        "node_rank",
        "master_*",
        "device_ids",
        "distributed_executor_backend",
    ),
    "clients speak with the gateway, and the server behind it is Springtide's": (
        "host",
        "port",
        "uds",
        "ssl_*",
        "enable_ssl_refresh",
        "api_key",
        "root_path",
        "middleware",
        "allow_credentials",
        "allowed_origins",
        "allowed_methods",
        "allowed_headers",
        "uvicorn_*",
        "disable_uvicorn_*",
        "disable_access_log_*",
        "disable_fastapi_docs",
        "enable_offline_docs",
        "enable_request_id_headers",
        "enable_tokenizer_info_endpoint",
        "h11_*",
        "headless",
        "grpc",
        "api_server_count",
        "config",
        "tokens_only",
    ),
    "the gateway would take the comments for the first token": ("sse_keep_alive_interval",),
    "the gateway bounds what waits, by gateway.max_requests": ("max_num_queued_*",),
    "autoscaling goes by these numbers": ("disable_log_stats",),
    "engines always schedule by priority, and those of one priority in the order in which they came": ("scheduling_policy",),
    "replicas exchange nothing with each other or with strangers": (
        "kv_transfer_config",
        "kv_events_config",
        "ec_transfer_config",
        "weight_transfer_config",
    ),
}
"""Why an argument is Springtide's own → its names, ``*`` for any rest."""
UNSAFE = {
    "it would run code from outside": (
        "trust_remote_code",
        "*_plugin",
        "*_cls",
        "*_module_path",
        "logits_processors",
        "model_class_overrides",
        "ec_manager_config",
        "inductor_passes",
        "log_config_file",
        "tool_server",
    ),
    "it would read or write files outside the store": ("load_format", "draft_load_config", "*revision", "*_dir", "*_path"),
    "requests would bring their own templates, and a template is a program": ("trust_request_chat_template",),
    "a request with embeddings of a wrong shape would end the engine": ("enable_prompt_embeds", "enable_mm_embeds"),
}
"""Why an argument is refused for everybody's safety → its names. They are refused inside another argument's value too."""
CHOICES = {"generation_config": ("auto", "vllm"), "compilation_config.backend": ("eager", "inductor")}
"""Arguments that take a few words, or else the name of something to load."""
DRAFTS = ("spec_model", "speculative_config.model")
CUSTOM_DRAFT = "custom_class"
"""The method of speculative decoding for which the model names a class to import."""

LONGEST = 60
"""Characters of a wrong value that an error quotes."""


class Problem(NamedTuple):
    key: tuple[str, ...]
    """``("compilation_config", "backend")``"""
    words: str


def check(options: Mapping[str, Any]) -> None:
    """Raises pydantic's `ValidationError`, which names every key at fault."""
    if not options:
        return  # and read no files of vLLM
    found = [
        InitErrorDetails(type=PydanticCustomError("engine_option", "{words}", {"words": one.words}), loc=one.key, input=None)
        for one in problems(options, arguments())
    ]
    if found:
        raise ValidationError.from_exception_data("engine", found)


def problems(options: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[Problem]:
    """What is wrong with a section. ``known``: argument → its type in vLLM's words; empty where vLLM is not installed.

    >>> [one.words for one in problems({"hots": 1, "host": "::"}, {"host": "str | None", "hosts": "int"})]
    ['vLLM has no such argument (did you mean hosts?)', "refused: clients speak with the gateway, and the server behind it is Springtide's"]
    """
    for name, value in options.items():
        words = refusal(name) or _unknown(name, known) or _mistyped(known.get(name, "Any"), value)
        if words:
            yield Problem((name,), words)
        elif value is not None:
            yield from _inside((name,), value)


def refusal(name: str) -> str:
    """Why an argument cannot be set in the section; empty where it can."""
    if key := FLEET_KEYS.get(name):
        return f"the fleet's own key {key} decides this"
    return _reason(name, OURS) or _reason(name, UNSAFE)


def _reason(name: str, table: Mapping[str, tuple[str, ...]]) -> str:
    """vLLM takes ``trust-remote-code`` for ``trust_remote_code`` inside some values."""
    name = name.replace("-", "_")
    return next((f"refused: {why}" for why, names in table.items() if any(fnmatchcase(name, one) for one in names)), "")


def _unknown(name: str, known: Mapping[str, str]) -> str:
    """
    >>> _unknown("tool-call-parser", {"tool_call_parser": "str | None"})
    'vLLM has no such argument (did you mean tool_call_parser?)'
    """
    if name in known or not known:
        return ""
    near = difflib.get_close_matches(name.replace("-", "_"), [one for one in known if not refusal(one)])
    return "vLLM has no such argument" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _mistyped(annotation: str, value: Any) -> str:
    """
    >>> _mistyped("bool | None", False), _mistyped("Literal['a', 'b']", "c")
    ('', "'c' is not what vLLM takes here: Literal['a', 'b'] (Input should be 'a' or 'b')")
    """
    adapter = None if value is None else adapter_of(annotation)  # None leaves the argument to vLLM
    if adapter is not None:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            why = "; ".join(one["msg"] for one in error.errors())
            return f"{repr(value)[:LONGEST]} is not what vLLM takes here: {annotation} ({why})"
    return ""


def _inside(key: tuple[str, ...], value: Any) -> Iterator[Problem]:
    """What must not be in a value that has the right type."""
    if words := _bad_value(".".join(key).replace("-", "_"), value):
        yield Problem(key, words)
    if isinstance(value, dict):
        for part, inner in cast(dict[Any, Any], value).items():
            if words := _reason(str(part), UNSAFE):
                yield Problem((*key, str(part)), words)
            else:
                yield from _inside((*key, str(part)), inner)


def _bad_value(key: str, value: Any) -> str:
    if value is None or value == "":  # as if it were not there
        return ""
    if choices := CHOICES.get(key):
        return "" if value in choices else f"refused: only {' and '.join(map(repr, choices))} load nothing from outside"
    if key in PARSERS and (parsers := listed(PARSERS[key])) and value not in parsers:
        near = difflib.get_close_matches(str(value), parsers)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(parsers)}"
        return f"vLLM has no parser {repr(value)[:LONGEST]} ({hint})"
    if key in DRAFTS and not Path(str(value)).is_absolute():
        return "a draft model is a folder on the engines' machines, by its absolute path"
    if key in ("spec_method", "speculative_config.method") and value == CUSTOM_DRAFT:
        return "refused: it would run code from outside"
    if key == "chat_template" and not is_template(str(value)):
        return "this is no template; only `springtide` itself replaces the name of a file by its text"
    return ""


# chat templates


def is_template(text: str) -> bool:
    """As vLLM tells a template from the name of a file.

    >>> is_template("{{ messages[0].content }}"), is_template("./tools.jinja")
    (True, False)
    """
    return any(one in text for one in "{}\n")


def with_template(fleet: Any) -> Any:
    """A fleet's keys with the text of its chat template where they name a file. Raises `ConfigError`.

    The file is read where the command runs. The machines that start engines need not have it, and another text is another configuration.
    """
    options = _mapping(_mapping(fleet).get("engine"))
    template = options.get("chat_template")
    if not isinstance(template, str) or is_template(template):
        return fleet
    try:
        text = Path(template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"engine.chat_template: {template} cannot be read: {error}.",
            "Name a file, or write the template itself.",
            param="engine.chat_template",
        ) from error
    return {**fleet, "engine": {**options, "chat_template": text}}


def _mapping(value: Any) -> dict[str, Any]:
    """The value, where it is a mapping. What should be one and is not is no business of templates."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
