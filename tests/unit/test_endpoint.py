"""The address of a pool: who names it, which key goes there, and that no configuration is read from it."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import config as configuration
from cluster import endpoint
from cluster.config import Config
from cluster.errors import BadRequest, PoolUnavailable
from cluster.pool import local

ELSEWHERE = "http://10.0.0.1:9"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: Any) -> Config:
    """A home, and an environment that changes back: finding a pool sets Ray's variables."""
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"SPRINGTIDE_HOME": str(tmp_path), "RAY_AUTH_TOKEN": "another Ray's"})
    for key in ("SPRINGTIDE_POOL", "SPRINGTIDE_API_KEY"):
        os.environ.pop(key, None)
    return configuration.load()


def running(config: Config, **changes: Any) -> None:
    """The file of a pool whose supervisor is this process."""
    began_s = psutil.Process().create_time()
    values = {"pid": os.getpid(), "created_s": began_s, "address": "a", "dashboard": "http://127.0.0.1:8265"}
    (config.home / "pool.json").write_text(json.dumps(values | {"gateway": "http://127.0.0.1:8123", "token": "ours"} | changes))


def test_an_option_wins_over_a_variable_and_a_variable_over_the_pool_of_this_home(config: Config) -> None:
    running(config)
    os.environ["SPRINGTIDE_POOL"] = f"{ELSEWHERE}/"
    assert endpoint.find("http://[::1]:80/v1/").url == "http://[::1]:80"
    assert endpoint.find().url == ELSEWHERE
    del os.environ["SPRINGTIDE_POOL"]
    assert endpoint.find() == ("http://127.0.0.1:8123", "ours")


def test_the_key_of_this_homes_pool_never_goes_to_another_address(config: Config) -> None:
    running(config)
    assert endpoint.find(ELSEWHERE) == (ELSEWHERE, "")
    os.environ["SPRINGTIDE_API_KEY"] = "theirs"
    assert endpoint.find(ELSEWHERE) == (ELSEWHERE, "theirs")
    assert endpoint.find().key == "ours"
    assert "theirs" not in repr(endpoint.find(ELSEWHERE))


def test_a_pool_is_its_own_whatever_the_shell_says_of_another_ray(config: Config) -> None:
    """`RAY_AUTH_TOKEN` of the shell was sent to the own pool, which refused it; `RAY_API_SERVER_ADDRESS` took the commands elsewhere."""
    os.environ |= {"RAY_API_SERVER_ADDRESS": ELSEWHERE, "no_proxy": "elsewhere"}
    running(config)
    assert endpoint.of(config).key == "ours" == local.token()
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8265"
    assert "127.0.0.1" in os.environ["no_proxy"].split(",")


def test_the_address_of_a_pool_is_no_configuration(config: Config) -> None:
    """`SPRINGTIDE_POOL=URL` was read as the section `pool`, and every command refused it."""
    os.environ |= {"SPRINGTIDE_POOL": ELSEWHERE, "SPRINGTIDE_API_KEY": "key", "SPRINGTIDE_POOL__SLOTS": "7"}
    assert configuration.load().pool.slots == 7


def test_without_a_pool_the_command_says_where_it_looked(config: Config) -> None:
    with pytest.raises(PoolUnavailable, match=str(config.home)):
        endpoint.find()
    running(config, created_s=1.0)  # another process has its number now
    with pytest.raises(PoolUnavailable, match=str(config.home)):
        endpoint.find()


@pytest.mark.parametrize(
    "url", ["pool", "ftp://host", "http://", "http://host:port", "http://host:0", "http://host/?x=1", "http://[", "//x"]
)
def test_what_is_no_url_of_a_gateway_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="URL of a gateway"):
        endpoint.checked(url)


def test_a_file_of_another_release_is_read(config: Config) -> None:
    began_s = psutil.Process().create_time()
    older = {"pid": os.getpid(), "created_s": began_s, "address": "a", "dashboard": "d"}
    (config.home / "pool.json").write_text(json.dumps(older))
    assert endpoint.find() == (f"http://127.0.0.1:{config.gateway.port}", "another Ray's")
    running(config, colour="blue")
    assert endpoint.find().key == "ours"


def test_a_file_is_replaced_as_a_whole_and_is_its_owners(tmp_path: Path) -> None:
    """A command that came while `springtide up` wrote pool.json found half of it, and ended with a traceback."""
    path, written = tmp_path / "pool.json", threading.Event()

    def write() -> None:
        for turn in range(200):
            local.write_json(path, {"turn": turn, "padding": "x" * 100_000})
        written.set()

    local.write_json(path, {"turn": -1, "padding": ""})
    threading.Thread(target=write).start()
    while not written.is_set():
        assert set(json.loads(path.read_text())) == {"turn", "padding"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["pool.json"]
