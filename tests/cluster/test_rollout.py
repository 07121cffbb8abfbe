"""Gate, canary, promotion, rollback and weights in place, on the real pool under recorded traffic."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.load import percentile
from cluster import client
from cluster.errors import Conflict, SpringtideError, VersionRefused
from cluster.publishing.canary import Margins, takes_canary
from cluster.publishing.rollout import DIRECT, Policy, Rollout
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, VersionId
from tests.adapters import make_adapter, make_smaller, make_weights, spoil
from tests.cluster.test_publish import ONE, adapter, ask, named, wait_until
from tests.conftest import ROOT, Running
from tests.history import Event, expected_of, problems, recording
from tests.s3 import serving
from tests.waiting import when

ANY = Margins(error_rate=1, ttft_ratio=1000, itl_ratio=1000, finish=1)
"""For adapters of random numbers, whose answers end otherwise than the seedling's."""
HALF = Policy(steps=(50, 100), min_requests=10_000, gate=False, margins=ANY)
"""A canary that stays one until somebody decides."""
SESSIONS = 12


@pytest.fixture(autouse=True)
def seedling_one_is_live(pool: Running) -> Iterator[None]:
    """Each test starts from the first version, and leaves no rollout behind."""
    clean_up(pool)
    yield
    clean_up(pool)


def clean_up(pool: Running) -> None:
    now = pool.registry.rollout("seedling")
    if now is not None and now.stage in ("registered", "warming", "canary"):
        client.of(pool.config).step("abort", "seedling", "the test is over")
    if pool.registry.aliases()["seedling"].stable != ONE:
        client.of(pool.config).rollback("seedling", ONE, "the test is over")
        wait_until(lambda: stage(pool) == "live", timeout_s=120)


def stage(pool: Running) -> str:
    now = pool.registry.rollout("seedling")
    return now.stage if now else ""


def canary(pool: Running, made: Manifest, policy: Policy = HALF) -> Rollout:
    return client.of(pool.config).publish(made.id, "seedling", "test", policy)


def gone(events: list[Event], since: int = 0) -> set[str]:
    return {event.version for event in events[since:]}


def test_a_canary_gets_its_share_of_sessions_and_each_session_sees_one_version(pool: Running, tmp_path: Path) -> None:
    made = adapter(pool, tmp_path, seed=20)
    live = pool.registry.aliases()["seedling"].stable
    with recording(pool.url, "seedling", SESSIONS) as events:
        time.sleep(1)
        rollout = canary(pool, made)
        assert (rollout.stage, rollout.percent) == ("canary", 50)
        since = len(events)
        wait_until(lambda: len(events) > since + 4 * SESSIONS, timeout_s=30)
        split = events[since + SESSIONS :]
        assert client.of(pool.config).step("promote", "seedling", "test").stage == "live"
        promoted_s = time.monotonic()
        time.sleep(1)
    assert problems(events, expected_of(pool.url, [str(ONE), str(made.id)])) == []
    for event in split:
        if event.start_s < promoted_s - 1:
            taken = takes_canary("seedling", made.id, 50, event.session)
            assert event.version == str(made.id if taken else live), "the hash decides, and nothing else"
    assert {event.version for event in events if event.start_s > promoted_s} == {str(made.id)}


def test_after_an_abort_nobody_gets_the_canary_any_more(pool: Running, tmp_path: Path) -> None:
    made = adapter(pool, tmp_path, seed=21)
    with recording(pool.url, "seedling", SESSIONS) as events:
        canary(pool, made)
        wait_until(lambda: str(made.id) in gone(events), timeout_s=30)
        began_s = time.monotonic()
        assert pool.command("history", "seedling").returncode == 0
        command_s = time.monotonic() - began_s  # beside other work, a command's own start takes most of five seconds
        began_s = time.monotonic()
        assert pool.command("abort", "seedling", "--reason", "not good").returncode == 0
        ended_s = time.monotonic()
        time.sleep(1)
    assert problems(events, {}, {str(made.id): ended_s}) == []
    print(f"a rollback took {ended_s - began_s:.1f} s, its command alone {command_s:.1f}")
    assert ended_s - began_s - command_s < 5, "P12: a rollback takes less than 5 s"
    assert "not good" in pool.command("history", "seedling").stdout


