"""Reinforcement learning: trains an adapter on rewards of its own answers, and registers it.

``python -m jobs.rl --data FILE_OR_URL --reward exact --base seedling`` samples answers from the replicas that serve the base to everybody, rewards
them (`jobs.training.objectives.rewards`), and makes good ones more likely (`jobs.training.objectives.rl`). After each step the same replicas hold
the new adapter, under a name that clients do not know. The adapter with the best reward on held-out prompts is registered, and published if asked.

It checks the whole request before it starts anything in Ray.
"""

import math
import os
from typing import Any, NamedTuple

from cluster import endpoint
from cluster.client import Client
from cluster.config import Config, load
from cluster.errors import ConfigError
from cluster.jobspec import ORIGIN, Rl, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, check_name
from jobs import answers, main, reach, sources
from jobs.data import chat, rows
from jobs.data.chat import Example
from jobs.data.rows import Tokenized
from jobs.record import JobRecord, record
from jobs.release import release
from jobs.rollouts import Prompt, Task, Told, rolling
from jobs.training import recipe
from jobs.training.base import Base, check_fits, opened, resolve
from jobs.training.objectives import rewards
from jobs.training.objectives.rewards import Reward

SLOWER = 0.25
"""Of the learning rate of `springtide train` for the same model: a reward says less than an answer does. Found on the seedling."""


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    base: Base
    prompts: list[Prompt]
    held_out: list[Prompt]
    held_out_examples: list[Example]
    dataset_sha256: str
    source: str
    """The dataset's name in messages and records."""
    pool: Client
    reward: Reward


def run() -> None:
    options: Rl = command_line("rl")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        rl(config, options, job)


def rl(config: Config, options: Rl, job: JobRecord) -> None:
    """Check the request, train, register the result, and publish it if the options say so."""
    registry = registry_of(config)
    plan = prepare(config, registry, options)
    recipe = plan.base.recipe.model_dump(exclude_none=True)
    job.know(base=str(plan.base.manifest.id), dataset_sha256=plan.dataset_sha256, recipe=recipe, reward=options.reward)
    manifest = train(config, registry, plan, options, job)
    from jobs.training.drivers.ray_train import result

    job.made(**result(manifest, None))  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        reason = f"rewarded by {options.reward} on {plan.source}"
        rollout = release(config, registry, manifest, reason, plan.held_out_examples, options.priority, job)
        job.made(**result(manifest, rollout.stage))


# before Ray


def prepare(config: Config, registry: Registry, options: Rl) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch, base_name = sources.of(config), options.base or config.default_model
    chosen = chosen_recipe(config, options, fetch)
    check_fits(chosen, config, registry, base_name)
    check_name(options.name or "unnamed")
    dataset = chat.read(options.data, fetch)
    held_out = chat.read(options.eval_data, fetch).examples if options.eval_data else None
    registry.store.check_writable()
    manifest = resolve(registry, base_name)
    reach(config)
    pool = Client(endpoint.find())
    reward = rewards.checked(rewards.named(options.reward, pool, os.environ.get(ORIGIN) == "http"), options.reward)
    answers.check_served(pool, manifest.id)
    base = opened(config, registry, manifest, chosen)
    train, held = divided(base, dataset.examples, held_out)
    base = base._replace(recipe=resolved(base.recipe, chosen, len(train.rows), options.steps))
    return Plan(base, prompts_of(train), prompts_of(held), held.examples, dataset.sha256, dataset.source, pool, reward)


def chosen_recipe(config: Config, options: Rl, fetch: sources.Fetch) -> recipe.Recipe:
    """The recipe, with the section ``reinforcement``. Raises `ConfigError` where it trains no adapter, or the gateway refuses its groups."""
    chosen = recipe.load(options.recipe, options.set, options.epochs, fetch, verb="rl")
    if chosen.lora is None:
        raise ConfigError(
            "The fleet can hold the weights of each step as an adapter only.", "Keep lora in the recipe.", param="lora"
        )
    how = chosen.reinforcement or recipe.Reinforcement()
    if how.group > config.gateway.max_choices:
        raise ConfigError(
            f"A group of {how.group} answers is more than gateway.max_choices, {config.gateway.max_choices}.",
            "Lower reinforcement.group, or raise the limit.",
            param="reinforcement.group",
        )
    return chosen.model_copy(update={"reinforcement": how})


