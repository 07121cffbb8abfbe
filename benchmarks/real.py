"""Real models from the package index in a temporary home: SmolLM2-135M-Instruct chats and calls tools, all-MiniLM-L6-v2 makes vectors."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import HOST
from cluster import config as configuration
from cluster.config import Config
from cluster.store import imports
from cluster.store.objects import Store
from cluster.store.registry import Registry

CHAT, ENCODER = "smollm2", "minilm"
TEMPLATE = Path(__file__).with_name("tools.jinja")
"""The chat model's own template with the tools in it: its own shows it none."""
PORT = 8200
"""And the next one, for the second of two servers."""
SETTINGS: dict[str, Any] = {
    "pool": {"gcs_port": 6599, "dashboard_port": 8465, "agent_ports": 30500, "slots": 2},
    "gateway": {"host": HOST, "port": PORT, "replicas": 1},
    "fleet": {"min_replicas": 1, "max_replicas": 1},
    "fleets": {
        CHAT: {"engine": {"tool_call_parser": "hermes", "chat_template": str(TEMPLATE)}},
        ENCODER: {"task": "embed"},
    },
}


@contextmanager
def real_models() -> Iterator[tuple[Config, dict[str, Path]]]:
    """The configuration of a pool with a fleet for each of the two models, whose store has them; and each model's folder."""
    with tempfile.TemporaryDirectory(prefix="springtide-real-") as home:
        place = {"home": home, "store": f"{home}/store"}
        config = configuration.load("laptop", overrides={**SETTINGS, **place})
        registry = Registry(Store(config.store))
        yield config, {name: _put(registry, name, config) for name in config.fleets}


def _put(registry: Registry, name: str, config: Config) -> Path:
    made = imports.add(registry, imports.find(name, print), config.home / "imports", lambda words: None)
    registry.move(name, made, "to be asked", "bench", after=0)
    return registry.fetch(registry.manifest(made), config.home / "cache")
