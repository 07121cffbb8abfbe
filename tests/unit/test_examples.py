"""The examples in docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "cluster.cli.jobs",
        "cluster.config",
        "cluster.endpoint",
        "cluster.errors",
        "deployments.api.admin",
        "cluster.pool.submit",
        "deployments.routing.upstream",
        "deployments.routing.shadow",
        "benchmarks.load",
        "benchmarks.memory",
    ],
)
def test_examples_in_docstrings_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
