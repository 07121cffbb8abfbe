"""Runs a client's checks one after the other. Standard library only: it runs in every client's own environment.

A script decorates its checks with `check` and ends with ``run("package")``. The last line that it prints is JSON for the runner.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version

URL = os.environ["CLIENTS_URL"]
"""``http://host:port`` of the pool."""
CHAT = os.environ["CLIENTS_CHAT"]
"""The model that chats and calls tools."""
ENCODER = os.environ["CLIENTS_ENCODER"]
"""The model that makes vectors."""
FOLDER = os.environ["CLIENTS_FOLDER"]
"""Where the files of CHAT are, the tokenizer among them."""

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "Write a very long story about the sea."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}

_checks: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    _checks.append(function)
    return function


def run(package: str) -> None:
    """Run every check, print a line for each, and exit with 1 where one failed."""
    failed = 0
    for each in _checks:
        began_s, word = time.monotonic(), "ok"
        try:
            each()
        except Exception:  # noqa: BLE001
            failed, word = failed + 1, "FAIL"
            traceback.print_exc(file=sys.stdout)
        print(f"{word} {each.__name__} {time.monotonic() - began_s:.1f} s", flush=True)
    print(json.dumps({"version": version(package), "passed": len(_checks) - failed, "failed": failed}))
    sys.exit(1 if failed else 0)


def alike(one: list[float], other: list[float]) -> float:
    """The cosine of two vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))
