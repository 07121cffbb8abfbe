"""Slots as people and Prometheus see it, on the real pool."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import httpx

from cluster import client
from cluster.capacity.handover import parse
from cluster.metrics import FLEET_SLOTS, LEASE, SLOTS, WANTED
from cluster.pool.local import bearer, metrics_port
from tests.conftest import ROOT, Running

LINE = [sys.executable, "-m", "cluster", "status", "--watch", "--minutes", "1"]


def environment(pool: Running) -> dict[str, str]:
    return {**os.environ, "SPRINGTIDE_HOME": str(pool.config.home), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}


def heed() -> None:
    """In the command: Ctrl-C counts, also where whoever started the tests put them into the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read(terminal: int, until: str, timeout_s: float) -> str:
    """What arrives until ``until`` has, or the other side has closed."""
    text, ends_s = b"", time.monotonic() + timeout_s
    while until.encode() not in text and time.monotonic() < ends_s:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            text += os.read(terminal, 65536)
        except OSError:  # closed
            break
    return text.decode(errors="replace")


def test_slots_are_told_to_whoever_has_the_token(pool: Running) -> None:
    told = client.of(pool.config).slots()
    last = parse(told["snapshots"])[-1]
    assert last.slots == told["slots"]["total"] == pool.config.pool.slots
    assert last.serving >= 1 and told["allocation"]["grants"]["serving"] >= 1
    assert client.of(pool.config).slots(last.at_s + 3600)["snapshots"] == []
    url = f"{pool.url}/admin/slots"
    assert httpx.get(url).status_code == 401
    assert httpx.get(f"{url}?since_s=soon", headers=bearer()).status_code == 400


def test_watching_into_a_file_writes_lines_and_ends_on_an_interrupt(pool: Running) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        LINE, preexec_fn=heed, env=environment(pool), cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    ) as watching:
        assert watching.stdout is not None
        first = watching.stdout.readline()
        time.sleep(3)
        watching.send_signal(signal.SIGINT)
        _, trouble = watching.communicate(timeout=20)
    assert re.fullmatch(r"\d\d:\d\d:\d\d serving holds \d of \d.*slots idle\n", first), first
    assert (watching.returncode, trouble) == (0, "")


def test_watching_in_a_terminal_draws_and_gives_the_screen_back(pool: Running) -> None:
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        LINE, preexec_fn=heed, env=environment(pool), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        drawn = read(ours, "now", 60)
        again = read(ours, "now", 10)
        watching.send_signal(signal.SIGINT)
        left = read(ours, "\x1b[?1049l", 10) + read(ours, "now", 10)
        assert watching.wait(20) == 0
    finally:
        watching.kill()
        os.close(ours)
    assert "serving" in drawn and "█" in drawn and "█" in again
    assert "\x1b[?1049h" in drawn and "\x1b[?1049l" in left and "Traceback" not in left


def test_prometheus_finds_the_slots_where_it_is_promised(pool: Running) -> None:
    url, ends_s = f"http://{pool.config.pool.host}:{metrics_port(pool.config)}/metrics", time.monotonic() + 40
    while (LEASE.name, "") not in (found := levels(httpx.get(url, timeout=10).text)):
        assert time.monotonic() < ends_s, found  # processes report to the agent every 10 s
        time.sleep(1)
    by_owner = {owner: found[SLOTS.name, owner] for owner in ("serving", "training", "idle")}
    assert by_owner["serving"] >= 1 and sum(by_owner.values()) == pool.config.pool.slots
    assert found[WANTED.name, ""] >= 1
    assert found[FLEET_SLOTS.name, "grant"] >= 1 and found[FLEET_SLOTS.name, "lacking"] == 0


def levels(text: str) -> dict[tuple[str, str], float]:
    """(metric, owner or part) → value."""
    lines = re.findall(r"^ray_(springtide_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    owners = [re.search(r'\b(?:owner|part)="(\w+)"', tags) for _, tags, _ in lines]
    return {(name, owner.group(1) if owner else ""): float(n) for (name, _, n), owner in zip(lines, owners, strict=True)}


def test_ray_names_the_same_address_to_prometheus(pool: Running) -> None:
    found = httpx.get(f"{pool.pool.dashboard}/api/prometheus/sd", headers=bearer(), timeout=10)
    assert found.status_code == 200, found.text
    assert f"{pool.config.pool.host}:{metrics_port(pool.config)}" in found.text
