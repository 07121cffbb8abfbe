"""Direct preference optimisation: trains a base version on pairs of answers, and registers the next version.

``python -m jobs.dpo --data FILE_OR_URL --base support@3 --publish`` teaches a model which of two answers is preferred (Rafailov et al. 2023), and
measures on held-out pairs how often it agrees. It registers the result with its lineage and asks control to make it live. It checks the whole
request before it starts anything in Ray.
"""

from typing import NamedTuple

from cluster.config import Config, load
from cluster.jobspec import Dpo, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, check_name
from jobs import main, reach, sources
from jobs.data import pairs
from jobs.data.chat import Dataset, Example
from jobs.data.pairs import Pair, PairRow
from jobs.record import JobRecord, record
from jobs.release import release
from jobs.training import recipe
from jobs.training.base import check_fits, opened, resolve


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    base: Manifest
    recipe: recipe.Recipe
    """With its defaults resolved."""
    train: list[PairRow]
    held_out: list[PairRow]
    preferred: list[Example]
    """The preferred answers of the held-out pairs, before they were tokenised."""
    dataset_sha256: str
    eval_sha256: str
    """Empty if a part of the data is held out."""
    source: str
    """The dataset's name in messages and records."""


def run() -> None:
    options: Dpo = command_line("dpo")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        optimize(config, options, job)


def optimize(config: Config, options: Dpo, job: JobRecord) -> None:
    """Check the request, train, register the result, and publish it if the options say so."""
    registry = registry_of(config)
    plan = prepare(config, registry, options)
    job.know(base=str(plan.base.id), dataset_sha256=plan.dataset_sha256, recipe=plan.recipe.model_dump(exclude_none=True))
    manifest = train(config, registry, plan, options, job)
    from jobs.training.ray_train import result

    job.made(**result(manifest, None))  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        reason = f"learnt the preferences of {plan.source}"
        rollout = release(config, registry, manifest, reason, plan.preferred, options.priority, job)
        job.made(**result(manifest, rollout.stage))


# before Ray


def prepare(config: Config, registry: Registry, options: Dpo) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch, base_name = sources.of(config), options.base or config.default_model
    chosen = recipe.load(options.recipe, options.set, options.epochs, fetch, "dpo")
    check_fits(chosen, config, registry, base_name)
    check_name(options.name or "unnamed")
    dataset = pairs.read(options.data, fetch)
    held_out = pairs.read(options.eval_data, fetch) if options.eval_data else None
    registry.store.check_writable()
    base = resolve(registry, base_name)
    reach(config)
    return tokenized(config, registry, base, chosen, dataset, held_out)


def tokenized(
    config: Config,
    registry: Registry,
    manifest: Manifest,
    chosen: recipe.Recipe,
    dataset: Dataset[Pair],
    held_out: Dataset[Pair] | None,
) -> Plan:
    base = opened(config, registry, manifest, chosen)
    limit, resolved = base.limit_tokens, base.recipe
    # What is too long is left out before anything is held out, so that the held-out fraction is of what is learnt.
    learnt = pairs.tokenize(dataset.examples, base.tokenizer, limit)
    if held_out is None:
        kept, measured = learnt.parted(resolved.held_out_fraction, resolved.seed)
    else:
        kept, measured = learnt, pairs.tokenize(held_out.examples, base.tokenizer, limit)
    print(pairs.described(kept.rows, measured.rows, learnt.too_long, limit))
    if measured.too_long:
        print(f"{len(measured.too_long)} pairs of --eval-data left out, longer than {limit:,} tokens")
    preferred = [pair.chosen for pair in measured.examples]
    digests = dataset.sha256, held_out.sha256 if held_out else ""
    return Plan(manifest, resolved, kept.rows, measured.rows, preferred, *digests, dataset.source)


# with Ray


def train(config: Config, registry: Registry, plan: Plan, options: Dpo, job: JobRecord) -> Manifest:
    """Train as planned, and register the result: an adapter on the base, or new weights."""
    from jobs.training import ray_train
    from jobs.training.launch import Learning, begun, trained
    from jobs.training.objectives.dpo import PreferenceOptimization

    ray_train.connect()
    base = str(plan.base.id)
    # The held-out pairs count too: what the base makes of them is kept with the run.
    inputs = {"base": base, "recipe": plan.recipe.model_dump(), "data": plan.dataset_sha256, "eval_data": plan.eval_sha256}
    run = begun(registry, options.resume, inputs, job)
    settings = {"base": base, "train": plan.train, "held_out": plan.held_out, "run": run, "stage": "dpo"}
    name = options.name or plan.base.id.name
    learning = Learning(
        PreferenceOptimization, settings, plan.recipe, len(plan.train), plan.dataset_sha256, name, parent=plan.base.id
    )
    return trained(config, registry, run, learning, options.priority, job, options.trainer)


if __name__ == "__main__":
    main(run)
