"""Supervised fine-tuning: trains a base version on a data file, and registers the next version.

``python -m jobs.finetune --data FILE_OR_URL --base seedling --publish`` trains a LoRA adapter (or all the weights with
``--full``) on as many slots as there are (`jobs.training.driver`), measures the loss on held-out examples before and after, registers the
result with its lineage and asks control to make it live. It checks the whole request before it starts anything in Ray.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import Config, Fleet, load
from cluster.errors import ConfigError, VersionRefused
from cluster.jobspec import Finetune, command_line, with_workers
from cluster.publishing.rollout import Rollout
from cluster.store.fleets import FleetRecords
from cluster.store.jobs import JobProgress
from cluster.store.registry import Registry, registry_of
from cluster.types import Lineage, Manifest, check_name
from jobs import main, reach, sources
from jobs.data import chat, rows
from jobs.data.chat import Dataset, Example
from jobs.data.rows import Row
from jobs.publish import publish
from jobs.record import JobRecord, record
from jobs.training import recipe
from jobs.training.progress import Progress

DECIDED_S = 60
"""How long control may take to act on a verdict. It looks twice a second."""


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
        rollout = publish(manifest.id, manifest.id.name, f"fine-tuned on {plan.source}", job.id)
        if rollout.stage == "registered":
            rollout = judged(config, registry, plan, rollout, options.priority, job)
        job.made(**result(manifest, rollout.stage))


def judged(config: Config, registry: Registry, plan: Plan, rollout: Rollout, priority: int, job: JobRecord) -> Rollout:
    """Measure the version for the gate, and wait for the gate's decision. Raises `VersionRefused` if the gate refuses the version.

    If the configuration names no sets, the gate compares the loss on this run's held-out examples.
    """
    from jobs.evaluate import Sets, evaluate, supplied

    sets = supplied(config)
    sets = sets if any(sets) else Sets(plan.held_out_examples, [], [])
    verdict = evaluate(config, registry, registry.manifest(rollout.version), rollout.incumbent, sets, priority, job)
    print(verdict.words, flush=True)
    deadline_s = time.monotonic() + DECIDED_S
    while rollout.stage == "registered" and time.monotonic() < deadline_s:
        time.sleep(0.2)
        rollout = registry.records(rollout.alias, rollout.number)[-1]
    if rollout.stage == "rolled_back":
        raise VersionRefused(f"{rollout.version} is registered but not live: {rollout.reason}", "The live version is unchanged.")
    return rollout


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


def check_fits(chosen: recipe.Recipe, config: Config, registry: Registry, base: str) -> None:
    """Raise `ConfigError` for an adapter that the engine would refuse after the training."""
    if chosen.lora is None:
        return
    name, fleet = hosting_fleet(config, registry, base)
    if chosen.lora.rank > fleet.max_lora_rank:
        whose = f"the fleet {name}" if name else "every fleet"
        raise ConfigError(
            f"lora.rank {chosen.lora.rank} is above max_lora_rank {fleet.max_lora_rank} of {whose}: the engine could not load the adapter.",
            f"Use --set lora.rank={fleet.max_lora_rank}, or host {base} with a larger max_lora_rank.",
            param="lora.rank",
        )


def hosting_fleet(config: Config, registry: Registry, base: str) -> tuple[str, Fleet]:
    """The fleet that would serve an adapter on ``base``, with its name: of the configuration, or one that was added since. Where none hosts
    ``base`` yet, what every fleet has, without a name."""
    fleets = FleetRecords(registry.store).with_declared(config)
    for name, fleet in fleets.items():
        if fleet.model == base.partition("@")[0]:
            return name, fleet
    weights = registry.resolve(base).weights
    for name, fleet in fleets.items():
        live = registry.alias(fleet.model)
        if live is not None and registry.manifest(live.stable).weights == weights:
            return name, fleet
    return "", config.fleet


def resolve(registry: Registry, base: str) -> Manifest:
    """The weights to train on. For an adapter these are the weights under it, and the log says so."""
    found = registry.resolve(base)
    if found.kind == "adapter":
        print(f"{found.id} is an adapter; training starts from its base {found.weights}")
    return registry.manifest(found.weights)


def tokenized(
    config: Config,
    registry: Registry,
    base: Manifest,
    chosen: recipe.Recipe,
    dataset: Dataset,
    held_out: list[Example] | None,
) -> Plan:
    from transformers import AutoConfig, AutoTokenizer

    from jobs.training import precision

    folder = registry.files.fetch_settings(base, config.home / "cache")
    shape = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    resolved = chosen.resolved(shape.hidden_size, shape.max_position_embeddings)
    resolved = precision.resolve(resolved, config.pool.accelerator == "gpu", shape.hidden_size)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{base.id} has no chat template.", "Use a chat model as the base.", param="base")
    limit = resolved.max_tokens or shape.max_position_embeddings
    # What is too long is left out before anything is held out, so that the held-out fraction is of what is learnt.
    learnt = rows.tokenize(dataset.examples, tokenizer, limit)
    if held_out is None:
        all_lines = {example.line for example in learnt.examples}
        lines = rows.split(all_lines, resolved.held_out_fraction, resolved.seed)
        kept, measured = learnt.only(all_lines - lines), learnt.only(lines)
    else:
        kept, measured = learnt, rows.tokenize(held_out, tokenizer, limit)
    print(rows.described(kept.rows, measured.rows, learnt.too_long, limit))
    if measured.too_long:
        print(f"{len(measured.too_long)} examples of --eval-data left out, longer than {limit:,} tokens")
    return Plan(base, resolved, kept.rows, measured.rows, measured.examples, dataset.sha256, dataset.source)


# with Ray


def train(config: Config, registry: Registry, plan: Plan, options: Finetune, job: JobRecord) -> Manifest:
    """Train as planned, and register the result: an adapter on the base, or new weights."""
    from jobs.training import driver, ray_train, runs
    from jobs.training.objectives.finetune import SupervisedFineTuning

    ray_train.connect()
    settings = {
        "config": config.dump(),
        "recipe": plan.recipe.model_dump(),
        "base": str(plan.base.id),
        "train": plan.train,
        "held_out": plan.held_out,
        "stage": "finetune",
    }
    inputs = {"base": settings["base"], "recipe": settings["recipe"], "data": plan.dataset_sha256}
    name = runs.resume(registry.store, options.resume, inputs) if options.resume else runs.begin(registry.store, job.id, inputs)
    job.begin_run(name)
    ended = driver.fit(config, SupervisedFineTuning, settings, name, options.priority, job)
    job.watch(whole(plan, ended.metrics, job.snapshot.progress))
    lineage = Lineage(
        parent=plan.base.id,
        dataset_sha256=plan.dataset_sha256,
        recipe=plan.recipe.model_dump(exclude_none=True),
        job=job.id,
        code_revision=ray_train.code_revision(),
        metrics={**ended.metrics, "examples": len(plan.train)},
    )
    kind, base = ("adapter", plan.base.id) if plan.recipe.lora else ("weights", None)
    with tempfile.TemporaryDirectory() as scratch, runs.result(config, ended.name, Path(scratch)) as folder:
        return registry.register(options.name or plan.base.id.name, kind, base, folder, lineage)


def whole(plan: Plan, metrics: dict[str, float], last: JobProgress | None) -> Progress:
    """The progress of a run at its end. The driver looks once a second, so it may have missed the last step, or all of a short run."""
    steps = recipe.schedule(plan.recipe, len(plan.train)).steps
    loss, tokens = metrics.get("train_loss", math.nan), int(metrics.get("tokens", 0))
    if last is None:
        return Progress(steps, steps, loss, tokens, 0.0, 0.0, 0)
    return Progress(steps, steps, loss, tokens, last.tokens_per_s, 0.0, last.workers, last.mfu, last.memory_mb)


if __name__ == "__main__":
    main(run)
