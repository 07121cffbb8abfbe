"""The examples in docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    ["cluster.__main__", "cluster.submit", "deployments.upstream", "deployments.shadow", "jobs.bench.load", "jobs.bench.memory"],
)
def test_examples_in_docstrings_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
