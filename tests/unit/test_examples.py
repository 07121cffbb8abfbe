"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "deployments", "jobs", "benchmarks")


def with_examples() -> list[str]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if has_examples(path)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


def has_examples(path: Path) -> bool:
    """One that needs a pool is skipped by doctest and is here to be read."""
    return any(">>> " in line and "doctest: +SKIP" not in line for line in path.read_text().splitlines())


@pytest.mark.parametrize("module", with_examples())
def test_examples_in_docstrings_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
