"""The code's own measures: lengths, rooms and what they import of each other, private touches, and the README's words.

``python -m benchmarks shape [FOLDER]`` reads any checkout without importing it, so two commits can stand beside each other.

A *room* is a folder with modules. A module that lies beside rooms (`cluster.config`) stands for itself. An *import* is counted once for each
pair of modules, or of rooms. *Levels* is the length of the longest chain in which each imports the next; a circle counts as one level.
"""

import argparse
import ast
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.place import console
from benchmarks.touches import NAMED, NAMED_BEFORE, files, hidden_imports, inside, touches

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Piece(NamedTuple):
    """A file, class or function with its length in lines."""

    lines: int
    name: str


class Lengths(NamedTuple):
    pieces: int
    median: float
    p95: int
    longest: int
    name: str
    """Of the longest."""


def shape(options: argparse.Namespace) -> None:
    """Measure the code of a checkout: lengths, rooms, imports, private touches, the README's words."""
    found = measure(options.folder.resolve())
    for table in tables(found):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(root: Path) -> dict[str, Any]:
    """Everything, as plain values."""
    trees = {inside(root, path): ast.parse(path.read_text()) for path in files(root)}
    texts = {inside(root, path): path.read_text() for path in files(root)}
    modules = {module(file): file for file in trees}
    imports = {name: imported(trees[file], modules, name) for name, file in modules.items()}
    lengths = {
        "files": summary(Piece(text.count("\n"), file) for file, text in texts.items()),
        "classes": summary(pieces(trees, ast.ClassDef)),
        "functions": summary(pieces(trees, Function)),
    }
    return {
        **{what: found._asdict() for what, found in lengths.items()},
        "rooms": rooms(imports),
        "private_touches": [str(touch) for touch in touches(root, (*NAMED, *NAMED_BEFORE))],
        "imports_by_string": [str(touch) for touch in hidden_imports(root)],
        "readme_words": len((root / "README.md").read_text().split()) if (root / "README.md").exists() else 0,
    }


# lengths


def pieces(trees: Mapping[str, ast.Module], kind: Any) -> list[Piece]:
    found: list[tuple[str, Any]] = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    return [Piece(one.end_lineno - one.lineno + 1, f"{file}:{one.name}") for file, one in found if isinstance(one, kind)]


def summary(pieces: Iterable[Piece]) -> Lengths:
    """
    >>> summary([Piece(1, "a"), Piece(3, "b"), Piece(8, "c")])
    Lengths(pieces=3, median=3, p95=8, longest=8, name='c')
    """
    ordered = sorted(pieces)
    lines = [piece.lines for piece in ordered]
    return Lengths(len(ordered), statistics.median(lines), lines[int(0.95 * len(lines))], ordered[-1].lines, ordered[-1].name)


# imports


def module(file: str) -> str:
    """
    >>> module("cluster/store/journal.py"), module("jobs/__init__.py")
    ('cluster.store.journal', 'jobs')
    """
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree: ast.Module, modules: Mapping[str, str], importer: str) -> set[str]:
    """The modules of the checkout that ``importer`` imports, at its top or inside a function."""
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from cluster import logs` names a module, `from cluster.logs import logger` something in one
            named |= {whole if (whole := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names}
    return {name for name in named if name in modules and name != importer}


def room(module: str, folders: set[str]) -> str:
    """The room of a module, or the module where it lies beside rooms.

    >>> [room(name, {"cluster", "cluster.store", "jobs"}) for name in ("cluster.store.journal", "cluster.config", "jobs.data")]
    ['cluster.store', 'cluster.config', 'jobs']
    """
    folder = module if module in folders else module.rpartition(".")[0] or module
    beside = any(other.startswith(f"{folder}.") for other in folders)
    return module if beside else folder


def rooms(imports: Mapping[str, set[str]]) -> dict[str, Any]:
    """How many, the largest, and what the modules and the rooms import of each other."""
    folders = {name.rpartition(".")[0] for name in imports if "." in name}
    of = {name: room(name, folders) for name in imports}
    members = {one: [name for name in of if of[name] == one and name != one] for one in set(of.values())}
    between = {one: {of[to] for name in of if of[name] == one for to in imports[name]} - {one} for one in members}
    largest = max(members, key=lambda one: (len(members[one]), one))
    within = {name: {to for to in targets if of[to] == largest} for name, targets in imports.items() if of[name] == largest}
    return {
        "count": len(folders),
        "largest": largest,
        "largest_modules": len(members[largest]),
        "largest_imports_within": sum(map(len, within.values())),
        "largest_levels_within": levels(within),
        "module_imports": sum(map(len, imports.values())),
        "module_levels": levels(imports),
        "room_imports": sum(map(len, between.values())),
        "room_levels": levels(between),
        "room_circles": [sorted(one) for one in circles(between)],
        "between": {one: sorted(targets) for one, targets in sorted(between.items())},
    }


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach each other.

    >>> circles({"a": {"b"}, "b": {"a", "c"}, "c": set()}) == [{"a", "b"}]
    True
    """
    reach = {node: reachable(graph, node) for node in graph}
    found: list[set[str]] = []
    for node in graph:
        circle = {other for other in reach[node] if node in reach.get(other, set())}
        if node in reach[node] and circle not in found:
            found.append(circle)
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def levels(graph: Mapping[str, set[str]]) -> int:
    """
    >>> levels({"a": {"b"}, "b": {"c"}, "c": set()}), levels({"a": {"b"}, "b": {"a"}})
    (3, 1)
    """
    merged = {node: frozenset(circle) for circle in circles(graph) for node in circle}
    one = {node: merged.get(node, frozenset({node})) for node in graph}
    below: dict[frozenset[str], set[frozenset[str]]] = {group: set() for group in one.values()}
    for node, targets in graph.items():
        below[one[node]] |= {one[to] for to in targets if to in one} - {one[node]}
    known: dict[frozenset[str], int] = {}

    def height(group: frozenset[str]) -> int:
        if group not in known:
            known[group] = 1 + max((height(to) for to in below[group]), default=0)
        return known[group]

    return max((height(group) for group in below), default=0)


# shown


def tables(found: dict[str, Any]) -> list[Table]:
    lengths = Table("lines", "count", "median", "95 %", "longest", "which")
    for what in ("files", "classes", "functions"):
        lengths.add_row(what, *(f"{value:g}" if isinstance(value, float) else str(value) for value in found[what].values()))
    inner = found["rooms"]
    between = Table("measure", "value")
    between.add_row("rooms", str(inner["count"]))
    between.add_row("largest room", f"{inner['largest']}: {inner['largest_modules']} modules")
    between.add_row("in it", f"{inner['largest_imports_within']} imports on {inner['largest_levels_within']} levels")
    between.add_row("modules", f"{inner['module_imports']} imports on {inner['module_levels']} levels")
    between.add_row("rooms to rooms", f"{inner['room_imports']} imports on {inner['room_levels']} levels")
    between.add_row("circles of rooms", "; ".join(" ".join(one) for one in inner["room_circles"]) or "none")
    between.add_row("private touches outside named files", str(len(found["private_touches"])))
    between.add_row("imports by a string", str(len(found["imports_by_string"])))
    between.add_row("words in the README", str(found["readme_words"]))
    return [lengths, between]
