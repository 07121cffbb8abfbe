"""Reinforcement learning without Ray: real models, real sampling, a real store; what a step learns, and that the whole loop learns a task."""

import math
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.client import Client
from cluster.config import Config
from cluster.endpoint import Endpoint
from cluster.errors import ConfigError, JobFailed, NoReplica, ReplicaLost
from cluster.store.registry import registry_of
from cluster.types import interim_name
from jobs.rollouts import Prompt, Rollouts, Task, Told, rolling
from jobs.training import recipe
from jobs.training.objectives import rewards
from jobs.training.objectives.rewards import Reward, RewardFailed, checked
from jobs.training.objectives.rl import Reinforcing, policy_losses
from jobs.training.objectives.samples import Exchange, Group, Sample, advantages, step_of, with_advantages
from jobs.training.recipe import Recipe, Reinforcement
from tests.sampling import Fleet
from tests.unit.test_objectives import registered

RUN = "rl-65f0a1b2c3d4"
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return registered(tmp_path, vocabulary=32, spread=0.3)


def work(config: Config, how: dict[str, Any] | None = None, **more: Any) -> Any:
    """With an adapter that is not empty, so that it differs from the base."""
    chosen = {"learning_rate": 0.01, "precision": "float32", "lora": LORA, "reinforcement": how or {}, "global_batch": 3, **more}
    made: Any = Reinforcing({"config": config.dump(), "recipe": chosen, "run": RUN, "base": "small@1", "prompts": PROMPTS})
    torch.manual_seed(1)
    with torch.no_grad():
        made.flat.vector.add_(torch.randn_like(made.flat.vector) * 0.1)
    return made


def sampled(made: Any, shift: float = 0.0) -> list[Group]:
    """Answers of different lengths to each prompt, with the model's own log-probabilities and something more."""
    groups: list[Group] = []
    for example, prompt in enumerate(PROMPTS):
        samples: list[Sample] = []
        for number in range(4):
            ids = [(3 * example + 5 * number + at) % 32 for at in range(2 + number)]
            logits = made.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
            logprobs = logits[torch.arange(len(ids)), torch.tensor(ids)] + shift * torch.linspace(-1, 1, len(ids))
            samples.append(Sample(ids, logprobs.tolist(), False, "m@1", 0, float(number == 2 or example == 1)))
        groups.append(with_advantages(Group(example, samples), "group"))
    return groups


def given_answers(made: Reinforcing, groups: Sequence[Group]) -> Reinforcing:
    made.exchange.put_rollouts(0, groups)
    assert made.ready(rank=1)
    return made


# advantages


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16), st.sampled_from(["group", "none"]))
def test_advantages_are_around_their_mean_and_keep_the_order(some: list[float], scale: recipe.Scale) -> None:
    found = advantages(some, scale)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    for (a, one), (b, other) in zip(zip(some, found, strict=True), zip(some[1:], found[1:], strict=True), strict=False):
        assert (one <= other) or a >= b


# the loss


def test_the_loss_is_the_clipped_ratio_times_the_advantage_over_all_answer_tokens(config: Config) -> None:
    made = work(config)
    groups = sampled(made, shift=0.5)
    loss, tokens = given_answers(made, groups).gradients([0, 1, 2], 0, 1)
    total, count = 0.0, 0
    for group in groups:
        for one in group.samples:
            count += len(one.answer_ids)
            for shift in torch.linspace(-1, 1, len(one.answer_ids)).tolist():
                ratio = math.exp(-0.5 * shift)
                bounded = min(max(ratio, 0.8), 1.28)
                total -= min(ratio * one.advantage, bounded * one.advantage)
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    assert tokens == sum(
        len(PROMPTS[group.example]) + len(one.answer_ids) for group in groups for one in group.samples if one.advantage
    )
    assert made.seen.masked == 0


def test_a_token_that_engine_and_trainer_disagree_about_carries_no_gradient() -> None:
    log_pi = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, seen = policy_losses(log_pi, torch.tensor([-2.0, -1.1, 0.0]), torch.tensor([-1.0, 1.0, 1.0]), Reinforcement())
    loss.sum().backward()
    assert log_pi.grad is not None and log_pi.grad.nonzero().flatten().tolist() == [1]
    assert seen.masked == 2 and seen.tokens == 3 and seen.drift == pytest.approx(2.1)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_gradient_depends_on_neither_the_workers_nor_the_portions(config: Config, world: int, kl: float) -> None:
    whole, parts = work(config, {"kl": kl}), work(config, {"kl": kl}, micro_batch_tokens=12)
    groups = sampled(whole, shift=0.1)
    given_answers(whole, groups).gradients([0, 1, 2], 0, 1)
    parts.ready(rank=1)
    losses = [parts.gradients([0, 1, 2], rank, world)[0].item() for rank in range(world)]
    assert len(losses) == world
    assert torch.allclose(parts.flat.gradient, whole.flat.gradient, rtol=1e-4, atol=1e-6) and whole.flat.gradient.any()