def resolved(resolved: recipe.Recipe, chosen: recipe.Recipe, prompts: int, steps: int | None) -> recipe.Recipe:
    """The recipe with what follows from the model and from the length of the run."""
    rate = chosen.learning_rate or SLOWER * (resolved.learning_rate or 0.0)
    per_epoch = math.ceil(prompts / chosen.global_batch)
    return resolved.model_copy(update={"learning_rate": rate, "epochs": steps / per_epoch if steps else chosen.epochs})


def divided(base: Base, data: list[Example], held_out: list[Example] | None) -> tuple[Tokenized, Tokenized]:
    """The examples to learn from, and those to measure on. A prompt that leaves no room for an answer is left out."""
    how = base.recipe.reinforcement or recipe.Reinforcement()
    limit = base.limit_tokens - how.answer_tokens
    if limit < 1:
        raise ConfigError(
            f"Answers of {how.answer_tokens} tokens leave no room for a prompt: {base.manifest.id} takes {base.limit_tokens:,} in all.",
            "Lower reinforcement.answer_tokens.",
            param="reinforcement.answer_tokens",
        )
    learnt = rows.tokenize(data, base.tokenizer, limit)
    if held_out is None:
        all_lines = {example.line for example in learnt.examples}
        lines = rows.split(all_lines, base.recipe.held_out_fraction, base.recipe.seed)
        kept, measured = learnt.only(all_lines - lines), learnt.only(lines)
    else:
        kept, measured = learnt, rows.tokenize(held_out, base.tokenizer, limit)
    print(
        f"{len(kept.rows):,} prompts to learn from, {len(measured.rows):,} to measure on; {len(learnt.too_long):,} left out, with no room "
        f"for an answer of {how.answer_tokens} tokens"
    )
    return kept, measured


def prompts_of(some: Tokenized) -> list[Prompt]:
    return [
        Prompt(row.input_ids[: row.prompt_tokens], example.prompt[-1]["content"], example.completion[0]["content"], example.line)
        for example, row in zip(some.examples, some.rows, strict=True)
    ]


# with Ray


def train(config: Config, registry: Registry, plan: Plan, options: Rl, job: JobRecord) -> Manifest:
    """Train as planned, and register the adapter."""
    from cluster.control import client as control
    from jobs.training.drivers import ray_train
    from jobs.training.launch import Learning, begun, trained
    from jobs.training.objectives.rl import Reinforcing

    ray_train.connect()
    base, chosen = plan.base.manifest.id, plan.base.recipe
    inputs = {"base": str(base), "recipe": chosen.model_dump(), "data": plan.dataset_sha256, "reward": options.reward}
    run = begun(registry, options.resume, inputs, job)
    how, schedule = chosen.reinforcement or recipe.Reinforcement(), recipe.schedule(chosen, len(plan.prompts))
    task = Task(run, plan.prompts, plan.held_out, schedule, how, chosen.seed, plan.reward)

    def tell(step: int, told: Told) -> None:
        job.sampled(step, told._asdict())

    with rolling(task, plan.pool, control.connect(), registry.catalog, registry.store, tell) as rollouts:
        prompts: list[Any] = [prompt.ids for prompt in plan.prompts]
        settings = {"run": run, "base": str(base), "prompts": prompts, "stage": "rl"}
        facts, name = {"reward": options.reward}, options.name or base.name
        learning = Learning(Reinforcing, settings, chosen, len(prompts), plan.dataset_sha256, name, base, facts, rollouts.check)
        manifest = trained(config, registry, run, learning, options.priority, job)
    registry.catalog.remove_interims(run)
    return manifest


if __name__ == "__main__":
    main(run)
