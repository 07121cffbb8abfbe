"""What vLLM's processes say before they end reaches who started them."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.replica import last_words

CAUSE = "To serve at least one request, 0.35 GiB KV cache is needed,\n which is larger than the available 0.12 GiB."


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """vLLM's logger, as one of its own processes has it."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    vllm = logging.getLogger("vllm")
    before = list(vllm.handlers)
    yield logging.getLogger("vllm.v1.engine.core")
    vllm.handlers[:] = before


def fail(log: logging.Logger, error: Exception, words: str = "EngineCore failed to start.") -> None:
    try:
        raise error
    except Exception:
        log.exception(words)


def test_the_first_exception_is_the_cause(log: logging.Logger) -> None:
    with last_words.kept() as said:
        last_words.listen()
        log.error("no exception")
        fail(log, ValueError(CAUSE), "WorkerProc failed to start.")
        fail(log, RuntimeError("Worker failed, see above"))
        assert said() == f"{' '.join(CAUSE.split())} (ValueError)"


def test_after_the_start_nothing_is_kept_and_no_file_is_left(log: logging.Logger) -> None:
    with last_words.kept():
        name = os.environ[last_words.VARIABLE]
        last_words.listen()
    fail(log, ValueError("much later"))
    assert not os.path.exists(name) and last_words.VARIABLE not in os.environ


def test_a_process_that_nobody_waits_for_keeps_nothing(monkeypatch: pytest.MonkeyPatch, log: logging.Logger) -> None:
    handlers: list[Any] = list(logging.getLogger("vllm").handlers)
    last_words.listen()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    with last_words.kept() as said:
        last_words.listen()
        assert said() == ""
    assert logging.getLogger("vllm").handlers == handlers
