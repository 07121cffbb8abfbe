"""Several base models on one pool: each answers for itself while others come, go, are trained and are published."""

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import client
from cluster.capacity.handover import doubly_owned, parse
from cluster.errors import SpringtideError
from cluster.pool import submit
from cluster.types import Lineage, VersionId
from tests.adapters import make_adapter
from tests.cluster.test_autoscaling import engines
from tests.cluster.test_publish import ONE, TIDE, ask, wait_until
from tests.conftest import Running
from tests.history import expected_of, problems, recording

SPROUT = VersionId("sprout", 1)


def phases(pool: Running) -> dict[str, str]:
    return {fleet["name"]: fleet["phase"] for fleet in client.of(pool.config).fleets()}


def free_slots(pool: Running) -> float:
    return client.of(pool.config).status()["slots"]["free"]


@pytest.fixture
def sprout(pool: Running) -> VersionId:
    """A second base model, of another name and shape."""
    if pool.registry.alias("sprout") is None:
        id = submit.start(pool.config, "pretrain", name="sprout", layers=2, steps=60)
        for _ in submit.follow(pool.config, id):
            pass
    return SPROUT


@pytest.mark.timeout(600)
def test_two_models_answer_while_a_third_comes_and_goes_and_one_of_them_is_trained_and_published(
    pool: Running, sprout: VersionId, tmp_path: Path
) -> None:
    """The second point of what must be shown: no request fails, and no slot has two owners at any time."""
    operator, began_s = client.of(pool.config), time.time()
    operator.add_fleet("sprout", {"min_replicas": 1, "max_replicas": 1})
    wait_until(lambda: ask(pool, "sprout").status_code == 200, timeout_s=120)
    print(f"the second fleet answers after {time.time() - began_s:.1f} s")
    expected = expected_of(pool.url, [str(ONE), str(sprout)])
    with (
        recording(pool.url, "seedling", 4, prefix="seedling") as first,
        recording(pool.url, "sprout", 4, prefix="sprout") as second,
    ):
        at_s, before = time.time(), len(engines(pool))
        operator.add_fleet("third", {"model": str(sprout)})
        wait_until(lambda: phases(pool)["third"] == "serving", timeout_s=120)
        assert ask(pool, "third").status_code == 200
        print(f"a third fleet answers after {time.time() - at_s:.1f} s; {free_slots(pool):.0f} slots are free")
        with pytest.raises(SpringtideError, match="already"):
            operator.add_fleet("third", {})
        at_s = time.time()
        operator.remove_fleet("third", force=False)
        wait_until(lambda: "third" not in phases(pool), timeout_s=60)
        wait_until(lambda: free_slots(pool) == 1, timeout_s=30)
        wait_until(lambda: len(engines(pool)) <= before, timeout_s=10)
        print(f"it is gone, its slot is free, and its engine has ended after {time.time() - at_s:.1f} s")
        assert ask(pool, "third").headers["x-model-version"] == str(sprout), "its alias belongs to who hosts what it means"
        with pytest.raises(SpringtideError, match="needs 2 of the pool's 3 slots, and 2 are the least"):  # no machine ever comes
            operator.add_fleet("third", {"min_replicas": 2, "max_replicas": 2})
        at_s = time.time()
        id = submit.start(pool.config, "finetune", data=str(TIDE), base="sprout", name="sprout", epochs=6, publish=True)
        for _ in submit.follow(pool.config, id):
            pass
        print(f"trained and published after {time.time() - at_s:.1f} s")
        wait_until(lambda: ask(pool, "sprout").headers.get("x-model-version") == "sprout@2", timeout_s=30)
        time.sleep(1)
    expected |= expected_of(pool.url, ["sprout@2"])
    assert problems(first, expected) == [] and {event.version for event in first} == {str(ONE)}
    assert problems(second, expected) == [] and {event.version for event in second} == {str(sprout), "sprout@2"}
    print(
        f"{len(first)} and {len(second)} requests, the longest took {max(e.end_s - e.start_s for e in [*first, *second]):.1f} s"
    )
    snapshots = parse(operator.slots(began_s)["snapshots"])
    assert doubly_owned(snapshots) == [] and max(one.serving for one in snapshots) == 3
    operator.remove_fleet("sprout", force=True)
    wait_until(lambda: phases(pool) == {"seedling": "serving"}, timeout_s=60)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_fleet_grows_for_adapters_beyond_one_replicas_places_and_answers_for_all_of_them(
    pool: Running, sprout: VersionId, tmp_path: Path
) -> None:
    """Every live adapter had to be on every replica. Clients keep the first ones busy while more are published: the third brings a second
    replica, which must close one that answers; the last finds no place."""
    operator, places = client.of(pool.config), 2
    bounds = {"min_replicas": 1, "max_replicas": 2, "scale_down_after_s": 1.0}
    operator.add_fleet("tenants", {"model": str(sprout), **bounds, "max_cpu_loras": places, "max_loras": places})
    wait_until(lambda: len(of_fleet(pool, "tenants")) == 1, timeout_s=180)
    base = pool.registry.fetch(pool.registry.manifest(sprout), tmp_path / "cache")
    made = [
        pool.registry.register(
            f"tenant-{n}", "adapter", sprout, make_adapter(tmp_path / str(n), base, 4, seed=900 + n), Lineage()
        )
        for n in range(2 * places + 1)
    ]
    with contextlib.ExitStack() as recordings:
        events = [recordings.enter_context(recording(pool.url, "tenants", 4, pause_s=0.05, prefix="tenants"))]
        for one in made[:-1]:
            began_s = time.time()
            assert operator.publish(one.id, one.id.name, "one more tenant").stage == "live"
            print(f"{one.id} is live after {time.time() - began_s:.2f} s")
            events.append(recordings.enter_context(recording(pool.url, one.id.name, 2, pause_s=0.0, prefix=one.id.name)))
        with pytest.raises(SpringtideError, match="all 4 places for adapters of the fleet tenants are taken"):
            operator.publish(made[-1].id, made[-1].id.name, "one too many")
        for one in made[:-1] * 3:
            answer = ask(pool, one.id.name)
            assert (answer.status_code, answer.headers.get("x-model-version")) == (200, str(one.id)), answer.text
        time.sleep(10)  # Serve may end a replica after a second without need
    held = [{id for id in one["held"] if id.startswith("tenant-")} for one in of_fleet(pool, "tenants")]
    print(held, [len(some) for some in events])
    assert [len(some) for some in held] == [places, places] and held[0] | held[1] == {str(one.id) for one in made[:-1]}
    expected = expected_of(pool.url, [str(sprout), *(str(one.id) for one in made[:-1])])
    assert [problems(some, expected) for some in events] == [[]] * len(events)
    operator.remove_fleet("tenants", force=True)
    wait_until(lambda: phases(pool) == {"seedling": "serving"}, timeout_s=60)


def of_fleet(pool: Running, name: str) -> list[dict[str, Any]]:
    """The replicas of a fleet, as `springtide status` knows them."""
    return [one for one in client.of(pool.config).status()["replicas"] if one["app"] == f"fleet-{name}"]