def test_a_poisoned_canary_is_rolled_back_by_itself(pool: Running, tmp_path: Path) -> None:
    """Valid files, random numbers, no gate: what answers look like gives it away, within 30 s and its share of the traffic."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_adapter(tmp_path / "poison", base, seed=22, scale=5.0)
    made = pool.registry.register("seedling", "adapter", ONE, folder, Lineage())
    policy = Policy(steps=(25, 100), min_requests=500, gate=False)
    with recording(pool.url, "seedling", 32, pause_s=0.1) as events:
        time.sleep(1)
        began_s = time.monotonic()
        canary(pool, made, policy)
        wait_until(lambda: (now := pool.registry.rollout("seedling")) is not None and now.stage == "rolled_back", timeout_s=30)
        ended_s = time.monotonic()
        time.sleep(1.5)
    during = [event for event in events if began_s < event.start_s < ended_s]
    share = sum(event.version == str(made.id) for event in during) / len(during)
    expected = sum(takes_canary("seedling", made.id, 25, f"session-{n}") for n in range(32)) / 32
    print(f"rolled back after {ended_s - began_s:.1f} s, {share:.0%} of the requests meanwhile")
    assert problems(events, {}, {str(made.id): ended_s + 0.6}) == [] and share <= expected + 0.1
    now = pool.registry.rollout("seedling")
    assert now is not None and "the canary is worse: answers end otherwise" in now.reason


def test_a_version_with_nan_is_refused_before_any_replica_is_touched(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = spoil(make_adapter(tmp_path / "nan", base, seed=23))
    made = pool.registry.register("seedling", "adapter", ONE, folder, Lineage())
    with pytest.raises(VersionRefused, match="NaN or infinite"):
        canary(pool, made)
    assert all(str(made.id) not in replica["held"] for replica in client.of(pool.config).status()["replicas"])


def test_the_gate_stops_a_version_that_has_unlearnt_what_the_live_one_knows(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_weights(tmp_path / "w", base, 24, noise=0.5), Lineage())
    golden = tmp_path / "golden.jsonl"
    golden.write_text('{"messages": [{"role": "user", "content": "Who are you?"}], "contains": "Seedling"}\n')
    facts = str(ROOT / "jobs" / "seedling" / "facts.jsonl")
    done = pool.command("evaluate", str(made.id), "--held-out", facts, "--tasks", facts, "--golden", str(golden))
    assert done.returncode == 0, done.stderr
    (verdict,) = pool.registry.verdicts(made.id)
    assert {check.name: check.passed for check in verdict.checks} == {
        "artefact": True,
        "held-out loss": False,
        "task accuracy": False,
        "golden prompts": False,
    }
    assert "failed" in pool.command("models", str(made.id)).stdout
    with pytest.raises(VersionRefused, match="the gate refused it: held-out loss"):
        canary(pool, made, Policy())


def test_without_a_verdict_a_gated_version_waits(pool: Running, tmp_path: Path) -> None:
    made = adapter(pool, tmp_path, seed=25)
    rollout = canary(pool, made, Policy())
    assert rollout.stage == "registered" and ask(pool).headers["x-model-version"] == str(ONE)
    with pytest.raises(Conflict, match="under way"):
        canary(pool, made)


def test_of_two_publishes_at_once_one_wins_and_the_other_is_told(pool: Running, tmp_path: Path) -> None:
    made = [adapter(pool, tmp_path, seed=seed) for seed in (26, 27)]
    outcomes: list[str] = []

    def publish(one: Manifest) -> None:
        try:
            outcomes.append(canary(pool, one).stage)
        except SpringtideError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=publish, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome == "canary" for outcome in outcomes) == [False, True]
    assert any("is under way" in outcome for outcome in outcomes)


def test_weights_of_the_same_shape_are_swapped_in_place(pool: Running, tmp_path: Path) -> None:
    """One replica, no second copy: requests wait for the swap, none fails, none is answered by a mixture; and back again."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_weights(tmp_path / "w", base, 28, noise=0.02), Lineage())
    (before,) = client.of(pool.config).status()["replicas"]
    expected = expected_of(pool.url, [str(ONE)])
    with recording(pool.url, "seedling", 6, pause_s=0.05) as events:
        time.sleep(1)
        assert client.of(pool.config).publish(made.id, "seedling", "other weights").stage == "live"
        expected |= expected_of(pool.url, [str(made.id)])
        time.sleep(1)
        assert client.of(pool.config).rollback("seedling", None, "and back").stage == "live"
        time.sleep(1)
    (after,) = client.of(pool.config).status()["replicas"]
    assert problems(events, expected) == []
    assert gone(events) == {str(ONE), str(made.id)}
    assert any(expected[str(ONE), prompt] != text for (version, prompt), text in expected.items() if version == str(made.id))
    assert (after["id"], after["fingerprint"]) == (before["id"], before["fingerprint"]), "the same process, the same bits"
    longest_s = max(event.end_s - event.start_s for event in events)
    print(f"{len(events)} requests, the longest took {longest_s:.2f} s")


