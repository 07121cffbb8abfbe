"""P11, P2, P3 and the history under killed processes: whatever dies and whenever, versions are fully old or fully new."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import client
from cluster.errors import SpringtideError, VersionRefused
from cluster.pool import graph, local
from cluster.pool.serve_api import ServeApi
from cluster.publishing.canary import takes_canary
from cluster.publishing.rollout import DIRECT, Policy
from cluster.store.fleets import FleetRecords
from cluster.types import Lineage, Manifest
from tests.adapters import make_smaller, make_weights
from tests.cluster.test_autoscaling import engines
from tests.cluster.test_fleets import phases
from tests.cluster.test_publish import ONE, adapter, ask, cores, doubled, named, wait_until
from tests.cluster.test_rollout import ANY
from tests.conftest import ROOT, Running
from tests.history import expected_of, problems, recording

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
STEPS = Policy(steps=(50, 100), min_requests=5, min_step_s=0.5, gate=False, margins=ANY)


@pytest.fixture(autouse=True)
def as_it_was(pool: Running) -> Iterator[None]:
    """Each test starts from one replica with the first version, whatever became of the one before."""
    yield
    wait_until(lambda: ready(pool), timeout_s=150)
    now = pool.registry.rollout("seedling")
    if now is not None and now.stage in ("registered", "warming", "canary"):
        client.of(pool.config).step("abort", "seedling", "the test is over")
    back_to_one(pool)
    graph.deploy(pool.config)
    wait_until(lambda: [r["base"] for r in client.of(pool.config).status()["replicas"]] == [str(ONE)], timeout_s=150)
    wait_until(lambda: client.of(pool.config).status()["slots"]["free"] >= 2, timeout_s=90)


@pytest.fixture(scope="module")
def crashing(pool: Running) -> Iterator[Path]:
    """The pool with a control that dies where ``crash.json`` says; yields the pool's home."""
    home = pool.config.home
    environment = {**os.environ, "SPRINGTIDE_HOME": str(home)}
    subprocess.run([sys.executable, "-m", "tests.crashing"], cwd=ROOT, env=environment, check=True, timeout=120)
    wait_until(lambda: ready(pool), timeout_s=60)
    yield home
    (home / "crash.json").unlink(missing_ok=True)


def ready(pool: Running) -> bool:
    try:
        return len(client.of(pool.config).status()["replicas"]) > 0
    except SpringtideError:
        return False


def wait_for_end(pool: Running, made: Manifest) -> str:
    """Wait until the rollout has ended by itself; the stage it ended in."""
    wait_until(lambda: (now := pool.registry.rollout("seedling")) is None or now.stage in ("live", "rolled_back"), timeout_s=120)
    now = pool.registry.rollout("seedling")
    assert now is not None
    live = (
        made.id if (now.version, now.stage) == (made.id, "live") else now.incumbent if now.stage == "rolled_back" else now.version
    )
    wait_until(lambda: ask(pool).headers.get("x-model-version") == str(live), timeout_s=60)
    return now.stage


def back_to_one(pool: Running) -> None:
    wait_until(lambda: ready(pool), timeout_s=60)
    if pool.registry.aliases()["seedling"].stable != ONE:
        client.of(pool.config).rollback("seedling", ONE, "again from the start")


def crash_points(pool: Running, home: Path, made: Manifest) -> int:
    """How many acts a whole rollout of ``made`` takes, from a run in which nothing dies."""
    (home / "acts.log").unlink(missing_ok=True)
    (home / "crash.json").write_text(json.dumps({"run": f"count {made.id}", "at": 0}))
    with recording(pool.url, "seedling", 6, pause_s=0.1):
        client.of(pool.config).publish(made.id, "seedling", "undisturbed", policy_of(made))
        assert wait_for_end(pool, made) == "live"
    (home / "crash.json").unlink()
    acts = (home / "acts.log").read_text().splitlines()
    print("\n".join(acts))
    back_to_one(pool)
    return len(acts)


