"""A fleet's arguments as vLLM 0.29 has them: one namespace, whose values have the types of vLLM's argument classes."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.errors import ConfigError
from cluster.redact import redact_places

OURS = {
    "disable_fastapi_docs": True,
    "worker_extension_cls": "deployments.replica.fingerprint.Fingerprint",
    "scheduling_policy": "priority",  # clients cannot set one (`deployments.api.bodies`): for them it is first come, first served
}
"""Arguments that every engine has."""
BY_VLLM: dict[str, Any] = {
    "attention_backend": str,
    "mamba_backend": str,
    "lora_dtype": str,
    "quantization_config": dict[str, Any],
}
"""Argument → the type from which vLLM itself converts its value, where its annotation is no help: it names a class that is only there for type
checkers, or an enumeration whose values are not the words that users write."""


def namespace(values: dict[str, Any]) -> Any:
    """vLLM's arguments: its own defaults, and ``values`` in place of some of them. A command line could not carry False, lists and mappings.

    ``{"tool_call_parser": "hermes"}`` also turns on that tools are called unforced: a parser is there for nothing else.
    Raises `ConfigError` where a value has the wrong type.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    types = {one.name: one.type for kind in (AsyncEngineArgs, FrontendArgs) for one in dataclasses.fields(kind)}
    args: Any = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.enable_auto_tool_choice = bool(values.get("tool_call_parser"))
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"it has no argument {name}")
        setattr(args, name, typed(name, value, types[name]))
    return args


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value as vLLM's argument has it: ``{"backend": "xgrammar"}`` becomes a ``StructuredOutputsConfig``. Raises `ConfigError`."""
    try:
        return TypeAdapter(BY_VLLM.get(name, kind)).validate_python(value)
    except ValidationError as error:
        words = "; ".join(f"{'.'.join(map(str, (name, *one['loc'])))}: {one['msg']}" for one in error.errors())
        raise ConfigError(words) from error


def check_draft(args: Any) -> None:
    """The draft model of speculative decoding comes from outside the store, where nobody has looked. Without safetensors, vLLM would unpickle."""
    draft = args.spec_model or (args.speculative_config or {}).get("model")
    if draft and not any(Path(draft).glob("*.safetensors")):
        raise ConfigError(f"the draft model {draft} has no safetensors files")


def check_template(template: str | None) -> None:
    """vLLM would start with a chat template that is no Jinja, and refuse every chat. Raises `ConfigError`."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template  # what renders it later, with its own extensions

    try:
        _compile_jinja_template(template or "")
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template, line {error.lineno}: {error.message}") from error


@contextlib.contextmanager
def refused_by_vllm(fleet: str) -> Iterator[None]:
    """Raises what vLLM says against its arguments as a `ConfigError`."""
    try:
        yield
    except (ConfigError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        said = " ".join(redact_places(str(error.args[0] if error.args else error)).split())
        raise ConfigError(
            f"vLLM refuses the arguments of the fleet {fleet}: {said}",
            f"Change fleets.{fleet}, or `fleet` where all fleets have it from there.",
            param=f"fleets.{fleet}.engine",
        ) from error
