"""A pool on the machine as users have it: what its processes are started with, and what a command says where something is in the way."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import config as configuration
from cluster import machine
from cluster.config import Config
from cluster.pool import folders, local
from cluster.pool.local import ELSEWHERE
from cluster.store.objects import Store
from tests.conftest import ROOT

ODD = "a 木 50%41 #1 'é 😀"
"""A name with what means something in URLs, in YAML, in shells and in HAProxy's configuration."""
NOBODY = 12345
"""A user id without an entry in passwd."""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: Any) -> dict[str, str]:
    """The variables of a shell, which change back. The home is odd."""
    home = tmp_path / ODD
    plain = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SPRINGTIDE_HOME": str(home)}
    monkeypatch.setattr(os, "environ", plain)
    return plain


@pytest.fixture
def config(shell: dict[str, str]) -> Config:
    return configuration.load()


def told(config: Config) -> dict[str, str]:
    folders.home(config)
    return local.ray_environment(config, config.home / "resolved.json", Path("/tmp/tide-x1y2z3w4"))


# variables of the shell


def test_a_new_pool_takes_nothing_that_is_meant_for_another_ray(shell: dict[str, str], config: Config) -> None:
    shell |= dict.fromkeys(ELSEWHERE, "elsewhere") | {"RAY_AUTH_MODE": "disabled", "RAY_backend_log_level": "debug"}
    found = told(config)
    assert not [name for name in ELSEWHERE if name in found]
    assert found["RAY_AUTH_MODE"] == "token" and found["RAY_backend_log_level"] == "debug"
    local.use(config)
    assert not [name for name in ELSEWHERE if name in os.environ]


@pytest.mark.parametrize("given", ["", "localhost, .corp , 10.0.0.0/8", "*", "::1", " "])
def test_the_pool_is_excepted_from_proxies_and_the_users_exceptions_stay(
    given: str, shell: dict[str, str], config: Config
) -> None:
    shell |= {"no_proxy": given, "http_proxy": "http://proxy:3128", "ALL_PROXY": "socks5://proxy"}
    for name in ("no_proxy", "NO_PROXY"):
        hosts = local.environment(config)[name].split(",")
        assert {"127.0.0.1", "::1", "localhost"} <= set(hosts) and "" not in hosts
        assert {one.strip() for one in given.split(",") if one.strip()} <= set(hosts)


def test_ray_keeps_its_files_in_a_folder_of_this_pool(shell: dict[str, str], config: Config) -> None:
    """In /tmp/ray another user's Ray owns what ours would overwrite, and in /tmp/haproxy-serve another user's HAProxy."""
    shell |= {"RAY_TMPDIR": "/elsewhere", "TMPDIR": "/tmp/" + "x" * 90}
    found = told(config)
    assert found["RAY_TMPDIR"] == "/tmp/tide-x1y2z3w4" and found["TMPDIR"] == "/tmp"
    named = [name for name in found if name.startswith("RAY_SERVE_HAPROXY_") and name != "RAY_SERVE_HAPROXY_BINARY_PATH"]
    paths = [found[name] for name in named if found[name].startswith("/")]
    assert len(paths) >= 5 and all(path.startswith("/tmp/tide-x1y2z3w4") for path in paths)


def test_an_account_without_name_and_home_gets_both(shell: dict[str, str], config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "user", lambda: "uid-12345")
    shell["HOME"] = "/nonexistent"
    found = told(config)
    assert found["LOGNAME"] == "uid-12345"
    assert Path(found["HOME"]).is_dir() and Path(found["HOME"]).is_relative_to(config.home)
    del shell["HOME"]
    assert Path(told(config)["HOME"]).is_dir()


def test_haproxy_starts_where_few_files_may_be_open(config: Config, monkeypatch: Any) -> None:
    """It ended where it could not have two for each of 4,096 clients."""
    monkeypatch.setattr(machine, "open_files", lambda: 1024)
    assert int(told(config)["RAY_SERVE_HAPROXY_MAXCONN"]) * 2.5 < 1024


# paths


def test_a_home_of_any_name_is_found_again(config: Config, tmp_path: Path) -> None:
    """YAML cannot read what JSON writes for a letter beyond the first 65,536, and took a # in SPRINGTIDE_HOME for a comment."""
    assert config.home == tmp_path / ODD
    resolved = local.remember(config)
    assert local.remembered(config).dump() == config.dump()
    assert yaml.safe_load(resolved.read_text("utf-8"))["home"] == str(config.home)
    os.environ["SPRINGTIDE_CONFIG"] = str(resolved)
    assert configuration.load().store == config.store


def test_a_store_of_any_name_is_a_folder_of_that_name(config: Config, tmp_path: Path) -> None:
    store = Store(config.store)
    store.put_new("a/b", b"x")
    assert (tmp_path / ODD / "store" / "a" / "b").read_bytes() == b"x"
    assert store.local_root == tmp_path / ODD / "store" and store.children("a") == ["b"]