def test_answers_without_an_advantage_teach_nothing_and_count_in_the_mean(config: Config) -> None:
    made, alone = work(config), work(config)
    groups = sampled(made)
    assert not any(one.advantage for one in groups[1].samples)
    given_answers(made, groups).gradients([0, 1, 2], 0, 1)
    alone.answers = 0, [one for one in made.answers[1] if one.sample.advantage]
    alone.gradients([0, 2], 0, 1)
    share = sum(len(one.sample.answer_ids) for one in alone.answers[1]) / sum(
        len(one.sample.answer_ids) for one in made.answers[1]
    )
    assert torch.allclose(made.flat.gradient, alone.flat.gradient * share, rtol=1e-4, atol=1e-7)


def test_a_step_whose_answers_all_have_the_same_reward_changes_nothing(config: Config) -> None:
    made = work(config)
    made.exchange.put_rollouts(0, [group for group in sampled(made) if group.example == 1])
    assert made.ready(rank=1)
    loss, tokens = made.gradients([1], 0, 1)
    assert (loss.item(), tokens) == (0, 0) and not made.flat.gradient.any()


# versions on the way


def test_the_first_worker_registers_each_steps_weights_once(config: Config) -> None:
    made, catalog = work(config), registry_of(config).catalog
    assert not made.ready(rank=1) and not made.ready(rank=0) and not made.ready(rank=0)
    made.publisher.thread.submit(int).result()
    before = made.flat.vector.detach().clone()
    made.flat.gradient.add_(1)
    made.flat.optimizer.step()
    made.ready(rank=0)
    made.publisher.thread.submit(int).result()
    later = work(config)  # another worker is the first one from now on
    later.flat.tensors(1)
    later.ready(rank=0)
    later.publisher.thread.submit(int).result()
    assert [step_of(catalog.manifest(id)) for id in catalog.interims(RUN)] == [0, 1]
    assert not torch.equal(before, made.flat.vector)


# rewards


def test_what_a_reward_is_called() -> None:
    pool = Client(Endpoint("http://127.0.0.1:1", ""))
    assert rewards.named("regex:^[0-9]+$", pool, remote=True)("", "12", "") == 1
    assert rewards.named("regex", pool, remote=True)("", "It is 12.", r"\b12\b") == 1
    assert rewards.named("contains", pool, remote=True)("", "It is high.", "high") == 1
    assert rewards.named("math:fsum", pool, remote=False) is math.fsum
    for spec, words in (
        ("exakt", "There is no reward 'exakt'"),
        ("regex:(", "pattern '\\(' is wrong"),
        ("no.such:thing", "cannot be imported"),
        ("math:pi", "is no function"),
    ):
        with pytest.raises(ConfigError, match=words):
            rewards.named(spec, pool, remote=False)
    with pytest.raises(ConfigError, match="over HTTP may not run os:system"):
        rewards.named("os:system", pool, remote=True)


def test_a_reward_that_raises_or_is_no_number_is_told_by_name() -> None:
    def broken(prompt: str, answer: str, reference: str) -> float:
        return 1 / len(answer)

    for reward, words in ((broken, "division by zero"), (lambda *_: math.nan, "is nan, which is no finite number")):
        with pytest.raises(RewardFailed, match=f"the reward mine.*{words}"):
            checked(reward, "mine")("", "", "")


# the loop


def rolled(
    config: Config, fleet: Fleet, reward: Reward, epochs: float, how: dict[str, Any], told: list[Told]
) -> AbstractContextManager[Rollouts]:
    """The rollouts of a run over the prompts, which `learnt` trains."""
    chosen = Recipe.model_validate({**RECIPE, "epochs": epochs, "reinforcement": {"answer_tokens": 3, "group": 8, **how}})
    prompts = [Prompt(ids, "", "", line + 1) for line, ids in enumerate(PROMPTS)]
    task = Task(
        RUN, prompts, prompts, recipe.schedule(chosen, 3), chosen.reinforcement or Reinforcement(), 0, checked(reward, "r")
    )
    registry = registry_of(config)
    return rolling(task, fleet.client, fleet, registry.catalog, registry.store, lambda _, one: told.append(one))


RECIPE = {
    "learning_rate": 0.02,
    "precision": "float32",
    "lora": LORA,
    "global_batch": 3,
    "schedule": "constant",
    "warmup_fraction": 0,
}


