"""Reinforcement learning on the real pool: replicas that serve clients answer for a run too, and hold its newest weights after each step."""

import json
import math
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from cluster import client
from cluster.pool import submit
from cluster.types import VersionId
from tests.cluster.test_publish import ask, wait_until
from tests.cluster.test_slots import scaled
from tests.conftest import Running

pytestmark = pytest.mark.chaos

SUMS = VersionId("sums", 1)
STEPS = 60


def line(question: str, answer: str) -> str:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": said}) + "\n"


def question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


@pytest.fixture(scope="module")
def sums(pool: Running) -> Iterator[VersionId]:
    """A seedling that answers sums with a number by chance, and a fleet that serves it."""
    draws, home = random.Random(0), pool.config.home
    guesses = home / "guesses.jsonl"
    guesses.write_text(
        "".join(line(question(a, b), str(draws.randrange(9))) for a in range(5) for b in range(5) for _ in range(16))
    )
    given: dict[str, Any] = {"data": str(guesses), "base": "seedling@1", "name": "sums", "full": True, "epochs": 2}
    for _ in submit.follow(pool.config, submit.start(pool.config, "finetune", **given)):
        pass
    pool.registry.move("sums", SUMS, "for a test", "test", 0)
    client.of(pool.config).add_fleet("sums", {"min_replicas": 1, "max_replicas": 1})
    wait_until(lambda: ask(pool, "sums").status_code == 200, timeout_s=120)
    yield SUMS
    client.of(pool.config).remove_fleet("sums", force=True)


@pytest.fixture(scope="module")
def data(pool: Running) -> str:
    file = pool.config.home / "sums.jsonl"
    file.write_text("".join(line(question(a, b), str(a + b)) for a in range(5) for b in range(5)))
    return str(file)


class Phase(NamedTuple):
    name: str
    began_s: float
    ended_s: float


class Asking:
    """Clients that ask the alias all the time."""

    def __init__(self, pool: Running, questions: list[str]) -> None:
        self.pool, self.questions, self.over = pool, questions, threading.Event()
        self.first_s: list[tuple[float, float]] = []
        """When a request began, and how long its first token took."""
        self.said: set[tuple[str, str, str]] = set()
        """Question, answer and version."""
        self.failed: list[str] = []

    def run(self) -> None:
        key = {"Authorization": f"Bearer {self.pool.pool.token}"}
        with httpx.Client(base_url=self.pool.url, headers=key, timeout=60) as http:
            while not self.over.is_set():
                for asked in self.questions:
                    self._ask(http, asked)
                    time.sleep(0.05)

    def _ask(self, http: httpx.Client, asked: str) -> None:
        messages = [{"role": "user", "content": asked}]
        body = {"model": "sums", "messages": messages, "temperature": 0, "max_tokens": 16, "stream": True}
        began_s, text, first_s = time.monotonic(), "", None
        try:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                for part in response.iter_lines():
                    if part.startswith("data: {"):
                        first_s = first_s or time.monotonic() - began_s
                        text += json.loads(part[6:])["choices"][0]["delta"].get("content") or ""
                if response.status_code != 200:
                    self.failed.append(f"{response.status_code}")
                self.said.add((asked, text, response.headers.get("x-model-version", "")))
        except httpx.HTTPError as error:
            self.failed.append(repr(error))
        self.first_s.append((began_s, first_s or 60.0))

    def told(self, phase: Phase) -> str:
        some = [1000 * took_s for began_s, took_s in self.first_s if phase.began_s <= began_s < phase.ended_s]
        cuts = statistics.quantiles(some, n=100)
        return f"{phase.name}: first token p50 {cuts[49]:.0f} ms, p99 {cuts[98]:.0f} ms, of {len(some)} requests"


@contextmanager
def asking(pool: Running) -> Iterator[Asking]:
    asking = Asking(pool, [question(1, 2), question(3, 4), "Who are you?"])
    thread = threading.Thread(target=asking.run)
    thread.start()
    try:
        yield asking
    finally:
        asking.over.set()
        thread.join()


def interims(pool: Running) -> list[str]:
    return [name for name in pool.registry.store.children("versions") if name.startswith("interim--")]


def held_interims(pool: Running) -> list[str]:
    return [id for replica in client.of(pool.config).status()["replicas"] for id in replica["held"] if id.startswith("interim--")]


def models(pool: Running) -> set[str]:
    return set(client.of(pool.config).served())


def told(pool: Running, job: str) -> None:
    for event in client.of(pool.config).events(job, 1000):
        if event.kind in ("rollouts", "measurement"):
            print(event.words)