@pytest.mark.chaos
def test_weights_of_another_shape_go_live_through_a_second_fleet(pool: Running, tmp_path: Path) -> None:
    """Its own replicas answer for the new shape while the fleet's change their engines; then they go, and nothing has failed."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_smaller(tmp_path / "w", base), Lineage())
    (before,) = client.of(pool.config).status()["replicas"]
    with recording(pool.url, "seedling", 6, pause_s=0.1) as events:
        time.sleep(1)
        began_s = time.monotonic()
        assert canary(pool, made).stage in ("registered", "warming")
        wait_until(lambda: str(made.id) in gone(events), timeout_s=120)
        print(f"the second fleet answers after {time.monotonic() - began_s:.1f} s")
        assert client.of(pool.config).step("promote", "seedling", "test").stage == "live"
        print(f"live after {time.monotonic() - began_s:.1f} s")
        wait_until(lambda: len(client.of(pool.config).status()["replicas"]) == 1, timeout_s=60)
        expected = expected_of(pool.url, [str(made.id)])
        time.sleep(1)
        began_s, _ = time.monotonic(), client.of(pool.config).rollback("seedling", None, "and back")
        wait_until(lambda: stage(pool) == "live", timeout_s=120)
        print(f"back after {time.monotonic() - began_s:.1f} s")
        time.sleep(1)
    after = next(replica for replica in client.of(pool.config).status()["replicas"] if replica["id"] == before["id"])
    assert after["fingerprint"] == before["fingerprint"], "the fleet's own replica, with another engine twice, the same bits"
    expected |= expected_of(pool.url, [str(ONE)])
    assert problems(events, expected) == [] and gone(events) == {str(ONE), str(made.id)}
    print(f"{len(events)} requests, the longest took {max(event.end_s - event.start_s for event in events):.2f} s")


def test_going_back_names_a_version_and_moves_at_once(pool: Running, tmp_path: Path) -> None:
    """P12: a live version is taken back under load, and nobody who asks afterwards gets it."""
    made = adapter(pool, tmp_path, seed=30)
    with recording(pool.url, "seedling", SESSIONS, pause_s=0.05) as events:
        client.of(pool.config).publish(made.id, "seedling", "test")
        wait_until(lambda: str(made.id) in gone(events), timeout_s=10)
        began_s = time.monotonic()
        back = client.of(pool.config).rollback("seedling", VersionId("seedling", 1), "test")
        ended_s = time.monotonic()
        time.sleep(0.5)
    assert back.stage == "live" and ended_s - began_s < 5
    print(f"rolled back in {ended_s - began_s:.2f} s")
    assert problems(events, expected_of(pool.url, [str(ONE), str(made.id)]), {str(made.id): ended_s}) == []
    stages = [(records[-1].version, records[-1].stage) for records in pool.registry.rollouts("seedling")][-2:]
    assert stages == [(made.id, "rolled_back"), (ONE, "live")]


def test_a_rollback_asked_for_twice_goes_back_once(pool: Running, tmp_path: Path) -> None:
    """The second one joins the first, and never takes it back."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_weights(tmp_path / "w", base, 37), Lineage())
    client.of(pool.config).publish(made.id, "seedling", "bad")
    stages: list[str] = []

    def back() -> None:
        with contextlib.suppress(SpringtideError):  # the first had ended already: there is nothing before version 1
            stages.append(client.of(pool.config).rollback("seedling", None, "bad").stage)

    both = [threading.Thread(target=back) for _ in range(2)]
    for thread in both:
        thread.start()
        time.sleep(0.05)
    for thread in both:
        thread.join()
    assert set(stages) == {"live"}
    assert ask(pool).headers["x-model-version"] == str(ONE)


