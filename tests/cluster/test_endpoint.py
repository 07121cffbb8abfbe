"""A pool is an address: every command that starts and stops nothing here works from another home, folder and machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from cluster.types import Lineage, VersionId
from tests.conftest import ROOT, Running
from tests.support.forward import forwarded
from tests.waiting import when

POISON = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks9://nowhere",
    "all_proxy": "socks9://nowhere",
    "no_proxy": "elsewhere",
    "NO_PROXY": "elsewhere",
    "RAY_ADDRESS": "10.0.0.1:6379",
    "RAY_API_SERVER_ADDRESS": "http://10.0.0.1:8265",
    "RAY_AUTH_TOKEN": "another Ray's",
    "RAY_AUTH_MODE": "disabled",
}
"""What a shell may hold for other programs."""


def command(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`springtide …` in a folder and home where nothing is, with an environment in which everything points elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SPRINGTIDE_"))}
    home = {"SPRINGTIDE_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    line = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(
        line, env={**kept, **home, **POISON, **environment}, cwd=folder, capture_output=True, text=True, timeout=280
    )


def said(folder: Path, url: str, key: str, *arguments: str) -> str:
    done = command(folder, *arguments, SPRINGTIDE_POOL=url, SPRINGTIDE_API_KEY=key)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_works_from_elsewhere_by_the_pools_url_alone(pool: Running, tmp_path: Path) -> None:
    key = pool.pool.token
    assert json.loads(said(tmp_path, pool.url, key, "status", "--json"))["slots"]["total"] == 3
    assert "seedling@1" in said(tmp_path, pool.url, key, "status")
    assert "seedling@1" in said(tmp_path, pool.url, key, "models")
    assert "digest" in said(tmp_path, pool.url, key, "models", "seedling@1")
    assert "seedling@1" in said(tmp_path, pool.url, key, "history", "seedling")
    assert "seedling@1" in said(tmp_path, pool.url, key, "ask", "Who are you?")
    assert "live already" in said(tmp_path, pool.url, key, "publish", "seedling@1")
    assert "seedling" in said(tmp_path, pool.url, key, "fleets")
    assert "pretrain" in said(tmp_path, pool.url, key, "jobs")
    assert not (tmp_path / "home").exists(), "nothing was made there"
    for refused, words in {("rollback", "seedling"): "nothing to roll back to", ("abort", "seedling"): "No rollout"}.items():
        done = command(tmp_path, "--pool", pool.url, *refused, SPRINGTIDE_API_KEY=key)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_model_is_trained_from_elsewhere_with_a_file_of_that_machine(pool: Running, tmp_path: Path) -> None:
    key, data = pool.pool.token, (ROOT / "jobs" / "seedling" / "tide.jsonl").read_bytes()
    (tmp_path / "mine.jsonl").write_bytes(data)
    given = ("--data", "mine.jsonl", "--name", "elsewhere", "--epochs", "2", "--workers", "1")
    told = said(tmp_path, pool.url, key, "train", *given)
    assert "Registered elsewhere@1" in told and "next: springtide publish elsewhere@1" in told
    (job,) = re.findall(r"finetune-[0-9a-f]{12}", told)
    listed = said(tmp_path, pool.url, key, "jobs")
    assert job in listed and "succeeded" in listed and "elsewhere@1" in listed
    assert "progress stage=" in said(tmp_path, pool.url, key, "logs", job)
    assert "elsewhere@1" in said(tmp_path, pool.url, key, "models", "elsewhere")
    assert said(tmp_path, pool.url, key, "evaluate", "elsewhere@1", "--held-out", "mine.jsonl").count("passed") >= 1


def test_a_job_is_followed_and_ended_from_elsewhere(pool: Running, tmp_path: Path) -> None:
    key = pool.pool.token
    told = said(tmp_path, pool.url, key, "train", "--data", "sample:tide", "--name", "long", "--epochs", "9999", "--no-wait")
    (job,) = set(re.findall(r"finetune-[0-9a-f]{12}", told))
    assert "--follow" in told
    when(lambda: "tokens/s" in said(tmp_path, pool.url, key, "jobs"), 120)
    assert "cancelled" in said(tmp_path, pool.url, key, "cancel", job)
    assert "step=" in said(tmp_path, pool.url, key, "logs", job, "--follow"), "it ends with the job"
    refused = command(tmp_path, "logs", "nobody-0123456789ab", SPRINGTIDE_POOL=pool.url, SPRINGTIDE_API_KEY=key)
    assert refused.returncode == 2 and "no job" in refused.stderr


def test_a_fleet_is_added_and_removed_from_elsewhere(pool: Running, tmp_path: Path) -> None:
    key = pool.pool.token
    # Weights of its own: an alias outlives its fleet, and one that means the seedling's would keep those from being replaced.
    folder = pool.registry.fetch(pool.registry.manifest(VersionId("seedling", 1)), tmp_path / "cache")
    own = pool.registry.register("guest", "weights", None, folder, Lineage())
    added = said(
        tmp_path, pool.url, key, "fleets", "add", "guest", "--model", str(own.id), "--set", "min_replicas=0", "--no-wait"
    )
    assert "guest" in added and "guest" in said(tmp_path, pool.url, key, "fleets")
    twice = command(tmp_path, "fleets", "add", "guest", SPRINGTIDE_POOL=pool.url, SPRINGTIDE_API_KEY=key)
    assert twice.returncode == 2 and "There is a fleet guest already" in twice.stderr
    wrong = command(tmp_path, "fleets", "add", "x", "--set", "colour=blue", SPRINGTIDE_POOL=pool.url, SPRINGTIDE_API_KEY=key)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    used = command(tmp_path, "fleets", "remove", "guest", SPRINGTIDE_POOL=pool.url, SPRINGTIDE_API_KEY=key)
    assert used.returncode == 2 and "--force" in used.stderr, "nobody else hosts what the alias guest means"
    said(tmp_path, pool.url, key, "fleets", "remove", "guest", "--force")
    when(lambda: "guest" not in said(tmp_path, pool.url, key, "fleets"), 60)


def test_a_plain_tcp_forward_is_enough(pool: Running, tmp_path: Path) -> None:
    """As `kubectl port-forward` is. On Kubernetes every command but `ask` used to need a pool.json of this machine."""
    with forwarded(pool.config.gateway.host, pool.config.gateway.port) as port:
        url = f"http://127.0.0.1:{port}"
        assert "seedling@1" in said(tmp_path, url, pool.pool.token, "status")
        assert "seedling@1" in said(tmp_path, url, pool.pool.token, "ask", "Who are you?")


def test_the_own_pool_is_reached_whatever_the_shell_holds_for_others(pool: Running, tmp_path: Path) -> None:
    """`RAY_API_SERVER_ADDRESS`, `no_proxy` and `ALL_PROXY` of the shell turned commands for the own pool away from it."""
    home = {"SPRINGTIDE_HOME": str(pool.config.home)}
    for arguments in (("status",), ("models",), ("ask", "Who are you?"), ("jobs",), ("fleets",)):
        done = command(tmp_path, *arguments, **home)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_the_pool_says_what_it_needs(pool: Running, tmp_path: Path, key: str) -> None:
    done = command(tmp_path, "--pool", pool.url, "status", SPRINGTIDE_API_KEY=key)
    assert done.returncode == 2 and "SPRINGTIDE_API_KEY" in done.stderr


def test_what_starts_and_stops_processes_here_takes_no_address(pool: Running, tmp_path: Path) -> None:
    done = command(tmp_path, "--pool", pool.url, "down", SPRINGTIDE_API_KEY=pool.pool.token)
    assert done.returncode == 2 and "this machine" in done.stderr
    assert pool.pool.alive


def test_a_file_goes_into_the_store_once_whatever_it_is_called(pool: Running) -> None:
    headers = {"authorization": f"Bearer {pool.pool.token}"}
    first, again = (httpx.put(f"{pool.url}/admin/uploads", content=b"{}\n" * 1000, headers=headers, timeout=60) for _ in range(2))
    assert first.status_code == 200 and first.json() == again.json()
    assert pool.registry.store.get(f"uploads/{first.json()['source'].removeprefix('upload:')}") == b"{}\n" * 1000