@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_control_killed_before_every_act_of_a_rollout(pool: Running, crashing: Path, tmp_path: Path, kind: str) -> None:
    make = adapter_of_its_own if kind == "adapter" else other_weights
    count = crash_points(pool, crashing, make(pool, tmp_path, 400))
    assert count > 8
    expected, plan, at = expected_of(pool.url, [str(ONE)]), crashing / "crash.json", 0
    with recording(pool.url, "seedling", 6, pause_s=0.1) as events:
        for at in range(1, count + 1):
            back_to_one(pool)
            made = make(pool, tmp_path, 400 + at)  # a new one each time: what is held already takes fewer acts
            began_s = time.monotonic()
            plan.write_text(json.dumps({"run": f"{made.id} {at}", "at": at}))
            with contextlib.suppress(SpringtideError):  # its answer dies with it; the rollout goes on, or never began
                client.of(pool.config).publish(made.id, "seedling", f"dies before act {at}", policy_of(made))
            wait_until(lambda: ready(pool), timeout_s=60)
            stage = wait_for_end(pool, made)
            died = not plan.exists()
            plan.unlink(missing_ok=True)
            what = f"died before act {at} of {count}" if died else "lived"
            print(f"{kind}: {what}: {stage} after {time.monotonic() - began_s:.1f} s")
            if pool.registry.aliases()["seedling"].stable == made.id:  # killed before the first record, it never began
                expected |= expected_of(pool.url, [str(made.id)])
            if not died:  # it took fewer acts than the first: a canary that has its requests sooner is asked about less often
                break
        back_to_one(pool)
    assert at > 8
    assert problems(events, expected) == []


def test_control_killed_before_every_act_of_an_abort(pool: Running, crashing: Path, tmp_path: Path) -> None:
    """The way back is enumerated too. An order that died before its first record is given again, as its caller was told."""
    made, expected = adapter(pool, tmp_path, seed=480), expected_of(pool.url, [str(ONE)])
    half = Policy(steps=(50, 100), min_requests=10_000, gate=False, margins=ANY)
    plan, died, at = crashing / "crash.json", True, 0
    with recording(pool.url, "seedling", 6, pause_s=0.1) as events:
        while died:
            at += 1
            assert client.of(pool.config).publish(made.id, "seedling", f"aborted, dies before act {at}", half).stage == "canary"
            plan.write_text(json.dumps({"run": f"abort {at}", "at": at}))
            began_s = time.monotonic()
            abort(pool)
            wait_until(lambda: where(pool) == "rolled_back 0", timeout_s=30)
            wait_until(lambda: ask(pool).headers.get("x-model-version") == str(ONE), timeout_s=30)
            died = (
                not plan.exists()
            )  # an abort takes four or five acts: gateways are told once more where a replica reports meanwhile
            plan.unlink(missing_ok=True)
            print(f"abort: {f'died before act {at}' if died else 'lived'}: back after {time.monotonic() - began_s:.1f} s")
    assert at > 4
    assert problems(events, expected | expected_of(pool.url, [str(made.id)])) == []


def abort(pool: Running) -> None:
    with contextlib.suppress(SpringtideError):
        client.of(pool.config).step("abort", "seedling", "not good")
    wait_until(lambda: ready(pool), timeout_s=60)
    if where(pool).startswith("canary"):
        with contextlib.suppress(SpringtideError):  # it has just happened
            client.of(pool.config).step("abort", "seedling", "not good, said again")


def test_control_killed_before_every_act_of_a_fleets_removal(pool: Running, crashing: Path) -> None:
    """Killed after the fleet's end was recorded, it used to forget the application, which kept its slot for ever."""
    operator, records, acts = client.of(pool.config), FleetRecords(pool.registry.store), 2
    with recording(pool.url, "seedling", 6, pause_s=0.1) as events:
        for at in range(100):
            if at > acts:
                break
            before = len(engines(pool))
            operator.add_fleet("extra", {"model": str(ONE), "min_replicas": 1, "max_replicas": 1})
            wait_until(lambda: phases(pool).get("extra") == "serving", timeout_s=150)
            (crashing / "acts.log").unlink(missing_ok=True)
            (crashing / "crash.json").write_text(json.dumps({"run": f"removal {at}", "at": at}))
            began_s = time.monotonic()
            remove(pool, "extra")
            if at == 2:  # nobody had asked Serve for anything
                wait_until(lambda: phases(pool).get("extra") == "draining", timeout_s=30)
                with pytest.raises(SpringtideError, match="already, and it drains"):
                    operator.add_fleet("extra", {"model": str(ONE)})
            wait_until(lambda: gone(pool), timeout_s=60)
            wait_until(lambda: operator.status()["slots"]["free"] == 2, timeout_s=30)
            wait_until(lambda: len(engines(pool)) <= before, timeout_s=30)  # noqa: B023 (called at once)
            acts = len((crashing / "acts.log").read_text().splitlines()) if at == 0 else acts
            assert at > 2 or (crashing / "crash.json").exists() == (at == 0), "it did die"
            (crashing / "crash.json").unlink(missing_ok=True)
            newest = records.newest("extra")
            assert newest is not None and newest.ended
            print(f"removal: died before act {at} of {acts}: gone after {time.monotonic() - began_s:.1f} s")
    assert problems(events, expected_of(pool.url, [str(ONE)])) == []