def test_rays_logs_are_in_the_home_while_it_runs_and_after(config: Config, tmp_path: Path) -> None:
    folders.home(config)
    for word in ("first", "second"):
        run = tmp_path / word
        logs = run / "ray" / "session_1" / "logs"
        logs.mkdir(parents=True)
        (run / "ray" / "session_latest").symlink_to(run / "ray" / "session_1")
        folders.show_logs(config, run)
        (logs / "raylet.out").write_text(word)
        assert (config.home / folders.RAY_LOGS / "raylet.out").read_text() == word
        folders.keep_logs(config, run)
        assert (config.home / folders.RAY_LOGS / "raylet.out").read_text() == word and not run.exists()


def test_a_pool_that_never_had_logs_ends_too(config: Config, tmp_path: Path) -> None:
    folders.home(config)
    folders.show_logs(config, tmp_path / "run")
    folders.keep_logs(config, tmp_path / "run")


# addresses


def test_addresses_of_ipv6_are_in_brackets_where_a_port_follows(shell: dict[str, str]) -> None:
    config = configuration.load(overrides={"pool": {"host": "[fd00::2]"}, "gateway": {"host": "::"}})
    assert local.address(config) == f"[fd00::2]:{config.pool.gcs_port}"
    assert local.dashboard(config) == f"http://[fd00::2]:{config.pool.dashboard_port}"
    assert local.gateway(config) == f"http://[::1]:{config.gateway.port}"
    assert "--node-ip-address=fd00::2" in local.ray_command(config)


# clocks


def test_a_pool_is_found_after_the_machines_clock_was_set(monkeypatch: Any) -> None:
    pool = local.Pool(os.getpid(), psutil.Process().create_time(), "a", "d", started_ticks=machine.start_ticks(os.getpid()))
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
    assert pool.alive
    assert not local.Pool(os.getpid(), 0.0, "a", "d", started_ticks=pool.started_ticks + 1).alive


# other users: real processes


def test_too_few_files_are_named_by_the_command_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "up"],
        cwd=ROOT,
        env={**os.environ, "SPRINGTIDE_HOME": str(tmp_path), "COLUMNS": "200"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "A process may open only 512 files here, and the pool needs 1024. Raise the hard limit: `ulimit -Hn 65536`" in said(
        done
    )


def as_nobody(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`springtide …` by a user without a name and a home."""
    needs = "needs root, setpriv, and a checkout that others may read"
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    plain = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        probe = subprocess.run([*user, sys.executable, "-c", "import cluster.cli.app"], env=plain, capture_output=True, cwd="/")
    except FileNotFoundError:
        pytest.skip(needs)
    if probe.returncode != 0:
        pytest.skip(f"{needs}: {probe.stderr.decode()[-200:]}")
    return subprocess.run(
        [*user, sys.executable, "-m", "cluster", *arguments], env=plain | environment, cwd=cwd, capture_output=True, text=True
    )


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """What a command has printed, without line breaks."""
    words = " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in words, words
    return words


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can reach and not write to. They cannot reach pytest's own."""
    with tempfile.TemporaryDirectory(prefix="springtide-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_where_this_user_may_not_write_is_named(shared: Path) -> None:
    done = as_nobody("up", cwd=shared)
    assert done.returncode == 2
    assert "cannot be used: Permission denied" in said(done) and "SPRINGTIDE_HOME=/PATH" in said(done)


def test_another_users_pool_is_theirs(shared: Path) -> None:
    home = shared / ".springtide"
    home.mkdir(mode=0o755)
    local.write_json(home / "pool.json", {"pid": 1})
    for command in ("status", "up", "down", "doctor"):
        done = as_nobody(command, cwd=shared)
        assert done.returncode in (1, 2), command
        assert "another user's" in said(done) and "springtide env --client" in said(done), (command, said(done))


def test_commands_work_for_a_user_without_a_name_and_a_home(shared: Path) -> None:
    mine = shared / "mine"
    mine.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    config = as_nobody("config", cwd=mine)
    assert config.returncode == 0 and f"{mine}/.springtide" in config.stdout
    for home in (
        {},
        {"HOME": ""},
        {"HOME": "/nonexistent"},
        {"HOME": "/"},
    ):  # the last is there, and not for this user to write to
        assert "libraries keep their caches there too, as HOME is no folder to write to" in said(
            as_nobody("doctor", cwd=mine, **home)
        )
    status = as_nobody("status", cwd=mine)
    assert status.returncode == 2 and "springtide up" in said(status)
    refused = as_nobody("config", cwd=mine, SPRINGTIDE_HOME="~/springtide")
    assert refused.returncode == 2 and "cannot be expanded" in said(refused)