def learnt(config: Config, rollouts: Rollouts, chosen: dict[str, Any]) -> list[dict[str, float]]:
    """What one worker measures before the first step and after the last one. It trains as `jobs.training.drivers.worker` does."""
    settings = {"config": config.dump(), "recipe": chosen, "run": RUN, "base": "small@1", "prompts": PROMPTS}
    made: Any = Reinforcing(settings)
    meeting = (config.home / f"meeting-{time.time_ns()}").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        measured = [made.measure(0, 1)]
        for batch in made.schedule.batches():
            while not made.ready(0):
                rollouts.check()
                threading.Event().wait(0.01)
            made.gradients(batch, 0, 1)
            made.flat.optimizer.step()
            made.flat.clear()
        return [*measured, made.measure(0, 1)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_loop_learns_what_is_rewarded(config: Config, tmp_path: Path, staleness: int) -> None:
    """To say token 9, and to end then."""

    def nine(prompt: str, answer: str, reference: str) -> float:
        return float("9" in answer.split())

    registry, told = registry_of(config), list[Told]()
    fleet = Fleet(registry, tmp_path / "cache")
    how = {"staleness": staleness, "answer_tokens": 3, "group": 8}
    with rolled(config, fleet, nine, 25, how, told) as rollouts:
        before, after = learnt(config, rollouts, {**RECIPE, "epochs": 25, "reinforcement": how})
    print([round(one.reward, 2) for one in told])
    assert len(told) == 25 and {round(one.behind) for one in told[2:]} <= set(range(staleness + 1))
    assert told[0].reward < 0.3 and sum(one.reward for one in told[-5:]) / 5 > 0.7
    assert after["reward"] == -after["eval_loss"] > before["reward"]
    assert after["drift"] < (1e-3 if staleness == 0 else 0.5)
    assert 0 < after["publish_p50_s"] <= after["publish_p99_s"]
    assert fleet.most <= staleness + 2 and not fleet.held
    assert registry.store.children(f"versions/{interim_name(RUN)}") and not registry_of(config).catalog.interims(RUN), (
        "the numbers stay taken"
    )
    assert {body["priority"] for body in fleet.bodies} == {1}
    seeds = [body["seed"] for body in fleet.bodies if body["temperature"]]
    assert len(set(seeds)) == len(seeds)


def test_what_a_lost_replica_cost_is_asked_again(config: Config, tmp_path: Path) -> None:
    fleet, told = Fleet(registry_of(config), tmp_path / "cache"), list[Told]()
    fleet.failing = [NoReplica("none"), ReplicaLost("it died"), NoReplica("none")]
    how = {"answer_tokens": 3, "group": 4}
    with rolled(config, fleet, lambda *_: 1.0, 2, how, told) as rollouts:
        learnt(config, rollouts, {**RECIPE, "epochs": 2, "reinforcement": how})
    assert len(told) == 2 and not fleet.failing


def test_a_run_that_is_resumed_has_answers_from_where_it_is(config: Config, tmp_path: Path) -> None:
    """Those of the steps before its checkpoint are gone, and nobody needs them."""
    fleet, how = Fleet(registry_of(config), tmp_path / "cache"), {"answer_tokens": 3, "group": 4}
    made = work(config, how, epochs=8)
    made.flat.tensors(5)
    with rolled(config, fleet, lambda *_: 1.0, 8, how, []) as rollouts:
        while not made.ready(0):
            rollouts.check()
            time.sleep(0.01)
    assert made.exchange.rollouts(4) is None and made.exchange.rollouts(5) is not None


def test_a_reward_that_fails_costs_its_answers_and_one_that_always_fails_ends_the_run(config: Config, tmp_path: Path) -> None:
    def picky(prompt: str, answer: str, reference: str) -> float:
        return 1 / (int(answer.split()[0]) % 2)

    fleet, told = Fleet(registry_of(config), tmp_path / "cache"), list[Told]()
    how = {"answer_tokens": 3, "group": 8}
    with rolled(config, fleet, lambda *_: 1 / 0, 1, how, told) as rollouts:
        made: Any = Reinforcing(
            {
                "config": config.dump(),
                "recipe": {**RECIPE, "reinforcement": how},
                "run": RUN,
                "base": "small@1",
                "prompts": PROMPTS,
            }
        )
        made.ready(0)
        with pytest.raises(JobFailed, match=r"No held-out answer has a reward: line \d: the reward r fails: ZeroDivisionError"):
            while True:
                rollouts.check()
                threading.Event().wait(0.01)
    exchange = Exchange(registry_of(config).store, RUN)
    exchange.put_measured(0, {"reward": 0.0})
    with rolled(config, fleet, picky, 1, how, told) as rollouts:
        made.publisher.offered = -1
        made.ready(0)
        while (groups := exchange.rollouts(0)) is None:
            rollouts.check()
            threading.Event().wait(0.01)
    assert told[-1].failed > 0 and told[-1].failed + sum(len(group.samples) for group in groups) == 24
