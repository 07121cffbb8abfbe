"""One real pool for the whole session: real Ray, real Serve, real vLLM, the real seedling. Tests that need it ask for `pool`."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from cluster import config as configuration
from cluster.config import Config
from cluster.pool import graph
from cluster.pool import local as pools
from cluster.store.objects import Store
from cluster.store.registry import Registry

settings.register_profile("noisy machines", deadline=None)
settings.load_profile("noisy machines")

SHARED = Path(__file__).parents[2] / "shared"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Running:
    """A pool that serves the seedling, version 1 live."""

    config: Config
    registry: Registry
    pool: pools.Pool

    @property
    def url(self) -> str:
        return f"http://{self.config.gateway.host}:{self.config.gateway.port}"

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`springtide …` on this pool, as a user types it."""
        environment = {**os.environ, "SPRINGTIDE_HOME": str(self.config.home), "COLUMNS": "200"}
        line = [sys.executable, "-m", "cluster", *arguments]
        return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The laptop preset on free ports and in a folder of its own."""
    gcs, dashboard, gateway = free_ports(3)
    home = tmp_path_factory.mktemp("home")
    return configuration.load(
        overrides={
            "home": str(home),
            "pool": {"gcs_port": gcs, "dashboard_port": dashboard, "agent_ports": 21000 + os.getpid() % 50 * 100, "slots": 3},
            "gateway": {"port": gateway, "max_held": 24},
            "training": {"budget": {"cool_down_s": 2}},
        }
    )


@pytest.fixture(scope="session")
def pool(config: Config) -> Iterator[Running]:
    pool = pools.up(config)
    registry = Registry(Store(config.store))
    try:
        pretrain(config)
        graph.deploy(config)
        yield Running(config, registry, pool)
    finally:
        pools.down(config)


def pretrain(config: Config) -> None:
    from cluster.pool import submit

    for _ in submit.follow(config, submit.start(config, "pretrain", name=config.default_model)):
        pass
