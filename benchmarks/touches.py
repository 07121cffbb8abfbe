"""Where code touches what Ray and vLLM keep private, found in the syntax tree: names, not only imports.

A touch is one of these:

- an import of a module that Ray keeps to itself: a part begins with ``_`` (``ray.serve._private``, ``ray.data._internal``), or it is
  generated or the dashboard's (``ray.core.generated``, ``ray.dashboard.modules``);
- any import of vLLM, whose Python interface changes with every release;
- ``x._name`` where ``x`` is not ``self`` or ``cls``, also as ``getattr(x, "_name")`` or as a keyword argument ``f(_name=…)``;
- a method that Ray looks for by a name of its own (``__serve_…__``, ``__ray_…__``), unless Ray documents it (`DOCUMENTED`);
- a name that looks public and belongs to something private (`PRIVATE_NAMES`);
- a private module's name in a string.

Files that are named for it may (`NAMED`). `hidden_imports` finds modules that are imported by a string, which no import contract can see.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("cluster", "deployments", "jobs", "benchmarks")
NAMED = (
    "cluster/control/ray_autoscaling.py",
    "cluster/control/serve_details.py",
    "cluster/pool/haproxy.py",
    "cluster/pool/lean.py",
    "deployments/ray_patches.py",
    "deployments/vllm_patches.py",
    "deployments/replica/arguments.py",
    "deployments/replica/fingerprint.py",
    "deployments/replica/launch.py",
    "deployments/replica/vllm_engine.py",
    "jobs/ray_job.py",
    "jobs/training/drivers/ray_train_private.py",
)
"""Who may touch what is private. Each has a contract test that names the release it was read in."""
NAMED_BEFORE = (
    "cluster/lease.py",
    "deployments/fingerprint.py",
    "deployments/launch.py",
    "deployments/mend.py",
    "deployments/seal.py",
)
"""The same for checkouts from before `cluster` had rooms, so that `benchmarks.shape` can compare with one."""
GRAPH = ("cluster/pool/graph.py", "cluster/graph.py")
"""The one file that names modules of `deployments` in strings, for Serve imports the graph's parts by them."""
PRIVATE_MODULES = ("ray.core.generated", "ray.dashboard.modules")
PRIVATE_NAMES = re.compile("backend_cls|RAY_JOB_CONFIG_JSON_ENV_VAR")
PYTHONS_OWN = ("_asdict", "_replace", "_fields", "_make", "_exit")
"""Of named tuples, and `os._exit`."""
DOCUMENTED = ("__serve_build_asgi_app__",)
"""By ``serve.ingress`` itself; a contract test looks."""
HOOK = re.compile(r"__(serve|ray)_\w+__")
MODULE_IN_STRING = re.compile(r"(ray|vllm)(\.\w+)*\._\w+[\w.]*")
OURS_IN_STRING = re.compile(r"deployments(\.[a-z_]\w*)+(:\w+)?")


class Touch(NamedTuple):
    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}"


def touches(root: Path, named: tuple[str, ...] = NAMED) -> list[Touch]:
    """Every private touch in the checkout ``root``, outside the files that are named for it."""
    return [touch for path in files(root) if inside(root, path) not in named for touch in _of(root, path)]


def hidden_imports(root: Path) -> list[Touch]:
    """Every module that is imported by a string, outside the file that builds the graph: ``import_module(…)``, and in `cluster` the dotted
    name of a module of `deployments`. One for each line."""
    found: dict[tuple[str, int], Touch] = {}
    for path in files(root):
        file, tree = inside(root, path), ast.parse(path.read_text())
        for line, what in [] if file in GRAPH else [*_named_in_strings(file, tree), *_imported_by_call(tree)]:
            found[file, line] = Touch(file, line, what)
    return list(found.values())


def _named_in_strings(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node, words in strings(tree):
        if file.startswith("cluster/") and OURS_IN_STRING.fullmatch(words):
            yield node.lineno, f"{words!r} in a string"


def _imported_by_call(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            yield node.lineno, ast.unparse(node)


def files(root: Path) -> list[Path]:
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def inside(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _of(root: Path, path: Path) -> Iterator[Touch]:
    tree, file = ast.parse(path.read_text()), inside(root, path)
    for node in ast.walk(tree):
        for what in (*_imports(node), *_names(node)):
            yield Touch(file, getattr(node, "lineno", 0), what)
    for node, words in strings(tree):
        if MODULE_IN_STRING.fullmatch(words) or PRIVATE_NAMES.fullmatch(words):
            yield Touch(file, node.lineno, f"{words!r} in a string")


def _imports(node: ast.AST) -> list[str]:
    """The private modules that a statement imports. ``from ray.serve import _private`` imports one as well."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [f"import of {name}" for name in names if private_module(name)]


def private_module(name: str) -> bool:
    """
    >>> [private_module(name) for name in ("ray.serve._private.replica", "ray.serve.schema", "vllm.engine", "cluster._x")]
    [True, False, True, False]
    """
    first, *rest = name.split(".")
    if first not in ("ray", "vllm"):
        return False
    return first == "vllm" or name.startswith(PRIVATE_MODULES) or any(part.startswith("_") for part in rest)


def _names(node: ast.AST) -> list[str]:
    """The private names that an expression uses or a class defines."""
    if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        return [ast.unparse(node)] if private_name(node.attr) else []
    if isinstance(node, ast.keyword) and node.arg and private_name(node.arg):
        return [f"{node.arg}=…"]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [f"def {node.name}"] if private_hook(node.name) or PRIVATE_NAMES.fullmatch(node.name) else []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
        return [ast.unparse(node) for one in node.args[1:2] if isinstance(one, ast.Constant) and private_name(str(one.value))]
    return []


def private_name(name: str) -> bool:
    """
    >>> [private_name(name) for name in ("_private", "_replace", "__doc__", "__ray_terminate__", "public")]
    [True, False, False, True, False]
    """
    if PRIVATE_NAMES.fullmatch(name) or private_hook(name):
        return True
    return name.startswith("_") and not name.startswith("__") and name not in PYTHONS_OWN


def private_hook(name: str) -> bool:
    return bool(HOOK.fullmatch(name)) and name not in DOCUMENTED


def strings(tree: ast.AST) -> list[tuple[ast.Constant, str]]:
    """Every string but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    prose = {id(one.value) for body in bodies for one in body if isinstance(one, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose]
    return [(node, node.value) for node in found if isinstance(node.value, str)]