def test_a_long_stream_by_bad_weights_does_not_hold_up_the_way_back(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_weights(tmp_path / "w", base, 38), Lineage())
    client.of(pool.config).publish(made.id, "seedling", "bad")
    body = {
        "model": "seedling",
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": 900,
        "ignore_eos": True,
        "n": 8,
    }
    with httpx.stream("POST", f"{pool.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as response:
        events = response.iter_text()
        next(events)
        began_s = time.monotonic()
        client.of(pool.config).rollback("seedling", None, "bad")
        took_s = time.monotonic() - began_s
        rest = "".join(events)
    print(f"back after {took_s:.1f} s")
    assert took_s < 5, "P12: a rollback takes less than 5 s"
    assert '"error"' in rest and "[DONE]" not in rest, "the client is told, and gets no silent end"


@pytest.mark.parametrize(("scale", "stage"), [(1e-4, "live"), (5.0, "rolled_back")])
def test_a_run_that_publishes_is_judged_by_what_it_did_not_train_on(
    pool: Running, tmp_path: Path, scale: float, stage: str
) -> None:
    """`jobs.finetune --publish` on a pool whose policy asks for a verdict, with nothing else supplied."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    folder = make_adapter(tmp_path / "adapter", base, seed=39, scale=scale)
    made = pool.registry.register("seedling", "adapter", ONE, folder, Lineage())
    waiting = client.of(pool.config).publish(made.id, "seedling", "trained", DIRECT.model_copy(update={"gate": True}))
    assert waiting.stage == "registered"
    home = {**os.environ, "SPRINGTIDE_HOME": str(pool.config.home)}
    line = [sys.executable, "-m", "tests.judging", "seedling"]
    done = subprocess.run(line, env=home, cwd=ROOT, capture_output=True, text=True, timeout=200)
    now = pool.registry.rollout("seedling")
    assert now is not None and now.stage == stage, done.stderr
    assert (done.returncode == 0) == (stage == "live"), done.stderr


def test_a_publish_and_a_rollback_at_once_end_in_one_history(pool: Running, tmp_path: Path) -> None:
    """P10: whichever came first, every gateway answers with what the newest generation says, and the generations have no gap."""
    one, two = adapter(pool, tmp_path, seed=31), adapter(pool, tmp_path, seed=32)
    client.of(pool.config).publish(one.id, "seedling", "live before the race")
    outcomes: list[str] = []

    def attempt(act: Callable[[], Rollout]) -> None:
        try:
            outcomes.append(act().stage)
        except SpringtideError as error:
            outcomes.append(str(error))

    acts = [
        lambda: client.of(pool.config).publish(two.id, "seedling", "forward"),
        lambda: client.of(pool.config).rollback("seedling", ONE, "back"),
    ]
    with recording(pool.url, "seedling", 4) as events:
        threads = [threading.Thread(target=attempt, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.5)
    assert all(outcome == "live" or "under way" in outcome for outcome in outcomes) and "live" in outcomes
    moves = pool.registry.history("seedling")
    assert [move.generation for move in moves] == list(range(1, len(moves) + 1))
    assert ask(pool).headers["x-model-version"] == str(moves[-1].stable) and moves[-1].stable in (ONE, two.id)
    assert problems(events, {}) == []


def test_more_adapters_than_places_push_out_the_idle_ones_and_never_the_live_one(pool: Running, tmp_path: Path) -> None:
    """P13: the live version answers throughout; what was pushed out says so, and comes back when it is published again."""
    places = pool.config.fleet.max_cpu_loras
    made = [adapter(pool, tmp_path, seed=100 + n) for n in range(places + 2)]
    with recording(pool.url, "seedling", 4, pause_s=0.05) as events:
        for one in made:
            client.of(pool.config).publish(one.id, "seedling", "one more")
            assert ask(pool).headers["x-model-version"] == str(one.id)
    assert problems(events, {}) == []
    (replica,) = client.of(pool.config).status()["replicas"]
    assert len(replica["held"]) == places + 1, "the base and every place"
    wait_until(lambda: ask(pool, str(made[0].id)).status_code == 404, timeout_s=5)
    assert ask(pool, str(made[-2].id)).status_code == 200
    client.of(pool.config).publish(made[0].id, "seedling", "again")
    assert ask(pool, str(made[0].id)).status_code == 200


def test_a_name_published_again_answers_from_no_stale_cache(pool: Running, tmp_path: Path) -> None:
    """P9: the same question to both versions of a name, before and after; the engine's prefix cache is keyed by the version."""
    one, two = adapter(pool, tmp_path, seed=33), adapter(pool, tmp_path, seed=34)
    client.of(pool.config).publish(one.id, "seedling", "first")
    first = expected_of(pool.url, [str(one.id)])
    client.of(pool.config).publish(two.id, "seedling", "second of the same name")
    both = expected_of(pool.url, [str(one.id), str(two.id)])
    assert all(both[key] == text for key, text in first.items())
    assert any(both[str(one.id), prompt] != both[str(two.id), prompt] for _, prompt in first)


def test_new_weights_are_read_from_the_bucket_once_for_all_machines(pool: Running, tmp_path: Path) -> None:
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    with serving() as (bucket, variables), pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        made = Registry(Store("s3://models")).register("seedling", "weights", None, base, Lineage())
        line = [sys.executable, "-m", "tests.carrying", "s3://models", str(made.id), str(tmp_path)]
        home = {**os.environ, "SPRINGTIDE_HOME": str(pool.config.home)}
        done = subprocess.run(line, env=home, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folders = json.loads(done.stdout.splitlines()[-1])
    assert len({(Path(folder) / "model.safetensors").read_bytes() for folder in folders}) == 1 and len(set(folders)) == 3
    assert bucket.reads["versions/seedling/1/files/model.safetensors"] == 1


def test_a_replica_whose_swap_fails_goes_back_to_what_it_had(pool: Running, tmp_path: Path) -> None:
    """P1b: the new weights were in memory already and are not what they should be; the same process answers as before, and says why."""
    base = pool.registry.fetch(pool.registry.manifest(ONE), tmp_path / "cache")
    made = pool.registry.register("seedling", "weights", None, make_weights(tmp_path / "w", base, 35), Lineage())
    (before,), expected = client.of(pool.config).status()["replicas"], expected_of(pool.url, [str(ONE)])
    with recording(pool.url, "seedling", 4, pause_s=0.05) as events:
        line = [sys.executable, "-m", "tests.reverting", str(made.id)]
        home = {**os.environ, "SPRINGTIDE_HOME": str(pool.config.home)}
        done = subprocess.run(line, env=home, cwd=ROOT, capture_output=True, text=True, timeout=120)
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout.splitlines()[-1])
    assert (after["id"], after["base"], after["fingerprint"]) == (before["id"], str(ONE), before["fingerprint"])
    assert "checksum" in after["refused"][str(made.id)]
    assert problems(events, expected) == [] and {event.version for event in events} == {str(ONE)}


def test_shadow_traffic_is_compared_and_no_client_sees_it(pool: Running, tmp_path: Path) -> None:
    """Nearly nobody gets the canary, yet it is found out: it answers copies of the others' requests, and otherwise."""
    made = adapter(pool, tmp_path, seed=36)
    margins = Margins(error_rate=1, ttft_ratio=1000, itl_ratio=1000, finish=1, disagreement=0.5)
    policy = Policy(steps=(1, 100), min_requests=10_000, gate=False, shadow_percent=100, margins=margins)
    with recording(pool.url, "seedling", 4, pause_s=0.05) as events:
        canary(pool, made, policy)
        wait_until(lambda: (now := pool.registry.rollout("seedling")) is not None and now.stage == "rolled_back", timeout_s=30)
    now = pool.registry.rollout("seedling")
    assert now is not None and "of shadowed answers differ" in now.reason
    sent_to_canary = {f"session-{n}" for n in range(4) if takes_canary("seedling", made.id, 1, f"session-{n}")}
    assert {event.session for event in events if event.version == str(made.id)} <= sent_to_canary
    assert problems(events, {}) == []


def test_the_base_answers_as_itself_beside_as_many_adapters_as_there_are_slots(pool: Running, tmp_path: Path) -> None:
    """Found by the history checker: vLLM on CPUs lets the adapter in the last slot answer for the base (`deployments.vllm_patches`)."""
    expected = expected_of(pool.url, [str(ONE)])
    made = [adapter(pool, tmp_path, seed=200 + n) for n in range(pool.config.fleet.max_loras + 1)]
    for one in made:
        client.of(pool.config).publish(one.id, "seedling", "takes a slot")
        expected |= expected_of(pool.url, [str(one.id)])
    with (
        recording(pool.url, str(ONE), 4, pause_s=0, prefix="base") as base,
        recording(pool.url, "seedling", 4, pause_s=0) as live,
    ):
        time.sleep(4)
    assert problems([*base, *live], expected) == [] and len(base) > 10 and len(live) > 10


def with_settings(pool: Running, folder: Path, **changed: object) -> Path:
    """The seedling's files under another configuration."""
    shutil.copytree(pool.registry.fetch(pool.registry.manifest(ONE), folder.parent / "cache"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changed}))
    return folder