def remove(pool: Running, fleet: str) -> None:
    with contextlib.suppress(SpringtideError):
        client.of(pool.config).remove_fleet(fleet, force=False)
    wait_until(lambda: ready(pool), timeout_s=60)
    newest = FleetRecords(pool.registry.store).newest(fleet)
    if newest is not None and not newest.ended:  # it died before it had written anything, and whoever asked was told
        client.of(pool.config).remove_fleet(fleet, force=False)


def gone(pool: Running) -> bool:
    """Whether the fleet has left Serve and control; not known while control has just died."""
    with contextlib.suppress(SpringtideError):
        return "fleet-extra" not in served(pool) and phases(pool) == {"seedling": "serving"}
    return False


def served(pool: Running) -> set[str]:
    """Serve's applications, in its own words."""
    return set(ServeApi(pool.pool.dashboard, local.bearer()).applications())


def policy_of(made: Manifest) -> Policy:
    """Adapters by steps; weights at once and in place, since a canary of theirs would start a second fleet each time."""
    return STEPS if made.kind == "adapter" else DIRECT


def adapter_of_its_own(pool: Running, tmp_path: Path, seed: int) -> Manifest:
    return adapter(pool, tmp_path, seed=seed)


def other_weights(pool: Running, tmp_path: Path, seed: int) -> Manifest:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    return pool.registry.register("seedling", "weights", None, make_weights(tmp_path / f"w{seed}", base, seed, 0.02), Lineage())


def test_replicas_killed_added_and_removed_under_publishes(pool: Running, tmp_path: Path) -> None:
    """Only streams that a killed process was answering end early, each with an error event; nothing else fails, nothing is mixed."""
    made = [adapter(pool, tmp_path, seed=seed) for seed in (42, 43)]
    graph.deploy(doubled(pool.config))
    wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 2, timeout_s=150)
    killed_s: list[float] = []
    with recording(pool.url, "seedling", 8, pause_s=0.1) as events:
        for turn, victim in enumerate(("replica", "engine core")):
            client.of(pool.config).publish(made[turn].id, "seedling", f"before {victim} dies", STEPS)
            before = ids(pool)
            (replicas(pool) if victim == "replica" else cores(pool))[0].kill()
            killed_s.append(time.monotonic())
            wait_until(lambda: two_others(ids(pool), before), timeout_s=150)  # noqa: B023 (called at once)
            wait_for_end(pool, made[turn])
        graph.deploy(pool.config)
        wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 1, timeout_s=150)
        time.sleep(1)
    expected = expected_of(pool.url, [str(ONE), *(str(one.id) for one in made)])
    lost = [event for event in events if event.error]
    assert all(any(event.start_s <= at_s + 2 and event.end_s >= at_s - 0.5 for at_s in killed_s) for event in lost), lost
    assert all("replica_lost" in event.error or "no_replica" in event.error for event in lost), lost
    print(f"{len(events)} requests, {len(lost)} ended with an error event when their replica was killed")
    assert problems([event for event in events if not event.error], expected) == []
    back_to_one(pool)


def a_canary_of_weights_takes_its_share_of_the_replicas(pool: Running, made: Manifest) -> None:
    with recording(pool.url, "seedling", 8, pause_s=0.1) as events:
        half = Policy(steps=(50, 100), min_requests=10_000, gate=False, margins=ANY)
        expected = expected_of(pool.url, [str(ONE)])
        assert client.of(pool.config).publish(made.id, "seedling", "half of it", half).stage == "canary"
        wait_until(lambda: {e.version for e in events[-16:]} == {str(ONE), str(made.id)}, timeout_s=30)
        assert sorted(r["base"] for r in client.of(pool.config).status()["replicas"]) == sorted([str(ONE), str(made.id)])
        assert client.of(pool.config).step("promote", "seedling", "test").stage == "live"
        time.sleep(0.5)
    assert {r["base"] for r in client.of(pool.config).status()["replicas"]} == {str(made.id)}
    assert problems(events, expected | expected_of(pool.url, [str(made.id)])) == []


def replicas(pool: Running) -> list[psutil.Process]:
    return [process for process in named(pool, "ray::ServeRepli") if "Gateway" not in "".join(process.cmdline())]


