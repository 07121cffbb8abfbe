"""Several base models on one pool: each answers for itself while others come, go, are trained and are published."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster import client
from cluster.capacity.handover import doubly_owned, parse
from cluster.cli import fit as fits
from cluster.errors import ModelNotFound, SpringtideError
from cluster.pool import submit
from cluster.store import imports
from cluster.types import Lineage, VersionId
from tests.adapters import make_adapter
from tests.cluster.test_autoscaling import engines
from tests.cluster.test_publish import ONE, TIDE, ask, wait_until
from tests.conftest import Running
from tests.history import expected_of, problems, recording
from tests.unit.test_fit import huge

SPROUT = VersionId("sprout", 1)


def phases(pool: Running) -> dict[str, str]:
    return {fleet["name"]: fleet["phase"] for fleet in client.of(pool.config).fleets()}


def free_slots(pool: Running) -> float:
    return client.of(pool.config).status()["slots"]["free"]


@pytest.fixture
def sprout(pool: Running) -> VersionId:
    """A second base model, of another name and shape. Its alias means it, whatever was published before: an adapter would take a place."""
    alias = pool.registry.alias("sprout")
    if alias is None:
        id = submit.start(pool.config, "pretrain", name="sprout", layers=2, steps=60)
        for _ in submit.follow(pool.config, id):
            pass
    elif alias.stable != SPROUT:
        pool.registry.move("sprout", SPROUT, "again from the start", "test", alias.generation)
    return SPROUT


@pytest.fixture(autouse=True)
def only_seedling_stays(pool: Running) -> Iterator[None]:
    """The pool is every test's: a test that fails must not leave its fleet on the slots of the next."""
    yield
    for name in phases(pool).keys() - {"seedling"}:
        client.of(pool.config).remove_fleet(name, force=True)


@pytest.mark.chaos
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
    began_s, refused = time.monotonic(), ask(pool, "sprout")
    assert refused.status_code == 404 and time.monotonic() - began_s < 1, "what nobody hosts was waited for, for 30 s"


@pytest.fixture
def minilm(pool: Running, tmp_path: Path) -> VersionId:
    """all-MiniLM-L6-v2, a real encoder, which a package of the index carries."""
    try:
        source = imports.find("minilm", print)
    except ModelNotFound as error:
        pytest.skip(str(error))
    made = imports.add(pool.registry, source, tmp_path, print)
    pool.registry.move("minilm", made, "the test's", "test", 0)
    return made


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_fleet_makes_vectors_beside_one_that_chats(pool: Running, minilm: VersionId) -> None:
    operator, began_s = client.of(pool.config), time.time()
    operator.add_fleet("minilm", {"task": "embed", "max_model_len": 256})
    wait_until(lambda: phases(pool).get("minilm") == "serving", timeout_s=180)
    vectors = openai.OpenAI(base_url=f"{pool.url}/v1", api_key="unused", max_retries=0)

    def embed(*texts: str) -> list[list[float]]:
        """The gateway hears of the fleet's replica a moment later, and waits for it."""
        return [one.embedding for one in vectors.embeddings.create(model="minilm", input=list(texts)).data]

    print(f"the encoder answers after {time.time() - began_s:.1f} s")
    dog, puppy, taxes = embed("a dog", "a puppy", "taxes are due in April")
    alike, unlike = dot(dog, puppy), dot(dog, taxes)
    print(f"{len(dog)} numbers; dog and puppy {alike:.2f}, dog and taxes {unlike:.2f}")
    assert len(dog) == 384 and alike > 0.6 > 0.4 > unlike

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(pool.url + path, json={"model": "minilm", **body}, timeout=30)

    ranked = post("/v1/rerank", query="a dog", documents=["taxes are due in April", "a puppy"])
    assert ranked.json()["results"][0]["index"] == 1 and ranked.headers["x-model-version"] == str(minilm)
    assert post("/score", text_1="a dog", text_2="a puppy").json()["data"][0]["score"] == pytest.approx(alike, abs=0.01)
    refused = ask(pool, "minilm")
    assert refused.status_code == 404 and "of the task embed" in refused.json()["error"]["message"]
    assert ask(pool, "seedling").status_code == 200
    listed = {model["id"]: model["task"] for model in httpx.get(f"{pool.url}/v1/models").json()["data"]}
    assert (listed["minilm"], listed["seedling"]) == ("embed", "generate")
    assert post("/v1/embeddings", input=["a"] * 2049).json()["error"]["param"] == "input"
    print(f"2,048 texts take {timed(lambda: embed(*['a dog'] * 2048)):.1f} s")
    operator.remove_fleet("minilm", force=True)
    wait_until(lambda: "minilm" not in phases(pool), timeout_s=60)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def timed(work: Callable[[], Any]) -> float:
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s


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


def test_an_engine_that_does_not_start_says_why_once_and_wherever_it_is_asked(pool: Running, tmp_path: Path) -> None:
    """The terminal said "Failed to update the deployments" after three attempts; vLLM's own words were in Ray's logs only."""
    words = "not initialized from checkpoint"
    folder = shutil.copytree(pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache"), tmp_path / "broken")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": settings["num_hidden_layers"] + 1}))
    broken = pool.registry.register("broken", "weights", None, folder, Lineage()).id
    began_s = time.time()
    added = pool.command("fleets", "add", "broken", "--model", str(broken), "--set", "min_replicas=0")
    print(f"said after {time.time() - began_s:.1f} s: {added.stderr}")
    assert added.returncode == 2 and added.stderr.count(words) == 1, added.stdout + added.stderr
    for command in ("status", "doctor"):
        assert pool.command(command).stdout.replace("\n", " ").count("broken@1: ") == 1, command
    asked_s = time.time()
    refused = ask(pool, "broken")
    assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (503, "engine_failed", "60")
    assert words in refused.json()["error"]["message"] and time.time() - asked_s < 5
    client.of(pool.config).remove_fleet("broken", force=True)
    wait_until(lambda: phases(pool) == {"seedling": "serving"}, timeout_s=60)


def test_a_fleet_whose_model_cannot_fit_is_refused_with_the_numbers_before_anything_is_copied(
    pool: Running, tmp_path: Path
) -> None:
    """`springtide up` and `run` refuse in the same words (`tests/unit/test_refusal.py`), and so does a publish (`test_rollout`)."""
    added = pool.command("fleets", "add", "huge", "--model", str(huge(tmp_path / "huge", 800)))
    assert added.returncode == 2 and "huge" not in pool.registry.names(), "nothing was copied"
    assert re.search(
        r"huge does not fit: weights, adapters and the engine itself need 1602\.\d GiB, and there are [\d.]+ GiB", added.stderr
    )


def test_the_engine_has_the_context_and_the_kv_cache_that_were_printed(pool: Running) -> None:
    (fitted,) = fits.of_fleets(pool.config, pool.registry)
    replica = next(one for one in client.of(pool.config).status()["replicas"] if one["app"] == "fleet-seedling")
    assert replica["context_tokens"] == fitted.found.context_tokens
    assert replica["kv_cache_tokens"] == (fitted.found.kv_cache_bytes or 0) // fitted.found.token_bytes == 32_768