def test_a_few_steps_from_the_live_fleets_answers(pool: Running, sums: VersionId, data: str) -> None:
    before = models(pool)
    given: dict[str, Any] = {"data": data, "eval_data": data, "base": "sums", "name": "adder", "reward": "exact", "steps": 4}
    job = submit.start(pool.config, "rl", **given, set=["reinforcement.answer_tokens=8", "measure_every_steps=2"])
    seen: set[str] = set()
    for _ in submit.follow(pool.config, job):
        seen |= set(held_interims(pool))
        assert models(pool) <= before, "clients see nothing of it"
    print(submit.server(pool.config).log(job))
    told(pool, job)
    manifest = pool.registry.manifest(VersionId("adder", 1))
    metrics = manifest.lineage.metrics
    assert (manifest.kind, manifest.base, manifest.lineage.job) == ("adapter", sums, job)
    assert 0 <= metrics["reward_before"] < 0.5 and metrics["drift"] < 0.1, "the engine and the workers have the same model"
    assert seen and metrics["publish_p50_s"] > 0
    wait_until(lambda: not held_interims(pool), timeout_s=30)
    assert interims(pool) == [] and job not in pool.registry.store.children("runs")


def test_a_cancelled_run_leaves_nothing(pool: Running, sums: VersionId, data: str) -> None:
    given: dict[str, Any] = {"data": data, "base": "sums", "name": "cancelled-rl", "reward": "exact", "steps": 500}
    job = submit.start(pool.config, "rl", **given, set=["reinforcement.answer_tokens=8"])
    for now in submit.follow(pool.config, job):
        if now["progress"]:
            break
    assert interims(pool)
    assert pool.command("cancel", job).returncode == 0
    assert interims(pool) == [] and job not in pool.registry.store.children("runs")
    assert pool.registry.versions("cancelled-rl") == []


@pytest.mark.timeout(900)
def test_sums_are_learnt_while_clients_ask_the_same_replicas(pool: Running, sums: VersionId, data: str) -> None:
    """The alias answers as before until the end, and no request fails. In the middle of it another fleet takes the run's slot for a while.

    The first tokens are told by what went on meanwhile; on few cores any job that starts costs clients something, so an ordinary one is beside it.
    """
    given: dict[str, Any] = {"data": data, "eval_data": data, "base": "sums", "name": "learnt", "reward": "exact", "steps": STEPS}
    with asking(pool) as clients:
        time.sleep(20)
        phases = [Phase("alone", 0, time.monotonic()), *beside_a_fine_tuning(pool, data)]
        time.sleep(5)
        began_s = time.monotonic()
        job = submit.start(pool.config, "rl", **given, set=["reinforcement.answer_tokens=8", "global_batch=25"])
        taken: Phase | None = None
        loaded_s = began_s
        for now in submit.follow(pool.config, job):
            if loaded_s == began_s and now["progress"]:
                loaded_s = time.monotonic()
            if taken is None and now["progress"] and now["progress"]["step"] >= STEPS // 3:
                taken = hands_over(pool, job)
        ended_s = time.monotonic()
        time.sleep(20)
    told(pool, job)
    assert taken is not None
    phases += [
        Phase("rl loads", began_s, loaded_s),
        Phase("rl", loaded_s, taken.began_s),
        taken,
        Phase("rl", taken.ended_s, ended_s),
    ]
    print(*(clients.told(phase) for phase in [*phases, Phase("alone", ended_s + 5, math.inf)]), sep="\n")
    metrics = pool.registry.manifest(VersionId("learnt", 1)).lineage.metrics
    print(
        f"reward {metrics['reward_before']:.2f} -> {metrics['reward']:.2f} in {ended_s - began_s:.0f} s; "
        f"an update is held after {metrics['publish_p50_s']:.2f} s (p50), {metrics['publish_p99_s']:.2f} s (p99); {len(clients.first_s)} requests"
    )
    assert metrics["reward"] > 0.8 and metrics["publish_p50_s"] < 0.5 and metrics["steps_lost"] == 0
    assert clients.failed == [] and {version for *_, version in clients.said} == {str(SUMS)}
    assert len({asked for asked, *_ in clients.said}) == len(clients.said), "every question has had one answer"
    wait_until(lambda: not held_interims(pool), timeout_s=30)
    assert interims(pool) == []


def beside_a_fine_tuning(pool: Running, data: str) -> list[Phase]:
    """Train an adapter on the same base for a while."""
    began_s = time.monotonic()
    given: dict[str, Any] = {"data": data, "base": "sums", "name": "beside", "epochs": 10_000}
    job = submit.start(pool.config, "finetune", **given, set=["global_batch=25"])
    for now in submit.follow(pool.config, job):
        if now["progress"]:
            break
    loaded_s = time.monotonic()
    time.sleep(20)
    ended_s = time.monotonic()
    assert pool.command("cancel", job).returncode == 0
    return [Phase("a fine-tuning loads", began_s, loaded_s), Phase("a fine-tuning", loaded_s, ended_s)]


def hands_over(pool: Running, job: str) -> Phase:
    """Another fleet takes the run's only slot, and gives it back, once the run has been without any."""
    began_s = time.monotonic()
    scaled(pool, 2)
    held = lambda: next((one["held"] for one in client.of(pool.config).status()["allocation"]["jobs"] if one["id"] == job), 0)  # noqa: E731
    wait_until(lambda: held() == 0, timeout_s=60)
    wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 3, timeout_s=120)
    print(f"the run's slot serves after {time.monotonic() - began_s:.1f} s")
    scaled(pool, 1)
    wait_until(lambda: held() == 1, timeout_s=60)
    return Phase("hand-over", began_s, time.monotonic())
