"""What `make run` runs, as a user types it, on a home of its own."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, free_ports

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


def test_the_loop_runs_and_runs_again_whatever_was_published_and_leaves_no_process(tmp_path: Path) -> None:
    gcs, dashboard, gateway = free_ports(3)
    environment = {
        **os.environ,
        "SPRINGTIDE_HOME": str(tmp_path / "home"),
        "SPRINGTIDE_POOL__GCS_PORT": str(gcs),
        "SPRINGTIDE_POOL__DASHBOARD_PORT": str(dashboard),
        "SPRINGTIDE_POOL__AGENT_PORTS": "27500",
        "SPRINGTIDE_GATEWAY__PORT": str(gateway),
        "COLUMNS": "200",
    }

    def command(*arguments: str) -> str:
        line = [sys.executable, "-m", "cluster", *arguments]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def left() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if str(tmp_path) in " ".join(_said_of(process))]

    first = command("run", "--once")
    assert "seedling@1" in first and "the tide has taught me" in first and "Stopped." in first
    assert left() == []
    command("up")
    command("train", "--data", "jobs/seedling/tide.jsonl", "--name", "seedling", "--full", "--publish", "--epochs", "8")
    command("down")
    again = command("run", "--once")
    assert "seedling@3" in again and "been through the loop already" in again
    assert left() == []


def _said_of(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []
