"""The examples in docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "cluster.cli.commands",
        "cluster.cli.jobs",
        "cluster.config",
        "cluster.control.applications",
        "cluster.control.cold_starts",
        "cluster.control.describe",
        "cluster.control.replicas",
        "cluster.control.slots",
        "cluster.endpoint",
        "cluster.errors",
        "cluster.publishing.canary",
        "cluster.redact",
        "deployments.api.admin",
        "deployments.autoscaling",
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