def two_others(now: set[str], before: set[str]) -> bool:
    """One look, not two: between them the dead replica is forgotten, and one is left."""
    return len(now) == 2 and now != before


def ids(pool: Running) -> set[str]:
    return {replica["id"] for replica in client.of(pool.config).status()["replicas"]}


def test_a_late_replica_has_the_same_bits_as_one_that_was_swapped(pool: Running, tmp_path: Path) -> None:
    """P3 for weights: what was loaded in place is what a fresh engine loads."""
    made = other_weights(pool, tmp_path, 44)
    client.of(pool.config).publish(made.id, "seedling", "before the second replica")
    graph.deploy(doubled(pool.config))
    wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 2, timeout_s=150)
    replicas = client.of(pool.config).status()["replicas"]
    assert {replica["base"] for replica in replicas} == {str(made.id)}
    assert len({replica["fingerprint"] for replica in replicas}) == 1
    back_to_one(pool)
    wait_until(lambda: {r["base"] for r in client.of(pool.config).status()["replicas"]} == {str(ONE)}, timeout_s=30)
    a_canary_of_weights_takes_its_share_of_the_replicas(pool, made)
    back_to_one(pool)
    wait_until(lambda: {r["base"] for r in client.of(pool.config).status()["replicas"]} == {str(ONE)}, timeout_s=30)
    graph.deploy(pool.config)
    wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 1, timeout_s=150)


def test_a_replica_killed_while_it_takes_weights_over_comes_back_with_the_live_ones(pool: Running, tmp_path: Path) -> None:
    """P2: between "half loaded" and "committed" nothing was served; the new process starts with what the store says."""
    made = other_weights(pool, tmp_path, 45)
    publishing, expected = threading.Thread(target=lambda: attempt(pool, made)), expected_of(pool.url, [str(ONE)])
    with recording(pool.url, "seedling", 4, pause_s=0.05) as events:
        time.sleep(1)
        publishing.start()
        (replica,) = replicas(pool)
        while (now := pool.registry.rollout("seedling")) is None or now.version != made.id or now.percent != 100:
            assert publishing.is_alive(), f"it swaps for a tenth of a second, and nobody saw it: {now}"
        replica.kill()
        wait_until(lambda: ask(pool).status_code == 200, timeout_s=150)
        publishing.join()
        wait_for_end(pool, made)
    seen = {event.version for event in events if not event.error}
    assert seen <= {str(ONE), str(made.id)}
    expected |= expected_of(pool.url, [str(made.id)])
    assert problems([event for event in events if not event.error], expected) == []
    (state,) = client.of(pool.config).status()["replicas"]
    assert state["base"] == str(made.id)
    back_to_one(pool)


def attempt(pool: Running, made: Manifest) -> None:
    with contextlib.suppress(SpringtideError):
        client.of(pool.config).publish(made.id, "seedling", "its replica dies")


def test_control_killed_while_a_second_fleet_takes_over(pool: Running, tmp_path: Path) -> None:
    """P11 for another shape: killed while its fleet starts, while the canary runs and while the fleet's own replica changes engines."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_smaller(tmp_path / "smaller", base), Lineage())
    (before,), expected = client.of(pool.config).status()["replicas"], expected_of(pool.url, [str(ONE)])
    with recording(pool.url, "seedling", 6, pause_s=0.1) as events:
        began_s = time.monotonic()
        client.of(pool.config).publish(made.id, "seedling", "another shape", STEPS)
        wait_until(lambda: len(replicas(pool)) == 2, timeout_s=60)
        for reached in ("warming 0", "canary 50", "canary 100"):
            wait_until(lambda: where(pool) == reached, timeout_s=150)  # noqa: B023 (called at once)
            kill_control(pool)
        wait_until(lambda: where(pool) == "live 0", timeout_s=150)
        wait_until(lambda: len(ids(pool)) == 1, timeout_s=60)
        print(f"another shape, control killed three times: live and alone again after {time.monotonic() - began_s:.0f} s")
    (after,) = client.of(pool.config).status()["replicas"]
    assert (after["id"], after["base"]) == (before["id"], str(made.id))
    assert problems(events, expected | expected_of(pool.url, [str(made.id)])) == []
    longest_s = max(event.end_s - event.start_s for event in events)
    assert longest_s < 8, "nobody waited for an engine: control found the second fleet again"
    print(f"{len(events)} requests, the longest took {longest_s:.1f} s")
    back_to_one(pool)
    wait_until(lambda: where(pool) == "live 0" and len(ids(pool)) == 1, timeout_s=150)


def where(pool: Running) -> str:
    now = pool.registry.rollout("seedling")
    return f"{now.stage} {now.percent}" if now else ""


def kill_control(pool: Running) -> None:
    for control in [*named(pool, "ray::Control"), *named(pool, "ray::Crashing")]:
        control.kill()
    wait_until(lambda: ready(pool), timeout_s=60)


def test_a_shape_that_no_engine_can_start_leaves_everything_as_it_was(pool: Running, tmp_path: Path) -> None:
    """P1b for another shape: its own replicas do not start, the rollout ends with their words, and nobody else notices."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_smaller(tmp_path / "broken", base)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": settings["intermediate_size"] + 8}))
    made = pool.registry.register("seedling", "weights", None, folder, Lineage())
    with recording(pool.url, "seedling", 4, pause_s=0.2) as events:
        began_s = time.monotonic()
        client.of(pool.config).publish(made.id, "seedling", "no engine can start it", STEPS)
        wait_until(lambda: where(pool) == "rolled_back 0", timeout_s=200)
        print(f"given up after {time.monotonic() - began_s:.0f} s")
    now = pool.registry.rollout("seedling")
    assert now is not None and "did not start" in now.reason, now
    assert problems(events, expected_of(pool.url, [str(ONE)])) == []
    wait_until(lambda: client.of(pool.config).status()["slots"]["free"] >= 1, timeout_s=90)