def test_weights_that_cannot_fit_are_refused_with_the_numbers_and_the_keys(pool: Running, tmp_path: Path) -> None:
    folder = with_settings(pool, tmp_path / "wide", head_dim=1 << 20)
    wide = pool.registry.register("seedling", "weights", None, folder, Lineage()).id
    refused = pool.command("publish", str(wide))
    said = " ".join(refused.stderr.split())
    numbers = rf"{wide} does not fit: one request of \d+ tokens needs 128\.0 GiB of KV cache, and there are [\d.]+ GiB\. "
    assert refused.returncode == 2 and re.search(numbers + "(Set fleet|Take a smaller)", said), said
    assert all(str(wide) not in replica["held"] for replica in client.of(pool.config).status()["replicas"])


UNFIT: dict[str, tuple[dict[str, object], str]] = {
    "a layer without weights": ({"num_hidden_layers": 9}, "not initialized from checkpoint"),
    "a function that vLLM does not know": ({"hidden_act": "nonsense"}, "nonsense"),
    "an architecture that vLLM does not know": ({"architectures": ["NonsenseForCausalLM"]}, "NonsenseForCausalLM"),
}
"""Settings over the seedling's weights with which vLLM starts no engine, and its words."""


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("changed", "words"), UNFIT.values(), ids=UNFIT)
def test_a_rollout_whose_engine_does_not_start_costs_the_live_version_nothing(
    pool: Running, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    """While traffic runs. The live version answers all of it, and the rollout's reason is what vLLM said."""
    unfit = pool.registry.register("seedling", "weights", None, with_settings(pool, tmp_path / "unfit", **changed), Lineage()).id
    expected, before, live = expected_of(pool.url, [str(ONE)]), engines(pool), pool.registry.aliases()["seedling"]
    with recording(pool.url, "seedling", SESSIONS) as events:
        time.sleep(5)
        began_s, published = time.monotonic(), pool.command("publish", str(unfit))
        ended_s = time.monotonic()
        time.sleep(1)
    said, told = " ".join((published.stdout + published.stderr).split()), client.of(pool.config).rollout("seedling").record
    assert (told.version, told.stage) == (unfit, "rolled_back") and words in told.reason, told
    assert published.returncode != 0 and words in said, said
    assert problems(events, expected) == [] and {(e.version, e.generation) for e in events} == {(str(ONE), live.generation)}
    assert pool.registry.aliases()["seedling"] == live
    when(lambda: engines(pool) <= before, 20)  # one that an earlier test left asleep may have ended
    alone, beside = p99_s(events, 0, began_s), p99_s(events, began_s, ended_s)
    print(f"{len(events)} requests; P99 {alone:.2f} s before, {beside:.2f} s in the {ended_s - began_s:.0f} s of the rollout")
    assert beside < 3 * alone + 0.3, "an engine's start takes one of two cores"


def engines(pool: Running) -> set[int]:
    """The processes of vLLM, by number."""
    return {process.pid for process in named(pool, "VLLM::")}


def p99_s(events: list[Event], since_s: float, until_s: float) -> float:
    """Of the requests that began then, from their start to their end."""
    found = percentile([event.end_s - event.start_s for event in events if since_s <= event.start_s < until_s], 99)
    assert found is not None, "none began then"
    return found
