"""A whole pool where everything about the machine and the account is unusual at once, and one that all interfaces lead to."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.pool.folders import RAY_LOGS
from tests.cluster.test_endpoint import POISON
from tests.conftest import ROOT, free_ports
from tests.unit.test_surroundings import NOBODY, ODD
from tests.waiting import when

pytestmark = pytest.mark.chaos

FILES = (256, 1024)
"""Files that may be open: the shell's limit, and the one that it may be raised to."""


def nobody() -> list[str]:
    """What makes a command that of a user without a name; nothing where other users cannot run this Python."""
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    runs = "import os, sys; sys.exit(not os.access(sys.executable, os.X_OK))"
    able = os.getuid() == 0 and shutil.which("setpriv") and subprocess.run([*user, sys.executable, "-c", runs]).returncode == 0
    return user if able else []


class Place:
    """A checkout, a working folder and a home of an odd name, which belong to a user without a name where this machine can have one."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.user = nobody()
        self.checkout, self.work = folder / ODD / "checkout", folder / ODD / "work"
        self.temporary = folder / ("t" * 60) / "a b"
        for name in ("cluster", "deployments", "jobs"):
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (self.work, self.temporary):
            path.mkdir(parents=True)
            if self.user:
                os.chown(path, NOBODY, NOBODY)
        shutil.copy(ROOT / "jobs" / "seedling" / "tide.jsonl", self.work / "my lines #1.jsonl")
        gcs, dashboard, gateway = free_ports(3)
        self.environment = {
            **POISON,
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.checkout),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
            "HOME": "/nonexistent",
            "TMPDIR": str(self.temporary),
            "RAY_NAMESPACE": "elsewhere",
            "RAY_REDIS_ADDRESS": "10.0.0.1:6379",
            "SPRINGTIDE_GATEWAY__HOST": "::1",
            "SPRINGTIDE_GATEWAY__PORT": str(gateway),
            "SPRINGTIDE_POOL__GCS_PORT": str(gcs),
            "SPRINGTIDE_POOL__DASHBOARD_PORT": str(dashboard),
            "SPRINGTIDE_POOL__AGENT_PORTS": str(27000 + os.getpid() % 9 * 100),
        }
        for name in ("RAY_AUTH_TOKEN", "SPRINGTIDE_POOL", "SPRINGTIDE_API_KEY"):  # a token of the shell's is the pool's
            self.environment.pop(name, None)
        self.home = self.work / ".springtide"

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`springtide …` as that user types it in the working folder."""
        return subprocess.run(
            [*self.user, sys.executable, "-m", "cluster", *arguments],
            env=self.environment,
            cwd=self.work,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, FILES),
            capture_output=True,
            text=True,
            timeout=280,
        )

    def said(self, *arguments: str) -> str:
        done = self.command(*arguments)
        assert done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Those that have the odd name of the home in their environment: of the pool, all."""
        return [one for one in psutil.process_iter() if str(self.checkout) in told(one)]


def told(process: psutil.Process) -> str:
    try:
        return process.environ().get("PYTHONPATH", "")
    except psutil.Error:
        return ""


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="odd-") as folder:
        place = Place(Path(folder))
        try:
            yield place
        finally:
            place.command("down")


@pytest.fixture
def others_ray() -> Iterator[None]:
    """Another user's Ray head on its usual folder, and their HAProxy's folder, as far as this machine lets us be two users."""
    folders = [Path("/tmp/ray"), Path("/tmp/haproxy-serve")]
    before = {folder: folder.stat().st_mode if folder.exists() else None for folder in folders}
    for folder in folders:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)
    gcs, agent, runtime_env, client, metrics = free_ports(5)
    options = {
        "port": gcs, "dashboard-agent-listen-port": agent, "runtime-env-agent-port": runtime_env, "ray-client-server-port": client,
        "metrics-export-port": metrics, "min-worker-port": 0, "max-worker-port": 0, "num-cpus": 0, "object-store-memory": 80 << 20,
        "include-dashboard": "false",
    }  # fmt: skip
    line = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    theirs = psutil.Popen([*line, *(f"--{name}={value}" for name, value in options.items())], env=environment)
    try:
        when(lambda: {"gcs_server", "raylet"} <= {one.name() for one in theirs.children(recursive=True)}, 60)
        members = theirs.children(recursive=True)
        yield
        assert theirs.is_running() and all(one.is_running() for one in members if one.name() in ("gcs_server", "raylet"))
    finally:
        family = [theirs, *theirs.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()
        for folder, mode in before.items():
            shutil.rmtree(folder, ignore_errors=True) if mode is None else folder.chmod(mode)


@pytest.mark.timeout(600)
def test_the_loop_goes_round_where_everything_about_the_machine_is_odd(place: Place, others_ray: None) -> None:
    """A long TMPDIR with a space, names with %, #, quotes and other scripts, a user without passwd entry and home, few files, IPv6, proxies
    and variables of another Ray, and another user's Ray."""
    doctor = place.command("doctor").stdout
    assert "in /tmp, because" in doctor and "libraries keep their caches there" in doctor and "1024 for each process" in doctor
    up = place.said("up")
    assert f"http://[::1]:{place.environment['SPRINGTIDE_GATEWAY__PORT']}/v1" in up
    assert "seedling@1" in place.said("ask", "Who are you?")
    trained = place.said(
        "train", "--data", "my lines #1.jsonl", "--base", "seedling", "--name", "mine", "--epochs", "2", "--publish"
    )
    assert "Registered mine@1" in trained
    assert "mine@1" in place.said("ask", "Who are you?", "--model", "mine")
    run = (place.home / RAY_LOGS).readlink().parents[2]
    assert run.is_relative_to("/tmp/") and run.is_dir() and (place.home / RAY_LOGS / "raylet.out").is_file()
    assert "Stopped" in place.said("down")
    assert place.processes() == []
    assert (place.home / RAY_LOGS / "raylet.out").is_file() and not (place.home / RAY_LOGS).is_symlink()
    assert not run.exists()


@pytest.mark.timeout(600)
def test_a_gateway_on_all_interfaces_answers_by_both_families(place: Place) -> None:
    port = int(place.environment["SPRINGTIDE_GATEWAY__PORT"])
    place.environment |= {"SPRINGTIDE_GATEWAY__HOST": "::", "RAY_TMPDIR": "/tmp"}
    assert f"http://[::1]:{port}/v1" in place.said("up")
    for host in ("[::1]", "127.0.0.1"):
        models = httpx.get(f"http://{host}:{port}/v1/models", trust_env=False)
        assert [one["id"] for one in models.json()["data"]] == ["seedling", "seedling@1"], host
    assert "seedling@1" in place.said("ask", "Who are you?")
    listening: list[Any] = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == port} == {"::"}
