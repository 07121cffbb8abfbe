"""The names and types of the arguments of vLLM 0.29, read from its files: importing it takes ten seconds."""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

CLASSES = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}
"""vLLM's file → the classes in it whose fields are its arguments."""


@functools.cache
def arguments() -> Mapping[str, str]:
    """Every argument → its type in vLLM's words. Empty where vLLM is not installed; then the engine alone can check."""
    found: dict[str, str] = {}
    for file, names in CLASSES.items():
        for node in _parse(file).body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                found |= dict(_fields(node))
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_"):
            kind = one.annotation
            yield one.target.id, str(kind.value) if isinstance(kind, ast.Constant) else ast.unparse(kind)


@functools.cache
def imported() -> Mapping[str, str]:
    """``{"CacheDType": "config/cache.py", …}``: what vLLM's engine arguments take from its configuration."""
    nodes = [node for node in _parse(next(iter(CLASSES))).body if isinstance(node, ast.ImportFrom)]
    modules = {one.name: node.module or "" for node in nodes for one in node.names}
    return {name: f"{module[5:].replace('.', '/')}.py" for name, module in modules.items() if module.startswith("vllm.config.")}


@functools.cache
def listed(file: str) -> tuple[str, ...]:
    """The keys of the first dictionary that a file of vLLM defines."""
    for node in _parse(file).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return ()


def _parse(file: str) -> ast.Module:
    vllm = importlib.util.find_spec("vllm")
    path = Path(vllm.origin).parent / file if vllm and vllm.origin else None
    return ast.parse(path.read_text("utf-8")) if path and path.is_file() else ast.Module([], [])


# types


@functools.cache
def adapter_of(annotation: str) -> TypeAdapter[Any] | None:
    """None where the annotation needs names of vLLM's own."""
    try:
        return TypeAdapter(_evaluated(annotation))
    except NameError:
        return None


class Names(dict[str, Any]):
    """What an annotation may be made of to be checked without vLLM. A name that vLLM itself gives to a list of words is looked up in its files."""

    def __missing__(self, name: str) -> Any:
        for node in _parse(imported().get(name, "")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                words = ast.unparse(node.value)
                if words.startswith("Literal["):
                    return _evaluated(words)
        raise KeyError(name)


NAMES = Names(Any=Any, Literal=Literal, **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, set)})


def _evaluated(annotation: str) -> Any:
    """Raises `NameError` where the annotation needs classes of vLLM."""
    return eval(annotation, {"__builtins__": {}}, NAMES)  # noqa: S307 (written in the vLLM that is installed)