def test_a_canary_of_weights_on_one_replica_and_a_swap_that_fails_afterwards(pool: Running, tmp_path: Path) -> None:
    """P1b: a second fleet hosts the canary. Then the file is damaged before the fleet's own replica reads it: the rollout ends with that
    replica's words, and everybody is back at the old version, in the same process."""
    made, expected = other_weights(pool, tmp_path, 46), expected_of(pool.url, [str(ONE)])
    (before,) = client.of(pool.config).status()["replicas"]
    half = Policy(steps=(50, 100), min_requests=10_000, gate=False, margins=ANY)
    with recording(pool.url, "seedling", 8, pause_s=0.1) as events:
        client.of(pool.config).publish(made.id, "seedling", "half of the sessions", half)
        wait_until(lambda: {e.version for e in events[-16:]} == {str(ONE), str(made.id)}, timeout_s=120)
        expected |= expected_of(pool.url, [str(made.id)])
        root = pool.registry.store.local_root
        assert root is not None
        damage(root / f"versions/seedling/{made.id.n}/files/model.safetensors")
        with pytest.raises(VersionRefused, match=r"could not load seedling@\d+: .*does not match its manifest"):
            client.of(pool.config).step("promote", "seedling", "to everybody")
        wait_until(lambda: len(ids(pool)) == 1, timeout_s=60)
        time.sleep(0.5)
    assert problems(events, expected) == [] and events[-1].version == str(ONE)
    (after,) = client.of(pool.config).status()["replicas"]
    assert (after["id"], after["fingerprint"]) == (before["id"], before["fingerprint"])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 0xFF
    path.write_bytes(content)


def test_poisoned_weights_are_rolled_back_by_the_canary(pool: Running, tmp_path: Path) -> None:
    """Point 4 for weights, with the gate off: within 30 s of the first answer, and never more than the canary's share."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_weights(tmp_path / "poison", base, 47, noise=0.5)
    made = pool.registry.register("seedling", "weights", None, folder, Lineage())
    policy = Policy(steps=(25, 100), min_requests=10_000, gate=False)
    wait_until(lambda: client.of(pool.config).status()["slots"]["free"] >= 1, timeout_s=90)
    with recording(pool.url, "seedling", 32, pause_s=0.1) as events:
        client.of(pool.config).publish(made.id, "seedling", "poisoned", policy)
        wait_until(lambda: where(pool) == "canary 25", timeout_s=120)
        began_s = time.monotonic()
        wait_until(lambda: where(pool) == "rolled_back 0", timeout_s=30)
        ended_s = time.monotonic()
        time.sleep(1.5)
    during = [event for event in events if began_s < event.start_s < ended_s]
    share = sum(event.version == str(made.id) for event in during) / max(1, len(during))
    expected = sum(takes_canary("seedling", made.id, 25, f"session-{n}") for n in range(32)) / 32
    print(
        f"poisoned weights: rolled back {ended_s - began_s:.1f} s after the canary began, {share:.0%} of the requests meanwhile"
    )
    assert problems(events, {}, {str(made.id): ended_s + 0.6}) == [] and share <= expected + 0.1
    wait_until(lambda: len(ids(pool)) == 1, timeout_s=60)
