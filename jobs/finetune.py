"""Supervised fine-tuning: trains a base version on a data file, and registers the next version.

``python -m jobs.finetune --data FILE_OR_URL --base seedling --publish`` trains a LoRA adapter (or all the weights with
``--full``) on as many slots as there are (`jobs.training.driver`), measures the loss on held-out examples before and after, registers the
result with its lineage and asks control to make it live. It checks the whole request before it starts anything in Ray.
"""

from typing import NamedTuple

from cluster.config import Config, load
from cluster.jobspec import Finetune, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, check_name
from jobs import main, reach, sources
from jobs.data import chat
from jobs.data.chat import Dataset, Example
from jobs.data.rows import Row
from jobs.record import JobRecord, record
from jobs.release import release
from jobs.training import recipe
from jobs.training.base import check_fits, divided, opened, resolve


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    base: Manifest
    recipe: recipe.Recipe
    """With its defaults resolved."""
    train: list[Row]
    held_out: list[Row]
    held_out_examples: list[Example]
    """The held-out examples before they were tokenised."""
    dataset_sha256: str
    source: str
    """The dataset's name in messages and records."""


def run() -> None:
    options: Finetune = command_line("finetune")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        finetune(config, options, job)


def finetune(config: Config, options: Finetune, job: JobRecord) -> None:
    """Check the request, train, register the result, and publish it if the options say so."""
    registry = registry_of(config)
    plan = prepare(config, registry, options)
    job.know(base=str(plan.base.id), dataset_sha256=plan.dataset_sha256, recipe=plan.recipe.model_dump(exclude_none=True))
    manifest = train(config, registry, plan, options, job)
    from jobs.training.ray_train import result

    job.made(**result(manifest, None))  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        reason = f"fine-tuned on {plan.source}"
        rollout = release(config, registry, manifest, reason, plan.held_out_examples, options.priority, job)
        job.made(**result(manifest, rollout.stage))


# before Ray


def prepare(config: Config, registry: Registry, options: Finetune) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch, base_name = sources.of(config), options.base or config.default_model
    chosen = recipe.load("full" if options.full else options.recipe, options.set, options.epochs, fetch)
    check_fits(chosen, config, registry, base_name)
    check_name(options.name or "unnamed")
    dataset = chat.read(options.data, fetch)
    held_out = chat.read(options.eval_data, fetch).examples if options.eval_data else None
    registry.store.check_writable()
    base = resolve(registry, base_name)
    reach(config)
    return tokenized(config, registry, base, chosen, dataset, held_out)


def tokenized(
    config: Config,
    registry: Registry,
    manifest: Manifest,
    chosen: recipe.Recipe,
    dataset: Dataset[Example],
    held_out: list[Example] | None,
) -> Plan:
    base = opened(config, registry, manifest, chosen)
    return Plan(manifest, base.recipe, *divided(base, dataset, held_out), dataset.sha256, dataset.source)


# with Ray


def train(config: Config, registry: Registry, plan: Plan, options: Finetune, job: JobRecord) -> Manifest:
    """Train as planned, and register the result: an adapter on the base, or new weights."""
    from jobs.training import ray_train
    from jobs.training.launch import Learning, begun, trained
    from jobs.training.objectives.finetune import SupervisedFineTuning

    ray_train.connect()
    base = str(plan.base.id)
    run = begun(registry, options.resume, {"base": base, "recipe": plan.recipe.model_dump(), "data": plan.dataset_sha256}, job)
    settings = {"base": base, "train": plan.train, "held_out": plan.held_out, "stage": "finetune"}
    name = options.name or plan.base.id.name
    learning = Learning(
        SupervisedFineTuning, settings, plan.recipe, len(plan.train), plan.dataset_sha256, name, parent=plan.base.id
    )
    return trained(config, registry, run, learning, options.priority, job, options.trainer)


if __name__ == "__main__":
    main(run)
